//! The floor: the least that anyone needs to get a first byte out of a guest that is restored.
//!
//! ```text
//!  made ahead, not timed        timed
//!  network namespace, disk  ─►  restore the snapshot ─► let it run ─► GET /health, again a millisecond
//!                                                                     after each refusal ─► first byte
//! ```
//!
//! It restores the same snapshot as the product, with the same VMM and arguments, because it uses the same
//! driver. It does nothing else: no API, no database, no records, no identity for the guest, no command.
//! What a create takes on top of it is the price of the product.
//!
//! The same program measures a second thing, the *bare command*: after the restore the guest is given its identity
//! and runs `true`, told so directly by this program, on a connection for each of the two. It tells the price of the
//! product apart from what the guest itself takes. It is no floor: a create may use one connection for both.
//!
//! What a sandbox was paused as can be restored in the same way ([`Origin::of_paused`]), and a machine that was restored
//! can be saved as a pause does it ([`Floor::save`]): stopped, its devices and the pages of its own written. Neither is
//! made durable, digested or recorded: that is the product's price too.
//!
//! There is one question under way at a time. Asking anew every millisecond, whether or not the guest has
//! had the time to answer, was tried: the guest then has dozens of connections to accept, and the first
//! byte comes up to three times as late. That would not be the least that anyone needs.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use wrenn_host_agent::{
    guest::{self, Identity},
    network::{GuestConnector, Policy, PoolConfig, Slot, SlotPool, Uplink},
    rootfs::{Qcow2Store, RootfsStore as _},
    sandbox::record,
    snapshot_store::Manifest,
};
use wrenn_types::{DiskMib, InstanceId, SandboxId, Shape};
use wrenn_vmm::{
    DiskFormat, DiskSpec, GuestBundle, MachineSpec, NetworkSpec, SnapshotFiles, Vm, Vmm,
    qemu::{AcceleratorChoice, Qemu, QemuOptions},
};

/// The port of the guest agent.
const ENVD_PORT: u16 = 49983;
/// The user of the template `base`.
const USER: &str = "user";
/// How long one restore may take.
const BOUND: Duration = Duration::from_secs(60);
/// How long one attempt may take: the host sends a lost first packet again only after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// How long after a refusal the next attempt is made.
const PAUSE: Duration = Duration::from_millis(1);

const REQUEST: &[u8] = b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";

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
        }
    }

    /// What a paused sandbox is saved as, found in the directory of its agent.
    ///
    /// # Errors
    /// There is no such sandbox, or it is not paused.
    pub fn of_paused(agent: &Utf8Path, id: &SandboxId) -> Result<Self> {
        let record = record::read(&agent.join("sandboxes"), id).context("the sandbox has no record")?;
        let paused = record.paused.context("the sandbox is not paused")?;
        let saved = agent.join("snapshots").join(paused.snapshot.as_str());
        let top = record.layers.first().context("the sandbox has no disk")?;
        Ok(Self {
            files: SnapshotFiles {
                memory: agent.join("bases").join(record.base.to_string()).join("memory"),
                state: saved.join("state"),
                pages: Some(saved.join("pages")),
            },
            layer: DiskSpec { path: agent.join("disks").join(top.as_str()), format: DiskFormat::Qcow2 },
            disk: record.disk,
            shape: record.shape,
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
    _directory: tempfile::TempDir,
}

/// What a guest is asked once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// `GET /health`, until the first byte of the answer.
    FirstByte,
    /// `POST /init` and then `true`, until the end of both answers.
    Command,
}

/// A machine whose guest has answered.
#[derive(Debug)]
pub struct Answered {
    /// From before the restore until the answer.
    pub took: Duration,
    vm: Box<dyn Vm>,
    slot: Slot,
    memory: Utf8PathBuf,
    _directory: tempfile::TempDir,
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
        let manifest =
            std::fs::read(directory.join("manifest.json")).context("read the snapshot's manifest")?;
        let manifest: Manifest =
            serde_json::from_slice(&manifest).context("parse the snapshot's manifest")?;
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
            network: Some(NetworkSpec {
                namespace: slot.netns_path().to_owned(),
                tap: slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![slot.lock().context("share the slot's lock")?],
            control_group: None,
        };
        Ok(Ready { origin, connector: slot.connector(), slot, spec, _directory: directory })
    }

    /// Restores and waits for the answer.
    ///
    /// # Errors
    /// The machine cannot be restored or its guest does not answer within a minute. Nothing is left then.
    pub async fn restore(&self, ready: Ready, question: Question) -> Result<Answered> {
        let Ready { origin, slot, connector, spec, _directory } = ready;
        let begin = Instant::now();
        let outcome = timeout(BOUND, async {
            let mut vm = self.vmm.restore(spec, &origin.files).await.context("restore")?;
            let answered = match vm.resume().await.context("let it run") {
                Ok(()) => match question {
                    Question::FirstByte => first_byte(&connector).await,
                    Question::Command => command(&connector).await,
                },
                Err(error) => Err(error),
            };
            let took = begin.elapsed();
            anyhow::Ok((vm, answered.map(|()| took)))
        });
        match outcome.await {
            Ok(Ok((vm, Ok(took)))) => {
                Ok(Answered { took, vm, slot, memory: origin.files.memory, _directory })
            }
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
        let into = SnapshotFiles {
            memory: answered.memory.clone(),
            state: directory.join("state"),
            pages: Some(directory.join("pages")),
        };
        let begin = Instant::now();
        answered.vm.pause().await.context("stop the CPUs")?;
        answered.vm.snapshot(&into).await.context("save devices and pages")?;
        Ok(begin.elapsed())
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

    /// Removes the slots that are left.
    pub async fn close(self) {
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

/// Asks `GET /health` until the first byte of an answer is there.
async fn first_byte(connector: &GuestConnector) -> Result<()> {
    loop {
        match timeout(ATTEMPT, ask(connector)).await {
            Ok(Ok(())) => return Ok(()),
            // Refused: nothing listens yet.
            Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
            Err(_) => {}
        }
    }
}

/// Makes the guest itself and runs `true` in it.
async fn command(connector: &GuestConnector) -> Result<()> {
    let identity = Identity {
        hostname: Some("bare"),
        restored: true,
        entropy: Identity::fresh_entropy(),
        machine_id: Some(Identity::fresh_machine_id()),
        access_token: None,
        env_vars: BTreeMap::new(),
        default_user: USER,
        default_workdir: "/home/user",
        dns_servers: &[],
        disk_bytes: None,
    };
    guest::initialise(connector, &identity, None, BOUND).await.context("POST /init")?;
    guest::exercise(connector, USER, &["true"], BOUND).await.context("run true")
}

async fn ask(connector: &GuestConnector) -> io::Result<()> {
    let mut stream = connector.connect(ENVD_PORT).await?;
    stream.write_all(REQUEST).await?;
    let mut byte = [0];
    stream.read_exact(&mut byte).await.map(drop)
}
