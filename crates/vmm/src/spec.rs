//! The vocabulary of the drivers: what a machine is made of. Plain data.

use std::os::fd::OwnedFd;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use wrenn_types::Shape;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor, through the kernel.
    Kvm,
    /// Translation in software.
    Tcg,
}

/// What a driver can do beyond the seven things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Memory can be served by a page fault handler.
    pub supports_uffd: bool,
    /// A snapshot can hold only what changed.
    pub supports_diff: bool,
}

/// Which program this is: a snapshot of another one is refused by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmIdentity {
    /// `qemu`, `firecracker`, `fake`.
    pub name: String,
    /// As the program prints it.
    pub version: String,
    /// The machine type and its options.
    pub machine: String,
    /// The CPU model that the guest sees.
    pub cpu_model: String,
    /// What runs it.
    pub accelerator: Accelerator,
}

/// Kernel and initramfs: one versioned bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestBundle {
    /// Hash of everything in it.
    pub id: String,
    /// A bzImage, or a vmlinux where the driver takes one.
    pub kernel: Utf8PathBuf,
    /// The compressed archive with envd and the virtio modules.
    pub initramfs: Utf8PathBuf,
}

/// How the bytes of a disk are laid out on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The bytes themselves.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// The root disk. The guest sees it as `/dev/vda`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// A regular file, or a block device for `Raw`.
    pub path: Utf8PathBuf,
    /// Its format; it is never guessed from the content, which a guest can write.
    pub format: DiskFormat,
}

/// The network device. The guest sees it as `eth0` with the MAC that every guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Path of the network namespace in which the VMM runs (`/run/netns/…`).
    pub namespace: Utf8PathBuf,
    /// Name of the TAP device there. It exists before the VMM starts.
    pub tap: String,
}

/// One machine, before it exists.
#[derive(Debug)]
pub struct MachineSpec {
    /// What marks the process as its owner's: appears in the command line and nowhere else.
    /// Letters, digits and dashes only.
    pub name: String,
    /// A directory of this machine alone, with a short path: sockets and logs go there. It exists.
    pub run_dir: Utf8PathBuf,
    /// CPUs and memory.
    pub shape: Shape,
    /// Kernel and initramfs.
    pub guest: GuestBundle,
    /// The root disk; none for a guest that lives in its initramfs.
    pub disk: Option<DiskSpec>,
    /// The network; none for a guest without one.
    pub network: Option<NetworkSpec>,
    /// Words to add to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Open files that the VMM process keeps for as long as it lives (the lock of its slot).
    pub keep_open: Vec<OwnedFd>,
}

/// The files of a snapshot, in one directory of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFiles {
    /// Guest memory. The machine that is to be snapshotted with little cost boots with its memory in
    /// this file, shared; a restored machine maps it privately and never changes it.
    pub memory: Utf8PathBuf,
    /// The state of the devices.
    pub state: Utf8PathBuf,
}

/// Why a VMM process is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum ExitReason {
    /// [`crate::Vm::stop`] was called.
    Stopped,
    /// The guest powered itself off or rebooted.
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The process ended with an error: its code and the last lines of what it said.
    VmmFailed {
        /// The exit code.
        code: i32,
        /// The end of its standard error, bounded.
        stderr: String,
    },
    /// The process was killed by a signal that was not ours.
    VmmKilled {
        /// The signal's number.
        signal: i32,
    },
}
