//! The ways from a snapshot to a guest that answers, each timed once at a time.
//!
//! ```text
//!  ahead, not timed       timed
//!  directory, disk  ─►  restore ─► let it run ─► GET /health ─► first byte       ─► page faults ─► everything is given back
//!  nothing          ─►  create through the agent ─► GET /health ─► first byte    ─► destroyed
//! ```
//!
//! All restores have the same network slot, one after the other, so that nothing is made for the next one while one is
//! timed; a create has one of the agent's. The agent is there all the time, and idle.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tokio::{task::spawn_blocking, time::timeout};
use wrenn_bench::bare;
use wrenn_host_agent::{
    Agent,
    doctor::UIDS,
    network::Slot,
    pager::{self, Counts, PagerProgram},
    sandbox::{Handle, SandboxSpec, Settings, Stage, host::Host},
    snapshot_store::WarmSnapshot,
    users::Users,
    warm::WarmRequest,
};
use wrenn_types::{AccessToken, DiskMib, InactivityTimeout, NetworkPolicy, SandboxId, Shape, TimeoutAction};
use wrenn_vmm::{
    DiskRate, DiskSpec, MachineSpec, NetworkSpec, SnapshotFiles, Vmm, VmmError,
    firecracker::{Firecracker, FirecrackerOptions, MemoryBackend},
};

use crate::plain::Plain;

/// How long one may take until its guest has answered, and how long its guest may take to become itself.
const BOUND: Duration = Duration::from_secs(120);
/// How long the network slots may take to be as many as before.
const SLOTS_BOUND: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const TEMPLATE: &str = "base";
/// The steps of a restore.
pub(crate) const STEPS: [&str; 3] = ["start and load", "let it run", "answer of the guest"];

/// A way from a snapshot to a guest that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Way {
    /// A bare program, which makes the same calls.
    Bare,
    /// Our driver.
    Driver,
    /// Our driver, in the jailer.
    Jailed,
    /// Memory comes from a pager that knows of no working set.
    Served,
    /// Memory comes from a pager, which has the working set ready.
    WorkingSet,
    /// The same in the jailer.
    JailedWorkingSet,
    /// Our driver, and the guest becomes itself first.
    Identified,
    /// Through the agent.
    Create,
    /// Through an agent as in production: in the jailer, with a pager and the working set.
    ConfinedCreate,
}

impl Way {
    pub(crate) const ALL: [Self; 9] = [
        Self::Bare,
        Self::Driver,
        Self::Jailed,
        Self::Served,
        Self::WorkingSet,
        Self::JailedWorkingSet,
        Self::Identified,
        Self::Create,
        Self::ConfinedCreate,
    ];

    pub(crate) fn is_create(self) -> bool {
        matches!(self, Self::Create | Self::ConfinedCreate)
    }

    pub(crate) fn is_jailed(self) -> bool {
        matches!(self, Self::Jailed | Self::JailedWorkingSet)
    }

    pub(crate) fn is_served(self) -> bool {
        matches!(self, Self::Served | Self::WorkingSet | Self::JailedWorkingSet)
    }

    fn has_working_set(self) -> bool {
        matches!(self, Self::WorkingSet | Self::JailedWorkingSet)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Driver => "driver",
            Self::Jailed => "jailed",
            Self::Served => "served",
            Self::WorkingSet => "working-set",
            Self::JailedWorkingSet => "jailed-working-set",
            Self::Identified => "identified",
            Self::Create => "create",
            Self::ConfinedCreate => "confined-create",
        }
    }
}

/// One that went well.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) took: Duration,
    /// What the pager had done when the first byte came, if there is one.
    pub(crate) counts: Option<Counts>,
    /// Where the time went, in milliseconds; of a create by the agent's own measurement.
    pub(crate) phases: Vec<(String, f64)>,
}

/// What is found to be on this machine.
pub(crate) struct Ways<'a> {
    agent: &'a Agent,
    /// As in production, where there is a jailer.
    confined: Option<&'a Agent>,
    host: Arc<Host>,
    snapshot: WarmSnapshot,
    shape: Shape,
    slot: Slot,
    /// How many slots the agent keeps ready.
    ready_slots: usize,
    program: Utf8PathBuf,
    drivers: BTreeMap<Way, Firecracker>,
    /// Short paths, for sockets.
    machines: tempfile::TempDir,
    /// For disks.
    disks: tempfile::TempDir,
    number: u32,
}

/// A machine's directory and disk.
struct Ready {
    directory: Utf8PathBuf,
    /// The file of the disk, and what a machine is given.
    file: DiskSpec,
    open: DiskSpec,
}

impl<'a> Ways<'a> {
    /// Makes the snapshot of the template, if it is not there, and gets ready to restore it in every way that there is here.
    pub(crate) async fn new(
        agent: &'a Agent,
        confined: Option<&'a Agent>,
        directory: &Utf8Path,
        ready_slots: usize,
    ) -> Result<Self> {
        let host = Arc::clone(agent.registry().host());
        let shape = Shape { vcpus: Default::default(), memory: Default::default() };
        let template = host.images.resolve(&TEMPLATE.parse()?)?;
        let request = WarmRequest::for_disk(&template, shape, DiskMib::default(), host.default_disk)?;
        let snapshot = host.warm.get(&request).await.context("make the snapshot of the template")?;
        let slot = host.slots.take().await.context("take a network slot")?;
        let mut ways = Self {
            agent,
            confined,
            snapshot,
            shape,
            slot,
            ready_slots,
            program: Utf8PathBuf::new(),
            drivers: BTreeMap::new(),
            machines: tempfile::Builder::new().prefix("wrenn-bench-").tempdir_in("/run")?,
            disks: tempfile::tempdir_in(directory)?,
            host,
            number: 0,
        };
        for way in Way::ALL {
            if let Some(driver) = driver(way).await? {
                ways.program = driver.program().to_owned();
                ways.drivers.insert(way, driver);
            }
        }
        Ok(ways)
    }

    /// The VMM, as it describes itself.
    pub(crate) fn vmm(&self) -> &dyn Vmm {
        self.host.vmm.as_ref()
    }

    /// Where the snapshot is.
    pub(crate) fn directory(&self) -> &Utf8Path {
        &self.snapshot.dir
    }

    /// The ways that there are here: without a jailer, not those that need one.
    pub(crate) fn available(&self) -> Vec<Way> {
        let is_there = |way: &Way| match way {
            Way::Bare | Way::Create => true,
            Way::ConfinedCreate => self.confined.is_some(),
            _ => self.drivers.contains_key(way),
        };
        Way::ALL.into_iter().filter(is_there).collect()
    }

    /// Has the working set of each way recorded that has one of its own, by a restore until the end of a first command.
    pub(crate) async fn record_working_sets(&mut self) -> Result<()> {
        for way in self.available().into_iter().filter(|way| way.has_working_set()) {
            let ready = self.prepare(way).await?;
            let restored = self.restore(way, &ready, async |ways: &Self| {
                bare::command(&ways.slot.connector(), None, BOUND).await
            });
            let recorded = timeout(BOUND, restored).await.context("the guest does not answer");
            self.give_back(ready).await?;
            recorded?.context("record the working set")?;
        }
        if let Some(agent) = self.confined {
            // The first makes the snapshot, if there is none.
            let command = async |handle: &Handle| {
                let connector = handle.connector().context("it has a guest")?;
                bare::command(&connector, Some(&handle.spec().access_token), BOUND).await
            };
            self.create(agent, command).await.context("record the working set of creates")?;
        }
        Ok(())
    }

    /// Goes that way once. Nothing is left of it.
    pub(crate) async fn measure(&mut self, way: Way) -> Result<Measured> {
        let agent = match way {
            Way::Create => Some(self.agent),
            Way::ConfinedCreate => self.confined,
            _ => None,
        };
        if let Some(agent) = agent {
            let first_byte = async |handle: &Handle| {
                bare::first_byte(&handle.connector().context("it has a guest")?).await;
                Ok(())
            };
            return self.create(agent, first_byte).await;
        }
        let ready = self.prepare(way).await?;
        let measured = timeout(BOUND, async {
            match way {
                Way::Bare => self.bare(&ready).await,
                Way::Identified => {
                    let become_itself = async |ways: &Self| {
                        let connector = ways.slot.connector();
                        bare::identify(&connector, None, BOUND).await?;
                        bare::first_byte(&connector).await;
                        Ok(())
                    };
                    self.restore(way, &ready, become_itself).await
                }
                _ => {
                    let first_byte = async |ways: &Self| {
                        bare::first_byte(&ways.slot.connector()).await;
                        Ok(())
                    };
                    self.restore(way, &ready, first_byte).await
                }
            }
        });
        // A machine is dropped with the future, and so killed.
        let measured = measured.await.with_context(|| format!("no answer within {BOUND:?}"));
        self.give_back(ready).await?;
        measured?
    }

    async fn bare(&self, ready: &Ready) -> Result<Measured> {
        let plain = Plain {
            program: self.program.clone(),
            namespace: self.slot.netns_path().to_owned(),
            tap: self.slot.tap().to_owned(),
        };
        Plain::prepare(&ready.directory, &ready.open.path)?;
        let begin = Instant::now();
        let mut running = plain.restore(&ready.directory, &self.snapshot.files).await?;
        let restored = begin.elapsed();
        running.resume().await?;
        let resumed = begin.elapsed();
        bare::first_byte(&self.slot.connector()).await;
        let took = begin.elapsed();
        Ok(Measured { took, counts: None, phases: phases(restored, resumed, took) })
    }

    async fn restore(
        &self,
        way: Way,
        ready: &Ready,
        answers: impl AsyncFnOnce(&Self) -> Result<()>,
    ) -> Result<Measured> {
        let driver = self.drivers.get(&way).context("there is no such driver")?;
        let from = self.files(way)?;
        let spec = self.spec(way, ready)?;
        let begin = Instant::now();
        let mut vm = driver.restore(spec, &from).await?;
        let restored = begin.elapsed();
        let is_resumed = vm.resume().await;
        let resumed = begin.elapsed();
        let answered = match is_resumed {
            Ok(()) => answers(self).await,
            Err(error) => Err(error.into()),
        };
        let took = begin.elapsed();
        let counts = way.is_served().then(|| pager::counts(&ready.directory)).transpose();
        vm.stop().await.context("stop the machine")?;
        answered?;
        Ok(Measured { took, counts: counts?, phases: phases(restored, resumed, took) })
    }

    /// A working set is kept beside the state, so each way with a pager has a copy of that.
    fn files(&self, way: Way) -> Result<SnapshotFiles> {
        let mut files = self.snapshot.files.clone();
        if way.is_served() {
            let own = utf8(self.disks.path())?.join(way.word());
            if way == Way::Served && own.exists() {
                std::fs::remove_dir_all(&own).context("forget the working set")?;
            }
            let state = own.join("state");
            if !state.exists() {
                std::fs::create_dir_all(&own)?;
                std::fs::copy(&files.state, &state).context("copy the state of the devices")?;
            }
            files.state = state;
        }
        Ok(files)
    }

    fn spec(&self, way: Way, ready: &Ready) -> Result<MachineSpec> {
        Ok(MachineSpec {
            name: format!("wrenn-{}-bench-{}", self.host.instance, self.number),
            run_dir: ready.directory.clone(),
            shape: self.shape,
            guest: self.host.images.guest().bundle.clone(),
            disk: Some(ready.open.clone()),
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            network: Some(NetworkSpec {
                namespace: self.slot.netns_path().to_owned(),
                tap: self.slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![self.slot.lock().context("share the slot's lock")?],
            control_group: None,
            user: way.is_jailed().then(|| Users::From(UIDS.first).in_slot(self.slot.number())).flatten(),
        })
    }

    async fn prepare(&mut self, way: Way) -> Result<Ready> {
        self.settled().await?;
        self.number += 1;
        let name = format!("{}{}", way.word(), self.number);
        let directory = utf8(self.machines.path())?.join(&name);
        std::fs::create_dir(&directory).with_context(|| format!("make {directory}"))?;
        let (store, base) = (Arc::clone(&self.host.disks), self.snapshot.disk.clone());
        let (path, size) = (utf8(self.disks.path())?.join(&name), self.snapshot.manifest.subject.disk);
        let (file, open) = spawn_blocking(move || {
            let file = store.clone_disk(&base, &path, size)?;
            let open = store.open(&file)?;
            anyhow::Ok((file, open))
        })
        .await??;
        Ok(Ready { directory, file, open })
    }

    async fn give_back(&self, ready: Ready) -> Result<()> {
        let store = Arc::clone(&self.host.disks);
        spawn_blocking(move || {
            store.close(&ready.file.path)?;
            store.remove(&ready.file.path)?;
            std::fs::remove_dir_all(&ready.directory).context("remove the machine's directory")
        })
        .await?
    }

    /// Waits until the agents make and dismantle no network slots.
    async fn settled(&self) -> Result<()> {
        self.has_settled(&self.host, 1).await?;
        match self.confined {
            Some(agent) => self.has_settled(agent.registry().host(), 0).await,
            None => Ok(()),
        }
    }

    async fn has_settled(&self, host: &Host, used: usize) -> Result<()> {
        let end = Instant::now() + SLOTS_BOUND;
        loop {
            let counts = host.slots.counts().await.context("the network slots are gone")?;
            if counts.ready >= self.ready_slots && counts.used == used {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the network slots do not come to rest: {counts:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn create(
        &self,
        agent: &Agent,
        answers: impl AsyncFnOnce(&Handle) -> Result<()>,
    ) -> Result<Measured> {
        self.settled().await?;
        let spec = SandboxSpec {
            id: SandboxId::random(),
            generation: 1,
            template: TEMPLATE.parse()?,
            shape: self.shape,
            disk: DiskMib::default(),
            access_token: AccessToken::random(),
            environment: BTreeMap::new(),
            default_user: None,
            default_workdir: None,
            snapshot: None,
            settings: Settings {
                timeout: InactivityTimeout::default(),
                on_timeout: TimeoutAction::Pause,
                deadline: None,
                network: NetworkPolicy::simple(true),
            },
        };
        let (id, registry) = (spec.id.clone(), agent.registry());
        let begin = Instant::now();
        let handle = registry.create(spec)?;
        let answered = timeout(BOUND, async {
            let status = handle.settled().await;
            ensure!(status.stage == Stage::Running, "it did not come up: {:?}", status.end);
            answers(&handle).await?;
            Ok(status)
        });
        let answered = answered.await;
        let took = begin.elapsed();
        registry.destroy(&id, None).await.context("destroy it")?;
        let status = answered.with_context(|| format!("no answer within {BOUND:?}"))??;
        let phases = status.phases.iter();
        let phases =
            phases.map(|phase| (phase.name.to_owned(), phase.duration_micros as f64 / 1000.0)).collect();
        Ok(Measured { took, counts: None, phases })
    }

    /// Gives back what all restores had.
    pub(crate) async fn close(self) {
        self.host.slots.release(self.slot).await;
    }
}

/// Whether machines can be jailed here.
pub(crate) async fn has_jailer() -> Result<bool> {
    Ok(driver(Way::Jailed).await?.is_some())
}

/// The driver of a way; none where it has none, or where there is no jailer.
async fn driver(way: Way) -> Result<Option<Firecracker>> {
    if way == Way::Bare || way.is_create() {
        return Ok(None);
    }
    let mut options = FirecrackerOptions::from_environment();
    if way.is_served() {
        options.memory = MemoryBackend::Uffd(PagerProgram::this());
    }
    options.is_jailed = way.is_jailed();
    match Firecracker::detect(options).await {
        Err(VmmError::Unavailable { .. }) if way.is_jailed() => Ok(None),
        other => other.map(Some).context("find Firecracker"),
    }
}

/// The steps of a restore, from when each ended.
fn phases(restored: Duration, resumed: Duration, answered: Duration) -> Vec<(String, f64)> {
    let took = [restored, resumed.saturating_sub(restored), answered.saturating_sub(resumed)];
    let milliseconds = took.map(|took| took.as_secs_f64() * 1000.0);
    STEPS.map(str::to_owned).into_iter().zip(milliseconds).collect()
}

fn utf8(path: &std::path::Path) -> Result<&Utf8Path> {
    Utf8Path::from_path(path).with_context(|| format!("{} is not UTF-8", path.display()))
}
