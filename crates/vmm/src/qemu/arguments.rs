//! The command line of a QEMU: a pure function of what is to run.
//!
//! Paths are given in JSON wherever QEMU takes it, so that a comma in one is no separator. Names were
//! checked before (`validate`).

use std::os::fd::RawFd;

use camino::Utf8Path;
use serde_json::json;
use wrenn_types::Shape;

use super::disk_files::DiskFiles;
use crate::{Accelerator, VmmError, VmmResult, guest_kernel, launch::GUEST_MAC, process};

/// The machine under TCG: its interrupt controller and timers are all there, because that is with what
/// the guest's kernel comes up when four of them boot at once.
const TCG_MACHINE: &str = "microvm,pit=on,pic=on,rtc=on,acpi=on";
/// The machine under KVM: as QEMU has it.
const KVM_MACHINE: &str = "microvm,acpi=on";

/// How much of the console QEMU keeps for us.
pub(super) const CONSOLE_BYTES: usize = 64 * 1024;
/// The names of things inside QEMU, as commands refer to them.
pub(super) const CONSOLE: &str = "console";
pub(super) const DISK: &str = "disk";
/// The name of the device that the guest sees it as.
pub(super) const DISK_DEVICE: &str = "root";

/// Everything that decides the command line.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    pub(super) accelerator: Accelerator,
    pub(super) name: &'a str,
    pub(super) shape: Shape,
    pub(super) memory: Memory<'a>,
    pub(super) start: Start<'a>,
    pub(super) disk: Option<&'a DiskFiles>,
    pub(super) tap: Option<Tap<'a>>,
    /// A listening socket for commands.
    pub(super) control: Option<RawFd>,
    pub(super) console: Console,
}

/// What the guest's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory<'a> {
    Anonymous,
    /// The file is the memory.
    SharedFile(&'a Utf8Path),
    /// The file is what the memory starts as; it is never written.
    PrivateFile(&'a Utf8Path),
}

/// The TAP device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tap<'a> {
    /// QEMU opens the one of this name.
    Name(&'a str),
    /// It is open.
    Descriptor(RawFd),
}

/// How the machine begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start<'a> {
    Kernel {
        kernel: &'a Utf8Path,
        initramfs: &'a Utf8Path,
        command_line: &'a str,
    },
    /// From a saved state that it will be given, and stopped. A kernel is not loaded: it is in the
    /// memory already, and reading it again would cost a third of the restore and 20 MB of each clone.
    Saved(SavedState),
}

/// What the saved state is a stream of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SavedState {
    /// A whole migration: a section with the configuration, the devices, and a description of them all.
    Migration,
    /// `xen-save-devices-state`: the devices. QEMU has to be told, when it starts, that the other two are
    /// not there: without the former it refuses the state, without the latter it prints a warning.
    Devices,
}

/// Where the guest's console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Console {
    /// A ring in QEMU's memory. Nobody has to read it: a guest can neither fill a disk with it nor block
    /// because its reader is gone.
    Ring,
    /// A connected socket.
    Socket(RawFd),
}

/// The machine type, as it is part of the identity of a snapshot.
pub(super) fn machine_type(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Tcg => TCG_MACHINE,
        Accelerator::Kvm => KVM_MACHINE,
    }
}

/// Everything that QEMU can translate, less what is slower than its absence: each AVX instruction is a call
/// into C, and programs choose them wherever they see them; a fifth level of page tables is one more step of
/// every walk; a `rep movsb`, which a processor with fast string operations is asked to copy with, is
/// translated into a loop over single bytes.
const TCG_CPU: &str = "max,-avx,-avx2,-f16c,-fma,-la57,-erms";
/// The kernel's own number for "string instructions are good", which is no property of a CPU model: without
/// it memory is copied by plain moves. Copies between a guest's kernel and its programs, and so files and
/// streams, are twice as fast.
const REP_GOOD: u32 = 3 * 32 + 16;

/// The CPU that the guest sees.
pub(super) fn cpu_model(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Tcg => TCG_CPU,
        Accelerator::Kvm => "host",
    }
}

/// The kernel's command line.
///
/// `panic=-1 reboot=t` turns a panic and a reboot into a reset, at once: the microvm machine has neither
/// a keyboard controller nor a BIOS through which the kernel would try first, and the latter way it ends
/// in a loop in the firmware in one of three tries.
///
/// Where instructions are translated, nothing is speculated about, and what mitigates speculation is only more to
/// translate.
pub(super) fn kernel_command_line(tsc_khz: Option<u32>, more: &[String]) -> String {
    let translated = |khz| {
        let rate = format!("tsc_early_khz={khz}");
        ["tsc=reliable".to_owned(), rate, "mitigations=off".to_owned(), format!("clearcpuid={REP_GOOD}")]
    };
    let own = tsc_khz.map(translated);
    guest_kernel::command_line(&["reboot=t"], own.as_ref().map_or(&[], |words| &words[..]), more)
}

/// The words of a path that QEMU takes only as plain text, in an option of which it is all.
fn plain<'a>(field: &'static str, path: &'a Utf8Path) -> VmmResult<&'a str> {
    if path.as_str().contains(',') {
        return Err(VmmError::Spec { field, problem: format!("{path} holds a comma") });
    }
    Ok(path.as_str())
}

/// The arguments, without the program.
pub(super) fn arguments(launch: &Launch<'_>) -> VmmResult<Vec<String>> {
    let mut words = Vec::with_capacity(48);
    let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
    let memory = launch.shape.memory;

    option("-name", process::mark(launch.name));
    // No merging of equal pages: it would tell one guest what is in the memory of another.
    let machine = machine_type(launch.accelerator);
    let described = match launch.start {
        Start::Saved(SavedState::Devices) => ",suppress-vmdesc=on",
        _ => "",
    };
    option(
        "-machine",
        format!("{machine},memory-backend=memory,dump-guest-core=off,mem-merge=off{described}"),
    );
    option(
        "-accel",
        match launch.accelerator {
            Accelerator::Tcg => "tcg,tb-size=64".to_owned(),
            Accelerator::Kvm => "kvm".to_owned(),
        },
    );
    option("-cpu", cpu_model(launch.accelerator).to_owned());
    option("-smp", launch.shape.vcpus.get().to_string());
    option("-m", format!("{}M", memory.get()));
    option(
        "-object",
        match launch.memory {
            Memory::Anonymous => {
                json!({"qom-type": "memory-backend-ram", "id": "memory", "size": memory.bytes()})
            }
            Memory::SharedFile(path) => memory_file(memory.bytes(), path, true),
            Memory::PrivateFile(path) => memory_file(memory.bytes(), path, false),
        }
        .to_string(),
    );

    option("-display", "none".into());
    // Whoever holds the guest's reason to end reads it before QEMU goes: see `machine`.
    option("-action", "reboot=shutdown,shutdown=pause".into());
    // All of QEMU's filters: no other program, no other user, no change of its scheduling.
    option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());

    if let Some(descriptor) = launch.control {
        option("-chardev", format!("socket,id=control,fd={descriptor},server=on,wait=off"));
        option("-mon", "chardev=control,mode=control".into());
    }
    option(
        "-chardev",
        match launch.console {
            Console::Ring => format!("ringbuf,id={CONSOLE},size={CONSOLE_BYTES}"),
            Console::Socket(descriptor) => format!("socket,id={CONSOLE},fd={descriptor}"),
        },
    );
    option("-serial", format!("chardev:{CONSOLE}"));

    if let Some(disk) = launch.disk {
        for handed in disk.options() {
            option("-add-fd", handed);
        }
        option("-blockdev", disk.description(DISK).to_string());
        // An error of the host's disk is the guest's to see. The default would stop the guest when the
        // host's disk is full, and nobody would be told.
        option(
            "-device",
            format!("virtio-blk-device,id={DISK_DEVICE},drive={DISK},werror=report,rerror=report"),
        );
    }
    if let Some(tap) = launch.tap {
        let which = match tap {
            Tap::Name(name) => format!("ifname={name},script=no,downscript=no"),
            Tap::Descriptor(descriptor) => format!("fd={descriptor}"),
        };
        option("-netdev", format!("tap,id=network,{which}"));
        option("-device", format!("virtio-net-device,netdev=network,mac={GUEST_MAC}"));
    }
    match launch.start {
        Start::Kernel { kernel, initramfs, command_line } => {
            option("-kernel", plain("kernel", kernel)?.to_owned());
            option("-initrd", plain("initramfs", initramfs)?.to_owned());
            option("-append", command_line.to_owned());
        }
        Start::Saved(SavedState::Migration) => option("-incoming", "defer".into()),
        Start::Saved(SavedState::Devices) => {
            option("-incoming", "defer".into());
            option("-global", "migration.send-configuration=off".into());
        }
    }
    words.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
    if let Start::Saved(_) = launch.start {
        // The saved state says whether the guest was running; this says that it is not to.
        words.push("-S".to_owned());
    }
    Ok(words)
}

fn memory_file(bytes: u64, path: &Utf8Path, share: bool) -> serde_json::Value {
    json!({
        "qom-type": "memory-backend-file", "id": "memory", "size": bytes, "mem-path": path, "share": share,
        "dump": false, "merge": false, "prealloc": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskFormat, DiskSpec};
    use wrenn_types::{MemoryMib, Vcpus};

    fn launch<'a>(memory: Memory<'a>, start: Start<'a>) -> Launch<'a> {
        Launch {
            accelerator: Accelerator::Tcg,
            name: "wrenn-a-b",
            shape: Shape { vcpus: Vcpus::new(2).unwrap(), memory: MemoryMib::new(256).unwrap() },
            memory,
            start,
            disk: None,
            tap: None,
            control: Some(7),
            console: Console::Ring,
        }
    }

    /// The value after an option, of those options that appear once.
    fn value<'a>(words: &'a [String], option: &str) -> Option<&'a str> {
        let at = words.iter().position(|word| word == option)?;
        words.get(at + 1).map(String::as_str)
    }

    #[test]
    fn the_kernel_is_told_the_rate_under_tcg_only() {
        let more = ["a=1".to_owned()];
        let tcg = kernel_command_line(Some(2_600_000), &more);
        let always = kernel_command_line(None, &[]);
        assert!(always.starts_with("console=ttyS0 quiet panic=-1 reboot=t "));
        assert!(!always.contains("tsc") && !always.contains("mitigations"));
        assert_eq!(
            tcg,
            format!("{always} tsc=reliable tsc_early_khz=2600000 mitigations=off clearcpuid=112 a=1")
        );
    }

    #[test]
    fn a_boot_shares_its_memory_and_loads_a_kernel() {
        let start = Start::Kernel { kernel: "/k".into(), initramfs: "/i".into(), command_line: "quiet" };
        let words = arguments(&launch(Memory::SharedFile("/m,x".into()), start)).unwrap();
        let memory: serde_json::Value = serde_json::from_str(value(&words, "-object").unwrap()).unwrap();
        assert_eq!((&memory["share"], &memory["mem-path"]), (&json!(true), &json!("/m,x")));
        assert_eq!(memory["size"], json!(256_u64 << 20));
        assert_eq!(value(&words, "-kernel"), Some("/k"));
        assert_eq!(value(&words, "-name"), Some("guest=wrenn-a-b"));
        assert!(!words.contains(&"-S".to_owned()) && !words.contains(&"-incoming".to_owned()));
    }

    #[test]
    fn a_restore_is_private_stopped_and_without_a_kernel() {
        let words = arguments(&launch(Memory::PrivateFile("/m".into()), Start::Saved(SavedState::Migration)))
            .unwrap();
        let memory: serde_json::Value = serde_json::from_str(value(&words, "-object").unwrap()).unwrap();
        assert_eq!(memory["share"], json!(false));
        assert!(words.contains(&"-S".to_owned()));
        assert_eq!(value(&words, "-incoming"), Some("defer"));
        assert_eq!(value(&words, "-kernel"), None);
        assert_eq!(value(&words, "-global"), None);
        let devices = Start::Saved(SavedState::Devices);
        let words = arguments(&launch(Memory::PrivateFile("/m".into()), devices)).unwrap();
        assert_eq!(value(&words, "-global"), Some("migration.send-configuration=off"));
        assert!(words.contains(&"-S".to_owned()));
    }

    #[test]
    fn a_path_is_never_more_than_a_path() {
        let start = Start::Kernel { kernel: "/k,append=x".into(), initramfs: "/i".into(), command_line: "" };
        assert!(arguments(&launch(Memory::Anonymous, start)).is_err());
        let disk = DiskSpec { path: "/d\",x".into(), format: DiskFormat::Raw };
        let description = DiskFiles::by_path(&disk).description(DISK);
        assert_eq!(description["file"]["filename"], json!("/d\",x"));
        assert_eq!(description["driver"], json!("raw"));
    }
}
