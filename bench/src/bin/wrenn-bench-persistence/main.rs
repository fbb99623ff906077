//! What it costs that sandboxes persist, for `make bench`: pause, resume, snapshot, rollback and fork, at several sizes
//! of memory of which several parts are dirty, each beside the least that anyone needs.
//!
//! ```text
//!  a stack of its own ─► for each size: template ─► idle clones: memory of each
//!                             └─► for each dirty part: a sandbox that holds it
//!                                   ─► pause, resume ─► snapshot, rollback, fork of 1 ─► fork of 20 ─► PERSISTENCE.md
//!                                         └ each takes turns with the floor ┘
//! ```
//!
//! The floor does with the files that the product has just saved what the product does, with the same driver and arguments
//! and nothing else. Nothing is trimmed or tried again: what fails is counted, and then the program fails too. What does
//! not fit into the machine's memory is left out, and the report says so.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

mod api;
mod idle;
mod report;
mod rounds;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use wrenn_bench::{
    agent,
    floor::{self, Floor},
    machine::{self, Machine},
    program::{publish, unless_interrupted, with_stack},
};
use wrenn_host_agent::{images::Images, network::Uplink};
use wrenn_testkit::{Stack, stack};
use wrenn_types::{MemoryMib, Shape, Vcpus};

use crate::{
    api::{Api, MEBIBYTE},
    idle::available,
    report::{Case, Results, Size},
};

/// Above so many dirty bytes a case has fewer rounds, because each writes and reads them several times.
const MUCH: u64 = 256 * MEBIBYTE;
/// How many rounds such a case has at most.
const FEW: usize = 3;
/// The part of the memory that is available which clones may take.
const SHARE: (u64, u64) = (2, 3);
/// What a fork takes beside its dirty pages: the VMM, and what a guest dirties when it goes on.
const CLONE: u64 = 160 * MEBIBYTE;

#[derive(Debug, Parser)]
#[command(name = "wrenn-bench-persistence", about = "Measure what persists, into bench/PERSISTENCE.md")]
struct Arguments {
    /// How many rounds, where little is dirty.
    #[arg(long, default_value_t = 10)]
    count: usize,
    /// Sizes of memory in MiB.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024, 4096])]
    memory: Vec<u64>,
    /// Percents of it that a program in the guest has written.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 50])]
    dirty: Vec<u64>,
    /// How many children the large fork has.
    #[arg(long, default_value_t = 20)]
    children: u32,
    /// How many idle clones the memory of one is taken from, where they fit.
    #[arg(long, default_value_t = 16)]
    clones: u32,
    /// How many times they are made for that.
    #[arg(long, default_value_t = 3)]
    clone_rounds: usize,
    /// Where the results go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/PERSISTENCE.md"))]
    output: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let results = with_stack(async |stack| Box::pin(measure(&arguments, stack)).await).await?;
    publish(&arguments.output, &results.markdown(), &results.ratio_lines(), &results.failures())
}

/// What all measurements share.
struct Bench<'a> {
    arguments: &'a Arguments,
    api: Api,
    floor: &'a Floor,
    /// The directory of the stack's agent.
    agent: Utf8PathBuf,
    /// What the stack marks everything with.
    instance: String,
    /// For what the floor saves, on the same file system.
    saved: tempfile::TempDir,
}

async fn measure(arguments: &Arguments, stack: &Stack) -> Result<Results> {
    let utf8 = |path: PathBuf| {
        Utf8PathBuf::from_path_buf(path).map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
    };
    let before = machine::load();
    let instance = stack.instance()?;
    let socket = Utf8Path::new("/run/wrenn").join(&instance).join("agent.sock");
    eprintln!("making the warm snapshots that are not there");
    let mut directory = None;
    for memory in &arguments.memory {
        let shape = Shape { vcpus: Vcpus::default(), memory: MemoryMib::new(i64::try_from(*memory)?)? };
        let prepared = unless_interrupted(agent::prepare_template(&socket, "base", shape)).await?;
        directory = Some(prepared.directory);
    }
    let directory = directory.context("no size of memory is given")?;
    let images = Images::load(&utf8(stack::images()?)?)?;
    let vmm = floor::driver_of(&directory).await?;
    let agent = utf8(stack.dir().join("agent"))?;
    let machine = Machine::here(
        format!("{} {}, {}", vmm.identity().name, vmm.identity().version, vmm.identity().machine),
        format!("{:?}", vmm.identity().accelerator).to_lowercase(),
        &agent,
    );
    let uplink = Uplink::Named(stack.uplink().name().parse()?);
    let floor = Floor::new(vmm, images.guest().bundle.clone(), &directory, uplink, 1).await?;
    let saved = tempfile::tempdir_in(stack.dir())?;
    let api = Api::new(stack.client());
    let bench = Bench { arguments, api, floor: &floor, agent, instance, saved };
    let sizes = unless_interrupted(Box::pin(bench.sizes())).await;
    floor.close().await;
    Ok(Results {
        machine,
        date: jiff::Zoned::now().date().to_string(),
        load: [before, machine::load()],
        sizes: sizes?,
        children: arguments.children,
    })
}

impl Bench<'_> {
    async fn sizes(mut self) -> Result<Vec<Size>> {
        let mut sizes = Vec::new();
        for memory in self.arguments.memory.clone() {
            let idle = self.idle_clones(memory).await?;
            let mut cases = Vec::new();
            for percent in self.arguments.dirty.clone() {
                cases.push(self.case(memory, percent).await?);
            }
            sizes.push(Size { memory_mib: memory, idle, cases });
        }
        Ok(sizes)
    }

    async fn case(&mut self, memory: u64, percent: u64) -> Result<Case> {
        let dirty = memory * MEBIBYTE * percent / 100;
        let count = if dirty > MUCH { FEW.min(self.arguments.count) } else { self.arguments.count };
        eprintln!("{memory} MiB, {percent}% dirty: {count} rounds");
        let mut case = Case::new(percent);
        let id = self.api.create(memory).await?;
        if dirty > 0 {
            self.api.dirty(&id, dirty).await?;
        }
        for round in 0..count {
            self.pause_and_resume(&id, round, &mut case).await?;
        }
        for _ in 0..count {
            self.snapshot_and_fork(&id, &mut case).await?;
        }
        let children = self.arguments.children;
        let needed = u64::from(children) * (dirty + CLONE);
        let (numerator, denominator) = SHARE;
        if needed > available()? / denominator * numerator {
            case.left_out = Some(needed);
        } else {
            case.fork_many.add(self.api.fork(&id, children).await);
        }
        self.api.delete(&id).await?;
        Ok(case)
    }
}

/// What the saved states and the layers in the directory of an agent take on the disk.
fn directory_bytes(agent: &Utf8Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0;
    let mut directories = vec![agent.join("snapshots"), agent.join("disks")];
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir_utf8().with_context(|| format!("list {directory}"))? {
            let entry = entry?;
            let about = entry.metadata()?;
            if about.is_dir() {
                directories.push(entry.into_path());
            } else {
                sum += about.blocks() * 512;
            }
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
        let arguments = Arguments::parse_from(["bench", "--memory", "256,512", "--dirty", "1"]);
        assert_eq!((arguments.memory, arguments.dirty), (vec![256, 512], vec![1]));
    }

    #[test]
    fn what_a_directory_takes_is_counted_in_blocks() {
        let agent = tempfile::tempdir().unwrap();
        let agent = Utf8Path::from_path(agent.path()).unwrap();
        std::fs::create_dir_all(agent.join("snapshots/one")).unwrap();
        std::fs::create_dir(agent.join("disks")).unwrap();
        assert_eq!(directory_bytes(agent).unwrap(), 0);
        std::fs::write(agent.join("snapshots/one/pages"), vec![1; 65536]).unwrap();
        std::fs::File::create(agent.join("disks/sparse")).unwrap().set_len(1 << 30).unwrap();
        let bytes = directory_bytes(agent).unwrap();
        assert!((65536..1 << 20).contains(&bytes), "{bytes}");
    }
}
