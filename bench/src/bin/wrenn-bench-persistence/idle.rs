//! What a clone that does nothing takes of the host's memory beyond the template, in two ways.
//!
//! ```text
//!  one clone, which stays ─► n more, and they go: caches and pools are warm
//!   ─► without ─► n more: with ─► without ─► with ─► without …      a reading is taken when two in a row agree
//!                           └► private dirty pages of each VMM, from the kernel's own books
//! ```
//!
//! What the host has less of is everything: the VMM, its page tables, the namespace, and what agent and control plane
//! remember. It is the difference between what `MemAvailable` says with the clones and the mean of what it says without
//! them before and after, so that what drifts slowly is not taken for a clone's. A page of the template that is mapped is
//! a page of the file, which is available. The private pages are exact, and of the VMM alone.

use std::time::Duration;

use anyhow::{Context as _, Result};
use wrenn_bench::memory::Memory;

use crate::{Bench, CLONE, SHARE};

/// How often the memory is read while it is waited for.
const READ_AGAIN: Duration = Duration::from_millis(500);
/// Two readings agree that differ by no more bytes for each clone.
const AGREEMENT: u64 = 1 << 18;
/// How many readings in a row have to agree with the one before.
const AGREEMENTS: usize = 2;
/// How many readings there are at most: half a minute.
const READINGS: usize = 60;

/// What was measured of the clones of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Idle {
    /// How many there were at a time.
    pub(crate) clones: u32,
    /// What the host had less of for each of them, in bytes, once a round.
    pub(crate) taken: Vec<i64>,
    /// The private dirty pages of each VMM, in bytes.
    pub(crate) private: Vec<i64>,
    /// How many readings were taken although they did not agree with those before.
    pub(crate) unsettled: usize,
}

impl Bench<'_> {
    /// Measures clones of so much memory, as many as asked for, or as fit.
    pub(crate) async fn idle_clones(&mut self, memory: u64) -> Result<Idle> {
        let (numerator, denominator) = SHARE;
        let fit = available()? / denominator * numerator / CLONE;
        let clones = self.arguments.clones.min(u32::try_from(fit)?).max(1);
        eprintln!("{memory} MiB: {clones} idle clones, {} rounds", self.arguments.clone_rounds);
        let mut idle = Idle { clones, ..Idle::default() };
        let first = self.api.create(memory).await?;
        let warm = self.create_all(memory, clones).await?;
        self.delete_all(&warm).await?;
        let mut without = vec![self.settled(&mut idle).await?];
        let mut with = Vec::new();
        for _ in 0..self.arguments.clone_rounds {
            let ids = self.create_all(memory, clones).await?;
            with.push(self.settled(&mut idle).await?);
            let mark = format!("guest=wrenn-{}-", self.instance);
            let machines = Memory::each_of(|words| words.iter().any(|word| word.starts_with(&mark)))?;
            idle.private.extend(machines.iter().map(|it| it.private_dirty_kib.cast_signed() << 10));
            self.delete_all(&ids).await?;
            without.push(self.settled(&mut idle).await?);
        }
        self.api.delete(&first).await?;
        idle.taken = taken(&without, &with, clones);
        Ok(idle)
    }

    async fn create_all(&mut self, memory: u64, clones: u32) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for _ in 0..clones {
            ids.push(self.api.create(memory).await?);
        }
        Ok(ids)
    }

    async fn delete_all(&mut self, ids: &[String]) -> Result<()> {
        for id in ids {
            self.api.delete(id).await?;
        }
        Ok(())
    }

    /// What is available once that does not change any more.
    async fn settled(&self, idle: &mut Idle) -> Result<u64> {
        let (mut last, mut agreements) = (available()?, 0);
        for _ in 0..READINGS {
            tokio::time::sleep(READ_AGAIN).await;
            let now = available()?;
            agreements =
                if now.abs_diff(last) <= AGREEMENT * u64::from(idle.clones) { agreements + 1 } else { 0 };
            last = now;
            if agreements == AGREEMENTS {
                return Ok(last);
            }
        }
        idle.unsettled += 1;
        Ok(last)
    }
}

/// What one of the clones took in each round: what was available without them, on average of before and after, less what
/// was available with them.
fn taken(without: &[u64], with: &[u64], clones: u32) -> Vec<i64> {
    let around = without.windows(2).map(|pair| pair[0].midpoint(pair[1]));
    let difference =
        |(without, with): (u64, &u64)| (without.cast_signed() - with.cast_signed()) / i64::from(clones);
    around.zip(with).map(difference).collect()
}

/// What the host could give to a new program.
pub(crate) fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo names no MemAvailable")? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drifts_is_not_taken_for_a_clones() {
        // 100 less in every step, and 2 clones that take 1000 each.
        assert_eq!(taken(&[10_000, 9_800, 9_600], &[7_900, 7_700], 2), [1000, 1000]);
        assert_eq!(taken(&[10, 10], &[20], 1), [-10], "what is given back is told too");
    }

    #[test]
    fn there_is_memory() {
        assert!(available().unwrap() > 0);
    }
}
