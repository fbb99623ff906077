//! The text of `bench/PERSISTENCE.md`. Pure.

use std::fmt::Write as _;

use wrenn_bench::{
    machine::Machine,
    statistics::{Samples, ratio, spread},
    table,
};

use crate::idle::Idle;

/// One part of the memory that is dirty.
#[derive(Debug, Default)]
pub(crate) struct Case {
    /// The part.
    pub(crate) percent: u64,
    pub(crate) pause: Samples,
    /// The machine stopped, devices and pages written.
    pub(crate) floor_pause: Samples,
    /// To the first result of a command.
    pub(crate) resume: Samples,
    /// The same by a bare program.
    pub(crate) floor_resume: Samples,
    /// To the first byte of the guest agent.
    pub(crate) floor_first_byte: Samples,
    /// Until it was there.
    pub(crate) snapshot: Samples,
    /// How long the guest stood still for it.
    pub(crate) stopped: Samples,
    /// How long a bare program stops the machine to save it and put it on its next overlay.
    pub(crate) floor_stopped: Samples,
    /// To the first result of a command.
    pub(crate) rollback: Samples,
    /// The same by a bare program.
    pub(crate) floor_rollback: Samples,
    pub(crate) fork_one: Samples,
    /// The same by a bare program.
    pub(crate) floor_fork: Samples,
    pub(crate) fork_many: Samples,
    /// The large fork would have needed so many bytes, and the machine does not have them.
    pub(crate) left_out: Option<u64>,
    /// What the sandbox took on the disk when it was paused the last time.
    pub(crate) paused_bytes: u64,
}

impl Case {
    /// Nothing measured yet.
    pub(crate) fn new(percent: u64) -> Self {
        Self { percent, ..Self::default() }
    }

    fn rows(&self, children: u32) -> [(String, &Samples); 13] {
        [
            ("pause".to_owned(), &self.pause),
            ("floor of it: stop, save devices and pages".to_owned(), &self.floor_pause),
            ("resume to first exec result".to_owned(), &self.resume),
            ("floor: restore to first exec result by a bare program".to_owned(), &self.floor_resume),
            ("floor: restore to first byte".to_owned(), &self.floor_first_byte),
            ("snapshot while it runs".to_owned(), &self.snapshot),
            ("of that, the guest stood still".to_owned(), &self.stopped),
            (
                "floor of that: stop, save devices and pages, next overlay, continue".to_owned(),
                &self.floor_stopped,
            ),
            ("rollback to first exec result".to_owned(), &self.rollback),
            (
                "floor of it: end the machine, restore to first exec result by a bare program".to_owned(),
                &self.floor_rollback,
            ),
            ("fork of 1 to exec result".to_owned(), &self.fork_one),
            (
                "floor of it: save and continue, restore the copy to first exec result by a bare program"
                    .to_owned(),
                &self.floor_fork,
            ),
            (format!("fork of {children} to exec result in the last"), &self.fork_many),
        ]
    }

    /// What is told beside what: the product's, and the least that anyone needs.
    fn pairs(&self) -> [(&'static str, &Samples, &Samples); 6] {
        [
            ("resume/floor to first exec result", &self.resume, &self.floor_resume),
            ("resume/floor to first byte", &self.resume, &self.floor_first_byte),
            ("pause/floor", &self.pause, &self.floor_pause),
            ("stop of a snapshot/floor", &self.stopped, &self.floor_stopped),
            ("rollback/floor", &self.rollback, &self.floor_rollback),
            ("fork of 1/floor", &self.fork_one, &self.floor_fork),
        ]
    }
}

/// One size of memory.
#[derive(Debug)]
pub(crate) struct Size {
    pub(crate) memory_mib: u64,
    /// What idle clones take.
    pub(crate) idle: Idle,
    pub(crate) cases: Vec<Case>,
}

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// When, to the day.
    pub(crate) date: String,
    /// How many processes wanted to run, before and after.
    pub(crate) load: [String; 2],
    pub(crate) sizes: Vec<Size>,
    /// Of the large fork.
    pub(crate) children: u32,
}

impl Results {
    fn cases(&self) -> impl Iterator<Item = (String, &Case)> {
        self.sizes.iter().flat_map(|size| {
            size.cases.iter().map(|case| (format!("{} MiB, {}% dirty", size.memory_mib, case.percent), case))
        })
    }

    /// Everything that failed, each with what was being done.
    #[must_use]
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (name, case) in self.cases() {
            for (what, samples) in case.rows(self.children) {
                all.extend(samples.failures().iter().map(|why| format!("{name}: {what}: {why}")));
            }
        }
        all
    }

    /// The lines for a person who waits.
    #[must_use]
    pub(crate) fn ratio_lines(&self) -> String {
        let mut text = String::new();
        for (name, case) in self.cases() {
            for (what, product, floor) in case.pairs() {
                if let (Some(product), Some(floor)) = (product.summary(), floor.summary()) {
                    let ratio = ratio(product.p50, floor.p50);
                    let _ = writeln!(text, "{what} p50 ratio {ratio:.2} ({name})");
                }
            }
        }
        text
    }

    /// The whole file.
    #[must_use]
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(HEAD);
        let [before, after] = &self.load;
        let load = ("load of the last minute", format!("{before} before, {after} after"));
        table::write_about(&mut text, &[("date", self.date.clone())], &self.machine, &[load]);
        let _ = writeln!(text, "\n```text\n{}```\n", self.ratio_lines());
        for (name, case) in self.cases() {
            let _ = writeln!(text, "## {name}: times in milliseconds\n");
            table::write_samples_head(&mut text);
            for (what, samples) in case.rows(self.children) {
                table::write_samples(&mut text, &what, samples);
            }
            text.push('\n');
            if let Some(needed) = case.left_out {
                let _ = writeln!(
                    text,
                    "The fork of {} is left out: it would have needed {} MiB, too much for the memory of this machine.\n",
                    self.children,
                    needed >> 20
                );
            }
        }
        self.write_sizes(&mut text);
        text
    }

    fn write_sizes(&self, text: &mut String) {
        let _ = writeln!(text, "## Disk and memory\n\n| | MiB |\n|---|---:|");
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        for (name, case) in self.cases() {
            let bytes = mib(case.paused_bytes as f64);
            let _ = writeln!(text, "| disk of a paused sandbox, {name} | {bytes:.1} |");
        }
        let _ = writeln!(text, "\nThe disk is what the saved state and the layers take in blocks.\n");
        let _ = writeln!(
            text,
            "| host memory of an idle clone, beyond the template | clones | readings | MiB in the middle | least | most |\n\
             |---|---:|---:|---:|---:|---:|"
        );
        for Size { memory_mib, idle, .. } in &self.sizes {
            for (what, values) in [
                ("less of `MemAvailable` for each", &idle.taken),
                ("of that, private dirty pages of its VMM", &idle.private),
            ] {
                let cells = match spread(values) {
                    Some([least, middle, most]) => {
                        [middle, least, most].map(|it| format!("{:.1}", mib(it as f64))).join(" | ")
                    }
                    None => "– | – | –".to_owned(),
                };
                let (clones, readings) = (idle.clones, values.len());
                let _ = writeln!(text, "| {memory_mib} MiB: {what} | {clones} | {readings} | {cells} |");
            }
        }
        text.push_str(IDLE);
        for Size { memory_mib, idle, .. } in &self.sizes {
            if idle.unsettled > 0 {
                let _ = writeln!(
                    text,
                    "\nOf {memory_mib} MiB, {} readings of `MemAvailable` were taken although it had not settled.",
                    idle.unsettled
                );
            }
        }
    }
}

/// What the numbers are.
const HEAD: &str = "\
# Sandboxes that persist

Written by `make bench`; nothing is trimmed. A program in the guest has written the dirty part of its memory with
bytes that are not zero, and holds it. Times are from before the request until the answer, or until the result of
`exec true` where it says so. How long a guest stood still for a snapshot is what the server says: from before the guest
is asked to stand still until its processes run again.

The floors are those of a bare program, which takes turns with the product within the run. It works on the very files
that the product has just saved, with the same driver and arguments, its namespaces and empty overlays ready; it has no
API, no database and no records, and makes nothing durable, digests nothing, and asks no guest to stand still.

- Restore to first exec result: it restores the files, lets the guest run, gives it its identity (`POST /init`) and runs
  `true` in it, on one connection, as any resume has to before a command has a result.
- Restore to first byte: the same restore, until the first byte of `GET /health`; no identity, no command.
- Pause: it stops such a machine and writes devices and private pages, on the same file system.
- Stop of a snapshot: it stops such a machine, writes devices and private pages, puts it on its next overlay, without which
  the disk would change under the snapshot, and lets it go on.
- Rollback: it ends such a machine, and restores the snapshot to the first exec result.
- Fork of 1: that stop of a snapshot, and then the restore of a copy from what it wrote, to the first exec result.

";

/// How the memory of clones is measured.
const IDLE: &str = "
In each round the clones are made and deleted again, beside one that stays and has mapped the template, after a round that
is not counted. What is less of `MemAvailable` is the difference to the mean of before and after, divided by the clones; a
reading is taken when it agrees with the two before it, within a quarter of a MiB for each clone. It has everything in it:
VMM, page tables, namespace, and what agent and control plane remember. The private dirty pages are of each VMM, as its
`smaps_rollup` says.
";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn results() -> Results {
        let mut case = Case { paused_bytes: 3 << 20, ..Case::new(1) };
        let some = |millis| Ok::<_, String>(Duration::from_millis(millis));
        case.resume.add(some(150));
        case.floor_resume.add(some(120));
        case.floor_first_byte.add(some(100));
        case.stopped.add(some(50));
        case.floor_stopped.add(some(20));
        case.rollback.add(some(220));
        case.floor_rollback.add(some(200));
        case.fork_one.add(some(210));
        case.floor_fork.add(some(150));
        case.pause.add(some(60));
        case.floor_pause.add(some(30));
        let idle = Idle {
            clones: 16,
            taken: vec![3 << 20, 5 << 19, 7 << 19],
            private: vec![1 << 20; 4],
            unsettled: 0,
        };
        let large = Case { left_out: Some(40 << 30), ..Case::new(50) };
        Results {
            machine: Machine::here("qemu 7.2".to_owned(), "tcg".to_owned(), "/".into()),
            date: "2026-11-22".to_owned(),
            load: ["0.10".to_owned(), "1.00".to_owned()],
            sizes: vec![Size { memory_mib: 256, idle, cases: vec![case, large] }],
            children: 20,
        }
    }

    #[test]
    fn the_ratios_have_lines_of_their_own() {
        let expected = [
            "resume/floor to first exec result p50 ratio 1.25",
            "resume/floor to first byte p50 ratio 1.50",
            "pause/floor p50 ratio 2.00",
            "stop of a snapshot/floor p50 ratio 2.50",
            "rollback/floor p50 ratio 1.10",
            "fork of 1/floor p50 ratio 1.40",
        ];
        let lines = results().ratio_lines();
        assert_eq!(
            lines.lines().collect::<Vec<_>>(),
            expected.map(|line| format!("{line} (256 MiB, 1% dirty)"))
        );
        assert!(results().markdown().contains(&lines));
    }

    #[test]
    fn failures_and_what_was_left_out_are_told() {
        let mut results = results();
        results.sizes[0].cases[1].rollback.add(Err("refused"));
        assert_eq!(results.failures(), ["256 MiB, 50% dirty: rollback to first exec result: refused"]);
        let text = results.markdown();
        assert!(text.contains("| rollback to first exec result | 0 | 1 | – | – | – |"), "{text}");
        assert!(text.contains("The fork of 20 is left out: it would have needed 40960 MiB"), "{text}");
    }

    #[test]
    fn disk_and_memory_are_in_mebibytes() {
        let text = results().markdown();
        assert!(text.contains("| disk of a paused sandbox, 256 MiB, 1% dirty | 3.0 |"), "{text}");
        assert!(
            text.contains("| 256 MiB: less of `MemAvailable` for each | 16 | 3 | 3.0 | 2.5 | 3.5 |"),
            "{text}"
        );
        assert!(
            text.contains("| 256 MiB: of that, private dirty pages of its VMM | 16 | 4 | 1.0 | 1.0 | 1.0 |"),
            "{text}"
        );
        assert!(!text.contains("had not settled"));
        let mut results = results();
        results.sizes[0].idle.unsettled = 2;
        assert!(results.markdown().contains("Of 256 MiB, 2 readings of `MemAvailable` were taken although"));
    }
}
