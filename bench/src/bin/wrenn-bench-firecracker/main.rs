//! What the driver, the jailer, the pager and the agent add to Firecracker, for `make bench ARGS=firecracker`: it runs in
//! the lab, with the user's own Firecracker.
//!
//! ```text
//!  two agents of its own, of which one confines ─► snapshot of the template ─► working sets recorded
//!    ─► rounds: every way once, in an order of the round's own ─► FIRECRACKER.md
//! ```
//!
//! The floor is a bare program that makes the same calls ([`plain`]); what the ways are, [`ways`] says. All are
//! measured in one run and take turns. Nothing is trimmed or tried again: what fails is counted, and then the program
//! fails too.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

mod plain;
mod report;
mod ways;

use std::{
    env,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use tokio::runtime::Runtime;
use wrenn_bench::{
    machine::{self, Machine},
    program::{can_measure_firecracker, publish, unless_interrupted},
};
use wrenn_host_agent::{Agent, Config, doctor::UIDS, pager};
use wrenn_testkit::{stack, uplink::Uplink};

use crate::{
    report::Results,
    ways::{Way, Ways},
};

/// How many network slots the agent keeps ready: one is always there for the next create.
const READY_SLOTS: usize = 1;
/// The name of the results.
const PAGE: &str = "FIRECRACKER.md";

#[derive(Debug, Parser)]
#[command(name = "wrenn-bench-firecracker", about = "Measure restores under Firecracker, in the lab")]
struct Arguments {
    /// How many rounds: every way is measured once in each.
    #[arg(long, default_value_t = 10)]
    count: usize,
    /// Where the results go; else to what the lab brings back, or beside the other results.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// The agent's own command line.
#[derive(Debug, Parser)]
struct AgentLine {
    #[command(flatten)]
    config: Config,
}

fn main() -> Result<()> {
    // The drivers start this program again, as the pager of a machine.
    if env::args_os().nth(1).is_some_and(|word| word == pager::WORD) {
        return pager::main().map_err(Into::into);
    }
    let arguments = Arguments::parse();
    can_measure_firecracker()?;
    let results = Runtime::new()?.block_on(Box::pin(measure(arguments.count)))?;
    let output = arguments.output.unwrap_or_else(page);
    publish(&output, &results.markdown(), &results.ratio_lines(), &results.failures())
}

fn page() -> PathBuf {
    let directory = env::var_os("WRENN_LAB_OUTPUT").filter(|directory| !directory.is_empty());
    directory.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from).join(PAGE)
}

async fn measure(count: usize) -> Result<Results> {
    let outside = Uplink::create().await?;
    let directory = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let path = Utf8Path::from_path(directory.path()).context("the directory is not UTF-8")?;
    eprintln!("starting an agent");
    let agent = Agent::start(config(path, outside.name(), Confined::No)?).await?;
    let confined = match ways::has_jailer().await? {
        true => {
            let own = path.join("confined");
            std::fs::create_dir(&own).context("make the directory of the confined agent")?;
            Some(Agent::start(config(&own, outside.name(), Confined::Yes)?).await?)
        }
        false => None,
    };
    let measured = Box::pin(unless_interrupted(rounds(&agent, confined.as_ref(), path, count))).await;
    agent.stop().await;
    if let Some(confined) = confined {
        confined.stop().await;
    }
    let removed = outside.remove().await;
    let measured = measured?;
    removed.map(|()| measured)
}

/// Whether each machine is in the jailer, and its memory served, as in production.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Confined {
    Yes,
    No,
}

/// An agent as a host's, with disks as production has them.
fn config(directory: &Utf8Path, outside: &str, confined: Confined) -> Result<Config> {
    let utf8 = |path: PathBuf| {
        Utf8PathBuf::from_path_buf(path).map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
    };
    let (images, snapshots) = (utf8(stack::images()?)?, utf8(stack::snapshots()?)?);
    let (ready, uids) = (READY_SLOTS.to_string(), UIDS.to_string());
    let confinement = ["--uids", &uids, "--memory-backend", "uffd"];
    let confinement =
        if confined == Confined::Yes { &confinement[..] } else { &["--memory-backend", "file"] };
    let line = [
        "agent",
        "--dir",
        directory.as_str(),
        "--images",
        images.as_str(),
        "--snapshots",
        snapshots.as_str(),
        "--uplink-netns",
        outside,
        "--ready-slots",
        &ready,
        "--vmm",
        "firecracker",
        "--disks",
        "dm-snapshot",
        "--on-stop",
        "destroy",
        // Nothing is looked through beside what is timed.
        "--scrub-interval",
        "0",
    ];
    Ok(AgentLine::try_parse_from(line.iter().chain(confinement))?.config)
}

async fn rounds(
    agent: &Agent,
    confined: Option<&Agent>,
    directory: &Utf8Path,
    count: usize,
) -> Result<Results> {
    let before = machine::load();
    eprintln!("making the snapshot of the template, if it is not there");
    let mut ways = Ways::new(agent, confined, directory, READY_SLOTS).await?;
    eprintln!("recording working sets");
    ways.record_working_sets().await?;
    let available = ways.available();
    let identity = ways.vmm().identity();
    let machine = Machine::here(
        format!("{} {}, {}", identity.name, identity.version, identity.machine),
        identity.accelerator.word().to_owned(),
        ways.directory(),
    );
    let date = jiff::Zoned::now().date().to_string();
    let mut results = Results::new(machine, date, &available);
    eprintln!("going each way once, not timed");
    for way in &available {
        ways.measure(*way).await.with_context(|| format!("go the way {way:?}"))?;
    }
    for round in 0..count {
        for way in shuffled(&available, round) {
            let measured = ways.measure(way).await;
            let outcome = measured.as_ref().map(|measured| format!("{:.3} s", measured.took.as_secs_f64()));
            eprintln!(
                "{} of {count}: {way:?} {}",
                round + 1,
                outcome.unwrap_or_else(|error| format!("{error:#}"))
            );
            results.add(way, measured);
        }
    }
    ways.close().await;
    results.load = [before, machine::load()];
    Ok(results)
}

/// The order of a round: another one in each, so that none always follows the same one, and the same in each run.
fn shuffled(ways: &[Way], round: usize) -> Vec<Way> {
    let mut ways = ways.to_vec();
    ways.sort_by_cached_key(|way| {
        let mut hasher = DefaultHasher::new();
        (round, way).hash(&mut hasher);
        hasher.finish()
    });
    ways
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_lines_are_consistent() {
        Arguments::command().debug_assert();
        AgentLine::command().debug_assert();
        assert_eq!(Arguments::parse_from(["bench", "--count", "3"]).count, 3);
    }

    #[test]
    fn every_round_has_every_way_in_an_order_of_its_own() {
        let orders: Vec<Vec<Way>> = (0..8).map(|round| shuffled(&Way::ALL, round)).collect();
        for order in &orders {
            assert!(Way::ALL.iter().all(|way| order.contains(way)), "{order:?}");
        }
        assert!(orders.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(orders.iter().any(|order| order[0] != orders[0][0]));
    }

    #[test]
    fn elsewhere_nothing_is_measured() {
        if !stack::is_lab() {
            let refused = can_measure_firecracker().unwrap_err().to_string();
            assert!(refused.starts_with("nothing can be measured here: it is the lab"), "{refused}");
        }
    }
}
