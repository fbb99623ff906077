//! The text of `bench/FIRECRACKER.md`. Pure.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use wrenn_bench::{
    machine::Machine,
    phases::Phases,
    statistics::{Samples, ratio, spread},
    table,
};

use crate::ways::{Measured, STEPS, Way};

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Results {
    machine: Machine,
    /// When, to the day.
    date: String,
    /// How many processes wanted to run, before and after.
    pub(crate) load: [String; 2],
    ways: BTreeMap<Way, OfWay>,
}

/// What was measured one way.
#[derive(Debug, Default)]
struct OfWay {
    samples: Samples,
    /// How often a pager was waited for, and how many pages it had placed before.
    faults: Vec<u64>,
    ahead: Vec<u64>,
    /// Where the time went.
    phases: Phases,
}

/// What is compared with what, and what there is to be reached.
const PAIRS: [(Way, Way, Option<f64>); 11] = [
    (Way::Driver, Way::Bare, Some(1.2)),
    (Way::Jailed, Way::Driver, None),
    (Way::Served, Way::Driver, None),
    (Way::WorkingSet, Way::Driver, None),
    (Way::WorkingSet, Way::Served, None),
    (Way::JailedWorkingSet, Way::Driver, None),
    (Way::Jailed, Way::Bare, None),
    (Way::JailedWorkingSet, Way::Bare, None),
    (Way::Create, Way::Driver, None),
    (Way::Create, Way::Identified, None),
    (Way::ConfinedCreate, Way::JailedWorkingSet, None),
];

/// A way in a table.
fn described(way: Way) -> &'static str {
    match way {
        Way::Bare => "bare: the calls to Firecracker, nothing else",
        Way::Driver => "driver: memory mapped from the file, not jailed",
        Way::Jailed => "jailed: driver, in the jailer",
        Way::Served => "served: driver, memory from a pager, no working set",
        Way::WorkingSet => "served ahead: driver, memory from a pager, with the working set",
        Way::JailedWorkingSet => "jailed and served ahead: driver, in the jailer, pager, working set",
        Way::Identified => "identified: driver, and the guest is given its identity before the byte",
        Way::Create => "create: through the agent",
        Way::ConfinedCreate => {
            "confined create: through an agent as in production, in the jailer, pager, working set"
        }
    }
}

/// A way in a line of ratios.
fn short(way: Way) -> &'static str {
    described(way).split(':').next().unwrap_or_default()
}

impl Results {
    /// Nothing measured yet, of these ways.
    pub(crate) fn new(machine: Machine, date: String, ways: &[Way]) -> Self {
        let ways = ways.iter().map(|way| (*way, OfWay::default())).collect();
        Self { machine, date, load: Default::default(), ways }
    }

    /// Takes one in.
    pub(crate) fn add(&mut self, way: Way, measured: Result<Measured>) {
        let of = self.ways.entry(way).or_default();
        match measured {
            Ok(Measured { took, counts, phases }) => {
                of.samples.add(Ok::<_, anyhow::Error>(took));
                if let Some(counts) = counts {
                    of.faults.push(counts.faults);
                    of.ahead.push(counts.ahead);
                }
                of.phases.add(phases);
            }
            Err(error) => of.samples.add(Err(error)),
        }
    }

    /// Everything that failed, each with what was being done.
    #[must_use]
    pub(crate) fn failures(&self) -> Vec<String> {
        let of = |(way, of): (&Way, &OfWay)| {
            let way = short(*way);
            of.samples.failures().iter().map(|why| format!("{way}: {why}")).collect::<Vec<_>>()
        };
        self.ways.iter().flat_map(of).collect()
    }

    /// The lines for a person who waits.
    #[must_use]
    pub(crate) fn ratio_lines(&self) -> String {
        let mut text = String::new();
        let summary = |way| self.ways.get(&way)?.samples.summary();
        for (way, least, aim) in PAIRS {
            let (Some(of), Some(least_of)) = (summary(way), summary(least)) else { continue };
            let name = format!("{}/{}", short(way), short(least));
            let _ = write!(text, "{name} p50 ratio {:.2}", ratio(of.p50, least_of.p50));
            if let Some(aim) = aim {
                let _ = write!(text, " (aim: at most {aim:.2})");
            }
            let _ = writeln!(text, "\n{name} p99 ratio {:.2}", ratio(of.p99, least_of.p99));
        }
        text
    }

    /// The whole file.
    #[must_use]
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(HEAD);
        let [before, after] = &self.load;
        let build =
            if cfg!(debug_assertions) { "debug, in which all of these are slower" } else { "release" };
        let rest = [
            ("load of the last minute in the lab", format!("{before} before, {after} after")),
            ("build of the measuring program, driver, pager and agent", build.to_owned()),
        ];
        table::write_about(&mut text, &[("date", self.date.clone())], &self.machine, &rest);
        let _ =
            writeln!(text, "\n```text\n{}```\n\n## To the first byte, in milliseconds\n", self.ratio_lines());
        table::write_samples_head(&mut text);
        for (way, of) in &self.ways {
            table::write_samples(&mut text, described(*way), &of.samples);
        }
        text.push('\n');
        for way in Way::ALL {
            if !self.ways.contains_key(&way) {
                let _ = writeln!(text, "Left out, as there is no such thing here: {}.\n", described(way));
            }
        }
        self.write_faults(&mut text);
        self.write_steps(&mut text);
        text
    }

    fn write_steps(&self, text: &mut String) {
        let _ = writeln!(text, "## Where the time went\n\nIn the middle, in milliseconds:\n");
        let _ = writeln!(text, "| | {} |\n|---|{}", STEPS.join(" | "), "---:|".repeat(STEPS.len()));
        for (way, of) in self.ways.iter().filter(|(way, _)| !way.is_create()) {
            let steps = of.phases.rows();
            if !steps.is_empty() {
                let cells: Vec<String> = steps.iter().map(|(_, middle, _)| format!("{middle:.1}")).collect();
                let _ = writeln!(text, "| {} | {} |", short(*way), cells.join(" | "));
            }
        }
        text.push('\n');
        for (way, name) in
            [(Way::Create, "Of a create, as the agent says"), (Way::ConfinedCreate, "Of a confined create")]
        {
            if let Some(of) = self.ways.get(&way) {
                of.phases.write(text, name);
            }
        }
    }

    fn write_faults(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "## What a pager had done by the first byte\n\n\
             | | waited for: in the middle | least | most | pages placed ahead: in the middle | least | most |\n\
             |---|---:|---:|---:|---:|---:|---:|"
        );
        for (way, of) in &self.ways {
            let (Some(faults), Some(ahead)) = (spread(&of.faults), spread(&of.ahead)) else { continue };
            let cells = [faults, ahead].map(|[least, middle, most]| format!("{middle} | {least} | {most}"));
            let _ = writeln!(text, "| {} | {} |", short(*way), cells.join(" | "));
        }
        text.push('\n');
    }
}

/// What the numbers are.
const HEAD: &str = "\
# Firecracker

Written by `make bench ARGS=firecracker`, in the lab (`cargo xtask lab`); nothing is trimmed. What is timed is from before
Firecracker is started, or the create is asked for, until the first byte of the guest agent's answer to `GET /health`. All
restore the same warm snapshot of the template `base`, made by the agent at the beginning of the run, and take turns
within the run, each once in a round, in an order of the round's own. Before the first round each is gone once and not timed: so the snapshot
is in the page cache, and was read against its digest, as it is once after each boot of a host. Below 100 samples p99 is the largest.

- Bare: a program without the driver starts Firecracker in a network namespace, waits for its socket, has it load the
  snapshot (memory mapped from the file, what is written tracked, another network) and go on. Namespace and disk are
  ready before. What the guest prints is thrown away.
- Driver: the same by `Firecracker::restore` and `resume`, which also lock the machine's directory, keep what guest and
  Firecracker print, watch the process, and can be adopted. Namespace and disk are ready before.
- Jailed: as a user of its own in Firecracker's jailer, which copies Firecracker, on a stage that only it sees.
- Served: a pager of its own serves the memory, page by page. Without a working set it records one. With one, which was
  recorded by a restore until the end of a first command, it places those pages ahead.
- Identified: the driver, then `POST /init`, then the first byte: what any restore has to do before a guest can be used.
- Create: through the registry of an agent in this process, which confines nobody: a disk of the device mapper, a network
  slot of its pool, the record, the control group, the restore, the identity, and then the first byte.
- Confined create: the same through a second agent, with `--uids` and `--memory-backend uffd`, as in production. Its first create, which is
  not timed, recorded the working set.

These numbers are those of a machine in a machine: the lab is emulated, instruction by instruction, and so is the virtualization by
which Firecracker runs a guest in it. Only ratios say something, and only roughly: a start of a process, a fault and a system call are each dearer
by another factor than on a real machine. They say nothing of how long a restore takes. What else the machine under the lab had to do meanwhile is
not seen from here. And the lab has one processor: what a pager does beside a guest, it does here instead of it.

";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use wrenn_host_agent::pager::Counts;

    use super::*;

    fn measured(millis: u64) -> Measured {
        Measured { took: Duration::from_millis(millis), counts: None, phases: Vec::new() }
    }

    fn results() -> Results {
        let machine = Machine::here("firecracker 1.17.0".to_owned(), "kvm".to_owned(), "/".into());
        let ways: Vec<Way> = Way::ALL.into_iter().filter(|way| *way != Way::Jailed).collect();
        let mut results = Results::new(machine, "2026-11-23".to_owned(), &ways);
        results.add(Way::Bare, Ok(measured(1000)));
        let phases = STEPS.map(|step| (step.to_owned(), 7.0)).into();
        results.add(Way::Driver, Ok(Measured { phases, ..measured(1100) }));
        for faults in [500, 400, 700] {
            let counts = Counts { faults, ahead: 0, removals: 0 };
            results.add(Way::Served, Ok(Measured { counts: Some(counts), ..measured(2200) }));
        }
        let phases = vec![("slot".to_owned(), 2.0)];
        results.add(Way::Create, Ok(Measured { phases, ..measured(3300) }));
        results
    }

    #[test]
    fn the_ratios_have_lines_of_their_own() {
        let lines = results().ratio_lines();
        assert!(
            lines.starts_with("driver/bare p50 ratio 1.10 (aim: at most 1.20)\ndriver/bare p99 ratio 1.10\n"),
            "{lines}"
        );
        assert!(lines.contains("\nserved/driver p50 ratio 2.00\n"), "{lines}");
        assert!(lines.contains("\ncreate/driver p50 ratio 3.00\n"), "{lines}");
        assert!(!lines.contains("jailed/"), "what was not measured has none: {lines}");
        assert!(results().markdown().contains(&lines));
    }

    #[test]
    fn faults_and_phases_are_told() {
        let text = results().markdown();
        assert!(text.contains("| served | 500 | 400 | 700 | 0 | 0 | 0 |"), "{text}");
        assert!(text.contains("\n| driver | 7.0 | 7.0 | 7.0 |\n"), "{text}");
        assert!(text.contains("| slot | 2.0 | 2.0 |"), "{text}");
    }

    #[test]
    fn what_failed_and_what_was_left_out_are_told() {
        let mut results = results();
        results.add(Way::WorkingSet, Err(anyhow::anyhow!("refused")));
        assert_eq!(results.failures(), ["served ahead: refused"]);
        let text = results.markdown();
        assert!(text.contains("with the working set | 0 | 1 | – | – | – |"), "{text}");
        assert!(
            text.contains("Left out, as there is no such thing here: jailed: driver, in the jailer."),
            "{text}"
        );
    }
}
