//! A capture: what a sandbox is becomes a snapshot.
//!
//! ```text
//!  record ─► prepare the guest · make the directory ─► stop ─► save devices and pages ─┬─ pause ─► commit; the machine stays stopped
//!      │                                                                              │
//!      │ not in time: marked unprepared (pause),                                      └─ live ─► next overlay on top ─► let it run,
//!      ▼ or given up (live, disk alone)                                                          /init ─► commit
//! ```
//!
//! A pause of the disk alone saves no devices and no pages. What the guest had not written to its disk would be lost
//! then, so it has more time for that, and without it there is no pause.
//!
//! Whatever fails, the machine runs again and its guest is open, as before; nothing half-made is left. Where that
//! fails too, it is tried again until it is so. The one exception is a machine that is gone, and that is noticed by
//! its exit. A destroy breaks it off wherever it is, and ends the machine.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::{Instant, timeout};
use wrenn_types::{LayerId, SnapshotId};
use wrenn_vmm::{SnapshotFiles, VmmError};

use super::{
    bounds,
    bring_up::Up,
    host::Host,
    keeping::Keeping,
    record::{CaptureRecord, Record, RecordError},
    within::{Overdue, within},
};
use crate::{
    guest::{self, GuestError, Identity},
    network::{Policy, PolicyError},
    rootfs::RootfsError,
    snapshot_store::SnapshotStoreError,
    snapshots::{About, Extent, Kept, Making},
    warm::blocking,
};

/// How long after a machine or its guest did not go on that is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What becomes of the machine after it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It stays stopped, to be ended. So much of it is saved.
    Pause(Extent),
    /// It goes on.
    Live,
}

/// What was saved.
#[derive(Debug)]
pub struct Captured {
    /// The snapshot.
    pub kept: Kept,
    /// How long no process of the guest ran, if it runs again.
    pub stopped: Duration,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The guest could not be made to stand still; a pause with memory does without.
    #[error("the guest could not be made to stand still")]
    Prepare(#[source] GuestError),
    /// It could not be recorded that there is going to be one.
    #[error("the capture could not be recorded")]
    Record(#[source] RecordError),
    /// The store failed.
    #[error("the snapshot could not be kept")]
    Store(#[source] SnapshotStoreError),
    /// The next layer of the disk could not be made.
    #[error("the next layer of the disk could not be made")]
    Disk(#[source] RootfsError),
    /// What the machine has written to its disk is not all in it.
    #[error("what the machine has written to its disk could not be kept")]
    Settle(#[source] RootfsError),
    /// The record of the sandbox is not one that we write.
    #[error("the record names no layer of the disk")]
    NoLayers,
    /// The machine could not be stopped, saved or put on its next layer.
    #[error("could not {operation} the machine")]
    Machine {
        /// What was to be done.
        operation: &'static str,
        /// Why not.
        #[source]
        source: VmmError,
    },
    /// The machine has not gone on yet after another capture.
    #[error("the machine has not gone on after the capture before this one")]
    Unsettled,
    /// A step took too long.
    #[error("{step} took longer than {bound:?}")]
    Timeout {
        /// The step.
        step: &'static str,
        /// How long it may take.
        bound: Duration,
    },
}

impl CaptureError {
    /// Whether the host's disk is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Record(error) => error.is_no_space(),
            Self::Store(error) => error.is_no_space(),
            Self::Disk(error) | Self::Settle(error) => error.is_no_space(),
            Self::Machine { source: VmmError::File { source, .. }, .. } => {
                matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}

/// Saves a machine.
///
/// It may be dropped if the machine is ended after that: nothing that was begun then stays but layers, if `keeping` is
/// given up first.
///
/// # Errors
/// It runs as before, unless it is gone.
pub(super) async fn capture(
    host: &Arc<Host>,
    up: &mut Up,
    into: &SnapshotId,
    kind: Kind,
    keeping: &Keeping,
) -> Result<Captured, CaptureError> {
    if up.go_on_at.is_some() {
        let record = up.ledger.record();
        go_on(host, up, &record).await;
        if up.go_on_at.is_some() {
            return Err(CaptureError::Unsettled);
        }
    }
    let record = up.ledger.record();
    let connector = up.machine.connector();
    let next = match kind {
        Kind::Live => Some(LayerId::random()),
        Kind::Pause(_) => None,
    };
    let (is_pause, prepare_bound) = match kind {
        Kind::Pause(Extent::Disk) => (true, bounds::WRITE),
        Kind::Pause(Extent::Machine) => (true, bounds::PREPARE),
        Kind::Live => (false, bounds::PREPARE),
    };
    let about_to = CaptureRecord { snapshot: into.clone(), pause: is_pause, next_layer: next.clone() };
    let stood = Instant::now();
    // Before the guest closes: an agent that finds it closed has to know why. The disk is waited for while it does.
    if let Err(error) = up.ledger.note(|record| record.capture = Some(about_to)) {
        // On disk is what was there before, and now it is true again.
        let _ = up.ledger.note(|record| record.capture = None);
        return Err(CaptureError::Record(error));
    }
    let (prepared, recorded, making) = tokio::join!(
        guest::prepare(&connector, Some(&record.access_token), prepare_bound),
        keeping.write(&up.ledger),
        begin(host, into),
    );
    let prepared = match (prepared, kind) {
        (Ok(()), _) => Ok(true),
        (Err(error), Kind::Pause(Extent::Machine)) => {
            tracing::warn!(id = %record.id, error = &error as &dyn std::error::Error, "the guest is saved without standing still");
            Ok(false)
        }
        (Err(error), Kind::Live | Kind::Pause(Extent::Disk)) => Err(CaptureError::Prepare(error)),
    };
    let saved = async {
        let (prepared, making) = (prepared?, making?);
        recorded.map_err(CaptureError::Record)?;
        let extent = if let Kind::Pause(extent) = kind { extent } else { Extent::Machine };
        save(host, up, &record, making, next.as_ref(), Saving { extent, prepared }).await
    };
    let (making, about) = match saved.await {
        Ok(saved) => saved,
        Err(error) => {
            go_on(host, up, &record).await;
            return Err(error);
        }
    };
    let stopped = if let Kind::Live = kind {
        go_on(host, up, &record).await;
        stood.elapsed()
    } else {
        Duration::ZERO
    };
    let layers = host.bytes_of_layers(&about.layers).unwrap_or_default();
    let bound = bounds::commit(record.shape.memory, layers);
    match keeping.keep(&host.snapshots, bound, move || making.commit(about)).await {
        Ok(kept) => Ok(Captured { kept, stopped }),
        Err(error) => {
            if is_pause {
                // A snapshot that was given up may be there for a moment: an agent that is started then must not take
                // it for the sandbox, which goes on.
                let is_none = |record: &mut Record| record.capture.iter_mut().for_each(|it| it.pause = false);
                if let Err(error) = up.ledger.note(is_none) {
                    tracing::warn!(id = %record.id, error = &error as &dyn std::error::Error, "the record still tells of a pause");
                }
                go_on(host, up, &record).await;
            }
            Err(error)
        }
    }
}

async fn begin(host: &Arc<Host>, into: &SnapshotId) -> Result<Making, CaptureError> {
    let (snapshots, into) = (host.snapshots.clone(), into.clone());
    let begun = within(bounds::LOOK, move || snapshots.begin(into)).await;
    let late = |Overdue(bound)| CaptureError::Timeout { step: "beginning the snapshot", bound };
    begun.map_err(late)?.map_err(CaptureError::Store)
}

/// What is to be said of what is saved.
#[derive(Debug, Clone, Copy)]
struct Saving {
    extent: Extent,
    prepared: bool,
}

/// Stops the machine, saves it, and puts it on its next layer if it has one.
async fn save(
    host: &Arc<Host>,
    up: &mut Up,
    record: &Record,
    making: Making,
    next: Option<&LayerId>,
    Saving { extent, prepared }: Saving,
) -> Result<(Making, About), CaptureError> {
    let top = record.layers.first().filter(|_| next.is_some());
    let copied = top.map_or(0, |top| host.copied_by_clone(&host.layer(top)));
    let bound = bounds::save(record.shape.memory, copied);
    let files = SnapshotFiles {
        memory: up.machine.base_memory.clone(),
        state: making.state(),
        pages: Some(making.pages()),
    };
    let failed = |operation| move |source| CaptureError::Machine { operation, source };
    let maker = up.machine.maker.clone();
    let (vm, ledger) = (&mut up.machine.vm, &up.ledger);
    let mut layers = record.layers.clone();
    let work = async {
        // Made before the machine is stopped: only the size of what it stands on is looked at.
        let overlay = match next {
            Some(next) if host.has_layers() => Some(next_layer(host, record, next).await?),
            _ => None,
        };
        vm.pause().await.map_err(failed("stop"))?;
        if extent == Extent::Machine {
            vm.snapshot(&files).await.map_err(failed("save"))?;
        }
        match (next, overlay) {
            // What a machine has written may not be in the file yet that is made durable next.
            (None, _) => {
                let top = record.layers.first().ok_or(CaptureError::NoLayers)?;
                host.settle_disk(top).await.map_err(CaptureError::Settle)?;
            }
            (Some(next), Some(overlay)) => {
                vm.pivot_disk(&overlay).await.map_err(failed("put on its next layer"))?;
                let next = next.clone();
                // Nothing waits for the disk here: what is in use by a machine does not outlive the host.
                ledger.note(|record| record.layers.insert(0, next)).map_err(CaptureError::Record)?;
            }
            // Without a format that has layers, what is kept is a copy, and the machine keeps its disk.
            (Some(next), None) => {
                next_layer(host, record, next).await?;
                layers = vec![next.clone()];
            }
        }
        Ok(())
    };
    timeout(bound, work).await.unwrap_or(Err(CaptureError::Timeout { step: "saving the machine", bound }))?;
    let about = About {
        sandbox: record.id.clone(),
        template: record.template.clone(),
        base: record.base.clone(),
        layers,
        disk_format: host.disks.format(),
        disk: record.disk,
        shape: record.shape,
        vmm: maker.vmm,
        guest: maker.guest,
        extent,
        prepared,
        access_token: record.access_token.clone(),
        default_user: record.default_user.clone(),
        default_workdir: record.default_workdir.clone(),
        environment: record.environment.clone(),
        network: record.settings.network.clone(),
        created_at: Timestamp::now(),
    };
    Ok((making, about))
}

/// A new layer on the one that is on top now.
async fn next_layer(
    host: &Arc<Host>,
    record: &Record,
    next: &LayerId,
) -> Result<wrenn_vmm::DiskSpec, CaptureError> {
    let top = record.layers.first().map(|top| host.layer(top)).ok_or(CaptureError::NoLayers)?;
    let (disks, path, size) = (Arc::clone(&host.disks), host.snapshots.layer_path(next), record.disk);
    blocking(move || disks.clone_disk(&top, &path, size)).await.map_err(CaptureError::Disk)
}

/// Notes the next layer of a capture as the top one if the machine is on it: it may be even though nobody was told
/// so. Answers whether that is known now.
async fn note_top(host: &Host, up: &mut Up) -> bool {
    let record = up.ledger.record();
    let next = record.capture.and_then(|capture| capture.next_layer);
    let Some(next) = next.as_ref().filter(|next| record.layers.first() != Some(*next)) else { return true };
    let id = &up.machine.id;
    let noted = match up.machine.vm.disk_chain().await {
        Ok(chain) if chain.first() == Some(&host.snapshots.layer_path(next)) => {
            up.ledger.note(|record| record.layers.insert(0, next.clone()))
        }
        Ok(_) => Ok(()),
        Err(error) => {
            // A machine that is gone is noticed by its exit.
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the layers of the disk are not known");
            return false;
        }
    };
    if let Err(error) = noted {
        tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record does not say on which layer the machine is");
    }
    true
}

/// Lets the machine run and its guest open, and forgets the capture. What cannot be done here is tried again a
/// moment later, and by the next agent; a machine that is gone is noticed by its exit.
pub async fn go_on(host: &Host, up: &mut Up, record: &Record) {
    let id = &record.id;
    // Until it is done it is still to be done.
    up.go_on_at = Some(Instant::now() + AGAIN);
    let is_known = note_top(host, up).await;
    if let Err(error) = up.machine.vm.resume().await {
        tracing::error!(%id, error = &error as &dyn std::error::Error, "the machine does not run again");
        return;
    }
    if let Err(error) = open(host, up, record).await {
        tracing::error!(%id, error = &error as &dyn std::error::Error, "the guest does not open again");
        return;
    }
    if !is_known {
        // The capture stays: without it nobody would know of a layer that may be in use.
        return;
    }
    up.go_on_at = None;
    if let Err(error) = up.ledger.note(|record| record.capture = None) {
        tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record still tells of a capture");
    }
}

/// Why a guest did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its policy cannot be.
    #[error("its network policy cannot be")]
    Policy(#[source] PolicyError),
    /// It refused, or did not answer.
    #[error("it did not take its identity again")]
    Guest(#[source] GuestError),
}

/// Tells a guest once more who it is: one that stood still for a capture goes on after that.
///
/// # Errors
/// The guest stays closed.
pub async fn open(host: &Host, up: &mut Up, record: &Record) -> Result<(), OpenError> {
    let policy = Policy::resolve(&record.settings.network, &host.dns_servers).map_err(OpenError::Policy)?;
    let mut identity = Identity::of(record, policy.name_servers());
    identity.access_token = Some(record.access_token.expose());
    let connector = up.machine.connector();
    let token = Some(&record.access_token);
    up.idle =
        guest::initialise(&connector, &identity, token, bounds::THAW).await.map_err(OpenError::Guest)?;
    Ok(())
}
