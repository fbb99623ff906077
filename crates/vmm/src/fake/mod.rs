//! No machine at all: a driver that keeps every promise of the traits but runs nothing.
//!
//! It is for tests of what stands on a driver: of faults, because every failure can be called up
//! ([`Fake::fail_next`], [`Fake::delay`], [`Fake::crash_after`], [`Fake::end`]), and of scale, because a
//! machine costs a few hundred bytes. It passes the same conformance cases as the real drivers.
//!
//! Its guest counts: it prints `tick TOKEN N` for every 10 ms that it was not paused, with a token that is
//! new at each boot and the same after a restore. `conformance=poweroff`, `reboot` or `panic` among its
//! kernel arguments makes it do that at once.

mod guest;
mod machine;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use camino::Utf8Path;
use tokio::sync::watch;

use self::machine::FakeMachine;
use crate::{
    Accelerator, Capabilities, ExitReason, MachineSpec, SnapshotFiles, Vm, Vmm, VmmError, VmmIdentity,
    VmmResult, validate,
};

/// What a test can make fail, take long, or end a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// [`Vmm::boot`].
    Boot,
    /// [`Vmm::restore`].
    Restore,
    /// [`Vm::pause`].
    Pause,
    /// [`Vm::resume`].
    Resume,
    /// [`Vm::snapshot`].
    Snapshot,
    /// [`Vm::resize_disk`].
    ResizeDisk,
    /// [`Vm::stop`].
    Stop,
}

impl Step {
    fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Restore => "restore",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::ResizeDisk => "resize_disk",
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

    /// Makes the next call of a step fail; asked for twice, the next two.
    pub fn fail_next(&self, step: Step) {
        self.plan.change(|faults| faults.fail.push(step));
    }

    /// Makes every call of a step take this long.
    pub fn delay(&self, step: Step, duration: Duration) {
        self.plan.change(|faults| faults.delay.insert(step, duration));
    }

    /// Makes the next machine that completes a step die right after it, as if killed.
    pub fn crash_after(&self, step: Step) {
        self.plan.change(|faults| faults.crash.push(step));
    }

    /// The names of the machines that there are.
    #[must_use]
    pub fn machines(&self) -> Vec<String> {
        self.plan.change(|faults| faults.machines.keys().cloned().collect())
    }

    /// Ends a machine; says whether there was one.
    pub fn end(&self, name: &str, reason: ExitReason) -> bool {
        self.plan.end(name, reason)
    }
}

/// What is to go wrong, and what there is; shared by the driver and its machines.
#[derive(Debug, Clone, Default)]
struct Plan(Arc<Mutex<Faults>>);

#[derive(Debug, Default)]
struct Faults {
    fail: Vec<Step>,
    crash: Vec<Step>,
    delay: HashMap<Step, Duration>,
    machines: BTreeMap<String, watch::Sender<Option<ExitReason>>>,
}

impl Plan {
    fn change<T>(&self, work: impl FnOnce(&mut Faults) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&self, name: &str, reason: ExitReason) -> bool {
        match self.change(|faults| faults.machines.remove(name)) {
            Some(exit) => {
                exit.send_replace(Some(reason));
                true
            }
            None => false,
        }
    }

    /// Takes the time and the failure that were asked for.
    async fn enter(&self, step: Step) -> VmmResult<()> {
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
        Capabilities { supports_uffd: false, supports_diff: false }
    }

    async fn boot(&self, spec: MachineSpec, memory_file: Option<&Utf8Path>) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        self.plan.enter(Step::Boot).await?;
        let machine = FakeMachine::boot(self.plan.clone(), spec, memory_file)?;
        self.plan.leave(Step::Boot, machine.name());
        Ok(Box::new(machine))
    }

    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        validate::snapshot_memory(&from.memory, spec.shape)?;
        self.plan.enter(Step::Restore).await?;
        let machine = FakeMachine::restore(self.plan.clone(), spec, from)?;
        self.plan.leave(Step::Restore, machine.name());
        Ok(Box::new(machine))
    }
}

#[cfg(test)]
mod tests;
