//! The QEMU driver with real machines. Without QEMU, a guest kernel or busybox it says what it skipped.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod support;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::Mutex;
use wrenn_host_linux::process::{Process, find_program};
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    Accelerator, AdoptedMachine, BootMemory, DiskFormat, DiskRate, DiskSpec, ExitReason, GuestBundle,
    MachineSpec, SnapshotFiles, Vm, Vmm, VmmError,
    conformance::{self, Subject},
    qemu::{AcceleratorChoice, Qemu, QemuOptions},
};

const BOUND: Duration = Duration::from_secs(120);
/// Users of confined machines: nobody's on any host.
const FIRST_USER: u32 = 2_090_000;

/// One test at a time: each has several machines, and some count processes and files.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Lab {
    qemu: Qemu,
    guest: GuestBundle,
    root: Utf8PathBuf,
    /// The user of the next machine, where they are confined.
    users: Option<AtomicU32>,
    _directory: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        let guest = match support::counting_guest(&root, support::Kernel::Compressed) {
            Ok(guest) => guest,
            Err(why) => {
                support::skipped(&why);
                return None;
            }
        };
        // KVM is proven by the probe with the product's guest; here the driver is under test.
        let accelerator = AcceleratorChoice::Always(Accelerator::Tcg);
        let options = QemuOptions { accelerator, ..QemuOptions::from_environment().unwrap() };
        match Qemu::detect(options).await {
            Ok(qemu) => Some(Self { qemu, guest, root, users: None, _directory: directory }),
            Err(error) => {
                support::skipped(&error.to_string());
                None
            }
        }
    }

    /// One whose machines are confined.
    async fn confined() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            support::skipped("machines are confined by root");
            return None;
        }
        Some(Self { users: Some(AtomicU32::new(FIRST_USER)), ..Self::new().await? })
    }

    fn spec(&self, name: &str, vcpus: i64) -> MachineSpec {
        let run_dir = self.root.join(name);
        std::fs::create_dir_all(&run_dir).unwrap();
        MachineSpec {
            name: format!("wrenn-vmmtest{}-{name}", std::process::id()),
            run_dir,
            shape: Shape { vcpus: Vcpus::new(vcpus).unwrap(), memory: MemoryMib::new(256).unwrap() },
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

    /// Whether the guest can use a disk.
    fn has_disk_driver(&self) -> bool {
        self.guest.kernel.with_file_name("initramfs.img").is_file()
    }

    /// A template of the counting guest, saved and stopped.
    async fn template(&self, vcpus: i64) -> SnapshotFiles {
        let files =
            SnapshotFiles { memory: self.root.join("memory"), state: self.root.join("state"), pages: None };
        let mut vm =
            self.qemu.boot(self.spec("template", vcpus), BootMemory::Shared(&files.memory)).await.unwrap();
        until_it_says(vm.as_mut(), "tick").await;
        vm.pause().await.unwrap();
        vm.snapshot(&files).await.unwrap();
        assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
        files
    }
}

async fn until_it_says(vm: &mut dyn Vm, text: &str) {
    let begin = Instant::now();
    while !vm.console().await.contains(text) {
        let gone = vm.exit().borrow().clone();
        assert!(gone.is_none() && begin.elapsed() < BOUND, "{gone:?}: {}", vm.console().await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[async_trait::async_trait]
impl Subject for Lab {
    fn vmm(&self) -> &dyn Vmm {
        &self.qemu
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

#[tokio::test]
async fn conforms() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    conformance::run(&lab).await;
}

#[tokio::test]
async fn conforms_where_it_is_confined() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::confined().await else { return };
    conformance::run(&lab).await;
}

/// Everything that a process sees of the host, but programs and libraries.
fn seen(vm: &dyn Vm) -> Vec<String> {
    let root = Utf8PathBuf::from(format!("/proc/{}/root", vm.pid().unwrap()));
    let mut found = Vec::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir_utf8().unwrap().flatten() {
            let path = entry.path().strip_prefix(&root).unwrap();
            let is_system =
                ["lib", "lib64", "usr/lib", "usr/lib32", "usr/lib64", "usr/share"].contains(&path.as_str());
            match entry.file_type().unwrap().is_dir() {
                true if is_system => {}
                true => directories.push(entry.path().to_owned()),
                false => found.push(path.to_string()),
            }
        }
    }
    found
}

#[tokio::test]
async fn a_confined_machine_has_no_rights_and_sees_nothing_of_others() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::confined().await else { return };
    let files = lab.template(1).await;
    let disk = |name: &str| {
        let path = lab.root.join(name);
        std::fs::File::create_new(&path).unwrap().set_len(16 << 20).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        DiskSpec { path, format: DiskFormat::Raw }
    };
    let start = async |name: &str| {
        let mut vm = lab.qemu.restore(lab.spec(name, 1), &files).await.unwrap();
        vm.resume().await.unwrap();
        until_it_says(vm.as_mut(), "tick").await;
        vm
    };
    let mut booted = lab.spec("booted", 1);
    booted.disk = Some(disk("disk"));
    let mut booted = lab.qemu.boot(booted, BootMemory::Anonymous).await.unwrap();
    until_it_says(booted.as_mut(), "tick").await;
    let mut machines = [start("one").await, start("two").await, booted];
    support::each_is_a_user(&machines.iter().map(|vm| vm.as_ref()).collect::<Vec<_>>(), FIRST_USER);
    for vm in &machines {
        let vm = vm.as_ref();
        assert_eq!(support::status(vm, "CapBnd"), "0000000000000000");
        for namespace in ["mnt", "net", "ipc", "uts"] {
            let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
            assert_ne!(of(&vm.pid().unwrap().to_string()), of("self"), "{namespace}");
        }
        let root = Utf8PathBuf::from(format!("/proc/{}/root", vm.pid().unwrap()));
        for hidden in ["etc/passwd", "proc", "sys", "dev/mem", "run/wrenn", "usr/bin/sh"] {
            assert!(root.join(hidden).symlink_metadata().is_err(), "{hidden}");
        }
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", vm.pid().unwrap())).unwrap();
        let is_locked = |mount: &str| mount.split(' ').nth(5).unwrap().starts_with("ro,nosuid");
        assert!(mounts.lines().all(is_locked), "{mounts}");
        let writable: Vec<Utf8PathBuf> = support::open_files(vm)
            .into_iter()
            .filter(|(path, is_written)| *is_written && path.starts_with(&lab.root))
            .map(|(path, _)| path)
            .collect();
        let own = if vm.pid() == machines[2].pid() { vec![lab.root.join("disk")] } else { Vec::new() };
        assert!(writable.iter().all(|path| own.contains(path)), "it may write {writable:?}");
    }
    let program = lab.qemu.program().strip_prefix("/").unwrap().to_string();
    for vm in &machines[..2] {
        let mut seen = seen(vm.as_ref());
        seen.retain(|path| {
            *path != program
                && !["etc/ld.so.cache", "dev/null"].contains(&path.as_str())
                && !path.starts_with("lib")
        });
        assert!(seen.is_empty(), "{seen:?}");
        let memory = support::open_files(vm.as_ref()).into_iter().filter(|(path, _)| *path == files.memory);
        assert_eq!(
            memory.map(|(_, is_written)| is_written).collect::<Vec<_>>(),
            [false],
            "the base is only read"
        );
    }
    let control = std::fs::metadata(lab.root.join("one/control.sock")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&control.permissions()) & 0o777, 0o600);
    for vm in &mut machines {
        assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    }
    let owner = |path: &Utf8Path| std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path).unwrap());
    assert!(owner(&files.memory) == 0 && owner(&lab.root.join("disk")) == 0, "what is on the disk is root's");
}

/// One clone from its restore to its first words; how long the restore and the resume took.
async fn clone_once(lab: &Lab, name: &str, vcpus: i64, files: &SnapshotFiles) -> Duration {
    let begin = Instant::now();
    let mut vm = lab.qemu.restore(lab.spec(name, vcpus), files).await.unwrap();
    vm.resume().await.unwrap();
    let running = begin.elapsed();
    until_it_says(vm.as_mut(), "tick").await;
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    running
}

#[tokio::test]
async fn restores_again_and_again_and_four_at_once() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    for vcpus in [1, 2] {
        let files = lab.template(vcpus).await;
        let mut alone = Vec::new();
        for turn in 0..10 {
            alone.push(clone_once(&lab, &format!("alone{turn}"), vcpus, &files).await);
        }
        let at_once = tokio::join!(
            clone_once(&lab, "a", vcpus, &files),
            clone_once(&lab, "b", vcpus, &files),
            clone_once(&lab, "c", vcpus, &files),
            clone_once(&lab, "d", vcpus, &files),
        );
        alone.sort();
        eprintln!("{vcpus} vCPU: alone {alone:?}, four at once {at_once:?}");
        std::fs::remove_file(&files.memory).unwrap();
    }
}

#[tokio::test]
async fn a_disk_is_what_its_format_says() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    // The bytes of a raw disk are the guest's: a qcow2 header in them must mean nothing.
    let path = lab.root.join("disk");
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.resize(1 << 20, 0);
    std::fs::write(&path, bytes).unwrap();
    let mut spec = lab.spec("raw", 1);
    spec.disk = Some(DiskSpec { path: path.clone(), format: DiskFormat::Raw });
    let mut vm = lab.qemu.boot(spec, BootMemory::Anonymous).await.unwrap();
    vm.stop().await.unwrap();
    // And what is no qcow2 file is refused as one, in QEMU's words.
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut spec = lab.spec("qcow2", 1);
    spec.disk = Some(DiskSpec { path, format: DiskFormat::Qcow2 });
    let error = lab.qemu.boot(spec, BootMemory::Anonymous).await.map(|_| ()).unwrap_err();
    let VmmError::Exited { reason: ExitReason::VmmFailed { code: 1, stderr }, .. } = error else {
        panic!("{error:?}");
    };
    assert!(stderr.contains("qcow2"), "{stderr}");
}

#[tokio::test]
async fn a_full_disk_fails_a_snapshot_and_nothing_else() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let memory = lab.root.join("memory");
    let mut vm = lab.qemu.boot(lab.spec("full", 1), BootMemory::Shared(&memory)).await.unwrap();
    until_it_says(vm.as_mut(), "tick").await;
    vm.pause().await.unwrap();
    let full = SnapshotFiles { memory: memory.clone(), state: "/dev/full".into(), pages: None };
    let error = vm.snapshot(&full).await.unwrap_err();
    assert!(matches!(error, VmmError::Refused { .. }), "{error:?}");
    vm.resume().await.unwrap();
    let before = vm.console().await.lines().count();
    let begin = Instant::now();
    while vm.console().await.lines().count() < before + 3 {
        assert!(begin.elapsed() < BOUND, "it goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
}

#[tokio::test]
async fn a_console_is_bounded_and_blocks_nobody() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let mut vm = lab.qemu.boot(lab.spec("console", 1), BootMemory::Anonymous).await.unwrap();
    until_it_says(vm.as_mut(), "tick").await;
    let text = vm.console().await;
    assert!(text.len() <= 64 * 1024);
    let log = std::fs::read_to_string(lab.root.join("console/console.log")).unwrap();
    assert!(log.contains("wrenn-guest ready"));
    // A process that is asked to end by a signal says so.
    Process::open(vm.pid().unwrap()).unwrap().signal(wrenn_host_linux::process::Signal::TERM).unwrap();
    assert_eq!(support::ended(vm.as_ref(), BOUND).await, ExitReason::VmmKilled { signal: 15 });
}

fn adopted(lab: &Lab, name: &str) -> AdoptedMachine {
    support::adopted(lab.spec(name, 1))
}

/// The control protocol, spoken by somebody else.
fn command_from_outside(control: &Utf8Path, command: &str) {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut answer = || lines.find(|line| !line.as_ref().unwrap().contains("\"event\"")).unwrap().unwrap();
    assert!(answer().contains("QMP"));
    for command in [r#"{"execute": "qmp_capabilities"}"#, command] {
        writeln!(stream, "{command}").unwrap();
        let said = answer();
        assert!(said.contains("\"return\""), "{command}: {said}");
    }
}

#[tokio::test]
async fn nobody_has_to_read_what_a_released_machine_says() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let mut vm = lab.qemu.boot(lab.spec("talks", 1), BootMemory::Anonymous).await.unwrap();
    until_it_says(vm.as_mut(), "tick").await;
    vm.release().await;
    // From now on it writes to its standard error at every interrupt of its guest.
    let control = lab.root.join("talks/control.sock");
    let talk = r#"{"execute": "human-monitor-command", "arguments": {"command-line": "log int"}}"#;
    tokio::task::spawn_blocking(move || command_from_outside(&control, talk)).await.unwrap();
    let mut vm = lab.qemu.adopt(adopted(&lab, "talks")).await.unwrap();
    let before = vm.console().await.matches("tick").count();
    let begin = Instant::now();
    while vm.console().await.matches("tick").count() < before + 3 {
        assert!(vm.exit().borrow().is_none() && begin.elapsed() < BOUND, "{}", vm.console().await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
}

#[tokio::test]
async fn a_machine_has_one_owner() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let mut owner = lab.qemu.boot(lab.spec("owned", 1), BootMemory::Anonymous).await.unwrap();
    until_it_says(owner.as_mut(), "tick").await;
    let other = lab.qemu.adopt(adopted(&lab, "owned")).await.map(drop);
    assert!(matches!(other, Err(VmmError::Timeout { operation: "adopt", .. })), "{other:?}");
    owner.pause().await.unwrap();
    owner.resume().await.unwrap();
    owner.release().await;
    let mut other = lab.qemu.adopt(adopted(&lab, "owned")).await.unwrap();
    other.pause().await.unwrap();
    assert_eq!(other.stop().await.unwrap(), ExitReason::Stopped);
}

/// The processor time that a process has used, in ticks of the kernel's clock.
fn processor_time(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test]
async fn what_a_guest_did_while_nobody_watched_is_told_later() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    for (does, reason) in [("panic", ExitReason::GuestPanic), ("poweroff", ExitReason::GuestShutdown)] {
        let mut spec = lab.spec(does, 1);
        spec.kernel_arguments.push(format!("conformance={does}"));
        let vm = lab.qemu.boot(spec, BootMemory::Anonymous).await.unwrap();
        let pid = vm.pid().unwrap();
        vm.release().await;
        // A guest that boots computes all the time; one that is down does not at all.
        let (mut used, mut since) = (0, Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = processor_time(pid);
            if now != used {
                (used, since) = (now, Instant::now());
            }
        }
        let vm = lab.qemu.adopt(adopted(&lab, does)).await.unwrap();
        assert_eq!(support::ended(vm.as_ref(), BOUND).await, reason);
    }
}

#[tokio::test]
async fn each_file_of_a_chain_has_what_was_written_in_its_time() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let (Some(_), true) = (find_program("qemu-img"), lab.has_disk_driver()) else {
        support::skipped("no qemu-img or no modules for the guest: packages qemu-utils, and `make images`");
        return;
    };
    let base = DiskSpec { path: lab.root.join("base"), format: DiskFormat::Raw };
    std::fs::File::create_new(&base.path).unwrap().set_len(16 << 20).unwrap();
    let mut spec = lab.spec("writes", 1);
    spec.disk = Some(base.clone());
    let mut vm = lab.qemu.boot(spec, BootMemory::Anonymous).await.unwrap();
    until_it_says(vm.as_mut(), " 8 ok").await;
    vm.pause().await.unwrap();
    let top = DiskSpec { path: lab.root.join("top"), format: DiskFormat::Qcow2 };
    let words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.path.as_str(), top.path.as_str()];
    qemu_img(&words).await;
    vm.pivot_disk(&top).await.unwrap();
    let before = ticks_on(&std::fs::read(&base.path).unwrap());
    assert!(before.len() >= 7, "{before:?}");
    vm.resume().await.unwrap();
    until_it_says(vm.as_mut(), " 20 ok").await;
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    assert_eq!(ticks_on(&std::fs::read(&base.path).unwrap()), before);
    let whole = lab.root.join("whole");
    qemu_img(&["check", "-q", top.path.as_str()]).await;
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", top.path.as_str(), whole.as_str()]).await;
    let after = ticks_on(&std::fs::read(&whole).unwrap());
    assert!(after.starts_with(&before) && after.len() >= 19, "{before:?} {after:?}");
    assert!(after.iter().copied().eq(1..=after.len() as u64), "each is in its place: {after:?}");
}

#[tokio::test]
async fn a_disk_has_its_rate() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    if !lab.has_disk_driver() {
        support::skipped("no modules for the guest: `make images`");
        return;
    }
    let disk = DiskSpec { path: lab.root.join("disk"), format: DiskFormat::Raw };
    std::fs::File::create_new(&disk.path).unwrap().set_len(16 << 20).unwrap();
    let files = SnapshotFiles { memory: lab.root.join("memory"), state: lab.root.join("state"), pages: None };
    let spec =
        |name: &str, disk_rate| MachineSpec { disk: Some(disk.clone()), disk_rate, ..lab.spec(name, 1) };
    support::a_disk_has_its_rate(&lab.qemu, spec, &files).await;
    let mut without = lab.spec("without", 1);
    without.disk_rate.bytes = std::num::NonZeroU64::new(1);
    let refused = lab.qemu.boot(without, BootMemory::Anonymous).await.map(drop);
    assert!(matches!(refused, Err(VmmError::Spec { field: "disk_rate", .. })), "{refused:?}");
}

#[tokio::test]
async fn a_stream_that_nobody_waits_for_gives_way() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let (Some(_), true) = (find_program("qemu-img"), lab.has_disk_driver()) else {
        support::skipped("no qemu-img or no modules for the guest: packages qemu-utils, and `make images`");
        return;
    };
    let path = |name: &str| lab.root.join(name);
    let overlay = async |name: &str, format: &str, base: &str| {
        let (file, base) = (path(name), path(base));
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", format, "-b", base.as_str(), file.as_str()]).await;
        DiskSpec { path: file, format: DiskFormat::Qcow2 }
    };
    // Enough to copy for it to take a while.
    let content = path("content");
    std::fs::write(&content, vec![7; 256 << 20]).unwrap();
    std::fs::File::create_new(path("base")).unwrap().set_len(256 << 20).unwrap();
    let (base, middle) = (path("base"), path("middle"));
    let words = ["convert", "-f", "raw", "-O", "qcow2", "-B", base.as_str(), "-F", "raw"];
    qemu_img(&[&words[..], &[content.as_str(), middle.as_str()]].concat()).await;
    let mut spec = lab.spec("streams", 1);
    spec.disk = Some(DiskSpec { path: middle.clone(), format: DiskFormat::Qcow2 });
    let mut vm = lab.qemu.boot(spec, BootMemory::Anonymous).await.unwrap();
    until_it_says(vm.as_mut(), " 3 ok").await;
    let top = overlay("top", "qcow2", "middle").await;
    vm.pivot_disk(&top).await.unwrap();

    let next = overlay("next", "qcow2", "top").await;
    let abandoned = tokio::time::timeout(Duration::from_millis(30), vm.stream_disk(&base)).await;
    assert!(abandoned.is_err(), "it takes a while");
    vm.pivot_disk(&next).await.unwrap();
    // The copying was ended, or on a machine that is slow to everyone else it had come to its end.
    let chain = vm.disk_chain().await.unwrap();
    assert_eq!(chain[..2], [next.path.clone(), top.path.clone()]);
    assert!(chain[2..] == [middle.clone(), base.clone()] || chain[2..] == [base.clone()], "{chain:?}");
    vm.stream_disk(&base).await.unwrap();
    assert_eq!(vm.disk_chain().await.unwrap(), [next.path.clone(), base.clone()]);
    // What it does not need any more is closed, and what lies below the top cannot be written.
    let open = support::open_files(vm.as_ref()).into_iter().filter(|(path, _)| path.starts_with(&lab.root));
    let open: BTreeSet<(Utf8PathBuf, bool)> = open.collect();
    assert!(open.contains(&(next.path.clone(), true)) && !open.contains(&(base.clone(), true)), "{open:?}");
    assert!(!open.iter().any(|(path, _)| [&middle, &top.path].contains(&path)), "{open:?}");
    std::fs::remove_file(&middle).unwrap();
    std::fs::remove_file(&top.path).unwrap();
    let said = vm.console().await.lines().count();
    let begin = Instant::now();
    while vm.console().await.lines().count() < said + 5 {
        assert!(begin.elapsed() < BOUND, "it goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!vm.console().await.contains("BAD"));
    assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    qemu_img(&["check", "-q", next.path.as_str()]).await;
}

/// What the guest wrote: the number of each tick, in a cluster of its own.
fn ticks_on(disk: &[u8]) -> Vec<u64> {
    let number = |cluster: &[u8]| {
        let end = cluster.iter().position(|byte| *byte == b'\n')?;
        std::str::from_utf8(&cluster[..end]).ok()?.parse().ok()
    };
    let mut found: Vec<u64> = disk.chunks(1 << 16).filter_map(number).collect();
    found.sort_unstable();
    found
}

async fn qemu_img(words: &[&str]) {
    let done = tokio::process::Command::new("qemu-img").args(words).output();
    let done = tokio::time::timeout(BOUND, done).await.unwrap().unwrap();
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[tokio::test]
async fn a_snapshot_of_a_clone_follows_what_it_has_written() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    let template = lab.template(2).await;
    let mut files = template.clone();
    let mut before = 0;
    for generation in 0..3 {
        let begin = Instant::now();
        let mut vm = lab.qemu.restore(lab.spec("clone", 2), &files).await.unwrap();
        let restored = begin.elapsed();
        vm.resume().await.unwrap();
        until_it_says(vm.as_mut(), "tick").await;
        let begin = Instant::now();
        vm.pause().await.unwrap();
        files = SnapshotFiles {
            memory: files.memory,
            state: lab.root.join(format!("state{generation}")),
            pages: Some(lab.root.join(format!("pages{generation}"))),
        };
        let statistics = vm.snapshot(&files).await.unwrap();
        let state = std::fs::metadata(&files.state).unwrap().len();
        eprintln!("restored in {restored:?}, saved in {:?}: {statistics:?}, state {state}", begin.elapsed());
        // All that it had is still there, and the whole memory is not.
        let memory_pages = (256 << 20) / 4096;
        assert!(statistics.pages >= before && statistics.pages < memory_pages / 4, "{statistics:?}");
        before = statistics.pages;
        assert_eq!(vm.stop().await.unwrap(), ExitReason::Stopped);
    }
    // The state of a machine that booted is another kind of stream: neither passes for the other.
    let mixed =
        [SnapshotFiles { pages: None, ..files.clone() }, SnapshotFiles { state: template.state, ..files }];
    for files in mixed {
        let error = lab.qemu.restore(lab.spec("mixed", 2), &files).await.map(drop).unwrap_err();
        assert!(matches!(error, VmmError::Exited { .. } | VmmError::Refused { .. }), "{error:?}");
    }
}
