//! No machine at all: a driver that keeps every promise of the traits but runs nothing.
//!
//! It is for tests of what stands on a driver: of faults, because every failure can be called up
//! ([`Fake::fail_next`], [`Fake::delay`], [`Fake::crash_after`], [`Fake::end`]), and of scale, because a
//! machine costs a few hundred bytes. It passes the same conformance cases as the real drivers.
//!
//! Its guest counts: it prints `tick TOKEN N ok` for every 10 ms that it was not paused, with a token that is
//! new at each boot and the same after a restore, and `BAD` instead of `ok` from the restore on after which its
//! memory was not what it had been. `conformance=poweroff`, `reboot` or `panic` among its kernel arguments makes
//! it do that at once.
//!
//! Its memory is the few pages that were written ([`Fake::write_page`]), its disk is the files, what their
//! headers say and one number ([`Fake::write_disk`]), and its snapshots are files that only it can restore. A machine is there until it ends, like
//! a process, and can be released and adopted; [`Fake::lose_owners`] does what the death of their owners'
//! process would.

mod disk;
mod guest;
mod machine;
mod memory;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::pending,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};

use self::machine::{FakeMachine, Inside, Process};
use crate::{
    Accelerator, AdoptedMachine, BootMemory, Capabilities, ExitReason, MachineSpec, SnapshotFiles, Vm, Vmm,
    VmmError, VmmIdentity, VmmResult, validate,
};

/// What a test can make fail, take long, or end a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// [`Vmm::boot`].
    Boot,
    /// [`Vmm::restore`].
    Restore,
    /// [`Vmm::adopt`].
    Adopt,
    /// [`Vm::pause`].
    Pause,
    /// [`Vm::resume`].
    Resume,
    /// [`Vm::snapshot`].
    Snapshot,
    /// [`Vm::resize_disk`].
    ResizeDisk,
    /// [`Vm::pivot_disk`].
    PivotDisk,
    /// [`Vm::disk_chain`].
    DiskChain,
    /// [`Vm::stream_disk`].
    StreamDisk,
    /// [`Vm::stop`].
    Stop,
}

impl Step {
    fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Restore => "restore",
            Self::Adopt => "adopt",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::ResizeDisk => "resize_disk",
            Self::PivotDisk => "pivot_disk",
            Self::DiskChain => "disk_chain",
            Self::StreamDisk => "stream_disk",
            Self::Stop => "stop",
        }
    }
}

/// The driver. Clones share their machines and what is to go wrong.
#[derive(Debug, Clone)]
pub struct Fake {
    identity: VmmIdentity,
    plan: Plan,
}

impl Default for Fake {
    fn default() -> Self {
        Self::new()
    }
}

impl Fake {
    /// A driver with which nothing goes wrong.
    #[must_use]
    pub fn new() -> Self {
        let identity = VmmIdentity {
            name: "fake".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: "none".to_owned(),
            cpu_model: "none".to_owned(),
            accelerator: Accelerator::Tcg,
        };
        Self { identity, plan: Plan::default() }
    }

    /// The same machines, driven by another program.
    #[must_use]
    pub fn driven_by(&self, identity: VmmIdentity) -> Self {
        Self { identity, plan: self.plan.clone() }
    }

    /// Makes the next call of a step fail; asked for twice, the next two.
    pub fn fail_next(&self, step: Step) {
        self.plan.change(|faults| faults.fail.push(step));
    }

    /// Makes the next call of a step of a machine be done and answered with an error, as when the answer is lost.
    pub fn lose_answer(&self, step: Step) {
        self.plan.change(|faults| faults.lose.push(step));
    }

    /// Makes every call of a step take this long.
    pub fn delay(&self, step: Step, duration: Duration) {
        self.plan.change(|faults| faults.delay.insert(step, duration));
    }

    /// Makes the next machine that completes a step die right after it, as if killed.
    pub fn crash_after(&self, step: Step) {
        self.plan.change(|faults| faults.crash.push(step));
    }

    /// Forgets all that was to go wrong and has not.
    pub fn calm(&self) {
        self.plan.change(|faults| {
            faults.fail.clear();
            faults.crash.clear();
            faults.lose.clear();
            faults.delay.clear();
        });
    }

    /// Asks `observer` before every step whether to take it. A step that is not taken never ends, as in a
    /// process that was stopped there.
    pub fn observe(&self, observer: impl Fn(Step) -> bool + Send + Sync + 'static) {
        self.plan.change(|faults| faults.observer = Observer(Some(Arc::new(observer))));
    }

    /// Tells `watcher` of every machine that is about to be booted, restored or let run: its name, and where its
    /// network is.
    pub fn watch(&self, watcher: impl Fn(&str, Option<&Utf8Path>) + Send + Sync + 'static) {
        self.plan.change(|faults| faults.watcher = Watcher(Some(Arc::new(watcher))));
    }

    /// The names of the machines that there are.
    #[must_use]
    pub fn machines(&self) -> Vec<String> {
        self.plan.change(|faults| faults.machines.keys().cloned().collect())
    }

    /// Ends a machine; says whether there was one. What its guest does while it has no owner is told to the
    /// next one.
    pub fn end(&self, name: &str, reason: ExitReason) -> bool {
        self.plan.end(name, reason)
    }

    /// Makes all machines be without an owner, as the death of the process does that owns them: what holds
    /// one now cannot reach it any more, and does not end it when it is dropped.
    pub fn lose_owners(&self) {
        self.plan.change(|faults| faults.machines.values_mut().for_each(|process| process.owner = None));
    }

    /// Fills a page of a machine's memory with a number, as its guest would; says whether there is such
    /// a page. Page size is 4 KiB; pages 1 and 2 are the guest's own.
    pub fn write_page(&self, name: &str, page: u64, number: u64) -> bool {
        self.inside(name, |inside| {
            let has = inside.memory.has(page);
            if has {
                inside.memory.write(page, number);
            }
            has
        })
        .unwrap_or(false)
    }

    /// What fills a page of a machine's memory; none when there is no such page.
    #[must_use]
    pub fn read_page(&self, name: &str, page: u64) -> Option<u64> {
        self.inside(name, |inside| inside.memory.has(page).then(|| inside.memory.read(page))).flatten()
    }

    /// Writes a number to a machine's disk, as its guest would; says whether it could. It lies in the topmost
    /// file, where nothing else of an overlay is.
    pub fn write_disk(&self, name: &str, number: u64) -> bool {
        self.inside(name, |inside| inside.disk.as_ref().is_some_and(|disk| disk.write(number).is_ok()))
            .unwrap_or(false)
    }

    /// The number on a machine's disk: nought where none was written; none without a disk that can be read.
    #[must_use]
    pub fn read_disk(&self, name: &str) -> Option<u64> {
        self.inside(name, |inside| inside.disk.as_ref()?.read().ok()).flatten()
    }

    /// The files of a machine's disk, the top first.
    #[must_use]
    pub fn disk_files(&self, name: &str) -> Vec<Utf8PathBuf> {
        self.inside(name, |inside| inside.disk.as_ref().map(disk::Disk::chain)).flatten().unwrap_or_default()
    }

    /// Whether a machine's CPUs run; none when there is no such machine.
    #[must_use]
    pub fn is_running(&self, name: &str) -> Option<bool> {
        self.inside(name, |inside| inside.guest.is_running())
    }

    /// The machine that was started in a network namespace, if it is there.
    #[must_use]
    pub fn machine_in(&self, namespace: &Utf8Path) -> Option<String> {
        self.plan.change(|faults| {
            let mut machines = faults.machines.iter();
            let found = machines.find(|(_, process)| process.namespace.as_deref() == Some(namespace));
            found.map(|(name, _)| name.clone())
        })
    }

    fn inside<T>(&self, name: &str, work: impl FnOnce(&mut Inside) -> T) -> Option<T> {
        let inside = self.plan.change(|faults| Some(Arc::clone(&faults.machines.get(name)?.inside)))?;
        let mut inside = inside.lock().unwrap_or_else(PoisonError::into_inner);
        Some(work(&mut inside))
    }
}

/// What is to go wrong, and what there is; shared by the driver and its machines.
#[derive(Debug, Clone, Default)]
struct Plan(Arc<Mutex<Faults>>);

#[derive(Debug, Default)]
struct Faults {
    fail: Vec<Step>,
    crash: Vec<Step>,
    lose: Vec<Step>,
    delay: HashMap<Step, Duration>,
    machines: BTreeMap<String, Process>,
    last_owner: u64,
    observer: Observer,
    watcher: Watcher,
}

/// Who is asked before each step; nobody unless a test says so.
#[derive(Clone, Default)]
struct Observer(Option<Arc<dyn Fn(Step) -> bool + Send + Sync>>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Observer(a test)" } else { "Observer" })
    }
}

type Watch = dyn Fn(&str, Option<&Utf8Path>) + Send + Sync;

/// Who is told of machines; nobody unless a test says so.
#[derive(Clone, Default)]
struct Watcher(Option<Arc<Watch>>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Watcher(a test)" } else { "Watcher" })
    }
}

impl Plan {
    /// Tells of a machine, and holds nothing meanwhile.
    fn tell(&self, name: &str, namespace: Option<&Utf8Path>) {
        if let Some(watcher) = self.change(|faults| faults.watcher.clone()).0 {
            watcher(name, namespace);
        }
    }

    fn change<T>(&self, work: impl FnOnce(&mut Faults) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&self, name: &str, reason: ExitReason) -> bool {
        let ended = self.change(|faults| {
            let process = faults.machines.get_mut(name)?;
            let by_guest = matches!(reason, ExitReason::GuestShutdown | ExitReason::GuestPanic);
            if by_guest && process.owner.is_none() {
                process.unseen = Some(reason);
                return Some(None);
            }
            let is_known = by_guest || !process.is_adopted || reason == ExitReason::Stopped;
            let reason = if is_known { reason } else { ExitReason::of_unknown_cause() };
            faults.machines.remove(name).map(|process| Some((process, reason)))
        });
        match ended {
            Some(Some((process, reason))) => {
                process.exit.send_replace(Some(reason));
                true
            }
            Some(None) => true,
            None => false,
        }
    }

    fn new_owner(&self) -> u64 {
        self.change(|faults| {
            faults.last_owner += 1;
            faults.last_owner
        })
    }

    /// Takes the time and the failure that were asked for.
    async fn enter(&self, step: Step) -> VmmResult<()> {
        let observer = self.change(|faults| faults.observer.clone());
        if observer.0.is_some_and(|observer| !observer(step)) {
            return pending().await;
        }
        let delay = self.change(|faults| faults.delay.get(&step).copied());
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        if self.change(|faults| take(&mut faults.fail, step)) {
            let message = "the test asked for it".to_owned();
            return Err(VmmError::Refused { command: step.word().to_owned(), message });
        }
        Ok(())
    }

    /// Whether nobody is to hear that a step was done.
    fn is_lost(&self, step: Step) -> bool {
        self.change(|faults| take(&mut faults.lose, step))
    }

    /// Lets the machine die if that was asked for.
    fn leave(&self, step: Step, name: &str) {
        if self.change(|faults| take(&mut faults.crash, step)) {
            self.end(name, ExitReason::VmmKilled { signal: 9 });
        }
    }
}

fn take(steps: &mut Vec<Step>, step: Step) -> bool {
    let found = steps.iter().position(|planned| *planned == step);
    found.map(|at| steps.remove(at)).is_some()
}

#[async_trait]
impl Vmm for Fake {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { supports_uffd: false, supports_diff: true, supports_overlays: true }
    }

    async fn boot(&self, spec: MachineSpec, memory: BootMemory<'_>) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        self.plan.enter(Step::Boot).await?;
        self.plan.tell(&spec.name, spec.network.as_ref().map(|network| &*network.namespace));
        let (name, arguments) = (spec.name.clone(), spec.kernel_arguments.clone());
        let process = Process::boot(spec, memory)?;
        let machine = FakeMachine::start(self.plan.clone(), name.clone(), process, &arguments);
        self.plan.leave(Step::Boot, &name);
        Ok(Box::new(machine))
    }

    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        validate::snapshot_memory(&from.memory, spec.shape)?;
        self.plan.enter(Step::Restore).await?;
        self.plan.tell(&spec.name, spec.network.as_ref().map(|network| &*network.namespace));
        let name = spec.name.clone();
        let process = Process::restore(spec, from)?;
        let machine = FakeMachine::start(self.plan.clone(), name.clone(), process, &[]);
        self.plan.leave(Step::Restore, &name);
        Ok(Box::new(machine))
    }

    async fn adopt(&self, machine: AdoptedMachine) -> VmmResult<Box<dyn Vm>> {
        validate::adopted(&machine)?;
        self.plan.enter(Step::Adopt).await?;
        let adopted = FakeMachine::adopt(self.plan.clone(), machine.name.clone())?;
        self.plan.leave(Step::Adopt, &machine.name);
        Ok(Box::new(adopted))
    }
}

fn cannot(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { operation, path, source }
}

#[cfg(test)]
mod tests;
