//! The two traits.

use std::fmt;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{Capabilities, ExitReason, MachineSpec, SnapshotFiles, VmmIdentity, VmmResult};

/// Makes virtual machines.
#[async_trait]
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Which program this is. It does not change while the driver lives.
    fn identity(&self) -> &VmmIdentity;

    /// What it can do beyond the seven things.
    fn capabilities(&self) -> Capabilities;

    /// Starts a machine from its kernel. When `memory_file` is given, the guest's memory is that file,
    /// shared, so that a later [`Vm::snapshot`] into the same file copies nothing. The file is made by
    /// the driver and must not exist.
    ///
    /// On success the guest's CPUs run; whether the guest is up is the caller's to find out.
    ///
    /// # Errors
    /// Whatever was started is gone when an error is returned. Cancel-safe: a dropped future leaves no
    /// process behind.
    async fn boot(&self, spec: MachineSpec, memory_file: Option<&camino::Utf8Path>)
    -> VmmResult<Box<dyn Vm>>;

    /// Makes a machine from a snapshot of a machine of the same shape and guest. Its memory is private
    /// to it: the files are only read, and stay in use until it exits.
    ///
    /// On success the machine is paused at the instruction at which the snapshot was taken.
    ///
    /// # Errors
    /// As [`Vmm::boot`].
    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>>;
}

/// One virtual machine. Dropping it kills the process.
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
    /// A machine whose memory *is* `into.memory` has given it away with the snapshot: it cannot be resumed
    /// after that, only stopped, because the snapshot would change with it. A second snapshot into the same
    /// files does nothing.
    ///
    /// # Errors
    /// [`crate::VmmError::WrongState`] when it runs, [`crate::VmmError::Unsupported`] when the driver cannot
    /// snapshot this machine. Files may be half written after any error, and belong to the caller.
    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<()>;

    /// Makes the root disk this many bytes long and tells the guest. It only grows.
    ///
    /// # Errors
    /// [`crate::VmmError::Spec`] when it has no disk, or a larger one.
    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()>;

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
}
