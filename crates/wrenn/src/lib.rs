//! The parts of the `wrenn` program: the Rust client of the public API, the supervisor of a whole stack on one
//! machine, and the command line over both.
//!
//! - [`client`]: calls, streams, terminals and files of sandboxes.
//! - [`supervisor`]: `wrenn dev`, `up` and `down`: PostgreSQL, host agent and control plane as one process tree.
//! - [`cli`]: words and flags, output for people and for programs, exit codes.

pub mod cli;
pub mod client;
pub mod supervisor;
