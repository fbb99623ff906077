//! The bring-up of a sandbox: a chain of typestates, each able to undo exactly what exists in it.
//!
//! ```text
//!  Planned ──overlay──► WithDisk ──take slot──► WithSlot ──record──► Recorded ──restore──► Started ──resume, /init──► Up
//!     │                    │                       │                    │  or boot            │                     │
//!     │ nothing            │ layer                 │ + slot             │ + record            │ + machine           │ the same,
//!     ▼ to undo            ▼ removed               ▼ released           ▼ as it was           ▼ stopped             ▼ by end
//! ```
//!
//! A machine is booted where there is no memory of it. Then there is a wait for its guest before the `/init`.
//!
//! It serves every way in which a machine comes to be: a create from a template, a create from a snapshot, a
//! resume and a rollback. They differ in their [`Source`], and in whether there is a record already: then that
//! one is put back when the bring-up fails, and what the sandbox was before is untouched.
//!
//! A step takes its state by value. It answers with the next state, or with the error after everything
//! that was made is undone, the newest first. The record goes last, so that whatever an agent that was
//! killed left behind is still known.
//!
//! A cancelled bring-up stops at the step that it is in: every step either completes or leaves nothing. That of a machine
//! which is being started ends its process, and waits for that, before anything is taken from under it.

mod error;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, OnceLock},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
pub use error::BringUpError;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use wrenn_types::{AccessToken, DiskMib, EndReason, LayerId, NetworkPolicy, Shape};
use wrenn_vmm::{BootMemory, DiskSpec, ExitReason, MachineSpec, NetworkSpec, Vm};

use super::{
    Phase, SandboxSpec, bounds,
    host::Host,
    machine::{Machine, end_marked, gone, remove_run_dir},
    record::{FORMAT, Ledger, MachineRecord, Record},
    source::{Source, Start},
    within::Fate,
};
use crate::{
    guest::{self, Identity, IdleConnection},
    network::{GuestConnector, Policy, Slot},
    warm::blocking,
};

/// Measures the steps, in the order in which they happen.
#[derive(Debug)]
pub(super) struct Timer {
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
}

/// How a bring-up is broken off from outside. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cancel {
    token: CancellationToken,
    /// Set before `token` is cancelled.
    reason: Arc<OnceLock<EndReason>>,
}

impl Cancel {
    /// Breaks it off.
    pub fn cancel(&self, reason: EndReason) {
        // The first reason stays.
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    /// Whether it was broken off.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    fn error(&self) -> BringUpError {
        BringUpError::Cancelled(self.reason.get().copied().unwrap_or(EndReason::Requested))
    }
}

/// What is handed from step to step.
#[derive(Debug)]
pub(super) struct Course {
    pub(super) host: Arc<Host>,
    timer: Timer,
    cancel: Cancel,
}

impl Course {
    /// Runs one step to its end, its bound or the cancellation, whichever is first.
    pub(super) async fn step<T>(
        &mut self,
        name: &'static str,
        bound: Duration,
        step: impl Future<Output = Result<T, BringUpError>>,
    ) -> Result<T, BringUpError> {
        if self.cancel.is_cancelled() {
            return Err(self.cancel.error());
        }
        let cancelled = self.cancel.token.clone();
        let outcome = self
            .timer
            .time(name, async {
                tokio::select! {
                    biased;
                    () = cancelled.cancelled() => None,
                    outcome = timeout(bound, step) => Some(outcome),
                }
            })
            .await;
        match outcome {
            None => Err(self.cancel.error()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(BringUpError::Timeout { step: name, bound }),
        }
    }
}

/// What is written before the machine is started.
#[derive(Debug)]
pub enum Recording {
    /// There is no record yet: one is made of this, and of what only the bring-up knows.
    New(Box<SandboxSpec>),
    /// There is one. It is changed, and put back when the bring-up fails.
    Change(Arc<Ledger>),
}

/// What is asked of a machine, whoever asks.
#[derive(Debug)]
pub(super) struct Outline {
    pub(super) shape: Shape,
    pub(super) disk: DiskMib,
    pub(super) environment: BTreeMap<String, String>,
    network: NetworkPolicy,
}

impl Recording {
    fn outline(&self) -> Outline {
        match self {
            Self::New(spec) => Outline {
                shape: spec.shape,
                disk: spec.disk,
                environment: spec.environment.clone(),
                network: spec.settings.network.clone(),
            },
            Self::Change(ledger) => {
                let Record { shape, disk, environment, settings, .. } = ledger.record();
                Outline { shape, disk, environment, network: settings.network }
            }
        }
    }
}

/// What a guest is told that it is.
#[derive(Debug, Clone)]
pub struct Persona {
    /// The token that it asks for from now on.
    pub access_token: AccessToken,
    /// Whether it is one that there was not before: it is told the machine id of its own.
    pub is_new: bool,
}

/// The layer is there, and open for a machine.
#[derive(Debug)]
struct WithDisk {
    course: Course,
    source: Source,
    layer: LayerId,
    disk: DiskSpec,
}

/// The namespace with its rules is there, and its policy is in force.
#[derive(Debug)]
struct WithSlot {
    before: WithDisk,
    slot: Slot,
}

/// The record says that there is a machine.
#[derive(Debug)]
struct Recorded {
    before: WithSlot,
    ledger: Arc<Ledger>,
    former: Option<Record>,
}

/// The machine is there, and stands still or boots.
#[derive(Debug)]
struct Started {
    before: Recorded,
    run_dir: Utf8PathBuf,
    vm: Box<dyn Vm>,
}

/// The guest is itself and answers.
#[derive(Debug)]
pub struct Up {
    /// The machine.
    pub machine: Machine,
    /// Its record.
    pub ledger: Arc<Ledger>,
    /// The steps of the bring-up.
    pub phases: Vec<Phase>,
    /// The connection on which the guest became itself, for the first request of a user.
    pub idle: Option<IdleConnection>,
    /// When the layers of its disk may be made one again, after that has failed.
    pub stream_after: Instant,
    /// When it is tried again to let the machine run and its guest open, if that has failed.
    pub go_on_at: Option<Instant>,
}

/// Runs the whole chain.
///
/// # Errors
/// The step that failed; what was there before is there, and nothing else.
pub async fn bring_up(
    host: Arc<Host>,
    recording: Recording,
    persona: Persona,
    cancel: Cancel,
    from: super::source::From,
) -> Result<Up, BringUpError> {
    let mut course = Course { host, timer: Timer::new(), cancel };
    let outline = recording.outline();
    let source = Source::find(&mut course, from, &outline).await?;
    let policy = Policy::resolve(&outline.network, &course.host.dns_servers);
    let policy = policy.map_err(BringUpError::PolicyRefused)?;
    let with_disk = WithDisk::make(course, source).await?;
    let with_slot = with_disk.take_slot(&policy).await?;
    let recorded = with_slot.record(recording).await?;
    let started = recorded.start().await?;
    // Boxed: the step is large, and the sum of all of them would be.
    Box::pin(started.identify(&persona)).await
}

impl WithDisk {
    async fn make(mut course: Course, source: Source) -> Result<Self, BringUpError> {
        let host = Arc::clone(&course.host);
        let layer = LayerId::random();
        let (bottom, target, size) = (source.bottom.clone(), host.snapshots.layer_path(&layer), source.disk);
        // A clone of a file without shared blocks may be a long copy.
        let bound = bounds::clone_disk(host.copied_by_clone(&bottom));
        let fate = Fate::default();
        let (disks, asked) = (Arc::clone(&host.disks), fate.clone());
        let make = move || {
            let clone = disks.clone_disk(&bottom, &target, size)?;
            let opened = disks.open(&clone);
            // Nobody would know of it any more.
            if (opened.is_err() || !asked.keep())
                && let Err(error) = disks.remove(&target)
            {
                tracing::warn!(path = %target, error = &error as &dyn std::error::Error, "a disk stays until the next collection");
            }
            opened
        };
        let made =
            course.step("disk", bound, async { blocking(make).await.map_err(BringUpError::Disk) }).await;
        match made {
            Ok(disk) => Ok(Self { course, source, layer, disk }),
            Err(error) => {
                // It was there a moment ago.
                if !fate.give_up() {
                    host.remove_layer(&layer).await;
                }
                Err(error)
            }
        }
    }

    async fn take_slot(mut self, policy: &Policy) -> Result<WithSlot, BringUpError> {
        let host = Arc::clone(&self.course.host);
        let taken = self
            .course
            .step("slot", bounds::SLOT, async { host.slots.take().await.map_err(BringUpError::Slot) })
            .await;
        let mut slot = match taken {
            Ok(slot) => slot,
            Err(error) => return Err(self.undo(error).await),
        };
        let applied = self
            .course
            .step("policy", bounds::SLOT, async { slot.apply(policy).await.map_err(BringUpError::Policy) })
            .await;
        let with_slot = WithSlot { before: self, slot };
        match applied {
            Ok(()) => Ok(with_slot),
            Err(error) => Err(with_slot.undo(error).await),
        }
    }

    async fn undo(self, error: BringUpError) -> BringUpError {
        let host = Arc::clone(&self.course.host);
        host.remove_layer(&self.layer).await;
        error
    }
}

impl WithSlot {
    async fn record(mut self, recording: Recording) -> Result<Recorded, BringUpError> {
        let machine = MachineRecord {
            name: self.before.layer.clone(),
            slot: self.slot.number().get(),
            up: false,
            maker: Some(self.before.course.host.maker()),
        };
        let host = Arc::clone(&self.before.course.host);
        let source = &self.before.source;
        let base = source.base.key.clone();
        let mut layers = vec![self.before.layer.clone()];
        if host.has_layers() {
            layers.extend(source.below.iter().cloned());
        }
        // Not a cancellable step: the file is written by a thread that cannot be called back.
        let made = match recording {
            Recording::New(spec) => {
                let record = Record {
                    format: FORMAT,
                    id: spec.id,
                    generation: spec.generation,
                    instance: host.instance.clone(),
                    template: spec.template,
                    shape: spec.shape,
                    disk: spec.disk,
                    access_token: spec.access_token,
                    environment: source.environment.clone(),
                    default_user: source.default_user.clone(),
                    default_workdir: source.default_workdir.clone(),
                    machine_id: Some(Identity::fresh_machine_id()),
                    settings: spec.settings,
                    deadline_met: None,
                    started_at: Some(jiff::Timestamp::now()),
                    base,
                    layers,
                    machine: Some(machine),
                    paused: None,
                    capture: None,
                    former: None,
                    obsolete: None,
                };
                let make = Ledger::create(&host.sandboxes_dir, record);
                let made = self.before.course.timer.time("record", make).await;
                made.map(|ledger| (Arc::new(ledger), None))
            }
            Recording::Change(ledger) => {
                let former = ledger.record();
                let change = ledger.change(|record| record.begin_machine(machine, base, layers));
                let changed = self.before.course.timer.time("record", change).await;
                changed.map(|()| (ledger, Some(former)))
            }
        };
        match made {
            Ok((ledger, former)) => Ok(Recorded { before: self, ledger, former }),
            Err(error) => Err(self.undo(BringUpError::Record(error)).await),
        }
    }

    async fn undo(self, error: BringUpError) -> BringUpError {
        let host = Arc::clone(&self.before.course.host);
        host.slots.release(self.slot).await;
        self.before.undo(error).await
    }
}

impl Recorded {
    async fn start(mut self) -> Result<Started, BringUpError> {
        let WithSlot { before: WithDisk { course, source, layer, disk, .. }, slot } = &mut self.before;
        let host = Arc::clone(&course.host);
        let record = self.ledger.record();
        let run_dir = host.run_dir(layer);
        let name = Host::machine_name(&host.instance, &record.id, layer);
        let spec = || {
            std::fs::create_dir(&run_dir)
                .map_err(|source| BringUpError::RunDir { path: run_dir.clone(), source })?;
            let lock = slot.lock().map_err(BringUpError::Slot)?;
            let control_group = host.limits.begin(&record.id, layer, record.shape);
            Ok(MachineSpec {
                name: name.clone(),
                run_dir: run_dir.clone(),
                shape: record.shape,
                guest: host.images.guest().bundle.clone(),
                disk: Some(disk.clone()),
                disk_bases: source.disk_bases(&host),
                disk_rate: host.limits.disk_rate(),
                network: Some(NetworkSpec {
                    namespace: slot.netns_path().to_owned(),
                    tap: slot.tap().to_owned(),
                }),
                kernel_arguments: Vec::new(),
                keep_open: vec![lock],
                control_group: control_group.map_err(BringUpError::Limits)?,
                user: host.users.in_slot(slot.number()),
            })
        };
        let started = match spec() {
            Ok(machine) => match &source.start {
                Start::Restore(files) => {
                    let restore =
                        async { host.vmm.restore(machine, files).await.map_err(BringUpError::Restore) };
                    course.step("restore", bounds::restore(source.pages_bytes), restore).await
                }
                Start::Boot => {
                    let memory = BootMemory::Zeros(&source.base.memory);
                    let boot = async { host.vmm.boot(machine, memory).await.map_err(BringUpError::Boot) };
                    course.step("boot", bounds::RUN, boot).await
                }
            },
            Err(error) => Err(error),
        };
        match started {
            Ok(vm) => Ok(Started { before: self, run_dir, vm }),
            Err(error) => {
                // Whoever starts a machine has it killed when it is not waited for any more, and is not waited for either.
                if error.is_broken_off()
                    && let Err(stuck) = end_marked(&name, |_| false).await
                {
                    return Err(self.leave(error, &stuck).await);
                }
                Err(self.undo_start(&run_dir, error).await)
            }
        }
    }

    /// Takes away what a machine had that is gone, and then all else.
    async fn undo_start(self, run_dir: &Utf8Path, error: BringUpError) -> BringUpError {
        let WithDisk { course, layer, .. } = &self.before.before;
        course.host.limits.end(&self.ledger.record().id, layer).await;
        remove_run_dir(run_dir);
        // Boxed: it is rare, and every bring-up would have room for it.
        Box::pin(self.undo(error)).await
    }

    /// Leaves it all to be collected: the lock of the slot is held by a process that does not end, and releasing the rest would
    /// pull the disk and the namespace from under it.
    async fn leave(
        self,
        error: BringUpError,
        stuck: &(dyn std::error::Error + Send + Sync + 'static),
    ) -> BringUpError {
        let id = self.ledger.record().id;
        tracing::error!(%id, error = stuck as &dyn std::error::Error, "the machine did not stop; it is left to be collected");
        self.before.slot.leave();
        if let Some(former) = self.former {
            self.ledger.put_back(former).await;
        }
        error
    }

    async fn undo(self, error: BringUpError) -> BringUpError {
        let error = self.before.undo(error).await;
        if let Some(former) = self.former {
            self.ledger.put_back(former).await;
        } else if let Err(error) = self.ledger.remove().await {
            let id = self.ledger.record().id;
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record stays until the next start");
        }
        error
    }
}

impl Started {
    async fn identify(mut self, persona: &Persona) -> Result<Up, BringUpError> {
        let record = self.before.ledger.record();
        let WithSlot { before: WithDisk { course, source, layer, .. }, slot } = &mut self.before.before;
        let connector = slot.connector();
        let (vm, grows, host) = (&mut self.vm, source.grows, Arc::clone(&course.host));
        let mut exit = vm.exit();
        let mut resumed = course
            .step("resume", bounds::RUN, async {
                vm.resume().await.map_err(BringUpError::Restore)?;
                if let Some(disk) = grows {
                    host.grow_disk(layer, disk).await.map_err(BringUpError::Disk)?;
                    vm.resize_disk(disk.bytes()).await.map_err(BringUpError::Restore)?;
                }
                Ok(())
            })
            .await;
        let boots = matches!(source.start, Start::Boot);
        if boots && resumed.is_ok() {
            let bound = bounds::boot(record.shape.memory);
            // Boxed: it is rare and large, as where a template is made.
            let answers = Box::pin(answers(&connector, bound, &mut exit));
            resumed = course.step("guest", bound + Duration::from_secs(1), answers).await;
            if let Err(BringUpError::NotUp(_)) = &resumed {
                // It is for whoever runs the host: what a guest prints may be long, and is no part of an answer.
                let console = vm.console().await;
                tracing::warn!(id = %record.id, console, "a guest that was booted does not answer");
            }
        }
        let outcome = match resumed {
            Err(error) => Err(error),
            Ok(()) => {
                let mut identity = Identity::of(&record, slot.name_servers());
                identity.restored = true;
                identity.access_token = Some(persona.access_token.expose());
                // It is in the memory of a guest, and not on its disk.
                let is_told = persona.is_new || boots;
                identity.machine_id =
                    is_told.then(|| record.machine_id.clone().unwrap_or_else(Identity::fresh_machine_id));
                identity.disk_bytes = grows.map(DiskMib::bytes);
                let token = source.guest_token.as_ref();
                course
                    .step("identity", bounds::IDENTITY + Duration::from_secs(1), async {
                        tokio::select! {
                            biased;
                            outcome = guest::initialise(&connector, &identity, token, bounds::IDENTITY) => {
                                outcome.map_err(BringUpError::Identity)
                            }
                            gone = gone(&mut exit) => Err(BringUpError::Exited(gone)),
                        }
                    })
                    .await
            }
        };
        // Without it the next agent takes this machine for a half-made one.
        let ledger = &self.before.ledger;
        let noted = match outcome {
            Ok(idle) => {
                let up =
                    |record: &mut Record| record.machine.iter_mut().for_each(|machine| machine.up = true);
                ledger.keep(up).await.map(|()| idle).map_err(BringUpError::Record)
            }
            Err(error) => Err(error),
        };
        match noted {
            Ok(idle) => {
                let Recorded { before: WithSlot { before, slot }, ledger, .. } = self.before;
                let machine = Machine {
                    id: record.id,
                    name: before.layer.clone(),
                    vm: self.vm,
                    slot,
                    run_dir: self.run_dir,
                    maker: before.course.host.maker(),
                    base_memory: before.source.base.memory,
                    base_disk: before.source.base.disk.path,
                };
                let phases = before.course.timer.phases;
                Ok(Up { machine, ledger, phases, idle, stream_after: Instant::now(), go_on_at: None })
            }
            Err(error) => Err(self.undo(error).await),
        }
    }

    async fn undo(mut self, error: BringUpError) -> BringUpError {
        if let Err(stuck) = self.vm.stop().await {
            return self.before.leave(error, &stuck).await;
        }
        drop(self.vm);
        self.before.undo_start(&self.run_dir, error).await
    }
}

/// Waits until the guest of a machine that boots answers.
async fn answers(
    connector: &GuestConnector,
    bound: Duration,
    exit: &mut watch::Receiver<Option<ExitReason>>,
) -> Result<(), BringUpError> {
    tokio::select! {
        biased;
        up = guest::wait_until_healthy(connector, bound) => up.map_err(BringUpError::NotUp),
        gone = gone(exit) => Err(BringUpError::Exited(gone)),
    }
}
