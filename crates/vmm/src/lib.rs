//! Virtual machine monitors behind one trait.
//!
//! [`Vmm`] makes virtual machines, [`Vm`] is one of them. A driver does seven things: boot, pause, resume,
//! snapshot, restore, stop, and report the exit; beside them it puts files on top of a running machine's
//! disk, and takes over machines whose owner is gone. What differs between drivers is data
//! ([`Capabilities`]), so that a caller asks instead of guessing.
//!
//! ```text
//!            boot                    pause                   snapshot of a machine over a base
//!   spec ───────────► running ◄──────────────► paused ◄──────────────────────┐
//!                     │  │          resume     │ │  ▲ └──────────────────────┘
//!                     │  │                     │ │  └────────── restore ◄─── spec + snapshot
//!                     │  │                     │ └─ snapshot of one that is a base ──► saved: its memory is the
//!                     │  │                     │                         snapshot's, it can only be stopped
//!                     │  └──────── release ────┴──► without an owner ── adopt ──► running, or paused
//!                     ▼
//!                   exited  (stop, or by itself: the reason is published once, at once)
//! ```
//!
//! # What a snapshot is
//! The memory of a machine that boots is a file, or is written to one, and becomes the *base*. The memory of a restored machine is
//! that file, mapped privately, and so a snapshot of it is the base's name and the pages that differ (the
//! module `pages`): its depth is always one, and its size follows what was written, not what there is.
//! A machine can also boot as if it were restored, over a base that is nothing but zeros ([`BootMemory::Zeros`]):
//! then its snapshots are over that.
//!
//! Drivers: [`firecracker`] (on KVM), [`qemu`] (the `microvm` machine, everywhere) and [`fake`] (no machine at all: for faults
//! and scale). Every driver passes the cases of `conformance`, the fake included, so that the fake cannot lie.
//!
//! Nobody here knows of sandboxes, templates or policies. A VMM process is in a session of its own and
//! outlives whoever started it.
#![warn(missing_docs)]

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod fake;
mod files;
pub mod firecracker;
mod guest_kernel;
mod guest_memory;
mod host_cpu;
mod last_words;
mod launch;
pub mod pager;
mod pages;
mod process;
mod program;
pub mod qcow2;
pub mod qemu;
mod spec;
mod state;
mod tail;
mod validate;
mod vm;

pub use error::{VmmError, VmmResult};
pub use spec::{
    Accelerator, AdoptedMachine, BootMemory, Capabilities, DiskFormat, DiskRate, DiskSpec, ExitReason,
    GuestBundle, MachineSpec, NetworkSpec, SnapshotFiles, SnapshotStatistics, VmmIdentity,
};
pub use vm::{Vm, Vmm};
