//! The published E2B SDKs, unmodified, against the real agent.
//!
//! ```text
//!  cargo test ─► this ─► environment in the user's cache, made once ─► one file of tests ─► agent of its own,
//!                                                                                          in namespaces
//! ```
//!
//! | module | SDK | tests | needs |
//! |---|---|---|---|
//! | [`python`] | `e2b` of PyPI | `sdk/*.py`, shown by file | Python with `venv` |
//! | [`node`] | `e2b` of npm | `sdk/js/*.mjs`, shown by test | Node.js and npm |
//!
//! What cannot run here says why, and counts as ignored.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

#[path = "sdk/environment.rs"]
mod environment;
#[path = "sdk/node.rs"]
mod node;
#[path = "sdk/python.rs"]
mod python;

use std::process::ExitCode;

use libtest_mimic::Arguments;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk");

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: namespaces and users need root");
    }
    let mut trials = python::trials(root);
    trials.extend(node::trials(root));
    libtest_mimic::run(&arguments, trials).exit_code()
}
