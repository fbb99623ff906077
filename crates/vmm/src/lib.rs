//! Virtual machine monitors behind one trait.
//!
//! [`Vmm`] makes virtual machines, [`Vm`] is one of them. A driver does seven things and no more: boot,
//! pause, resume, snapshot, restore, stop, and report the exit. What differs between drivers is data
//! ([`Capabilities`]), so that a caller asks instead of guessing.
//!
//! ```text
//!            boot                    pause
//!   spec ───────────► running ◄──────────────► paused ◄─────────── restore ◄─── spec + snapshot
//!                        │          resume       │
//!                        │                       └─ snapshot ──► saved: its memory is the snapshot's, it
//!                        │                                       can only be stopped
//!                        ▼
//!                      exited  (stop, or by itself: the reason is published once, at once)
//! ```
//!
//! Drivers: [`qemu`] (the `microvm` machine, everywhere) and [`fake`] (no machine at all: for faults and
//! scale). Every driver passes the cases of `conformance`, the fake included, so that the fake cannot lie.
//!
//! Nobody here knows of sandboxes, templates or policies. A VMM process is in a session of its own and
//! outlives whoever started it.
#![warn(missing_docs)]

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod fake;
pub mod qemu;
mod spec;
mod tail;
mod validate;
mod vm;

pub use error::{VmmError, VmmResult};
pub use spec::{
    Accelerator, Capabilities, DiskFormat, DiskSpec, ExitReason, GuestBundle, MachineSpec, NetworkSpec,
    SnapshotFiles, VmmIdentity,
};
pub use vm::{Vm, Vmm};
