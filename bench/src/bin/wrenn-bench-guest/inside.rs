//! The agent in a microVM, from the host's side: the machine is made of the parts that the host agent makes it of,
//! and there is no API between.
//!
//! A raw TCP copy is what the same virtio-net can do at that moment: a program in the guest takes or gives bytes,
//! and does nothing with them. Another writes them to a file, or reads them from one: what is left of the difference
//! is the agent's. Both take turns with the files that go through the agent.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use camino::Utf8PathBuf;
use tokio::runtime::Handle;
use wrenn_bench::{program::unless_interrupted, statistics::Samples};
use wrenn_host_agent::{
    guest::{self, ENVD_PORT, Identity},
    images::Images,
    network::{GuestConnector, Policy, PoolConfig, Slot, SlotPool, Uplink},
    rootfs::{Qcow2Store, RootfsStore as _},
};
use wrenn_testkit::{stack, uplink};
use wrenn_types::{DiskMib, InstanceId, MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    BootMemory, DiskRate, MachineSpec, NetworkSpec, Vm, Vmm as _, VmmIdentity,
    qemu::{Qemu, QemuOptions},
};

use crate::{
    report::{Inside, Measure, Other, Series},
    wire::Connection,
    workload::{self, Content, Encoding, Program},
};

const BOUND: Duration = Duration::from_secs(120);
/// Where the raw copy listens in the guest.
const RAW_PORT: u16 = 8200;
/// How many connections bring small files at once.
const WIDTH: usize = 4;
/// How many small files are in one request.
const TOGETHER: usize = 100;
/// How many are sent before it is looked at the clock.
const TURN: usize = 2000;

/// What is measured.
#[derive(Debug, clap::Args)]
#[group(id = "inside")]
pub(crate) struct Options {
    /// How many programs run in the guest.
    #[arg(long, default_value_t = 500)]
    guest_programs: usize,
    /// How many times everything larger is done in the guest.
    #[arg(long, default_value_t = 5)]
    guest_rounds: usize,
    /// Size of a file, and of what a process writes, in MiB.
    #[arg(long, default_value_t = 64)]
    guest_file_mib: u64,
    /// How many small files.
    #[arg(long, default_value_t = 35_000)]
    small_files: usize,
    /// For how many seconds they are sent; then it is enough.
    #[arg(long, default_value_t = 180)]
    small_files_seconds: u64,
}

/// A machine that runs, and what it is made of.
struct Machine {
    vm: Box<dyn Vm>,
    slot: Slot,
    _directory: tempfile::TempDir,
}

impl Machine {
    async fn boot(vmm: &Qemu, slots: &SlotPool, instance: &InstanceId) -> Result<Self> {
        let images = Utf8PathBuf::from_path_buf(stack::images()?)
            .map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))?;
        let images = Images::load(&images)?;
        let slot = slots.take().await?;
        let directory = tempfile::Builder::new().prefix("wrenn-bench-").tempdir_in("/run")?;
        let path = |name: &str| Utf8PathBuf::from_path_buf(directory.path().join(name));
        let (run_dir, memory) = match (path("vm"), path("memory")) {
            (Ok(run_dir), Ok(memory)) => (run_dir, memory),
            _ => bail!("{} is not UTF-8", directory.path().display()),
        };
        std::fs::create_dir(&run_dir)?;
        let base = images.resolve(&"base".parse()?)?.template.disk();
        let disk = Qcow2Store.clone_disk(&base, &run_dir.join("disk"), DiskMib::new(4096)?)?;
        let spec = MachineSpec {
            name: format!("wrenn-{instance}-bench"),
            run_dir,
            shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() },
            guest: images.guest().bundle.clone(),
            disk: Some(disk),
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            user: None,
            network: Some(NetworkSpec {
                namespace: slot.netns_path().to_owned(),
                tap: slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![slot.lock()?],
            control_group: None,
        };
        let vm = vmm.boot(spec, BootMemory::Shared(&memory)).await.context("boot")?;
        let machine = Self { vm, slot, _directory: directory };
        if let Err(error) = become_itself(&machine.slot.connector()).await {
            machine.stop(slots).await?;
            return Err(error);
        }
        Ok(machine)
    }

    async fn stop(mut self, slots: &SlotPool) -> Result<()> {
        let stopped = self.vm.stop().await.context("stop the machine");
        slots.release(self.slot).await;
        stopped.map(drop)
    }
}

async fn become_itself(connector: &GuestConnector) -> Result<()> {
    guest::wait_until_healthy(connector, BOUND).await?;
    let identity = Identity {
        hostname: Some("bench"),
        restored: false,
        entropy: Identity::fresh_entropy(),
        machine_id: Some(Identity::fresh_machine_id()),
        access_token: None,
        env_vars: BTreeMap::new(),
        default_user: "user",
        default_workdir: "/home/user",
        dns_servers: &[],
        disk_bytes: None,
    };
    guest::initialise(connector, &identity, None, BOUND).await.context("POST /init")?;
    Ok(())
}

/// The driver that boots guests here.
///
/// # Errors
/// There is no QEMU.
pub(crate) async fn driver() -> Result<Qemu> {
    Qemu::detect(QemuOptions::from_environment()?).await.context("find QEMU")
}

/// What a reader has to know of the driver: its name, and what runs the guest's instructions.
#[must_use]
pub(crate) fn describe(identity: &VmmIdentity) -> (String, String) {
    let VmmIdentity { name, version, machine, accelerator, .. } = identity;
    (format!("{name} {version}, {machine}"), format!("{accelerator:?}").to_lowercase())
}

/// Boots a machine, measures, and stops it. What was made for it is given back, also where that fails or is interrupted.
///
/// # Errors
/// There can be no machine, or it ends. What the agent does wrong is a sample that failed.
pub(crate) async fn measure(vmm: &Qemu, options: Options) -> Result<Inside> {
    let outside = uplink::Uplink::create().await?;
    let instance = InstanceId::random();
    let (uplink, policy) = (Uplink::Named(outside.name().parse()?), Policy::offline());
    let config = PoolConfig { instance: instance.clone(), uplink, ready: 1, policy };
    let slots = SlotPool::start(config).await.context("make a network slot")?;
    let measured = measure_in(vmm, &slots, &instance, options).await;
    slots.shutdown().await;
    outside.remove().await?;
    measured
}

async fn measure_in(vmm: &Qemu, slots: &SlotPool, instance: &InstanceId, options: Options) -> Result<Inside> {
    eprintln!("in a machine: boot");
    let machine = unless_interrupted(Box::pin(Machine::boot(vmm, slots, instance))).await?;
    let guest = Guest { connector: machine.slot.connector(), handle: Handle::current() };
    let measuring = tokio::task::spawn_blocking(move || guest.measure(&options));
    let measured = unless_interrupted(async { measuring.await.context("measure").flatten() }).await;
    let stopped = machine.stop(slots).await;
    let measured = measured?;
    stopped.map(|()| measured)
}

/// The way to a guest.
#[derive(Clone)]
struct Guest {
    connector: GuestConnector,
    handle: Handle,
}

impl Guest {
    fn stream(&self, port: u16) -> Result<TcpStream> {
        let stream = self.handle.block_on(self.connector.connect(port))?.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(BOUND))?;
        stream.set_write_timeout(Some(BOUND))?;
        Ok(stream)
    }

    fn connection(&self) -> Result<Connection> {
        Connection::new(self.stream(ENVD_PORT)?)
    }

    fn measure(&self, options: &Options) -> Result<Inside> {
        let say = |what: &str| eprintln!("in a machine: {what}");
        let bytes = options.guest_file_mib << 20;
        say("programs");
        let mut series = vec![self.programs(options.guest_programs)?];
        say("output");
        series.push(self.output(options.guest_rounds, options.guest_file_mib)?);
        say("files");
        series.extend(self.files(options.guest_rounds, bytes)?);
        say("small files");
        let (small, small_files) = self.small_files(options)?;
        series.extend(small);
        Ok(Inside { series, small_files })
    }

    fn programs(&self, count: usize) -> Result<Series> {
        let mut series = Series::alone("exec of `/bin/true`", Measure::Time);
        let mut connection = self.connection()?;
        let program = Program::new("/bin/true", &[]);
        for _ in 0..count {
            self.attempt(&mut connection, &mut series.ours, |it| Ok(program.run(it)?.0))?;
        }
        Ok(series)
    }

    fn output(&self, rounds: usize, mib: u64) -> Result<Series> {
        let mut series = Series::alone(format!("stdout of a process, {mib} MiB"), Measure::Bytes(mib << 20));
        let mut connection = self.connection()?;
        for _ in 0..rounds {
            self.attempt(&mut connection, &mut series.ours, |it| workload::output(it, mib << 20))?;
        }
        Ok(series)
    }

    fn attempt(
        &self,
        connection: &mut Connection,
        samples: &mut Samples,
        work: impl FnOnce(&mut Connection) -> Result<Duration>,
    ) -> Result<()> {
        let outcome = work(connection);
        let failed = outcome.is_err();
        samples.add(outcome.map_err(|error| format!("{error:#}")));
        if failed {
            *connection = self.connection()?;
        }
        Ok(())
    }

    /// Up and down, into memory and onto the disk, each beside a raw copy.
    fn files(&self, rounds: usize, bytes: u64) -> Result<Vec<Series>> {
        self.start_raw_copy(bytes)?;
        let content = Content::new();
        let mut connection = self.connection()?;
        let mut all = Vec::new();
        for (directory, place) in [("/dev/shm", "in memory"), ("/var/tmp", "on disk")] {
            let path = format!("{directory}/bench");
            // Nothing, and a file beside ours.
            let places = ["", &format!("{path}.raw")];
            let series = |direction: &str| {
                let what = format!("file of {} MiB {direction}, {place}", bytes >> 20);
                Series::beside(&["raw TCP", "raw TCP and a file"], what, Measure::Bytes(bytes))
            };
            let (mut up, mut down) = (series("up"), series("down"));
            for _ in 0..rounds {
                for (other, place) in up.others.iter_mut().zip(places) {
                    add(other, self.raw_up(place, &content, bytes));
                }
                self.attempt(&mut connection, &mut up.ours, |it| {
                    workload::upload(it, &path, &content, bytes)
                })?;
                for (other, place) in down.others.iter_mut().zip(places) {
                    add(other, self.raw_down(place, bytes));
                }
                self.attempt(&mut connection, &mut down.ours, |it| {
                    workload::download(it, &path, &content, bytes, Encoding::Identity)
                })?;
            }
            self.run(&format!("rm -f {path} {path}.raw"))?;
            all.extend([up, down]);
        }
        Ok(all)
    }

    fn start_raw_copy(&self, bytes: u64) -> Result<()> {
        let server = RAW_COPY.replace("PORT", &RAW_PORT.to_string()).replace("BYTES", &bytes.to_string());
        self.run(&format!("python3 -c '{server}' </dev/null >/dev/null 2>&1 &"))?;
        let end = Instant::now() + BOUND;
        loop {
            match self.stream(RAW_PORT) {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(Instant::now() < end, "the raw copy does not listen: {error:#}"),
            }
            // Refused: nothing listens yet, and nothing tells when it does.
            self.handle.block_on(tokio::time::sleep(Duration::from_millis(100)));
        }
    }

    fn run(&self, line: &str) -> Result<()> {
        let program = ["/bin/sh", "-c", line];
        Ok(self.handle.block_on(guest::exercise(&self.connector, "root", &program, BOUND))?)
    }

    fn raw_up(&self, place: &str, content: &Content, bytes: u64) -> Result<Duration> {
        let mut stream = self.stream(RAW_PORT)?;
        let begin = Instant::now();
        stream.write_all(format!("u{place}\n").as_bytes())?;
        for piece in content.pieces(bytes) {
            stream.write_all(piece)?;
        }
        stream.read_exact(&mut [0]).context("the end of the raw copy")?;
        Ok(begin.elapsed())
    }

    fn raw_down(&self, place: &str, bytes: u64) -> Result<Duration> {
        let mut stream = self.stream(RAW_PORT)?;
        let mut buffer = vec![0; 512 << 10];
        let begin = Instant::now();
        stream.write_all(format!("d{place}\n").as_bytes())?;
        let mut came = 0;
        while came < bytes {
            let read = stream.read(&mut buffer)?;
            ensure!(read > 0, "{came} of {bytes} bytes came");
            came += read as u64;
        }
        Ok(begin.elapsed())
    }

    /// Small files through several connections, as many as there is time for, and a list of them.
    fn small_files(&self, options: &Options) -> Result<([Series; 3], (usize, usize))> {
        const ONE_EACH: usize = 1000;
        let mut one = Series::alone(
            format!("{ONE_EACH} small files up, one a request, {WIDTH} at once"),
            Measure::Files(ONE_EACH),
        );
        one.ours.add(self.small_at_once("/home/user/one-each", 0, ONE_EACH, 1));
        let (mut done, mut took) = (0, Duration::ZERO);
        let mut failure = None;
        while done < options.small_files && took.as_secs() < options.small_files_seconds && failure.is_none()
        {
            let turn = TURN.min(options.small_files - done);
            match self.small_at_once("/home/user/many", done, turn, TOGETHER) {
                Ok(turn_took) => {
                    took += turn_took;
                    done += turn;
                }
                Err(error) => failure = Some(error),
            }
        }
        let mut many = Series::alone(
            format!("{done} small files up, {TOGETHER} a request, {WIDTH} at once"),
            Measure::Files(done),
        );
        many.ours.add(failure.map_or(Ok(took), Err));
        let mut listed = Series::alone(format!("{done} files listed"), Measure::Files(done));
        let mut connection = self.connection()?;
        for _ in 0..3 {
            self.attempt(&mut connection, &mut listed.ours, |it| {
                workload::list(it, "/home/user/many", done)
            })?;
        }
        Ok(([one, many, listed], (done, options.small_files)))
    }

    fn small_at_once(
        &self,
        directory: &str,
        first: usize,
        count: usize,
        together: usize,
    ) -> Result<Duration> {
        let mut connections = Vec::new();
        for _ in 0..WIDTH {
            connections.push(self.connection()?);
        }
        let share = count.div_ceil(WIDTH);
        let begin = Instant::now();
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, mut connection) in connections.into_iter().enumerate() {
                let numbers = first + (number * share).min(count)..first + ((number + 1) * share).min(count);
                threads.push(
                    scope.spawn(move || workload::small_files(&mut connection, directory, numbers, together)),
                );
            }
            for thread in threads {
                thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            }
            Ok(begin.elapsed())
        })
    }
}

fn add(other: &mut Other, outcome: Result<Duration>) {
    other.samples.add(outcome.map_err(|error| format!("{error:#}")));
}

/// The raw copies in the guest. The first line says which way, and which file, if one.
const RAW_COPY: &str = r#"
import io, socket
server = socket.create_server(("0.0.0.0", PORT))
buffer = memoryview(bytearray(1 << 20))
while True:
    peer, _ = server.accept()
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += peer.recv(1) or b"\n"
        left, way, path = BYTES, line[:1], line[1:-1].decode()
        file = io.FileIO(path, "w" if way == b"u" else "r") if path else None
        while left:
            part = buffer[:min(left, len(buffer))]
            if way == b"u":
                part = part[:peer.recv_into(part)]
                if file:
                    file.write(part)
            else:
                if file:
                    part = part[:file.readinto(part)]
                peer.sendall(part)
            if not part:
                break
            left -= len(part)
        if way == b"u":
            peer.sendall(b"k")
        if file:
            file.close()
    except OSError:
        pass
    peer.close()
"#;
