//! A guest that counts, made from the guest kernel and busybox.
#![allow(clippy::print_stdout, clippy::unwrap_used)]
#![allow(dead_code, reason = "each test program has one VMM")]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    num::NonZeroU64,
    path::Path,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_host_linux::process::{Process, find_by_argument};
use wrenn_vmm::{
    AdoptedMachine, BootMemory, DiskRate, ExitReason, GuestBundle, MachineSpec, SnapshotFiles, Vm, Vmm,
};

/// What the guest does: see `wrenn_vmm::conformance`. The command line decides how it ends.
///
/// Two files in its memory take turns: one gets new content, and the other one becomes zero in the same pages.
/// On the disk, if it has one, each tick writes its number to a cluster of its own, and reads what was written
/// three ticks ago, from the disk and not from the cache.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
exec > /dev/console 2>&1
for module in virtio_ring virtio virtio_mmio virtio_blk; do
    [ ! -e /modules/$module.ko ] || /bin/busybox insmod /modules/$module.ko
done
echo "wrenn-guest ready"
case "$(/bin/busybox cat /proc/cmdline)" in
*conformance=poweroff*) /bin/busybox poweroff -f ;;
*conformance=reboot*) /bin/busybox reboot -f ;;
*conformance=panic*) exit 1 ;;
esac
token=$(/bin/busybox od -An -N8 -tx8 /dev/urandom)
n=0 old=/new new=/old held= found= state=ok
while true; do
    n=$((n + 1))
    [ "$held" = "$found" ] || state=BAD
    echo "tick" $token $n $state
    /bin/busybox dd if=/dev/urandom of=$new bs=64k count=1 conv=notrunc 2>/dev/null
    /bin/busybox dd if=/dev/zero of=$old bs=64k count=1 conv=notrunc 2>/dev/null
    held=$(/bin/busybox md5sum $new $old)
    /bin/busybox usleep 10000
    found=$(/bin/busybox md5sum $new $old)
    swap=$new new=$old old=$swap
    if [ -b /dev/vda ]; then
        echo $n | /bin/busybox dd of=/dev/vda bs=512 seek=$((n % 64 * 128)) conv=notrunc,sync,fsync 2>/dev/null
        echo 1 > /proc/sys/vm/drop_caches
        was=$((n - 3))
        if [ $was -gt 0 ]; then
            read=$(/bin/busybox dd if=/dev/vda bs=512 skip=$((was % 64 * 128)) count=1 2>/dev/null \
                | /bin/busybox head -n 1)
            [ "$read" = $was ] || state=BAD
        fi
    fi
done
"#;

/// Says that something was not tested, to the test's own output: whoever counts tests has to know whose it is.
pub(crate) fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// How long a machine may take for a few ticks of which each waits for its disk for a second.
const SLOW_BOUND: Duration = Duration::from_secs(180);

/// Machines whose disk has a rate, and one without: it is each machine's own, whatever it is restored from.
pub(crate) async fn a_disk_has_its_rate(
    vmm: &dyn Vmm,
    spec: impl Fn(&str, DiskRate) -> MachineSpec,
    files: &SnapshotFiles,
) {
    // A tick writes, and from the fourth on reads, too.
    let slow = DiskRate { bytes: None, operations: NonZeroU64::new(2) };
    let eight_ticks = async |vm: &mut dyn Vm| {
        let ticks = |console: &str| console.matches("tick").count();
        let (before, begin) = (ticks(&vm.console().await), Instant::now());
        while ticks(&vm.console().await) < before + 8 {
            assert!(begin.elapsed() < SLOW_BOUND, "{}", vm.console().await);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        begin.elapsed()
    };
    let mut vm = vmm.boot(spec("bounded", slow), BootMemory::Shared(&files.memory)).await.unwrap();
    let booted = eight_ticks(vm.as_mut()).await;
    vm.pause().await.unwrap();
    vm.snapshot(files).await.unwrap();
    vm.stop().await.unwrap();
    let restored = async |name: &str, rate| {
        let mut vm = vmm.restore(spec(name, rate), files).await.unwrap();
        vm.resume().await.unwrap();
        let took = eight_ticks(vm.as_mut()).await;
        vm.stop().await.unwrap();
        took
    };
    let free = restored("free", DiskRate::default()).await;
    let bounded = restored("bounded-again", slow).await;
    // What each machine has at its start may be spent at once.
    let least = Duration::from_secs(3);
    assert!(booted >= least && bounded >= least && free < bounded, "{booted:?} {free:?} {bounded:?}");
}

/// Ends a machine from outside.
pub(crate) async fn kill(vm: &dyn Vm) {
    Process::open(vm.pid().unwrap()).unwrap().kill_and_wait().await.unwrap();
}

/// The same of a machine that nobody owns.
pub(crate) async fn kill_by_name(name: &str) {
    let mark = format!("guest={name}");
    let found = find_by_argument(&mark).unwrap().into_iter().find(|found| found.argument == mark);
    found.unwrap().process.kill_and_wait().await.unwrap();
}

/// Why a machine ended, once it has.
pub(crate) async fn ended(vm: &dyn Vm, bound: Duration) -> ExitReason {
    let mut exit = vm.exit();
    let told = tokio::time::timeout(bound, exit.wait_for(Option::is_some)).await.unwrap();
    told.unwrap().clone().unwrap()
}

/// What is known of a machine without a disk when its owner is gone.
pub(crate) fn adopted(spec: MachineSpec) -> AdoptedMachine {
    let MachineSpec { name, run_dir, .. } = spec;
    AdoptedMachine { name, run_dir, has_disk: false, memory: None, pid_hint: None }
}

/// A line of what the kernel says of a process.
pub(crate) fn status(vm: &dyn Vm, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{}/status", vm.pid().unwrap())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The files that a process has open, and whether it may write them.
pub(crate) fn open_files(vm: &dyn Vm) -> Vec<(Utf8PathBuf, bool)> {
    let process = Utf8PathBuf::from(format!("/proc/{}", vm.pid().unwrap()));
    let number = |entry: camino::Utf8DirEntry| entry.file_name().to_owned();
    let numbers = process.join("fd").read_dir_utf8().unwrap().flatten().map(number);
    let file = |number: String| {
        let info = std::fs::read_to_string(process.join("fdinfo").join(&number)).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
        let path = process.join("fd").join(&number).read_link_utf8().ok()?;
        Some((path, u32::from_str_radix(flags, 8).unwrap() & 3 != 0))
    };
    numbers.filter_map(file).collect()
}

/// Makes sure that machines are users of their own, from `first` on, who have no rights.
pub(crate) fn each_is_a_user(machines: &[&dyn Vm], first: u32) {
    let users: BTreeSet<String> = machines.iter().map(|vm| status(*vm, "Uid")).collect();
    assert_eq!(users.len(), machines.len(), "each has a user of its own: {users:?}");
    for vm in machines {
        let user = status(*vm, "Uid").split(' ').next().unwrap().to_owned();
        assert!(user.parse::<u32>().unwrap() >= first, "{user}");
        for ids in ["Uid", "Gid"] {
            assert_eq!(status(*vm, ids), [user.as_str(); 4].join(" "));
        }
        assert_eq!(status(*vm, "Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(*vm, set), "0000000000000000", "{set}");
        }
        assert_eq!((status(*vm, "NoNewPrivs").as_str(), status(*vm, "Seccomp").as_str()), ("1", "2"));
    }
}

/// In which form a VMM takes its kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernel {
    /// A bzImage. `WRENN_KERNEL` names one of your own.
    Compressed,
    /// A vmlinux.
    Uncompressed,
}

/// The guest's kernel and an initramfs in `directory`; or why there is none.
pub(crate) fn counting_guest(directory: &Utf8Path, kernel: Kernel) -> Result<GuestBundle, String> {
    let kernel = match kernel {
        Kernel::Compressed => compressed(),
        Kernel::Uncompressed => built("vmlinux"),
    };
    let kernel =
        kernel.ok_or("no guest kernel: `make images` fetches it, WRENN_KERNEL names another for QEMU")?;
    let busybox =
        wrenn_host_linux::process::find_program("busybox").ok_or("no busybox: package busybox-static")?;
    let busybox = std::fs::read(&busybox).map_err(|error| format!("{}: {error}", busybox.display()))?;
    let initramfs = directory.join("initramfs");
    // An archive that follows another one adds to it: the product's has the modules of the same kernel.
    let with_modules = std::fs::read(kernel.with_file_name("initramfs.img")).unwrap_or_default();
    let mut archive = Archive { bytes: with_modules, entries: 1 << 20 };
    archive.align();
    for name in ["bin", "dev", "proc"] {
        archive.entry(name, 0o040_755, (0, 0), b"");
    }
    archive.entry("dev/console", 0o020_600, (5, 1), b"");
    archive.entry("dev/urandom", 0o020_644, (1, 9), b"");
    archive.entry("bin/busybox", 0o100_755, (0, 0), &busybox);
    archive.entry("init", 0o100_755, (0, 0), INIT.as_bytes());
    std::fs::write(&initramfs, archive.end()).map_err(|error| error.to_string())?;
    Ok(GuestBundle { id: "counting".to_owned(), kernel, initramfs })
}

fn compressed() -> Option<Utf8PathBuf> {
    let named = std::env::var("WRENN_KERNEL").ok().map(Utf8PathBuf::from);
    named.filter(|path| path.is_file()).or_else(|| built("vmlinuz"))
}

/// A file of the guest bundle.
fn built(name: &str) -> Option<Utf8PathBuf> {
    // Not by way of the directory of this crate, which is not there in the lab.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2)?;
    let path = repository.join("target/images/guest").join(name);
    Utf8PathBuf::from_path_buf(path).ok().filter(|path| path.is_file())
}

/// The format of an initramfs: `cpio -H newc`.
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let mut header = "070701".to_owned();
        let length = u32::try_from(content.len()).unwrap();
        let name_length = u32::try_from(name.len() + 1).unwrap();
        let (inode, links) = (self.entries, 1);
        for field in [inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_length, 0] {
            write!(header, "{field:08x}").unwrap();
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }
}

/// What the threads of a process wait for, and how many page faults of it nobody has served: for the message of a test
/// that has waited too long.
pub(crate) fn standing(process: Option<u32>) -> String {
    let Some(pid) = process else { return "no process".to_owned() };
    let mut text = String::new();
    for task in entries(&format!("/proc/{pid}/task")) {
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
        let stack = read("stack").replace('\n', " ");
        let _ = writeln!(text, "{}: {} {stack}", read("comm").trim(), read("wchan"));
    }
    for descriptor in entries(&format!("/proc/{pid}/fd")) {
        let leads_to = std::fs::read_link(&descriptor).unwrap_or_default();
        if leads_to.to_string_lossy().contains("userfaultfd") {
            let number = descriptor.file_name().unwrap().to_string_lossy().into_owned();
            let told = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
            let _ = writeln!(text, "faults: {}", told.replace('\n', " "));
        }
    }
    text
}

fn entries(directory: &str) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
