//! The QEMU driver with real machines. Without QEMU, a guest kernel or busybox it says what it skipped.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::Mutex;
use wrenn_host_linux::process::Process;
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    Accelerator, DiskFormat, DiskSpec, ExitReason, GuestBundle, MachineSpec, SnapshotFiles, Vm, Vmm,
    VmmError,
    conformance::{self, Subject},
    qemu::{AcceleratorChoice, Qemu, QemuOptions},
};

const BOUND: Duration = Duration::from_secs(120);

/// One test at a time: each has several machines, and some count processes and files.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Lab {
    qemu: Qemu,
    guest: GuestBundle,
    root: Utf8PathBuf,
    _directory: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        let guest = match support::counting_guest(&root) {
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
            Ok(qemu) => Some(Self { qemu, guest, root, _directory: directory }),
            Err(error) => {
                support::skipped(&error.to_string());
                None
            }
        }
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
            network: None,
            kernel_arguments: Vec::new(),
            keep_open: Vec::new(),
        }
    }

    /// A template of the counting guest, saved and stopped.
    async fn template(&self, vcpus: i64) -> SnapshotFiles {
        let files = SnapshotFiles { memory: self.root.join("memory"), state: self.root.join("state") };
        let mut vm = self.qemu.boot(self.spec("template", vcpus), Some(&files.memory)).await.unwrap();
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

    async fn kill(&self, vm: &dyn Vm, _name: &str) {
        Process::open(vm.pid().unwrap()).unwrap().kill_and_wait().await.unwrap();
    }
}

#[tokio::test]
async fn conforms() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(lab) = Lab::new().await else { return };
    conformance::run(&lab).await;
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
    let mut vm = lab.qemu.boot(spec, None).await.unwrap();
    vm.stop().await.unwrap();
    // And what is no qcow2 file is refused as one, in QEMU's words.
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut spec = lab.spec("qcow2", 1);
    spec.disk = Some(DiskSpec { path, format: DiskFormat::Qcow2 });
    let error = lab.qemu.boot(spec, None).await.map(|_| ()).unwrap_err();
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
    let mut vm = lab.qemu.boot(lab.spec("full", 1), Some(&memory)).await.unwrap();
    until_it_says(vm.as_mut(), "tick").await;
    vm.pause().await.unwrap();
    let full = SnapshotFiles { memory: memory.clone(), state: "/dev/full".into() };
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
    let mut vm = lab.qemu.boot(lab.spec("console", 1), None).await.unwrap();
    until_it_says(vm.as_mut(), "tick").await;
    let text = vm.console().await;
    assert!(text.len() <= 64 * 1024);
    let log = std::fs::read_to_string(lab.root.join("console/console.log")).unwrap();
    assert!(log.contains("wrenn-guest ready"));
    // A process that is asked to end by a signal says so.
    Process::open(vm.pid().unwrap()).unwrap().signal(wrenn_host_linux::process::Signal::TERM).unwrap();
    let mut exit = vm.exit();
    let reason = tokio::time::timeout(BOUND, exit.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert_eq!(reason, Some(ExitReason::VmmKilled { signal: 15 }));
}
