//! The pager: a process beside a VMM that serves the page faults of its guest.
//!
//! ```text
//!  driver ── order: base, pages, where ─► pager: files open, listening, confined ◄── regions, descriptor ── Firecracker
//!                                           │                                                                │
//!                       working set ─► placed ahead                                       a page is not there: fault
//!                                           │      page of the snapshot, else of the base, else zero         │
//!                                           └──────────────────────────────────────────────────────────────► goes on
//!                                           ▼
//!                        pager.state: what was taken away, for whoever saves the machine
//! ```
//!
//! - **One for each VMM**, so that a hostile guest meets what is its own. It outlives the agent as the VMM does, is found by its name, and ends when the
//!   VMM ends.
//! - **Its end is the VMM's**: the kernel sees to that ([`mod@process`]), whether anybody watches or not; a guest never
//!   hangs at a page that nobody will bring. Who watches tells the reason ([`ExitReason::Pager`](crate::ExitReason)).
//! - **Nothing that a guest does makes it larger**: what it has it has from the beginning, and it puts nothing aside ([`serve`]).
//! - **It reads nothing from the guest** but addresses, and those it checks.
//! - **Saving** a machine asks neither it nor Firecracker: the kernel knows which pages are there, and `pager.state` what is zero
//!   ([`memory`]).
//! - **The working set** is recorded at the first restore of a snapshot, and placed ahead at each later one
//!   ([`working_set`]).
mod keeper;
mod memory;
mod process;
mod regions;
mod serve;
mod source;
mod state;
mod working_set;

pub use self::{
    keeper::PagerProgram,
    process::{PagerError, WORD, main},
    regions::RegionsError,
    serve::ServeError,
    state::{Counts, counts},
};
pub(crate) use self::{
    keeper::{Pager, PagerWatch, SOCKET, Wanted, forget, is_wanted, reason},
    memory::ServedMemory,
};

#[cfg(feature = "conformance")]
pub(crate) use self::keeper::mark;

/// What makes a pager of the program of a test.
#[cfg(test)]
pub(crate) const TEST_VARIABLE: &str = "WRENN_TEST_PAGER";

#[cfg(test)]
mod tests;
