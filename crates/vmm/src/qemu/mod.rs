//! QEMU's `microvm` machine: the portable driver, with KVM where KVM proves itself and with translation
//! (TCG) everywhere else.
//!
//! - [`Qemu::detect`]: which QEMU, and what runs the guest (`probe`).
//! - `arguments`: the command line, a pure function.
//! - `qmp`, `facts`: QEMU's control protocol, and what its events have told.
//! - `launch`: from a description to a process that answers.
//! - `adopt`: to a process that an earlier life of ours started.
//! - `machine`: one machine, the [`Vm`].
//! - `block`, `disk_files`: its disk, and the files of it. `jail`: where it is confined.
//! - `monitor`: the task that owns the process and tells why it ended.
//!
//! # A restore
//! The template's memory is a file (`share=on`) while it boots, so that saving it means saving only the
//! devices, some 55 KB (`x-ignore-shared`). Each clone maps that file privately (`share=off`, copy on
//! write), is given the devices' state through a passed descriptor, and stands still until it is resumed.
//! Nothing is polled and no socket is waited for:
//!
//! ```text
//!  we                                            QEMU
//!  bind + listen control.sock, connect to it
//!  vfork, exec with the listening socket ──────► dynamic linking, machine      (most of the time)
//!  four commands at once, with the state's fd ─► accept, read them, load
//!                                   ◄─────────── event: MIGRATION completed
//! ```
//!
//! # A snapshot of a restored machine
//! Its memory is private, and would all be in the stream of a migration. So only the devices are saved, by
//! `xen-save-devices-state`, a few KB in a millisecond; and the pages that the kernel shows as private are read out
//! of the process. To restore it, the template's file is mapped as ever, the pages are written into the
//! process, and *then* the devices are loaded, which look at their rings in the guest's memory as they are.
//! Nothing in the saved machine has changed: it can go on.
//!
//! A machine that boots over zeros is the same from the first instruction on: a file that is one hole is mapped
//! privately, and what the guest has not written is zero wherever the file is mapped again. Its pages that are zero
//! are left out of its snapshots: its kernel clears all of its memory once, and that would be all of them.
//!
//! # How QEMU is confined
//! A guest that breaks out of its virtual CPU is inside the QEMU process. What holds it there:
//! - QEMU's seccomp filters, all of them: it cannot start a program, become another user, load anything into
//!   the kernel or touch other processes' scheduling.
//! - The network namespace of its sandbox: nothing of the host's network is in reach but what the
//!   sandbox's rules let through.
//! - No devices but serial port, one disk, one network card; no configuration files, no helper programs, no
//!   monitor but a socket in a directory of its own, no environment, no open file but those it needs.
//! - Its console goes into a ring of 64 KiB in its memory, its error messages into a pipe: it can fill
//!   no disk with them.
//! - A control group, where there are some.
//!
//! And where the machine has a user ([`MachineSpec::user`], `jail`):
//! - It is this user, with no capability and no way to have more rights.
//! - Its root is read-only, and has libraries, firmware, the program, and for a boot kernel and initramfs. What else it works with it
//!   is handed open: the layers of its disk, which it may write only at the top, the TAP device, the files of
//!   snapshots, and its memory, which of a clone it may only read.
//!
//! Without a user it runs as whoever starts it, and sees the host's files.

mod adopt;
mod arguments;
mod block;
mod disk_files;
mod facts;
mod jail;
mod launch;
mod machine;
mod monitor;
mod probe;
mod qmp;

use async_trait::async_trait;
use camino::Utf8Path;

pub use self::probe::{AcceleratorChoice, QemuOptions};
use self::{
    arguments::{Memory, SavedState, Start, kernel_command_line},
    launch::Engine,
    machine::Backing,
};
use crate::{
    AdoptedMachine, BootMemory, Capabilities, MachineSpec, SnapshotFiles, Vm, Vmm, VmmIdentity, VmmResult,
    files::{MemoryFile, cannot, readable},
    launch::{ended, saved_pages},
    validate,
};

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    engine: Engine,
    identity: VmmIdentity,
    accelerator_reason: String,
}

impl Qemu {
    /// The program that is used.
    #[must_use]
    pub fn program(&self) -> &Utf8Path {
        &self.engine.program
    }

    /// Why guests are run as they are, in one sentence.
    #[must_use]
    pub fn accelerator_reason(&self) -> &str {
        &self.accelerator_reason
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { supports_uffd: false, supports_diff: true, supports_overlays: true }
    }

    async fn boot(&self, spec: MachineSpec, memory: BootMemory<'_>) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        let (kernel, initramfs) = (&spec.guest.kernel, &spec.guest.initramfs);
        readable(kernel)?;
        readable(initramfs)?;
        // Where it is confined it sees them under the names that they have without links.
        let found = |path: &Utf8Path| path.canonicalize_utf8().map_err(cannot("open", path));
        let (kernel, initramfs) = (found(kernel)?, found(initramfs)?);
        let mut made = None;
        let mapped = match memory {
            BootMemory::Anonymous => Memory::Anonymous,
            BootMemory::Shared(path) => {
                made = Some(MemoryFile::create(path, spec.shape.memory.bytes())?);
                Memory::SharedFile(path)
            }
            BootMemory::Zeros(path) => {
                validate::snapshot_memory(path, spec.shape)?;
                Memory::PrivateFile(path)
            }
        };
        let command_line = kernel_command_line(self.engine.tsc_khz, &spec.kernel_arguments);
        let start = Start::Kernel { kernel: &kernel, initramfs: &initramfs, command_line: &command_line };
        let disk_rate = spec.disk_rate;
        let mut machine = launch::start(&self.engine, spec, mapped, start).await?;
        if let Err(error) = machine.booted(disk_rate).await {
            return Err(ended(machine, error).await);
        }
        if let Some(made) = made {
            machine.set_backing(Backing::Shared(made.keep()));
        }
        if let BootMemory::Zeros(path) = memory {
            machine.set_backing(Backing::Private(path.to_owned()));
        }
        Ok(Box::new(machine))
    }

    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>> {
        validate::machine(&spec)?;
        validate::snapshot_memory(&from.memory, spec.shape)?;
        let state = std::fs::File::open(&from.state).map_err(cannot("open", &from.state))?;
        let pages = saved_pages(from, spec.shape.memory.bytes()).await?;
        let saved = match &pages {
            None => SavedState::Migration,
            Some(_) => SavedState::Devices,
        };
        let (memory, disk_rate) = (Memory::PrivateFile(&from.memory), spec.disk_rate);
        let mut machine = launch::start(&self.engine, spec, memory, Start::Saved(saved)).await?;
        machine.set_backing(Backing::Private(from.memory.clone()));
        match machine.load(state, pages, disk_rate).await {
            Ok(()) => Ok(Box::new(machine)),
            Err(error) => Err(ended(machine, error).await),
        }
    }

    async fn adopt(&self, machine: AdoptedMachine) -> VmmResult<Box<dyn Vm>> {
        validate::adopted(&machine)?;
        Ok(Box::new(adopt::adopt(machine).await?))
    }
}
