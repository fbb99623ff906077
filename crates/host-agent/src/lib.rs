//! The host agent: it runs the sandboxes of one host.
//!
//! ```text
//!  control plane ── Connect RPC ──► rpc ──► registry ──► one driver task per sandbox
//!                └─ GET /tunnel ──► tunnel ───────────────────► guest port     │
//!                                                                              ▼
//!                                        rootfs (disk) · network (slot) · vmm · guest (/init)
//!                                                     warm (template snapshots)
//! ```
//!
//! - [`config`], [`agent`]: what an agent is told, and its life from start to stop.
//! - [`sandbox`]: one sandbox: what is asked of it ([`sandbox::queue`], pure), its bring-up as a chain of
//!   typestates, the one task that owns it, its record on disk.
//! - [`registry`]: all of them, and the stream of what happens to them.
//! - [`control_plane_loss`]: what becomes of them when nobody commands the host any more.
//! - [`warm`]: the snapshot from which every create is restored.
//! - [`network`], [`rootfs`], [`images`], [`snapshot_store`]: what a sandbox is made of.
//! - [`snapshots`]: what sandboxes were saved as, and the layers of their disks.
//! - [`scrub`]: reads all of that against its digests now and then, and makes the digests of layers.
//! - [`metrics`]: what sandboxes use, over time, and what the agent tells of itself.
//! - [`limits`]: what each machine may have of the host.
//! - [`doctor`]: whether the host has what production needs.
//! - [`adopt`]: after a crash or a restart, goes on with what was left, and ends what is half-made; only what is
//!   this instance's own.
//!
//! Invariants: an id from the wire is a type before it is part of a path. What is needed to collect a
//! sandbox is on disk before its VM starts. Only the driver task changes its sandbox. No state of a
//! sandbox is published before it is true.

// The generated traits ask for less than a handler promises; promising more is the intent.
#![allow(refining_impl_trait)]

pub mod adopt;
pub mod agent;
pub mod config;
pub mod control_plane_loss;
pub mod doctor;
pub mod guest;
pub mod images;
pub mod limits;
pub mod metrics;
pub mod network;
pub mod registry;
pub mod rootfs;
pub mod rpc;
pub mod sandbox;
pub mod scrub;
pub mod snapshot_store;
pub mod snapshots;
pub mod tunnel;
pub mod users;
pub mod warm;

pub use agent::{Agent, StartError};
pub use config::Config;
/// What becomes of a process that is told to: see `wrenn_vmm::pager`.
pub use wrenn_vmm::pager;
