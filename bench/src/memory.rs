//! What processes hold of the host's memory: their share of what is shared (PSS) and all of it (RSS).

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Memory of one or more processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// How many processes.
    pub processes: usize,
    /// Proportional set size in KiB.
    pub pss_kib: u64,
    /// Resident set size in KiB.
    pub rss_kib: u64,
    /// In KiB, what was written and is nobody else's: it would be free if the process ended.
    pub private_dirty_kib: u64,
}

impl Memory {
    /// Adds up the processes of a stack whose command line says what `is_one` looks for.
    ///
    /// # Errors
    /// /proc cannot be read. A process that ended meanwhile counts as none.
    pub fn of(is_one: impl Fn(&[&str]) -> bool) -> Result<Self> {
        let mut sum = Self::default();
        for one in Self::each_of(is_one)? {
            sum.processes += 1;
            sum.pss_kib += one.pss_kib;
            sum.rss_kib += one.rss_kib;
            sum.private_dirty_kib += one.private_dirty_kib;
        }
        Ok(sum)
    }

    /// The same processes, one by one.
    ///
    /// # Errors
    /// As [`Memory::of`].
    pub fn each_of(is_one: impl Fn(&[&str]) -> bool) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc").context("list processes")? {
            let path = entry.context("list processes")?.path();
            let Ok(command_line) = fs::read(path.join("cmdline")) else { continue };
            let text = String::from_utf8_lossy(&command_line);
            let words: Vec<&str> = text.trim_end_matches('\0').split('\0').collect();
            if !words[0].is_empty() && is_one(&words) {
                all.extend(Self::in_directory(&path));
            }
        }
        Ok(all)
    }

    /// Memory of one process.
    ///
    /// # Errors
    /// It has ended.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::in_directory(&PathBuf::from(format!("/proc/{pid}")))
            .with_context(|| format!("process {pid} has ended"))
    }

    fn in_directory(process: &Path) -> Option<Self> {
        let rollup = fs::read_to_string(process.join("smaps_rollup")).ok()?;
        Some(Self {
            processes: 1,
            pss_kib: kib(&rollup, "Pss:")?,
            rss_kib: kib(&rollup, "Rss:")?,
            private_dirty_kib: kib(&rollup, "Private_Dirty:")?,
        })
    }

    /// One process out of several that are alike.
    #[must_use]
    pub fn each(self) -> Self {
        let processes = self.processes.max(1) as u64;
        Self {
            processes: 1,
            pss_kib: self.pss_kib / processes,
            rss_kib: self.rss_kib / processes,
            private_dirty_kib: self.private_dirty_kib / processes,
        }
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
        let process = Memory::of_process(std::process::id()).unwrap();
        assert_eq!(process.processes, 1);
        assert!(process.private_dirty_kib > 0 && process.private_dirty_kib <= process.rss_kib);
        assert_eq!(Memory::each_of(|words| words[0] == own).unwrap().len(), memory.processes);
    }
}
