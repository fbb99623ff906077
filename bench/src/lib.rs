//! What the programs that measure share: samples, what processes hold of memory, and what machine it is.
//!
//! `wrenn-bench` measures creates over the bare minimum (`bench/RESULTS.md`); `wrenn-bench-guest` measures the
//! guest agent, inside of a microVM and outside (`bench/GUEST.md`).

pub mod machine;
pub mod memory;
pub mod statistics;
