//! What the guest agent does and what it weighs, for `make bench`.
//!
//! ```text
//!  a microVM ─► programs, output, files beside a raw TCP copy, small files ─┐
//!  outside   ─► the same and what it weighs, beside a peer in turns ────────┴─► GUEST.md
//! ```
//!
//! Nothing is warmed up, trimmed or tried again: what fails is counted, and then the program fails too.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

mod framing;
mod inside;
mod outside;
mod report;
mod wire;
mod workload;

use std::path::PathBuf;

use anyhow::Result;
use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use tokio::runtime::Runtime;
use wrenn_bench::{
    machine::{self, Machine},
    program::{can_measure, publish},
};
use wrenn_vmm::Vmm as _;

use crate::report::Results;

#[derive(Debug, Parser)]
#[command(name = "wrenn-bench-guest", about = "Measure the guest agent, into bench/GUEST.md")]
struct Arguments {
    /// What is measured.
    #[arg(long, value_enum, default_value_t = Only::Both)]
    only: Only,
    #[command(flatten)]
    inside: inside::Options,
    #[command(flatten)]
    outside: outside::Options,
    /// Where the results go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/GUEST.md"))]
    output: PathBuf,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    /// Both.
    Both,
    /// The agent in a microVM.
    Inside,
    /// The agent as an ordinary process.
    Outside,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    can_measure()?;
    let runtime = Runtime::new()?;
    let results = measure(&runtime, arguments.inside, &arguments.outside, arguments.only);
    // What was interrupted may still wait for a guest that is gone.
    runtime.shutdown_background();
    let results = results?;
    publish(&arguments.output, &results.markdown(), &results.ratio_lines(), &results.failures())
}

fn measure(
    runtime: &Runtime,
    inside: inside::Options,
    outside: &outside::Options,
    only: Only,
) -> Result<Results> {
    let _timers = runtime.enter();
    let before = machine::load();
    let vmm = runtime.block_on(inside::driver())?;
    let (name, accelerator) = inside::describe(vmm.identity());
    let machine = Machine::here(name, accelerator, Utf8Path::new("/run"));
    let kind = |path: &PathBuf| {
        Utf8PathBuf::from_path_buf(path.clone())
            .map_or_else(|_| "unknown".to_owned(), |path| machine::filesystem(&path))
    };
    let filesystems = [kind(&outside.memory_directory), kind(&outside.disk_directory)];
    let outside = (only != Only::Inside).then(|| outside::measure(runtime.handle(), outside)).transpose()?;
    let inside = (only != Only::Outside)
        .then(|| runtime.block_on(Box::pin(inside::measure(&vmm, inside))))
        .transpose()?;
    Ok(Results {
        machine,
        date: jiff::Zoned::now().date().to_string(),
        load: [before, machine::load()],
        filesystems,
        inside,
        outside,
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
