//! Firecracker on KVM: the driver for production.
//!
//! - [`Firecracker::detect`]: which Firecracker (`probe`).
//! - `requests`, `api`: what is asked of it, and how.
//! - `launch`: from a description to a process that answers.
//! - `adopt`: to a process that an earlier life of ours started.
//! - `jail`: where it is confined.
//! - `machine`: one machine, the [`Vm`].
//! - `memory`: the files of its snapshots.
//! - `monitor`: the task that owns the process and tells why it ended. `spool`: what it says.
//!
//! # How a machine begins
//! ```text
//!  launch   directory: FIFOs, link to the disk, marks ─► firecracker --id NAME ─► its socket appears ─► connected
//!  boot     machine-config (track_dirty_pages) ─ boot-source ─ serial ─ drives/root ─ network-interfaces/eth0 ─ InstanceStart
//!  restore  serial ─ snapshot/load (File or Uffd, track_dirty_pages, resume_vm: false) ─► pages of the snapshot ─► paused
//! ```
//!
//! # Snapshots
//! The memory of a machine that boots is anonymous, and is written to the file of the base by its one snapshot. A clone maps that
//! file privately, as with QEMU, so that what only it has is known from the kernel; and its pages are written into
//! the process before its guest runs. Firecracker's own record of what was written is used for machines that booted
//! alone: see `memory`. With [`MemoryBackend::Uffd`] the memory of a clone is anonymous, and served by a [`pager`](crate::pager).
//!
//! # What differs from QEMU
//! - It has no layers of disks ([`Capabilities::supports_overlays`]): a disk is one file or device.
//! - A guest cannot power off. Its kernel halts, and is ended for it: see `monitor`.
//! - A guest that shuts down while nobody owns it takes the process with it: there is nothing to adopt then.
//!
//! # How Firecracker is confined
//! Its seccomp filters are on, it is in the network namespace and the control group of its sandbox, without environment, with no open file but
//! those it needs, and its console fills no disk. Where the machine has a user ([`MachineSpec::user`]), Firecracker is
//! started by its jailer, in a root, a namespace of processes and as a user of its own: see `jail`. Without one it runs
//! as whoever starts it, and sees the host's files.

mod adopt;
mod api;
mod jail;
mod launch;
mod machine;
mod memory;
mod monitor;
mod probe;
mod requests;
mod spool;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};

pub use self::probe::{FirecrackerOptions, MemoryBackend, is_known};
use self::{
    jail::Begin,
    machine::{Backing, Boot, Written},
};
use crate::{
    AdoptedMachine, BootMemory, Capabilities, DiskFormat, MachineSpec, SnapshotFiles, Vm, Vmm, VmmError,
    VmmIdentity, VmmResult,
    files::{MemoryFile, readable},
    guest_kernel,
    launch::{ended, saved_pages},
    validate,
};

/// The driver.
#[derive(Debug)]
pub struct Firecracker {
    programs: Programs,
    identity: VmmIdentity,
    memory: MemoryBackend,
}

/// What is run.
#[derive(Debug)]
struct Programs {
    firecracker: Utf8PathBuf,
    /// None where machines are not to be jailed.
    jailer: Option<Utf8PathBuf>,
}

impl Firecracker {
    /// The program that is used.
    #[must_use]
    pub fn program(&self) -> &Utf8Path {
        &self.programs.firecracker
    }
}

#[async_trait]
impl Vmm for Firecracker {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { supports_uffd: true, supports_diff: true, supports_overlays: false }
    }

    async fn boot(&self, spec: MachineSpec, memory: BootMemory<'_>) -> VmmResult<Box<dyn Vm>> {
        check(&spec)?;
        let (kernel, initramfs) = (spec.guest.kernel.clone(), spec.guest.initramfs.clone());
        readable(&kernel)?;
        readable(&initramfs)?;
        let mut made = None;
        match memory {
            BootMemory::Anonymous => {}
            BootMemory::Shared(path) => made = Some(MemoryFile::create(path, spec.shape.memory.bytes())?),
            BootMemory::Zeros(path) => validate::snapshot_memory(path, spec.shape)?,
        }
        let command_line = kernel_command_line(&spec.kernel_arguments);
        let tap = spec.network.as_ref().map(|network| network.tap.clone());
        let boot = Boot {
            vcpus: spec.shape.vcpus.get(),
            memory_mib: u64::from(spec.shape.memory.get()),
            kernel: &kernel,
            initramfs: &initramfs,
            command_line: &command_line,
            tap: tap.as_deref(),
            disk_rate: spec.disk_rate,
        };
        let begin = Begin::Boot { kernel: &kernel, initramfs: &initramfs };
        let mut machine = launch::start(&self.programs, spec, begin, None).await?;
        if let Err(error) = machine.boot(&boot).await {
            return Err(ended(machine, error).await);
        }
        if let Some(made) = made {
            let (file, written) = (made.keep(), Written::Known);
            machine.set_backing(Backing::Promised { file, written });
        }
        if let BootMemory::Zeros(path) = memory {
            machine.set_backing(Backing::Zeros { file: path.to_owned(), written: Written::Known });
        }
        Ok(Box::new(machine))
    }

    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>> {
        check(&spec)?;
        validate::snapshot_memory(&from.memory, spec.shape)?;
        readable(&from.state)?;
        let pages = saved_pages(from, spec.shape.memory.bytes()).await?;
        let tap = spec.network.as_ref().map(|network| network.tap.clone());
        let served = match &self.memory {
            MemoryBackend::File => None,
            MemoryBackend::Uffd(program) => Some((program, from)),
        };
        let mapped = served.is_none().then_some(from.memory.as_path());
        let disk_rate = spec.disk_rate;
        let begin = Begin::Load { state: &from.state, memory: mapped };
        let mut machine = launch::start(&self.programs, spec, begin, served).await?;
        match machine.load(from, pages, tap.as_deref(), disk_rate).await {
            Ok(()) => Ok(Box::new(machine)),
            Err(error) => Err(ended(machine, error).await),
        }
    }

    async fn adopt(&self, machine: AdoptedMachine) -> VmmResult<Box<dyn Vm>> {
        validate::adopted(&machine)?;
        Ok(Box::new(adopt::adopt(machine).await?))
    }
}

fn check(spec: &MachineSpec) -> VmmResult<()> {
    validate::machine(spec)?;
    match &spec.disk {
        Some(disk) if disk.format != DiskFormat::Raw => {
            let problem = "Firecracker takes only the bytes themselves as a disk";
            Err(VmmError::Unsupported { operation: "the disk's format", problem })
        }
        _ => Ok(()),
    }
}

/// The kernel's command line.
///
/// `panic=-1 reboot=k` turns a panic and a reboot into a reset by the keyboard controller, at which Firecracker ends; of that
/// controller there is nothing else, so that the kernel need not look for it.
fn kernel_command_line(more: &[String]) -> String {
    guest_kernel::command_line(&["reboot=k", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd"], &[], more)
}
