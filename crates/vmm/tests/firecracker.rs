//! The Firecracker driver with real machines. Without Firecracker, KVM, a guest kernel or busybox it says what it skipped.
//!
//! There are hosts whose KVM opens and runs no guest. In the lab it does; elsewhere the first test finds out.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod support;

use std::{
    io::Write as _,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::{
    io::AsyncBufReadExt,
    sync::{Mutex, OnceCell},
};
use wrenn_host_linux::process::{Process, Signal, find_by_argument};
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    AdoptedMachine, BootMemory, DiskFormat, DiskRate, DiskSpec, ExitReason, GuestBundle, MachineSpec,
    NetworkSpec, SnapshotFiles, Vm, Vmm, VmmError,
    conformance::{self, Subject},
    firecracker::{Firecracker, FirecrackerOptions, MemoryBackend},
    pager::{self, PagerProgram},
};

/// How long a guest may take, whose host is translated too.
const BOUND: Duration = Duration::from_secs(240);

/// How long a guest may take to begin on a processor of its own.
const PROOF_BOUND: Duration = Duration::from_secs(20);

/// Users of jailed machines: nobody's on any host.
const FIRST_USER: u32 = 2_091_000;

/// Whether a guest has come up here.
static KVM_WORKS: OnceCell<bool> = OnceCell::const_new();

/// One test at a time: each has several machines, and some count processes and files.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Host {
    firecracker: Firecracker,
    guest: GuestBundle,
    root: Utf8PathBuf,
    /// The user of the next machine, where they are jailed.
    users: Option<AtomicU32>,
    _directory: tempfile::TempDir,
}

/// What makes the program of this test a pager.
const PAGER: &str = "WRENN_TEST_PAGER";

/// Not a test: what is started as a pager, which has this variable.
#[test]
fn becomes_a_pager() {
    if std::env::var_os(PAGER).is_some()
        && let Err(error) = pager::main()
    {
        panic!("{error:?}");
    }
}

/// Memory that this program serves.
fn served() -> MemoryBackend {
    MemoryBackend::Uffd(PagerProgram {
        program: "/proc/self/exe".into(),
        arguments: ["--exact", "becomes_a_pager", "--nocapture"].map(Into::into).to_vec(),
        environment: vec![(PAGER.into(), "1".into())],
    })
}

/// A test of each way in which a machine that is restored gets its memory.
macro_rules! of_both {
    ($($test:ident)*) => {
        mod mapped {
            $(#[tokio::test] async fn $test() { super::$test(super::MemoryBackend::File).await; })*
        }
        mod served {
            $(#[tokio::test] async fn $test() { super::$test(super::served()).await; })*
        }
    };
}

of_both! {
    conforms
    conforms_in_its_jailer
    a_jailed_machine_has_no_rights_and_sees_nothing_of_others
    a_full_disk_fails_a_snapshot_and_nothing_else
    each_life_has_a_number_of_its_own
    a_memory_with_a_hole_in_its_addresses_is_saved_and_restored
    a_clone_has_the_device_of_its_own_namespace
}

impl Host {
    async fn new() -> Option<Self> {
        Self::with(MemoryBackend::File).await
    }

    /// One whose machines are jailed.
    async fn jailed(memory: MemoryBackend) -> Option<Self> {
        let options =
            FirecrackerOptions { is_jailed: true, memory, ..FirecrackerOptions::from_environment() };
        Self::of(options).await
    }

    async fn with(memory: MemoryBackend) -> Option<Self> {
        Self::of(FirecrackerOptions { memory, ..FirecrackerOptions::from_environment() }).await
    }

    async fn of(options: FirecrackerOptions) -> Option<Self> {
        let is_jailed = options.is_jailed;
        let firecracker = match Firecracker::detect(options).await {
            Ok(firecracker) => firecracker,
            Err(error) => {
                support::skipped(&error.to_string());
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        // As where an agent has its files.
        std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let guest = match support::counting_guest(&root, support::Kernel::Uncompressed) {
            Ok(guest) => guest,
            Err(why) => {
                support::skipped(&why);
                return None;
            }
        };
        let users = is_jailed.then(|| AtomicU32::new(FIRST_USER));
        let host = Self { firecracker, guest, root, users, _directory: directory };
        if std::env::var_os("WRENN_LAB").is_none() && !*KVM_WORKS.get_or_init(|| host.runs_a_guest()).await {
            support::skipped("KVM runs no guest here: the lab does, `make lab`");
            return None;
        }
        Some(host)
    }

    async fn runs_a_guest(&self) -> bool {
        let spec = self.spec("proof", 128);
        let Ok(mut vm) = self.firecracker.boot(spec, BootMemory::Anonymous).await else { return false };
        let begin = Instant::now();
        while !vm.console().await.contains("tick") && begin.elapsed() < PROOF_BOUND {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let has_begun = vm.console().await.contains("tick");
        vm.stop().await.unwrap();
        has_begun
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        self.root.join(name)
    }

    fn spec(&self, name: &str, memory_mib: i64) -> MachineSpec {
        let run_dir = self.path(name);
        std::fs::create_dir_all(&run_dir).unwrap();
        MachineSpec {
            name: format!("wrenn-vmmtest{}-{name}", std::process::id()),
            run_dir,
            shape: Shape { vcpus: Vcpus::new(1).unwrap(), memory: MemoryMib::new(memory_mib).unwrap() },
            guest: self.guest.clone(),
            disk: None,
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            network: None,
            kernel_arguments: Vec::new(),
            keep_open: Vec::new(),
            control_group: None,
            user: self.user(),
        }
    }

    fn adopted(&self, name: &str) -> AdoptedMachine {
        support::adopted(self.spec(name, 128))
    }

    /// A machine that boots, to become a base.
    async fn boot(&self, spec: MachineSpec, memory: &Utf8Path) -> Box<dyn Vm> {
        let mut vm = self.firecracker.boot(spec, BootMemory::Shared(memory)).await.unwrap();
        ticks(vm.as_mut(), 3).await;
        vm
    }

    /// The base of a machine that counts, and is gone.
    async fn template(&self, spec: MachineSpec) -> SnapshotFiles {
        let files = SnapshotFiles { memory: self.path("memory"), state: self.path("state"), pages: None };
        let mut vm = self.boot(spec, &files.memory).await;
        vm.pause().await.unwrap();
        vm.snapshot(&files).await.unwrap();
        assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
        files
    }

    /// Where a snapshot of a clone goes.
    fn over(&self, base: &SnapshotFiles, name: &str) -> SnapshotFiles {
        SnapshotFiles {
            memory: base.memory.clone(),
            state: self.path(&format!("state-{name}")),
            pages: Some(self.path(&format!("pages-{name}"))),
        }
    }
}

/// Waits until a guest has counted so much more on its console.
async fn ticks(vm: &mut dyn Vm, more: usize) {
    let count = |console: &str| console.matches("tick").count();
    let (before, begin) = (count(&vm.console().await), Instant::now());
    while count(&vm.console().await) < before + more {
        let gone = vm.exit().borrow().clone();
        assert!(
            gone.is_none() && begin.elapsed() < BOUND,
            "{gone:?}: {}\n{}",
            vm.console().await,
            support::standing(vm.pid())
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!vm.console().await.contains("BAD"));
}

#[async_trait::async_trait]
impl Subject for Host {
    fn vmm(&self) -> &dyn Vmm {
        &self.firecracker
    }

    fn guest(&self) -> GuestBundle {
        self.guest.clone()
    }

    fn directory(&self) -> &Utf8Path {
        &self.root
    }

    fn user(&self) -> Option<u32> {
        self.users.as_ref().map(|users| users.fetch_add(1, Ordering::Relaxed))
    }

    async fn kill(&self, vm: &dyn Vm, _name: &str) {
        support::kill(vm).await;
    }

    async fn kill_by_name(&self, name: &str) {
        support::kill_by_name(name).await;
    }
}

async fn conforms(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(memory).await else { return };
    conformance::run(&host).await;
}

async fn conforms_in_its_jailer(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::jailed(memory).await else { return };
    conformance::run(&host).await;
}

#[tokio::test]
async fn a_disk_has_its_rate() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::new().await else { return };
    let disk = DiskSpec { path: host.path("disk"), format: DiskFormat::Raw };
    std::fs::File::create_new(&disk.path).unwrap().set_len(16 << 20).unwrap();
    let files = SnapshotFiles { memory: host.path("memory"), state: host.path("state"), pages: None };
    let spec =
        |name: &str, disk_rate| MachineSpec { disk: Some(disk.clone()), disk_rate, ..host.spec(name, 128) };
    support::a_disk_has_its_rate(&host.firecracker, spec, &files).await;
}

async fn a_jailed_machine_has_no_rights_and_sees_nothing_of_others(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let is_mapped = matches!(memory, MemoryBackend::File);
    let Some(host) = Host::jailed(memory).await else { return };
    let (one, two) = (Namespace::new("jail-one", "tap0").await, Namespace::new("jail-two", "tap0").await);
    // Each has a copy of the disk of the one that was saved.
    let disk = host.path("disk");
    std::fs::File::create_new(&disk).unwrap().set_len(16 << 20).unwrap();
    let with_network = |name, namespace: &Namespace, disk: &Utf8Path| {
        let mut spec = host.spec(name, 128);
        spec.network = Some(NetworkSpec { namespace: namespace.path(), tap: "tap0".to_owned() });
        let path = host.path(&format!("disk-{name}"));
        std::fs::copy(disk, &path).unwrap();
        spec.disk = Some(DiskSpec { path, format: DiskFormat::Raw });
        spec
    };
    let base = host.template(with_network("template", &one, &disk)).await;
    let disk = host.path("disk-template");
    let mut machines = [
        host.firecracker.restore(with_network("one", &one, &disk), &base).await.unwrap(),
        host.firecracker.restore(with_network("two", &two, &disk), &base).await.unwrap(),
    ];
    for vm in &mut machines {
        vm.resume().await.unwrap();
        ticks(vm.as_mut(), 3).await;
    }
    support::each_is_a_user(&[machines[0].as_ref(), machines[1].as_ref()], FIRST_USER);
    for (vm, name) in machines.iter().zip(["one", "two"]) {
        let vm = vm.as_ref();
        for namespace in ["mnt", "net", "pid", "ipc", "uts"] {
            let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
            assert_ne!(of(&vm.pid().unwrap().to_string()), of("self"), "{namespace}");
        }
        let root = Utf8PathBuf::from(format!("/proc/{}/root", vm.pid().unwrap()));
        let mut seen: Vec<String> =
            root.read_dir_utf8().unwrap().flatten().map(|entry| entry.file_name().to_owned()).collect();
        seen.sort();
        let program = host.firecracker.program().file_name().unwrap();
        let mark = format!("guest=wrenn-vmmtest{}-{name}", std::process::id());
        let mut known = [
            "api",
            "console.fifo",
            "dev",
            "disk.link",
            if is_mapped { "memory" } else { "memory.sock" },
            "run",
            "saved-memory",
            "saved-state",
            "state",
        ]
        .map(str::to_owned)
        .to_vec();
        known.extend([mark, program.to_owned(), format!("{program}.pid")]);
        known.sort();
        assert_eq!(seen, known);
        // The base can be read by all of them, and written by none; where it is served, they do not see it.
        let memory = support::open_files(vm).into_iter().filter(|(_, is_written)| *is_written);
        let inode = |path: &Utf8Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
        let process = format!("/proc/{}/fd", vm.pid().unwrap());
        for (path, _) in memory {
            assert!(!path.as_str().ends_with("memory"), "{path} in {process}");
        }
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", vm.pid().unwrap())).unwrap();
        assert!(mounts.contains(" /state ro,nosuid,nodev"), "{mounts}");
        if is_mapped {
            assert_eq!(inode(&root.join("memory")), inode(&base.memory));
            assert!(mounts.contains(" /memory ro,nosuid,nodev"), "{mounts}");
        }
        assert_eq!(taps(vm.pid().unwrap()), ["tap0"]);
    }
    let control = std::fs::metadata(host.path("one/control.sock")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&control.permissions()) & 0o777, 0o600);
    let owner = |path: &Utf8Path| std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path).unwrap());
    assert!(owner(&base.memory) == 0 && owner(&base.state) == 0, "what was saved is root's");
    assert_eq!(std::fs::read_dir(host.path("one/jail")).unwrap().count(), 0, "the host sees nothing of it");
    assert_eq!(owner(&host.path("one/api")), 0, "it makes no more names there");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", machines[0].pid().unwrap())).unwrap();
    let longest = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    let longest: u64 = longest.split_whitespace().next().unwrap().parse().unwrap();
    assert!((128 << 20..256 << 20).contains(&longest), "{limits}");

    // It is saved, taken over and saved again.
    let [mut vm, mut other] = machines;
    vm.pause().await.unwrap();
    let first = host.over(&base, "first");
    vm.snapshot(&first).await.unwrap();
    vm.resume().await.unwrap();
    vm.release().await;
    let known = AdoptedMachine { has_disk: true, memory: Some(base.memory.clone()), ..host.adopted("one") };
    let mut vm = host.firecracker.adopt(known).await.unwrap();
    ticks(vm.as_mut(), 3).await;
    vm.resize_disk(32 << 20).await.unwrap();
    vm.pause().await.unwrap();
    let second = host.over(&base, "second");
    vm.snapshot(&second).await.unwrap();
    for files in [&first, &second] {
        assert!(owner(&files.state) == 0 && owner(files.pages.as_ref().unwrap()) == 0);
    }
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    assert_eq!(other.stop().await.unwrap(), ExitReason::Stopped);
    let mut again =
        host.firecracker.restore(with_network("again", &one, &host.path("disk-one")), &second).await.unwrap();
    again.resume().await.unwrap();
    ticks(again.as_mut(), 3).await;
    again.stop().await.unwrap();
}

#[tokio::test]
async fn a_machine_has_one_owner() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::new().await else { return };
    let spec = host.spec("owned", 128);
    let mut owner = host.firecracker.boot(spec, BootMemory::Anonymous).await.unwrap();
    let other = host.firecracker.adopt(host.adopted("owned")).await.map(drop);
    assert!(matches!(other, Err(VmmError::Timeout { operation: "adopt", .. })), "{other:?}");
    let second = host.firecracker.boot(host.spec("owned", 128), BootMemory::Anonymous).await.map(drop);
    assert!(matches!(second, Err(VmmError::Spec { field: "run_dir", .. })), "{second:?}");
    owner.pause().await.unwrap();
    owner.resume().await.unwrap();
    owner.release().await;
    let mut other = host.firecracker.adopt(host.adopted("owned")).await.unwrap();
    other.pause().await.unwrap();
    assert_eq!(other.stop().await.unwrap(), ExitReason::Stopped);
}

/// Names the directory of a machine that this process is to own until it is killed.
const OWNED: &str = "WRENN_TEST_OWNED";
/// What it says once it owns it.
const OWNS: &str = "it owns its machine";

#[tokio::test]
async fn a_machine_outlives_the_death_of_its_owner() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::new().await else { return };
    if let Ok(run_dir) = std::env::var(OWNED) {
        let run_dir = Utf8PathBuf::from(run_dir);
        let spec = MachineSpec { name: name_in(&run_dir), run_dir, ..host.spec("unused", 128) };
        let mut vm = host.firecracker.boot(spec, BootMemory::Anonymous).await.unwrap();
        ticks(vm.as_mut(), 3).await;
        writeln!(std::io::stdout(), "\n{OWNS}").unwrap();
        std::future::pending::<()>().await;
    }
    let run_dir = host.path("owned");
    std::fs::create_dir(&run_dir).unwrap();
    let test = "a_machine_outlives_the_death_of_its_owner";
    let mut owner = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(OWNED, &run_dir)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut said = tokio::io::BufReader::new(owner.stdout.take().unwrap()).lines();
    let owns = async { while said.next_line().await.unwrap().expect("it lives") != OWNS {} };
    tokio::time::timeout(BOUND, owns).await.unwrap();
    owner.kill().await.unwrap();

    let known = AdoptedMachine { name: name_in(&run_dir), run_dir, ..host.adopted("unused") };
    let mut vm = host.firecracker.adopt(known).await.unwrap();
    ticks(vm.as_mut(), 3).await;
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    ticks(vm.as_mut(), 3).await;
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
}

/// The name of the machine in a directory, for who owns it and for who will.
fn name_in(run_dir: &Utf8Path) -> String {
    let test = run_dir.parent().unwrap().file_name().unwrap().trim_start_matches('.').to_lowercase();
    format!("wrenn-vmmtest-{test}")
}

#[tokio::test]
async fn a_process_that_is_asked_to_end_says_so() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::new().await else { return };
    let spec = host.spec("asked", 128);
    let vm = host.firecracker.boot(spec, BootMemory::Anonymous).await.unwrap();
    Process::open(vm.pid().unwrap()).unwrap().signal(Signal::TERM).unwrap();
    assert_eq!(support::ended(vm.as_ref(), BOUND).await, ExitReason::VmmKilled { signal: 15 });
}

async fn a_full_disk_fails_a_snapshot_and_nothing_else(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(memory).await else { return };
    let base = SnapshotFiles { memory: host.path("memory"), state: host.path("state"), pages: None };
    let mut vm = host.boot(host.spec("template", 128), &base.memory).await;
    vm.pause().await.unwrap();
    let full = SnapshotFiles { state: "/dev/full".into(), ..base.clone() };
    let error = vm.snapshot(&full).await.unwrap_err();
    assert!(matches!(&error, VmmError::Refused { message, .. } if message.contains("space")), "{error:?}");
    // It goes on, and is saved whole, although Firecracker may have forgotten what was written.
    vm.resume().await.unwrap();
    ticks(vm.as_mut(), 3).await;
    vm.pause().await.unwrap();
    vm.snapshot(&base).await.unwrap();
    vm.stop().await.unwrap();

    let mut clone = host.firecracker.restore(host.spec("clone", 128), &base).await.unwrap();
    clone.resume().await.unwrap();
    ticks(clone.as_mut(), 3).await;
    clone.pause().await.unwrap();
    let full = SnapshotFiles { state: "/dev/full".into(), ..host.over(&base, "clone") };
    let error = clone.snapshot(&full).await.unwrap_err();
    assert!(matches!(error, VmmError::Refused { .. }), "{error:?}");
    assert!(!Utf8Path::new("/dev/full.memory").exists(), "what was half made is gone");
    let files = host.over(&base, "clone");
    clone.snapshot(&files).await.unwrap();
    clone.resume().await.unwrap();
    ticks(clone.as_mut(), 3).await;
    clone.stop().await.unwrap();
    let mut again = host.firecracker.restore(host.spec("again", 128), &files).await.unwrap();
    again.resume().await.unwrap();
    ticks(again.as_mut(), 3).await;
    again.stop().await.unwrap();
}

/// The bytes of saved pages, without what frames them.
fn saved(files: &SnapshotFiles) -> Vec<u8> {
    std::fs::read(files.pages.as_ref().unwrap()).unwrap()
}

async fn each_life_has_a_number_of_its_own(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(memory).await else { return };
    let base = host.template(host.spec("template", 128)).await;
    let begin = Instant::now();
    let mut vm = host.firecracker.restore(host.spec("first", 128), &base).await.unwrap();
    let restored = begin.elapsed();
    vm.resume().await.unwrap();
    ticks(vm.as_mut(), 3).await;
    let begin = Instant::now();
    vm.pause().await.unwrap();
    let files = host.over(&base, "first");
    let statistics = vm.snapshot(&files).await.unwrap();
    eprintln!("restored in {restored:?}, saved in {:?}: {statistics:?}", begin.elapsed());
    vm.stop().await.unwrap();

    // Two of one snapshot, which have not run: what differs is what Firecracker tells its guest of this life.
    let mut lives = Vec::new();
    for name in ["one", "two"] {
        let begin = Instant::now();
        let mut vm = host.firecracker.restore(host.spec(name, 128), &files).await.unwrap();
        eprintln!("restored with its pages in {:?}", begin.elapsed());
        let life = host.over(&base, name);
        vm.snapshot(&life).await.unwrap();
        vm.stop().await.unwrap();
        lives.push(saved(&life));
    }
    let [one, two] = lives.try_into().unwrap();
    assert_eq!(one.len(), two.len());
    let differ = one.iter().zip(&two).filter(|(one, two)| one != two).count();
    // 16 random bytes, of which some may be equal, and the digest of the table if at all.
    assert!((8..=64).contains(&differ), "{differ} bytes differ");
}

async fn a_memory_with_a_hole_in_its_addresses_is_saved_and_restored(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(memory).await else { return };
    // Beyond 3 GiB it lies elsewhere, in a mapping of its own; the guest is told not to use that.
    let spec = |name| {
        let mut spec = host.spec(name, 4096);
        spec.kernel_arguments.push("mem=128M".to_owned());
        spec
    };
    let base = host.template(spec("template")).await;
    assert_eq!(std::fs::metadata(&base.memory).unwrap().len(), 4 << 30);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&base.memory).unwrap());
    assert!(blocks * 512 < 256 << 20, "what was never written is a hole: {blocks} blocks");
    let mut files = base.clone();
    for name in ["one", "two"] {
        let mut vm = host.firecracker.restore(spec(name), &files).await.unwrap();
        vm.resume().await.unwrap();
        ticks(vm.as_mut(), 3).await;
        vm.pause().await.unwrap();
        files = host.over(&base, name);
        let statistics = vm.snapshot(&files).await.unwrap();
        assert!(statistics.pages > 0 && statistics.bytes_written < 128 << 20, "{statistics:?}");
        vm.stop().await.unwrap();
    }
}

/// The pager of a machine.
fn pager_of(name: &str) -> Process {
    let mark = format!("pager-of=wrenn-vmmtest{}-{name}", std::process::id());
    let [found] = find_by_argument(&mark).unwrap().try_into().unwrap();
    found.process
}

#[tokio::test]
async fn a_machine_whose_pager_dies_ends_and_says_why() {
    let _alone = ONE_AT_A_TIME.lock().await;
    if let Some(host) = Host::with(served()).await {
        ends_with_its_pager(&host).await;
    }
}

/// There it is the first process of its namespace, which the kernel protects from some signals.
#[tokio::test]
async fn a_jailed_machine_whose_pager_dies_ends_and_says_why() {
    let _alone = ONE_AT_A_TIME.lock().await;
    if let Some(host) = Host::jailed(served()).await {
        ends_with_its_pager(&host).await;
    }
}

async fn ends_with_its_pager(host: &Host) {
    let base = host.template(host.spec("template", 128)).await;
    // One that is owned, one that was taken over, and one that nobody owns.
    let mut owned = host.firecracker.restore(host.spec("owned", 128), &base).await.unwrap();
    owned.resume().await.unwrap();
    ticks(owned.as_mut(), 3).await;
    let begin = Instant::now();
    pager_of("owned").kill().unwrap();
    let reason = support::ended(owned.as_ref(), BOUND).await;
    eprintln!("a machine ended {:?} after its pager", begin.elapsed());
    assert_eq!(reason, ExitReason::Pager { said: String::new() });

    for is_taken_over in [true, false] {
        let name = if is_taken_over { "taken" } else { "alone" };
        let mut vm = host.firecracker.restore(host.spec(name, 128), &base).await.unwrap();
        vm.resume().await.unwrap();
        ticks(vm.as_mut(), 3).await;
        let process = Process::open(vm.pid().unwrap()).unwrap();
        vm.release().await;
        let known = AdoptedMachine { memory: Some(base.memory.clone()), ..host.adopted(name) };
        if is_taken_over {
            let vm = host.firecracker.adopt(known).await.unwrap();
            pager_of(name).kill().unwrap();
            let reason = support::ended(vm.as_ref(), BOUND).await;
            assert_eq!(reason, ExitReason::Pager { said: String::new() });
        } else {
            pager_of(name).kill().unwrap();
            // The kernel alone does it.
            tokio::time::timeout(BOUND, process.ended()).await.unwrap().unwrap();
            let gone = host.firecracker.adopt(known).await.map(drop);
            assert!(matches!(gone, Err(VmmError::NotThere { .. })), "{gone:?}");
        }
    }
}

#[tokio::test]
async fn what_a_guest_wants_first_is_there_the_next_time() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(served()).await else { return };
    let base = host.template(host.spec("template", 128)).await;
    let mut faults = Vec::new();
    for name in ["first", "second", "third"] {
        let spec = host.spec(name, 128);
        let run_dir = spec.run_dir.clone();
        let begin = Instant::now();
        let mut vm = host.firecracker.restore(spec, &base).await.unwrap();
        let restored = begin.elapsed();
        vm.resume().await.unwrap();
        ticks(vm.as_mut(), 1).await;
        let ticked = begin.elapsed();
        ticks(vm.as_mut(), 2).await;
        let counts = pager::counts(&run_dir).unwrap();
        eprintln!("{name}: restored in {restored:?}, first tick after {ticked:?}: {counts:?}");
        vm.stop().await.unwrap();
        faults.push(counts.faults);
    }
    assert!(Utf8Path::new(&format!("{}.working-set", base.state)).exists());
    assert!(faults[1] < faults[0] / 2 && faults[2] < faults[0] / 2, "{faults:?}");
}

/// Runs a program of the host.
async fn run(words: &[&str]) {
    let output = tokio::process::Command::new(words[0]).args(&words[1..]).output();
    let output = tokio::time::timeout(BOUND, output).await.unwrap().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The TAP devices that a process has open.
fn taps(pid: u32) -> Vec<String> {
    let described = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten();
    let texts = described.filter_map(|file| std::fs::read_to_string(file.path()).ok());
    texts
        .filter_map(|text| Some(text.lines().find_map(|line| line.strip_prefix("iff:"))?.trim().to_owned()))
        .collect()
}

/// A namespace of this test, with a TAP device.
struct Namespace(String);

impl Namespace {
    async fn new(name: &str, tap: &str) -> Self {
        let namespace = Self(format!("wrenn-vmmtest{}-{name}", std::process::id()));
        run(&["ip", "netns", "add", &namespace.0]).await;
        run(&["ip", "-n", &namespace.0, "tuntap", "add", "dev", tap, "mode", "tap"]).await;
        namespace
    }

    fn path(&self) -> Utf8PathBuf {
        Utf8Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(std::process::Command::new("ip").args(["netns", "delete", &self.0]).status());
    }
}

async fn a_clone_has_the_device_of_its_own_namespace(memory: MemoryBackend) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::with(memory).await else { return };
    let (one, two) = (Namespace::new("one", "tap0").await, Namespace::new("two", "tap7").await);
    let with_network = |name, namespace: &Namespace, tap: &str| {
        let mut spec = host.spec(name, 128);
        spec.network = Some(NetworkSpec { namespace: namespace.path(), tap: tap.to_owned() });
        spec
    };
    let base = SnapshotFiles { memory: host.path("memory"), state: host.path("state"), pages: None };
    let mut vm = host.boot(with_network("template", &one, "tap0"), &base.memory).await;
    assert_eq!(taps(vm.pid().unwrap()), ["tap0"]);
    vm.pause().await.unwrap();
    vm.snapshot(&base).await.unwrap();
    vm.stop().await.unwrap();
    let mut clone = host.firecracker.restore(with_network("clone", &two, "tap7"), &base).await.unwrap();
    assert_eq!(taps(clone.pid().unwrap()), ["tap7"], "and not the one that the state names");
    clone.resume().await.unwrap();
    ticks(clone.as_mut(), 3).await;
    clone.stop().await.unwrap();
}
