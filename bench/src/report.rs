//! The text of `bench/RESULTS.md`. Pure.

use std::{fmt::Write as _, time::Duration};

use wrenn_bench::{
    floor::Question,
    machine::Machine,
    memory::Memory,
    phases::Phases,
    statistics::{Samples, Summary, ratio},
    table,
};

/// One load, on the floor and through the API.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Restore to first byte.
    pub(crate) floor: Samples,
    /// Restore to the end of a command, without the product.
    pub(crate) bare: Samples,
    /// Create to first result of a command.
    pub(crate) create: Samples,
    /// Where the server says the creates' time went.
    pub(crate) phases: Phases,
}

/// What the stack's processes hold at one moment.
#[derive(Debug)]
pub(crate) struct MemoryRow {
    /// When, in words.
    pub(crate) when: String,
    /// The control plane.
    pub(crate) control_plane: Memory,
    /// The host agent.
    pub(crate) agent: Memory,
    /// The VMMs of sandboxes.
    pub(crate) machines: Memory,
}

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Results {
    /// Where.
    pub(crate) machine: Machine,
    /// When, to the day.
    pub(crate) date: String,
    /// One after the other.
    pub(crate) series: Load,
    /// Several at once.
    pub(crate) at_once: Load,
    /// How many are at once.
    pub(crate) width: usize,
    /// `true` in a sandbox that runs.
    pub(crate) exec: Samples,
    /// A file into a sandbox.
    pub(crate) upload: Samples,
    /// The file out of it.
    pub(crate) download: Samples,
    /// The file's size.
    pub(crate) file_mib: u64,
    /// Memory at several moments.
    pub(crate) memory: Vec<MemoryRow>,
    /// Until the template's snapshot was there; none when it was from an earlier run.
    pub(crate) first_snapshot: Option<Duration>,
}

/// How much longer a create takes than something else under the same load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ratios {
    /// Median over median.
    pub(crate) p50: f64,
    /// 99th percentile over 99th percentile.
    pub(crate) p99: f64,
}

impl Load {
    /// The samples of a restore that is asked this.
    pub(crate) fn of(&mut self, question: Question) -> &mut Samples {
        match question {
            Question::FirstByte => &mut self.floor,
            Question::Command => &mut self.bare,
        }
    }

    /// Create over the floor; none where nothing succeeded.
    #[must_use]
    pub(crate) fn ratios(&self) -> Option<Ratios> {
        self.over(&self.floor)
    }

    fn over(&self, least: &Samples) -> Option<Ratios> {
        let (least, create) = (least.summary()?, self.create.summary()?);
        Some(Ratios { p50: ratio(create.p50, least.p50), p99: ratio(create.p99, least.p99) })
    }
}

impl Results {
    /// Everything that failed, each with what was being done.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = [
            ("floor", &self.series.floor),
            ("bare command", &self.series.bare),
            ("create", &self.series.create),
            ("bare command at once", &self.at_once.bare),
            ("floor at once", &self.at_once.floor),
            ("create at once", &self.at_once.create),
            ("exec", &self.exec),
            ("upload", &self.upload),
            ("download", &self.download),
        ];
        all.into_iter()
            .flat_map(|(what, samples)| samples.failures().iter().map(move |it| (what, it.as_str())))
    }

    /// The lines for a person who waits: the ratios first.
    #[must_use]
    pub(crate) fn ratio_lines(&self) -> String {
        let mut text = String::new();
        let loads = [("", &self.series), (" at once", &self.at_once)];
        for (suffix, load) in loads {
            for (least, ratios) in [("floor", load.ratios()), ("bare command", load.over(&load.bare))] {
                if let Some(Ratios { p50, p99 }) = ratios {
                    let _ = writeln!(text, "create/{least}{suffix} p50 ratio {p50:.2}");
                    let _ = writeln!(text, "create/{least}{suffix} p99 ratio {p99:.2}");
                }
            }
        }
        text
    }

    /// The whole file.
    #[must_use]
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "# Results\n\n\
             Written by `make bench`; nothing is trimmed. The floor restores the same warm snapshot with the same driver and\n\
             arguments, its namespace and disk ready, until the first byte of `GET /health`. The bare command restores it in the\n\
             same way, gives the guest its identity and runs `true` in it, on one connection, with no API, database or\n\
             records. A create is measured from before `POST /v1/sandboxes` until the result of `exec true` is there. The three\n\
             take turns in one run. On our side nothing is restored ahead of a request; network namespaces come from the pool\n\
             that the agent keeps.\n\n",
        );
        table::write_about(&mut text, &[("date", self.date.clone())], &self.machine, &[]);
        text.push('\n');
        let _ = writeln!(text, "## Times in milliseconds\n");
        table::write_samples_head(&mut text);
        let at_once = |what: &str| format!("{what}, {} at once", self.width);
        for (name, samples) in [
            ("floor: restore to first byte, in series".to_owned(), &self.series.floor),
            ("bare command: restore to the end of `true`, in series".to_owned(), &self.series.bare),
            ("create to first exec result, in series".to_owned(), &self.series.create),
            (at_once("floor: restore to first byte"), &self.at_once.floor),
            (at_once("bare command: restore to the end of `true`"), &self.at_once.bare),
            (at_once("create to first exec result"), &self.at_once.create),
            ("exec `true`, there and back".to_owned(), &self.exec),
            (format!("file of {} MiB up", self.file_mib), &self.upload),
            (format!("file of {} MiB down", self.file_mib), &self.download),
        ] {
            table::write_samples(&mut text, &name, samples);
        }
        let _ = writeln!(text, "\n```text\n{}```\n", self.ratio_lines());
        self.write_throughput(&mut text);
        if let Some(first) = self.first_snapshot {
            let _ = writeln!(
                text,
                "The first create of a shape makes its snapshot; that took {:.1} s.\n",
                first.as_secs_f64()
            );
        }
        let said = |load: &str| format!("Where the server says the creates' time went, {load}");
        self.series.phases.write(&mut text, &said("in series"));
        self.at_once.phases.write(&mut text, &said(&format!("{} at once", self.width)));
        self.write_memory(&mut text);
        text
    }

    fn write_throughput(&self, text: &mut String) {
        let rate = |summary: Summary| self.file_mib as f64 / summary.p50.as_secs_f64();
        if let (Some(up), Some(down)) = (self.upload.summary(), self.download.summary()) {
            let _ = writeln!(text, "Files: {:.0} MiB/s up, {:.0} MiB/s down (p50).\n", rate(up), rate(down));
        }
    }

    fn write_memory(&self, text: &mut String) {
        let _ = writeln!(text, "## Memory in MiB (share of what is shared: PSS; all: RSS)\n");
        let _ =
            writeln!(text, "| when | control plane PSS | RSS | agent PSS | RSS | VMMs | each PSS | RSS |");
        let _ = writeln!(text, "|---|---:|---:|---:|---:|---:|---:|---:|");
        let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
        for MemoryRow { when, control_plane, agent, machines } in &self.memory {
            let one = machines.each();
            let cells = [
                when.clone(),
                mib(control_plane.pss_kib),
                mib(control_plane.rss_kib),
                mib(agent.pss_kib),
                mib(agent.rss_kib),
                machines.processes.to_string(),
                mib(one.pss_kib),
                mib(one.rss_kib),
            ];
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(millis: u64) -> Samples {
        let mut samples = Samples::default();
        samples.add(Ok::<_, String>(Duration::from_millis(millis)));
        samples
    }

    fn load([floor, bare, create]: [u64; 3]) -> Load {
        let phases = Phases::default();
        Load { floor: samples(floor), bare: samples(bare), create: samples(create), phases }
    }

    fn results() -> Results {
        Results {
            machine: Machine::here("qemu 7.2".to_owned(), "tcg".to_owned(), "/".into()),
            date: "2026-11-22".to_owned(),
            series: load([100, 116, 145]),
            at_once: load([200, 400, 500]),
            width: 8,
            exec: samples(5),
            upload: samples(640),
            download: samples(320),
            file_mib: 64,
            memory: Vec::new(),
            first_snapshot: None,
        }
    }

    #[test]
    fn the_ratio_has_a_line_of_its_own() {
        let lines = results().ratio_lines();
        assert!(lines.starts_with("create/floor p50 ratio 1.45\n"), "{lines}");
        assert!(lines.contains("\ncreate/floor at once p50 ratio 2.50\n"), "{lines}");
        assert!(lines.contains("\ncreate/bare command p50 ratio 1.25\n"), "{lines}");
    }

    #[test]
    fn failures_are_in_the_table_and_named() {
        let mut results = results();
        results.exec.add(Err("exit code 1"));
        assert_eq!(results.failures().collect::<Vec<_>>(), [("exec", "exit code 1")]);
        assert!(results.markdown().contains("| exec `true`, there and back | 1 | 1 | 5.0 | 5.0 | 5.0 |"));
        results.series.floor = Samples::default();
        assert_eq!(results.series.ratios(), None);
        assert!(results.markdown().contains("in series | 0 | 0 | – |"));
    }

    #[test]
    fn throughput_follows_from_the_median() {
        assert!(results().markdown().contains("Files: 100 MiB/s up, 200 MiB/s down"));
    }
}
