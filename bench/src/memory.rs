//! What processes hold of the host's memory: their share of what is shared (PSS) and all of it (RSS).

use std::fs;

use anyhow::{Context as _, Result};

/// Memory of one or more processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// How many processes.
    pub(crate) processes: usize,
    /// Proportional set size in KiB.
    pub(crate) pss_kib: u64,
    /// Resident set size in KiB.
    pub(crate) rss_kib: u64,
}

impl Memory {
    /// Adds up the processes of a stack whose command line says what `is_one` looks for.
    ///
    /// # Errors
    /// /proc cannot be read. A process that ended meanwhile counts as none.
    pub(crate) fn of(is_one: impl Fn(&[&str]) -> bool) -> Result<Self> {
        let mut sum = Self::default();
        for entry in fs::read_dir("/proc").context("list processes")? {
            let path = entry.context("list processes")?.path();
            let Ok(command_line) = fs::read(path.join("cmdline")) else { continue };
            let text = String::from_utf8_lossy(&command_line);
            let words: Vec<&str> = text.trim_end_matches('\0').split('\0').collect();
            if words[0].is_empty() || !is_one(&words) {
                continue;
            }
            let Ok(rollup) = fs::read_to_string(path.join("smaps_rollup")) else { continue };
            if let (Some(pss), Some(rss)) = (kib(&rollup, "Pss:"), kib(&rollup, "Rss:")) {
                sum.processes += 1;
                sum.pss_kib += pss;
                sum.rss_kib += rss;
            }
        }
        Ok(sum)
    }

    /// One process out of several that are alike.
    #[must_use]
    pub(crate) fn each(self) -> Self {
        let processes = self.processes.max(1) as u64;
        Self { processes: 1, pss_kib: self.pss_kib / processes, rss_kib: self.rss_kib / processes }
    }
}

fn kib(rollup: &str, name: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollup_is_read() {
        let text = "00400000-7ffc [rollup]\nRss:                1500 kB\nPss:                 900 kB\nPss_Anon: 1 kB\n";
        assert_eq!((kib(text, "Pss:"), kib(text, "Rss:"), kib(text, "Swap:")), (Some(900), Some(1500), None));
    }

    #[test]
    fn this_process_is_found() {
        let own = std::env::args().next().unwrap();
        let memory = Memory::of(|words| words[0] == own).unwrap();
        assert!(memory.processes >= 1 && memory.pss_kib > 0 && memory.rss_kib >= memory.pss_kib);
    }
}
