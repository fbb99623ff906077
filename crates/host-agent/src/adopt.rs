//! What an agent finds at its start, and what it makes of it: sandboxes that go on, and remains that go.
//!
//! ```text
//!  records ─► which machines are somebody's (pure) ─► end the others ─► remove free slots, at once or later
//!     │
//!     └─► each record ─► paused                     : known again, as it is
//!                        a pause that was committed : the same; its machine was among the others
//!                        a rollback under way       : the former machine is adopted; the new one was among the others
//!                        a machine that was up      : adopted; let run and opened again if it stood still
//!                        anything else              : half-made, and removed
//! ```
//!
//! Records are gone through several at a time, because who uses a sandbox waits meanwhile: nothing that can wait is
//! done before its machine answers.
//!
//! Only what is this instance's own is touched. A machine is known by the mark in its command line, a namespace by
//! the owner in its slot's file, a directory by being in this instance's.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use camino::Utf8Path;
use futures::StreamExt as _;
use tokio::time::timeout;
use wrenn_host_linux::process::find_by_argument;
use wrenn_types::{InstanceId, SandboxId};
use wrenn_vmm::{AdoptedMachine, VmmError};

use crate::{
    limits::Limits,
    network::{Policy, PolicyError, SlotError, addresses::SlotNumber},
    registry::Registry,
    sandbox::{
        SandboxSpec,
        bring_up::Up,
        capture,
        driver::Beginning,
        host::Host,
        machine::{Machine, remove_run_dir},
        record::{self, Ledger, Left, PausedRecord, Record, RecordError, SandboxDir},
    },
    snapshot_store::SnapshotStoreError,
    snapshots::Kept,
    warm::blocking,
};

/// How long a killed process may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(10);
/// How many sandboxes are taken over at the same time.
const AT_ONCE: usize = 16;

/// Something that was left could not be looked at or removed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The machines could not be found or ended.
    #[error("could not end the machines that were left")]
    Machines(#[source] io::Error),
    /// The namespaces could not be removed.
    #[error("could not remove the network slots that were left")]
    Network(#[source] SlotError),
    /// The records could not be read or removed.
    #[error("could not read or remove what was left of a sandbox")]
    Record(#[source] RecordError),
    /// The sockets could not be removed.
    #[error("could not clear the machines' directory")]
    RunDir(#[source] io::Error),
}

/// Why a machine that lives is not this agent's.
#[derive(Debug, thiserror::Error)]
enum AdoptError {
    #[error("its machine cannot be controlled")]
    Machine(#[source] VmmError),
    #[error("its network slot is not one")]
    Number,
    #[error("its network policy cannot be")]
    Policy(#[source] PolicyError),
    #[error("its network slot cannot be taken over")]
    Slot(#[source] SlotError),
    #[error("what its memory stands on cannot be used")]
    Base(#[source] SnapshotStoreError),
    #[error("what its memory stands on is not here")]
    NoBase,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Stock {
    /// Processes that were nobody's, and were ended.
    pub ended: usize,
    /// Sandboxes to go on with.
    left: Vec<(Ledger, Fate)>,
    /// Directories of what is half-made.
    remains: Vec<SandboxDir>,
    /// The machines of what goes on.
    pub(crate) machines: BTreeSet<String>,
    /// The names of their directories.
    directories: BTreeSet<String>,
}

impl Stock {
    /// Whether there are machines to go on with, for which somebody may be waiting.
    pub fn has_machines(&self) -> bool {
        self.left.iter().any(|(_, fate)| matches!(fate, Fate::Machine))
    }
}

/// What a sandbox goes on as.
#[derive(Debug)]
enum Fate {
    Paused(Box<Kept>),
    Machine,
}

/// What an agent did at its start.
#[derive(Debug, Default)]
pub struct Taken {
    /// Sandboxes that run on.
    pub adopted: Vec<SandboxId>,
    /// Sandboxes that are paused.
    pub paused: Vec<SandboxId>,
    /// Sandboxes of which nothing is left.
    pub removed: Vec<SandboxId>,
}

/// The snapshot that a sandbox is to be taken for, if it is to be taken for one.
fn saved_as(record: &Record) -> Option<&wrenn_types::SnapshotId> {
    let capture = record.capture.as_ref().filter(|capture| capture.pause).map(|capture| &capture.snapshot);
    record.paused.as_ref().map(|paused| &paused.snapshot).or(capture)
}

/// Whether the machine that a record names is whole: its guest was itself once.
fn has_machine(record: &Record) -> bool {
    record.machine.as_ref().is_some_and(|machine| machine.up)
}

/// Reads what there is, and ends the machines that are nobody's. Their network slots can be collected then.
///
/// # Errors
/// The first thing that could not be read or removed: an agent must not start then, because it could give away
/// what is still in use.
pub async fn take_stock(
    instance: &InstanceId,
    snapshots: &crate::snapshots::Snapshots,
    sandboxes_dir: &Utf8Path,
    machines_dir: &Utf8Path,
    limits: &Limits,
) -> Result<Stock, CollectError> {
    let mut stock = examine(instance, snapshots, sandboxes_dir)?;
    stock.ended = end_machines(instance, &stock.machines).await.map_err(CollectError::Machines)?;
    let mark = Host::machine_mark(instance);
    limits.keep_only(|name| stock.machines.contains(&format!("{mark}{name}")));
    stock.clear(machines_dir)?;
    Ok(stock)
}

/// Decides by its record what becomes of each sandbox. Nothing is ended and nothing removed yet.
///
/// # Errors
/// A record could not be read or replaced.
pub(crate) fn examine(
    instance: &InstanceId,
    snapshots: &crate::snapshots::Snapshots,
    sandboxes_dir: &Utf8Path,
) -> Result<Stock, CollectError> {
    let mut stock = Stock::default();
    for Left { dir, record } in record::left_behind(sandboxes_dir).map_err(CollectError::Record)? {
        let Some(mut record) = record.filter(|record| record.instance == *instance) else {
            stock.remains.push(dir);
            continue;
        };
        let found = record.clone();
        let saved = match saved_as(&record) {
            Some(id) => match snapshots.get(id) {
                Ok(kept) => kept,
                // The machine is still there, whatever became of what it was to be saved as.
                Err(error) if record.paused.is_none() => {
                    tracing::warn!(id = %record.id, error = &error as &dyn std::error::Error, "a pause that was under way cannot be read");
                    None
                }
                // It is not lost, and not usable: what is there stays for a person to look at.
                Err(error) => {
                    tracing::error!(id = %record.id, error = &error as &dyn std::error::Error, "a paused sandbox cannot be read");
                    continue;
                }
            },
            None => None,
        };
        if let Some(kept) = saved {
            // A pause whose machine was not ended yet, or a resume that was not answered: what is saved is it.
            let at = record.paused.as_ref().map_or(kept.about.created_at, |paused| paused.at);
            record.paused = Some(PausedRecord { snapshot: kept.id.clone(), at });
            record.layers.clone_from(&kept.about.layers);
            (record.capture, record.machine) = (None, None);
            let ledger = ledger_of(dir, found, record)?;
            stock.left.push((ledger, Fate::Paused(Box::new(kept))));
            continue;
        }
        // A rollback that was not answered: the machine that stands still goes on.
        record.go_back();
        if let Some(machine) = record.machine.as_ref().filter(|_| has_machine(&record)) {
            stock.machines.insert(Host::machine_name(instance, &record.id, &machine.name));
            stock.directories.insert(machine.name.to_string());
            if let Some(obsolete) = &record.obsolete {
                // It was brought back from this, and whoever was to delete it was killed.
                match snapshots.delete(obsolete) {
                    Ok(_) => record.obsolete = None,
                    Err(error) => {
                        tracing::warn!(%obsolete, error = &error as &dyn std::error::Error, "a snapshot that is not needed stays until the next start");
                    }
                }
            }
            stock.left.push((ledger_of(dir, found, record)?, Fate::Machine));
        } else {
            stock.remains.push(dir);
        }
    }
    Ok(stock)
}

/// The ledger of a sandbox whose record was `found` and is to be `record`, which is written only where it differs.
fn ledger_of(dir: SandboxDir, found: Record, record: Record) -> Result<Ledger, CollectError> {
    let is_new = record != found;
    let ledger = Ledger::new(dir, found);
    if is_new {
        ledger.put(record).map_err(CollectError::Record)?;
    }
    Ok(ledger)
}

impl Stock {
    /// Removes the machines' directories that belong to none of its machines.
    pub(crate) fn clear(&self, machines_dir: &Utf8Path) -> Result<(), CollectError> {
        for entry in machines_dir.read_dir_utf8().map_err(CollectError::RunDir)? {
            let entry = entry.map_err(CollectError::RunDir)?;
            if !self.directories.contains(entry.file_name()) {
                std::fs::remove_dir_all(entry.path()).map_err(CollectError::RunDir)?;
            }
        }
        Ok(())
    }
}

/// Kills the machines of this instance that are in nobody's record, and waits until each is gone.
async fn end_machines(instance: &InstanceId, kept: &BTreeSet<String>) -> io::Result<usize> {
    let found = find_by_argument(&format!("guest={}", Host::machine_mark(instance)))?;
    let mut ended = 0;
    for machine in &found {
        let name = machine.argument.strip_prefix("guest=").unwrap_or(&machine.argument);
        let name = name.split(',').next().unwrap_or(name);
        if !kept.contains(name) {
            timeout(KILL_BOUND, machine.process.kill_and_wait()).await??;
            ended += 1;
        }
    }
    Ok(ended)
}

/// Goes on with what was found.
///
/// # Errors
/// What is half-made could not be removed.
pub async fn take_over(host: &Arc<Host>, registry: &Registry, stock: Stock) -> Result<Taken, CollectError> {
    let mut taken = Taken::default();
    let mut ways = futures::stream::iter(stock.left)
        .map(|(ledger, fate)| go_on(host, registry, Arc::new(ledger), fate))
        .buffer_unordered(AT_ONCE);
    while let Some(way) = ways.next().await {
        match way {
            Way::Adopted(id) => taken.adopted.push(id),
            Way::Paused(id) => taken.paused.push(id),
            Way::Removed(id) => taken.removed.push(id),
        }
    }
    for dir in stock.remains {
        taken.removed.extend(dir.path().file_name().and_then(|name| name.parse().ok()));
        blocking(move || dir.remove()).await.map_err(CollectError::Record)?;
    }
    Ok(taken)
}

/// What became of a sandbox that was to go on.
enum Way {
    Adopted(SandboxId),
    Paused(SandboxId),
    Removed(SandboxId),
}

async fn go_on(host: &Arc<Host>, registry: &Registry, ledger: Arc<Ledger>, fate: Fate) -> Way {
    let record = ledger.record();
    let id = record.id.clone();
    match fate {
        Fate::Paused(kept) => {
            registry.take_over(spec(record), Beginning::Paused(ledger, kept)).begun().await;
            Way::Paused(id)
        }
        Fate::Machine => match adopt(host, &ledger).await {
            Ok(up) => {
                registry.take_over(spec(record), Beginning::Adopted(Box::new(up))).begun().await;
                Way::Adopted(id)
            }
            Err(error) => {
                // It died while nobody looked, or it is beyond control: either way it is no sandbox any more.
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "a sandbox could not be taken over");
                // Others go on meanwhile, so that no error of this one ends the start.
                if let Err(error) = end_machine(host, &record).await {
                    tracing::error!(%id, error = &error as &dyn std::error::Error, "its machine is left to be collected");
                } else if let Err(error) = ledger.remove().await {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "its record stays until the next start");
                }
                Way::Removed(id)
            }
        },
    }
}

/// Ends the machine of a record, if it lives, and removes its directory.
async fn end_machine(host: &Host, record: &Record) -> io::Result<()> {
    let Some(machine) = &record.machine else { return Ok(()) };
    let name = Host::machine_name(&host.instance, &record.id, &machine.name);
    for found in find_by_argument(&format!("guest={name}"))? {
        timeout(KILL_BOUND, found.process.kill_and_wait()).await??;
    }
    remove_run_dir(&host.run_dir(&machine.name));
    host.limits.end(&record.id, &machine.name);
    Ok(())
}

/// What a sandbox was made as, from its record.
fn spec(record: Record) -> SandboxSpec {
    SandboxSpec {
        id: record.id,
        generation: record.generation,
        template: record.template,
        shape: record.shape,
        disk: record.disk,
        access_token: record.access_token,
        environment: record.environment,
        default_user: Some(record.default_user),
        default_workdir: Some(record.default_workdir),
        snapshot: None,
        settings: record.settings,
    }
}

/// Takes a machine over: control, network, exit notice. One that stood still is let run.
async fn adopt(host: &Arc<Host>, ledger: &Arc<Ledger>) -> Result<Up, AdoptError> {
    let record = ledger.record();
    let Some(machine) = &record.machine else { return Err(AdoptError::Number) };
    let (snapshots, key) = (host.snapshots.clone(), record.base.clone());
    let base = blocking(move || snapshots.base(&key)).await.map_err(AdoptError::Base)?;
    let base = base.ok_or(AdoptError::NoBase)?;
    let run_dir = host.run_dir(&machine.name);
    let wanted = AdoptedMachine {
        name: Host::machine_name(&host.instance, &record.id, &machine.name),
        run_dir: run_dir.clone(),
        has_disk: true,
        memory: Some(base.memory.clone()),
        pid_hint: None,
    };
    let vm = host.vmm.adopt(wanted).await.map_err(AdoptError::Machine)?;
    let number = SlotNumber::new(machine.slot).map_err(|_| AdoptError::Number)?;
    let policy = Policy::resolve(&record.settings.network, &host.dns_servers).map_err(AdoptError::Policy)?;
    let slot = host.slots.adopt(number, &policy).await.map_err(AdoptError::Slot)?;
    let machine = Machine {
        id: record.id.clone(),
        name: machine.name.clone(),
        vm,
        slot,
        run_dir,
        base_memory: base.memory,
        base_disk: base.disk.path,
    };
    let mut up = Up {
        machine,
        ledger: Arc::clone(ledger),
        phases: Vec::new(),
        idle: None,
        stream_after: tokio::time::Instant::now(),
        go_on_at: None,
    };
    if record.capture.is_some() {
        // What does not go on at once is told so again by its driver: it is no less a sandbox.
        capture::go_on(host, &mut up, &record).await;
    } else {
        up.machine.vm.resume().await.map_err(AdoptError::Machine)?;
    }
    Ok(up)
}
