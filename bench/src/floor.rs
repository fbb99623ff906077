//! The floor: the least that anyone needs, as a program that does nothing else, as careful as the product.
//!
//! ```text
//!  made ahead, not timed        timed
//!  network namespace, disk  ─►  restore the snapshot ─► let it run ─┬► GET /health ─► first byte
//!                                                                   └► POST /init, `true` ─► first exec result
//!
//!  save      stop ─► devices and the pages of its own written
//!  fork      stop ─► the same ─► next overlay on top ─► let it run ─► restore a copy ─► first exec result
//!                                                           how long the machine stood still
//!  rollback  end the machine ─► restore ─► first exec result
//! ```
//!
//! It restores the same snapshot as the product, with the same VMM and arguments, because it uses the same
//! driver. It does nothing else: no API, no database, no records. Nothing that it saves is made durable or digested, and no
//! guest is asked to stand still before. What the product takes on top of it is the price of the product.
//!
//! There are two ends of a restore. The first byte of `/health` is what the VMM and the guest's agent take to be there at all,
//! without an identity for the guest and without a command. The result of a first command is what a user waits for: the
//! guest is given its identity and runs `true`, on one connection (`bare.rs`).
//!
//! What a sandbox was saved as can be restored in the same way ([`Origin::of_paused`], [`Origin::of_snapshot`]), by
//! the very files that the product has written. A copy stands on the overlay that the machine had on top, which is why that
//! machine goes on with another one: without it the disk of the copy would change under it.
//!
//! There is one question under way at a time. Asking anew every millisecond, whether or not the guest has
//! had the time to answer, was tried: the guest then has dozens of connections to accept, and the first
//! byte comes up to three times as late. That would not be the least that anyone needs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tokio::time::timeout;
use wrenn_host_agent::{
    network::{GuestConnector, Policy, PoolConfig, Slot, SlotPool, Uplink},
    rootfs::{Qcow2Store, RootfsStore as _},
    sandbox::record,
    snapshot_store::Manifest,
    snapshots::About,
};
use wrenn_types::{AccessToken, DiskMib, InstanceId, SandboxId, Shape, SnapshotId};
use wrenn_vmm::{
    DiskFormat, DiskRate, DiskSpec, GuestBundle, MachineSpec, NetworkSpec, SnapshotFiles, Vm, Vmm,
    qemu::{AcceleratorChoice, Qemu, QemuOptions},
};

use crate::bare;

/// How long one restore may take, until its guest has answered.
const BOUND: Duration = Duration::from_secs(60);

/// Everything that restores share.
#[derive(Debug)]
pub struct Floor {
    vmm: Arc<dyn Vmm>,
    guest: GuestBundle,
    origin: Origin,
    slots: SlotPool,
    /// Marks everything that is made here as ours, and not the stack's.
    instance: InstanceId,
    directory: tempfile::TempDir,
}

/// What a machine is restored from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Memory and devices.
    files: SnapshotFiles,
    /// What the disk stands on.
    layer: DiskSpec,
    /// The size of the disk.
    disk: DiskMib,
    /// CPUs and memory.
    shape: Shape,
    /// What the guest asks of every caller, if it was saved with an identity.
    token: Option<AccessToken>,
}

impl Origin {
    /// The warm snapshot in a directory.
    fn of_template(directory: &Utf8Path, manifest: &Manifest) -> Self {
        Self {
            files: SnapshotFiles {
                memory: directory.join("memory"),
                state: directory.join("state"),
                pages: None,
            },
            layer: DiskSpec { path: directory.join("disk"), format: manifest.subject.disk_format },
            disk: manifest.subject.disk,
            shape: manifest.subject.shape,
            token: None,
        }
    }

    /// What a paused sandbox is saved as, found in the directory of its agent.
    ///
    /// # Errors
    /// There is no such sandbox, or it is not paused.
    pub fn of_paused(agent: &Utf8Path, id: &SandboxId) -> Result<Self> {
        let record = record::read(&agent.join("sandboxes"), id).context("the sandbox has no record")?;
        let paused = record.paused.context("the sandbox is not paused")?;
        Self::of_snapshot(agent, &paused.snapshot)
    }

    /// A snapshot with memory, found in the directory of its agent. Its files are in use only by the restore itself.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn of_snapshot(agent: &Utf8Path, id: &SnapshotId) -> Result<Self> {
        let saved = agent.join("snapshots").join(id.as_str());
        let text = std::fs::read(saved.join("manifest.json")).context("read the manifest of the snapshot")?;
        let mut manifest: serde_json::Value =
            serde_json::from_slice(&text).context("parse the manifest of the snapshot")?;
        let about: About = serde_json::from_value(manifest["content"]["about"].take())
            .context("parse what the snapshot is of")?;
        let top = about.layers.first().context("the snapshot has no disk of its own")?;
        Ok(Self {
            files: SnapshotFiles {
                memory: agent.join("bases").join(about.base.as_str()).join("memory"),
                state: saved.join("state"),
                pages: Some(saved.join("pages")),
            },
            layer: DiskSpec { path: agent.join("disks").join(top.as_str()), format: DiskFormat::Qcow2 },
            disk: about.disk,
            shape: about.shape,
            token: Some(about.access_token),
        })
    }
}

/// A machine's namespace and disk, before the machine.
#[derive(Debug)]
pub struct Ready {
    origin: Origin,
    slot: Slot,
    connector: GuestConnector,
    spec: MachineSpec,
    /// The machine's directory; it goes when this is dropped.
    directory: tempfile::TempDir,
}

/// What a guest is asked once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// `GET /health`, until the first byte of the answer.
    FirstByte,
    /// `POST /init` and then `true`, until that has ended.
    Command,
}

/// A machine whose guest has answered.
#[derive(Debug)]
pub struct Answered {
    /// From before the restore until the answer.
    pub took: Duration,
    vm: Box<dyn Vm>,
    slot: Slot,
    origin: Origin,
    /// The top of its disk.
    disk: DiskSpec,
    directory: tempfile::TempDir,
}

/// What there is to be before a machine is forked: the copy's namespace and disk, and the machine's next overlay.
#[derive(Debug)]
pub struct ForkReady {
    copy: Ready,
    next: DiskSpec,
    into: SnapshotFiles,
}

/// A machine that was forked.
#[derive(Debug)]
pub struct Forked {
    /// How long the machine stood still.
    pub stopped: Duration,
    /// The copy; it took as long as the whole fork.
    pub copy: Result<Answered>,
}

impl Floor {
    /// Gets ready to restore the snapshot in `directory`, up to `at_once` times at once.
    ///
    /// # Errors
    /// The snapshot is of another VMM or guest than these, or the network cannot be had.
    pub async fn new(
        vmm: Arc<dyn Vmm>,
        guest: GuestBundle,
        directory: &Utf8Path,
        uplink: Uplink,
        at_once: usize,
    ) -> Result<Self> {
        let manifest = read_manifest(directory)?;
        ensure!(manifest.subject.vmm == *vmm.identity(), "the snapshot is of {:?}", manifest.subject.vmm);
        ensure!(
            manifest.subject.guest == guest.id,
            "the snapshot is of the guest {}",
            manifest.subject.guest
        );
        let instance = InstanceId::random();
        let policy = Policy::offline();
        let config = PoolConfig { instance: instance.clone(), uplink, ready: at_once, policy };
        Ok(Self {
            vmm,
            guest,
            origin: Origin::of_template(directory, &manifest),
            slots: SlotPool::start(config).await.context("make network slots")?,
            instance,
            // Control sockets need a short path.
            directory: tempfile::Builder::new().prefix("wrenn-floor-").tempdir_in("/run")?,
        })
    }

    /// Makes what is to be there before the clock starts.
    ///
    /// # Errors
    /// The namespace or the disk cannot be made.
    pub async fn prepare(&self) -> Result<Ready> {
        self.prepare_from(self.origin.clone()).await
    }

    /// The same, to restore something else than the template.
    ///
    /// # Errors
    /// As [`Floor::prepare`].
    pub async fn prepare_from(&self, origin: Origin) -> Result<Ready> {
        let slot = self.slots.take().await.context("take a network slot")?;
        let directory = tempfile::tempdir_in(self.directory.path())?;
        let run_dir = Utf8PathBuf::from_path_buf(directory.path().to_owned())
            .map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))?;
        let disk = Qcow2Store
            .clone_disk(&origin.layer, &run_dir.join("disk"), origin.disk)
            .context("clone the disk")?;
        let spec = MachineSpec {
            name: format!("wrenn-{}-floor-{}", self.instance, slot.number()),
            run_dir,
            shape: origin.shape,
            guest: self.guest.clone(),
            disk: Some(disk),
            // The floor confines nothing.
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            user: None,
            network: Some(NetworkSpec {
                namespace: slot.netns_path().to_owned(),
                tap: slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![slot.lock().context("share the slot's lock")?],
            control_group: None,
        };
        Ok(Ready { origin, connector: slot.connector(), slot, spec, directory })
    }

    /// Restores and waits for the answer.
    ///
    /// # Errors
    /// The machine cannot be restored or its guest does not answer within a minute. Nothing is left then.
    pub async fn restore(&self, ready: Ready, question: Question) -> Result<Answered> {
        self.restore_since(Instant::now(), ready, question).await
    }

    /// The same, with a clock that was started before.
    async fn restore_since(&self, begin: Instant, ready: Ready, question: Question) -> Result<Answered> {
        let Ready { origin, slot, connector, spec, directory } = ready;
        let disk = spec.disk.clone().context("the machine has no disk")?;
        let outcome = timeout(BOUND, async {
            let mut vm = self.vmm.restore(spec, &origin.files).await.context("restore")?;
            let answered = match (vm.resume().await.context("let it run"), question) {
                (Ok(()), Question::FirstByte) => {
                    bare::first_byte(&connector).await;
                    Ok(())
                }
                (Ok(()), Question::Command) => bare::command(&connector, origin.token.as_ref(), BOUND).await,
                (Err(error), _) => Err(error),
            };
            let took = begin.elapsed();
            anyhow::Ok((vm, answered.map(|()| took)))
        });
        match outcome.await {
            Ok(Ok((vm, Ok(took)))) => Ok(Answered { took, vm, slot, origin, disk, directory }),
            Ok(Ok((mut vm, Err(error)))) => {
                vm.stop().await.context("stop the machine")?;
                self.slots.release(slot).await;
                Err(error)
            }
            Ok(Err(error)) => {
                self.slots.release(slot).await;
                Err(error)
            }
            Err(_) => {
                // The machine was dropped with the future, and so killed.
                self.slots.release(slot).await;
                bail!("no answer within {BOUND:?}")
            }
        }
    }

    /// Stops a machine and writes its devices and its own pages into `directory`, which is to be empty. It stays
    /// stopped.
    ///
    /// # Errors
    /// The VMM cannot do it, or the disk is full.
    pub async fn save(&self, answered: &mut Answered, directory: &Utf8Path) -> Result<Duration> {
        let into = answered.saved_into(directory);
        let begin = Instant::now();
        answered.vm.pause().await.context("stop the CPUs")?;
        answered.vm.snapshot(&into).await.context("save devices and pages")?;
        Ok(begin.elapsed())
    }

    /// Makes what is to be there before the clock of a fork starts. The machine is going to be saved into `directory`,
    /// which is to be empty.
    ///
    /// # Errors
    /// The namespace or a disk cannot be made.
    pub async fn prepare_fork(&self, parent: &Answered, directory: &Utf8Path) -> Result<ForkReady> {
        let into = parent.saved_into(directory);
        let Origin { disk, shape, token, .. } = parent.origin.clone();
        let origin = Origin { files: into.clone(), layer: parent.disk.clone(), disk, shape, token };
        let next = parent.directory_path()?.join("next");
        let next = Qcow2Store.clone_disk(&parent.disk, &next, disk).context("make the next overlay")?;
        Ok(ForkReady { copy: self.prepare_from(origin).await?, next, into })
    }

    /// Saves a machine, which goes on, and restores a copy of it until that has run a command. Once for each machine.
    ///
    /// # Errors
    /// The VMM cannot save it or let it go on. What becomes of the copy is told apart, since the machine stood still
    /// in any case.
    pub async fn fork(&self, parent: &mut Answered, ready: ForkReady) -> Result<Forked> {
        let ForkReady { copy, next, into } = ready;
        let begin = Instant::now();
        let saved = async {
            parent.vm.pause().await.context("stop the CPUs")?;
            parent.vm.snapshot(&into).await.context("save devices and pages")?;
            parent.vm.pivot_disk(&next).await.context("put it on its next overlay")?;
            parent.vm.resume().await.context("let it go on")
        };
        if let Err(error) = saved.await {
            self.slots.release(copy.slot).await;
            return Err(error);
        }
        let stopped = begin.elapsed();
        parent.disk = next;
        Ok(Forked { stopped, copy: self.restore_since(begin, copy, Question::Command).await })
    }

    /// Ends a machine and restores another one in its place, until that has run a command.
    ///
    /// # Errors
    /// As [`Floor::finish`] and [`Floor::restore`].
    pub async fn roll_back(&self, machine: Answered, ready: Ready) -> Result<Answered> {
        let Answered { mut vm, slot, directory, .. } = machine;
        let begin = Instant::now();
        let ended = vm.stop().await.context("end the machine");
        let restored = match ended {
            Ok(_) => self.restore_since(begin, ready, Question::Command).await,
            Err(error) => {
                self.slots.release(ready.slot).await;
                Err(error)
            }
        };
        self.slots.release(slot).await;
        drop(directory);
        restored
    }

    /// Ends a machine and gives back what it had.
    ///
    /// # Errors
    /// The VMM does not end.
    pub async fn finish(&self, answered: Answered) -> Result<()> {
        let Answered { mut vm, slot, .. } = answered;
        let stopped = vm.stop().await.context("stop the machine");
        self.slots.release(slot).await;
        stopped.map(drop)
    }

    /// Removes the slots that are left. Without it they stay when the program has ended.
    pub async fn close(&self) {
        self.slots.shutdown().await;
    }
}

/// What is recorded of the snapshot in a directory.
fn read_manifest(directory: &Utf8Path) -> Result<Manifest> {
    let text = std::fs::read(directory.join("manifest.json")).context("read the snapshot's manifest")?;
    serde_json::from_slice(&text).context("parse the snapshot's manifest")
}

/// The driver that made a snapshot, with the accelerator that it chose.
///
/// # Errors
/// There is no QEMU.
pub async fn driver_of(directory: &Utf8Path) -> Result<Arc<dyn Vmm>> {
    let accelerator = read_manifest(directory)?.subject.vmm.accelerator;
    let options = QemuOptions {
        accelerator: AcceleratorChoice::Always(accelerator),
        ..QemuOptions::from_environment().context("read WRENN_ACCEL")?
    };
    Ok(Arc::new(Qemu::detect(options).await.context("find QEMU")?))
}

impl Answered {
    fn saved_into(&self, directory: &Utf8Path) -> SnapshotFiles {
        SnapshotFiles {
            memory: self.origin.files.memory.clone(),
            state: directory.join("state"),
            pages: Some(directory.join("pages")),
        }
    }

    fn directory_path(&self) -> Result<&Utf8Path> {
        Utf8Path::from_path(self.directory.path()).context("the machine's directory is not UTF-8")
    }
}
