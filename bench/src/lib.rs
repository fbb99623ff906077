//! What the programs that measure share: the floor, samples, what processes hold of memory, and what machine it is.
//!
//! `wrenn-bench` measures creates over the bare minimum (`bench/RESULTS.md`); `wrenn-bench-persistence` pauses, resumes,
//! snapshots, forks and rollbacks (`bench/PERSISTENCE.md`); `wrenn-bench-guest` measures the guest agent, inside of a
//! microVM and outside (`bench/GUEST.md`).

pub mod agent;
mod bare;
pub mod floor;
pub mod machine;
pub mod memory;
pub mod statistics;
pub mod table;
