//! The text of `bench/GUEST.md`. Pure.

use std::{fmt::Write as _, time::Duration};

use wrenn_bench::{
    machine::Machine,
    memory::Memory,
    statistics::{Samples, Summary, ratio},
    table,
};

/// What one sample of a series is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// How long something took.
    Time,
    /// How long so many bytes took; what is shown is their rate.
    Bytes(u64),
    /// How long so many files took; what is shown is their rate.
    Files(usize),
}

/// One thing that was done many times, by us and perhaps by another.
#[derive(Debug)]
pub(crate) struct Series {
    /// What.
    pub(crate) what: String,
    /// In which unit.
    pub(crate) measure: Measure,
    /// By our agent.
    pub(crate) ours: Samples,
    /// By those we are compared with, in turns in the same run.
    pub(crate) others: Vec<Other>,
}

/// What we are compared with.
#[derive(Debug)]
pub(crate) struct Other {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it did.
    pub(crate) samples: Samples,
}

impl Series {
    /// One that is empty, compared with nothing.
    #[must_use]
    pub(crate) fn alone(what: impl Into<String>, measure: Measure) -> Self {
        Self { what: what.into(), measure, ours: Samples::default(), others: Vec::new() }
    }

    /// One that is empty, compared with others.
    #[must_use]
    pub(crate) fn beside(names: &[&'static str], what: impl Into<String>, measure: Measure) -> Self {
        let others = names.iter().map(|name| Other { name, samples: Samples::default() }).collect();
        Self { others, ..Self::alone(what, measure) }
    }

    fn sides(&self) -> impl Iterator<Item = (&'static str, &Samples)> {
        let others = self.others.iter().map(|other| (other.name, &other.samples));
        [("envd", &self.ours)].into_iter().chain(others)
    }

    /// Of times, ours over the other's, so that less is better; of rates also, so that more is.
    fn ratios(&self) -> Vec<(String, f64)> {
        self.others.iter().flat_map(|other| self.ratios_over(other)).collect()
    }

    fn ratios_over(&self, other: &Other) -> Vec<(String, f64)> {
        let (Some(ours), Some(theirs)) = (self.ours.summary(), other.samples.summary()) else {
            return Vec::new();
        };
        let line = |percentile: &str| format!("envd/{} {} {percentile}", other.name, self.what);
        match self.measure {
            Measure::Time => {
                vec![(line("p50"), ratio(ours.p50, theirs.p50)), (line("p99"), ratio(ours.p99, theirs.p99))]
            }
            Measure::Bytes(_) | Measure::Files(_) => vec![(line("rate"), ratio(theirs.p50, ours.p50))],
        }
    }

    fn cells(&self, Summary { p50, p99, max, .. }: Summary) -> [String; 4] {
        let (unit, show): (_, &dyn Fn(Duration) -> String) = match self.measure {
            Measure::Time => ("ms", &|took| format!("{:.2}", took.as_secs_f64() * 1000.0)),
            Measure::Bytes(bytes) => ("MiB/s", &move |took| {
                format!("{:.1}", bytes as f64 / f64::from(1 << 20) / took.as_secs_f64())
            }),
            Measure::Files(files) => {
                ("files/s", &move |took| format!("{:.0}", files as f64 / took.as_secs_f64()))
            }
        };
        [unit.to_owned(), show(p50), show(p99), show(max)]
    }
}

/// What an agent weighs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight {
    /// Of its program, in bytes.
    pub(crate) binary: u64,
    /// Once it answers.
    pub(crate) started: Memory,
    /// After a hundred programs.
    pub(crate) used: Memory,
    /// After all that is measured.
    pub(crate) last: Memory,
}

/// All that was measured outside of a machine.
#[derive(Debug)]
pub(crate) struct Outside {
    /// What was done.
    pub(crate) series: Vec<Series>,
    /// Ours.
    pub(crate) ours: Weight,
    /// The peer's; none when none was given.
    pub(crate) peer: Option<Weight>,
}

/// All that was measured inside of a machine.
#[derive(Debug)]
pub(crate) struct Inside {
    /// What was done.
    pub(crate) series: Vec<Series>,
    /// How much of the many small files there was time for.
    pub(crate) small_files: (usize, usize),
}

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Results {
    /// Where.
    pub(crate) machine: Machine,
    /// When, to the day.
    pub(crate) date: String,
    /// How busy the machine was before and after.
    pub(crate) load: [String; 2],
    /// The kinds of the two filesystems of files outside.
    pub(crate) filesystems: [String; 2],
    /// In a machine; none when it was not measured.
    pub(crate) inside: Option<Inside>,
    /// Outside; none when it was not measured.
    pub(crate) outside: Option<Outside>,
}

impl Results {
    fn series(&self) -> impl Iterator<Item = &Series> {
        let inside = self.inside.iter().flat_map(|inside| &inside.series);
        inside.chain(self.outside.iter().flat_map(|outside| &outside.series))
    }

    /// Everything that failed, each with what was being done.
    #[must_use]
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        for series in self.series() {
            for (name, samples) in series.sides() {
                all.extend(samples.failures().iter().map(|why| format!("{name}, {}: {why}", series.what)));
            }
        }
        all
    }

    /// The lines for a person who waits.
    #[must_use]
    pub(crate) fn ratio_lines(&self) -> String {
        let mut all: Vec<_> = self.series().flat_map(Series::ratios).collect();
        if let Some(Outside { ours, peer: Some(peer), .. }) = &self.outside {
            let memory = |ours: Memory, peer: Memory| ours.rss_kib as f64 / peer.rss_kib as f64;
            all.push(("envd/peer RSS when started".to_owned(), memory(ours.started, peer.started)));
            all.push(("envd/peer RSS after 100 programs".to_owned(), memory(ours.used, peer.used)));
            all.push(("envd/peer size of the program".to_owned(), ours.binary as f64 / peer.binary as f64));
        }
        let mut text = String::new();
        for (what, ratio) in all {
            let _ = writeln!(text, "{what} ratio {ratio:.2}");
        }
        text
    }

    /// The whole file.
    #[must_use]
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "# The guest agent\n\n\
             Written by `make bench`; nothing is trimmed. The client is a blocking socket with requests made ahead. Ratios are ours\n\
             over the other's: of times, memory and size less is better, of rates more. Who is compared took turns in one run.\n\n\
             Aims: in a machine, files at 0.8 of a raw TCP copy. Beside the peer: half its time for a program, half its memory, a\n\
             fifth of its size, and at least its rates.\n\n",
        );
        let [before, after] = &self.load;
        let load = ("load before and after", format!("{before} and {after}"));
        table::write_about(&mut text, &[("date", self.date.clone()), load], &self.machine, &[]);
        if let Some(inside) = &self.inside {
            text.push_str(
                "\n## In a microVM, from the host's side\n\n\
                 One connection that is kept, straight to the guest's address. A raw TCP copy is a program in the guest that takes or\n\
                 gives as many bytes and does nothing with them; one of a file writes them to such a file, or reads them from it.\n\n",
            );
            write_series(&mut text, &inside.series);
            let (done, wanted) = inside.small_files;
            let _ = writeln!(text, "\nMany small files: {done} of {wanted} in the time there was for them.");
        }
        if let Some(outside) = &self.outside {
            let _ = writeln!(
                text,
                "\n## Outside of a machine\n\n\
                 Each agent in a network namespace of its own. Files are on {} and on {}.\n",
                self.filesystems[0], self.filesystems[1]
            );
            if outside.peer.is_none() {
                text.push_str("No peer given.\n\n");
            }
            write_series(&mut text, &outside.series);
            write_weights(&mut text, outside);
        }
        let _ = write!(text, "\n## Ratios\n\n```text\n{}```\n", self.ratio_lines());
        text
    }
}

fn write_series(text: &mut String, all: &[Series]) {
    let _ = writeln!(text, "| what | by | count | failures | unit | p50 | p99 | worst |");
    let _ = writeln!(text, "|---|---|---:|---:|---|---:|---:|---:|");
    for series in all {
        for (name, samples) in series.sides() {
            let cells = match samples.summary() {
                Some(summary) => series.cells(summary).join(" | "),
                None => "– | – | – | –".to_owned(),
            };
            let failures = samples.failures().len();
            let count = samples.len() - failures;
            let _ = writeln!(text, "| {} | {name} | {count} | {failures} | {cells} |", series.what);
        }
    }
}

fn write_weights(text: &mut String, Outside { ours, peer, .. }: &Outside) {
    let _ = writeln!(
        text,
        "\n| agent | program, KiB | RSS in MiB when started | after 100 programs | at the end |"
    );
    let _ = writeln!(text, "|---|---:|---:|---:|---:|");
    let mib = |memory: Memory| format!("{:.1}", memory.rss_kib as f64 / 1024.0);
    for (name, weight) in [("envd", Some(ours)), ("peer", peer.as_ref())] {
        if let Some(Weight { binary, started, used, last }) = weight {
            let cells = [(binary / 1024).to_string(), mib(*started), mib(*used), mib(*last)];
            let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
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

    fn series(what: &str, measure: Measure, ours: u64, peer: Option<u64>) -> Series {
        let others = peer.map(|peer| Other { name: "peer", samples: samples(peer) }).into_iter().collect();
        Series { what: what.to_owned(), measure, ours: samples(ours), others }
    }

    fn weight(kib: u64) -> Weight {
        let memory = Memory { processes: 1, pss_kib: kib, rss_kib: kib, private_dirty_kib: kib };
        Weight { binary: kib << 10, started: memory, used: memory, last: memory }
    }

    fn results(peer: bool) -> Results {
        Results {
            machine: Machine::here("qemu 7.2".to_owned(), "tcg".to_owned(), "/".into()),
            date: "2026-11-22".to_owned(),
            load: ["0.1".to_owned(), "2.0".to_owned()],
            filesystems: ["tmpfs".to_owned(), "ext2/ext3".to_owned()],
            inside: None,
            outside: Some(Outside {
                series: vec![
                    series("exec", Measure::Time, 2, peer.then_some(4)),
                    series("upload", Measure::Bytes(64 << 20), 100, peer.then_some(200)),
                    series("small files", Measure::Files(1000), 500, peer.then_some(250)),
                ],
                ours: weight(1024),
                peer: peer.then(|| weight(2048)),
            }),
        }
    }

    #[test]
    fn ratios_are_ours_over_the_peers() {
        let lines = results(true).ratio_lines();
        for line in [
            "envd/peer exec p50 ratio 0.50\n",
            "envd/peer upload rate ratio 2.00\n",
            "envd/peer small files rate ratio 0.50\n",
            "envd/peer RSS when started ratio 0.50\n",
            "envd/peer size of the program ratio 0.50\n",
        ] {
            assert!(lines.contains(line), "{lines}");
        }
        assert_eq!(results(false).ratio_lines(), "");
    }

    #[test]
    fn rows_show_rates_in_their_units() {
        let text = results(true).markdown();
        for row in [
            "| exec | envd | 1 | 0 | ms | 2.00 | 2.00 | 2.00 |",
            "| upload | envd | 1 | 0 | MiB/s | 640.0 | 640.0 | 640.0 |",
            "| small files | peer | 1 | 0 | files/s | 4000 | 4000 | 4000 |",
            "| peer | 2048 | 2.0 | 2.0 | 2.0 |",
        ] {
            assert!(text.contains(row), "{text}");
        }
        assert!(results(false).markdown().contains("No peer given."));
    }

    #[test]
    fn failures_are_counted_and_named() {
        let mut results = results(false);
        let outside = results.outside.as_mut().unwrap();
        outside.series[0].ours = Samples::default();
        outside.series[0].ours.add(Err::<Duration, _>("exit code 1"));
        assert_eq!(results.failures(), ["envd, exec: exit code 1"]);
        assert!(results.markdown().contains("| exec | envd | 0 | 1 | – | – | – | – |"));
    }
}
