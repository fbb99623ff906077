//! One machine of the fake: what its process would be, and the handle of its owner.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::watch;
use wrenn_types::Shape;

use super::{
    Plan, Step, cannot,
    disk::Disk,
    guest::{Guest, Saved, own_end},
    memory::{Backing, Memory},
};
use crate::{
    BootMemory, DiskSpec, ExitReason, MachineSpec, SnapshotFiles, SnapshotStatistics, Vm, VmmError,
    VmmResult, validate,
};

/// How long a guest lives that ends by itself: as with a real one, its boot has been answered by then.
const OWN_END: Duration = Duration::from_millis(5);

/// What a process would be: it is there until it ends, whoever owns it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) exit: watch::Sender<Option<ExitReason>>,
    /// Who may talk to it; each owner has a number of its own.
    pub(super) owner: Option<u64>,
    /// Whether its owner is another one than who started it.
    pub(super) is_adopted: bool,
    /// How its guest has ended it while it had no owner: it stands still until it has one.
    pub(super) unseen: Option<ExitReason>,
    pub(super) inside: Arc<Mutex<Inside>>,
    /// Where its network is.
    pub(super) namespace: Option<Utf8PathBuf>,
    /// Closed with the machine, as a process would.
    _keep_open: Vec<OwnedFd>,
}

/// What is in it, and can still be looked at by its owner when it has ended.
#[derive(Debug)]
pub(super) struct Inside {
    shape: Shape,
    guest_id: String,
    pub(super) disk: Option<Disk>,
    pub(super) guest: Guest,
    pub(super) memory: Memory,
    saved: Option<SnapshotFiles>,
}

impl Process {
    pub(super) fn boot(spec: MachineSpec, memory: BootMemory<'_>) -> VmmResult<Self> {
        for file in [&spec.guest.kernel, &spec.guest.initramfs] {
            File::open(file).map_err(cannot("open", file))?;
        }
        let disk = spec.disk.as_ref().map(Disk::open).transpose()?;
        let bytes = spec.shape.memory.bytes();
        let backing = match memory {
            BootMemory::Shared(path) => {
                let file = OpenOptions::new().write(true).create_new(true).open(path);
                file.and_then(|file| file.set_len(bytes)).map_err(cannot("create", path))?;
                Backing::Shared(path.to_owned())
            }
            BootMemory::Zeros(path) => {
                validate::snapshot_memory(path, spec.shape)?;
                Backing::Private(path.to_owned())
            }
            BootMemory::Anonymous => Backing::Anonymous,
        };
        Ok(Self::new(spec, disk, Guest::booted(), Memory::new(bytes, backing)))
    }

    pub(super) fn restore(spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Self> {
        let bytes = std::fs::read(&from.state).map_err(cannot("open", &from.state))?;
        let memory = Memory::restored(spec.shape.memory.bytes(), &from.memory, from.pages.as_deref())?;
        let refuse = |message: String| VmmError::Refused { command: "restore".to_owned(), message };
        let saved: Saved = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        if saved.shape != spec.shape || saved.guest != spec.guest.id {
            return Err(refuse("the snapshot is of another machine".to_owned()));
        }
        let disk = spec.disk.as_ref().map(Disk::open).transpose()?;
        let guest = Guest::restored(&saved, &memory);
        Ok(Self::new(spec, disk, guest, memory))
    }

    fn new(spec: MachineSpec, disk: Option<Disk>, guest: Guest, memory: Memory) -> Self {
        let (shape, guest_id) = (spec.shape, spec.guest.id);
        let inside = Inside { shape, guest_id, disk, guest, memory, saved: None };
        Self {
            exit: watch::channel(None).0,
            owner: None,
            is_adopted: false,
            unseen: None,
            inside: Arc::new(Mutex::new(inside)),
            namespace: spec.network.map(|network| network.namespace),
            _keep_open: spec.keep_open,
        }
    }
}

impl Inside {
    fn save(&mut self, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics> {
        let operation = Step::Snapshot.word();
        if self.guest.is_running() {
            return Err(VmmError::WrongState { operation, state: "running" });
        }
        match &self.saved {
            Some(saved) if saved == into => return Ok(SnapshotStatistics::default()),
            Some(_) => return Err(VmmError::WrongState { operation, state: "saved" }),
            None => {}
        }
        let unsupported = |problem| Err(VmmError::Unsupported { operation, problem });
        match &self.memory.backing {
            Backing::Shared(file) if *file == into.memory => {
                validate::snapshot_files(into, false)?;
                self.memory.give_away(&into.memory)?;
                self.save_state(&into.state)?;
                self.saved = Some(into.clone());
                Ok(SnapshotStatistics::default())
            }
            Backing::Private(base) => {
                validate::snapshot_files(into, true)?;
                if !validate::same_file(base, &into.memory).unwrap_or(false) {
                    return unsupported("the snapshot's memory is not what it maps");
                }
                self.save_state(&into.state)?;
                let Some(pages) = &into.pages else { return Ok(SnapshotStatistics::default()) };
                self.memory.save(pages)
            }
            Backing::Anonymous | Backing::Shared(_) => {
                unsupported("it was not booted with its memory in the snapshot's file")
            }
        }
    }

    fn save_state(&self, state: &Utf8Path) -> VmmResult<()> {
        let saved = serde_json::to_vec(&self.guest.save(self.shape, self.guest_id.clone()));
        let wrote = saved.map_err(io::Error::from).and_then(|saved| std::fs::write(state, saved));
        wrote.map_err(cannot("create", state))
    }

    /// Its disk, if something may be done with it now.
    fn disk(&mut self, step: Step) -> VmmResult<&mut Disk> {
        if self.saved.is_some() {
            return Err(VmmError::WrongState { operation: step.word(), state: "saved" });
        }
        let problem = "the machine has none".to_owned();
        self.disk.as_mut().ok_or(VmmError::Spec { field: "disk", problem })
    }
}

/// What the owner of a machine holds.
#[derive(Debug)]
pub(super) struct FakeMachine {
    plan: Plan,
    name: String,
    owner: u64,
    inside: Arc<Mutex<Inside>>,
    exit: watch::Receiver<Option<ExitReason>>,
}

impl FakeMachine {
    /// Lets a new machine run.
    pub(super) fn start(plan: Plan, name: String, mut process: Process, kernel_arguments: &[String]) -> Self {
        let owner = plan.new_owner();
        process.owner = Some(owner);
        let (inside, exit) = (Arc::clone(&process.inside), process.exit.subscribe());
        plan.change(|faults| faults.machines.insert(name.clone(), process));
        if let Some(reason) = own_end(kernel_arguments) {
            let (plan, name) = (plan.clone(), name.clone());
            tokio::spawn(async move {
                tokio::time::sleep(OWN_END).await;
                plan.end(&name, reason);
            });
        }
        Self { plan, name, owner, inside, exit }
    }

    /// Takes over a machine that nobody owns.
    pub(super) fn adopt(plan: Plan, name: String) -> VmmResult<Self> {
        let owner = plan.new_owner();
        let taken = plan.change(|faults| match faults.machines.get_mut(&name) {
            None => Err(VmmError::NotThere { name: name.clone() }),
            Some(process) if process.owner.is_some() => {
                Err(VmmError::Timeout { operation: Step::Adopt.word(), bound: Duration::ZERO })
            }
            Some(process) => {
                (process.owner, process.is_adopted) = (Some(owner), true);
                Ok((Arc::clone(&process.inside), process.exit.subscribe(), process.unseen.take()))
            }
        });
        let (inside, exit, unseen) = taken?;
        if let Some(reason) = unseen {
            plan.end(&name, reason);
        }
        let machine = Self { plan, name, owner, inside, exit };
        if machine.inside(|inside| inside.saved.is_some()) {
            machine.let_go();
            return Err(VmmError::WrongState { operation: Step::Adopt.word(), state: "saved" });
        }
        Ok(machine)
    }

    fn inside<T>(&self, work: impl FnOnce(&mut Inside) -> T) -> T {
        work(&mut self.inside.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_mine(&self) -> bool {
        self.plan.change(|faults| {
            faults.machines.get(&self.name).is_some_and(|process| process.owner == Some(self.owner))
        })
    }

    fn let_go(&self) {
        self.plan.change(|faults| {
            if let Some(process) = faults.machines.get_mut(&self.name)
                && process.owner == Some(self.owner)
            {
                process.owner = None;
            }
        });
    }

    fn alive(&self, step: Step) -> VmmResult<()> {
        if let Some(reason) = &*self.exit.borrow() {
            return Err(VmmError::Exited { operation: step.word(), reason: reason.clone() });
        }
        if !self.is_mine() {
            let source = io::ErrorKind::ConnectionAborted.into();
            return Err(VmmError::Connection { command: step.word().to_owned(), source });
        }
        Ok(())
    }

    async fn enter(&self, step: Step) -> VmmResult<()> {
        self.alive(step)?;
        self.plan.enter(step).await?;
        self.alive(step)
    }

    /// Does one step, between what was asked to go wrong before and after it.
    async fn step<T>(
        &self,
        step: Step,
        work: impl FnOnce(&mut Inside) -> VmmResult<T> + Send,
    ) -> VmmResult<T> {
        self.enter(step).await?;
        let done = self.inside(work)?;
        self.plan.leave(step, &self.name);
        if self.plan.is_lost(step) {
            let source = io::ErrorKind::ConnectionAborted.into();
            return Err(VmmError::Connection { command: step.word().to_owned(), source });
        }
        Ok(done)
    }
}

#[async_trait]
impl Vm for FakeMachine {
    fn pid(&self) -> Option<u32> {
        None
    }

    async fn pause(&mut self) -> VmmResult<()> {
        self.step(Step::Pause, |inside| {
            inside.guest.pause(&mut inside.memory);
            Ok(())
        })
        .await
    }

    async fn resume(&mut self) -> VmmResult<()> {
        let of = |faults: &mut super::Faults| faults.machines.get(&self.name).map(|it| it.namespace.clone());
        let namespace = self.plan.change(of).flatten();
        self.step(Step::Resume, |inside| {
            if inside.saved.is_some() {
                return Err(VmmError::WrongState { operation: Step::Resume.word(), state: "saved" });
            }
            self.plan.tell(&self.name, namespace.as_deref());
            inside.guest.resume();
            Ok(())
        })
        .await
    }

    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics> {
        self.step(Step::Snapshot, |inside| inside.save(into)).await
    }

    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        self.step(Step::ResizeDisk, |inside| inside.disk(Step::ResizeDisk)?.grow(bytes)).await
    }

    async fn pivot_disk(&mut self, overlay: &DiskSpec) -> VmmResult<()> {
        self.step(Step::PivotDisk, |inside| inside.disk(Step::PivotDisk)?.pivot(overlay)).await
    }

    async fn disk_chain(&mut self) -> VmmResult<Vec<Utf8PathBuf>> {
        self.step(Step::DiskChain, |inside| Ok(inside.disk.as_ref().map(Disk::chain).unwrap_or_default()))
            .await
    }

    async fn stream_disk(&mut self, base: &Utf8Path) -> VmmResult<()> {
        self.step(Step::StreamDisk, |inside| inside.disk(Step::StreamDisk)?.stream(base)).await
    }

    async fn console(&mut self) -> String {
        self.inside(|inside| inside.guest.console())
    }

    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.clone()
    }

    async fn stop(&mut self) -> VmmResult<ExitReason> {
        if let Some(reason) = self.exit.borrow().clone() {
            return Ok(reason);
        }
        self.plan.enter(Step::Stop).await?;
        self.alive(Step::Stop)?;
        self.plan.end(&self.name, ExitReason::Stopped);
        Ok(self.exit.borrow().clone().unwrap_or(ExitReason::Stopped))
    }

    async fn release(self: Box<Self>) {
        self.let_go();
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        if self.is_mine() {
            self.plan.end(&self.name, ExitReason::Stopped);
        }
    }
}
