//! The text of `bench/PERSISTENCE.md`. Pure.

use std::fmt::Write as _;

use wrenn_bench::{
    machine::Machine,
    statistics::{Samples, ratio},
    table,
};

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
    /// To the first byte of the guest agent.
    pub(crate) floor_resume: Samples,
    /// Until it was there.
    pub(crate) snapshot: Samples,
    /// How long the guest stood still for it.
    pub(crate) stopped: Samples,
    /// To the first result of a command.
    pub(crate) rollback: Samples,
    pub(crate) fork_one: Samples,
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

    fn rows(&self, children: u32) -> [(String, &Samples); 9] {
        [
            ("pause".to_owned(), &self.pause),
            ("floor of it: stop, save devices and pages".to_owned(), &self.floor_pause),
            ("resume to first exec result".to_owned(), &self.resume),
            ("floor of it: restore to first byte".to_owned(), &self.floor_resume),
            ("snapshot while it runs".to_owned(), &self.snapshot),
            ("of that, the guest stood still".to_owned(), &self.stopped),
            ("rollback to first exec result".to_owned(), &self.rollback),
            ("fork of 1 to exec result".to_owned(), &self.fork_one),
            (format!("fork of {children} to exec result in the last"), &self.fork_many),
        ]
    }
}

/// One size of memory.
#[derive(Debug)]
pub(crate) struct Size {
    pub(crate) memory_mib: u64,
    /// What the host has less of for each idle clone.
    pub(crate) clone_bytes: i64,
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
    /// Idle ones.
    pub(crate) clones: u32,
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
            for (what, product, floor) in
                [("resume", &case.resume, &case.floor_resume), ("pause", &case.pause, &case.floor_pause)]
            {
                if let (Some(product), Some(floor)) = (product.summary(), floor.summary()) {
                    let ratio = ratio(product.p50, floor.p50);
                    let _ = writeln!(text, "{what}/floor p50 ratio {ratio:.2} ({name})");
                }
            }
        }
        text
    }

    /// The whole file.
    #[must_use]
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "# Sandboxes that persist\n\n\
             Written by `make bench`; nothing is trimmed. A program in the guest has written the dirty part of its memory with\n\
             bytes that are not zero, and holds it. Times are from before the request until the answer, or until the result of\n\
             `exec true` where it says so. The floor of a resume restores the very files that the pause has written, with the\n\
             same driver and arguments, its namespace and disk ready, until the first byte of `GET /health`. The floor of a pause\n\
             stops that machine and writes devices and private pages, on the same file system; it does not make them durable,\n\
             digest or record them. Pause, floors and resume take turns. How long a guest stood still for a snapshot is what\n\
             the server says: from before the guest is asked to stand still until its processes run again.\n\n",
        );
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
        for size in &self.sizes {
            let bytes = mib(size.clone_bytes as f64);
            let _ = writeln!(
                text,
                "| host memory of an idle clone of {} MiB, beyond the template | {bytes:.1} |",
                size.memory_mib
            );
        }
        let _ = writeln!(
            text,
            "\nThe disk is what the saved state and the layers take in blocks. The memory is how much less `MemAvailable`\n\
             says after {} more clones, for each.",
            self.clones
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn results() -> Results {
        let mut case = Case { paused_bytes: 3 << 20, ..Case::new(1) };
        let some = |millis| Ok::<_, String>(Duration::from_millis(millis));
        case.resume.add(some(150));
        case.floor_resume.add(some(100));
        case.pause.add(some(60));
        case.floor_pause.add(some(30));
        let large = Case { left_out: Some(40 << 30), ..Case::new(50) };
        Results {
            machine: Machine {
                cpu: "A CPU".to_owned(),
                cores: 2,
                memory_mib: 2048,
                kernel: "6.1".to_owned(),
                system: "Debian 12".to_owned(),
                vmm: "qemu 7.2".to_owned(),
                accelerator: "tcg".to_owned(),
                filesystem: "ext2/ext3".to_owned(),
            },
            date: "2026-11-22".to_owned(),
            load: ["0.10".to_owned(), "1.00".to_owned()],
            sizes: vec![Size { memory_mib: 256, clone_bytes: 5 << 19, cases: vec![case, large] }],
            children: 20,
            clones: 10,
        }
    }

    #[test]
    fn the_ratios_have_lines_of_their_own() {
        let lines = results().ratio_lines();
        assert_eq!(
            lines,
            "resume/floor p50 ratio 1.50 (256 MiB, 1% dirty)\npause/floor p50 ratio 2.00 (256 MiB, 1% dirty)\n"
        );
    }

    #[test]
    fn failures_and_what_was_left_out_are_told() {
        let mut results = results();
        results.sizes[0].cases[0].rollback.add(Err("refused"));
        assert_eq!(results.failures(), ["256 MiB, 1% dirty: rollback to first exec result: refused"]);
        let text = results.markdown();
        assert!(text.contains("| rollback to first exec result | 0 | 1 | – | – | – |"), "{text}");
        assert!(text.contains("The fork of 20 is left out: it would have needed 40960 MiB"), "{text}");
    }

    #[test]
    fn disk_and_memory_are_in_mebibytes() {
        let text = results().markdown();
        assert!(text.contains("| disk of a paused sandbox, 256 MiB, 1% dirty | 3.0 |"), "{text}");
        assert!(
            text.contains("| host memory of an idle clone of 256 MiB, beyond the template | 2.5 |"),
            "{text}"
        );
    }
}
