//! A host without machines, guests and namespaces, but with everything else: records, snapshots, disks and the
//! drivers are the real ones, on a real directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio::{sync::Notify, time::Instant};
use wrenn_types::{
    AccessToken, DiskMib, InactivityTimeout, InstanceId, MemoryMib, NetworkPolicy, SandboxId, Shape,
    SnapshotId, TimeoutAction, Vcpus,
};
use wrenn_vmm::{DiskRate, ExitReason, Vmm, fake::Fake};

use super::guest::Guests;
use crate::{
    adopt, agent,
    images::Images,
    limits::Limits,
    metrics::{Metrics, operations::Operations},
    network::{Policy, SlotPool, addresses::SlotNumber, stand_in},
    registry::Registry,
    rootfs::{FileStore, Qcow2Store, RootfsStore},
    sandbox::{SandboxSpec, Settings, host::Host, record},
    snapshot_store::SnapshotStore,
    snapshots::Snapshots,
    users::Users,
    warm::{Parts, Warm},
};

/// The page in which a guest of these tests has its content.
pub(super) const CONTENT: u64 = 7;

/// When an agent is killed, and when its disk is full: both are counted in things that happen.
#[derive(Debug, Clone, Default)]
pub(super) struct Control {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// How many more things happen before the agent is no more; negative for as many as one likes.
    left: AtomicI64,
    counts: AtomicBool,
    is_killed: AtomicBool,
    /// Told after `is_killed` was set.
    killed: Notify,
    /// What went wrong, for whoever reads of a case that failed.
    said: Mutex<Vec<String>>,
    /// The same for steps of the store, of which the next one then fails.
    store_left: Mutex<Option<u32>>,
    /// Where a step of the store waits.
    gate: Mutex<Gate>,
    /// Told after every change of `gate`.
    gate_changed: Condvar,
    /// How many things happen until something stands where a record is to be written, and where.
    obstacle: Mutex<Option<(u32, Utf8PathBuf)>>,
}

/// A step of the store that waits, as for a disk that hangs.
#[derive(Debug, Default)]
struct Gate {
    /// How many steps go through before it; as many as one likes if none.
    left: Option<u32>,
    /// Whether one waits.
    holds: bool,
}

/// After so long a test that waits for what waits for it goes on, and fails.
const GATE_BOUND: Duration = Duration::from_secs(20);

impl Control {
    /// After so many steps of the store, one waits until it is let go.
    pub(super) fn hold_store_after(&self, steps: u32) {
        self.gate().left = Some(steps);
    }

    /// Whether a step of the store waits now.
    pub(super) fn holds_store(&self) -> bool {
        self.gate().holds
    }

    pub(super) fn let_store_go(&self) {
        *self.gate() = Gate::default();
        self.inner.gate_changed.notify_all();
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.inner.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_gate(&self) {
        let mut gate = self.gate();
        match gate.left {
            Some(0) => {
                *gate = Gate { left: None, holds: true };
                let wait = self.inner.gate_changed.wait_timeout_while(gate, GATE_BOUND, |gate| gate.holds);
                wait.unwrap_or_else(PoisonError::into_inner).0.holds = false;
            }
            Some(left) => gate.left = Some(left - 1),
            None => {}
        }
    }

    /// From the so manyth thing on, nothing happens any more.
    pub(super) fn kill_after(&self, things: u32) {
        self.inner.left.store(things.into(), Ordering::SeqCst);
        self.inner.counts.store(true, Ordering::SeqCst);
    }

    pub(super) fn calm(&self) {
        self.inner.counts.store(false, Ordering::SeqCst);
        self.inner.is_killed.store(false, Ordering::SeqCst);
        self.fill_disk_after(None);
        let obstacle = self.inner.obstacle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_, path)) = obstacle {
            let _ = fs::remove_dir(path);
        }
    }

    /// After so many steps of the store, one finds no room.
    pub(super) fn fill_disk_after(&self, steps: Option<u32>) {
        *self.inner.store_left.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }

    /// After so many things, something stands where a record is to be written.
    pub(super) fn obstruct_after(&self, things: u32, path: Utf8PathBuf) {
        *self.inner.obstacle.lock().unwrap_or_else(PoisonError::into_inner) = Some((things, path));
    }

    fn obstruct(&self) {
        let mut obstacle = self.inner.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        match obstacle.as_mut() {
            // A sandbox that is gone has no record that could be written.
            Some((0, path)) => drop(fs::create_dir(path)),
            Some((left, _)) => *left -= 1,
            None => {}
        }
    }

    /// Counts a thing that is about to happen; whether it is to.
    pub(super) fn goes_on(&self) -> bool {
        self.obstruct();
        if !self.inner.counts.load(Ordering::SeqCst) || self.inner.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return true;
        }
        self.inner.is_killed.store(true, Ordering::SeqCst);
        self.inner.killed.notify_one();
        false
    }

    /// Keeps what went wrong.
    pub(super) fn say(&self, what: String) {
        self.inner.said.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    pub(super) fn said(&self) -> Vec<String> {
        self.inner.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn killed(&self) {
        while !self.inner.is_killed.load(Ordering::SeqCst) {
            self.inner.killed.notified().await;
        }
    }

    fn store_step(&self) -> io::Result<()> {
        self.pass_gate();
        let mut left = self.inner.store_left.lock().unwrap_or_else(PoisonError::into_inner);
        match left.as_mut() {
            Some(0) => {
                *left = None;
                Err(io::ErrorKind::StorageFull.into())
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => {
                drop(left);
                // What is being written is written, and nothing after it.
                self.goes_on();
                Ok(())
            }
        }
    }
}

/// What all hosts of one test share: images, and the snapshot of the template once it was made.
pub(super) struct Ground {
    guard: tempfile::TempDir,
}

impl Ground {
    pub(super) fn new() -> Self {
        // In memory where that can be: every change of a record waits for the disk.
        let memory = Utf8Path::new("/dev/shm");
        let guard = if memory.exists() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let ground = Self { guard: guard.unwrap() };
        let template = r#"{"format":1,"name":"base","aliases":[],"default_user":"user","default_workdir":"/",
            "image":"image.ext4","image_id":"8899aabbccddeeff","minimum_disk_mib":1024}"#;
        for (path, content) in [
            ("guest/vmlinuz", "kernel"),
            ("guest/initramfs.img", "initramfs"),
            ("templates/base/template.json", template),
            ("templates/base/image.ext4", "image"),
        ] {
            let path = ground.path().join("images").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        ground.set_guest_bundle("0011223344556677");
        ground
    }

    fn images(&self) -> Utf8PathBuf {
        self.path().join("images")
    }

    /// The id of kernel and initramfs.
    pub(super) fn guest_bundle(&self) -> String {
        Images::load(&self.images()).unwrap().guest().bundle.id.clone()
    }

    /// The next agents have another kernel or initramfs.
    pub(super) fn set_guest_bundle(&self, id: &str) {
        let guest = format!(
            r#"{{"format":1,"id":"{id}","kernel_version":"6.1","envd_version":"0.1.0",
            "kernel":"vmlinuz","initramfs":"initramfs.img"}}"#
        );
        fs::write(self.images().join("guest/manifest.json"), guest).unwrap();
    }

    fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.guard.path()).unwrap()
    }
}

/// How the disks of a host are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disks {
    /// Each stands on others.
    Layered,
    /// Each is a copy.
    Plain,
}

/// A machine that was about to be made or to run, and what held at that moment.
#[derive(Debug, Clone)]
pub(super) struct Ran {
    pub(super) id: SandboxId,
    /// What its slot let it reach; none if this agent had put nothing in force there.
    pub(super) in_force: Option<Policy>,
    /// What its record said that it may reach; none if there was no record.
    pub(super) recorded: Option<NetworkPolicy>,
}

/// One host, which outlives its agents.
pub(super) struct World<'a> {
    ground: &'a Ground,
    guard: tempfile::TempDir,
    instance: InstanceId,
    disks: Disks,
    /// How far the clock of these tests has come: that of the next agent goes on from there.
    time: Mutex<Option<std::time::Instant>>,
    /// What the slots of the agent that there is now may reach.
    policies: Arc<Mutex<stand_in::Policies>>,
    /// The machines that were made or let run since somebody looked.
    ran: Arc<Mutex<Vec<Ran>>>,
    pub(super) fake: Fake,
    pub(super) guests: Guests,
    pub(super) numbers: stand_in::Numbers,
    pub(super) control: Control,
}

impl<'a> World<'a> {
    pub(super) fn new(ground: &'a Ground) -> Self {
        Self::with(ground, Disks::Layered)
    }

    pub(super) fn with(ground: &'a Ground, disks: Disks) -> Self {
        let guard = tempfile::tempdir_in(ground.path()).unwrap();
        let (fake, control) = (Fake::new(), Control::default());
        let guests = Guests::new(fake.clone(), control.clone());
        let at = Utf8Path::from_path(guard.path()).unwrap();
        for directory in ["sandboxes", "machines", "leases"] {
            fs::create_dir(at.join(directory)).unwrap();
        }
        let numbers = stand_in::Numbers::new(at.join("leases"));
        let observed = control.clone();
        fake.observe(move |_| observed.goes_on());
        let (instance, policies, ran) = (
            InstanceId::random(),
            Arc::<Mutex<stand_in::Policies>>::default(),
            Arc::<Mutex<Vec<_>>>::default(),
        );
        let (mark, sandboxes) = (Host::machine_mark(&instance), at.join("sandboxes"));
        let (known, seen) = (Arc::clone(&policies), Arc::clone(&ran));
        fake.watch(move |machine, namespace| {
            // Templates are no sandbox's.
            let Some((id, _)) = adopt::owner(&mark, machine) else { return };
            let known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let in_force = known.iter().find(|(number, _)| Some(&*number.namespace()) == namespace);
            let in_force = in_force.map(|(_, policy)| policy.clone());
            let recorded = record::read(&sandboxes, &id).map(|record| record.settings.network);
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(Ran { id, in_force, recorded });
        });
        Self {
            ground,
            guard,
            instance,
            disks,
            time: Mutex::default(),
            policies,
            ran,
            fake,
            guests,
            numbers,
            control,
        }
    }

    pub(super) fn at(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.guard.path()).unwrap().join(name)
    }

    /// Starts an agent: it takes over what the one before it left.
    pub(super) async fn agent(&self) -> Registry {
        let time = *self.time.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ahead) = time.and_then(|time| time.checked_duration_since(Instant::now().into_std())) {
            tokio::time::advance(ahead).await;
        }
        let snapshots = self.store();
        let stock = self.take_stock(&snapshots);
        let (sandboxes_dir, machines_dir) = (self.at("sandboxes"), self.at("machines"));
        let images = Images::load(&self.ground.images()).unwrap();
        let policy = Policy::resolve(&NetworkPolicy::simple(true), &[]).unwrap();
        let (guests, control) = (self.guests.clone(), self.control.clone());
        let guests = stand_in::Guests::new(move |number| guests.connect(number));
        *self.policies.lock().unwrap_or_else(PoisonError::into_inner) = guests.policies();
        let slots = SlotPool::stand_in(&self.instance, self.numbers.clone(), guests, policy, move || {
            control.goes_on()
        });
        let slots = slots.await.unwrap();
        let disks: Arc<dyn RootfsStore> = match self.disks {
            Disks::Layered => Arc::new(Qcow2Store),
            Disks::Plain => Arc::new(FileStore),
        };
        let vmm: Arc<dyn Vmm> = Arc::new(self.fake.clone());
        let store = SnapshotStore::new(&self.ground.path().join("warm"), &self.ground.path().join("run"));
        let warm = Warm::new(Parts {
            instance: self.instance.clone(),
            vmm: Arc::clone(&vmm),
            guest: images.guest().bundle.clone(),
            disks: Arc::clone(&disks),
            slots: slots.clone(),
            store: store.unwrap(),
            machines_dir: machines_dir.clone(),
            users: Users::TheAgents,
        });
        let host = Arc::new(Host {
            instance: self.instance.clone(),
            vmm,
            images,
            disks,
            slots,
            warm,
            snapshots,
            sandboxes_dir,
            machines_dir,
            dns_servers: Vec::new(),
            default_disk: DiskMib::new(1024).unwrap(),
            now: wall,
            unreachable: Arc::default(),
            operations: Operations::default(),
            metrics: Metrics::default(),
            limits: Limits::without_groups("machines are played".to_owned(), DiskRate::default()),
            users: Users::TheAgents,
            scrub: Arc::default(),
        });
        let registry = Registry::new(Arc::clone(&host));
        adopt::take_over(&host, &registry, stock).await.unwrap();
        registry
    }

    /// The clock of the next agent goes on from here.
    pub(super) fn keep_time(&self) {
        *self.time.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now().into_std());
    }

    /// What the machine in a slot may reach.
    pub(super) fn in_force(&self, number: SlotNumber) -> Option<Policy> {
        let policies = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
        policies.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// The machines that were made or let run since this was asked.
    pub(super) fn take_ran(&self) -> Vec<Ran> {
        std::mem::take(&mut *self.ran.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is left of earlier agents goes, but for sandboxes.
    pub(super) fn collect(&self) {
        self.take_stock(&self.store());
    }

    fn take_stock(&self, snapshots: &Snapshots) -> adopt::Stock {
        let sandboxes_dir = self.at("sandboxes");
        let mut stock = adopt::examine(&self.instance, snapshots, &sandboxes_dir).unwrap();
        let mark = Host::machine_mark(&self.instance);
        for machine in self.fake.machines() {
            if !stock.keeps(&mark, &machine) {
                self.fake.end(&machine, ExitReason::VmmKilled { signal: 9 });
            }
        }
        // A slot is taken for as long as its machine lives.
        let alive = self.fake.machines();
        let left = record::left_behind(&sandboxes_dir).unwrap();
        let held = left.iter().filter_map(|left| {
            let record = left.record.as_ref().ok()?.as_ref()?;
            let machine = record.machine.as_ref()?;
            let name = Host::machine_name(&self.instance, &record.id, &machine.name);
            SlotNumber::new(machine.slot).ok().filter(|_| alive.contains(&name))
        });
        self.numbers.keep(&held.collect::<BTreeSet<_>>());
        stock.clear(&self.at("machines")).unwrap();
        stock
    }

    fn store(&self) -> Snapshots {
        let control = self.control.clone();
        Snapshots::open_watched(&self.at("agent"), move || control.store_step()).unwrap()
    }

    /// From now on nothing goes wrong.
    pub(super) fn calm(&self) {
        self.fake.calm();
        self.guests.calm();
        self.numbers.refuse(false);
        self.control.calm();
    }

    /// The machines of a sandbox.
    pub(super) fn machines(&self, id: &SandboxId) -> Vec<String> {
        let prefix = format!("{}{id}-", Host::machine_mark(&self.instance));
        self.fake.machines().into_iter().filter(|name| name.starts_with(&prefix)).collect()
    }

    /// What is on disk, and should not be when there is no sandbox and no snapshot.
    pub(super) fn remains(&self) -> BTreeMap<&'static str, Vec<String>> {
        let store = self.store();
        let sandboxes = self.at("sandboxes");
        store.collect(|| agent::roots(&sandboxes), Duration::ZERO).unwrap();
        let names = |path: Utf8PathBuf| {
            path.read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned()).collect()
        };
        let directories = ["sandboxes", "machines", "agent/snapshots", "agent/disks", "agent/bases"];
        let mut remains: BTreeMap<_, Vec<_>> =
            directories.into_iter().map(|name| (name, names(self.at(name)))).collect();
        remains.insert("processes", self.fake.machines());
        remains.insert("slots", self.numbers.given().iter().map(ToString::to_string).collect());
        remains.retain(|_, names| !names.is_empty());
        remains
    }
}

/// A wall clock that goes on with the clock of these tests.
pub(super) fn wall() -> Timestamp {
    static BEGIN: LazyLock<(Timestamp, std::time::Instant)> =
        LazyLock::new(|| (Timestamp::now(), std::time::Instant::now()));
    let (then, begin) = *BEGIN;
    then + Instant::now().into_std().saturating_duration_since(begin)
}

pub(super) fn spec(id: SandboxId, snapshot: Option<SnapshotId>) -> SandboxSpec {
    SandboxSpec {
        id,
        generation: 1,
        template: "base".parse().unwrap(),
        shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::new(128).unwrap() },
        disk: DiskMib::new(1024).unwrap(),
        access_token: AccessToken::random(),
        environment: BTreeMap::new(),
        default_user: None,
        default_workdir: None,
        snapshot,
        settings: Settings {
            timeout: InactivityTimeout::new(0).unwrap(),
            on_timeout: TimeoutAction::Pause,
            deadline: None,
            // Another one than that with which slots are prepared, so that it shows when nobody puts it in force.
            network: NetworkPolicy {
                deny_cidrs: vec!["198.51.100.0/24".parse().unwrap()],
                ..NetworkPolicy::simple(true)
            },
        },
    }
}
