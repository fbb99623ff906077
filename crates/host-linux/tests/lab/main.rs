//! What the lab has that a machine on which tests run may lack, and what the limits of control groups do there.
//!
//! The first half is a promise: tests of other crates rely on it without asking. The second shows, with the kernel's own
//! control groups, that what is written to them holds.
#![allow(clippy::unwrap_used, reason = "tests")]

mod control_groups;
mod kernel;
mod kvm;
mod storage;

use std::{env, process::Command};

/// Whether this is the lab. A test that is nowhere else says so and returns.
fn in_lab() -> bool {
    let is_lab = env::var_os("WRENN_LAB").is_some();
    if !is_lab {
        #[allow(clippy::print_stdout, reason = "that is how a skipped test says so")]
        {
            println!("skipped: this is not the lab (`make lab` runs it there)");
        }
    }
    is_lab
}

/// Runs a shell's lines, each of which must succeed, and gives what they print.
fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-euxc", script]).output().unwrap();
    let (said, trace) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}\nended with {}:\n{said}\n{trace}", output.status);
    said
}

/// A name that no other test of this machine has.
fn unique(name: &str) -> String {
    format!("lab{}{name}", std::process::id())
}
