//! The two traits.

use std::fmt;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::watch;

use crate::{
    AdoptedMachine, BootMemory, Capabilities, DiskSpec, ExitReason, MachineSpec, SnapshotFiles,
    SnapshotStatistics, VmmIdentity, VmmResult,
};

/// Makes virtual machines.
#[async_trait]
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Which program this is. It does not change while the driver lives.
    fn identity(&self) -> &VmmIdentity;

    /// What it can do beyond the seven things.
    fn capabilities(&self) -> Capabilities;

    /// Starts a machine from its kernel, with `memory` as the guest's.
    ///
    /// On success the guest's CPUs run; whether the guest is up is the caller's to find out.
    ///
    /// # Errors
    /// Whatever was started is gone when an error is returned. Cancel-safe: a dropped future leaves no
    /// process behind.
    async fn boot(&self, spec: MachineSpec, memory: BootMemory<'_>) -> VmmResult<Box<dyn Vm>>;

    /// Makes a machine from a snapshot of a machine of the same shape and guest. Its memory is private
    /// to it: the files are only read. `from.memory` stays in use until it exits, and must never change;
    /// `from.state` and `from.pages` are not needed any more once this has returned.
    ///
    /// On success the machine is paused at the instruction at which the snapshot was taken.
    ///
    /// # Errors
    /// As [`Vmm::boot`]. Pages that are damaged or of another machine are [`crate::VmmError::File`], and are
    /// refused before anything is started.
    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>>;

    /// Takes over a machine that runs without an owner: one whose owner let it go ([`Vm::release`]) or died.
    /// Whether its guest runs or is paused is as its last owner left it. A guest that has shut down since is
    /// adopted too, and its end is told at once.
    ///
    /// # Errors
    /// [`crate::VmmError::NotThere`] when no such process lives, [`crate::VmmError::WrongState`] when it was
    /// abandoned while it was being made or saved, [`crate::VmmError::Timeout`] when another owner holds it.
    /// A process that could not be adopted is left as it is.
    async fn adopt(&self, machine: AdoptedMachine) -> VmmResult<Box<dyn Vm>>;
}

/// One virtual machine. Dropping it kills the process; [`Vm::release`] lets it go.
#[async_trait]
pub trait Vm: fmt::Debug + Send + Sync {
    /// The VMM's process id on the host; the fake has none.
    fn pid(&self) -> Option<u32>;

    /// Stops the guest's CPUs. Idempotent.
    ///
    /// # Errors
    /// [`crate::VmmError::Exited`], as every operation on a machine that is gone.
    async fn pause(&mut self) -> VmmResult<()>;

    /// Lets the guest's CPUs run. Idempotent.
    ///
    /// # Errors
    /// [`crate::VmmError::WrongState`] when a snapshot was made of which its memory is a part.
    async fn resume(&mut self) -> VmmResult<()>;

    /// Writes memory and devices to `into`; the machine must be paused and stays so. The disk is the
    /// caller's: it is in step with the snapshot until the machine is resumed. Making the files last
    /// (`fsync`) is the caller's too.
    ///
    /// A machine whose memory *is* `into.memory` (it booted with it, and `into.pages` is none) has given it
    /// away with the snapshot: it cannot be resumed after that, only stopped, because the snapshot would change
    /// with it. A second snapshot into the same files does nothing.
    ///
    /// A restored machine has a memory of its own, and so has one that booted over zeros: `into.memory` is the file
    /// that it maps, which is not changed, and what differs from it is written to `into.pages`. The machine can be resumed and
    /// snapshotted again as often as one likes.
    ///
    /// # Errors
    /// [`crate::VmmError::WrongState`] when it runs, [`crate::VmmError::Unsupported`] when the driver cannot
    /// snapshot this machine into this memory, [`crate::VmmError::Spec`] when `into.pages` is missing or too
    /// many, [`crate::VmmError::File`] when the pages cannot be written, for one because the disk is full.
    /// Files may be half written after any error, or when the future is dropped, and belong to the caller; a
    /// restored machine goes on as if nothing had been asked for.
    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics>;

    /// Makes the root disk this many bytes long and tells the guest. It only grows.
    ///
    /// # Errors
    /// [`crate::VmmError::Spec`] when it has no disk, or a larger one.
    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()>;

    /// Puts a new file on top of the root disk, running or paused: from then on all is written to `overlay`,
    /// and the file that was the top is never written again. `overlay` is an empty qcow2 file of the disk's
    /// present size, whose backing file is the present top. The guest notices nothing. A stream that is
    /// under way is ended first.
    ///
    /// # Errors
    /// [`crate::VmmError::Unsupported`] for an overlay that is no qcow2, and from a driver that knows none, [`crate::VmmError::Spec`] for one that
    /// does not fit, or a machine without a disk. The machine goes on with the disk that it had, unless the answer
    /// was lost ([`crate::VmmError::Connection`], [`crate::VmmError::Timeout`]) or the future dropped: then ask for
    /// [`Vm::disk_chain`].
    async fn pivot_disk(&mut self, overlay: &DiskSpec) -> VmmResult<()>;

    /// The files of the root disk, the top first, as the VMM has them open; empty without a disk.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    async fn disk_chain(&mut self) -> VmmResult<Vec<Utf8PathBuf>>;

    /// Copies all that lies between the top of the root disk and `base` into the top, while the machine
    /// does what it does, and waits for it. Then the chain is the top, `base`, and what `base` stands on; the
    /// files between are closed.
    ///
    /// A dropped future leaves the copying under way: a later call waits for it. [`Vm::pivot_disk`] and
    /// [`Vm::stop`] end it, which loses nothing.
    ///
    /// # Errors
    /// [`crate::VmmError::Spec`] when `base` is no file below the top, [`crate::VmmError::Refused`] when the
    /// host's disk fails or is full, [`crate::VmmError::Timeout`] when nothing is copied for a minute. The
    /// chain is then as before.
    async fn stream_disk(&mut self, base: &Utf8Path) -> VmmResult<()>;

    /// The end of what the guest printed on its console, bounded; empty when it cannot be had. It is for
    /// a person to read: a guest writes what it likes there.
    async fn console(&mut self) -> String;

    /// Why the process is gone, once it is. The channel is updated exactly once, within milliseconds of
    /// the exit, whoever caused it.
    fn exit(&self) -> watch::Receiver<Option<ExitReason>>;

    /// Ends the process and waits until it is gone, bounded; idempotent, and true in every state. The
    /// reason is then [`ExitReason::Stopped`] unless it was gone before.
    ///
    /// # Errors
    /// The process is stuck in the kernel: it is killed, but still there.
    async fn stop(&mut self) -> VmmResult<ExitReason>;

    /// Lets the machine go: the process goes on as it is, running or paused, and can be adopted
    /// ([`Vmm::adopt`]), by this process or by another one. What is in its `run_dir` stays there, and belongs to
    /// the directory's owner if nobody adopts it. A channel of [`Vm::exit`] is told nothing any more.
    async fn release(self: Box<Self>);
}
