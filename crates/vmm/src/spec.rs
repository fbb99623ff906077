//! The vocabulary of the drivers: what a machine is made of. Plain data.

use std::{num::NonZeroU64, os::fd::OwnedFd};

use camino::{Utf8Path, Utf8PathBuf};
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

impl Accelerator {
    /// The word for it in what is shown and kept.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What a driver can do beyond the seven things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Memory can be served by a page fault handler.
    pub supports_uffd: bool,
    /// A snapshot can hold only what changed.
    pub supports_diff: bool,
    /// A file can be put on top of a disk, and a chain of them copied into its top.
    pub supports_overlays: bool,
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

impl VmmIdentity {
    /// This identity, with the host's processor as `present` names it where this one, of an earlier version, names only
    /// that it was the host's. Nothing is known of it then, and the host is most likely still the same.
    #[must_use]
    pub fn with_processor_of(mut self, present: &Self) -> Self {
        let has_word =
            present.cpu_model.strip_prefix(&self.cpu_model).is_some_and(|rest| rest.starts_with(' '));
        if self.accelerator == Accelerator::Kvm && self.accelerator == present.accelerator && has_word {
            self.cpu_model.clone_from(&present.cpu_model);
        }
        self
    }
}

/// Kernel and initramfs: one versioned bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestBundle {
    /// Hash of everything in it.
    pub id: String,
    /// A bzImage for QEMU, the vmlinux that is in it for Firecracker.
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
    /// What differs from an image, as the kernel's snapshots keep it. It is no disk of a machine: that is the
    /// device that the kernel makes of both, which is raw.
    #[serde(rename = "dm-snapshot")]
    DmSnapshot,
}

/// The root disk. The guest sees it as `/dev/vda`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// A regular file, or a block device for `Raw`.
    pub path: Utf8PathBuf,
    /// Its format; it is never guessed from the content, which a guest can write.
    pub format: DiskFormat,
}

/// How fast a machine may use its root disk, reads and writes counted together. None is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskRate {
    /// Bytes per second.
    pub bytes: Option<NonZeroU64>,
    /// Operations per second.
    pub operations: Option<NonZeroU64>,
}

impl DiskRate {
    /// Whether nothing is bounded.
    #[must_use]
    pub fn is_free(&self) -> bool {
        *self == Self::default()
    }
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
    /// What the files of the disk may stand on, in any order: of what a file's header says that it stands on, a confined VMM
    /// is given only these.
    pub disk_bases: Vec<DiskSpec>,
    /// How fast it may use its disk. It is this machine's, and not that of what it is restored from.
    pub disk_rate: DiskRate,
    /// The network; none for a guest without one.
    pub network: Option<NetworkSpec>,
    /// Words to add to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Open files that the VMM process keeps for as long as it lives (the lock of its slot).
    pub keep_open: Vec<OwnedFd>,
    /// The control group in which the VMM process is from before its program runs: its `cgroup.procs`, opened for
    /// writing. None: that of whoever starts it.
    pub control_group: Option<OwnedFd>,
    /// The user and group that the VMM is confined as, which no other process has: it sees nothing of the host but what its
    /// machine is made of, and has no rights. None: it runs as whoever starts it, and sees what they see.
    pub user: Option<u32>,
}

/// What the memory of a machine that boots is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootMemory<'a> {
    /// No file: such a machine cannot be snapshotted.
    Anonymous,
    /// This file, shared, so that a later [`crate::Vm::snapshot`] into the same file copies nothing. The file is made
    /// by the driver and must not exist.
    Shared(&'a Utf8Path),
    /// What this file holds, which is zeros, mapped privately. The file is there, as long as the memory, and never
    /// changes. To the host the machine is as one that was restored from it: what differs is the pages of a
    /// snapshot, as often as one likes.
    Zeros(&'a Utf8Path),
}

/// The files of a snapshot, in one directory of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFiles {
    /// Guest memory. The machine that is to be snapshotted with little cost boots with its memory in
    /// this file, shared; a restored machine maps it privately and never changes it.
    pub memory: Utf8PathBuf,
    /// The state of the devices.
    pub state: Utf8PathBuf,
    /// The pages that differ from `memory`: none for the snapshot of a machine whose memory the file is, and
    /// always there for the snapshot of a machine that maps it privately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Utf8PathBuf>,
}

/// What a snapshot wrote beside the state of the devices: zeros where the memory is a file already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SnapshotStatistics {
    /// How many pages may differ from the memory file. Those that are zero are not among them where that file
    /// is nothing but a hole.
    pub pages: u64,
    /// How many of these are zero, and so have no content in the file.
    pub zero_pages: u64,
    /// How many bytes were written to [`SnapshotFiles::pages`].
    pub bytes_written: u64,
}

/// A machine that an earlier process started, and what is known of it: see [`crate::Vmm::adopt`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedMachine {
    /// Its [`MachineSpec::name`].
    pub name: String,
    /// Its [`MachineSpec::run_dir`].
    pub run_dir: Utf8PathBuf,
    /// Whether it has a root disk.
    pub has_disk: bool,
    /// The [`SnapshotFiles::memory`] that a restored machine maps, or the file of [`BootMemory::Zeros`]. None for one
    /// that booted otherwise, which cannot be snapshotted once it was adopted.
    pub memory: Option<Utf8PathBuf>,
    /// The process id that it had when it was started. It saves a search, and is only believed when the
    /// process has the name.
    pub pid_hint: Option<u32>,
}

/// Why a VMM process is gone.
///
/// Of a process that was [adopted](crate::Vmm::adopt) the kernel tells the end and not the exit code, which is
/// its parent's to know. What [`crate::Vm::stop`] and the guest did is known all the same, also when the guest
/// shut down while nobody watched; any other end is a [`ExitReason::VmmFailed`] with code -1 and a text that
/// says so, be it a crash, a signal, or the kernel's need of memory.
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
        /// The exit code; -1 when it is not known.
        code: i32,
        /// The end of its standard error, bounded.
        stderr: String,
    },
    /// The process was killed by a signal that was not ours.
    VmmKilled {
        /// The signal's number.
        signal: i32,
    },
    /// The process that served its memory ended, and the machine was ended for that.
    Pager {
        /// The end of what that process said, bounded; nothing, if it was killed.
        said: String,
    },
}

impl ExitReason {
    /// The end of an adopted process that neither we nor its guest caused.
    pub(crate) fn of_unknown_cause() -> Self {
        let stderr = "it was adopted: how it ended is not known".to_owned();
        Self::VmmFailed { code: -1, stderr }
    }
}
