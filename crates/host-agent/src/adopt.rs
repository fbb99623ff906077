//! What an agent finds at its start, and what it makes of it: sandboxes that go on, and remains that go.
//!
//! ```text
//!  records ─► which machines are somebody's (pure) ─► end the others ─► remove free slots, at once or later
//!     │
//!     └─► each record ─► none yet, or an empty one  : half-made, or emptied by a power cut that ended it; removed
//!                        one that cannot be read    : nothing of it is touched, its machine goes on, and it is told as such
//!                        paused                     : known again, as it is, also if what is saved cannot be read
//!                        a delete of a paused one   : deleted
//!                        a pause that was committed : the same; its machine was among the others
//!                        a rollback under way       : the former machine is adopted; the new one was among the others
//!                        a machine that was up      : adopted; let run and opened again if it stood still. One that lives
//!                                                     and cannot be adopted goes on, and is tried again by its driver
//!                        anything else              : half-made, and removed
//! ```
//!
//! Records are gone through several at a time, because who uses a sandbox waits meanwhile: nothing that can wait is
//! done before its machine answers.
//!
//! Only what is this instance's own is touched. A machine is known by the mark in its command line, a namespace by
//! the owner in its slot's file, a directory by being in this instance's.

mod fate;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use camino::Utf8Path;
use fate::{Fate, decide, saved_as};
use futures::StreamExt as _;
use wrenn_types::{InstanceId, SandboxId};

use crate::{
    limits::Limits,
    network::SlotError,
    registry::Registry,
    rootfs::RootfsError,
    sandbox::{
        SandboxSpec, bounds,
        driver::{Beginning, chain},
        host::Host,
        machine,
        record::{self, Ledger, Left, Record, RecordError, SandboxDir},
        regain::{end_uncontrolled, regain},
        within::{Overdue, within},
    },
};

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
    /// The disks could not be closed.
    #[error("could not close the disks that were left open")]
    Disks(#[source] RootfsError),
    /// The records could not be read or removed.
    #[error("could not read or remove what was left of a sandbox")]
    Record(#[source] RecordError),
    /// The sockets could not be removed.
    #[error("could not clear the machines' directory")]
    RunDir(#[source] io::Error),
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
    /// Sandboxes of which nobody can say what they are, and why. What there is of them stays for a person to look at.
    unusable: BTreeMap<SandboxId, String>,
    /// The machines of what goes on.
    pub(crate) machines: BTreeSet<String>,
    /// The names of their directories.
    directories: BTreeSet<String>,
}

impl Stock {
    /// Whether there are machines to go on with, for which somebody may be waiting.
    pub fn has_machines(&self) -> bool {
        !self.unusable.is_empty() || self.left.iter().any(|(_, fate)| matches!(fate, Fate::Machine))
    }
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
    let mark = Host::machine_mark(instance);
    let ended = machine::end_marked(&mark, |name| stock.keeps(&mark, name)).await;
    stock.ended = ended.map_err(CollectError::Machines)?;
    limits.keep_only(|name| stock.machines.contains(&format!("{mark}{name}"))).await;
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
        let record = match record {
            Ok(Some(record)) if record.instance == *instance => record,
            Ok(None) => {
                stock.remains.push(dir);
                continue;
            }
            unusable => {
                let why = match &unusable {
                    Err(error) => chain(error),
                    Ok(_) => "it is another instance's".to_owned(),
                };
                tracing::error!(dir = %dir.path(), why, "a sandbox is left as it is, because its record cannot be used");
                let id = dir.path().file_name().and_then(|name| name.parse().ok());
                stock.unusable.extend(id.map(|id| (id, why)));
                continue;
            }
        };
        // Its contents are read when it is resumed: nobody waits for those of all sandboxes here.
        let found = saved_as(&record).map(|id| snapshots.find(id)).transpose();
        let found = found.map(Option::flatten).map_err(|error| chain(&error));
        if let Err(why) = &found {
            tracing::error!(id = %record.id, why, "what a sandbox is saved as, or was to be, cannot be read");
        }
        let (mut next, fate) = decide(record.clone(), found);
        let Some(fate) = fate else {
            if forget_obsolete(&mut next, snapshots) {
                stock.remains.push(dir);
            }
            continue;
        };
        if let Fate::Machine = fate {
            if let Some(machine) = &next.machine {
                stock.machines.insert(Host::machine_name(instance, &next.id, &machine.name));
                stock.directories.insert(machine.name.to_string());
            }
            forget_obsolete(&mut next, snapshots);
        }
        stock.left.push((ledger_of(dir, record, next)?, fate));
    }
    Ok(stock)
}

/// Deletes what a sandbox was brought back from, or saved as until it was deleted, where whoever was to do so was killed;
/// whether nothing of that is left.
fn forget_obsolete(record: &mut Record, snapshots: &crate::snapshots::Snapshots) -> bool {
    let Some(obsolete) = &record.obsolete else { return true };
    let deleted = snapshots.delete(obsolete);
    match &deleted {
        Ok(_) => record.obsolete = None,
        Err(error) => {
            tracing::warn!(%obsolete, error = error as &dyn std::error::Error, "a snapshot that is not needed stays until the next start");
        }
    }
    deleted.is_ok()
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

/// Whose machine this is, and the name of its directory, by the machine's name.
pub(crate) fn owner<'a>(mark: &str, machine: &'a str) -> Option<(SandboxId, &'a str)> {
    let name = machine.strip_prefix(mark)?;
    // Both parts have a hyphen of their own.
    let (at, _) = name.match_indices('-').nth(1)?;
    Some((name[..at].parse().ok()?, &name[at + 1..]))
}

impl Stock {
    /// Whether a machine is to go on: it is in a record, or nobody can say that it is in none.
    pub(crate) fn keeps(&mut self, mark: &str, machine: &str) -> bool {
        if self.machines.contains(machine) {
            return true;
        }
        let Some((_, directory)) = owner(mark, machine).filter(|(id, _)| self.unusable.contains_key(id))
        else {
            return false;
        };
        self.directories.insert(directory.to_owned());
        self.machines.insert(machine.to_owned())
    }

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

/// Goes on with what was found.
///
/// # Errors
/// What is half-made could not be removed.
pub async fn take_over(host: &Arc<Host>, registry: &Registry, stock: Stock) -> Result<Taken, CollectError> {
    let mut taken = Taken::default();
    registry.leave_unreadable(stock.unusable);
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
        let path = dir.path().to_owned();
        match within(bounds::REMOVE, move || dir.remove()).await {
            Ok(removed) => removed.map_err(CollectError::Record)?,
            // It is nobody's, and the next agent finds what is left of it.
            Err(Overdue(bound)) => tracing::warn!(%path, ?bound, "what was half-made stays for now"),
        }
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
        Fate::Paused(saved, kept) => {
            registry.take_over(spec(record), Beginning::Paused(ledger, saved, kept)).begun().await;
            Way::Paused(id)
        }
        Fate::Machine => match regain(host, &ledger).await {
            Ok(up) => {
                registry.take_over(spec(record), Beginning::Adopted(Box::new(up))).begun().await;
                Way::Adopted(id)
            }
            Err(error) if error.is_gone() => {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "a sandbox ended while nobody looked");
                // Its directory and its control group were kept, because it might have been there. Others go on meanwhile,
                // so that no error of this one ends the start.
                if let Err(error) = end_uncontrolled(host, &record).await {
                    tracing::error!(%id, error = &error as &dyn std::error::Error, "its machine is left to be collected");
                } else if let Err(error) = ledger.remove().await {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "its record stays until the next start");
                }
                Way::Removed(id)
            }
            Err(error) => {
                registry.take_over(spec(record), Beginning::Astray(ledger, error)).begun().await;
                Way::Adopted(id)
            }
        },
    }
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
