//! A real guest, saved and restored by the agent's own parts: what must stand still does, and what must differ differs.
//!
//! ```text
//!  boot ─► /init ─► a program that writes to the console, for ever ─► /snapshot/prepare ─► save
//!                                                                             (control: without)
//!    ├─► restore ─► asked and asked again, a refused /init: the console stays silent ─► /init: the program goes on
//!    └─► restore ─► the same; and what the two know by chance is not the same
//! ```
//!
//! The console is the witness: it is a device of each machine, empty when it is restored, and the program in
//! the guest needs nobody's permission to write to it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

#[path = "guest/foreign.rs"]
mod foreign;

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use camino::Utf8PathBuf;
use libtest_mimic::{Arguments, Trial};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wrenn_host_agent::{
    guest::{self, ENVD_PORT, Identity, loopback},
    images::Images,
    network::{GuestConnector, Policy, PoolConfig, Slot, SlotPool, Uplink},
    rootfs::{FileStore, Qcow2Store, RootfsStore},
};
use wrenn_testkit::{stack, uplink};
use wrenn_types::{DiskMib, InstanceId, MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    BootMemory, DiskRate, DiskSpec, MachineSpec, NetworkSpec, SnapshotFiles, Vm, Vmm,
    firecracker::{Firecracker, FirecrackerOptions},
    qemu::{Qemu, QemuOptions},
};

const BOUND: Duration = Duration::from_secs(120);
const TICK: &str = "tick";
/// Writes to the console until the machine ends, and is nobody's child.
const TICKER: &str = "(while :; do echo tick > /dev/console; sleep 0.02; done) </dev/null >/dev/null 2>&1 &";
/// How often a restored guest is asked something while it must stand still: each answer proves that it runs.
const QUESTIONS: usize = 20;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let skip = stack::cannot_run();
    if let Some(reason) = &skip {
        println!("{reason}");
    }
    let trial = |name: &str, run: fn() -> Result<()>| {
        Trial::test(name, move || run().map_err(|error| format!("{error:?}").into()))
            .with_ignored_flag(skip.is_some())
    };
    let mut trials = vec![
        trial("guest::no_process_runs_between_restore_and_identity", || with_lab(standstill)),
        trial("guest::what_is_prepared_is_written_and_what_is_free_is_trimmed", || {
            with_lab(written_and_trimmed)
        }),
        trial("guest::a_port_on_loopback_is_reached", || with_lab(loopback_port)),
        trial("guest::a_killed_agent_is_followed_by_one_that_knows_who_it_is", || with_lab(killed_agent)),
    ];
    let without = foreign::cannot_run();
    if let Some(reason) = &without {
        println!("skipped: {reason}");
    }
    let foreign = vec![
        trial("guest::a_root_of_somebody_else_is_served", || with_lab(foreign::root_of_somebody_else)),
        trial("guest::a_root_with_nothing_but_a_program_is_served", || with_lab(foreign::root_with_nothing)),
    ];
    let firecracker = || with_lab_of(Monitor::Firecracker, standstill);
    let firecracker = trial("firecracker::no_process_runs_between_restore_and_identity", firecracker);
    trials.push(firecracker.with_ignored_flag(stack::cannot_run_firecracker().is_some()));
    let ignored = skip.is_some() || without.is_some();
    trials.extend(foreign.into_iter().map(|trial| trial.with_ignored_flag(ignored)));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn with_lab<F: Future<Output = Result<()>>>(run: fn(Arc<Lab>) -> F) -> Result<()> {
    with_lab_of(Monitor::Qemu, run)
}

fn with_lab_of<F: Future<Output = Result<()>>>(monitor: Monitor, run: fn(Arc<Lab>) -> F) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let outside = uplink::Uplink::create().await?;
        let lab = Arc::new(Lab::new(monitor, outside.name()).await?);
        let outcome = tokio::time::timeout(3 * BOUND, run(Arc::clone(&lab))).await.context("in time");
        Arc::into_inner(lab).context("the case is over")?.slots.shutdown().await;
        outside.remove().await?;
        outcome?
    })
}

/// What runs the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Qemu,
    Firecracker,
}

impl Monitor {
    /// Where files and sockets are. Disks that are copies need more room than memory has.
    fn place(self) -> &'static str {
        match self {
            Self::Qemu => "/run",
            Self::Firecracker => "/tmp",
        }
    }

    /// By how much the clock of a guest may differ: one that is translated twice is asked late.
    fn clock_allowance(self) -> Duration {
        match self {
            Self::Qemu => Duration::from_millis(50),
            Self::Firecracker => Duration::from_secs(1),
        }
    }
}

/// What machines are made of here.
struct Lab {
    monitor: Monitor,
    vmm: Box<dyn Vmm>,
    disks: Box<dyn RootfsStore>,
    images: Images,
    slots: SlotPool,
    instance: InstanceId,
    directory: tempfile::TempDir,
}

/// A machine that runs.
struct Machine {
    vm: Box<dyn Vm>,
    slot: Slot,
    connector: GuestConnector,
    disk: DiskSpec,
}

impl Lab {
    async fn new(monitor: Monitor, outside: &str) -> Result<Self> {
        let directory = Utf8PathBuf::from_path_buf(stack::images()?).unwrap();
        let images = Images::load(&directory)?;
        let (vmm, disks, images): (Box<dyn Vmm>, Box<dyn RootfsStore>, Images) = match monitor {
            Monitor::Qemu => {
                let qemu = Qemu::detect(QemuOptions::from_environment()?).await?;
                (Box::new(qemu), Box::new(Qcow2Store), images)
            }
            Monitor::Firecracker => {
                let firecracker = Firecracker::detect(FirecrackerOptions::from_environment()).await?;
                (Box::new(firecracker), Box::new(FileStore), images.with_uncompressed_kernel()?)
            }
        };
        let instance = InstanceId::random();
        let policy = Policy::offline();
        let uplink = Uplink::Named(outside.parse()?);
        Ok(Self {
            monitor,
            vmm,
            disks,
            images,
            slots: SlotPool::start(PoolConfig { instance: instance.clone(), uplink, ready: 2, policy })
                .await?,
            instance,
            directory: tempfile::Builder::new().prefix("wrenn-guest-").tempdir_in(monitor.place())?,
        })
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.directory.path().join(name)).unwrap()
    }

    /// Where the memory of a booted machine is, and its devices once it is saved.
    fn files(&self, name: &str) -> SnapshotFiles {
        SnapshotFiles {
            memory: self.path(&format!("{name}-memory")),
            state: self.path(&format!("{name}-state")),
            pages: None,
        }
    }

    /// Starts a machine on a clone of `base`: anew, or from what was saved of another one.
    async fn start(&self, name: &str, base: &DiskSpec, saved: Option<&str>) -> Result<Machine> {
        let slot = self.slots.take().await?;
        let run_dir = self.path(name);
        std::fs::create_dir(&run_dir)?;
        let size = DiskMib::new(2048)?;
        let disk = self.disks.clone_disk(base, &run_dir.join("disk"), size)?;
        let spec = MachineSpec {
            name: format!("wrenn-{}-{name}", self.instance),
            run_dir,
            shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() },
            guest: self.images.guest().bundle.clone(),
            disk: Some(disk.clone()),
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            network: Some(NetworkSpec {
                namespace: slot.netns_path().to_owned(),
                tap: slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![slot.lock()?],
            control_group: None,
            user: None,
        };
        let vm = if let Some(saved) = saved {
            let mut vm = self.vmm.restore(spec, &self.files(saved)).await?;
            vm.resume().await?;
            vm
        } else {
            self.vmm.boot(spec, BootMemory::Shared(&self.files(name).memory)).await?
        };
        let connector = slot.connector();
        let machine = Machine { vm, slot, connector, disk };
        guest::wait_until_healthy(&machine.connector, BOUND).await?;
        Ok(machine)
    }

    async fn boot(&self, name: &str) -> Result<Machine> {
        let template = self.images.resolve(&"base".parse()?)?;
        let machine = self.start(name, &template.template.disk(), None).await?;
        initialise(&machine.connector, name).await?;
        Ok(machine)
    }

    async fn stop(&self, mut machine: Machine) -> Result<()> {
        machine.vm.stop().await?;
        self.slots.release(machine.slot).await;
        Ok(())
    }

    /// Saves a machine that ticks; what is answered is the frozen disk.
    async fn save(&self, mut machine: Machine, name: &str) -> Result<DiskSpec> {
        machine.vm.pause().await?;
        machine.vm.snapshot(&self.files(name)).await?;
        let disk = machine.disk.clone();
        self.stop(machine).await?;
        let frozen = self.path(&format!("{name}-frozen"));
        self.disks.freeze(&disk, &frozen)?;
        Ok(DiskSpec { path: frozen, format: disk.format })
    }
}

/// Who a guest is told that it is, and as whom programs run in it.
struct Who<'a> {
    name: &'a str,
    user: &'a str,
    directory: &'a str,
}

impl<'a> Who<'a> {
    /// On the template, which has a user.
    fn named(name: &'a str) -> Self {
        Self { name, user: "user", directory: "/home/user" }
    }
}

async fn initialise(connector: &GuestConnector, name: &str) -> Result<()> {
    let entropy = Identity::fresh_entropy();
    become_itself(connector, &Who::named(name), entropy).await
}

async fn become_itself(connector: &GuestConnector, who: &Who<'_>, entropy: String) -> Result<()> {
    let identity = Identity {
        hostname: Some(who.name),
        restored: true,
        entropy,
        machine_id: Some(Identity::fresh_machine_id()),
        access_token: None,
        env_vars: BTreeMap::new(),
        default_user: who.user,
        default_workdir: who.directory,
        dns_servers: &[],
        disk_bytes: None,
    };
    guest::initialise(connector, &identity, None, BOUND).await.map(drop).map_err(Into::into)
}

async fn run(machine: &Machine, line: &str) -> Result<(), guest::GuestError> {
    guest::exercise(&machine.connector, "root", &["/bin/sh", "-c", line], BOUND).await
}

/// Waits until the console says something more than it did.
async fn said(machine: &mut Machine, what: &str) -> Result<()> {
    let end = Instant::now() + BOUND;
    while !machine.vm.console().await.contains(what) {
        ensure!(Instant::now() < end, "the console never said {what}: {}", machine.vm.console().await);
        // Every round trip gives the guest time to run; the console has no event to wait for.
        guest::wait_until_healthy(&machine.connector, BOUND).await?;
    }
    Ok(())
}

async fn standstill(lab: Arc<Lab>) -> Result<()> {
    // The control: saved while it runs, the program goes on in the clone before anybody has said who it is.
    let mut machine = lab.boot("control").await?;
    run(&machine, TICKER).await?;
    said(&mut machine, TICK).await?;
    let disk = lab.save(machine, "control").await?;
    let mut clone = lab.start("control-clone", &disk, Some("control")).await?;
    said(&mut clone, TICK).await.context("the control")?;
    lab.stop(clone).await?;

    let mut machine = lab.boot("template").await?;
    run(&machine, TICKER).await?;
    said(&mut machine, TICK).await?;
    guest::prepare(&machine.connector, None, BOUND).await?;
    let disk = lab.save(machine, "template").await?;
    let mut known = Vec::new();
    for name in ["one", "two"] {
        let mut clone = lab.start(name, &disk, Some("template")).await?;
        for _ in 0..QUESTIONS {
            guest::wait_until_healthy(&clone.connector, BOUND).await?;
        }
        // One that is not given enough to be reseeded with stays closed.
        let refused = become_itself(&clone.connector, &Who::named(name), "c2hvcnQ=".to_owned()).await;
        ensure!(refused.is_err(), "an /init with too little entropy");
        ensure!(run(&clone, "true").await.is_err(), "a guest that is not itself runs a program");
        let console = clone.vm.console().await;
        ensure!(!console.contains(TICK), "a process ran before the guest was itself: {console}");

        initialise(&clone.connector, name).await?;
        // The first program of all: what the clock says to it is the host's time, give or take what it took to ask.
        let before = jiff::Timestamp::now();
        run(&clone, "echo clock: $(date +%s%N) :read > /dev/console").await?;
        let after = jiff::Timestamp::now();
        said(&mut clone, ":read").await?;
        let console = clone.vm.console().await;
        let told = console.lines().find_map(|line| line.split_once("clock: ")).context("the clock")?.1;
        let told: i128 = told.split_whitespace().next().context("a number")?.parse()?;
        let allowed = i128::try_from(lab.monitor.clock_allowance().as_nanos())?;
        let (from, to) = (before.as_nanosecond() - allowed, after.as_nanosecond() + allowed);
        ensure!((from..=to).contains(&told), "the clock of the guest says {told}, between {from} and {to}");
        said(&mut clone, TICK).await.context("after /init")?;
        // A word for each thing that must not be the same in another clone.
        let question = "echo known: \
            urandom=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') \
            uuid=$(cat /proc/sys/kernel/random/uuid) \
            machine-id=$(cat /etc/machine-id) \
            boot-id=$(cat /proc/sys/kernel/random/boot_id) \
            openssl=$(openssl rand -hex 8 || echo missing) \
            $(python3 -c 'import os, random, secrets, ssl, uuid; print(\"random=%s secrets=%s os=%s ssl=%s uuid4=%s hash=%s\" % (random.random(), secrets.token_hex(8), os.urandom(8).hex(), ssl.RAND_bytes(8).hex(), uuid.uuid4(), hash(\"x\")))') \
            :end > /dev/console";
        run(&clone, question).await?;
        said(&mut clone, ":end").await?;
        let console = clone.vm.console().await;
        let line = console.lines().find(|line| line.contains("known:")).context("what it knows")?.to_owned();
        known.push(line);
        lab.stop(clone).await?;
    }
    let words = |line: &str| -> BTreeMap<String, String> {
        let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    let (one, two) = (words(&known[0]), words(&known[1]));
    ensure!(one.len() == 11 && one.keys().eq(two.keys()), "{one:?} {two:?}");
    for (name, value) in &one {
        ensure!(!value.is_empty(), "{name} is empty");
        // A template without the program has nothing to tell; the library is asked through Python as well.
        if !(name == "openssl" && value == "missing") {
            ensure!(two[name] != *value, "both clones know {name}={value}");
        }
    }
    Ok(())
}

async fn written_and_trimmed(lab: Arc<Lab>) -> Result<()> {
    const SIZE: u64 = 64 << 20;
    let machine = lab.boot("blocks").await?;
    let allocated = || std::fs::metadata(&machine.disk.path).map(|disk| disk.blocks() * 512);
    guest::prepare(&machine.connector, None, BOUND).await?;
    let before = allocated()?;
    initialise(&machine.connector, "blocks").await?;
    // Left where writing leaves it, which is in memory.
    run(&machine, "head -c 67108864 /dev/urandom > /var/tmp/large").await?;
    guest::prepare(&machine.connector, None, BOUND).await?;
    let with = allocated()?;
    ensure!(with >= before + SIZE, "{before} bytes, and {with} with a file of {SIZE} that was to be written");
    initialise(&machine.connector, "blocks").await?;
    run(&machine, "rm /var/tmp/large").await?;
    guest::prepare(&machine.connector, None, BOUND).await?;
    let without = allocated()?;
    ensure!(without < with - SIZE / 8 * 7, "{with} bytes, and {without} without a file of {SIZE}");
    lab.stop(machine).await
}

async fn loopback_port(lab: Arc<Lab>) -> Result<()> {
    let machine = lab.boot("ports").await?;
    for (address, port) in [("127.0.0.1", 8101), ("::1", 8102), ("0.0.0.0", 8103)] {
        let server = format!("python3 -m http.server {port} --bind {address} </dev/null >/dev/null 2>&1 &");
        run(&machine, &server).await?;
        let url = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let up = format!("until curl -s -o /dev/null http://{url}:{port}/; do sleep 0.05; done");
        run(&machine, &up).await?;
        let mut stream = loopback::connect(&machine.connector, port).await?;
        stream.stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
        let mut answer = stream.first.to_vec();
        stream.stream.read_to_end(&mut answer).await?;
        ensure!(answer.starts_with(b"HTTP/1.0 200 OK"), "{}", String::from_utf8_lossy(&answer));
    }
    let direct = machine.connector.connect(8101).await;
    ensure!(direct.is_err(), "the port is on loopback alone");
    let error = loopback::connect(&machine.connector, 8104).await.unwrap_err();
    ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{error}");
    ensure!(loopback::connect(&machine.connector, ENVD_PORT).await.is_ok(), "the agent itself");
    lab.stop(machine).await
}

async fn killed_agent(lab: Arc<Lab>) -> Result<()> {
    let mut machine = lab.boot("killed").await?;
    // The answer to this is the end of the connection.
    ensure!(run(&machine, "pkill -KILL -x envd").await.is_err(), "the agent outlived its end");
    said(&mut machine, "the agent was ended by signal 9").await?;
    guest::wait_until_healthy(&machine.connector, BOUND).await?;
    run(&machine, "true").await.context("without another /init")?;
    lab.stop(machine).await
}
