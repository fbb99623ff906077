//! The bring-up of a sandbox: a chain of typestates, each able to undo exactly what exists in it.
//!
//! ```text
//!  Planned ──record──► Recorded ──clone disk──► WithDisk ──take slot──► WithSlot ──restore──► Restored ──resume, /init──► Up
//!     │                   │                        │                       │                     │                      │
//!     │ nothing           │ record                 │ + disk                │ + slot              │ + machine            │ the same,
//!     ▼ to undo           ▼ removed                ▼ removed               ▼ released            ▼ stopped              ▼ by tear_down
//! ```
//!
//! A step takes its state by value. It answers with the next state, or with the error after everything
//! that was made is undone, the newest first. The record goes last, so that whatever an agent that was
//! killed left behind is still known.
//!
//! A cancelled bring-up stops at the step that it is in: every step either completes or leaves nothing.

use std::{future::Future, io, net::Ipv4Addr, sync::Arc, time::Duration};

use camino::Utf8PathBuf;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use wrenn_types::{DiskMib, EndReason, InstanceId, ResourceError};
use wrenn_vmm::{DiskSpec, ExitReason, GuestBundle, MachineSpec, NetworkSpec, Vm, Vmm, VmmError};

use super::{
    Phase, SandboxSpec,
    record::{Record, RecordError, SandboxDir},
};
use crate::{
    guest::{self, GuestError, Identity, IdleConnection},
    images::{Images, ImagesError},
    network::{GuestConnector, Policy, Slot, SlotError, SlotPool},
    rootfs::{RootfsError, RootfsStore},
    warm::{Warm, WarmError, WarmRequest, blocking},
};

/// How long a machine may take to be restored.
const RESTORE_BOUND: Duration = Duration::from_secs(30);
/// How long a guest may take to become itself.
const IDENTITY_BOUND: Duration = Duration::from_secs(20);
/// How long it may take to make the root disk.
const DISK_BOUND: Duration = Duration::from_secs(60);
/// How long it may take to get a network slot.
const SLOT_BOUND: Duration = Duration::from_secs(20);

/// What every bring-up on this host uses. Shared, and never changed after the start.
#[derive(Debug)]
pub struct Host {
    /// Whose processes, namespaces and files these are.
    pub instance: InstanceId,
    /// The driver.
    pub vmm: Arc<dyn Vmm>,
    /// Guest bundle and templates.
    pub images: Images,
    /// Root disks.
    pub disks: Arc<dyn RootfsStore>,
    /// Network slots.
    pub slots: SlotPool,
    /// Template snapshots.
    pub warm: Warm,
    /// The parent of the sandboxes' directories.
    pub sandboxes_dir: Utf8PathBuf,
    /// The parent of the machines' short-pathed directories.
    pub machines_dir: Utf8PathBuf,
    /// The name servers of guests.
    pub dns_servers: Vec<Ipv4Addr>,
    /// The size of a root disk when nobody says.
    pub default_disk: DiskMib,
}

impl Host {
    /// The mark in the command line of every VMM of this instance.
    #[must_use]
    pub fn machine_mark(instance: &InstanceId) -> String {
        format!("wrenn-{instance}-")
    }
}

/// Why a sandbox did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BringUpError {
    /// It was destroyed while it was being made.
    #[error("it was destroyed while it was being made")]
    Cancelled(EndReason),
    /// The template is not there.
    #[error("the template cannot be used")]
    Template(#[source] ImagesError),
    /// The disk asked for is too small for the template.
    #[error("the disk is too small for the template")]
    DiskTooSmall(#[source] ResourceError),
    /// The record could not be written.
    #[error("the sandbox could not be recorded")]
    Record(#[source] RecordError),
    /// The template's snapshot could not be made or used.
    #[error("the template's snapshot cannot be used")]
    Warm(#[source] WarmError),
    /// The disk could not be made.
    #[error("the root disk could not be made")]
    Disk(#[source] RootfsError),
    /// No network slot could be had.
    #[error("no network slot could be had")]
    Slot(#[source] SlotError),
    /// The network policy could not be put in force.
    #[error("the network policy could not be put in force")]
    Policy(#[source] SlotError),
    /// The machine could not be restored.
    #[error("the machine could not be restored")]
    Restore(#[source] VmmError),
    /// The guest could not become itself.
    #[error("the guest could not take its identity")]
    Identity(#[source] GuestError),
    /// The machine ended while it was being brought up.
    #[error("the machine ended while it was being brought up: {0:?}")]
    Exited(ExitReason),
    /// A directory could not be made.
    #[error("could not make {path}")]
    RunDir {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A step took too long.
    #[error("{step} took longer than {bound:?}")]
    Timeout {
        /// The step.
        step: &'static str,
        /// How long it may take.
        bound: Duration,
    },
}

impl BringUpError {
    /// Whether the host's disk is full: the caller may come back when it is not.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Record(error) => error.is_no_space(),
            Self::Disk(error) => error.is_no_space(),
            Self::Warm(error) => error.is_no_space(),
            Self::RunDir { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

/// Measures the steps, in the order in which they happen.
#[derive(Debug)]
pub struct Timer {
    begin: Instant,
    phases: Vec<Phase>,
}

impl Timer {
    fn new() -> Self {
        Self { begin: Instant::now(), phases: Vec::with_capacity(8) }
    }

    async fn time<T>(&mut self, name: &'static str, step: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let outcome = step.await;
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.phases.push(Phase {
            name,
            start_micros: micros(start - self.begin),
            duration_micros: micros(start.elapsed()),
        });
        outcome
    }

    /// The steps so far.
    #[must_use]
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }
}

/// What is handed from step to step.
#[derive(Debug)]
struct Course {
    host: Arc<Host>,
    spec: SandboxSpec,
    timer: Timer,
    cancel: CancellationToken,
    /// Who cancelled, readable once `cancel` is cancelled.
    cancelled_by: Arc<std::sync::OnceLock<EndReason>>,
}

impl Course {
    /// Runs one step to its end, its bound or the cancellation, whichever is first.
    async fn step<T>(
        &mut self,
        name: &'static str,
        bound: Duration,
        step: impl Future<Output = Result<T, BringUpError>>,
    ) -> Result<T, BringUpError> {
        let cancelled = || {
            let reason = self.cancelled_by.get().copied().unwrap_or(EndReason::Requested);
            Err(BringUpError::Cancelled(reason))
        };
        if self.cancel.is_cancelled() {
            return cancelled();
        }
        let cancel = self.cancel.clone();
        let outcome = self
            .timer
            .time(name, async {
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => None,
                    outcome = timeout(bound, step) => Some(outcome),
                }
            })
            .await;
        match outcome {
            None => {
                let reason = self.cancelled_by.get().copied().unwrap_or(EndReason::Requested);
                Err(BringUpError::Cancelled(reason))
            }
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(BringUpError::Timeout { step: name, bound }),
        }
    }
}

/// Nothing exists yet.
#[derive(Debug)]
pub struct Planned {
    course: Course,
}

/// The record is on disk.
#[derive(Debug)]
struct Recorded {
    course: Course,
    dir: SandboxDir,
}

/// The root disk is there.
#[derive(Debug)]
struct WithDisk {
    before: Recorded,
    disk: DiskSpec,
}

/// The namespace with its rules is there, and its policy is in force.
#[derive(Debug)]
struct WithSlot {
    before: WithDisk,
    slot: Slot,
}

/// The machine is there and stands still.
#[derive(Debug)]
struct Restored {
    before: WithSlot,
    run_dir: Utf8PathBuf,
    vm: Box<dyn Vm>,
}

/// The guest is itself and answers.
#[derive(Debug)]
pub struct Up {
    restored: Restored,
    idle: Option<IdleConnection>,
}

/// Runs the whole chain.
///
/// # Errors
/// The step that failed; nothing of the sandbox is left then.
pub async fn bring_up(
    host: Arc<Host>,
    spec: SandboxSpec,
    cancel: CancellationToken,
    cancelled_by: Arc<std::sync::OnceLock<EndReason>>,
) -> Result<Up, BringUpError> {
    let course = Course { host, spec, timer: Timer::new(), cancel, cancelled_by };
    Planned { course }.run().await
}

impl Planned {
    async fn run(mut self) -> Result<Up, BringUpError> {
        let host = Arc::clone(&self.course.host);
        let template = host.images.resolve(&self.course.spec.template).map_err(BringUpError::Template)?;
        let request = WarmRequest::for_disk(
            &template,
            self.course.spec.shape,
            self.course.spec.disk,
            host.default_disk,
        )
        .map_err(BringUpError::DiskTooSmall)?;
        let warm = self
            .course
            .step("snapshot", crate::warm::BUILD_BOUND, async {
                host.warm.get(&request).await.map_err(BringUpError::Warm)
            })
            .await?;
        let disk_grows = (self.course.spec.disk > request.disk).then_some(self.course.spec.disk);
        let recorded = self.record().await?;
        let with_disk = recorded.clone_disk(&warm.disk, request.disk).await?;
        let with_slot = with_disk.take_slot().await?;
        let restored = with_slot.restore(&host.images.guest().bundle, &warm.files).await?;
        restored.identify(template.default_user.as_str(), template.default_workdir.as_str(), disk_grows).await
    }

    async fn record(mut self) -> Result<Recorded, BringUpError> {
        let host = Arc::clone(&self.course.host);
        let record = Record {
            format: 1,
            id: self.course.spec.id.clone(),
            generation: self.course.spec.generation,
            instance: host.instance.clone(),
        };
        // Not a cancellable step: the directory is made by a thread that cannot be called back.
        let made = self
            .course
            .timer
            .time("record", blocking(move || SandboxDir::create(&host.sandboxes_dir, &record)))
            .await;
        Ok(Recorded { course: self.course, dir: made.map_err(BringUpError::Record)? })
    }
}

impl Recorded {
    async fn clone_disk(mut self, layer: &DiskSpec, size: DiskMib) -> Result<WithDisk, BringUpError> {
        let host = Arc::clone(&self.course.host);
        let target = self.dir.path().join("disk");
        let base = layer.clone();
        // A clone of a file without shared blocks may be a long copy.
        let made = self
            .course
            .step("disk", DISK_BOUND, async {
                blocking(move || host.disks.clone_disk(&base, &target, size))
                    .await
                    .map_err(BringUpError::Disk)
            })
            .await;
        match made {
            Ok(disk) => Ok(WithDisk { before: self, disk }),
            Err(error) => {
                self.undo().await;
                Err(error)
            }
        }
    }

    async fn undo(self) {
        let id = self.course.spec.id.clone();
        if let Err(error) = blocking(move || self.dir.remove()).await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the sandbox's directory stays until the next start");
        }
    }
}

impl WithDisk {
    async fn take_slot(mut self) -> Result<WithSlot, BringUpError> {
        let host = Arc::clone(&self.before.course.host);
        let policy = Policy {
            internet: self.before.course.spec.allow_internet_access,
            dns_servers: host.dns_servers.clone(),
        };
        let taken = self
            .before
            .course
            .step("slot", SLOT_BOUND, async { host.slots.take().await.map_err(BringUpError::Slot) })
            .await;
        let mut slot = match taken {
            Ok(slot) => slot,
            Err(error) => {
                self.undo().await;
                return Err(error);
            }
        };
        let applied = self
            .before
            .course
            .step("policy", SLOT_BOUND, async { slot.apply(&policy).await.map_err(BringUpError::Policy) })
            .await;
        let with_slot = WithSlot { before: self, slot };
        match applied {
            Ok(()) => Ok(with_slot),
            Err(error) => {
                with_slot.undo().await;
                Err(error)
            }
        }
    }

    async fn undo(self) {
        let host = Arc::clone(&self.before.course.host);
        let id = self.before.course.spec.id.clone();
        let disk = self.disk;
        if let Err(error) = blocking(move || host.disks.remove(&disk.path)).await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the root disk goes with its directory");
        }
        self.before.undo().await;
    }
}

impl WithSlot {
    fn course(&mut self) -> &mut Course {
        &mut self.before.before.course
    }

    async fn restore(
        mut self,
        guest: &GuestBundle,
        files: &wrenn_vmm::SnapshotFiles,
    ) -> Result<Restored, BringUpError> {
        let host = Arc::clone(&self.course().host);
        let spec = self.course().spec.clone();
        let run_dir = host.machines_dir.join(spec.id.as_str());
        let made = std::fs::create_dir(&run_dir);
        let restored = match made {
            Err(source) => Err(BringUpError::RunDir { path: run_dir.clone(), source }),
            Ok(()) => match self.slot.lock() {
                Err(error) => Err(BringUpError::Slot(error)),
                Ok(lock) => {
                    let machine = MachineSpec {
                        name: format!("{}{}", Host::machine_mark(&host.instance), spec.id),
                        run_dir: run_dir.clone(),
                        shape: spec.shape,
                        guest: guest.clone(),
                        disk: Some(self.before.disk.clone()),
                        network: Some(NetworkSpec {
                            namespace: self.slot.netns_path().to_owned(),
                            tap: self.slot.tap().to_owned(),
                        }),
                        kernel_arguments: Vec::new(),
                        keep_open: vec![lock],
                    };
                    self.course()
                        .step("restore", RESTORE_BOUND, async {
                            host.vmm.restore(machine, files).await.map_err(BringUpError::Restore)
                        })
                        .await
                }
            },
        };
        match restored {
            Ok(vm) => Ok(Restored { before: self, run_dir, vm }),
            Err(error) => {
                remove_run_dir(&run_dir);
                self.undo().await;
                Err(error)
            }
        }
    }

    async fn undo(self) {
        let host = Arc::clone(&self.before.before.course.host);
        host.slots.release(self.slot).await;
        self.before.undo().await;
    }
}

fn remove_run_dir(path: &Utf8PathBuf) {
    if let Err(error) = std::fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%path, error = &error as &dyn std::error::Error, "the machine's directory stays until the next start");
    }
}

impl Restored {
    async fn identify(
        mut self,
        user: &str,
        workdir: &str,
        disk_grows: Option<DiskMib>,
    ) -> Result<Up, BringUpError> {
        let spec = self.before.course().spec.clone();
        let host = Arc::clone(&self.before.course().host);
        let connector = self.before.slot.connector();
        let Self { before, vm, .. } = &mut self;
        let mut exit = vm.exit();
        let resumed = before
            .course()
            .step("resume", RESTORE_BOUND, async {
                vm.resume().await.map_err(BringUpError::Restore)?;
                if let Some(disk) = disk_grows {
                    vm.resize_disk(disk.bytes()).await.map_err(BringUpError::Restore)?;
                }
                Ok(())
            })
            .await;
        let outcome = match resumed {
            Err(error) => Err(error),
            Ok(()) => {
                let identity = Identity {
                    hostname: Some(spec.id.as_str()),
                    timestamp: jiff::Timestamp::now().to_string(),
                    entropy: Identity::fresh_entropy(),
                    machine_id: Some(Identity::fresh_machine_id()),
                    access_token: Some(spec.access_token.expose()),
                    env_vars: &spec.environment,
                    default_user: spec.default_user.as_deref().unwrap_or(user),
                    default_workdir: spec.default_workdir.as_deref().unwrap_or(workdir),
                    dns_servers: &host.dns_servers,
                    disk_bytes: disk_grows.map(DiskMib::bytes),
                };
                before
                    .course()
                    .step("identity", IDENTITY_BOUND + Duration::from_secs(1), async {
                        tokio::select! {
                            biased;
                            outcome = guest::initialise(&connector, &identity, None, IDENTITY_BOUND) => {
                                outcome.map_err(BringUpError::Identity)
                            }
                            gone = gone(&mut exit) => Err(BringUpError::Exited(gone)),
                        }
                    })
                    .await
            }
        };
        match outcome {
            Ok(idle) => Ok(Up { restored: self, idle }),
            Err(error) => {
                self.undo().await;
                Err(error)
            }
        }
    }

    async fn undo(mut self) {
        let id = self.before.course().spec.id.clone();
        if let Err(error) = self.vm.stop().await {
            // The slot's lock is held by the process that did not end; releasing the rest would pull the
            // disk and the namespace from under it. The next start collects it.
            tracing::error!(%id, error = &error as &dyn std::error::Error, "the machine did not stop; it is left to be collected");
            return;
        }
        drop(self.vm);
        remove_run_dir(&self.run_dir);
        self.before.undo().await;
    }
}

/// Waits until a machine is gone, and answers why.
pub async fn gone(exit: &mut tokio::sync::watch::Receiver<Option<ExitReason>>) -> ExitReason {
    match exit.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or(ExitReason::Stopped),
        // The driver dropped the channel with no reason: its process cannot be there any more.
        Err(_) => ExitReason::Stopped,
    }
}

impl Up {
    /// The steps of the bring-up.
    #[must_use]
    pub fn phases(&self) -> &[Phase] {
        self.restored.before.before.before.course.timer.phases()
    }

    /// The connection on which the guest became itself, for the first request of a user. Given once.
    pub fn take_idle_connection(&mut self) -> Option<IdleConnection> {
        self.idle.take()
    }

    /// How connections to the guest are made.
    #[must_use]
    pub fn connector(&self) -> GuestConnector {
        self.restored.before.slot.connector()
    }

    /// Where the root disk is.
    #[must_use]
    pub fn disk(&self) -> &DiskSpec {
        &self.restored.before.before.disk
    }

    /// The machine's end, to be waited for with [`gone`].
    #[must_use]
    pub fn exit(&self) -> tokio::sync::watch::Receiver<Option<ExitReason>> {
        self.restored.vm.exit()
    }

    /// Takes everything down, in the reverse of the order in which it was made.
    pub async fn tear_down(self) {
        self.restored.undo().await;
    }
}
