//! What the programs that measure share: the floor, samples, what processes hold of memory, what machine it is, and
//! what they do around their measuring.
//!
//! `wrenn-bench` measures creates over the bare minimum (`bench/RESULTS.md`); `wrenn-bench-persistence` pauses, resumes,
//! snapshots, forks and rollbacks (`bench/PERSISTENCE.md`); `wrenn-bench-guest` measures the guest agent, inside of a
//! microVM and outside (`bench/GUEST.md`); `wrenn-bench-firecracker` restores under Firecracker, in the lab
//! (`bench/FIRECRACKER.md`).

pub mod agent;
pub mod bare;
pub mod floor;
pub mod machine;
pub mod memory;
pub mod phases;
pub mod program;
pub mod statistics;
pub mod table;
