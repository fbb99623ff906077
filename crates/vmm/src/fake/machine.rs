//! One machine of the fake.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    time::Duration,
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::watch;
use wrenn_types::Shape;

use super::{
    Plan, Step,
    guest::{Guest, Saved, own_end},
};
use crate::{DiskFormat, DiskSpec, ExitReason, MachineSpec, SnapshotFiles, Vm, VmmError, VmmResult};

/// How long a guest lives that ends by itself: as with a real one, its boot has been answered by then.
const OWN_END: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct FakeMachine {
    plan: Plan,
    name: String,
    shape: Shape,
    guest_id: String,
    disk: Option<DiskSpec>,
    guest: Guest,
    memory: Option<Utf8PathBuf>,
    saved: Option<SnapshotFiles>,
    exit: watch::Receiver<Option<ExitReason>>,
    /// Closed with the machine, as a process would.
    keep_open: Vec<OwnedFd>,
}

impl FakeMachine {
    pub(super) fn boot(plan: Plan, spec: MachineSpec, memory_file: Option<&Utf8Path>) -> VmmResult<Self> {
        for file in [&spec.guest.kernel, &spec.guest.initramfs] {
            File::open(file).map_err(cannot("open", file))?;
        }
        check_disk(&spec)?;
        if let Some(path) = memory_file {
            let file = OpenOptions::new().write(true).create_new(true).open(path);
            let sized = file.and_then(|file| file.set_len(spec.shape.memory.bytes()));
            sized.map_err(cannot("create", path))?;
        }
        let own_end = own_end(&spec.kernel_arguments);
        let mut machine = Self::new(plan, spec, Guest::booted());
        machine.memory = memory_file.map(Utf8Path::to_owned);
        if let Some(reason) = own_end {
            let (plan, name) = (machine.plan.clone(), machine.name.clone());
            tokio::spawn(async move {
                tokio::time::sleep(OWN_END).await;
                plan.end(&name, reason);
            });
        }
        Ok(machine)
    }

    pub(super) fn restore(plan: Plan, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Self> {
        let bytes = std::fs::read(&from.state).map_err(cannot("open", &from.state))?;
        let refuse = |message: String| VmmError::Refused { command: "restore".to_owned(), message };
        let saved: Saved = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        if saved.shape != spec.shape || saved.guest != spec.guest.id {
            return Err(refuse("the snapshot is of another machine".to_owned()));
        }
        check_disk(&spec)?;
        Ok(Self::new(plan, spec, Guest::restored(&saved)))
    }

    fn new(plan: Plan, spec: MachineSpec, guest: Guest) -> Self {
        let (ended, exit) = watch::channel(None);
        plan.change(|faults| faults.machines.insert(spec.name.clone(), ended));
        Self {
            plan,
            name: spec.name,
            shape: spec.shape,
            guest_id: spec.guest.id,
            disk: spec.disk,
            guest,
            memory: None,
            saved: None,
            exit,
            keep_open: spec.keep_open,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn alive(&self, step: Step) -> VmmResult<()> {
        match &*self.exit.borrow() {
            Some(reason) => Err(VmmError::Exited { operation: step.word(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    async fn enter(&self, step: Step) -> VmmResult<()> {
        self.alive(step)?;
        self.plan.enter(step).await?;
        self.alive(step)
    }

    fn save(&mut self, into: &SnapshotFiles) -> VmmResult<()> {
        let operation = Step::Snapshot.word();
        if self.guest.is_running() {
            return Err(VmmError::WrongState { operation, state: "running" });
        }
        if self.saved.as_ref() == Some(into) {
            return Ok(());
        }
        if self.saved.is_some() {
            return Err(VmmError::WrongState { operation, state: "saved" });
        }
        if self.memory.as_ref() != Some(&into.memory) {
            let problem = "it was not booted with its memory in the snapshot's file";
            return Err(VmmError::Unsupported { operation, problem });
        }
        let saved = serde_json::to_vec(&self.guest.save(self.shape, self.guest_id.clone()));
        let wrote = saved.map_err(io::Error::from).and_then(|saved| std::fs::write(&into.state, saved));
        wrote.map_err(cannot("create", &into.state))?;
        self.saved = Some(into.clone());
        Ok(())
    }

    fn grow_disk(&self, bytes: u64) -> VmmResult<()> {
        let refuse = |problem: String| Err(VmmError::Spec { field: "disk", problem });
        let Some(disk) = &self.disk else { return refuse("the machine has none".to_owned()) };
        if disk.format != DiskFormat::Raw {
            return Ok(());
        }
        let file = OpenOptions::new().write(true).open(&disk.path).map_err(cannot("open", &disk.path))?;
        let present = file.metadata().map_err(cannot("open", &disk.path))?.len();
        if bytes < present {
            return refuse(format!("it has {present} bytes already, and {bytes} are fewer"));
        }
        file.set_len(bytes).map_err(cannot("size", &disk.path))
    }
}

fn check_disk(spec: &MachineSpec) -> VmmResult<()> {
    match &spec.disk {
        Some(disk) => File::open(&disk.path).map(drop).map_err(cannot("open", &disk.path)),
        None => Ok(()),
    }
}

fn cannot(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { operation, path, source }
}

#[async_trait]
impl Vm for FakeMachine {
    fn pid(&self) -> Option<u32> {
        None
    }

    async fn pause(&mut self) -> VmmResult<()> {
        self.enter(Step::Pause).await?;
        self.guest.pause();
        self.plan.leave(Step::Pause, &self.name);
        Ok(())
    }

    async fn resume(&mut self) -> VmmResult<()> {
        self.enter(Step::Resume).await?;
        if self.saved.is_some() {
            return Err(VmmError::WrongState { operation: Step::Resume.word(), state: "saved" });
        }
        self.guest.resume();
        self.plan.leave(Step::Resume, &self.name);
        Ok(())
    }

    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<()> {
        self.enter(Step::Snapshot).await?;
        self.save(into)?;
        self.plan.leave(Step::Snapshot, &self.name);
        Ok(())
    }

    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        self.enter(Step::ResizeDisk).await?;
        if self.saved.is_some() {
            return Err(VmmError::WrongState { operation: Step::ResizeDisk.word(), state: "saved" });
        }
        self.grow_disk(bytes)?;
        self.plan.leave(Step::ResizeDisk, &self.name);
        Ok(())
    }

    async fn console(&mut self) -> String {
        self.guest.console()
    }

    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.clone()
    }

    async fn stop(&mut self) -> VmmResult<ExitReason> {
        if let Some(reason) = self.exit.borrow().clone() {
            return Ok(reason);
        }
        self.plan.enter(Step::Stop).await?;
        self.plan.end(&self.name, ExitReason::Stopped);
        self.keep_open.clear();
        Ok(self.exit.borrow().clone().unwrap_or(ExitReason::Stopped))
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.plan.end(&self.name, ExitReason::Stopped);
    }
}
