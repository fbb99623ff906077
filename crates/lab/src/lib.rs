//! The lab: a machine of its own, in which tests run that need a kernel of their own.
//!
//! Here is what both sides share; the host's side is `xtask/src/lab`, the machine's is the program
//! `wrenn-lab-init`, its first and only service.
//!
//! ```text
//!  host (cargo xtask lab)                        machine (wrenn-lab-init)
//!   ── disk, read-only: plan.json, programs ──►   what to run, and with what          [`plan`]
//!   ◄─ a serial port, one way: messages ───────   that it is up, output, exits, files  [`message`]
//! ```
//!
//! Nothing is asked of the machine while it runs, so there is nothing to agree on. When it has said
//! [`message::Message::Done`], or anything went wrong, the host ends it from the outside.

pub mod message;
pub mod plan;
