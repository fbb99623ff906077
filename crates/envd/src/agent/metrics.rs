//! `GET /metrics`: what the guest uses of its processors, memory and disk.
//!
//! The share of the processors is that of the time since the last question, so two who ask get two short intervals;
//! the first interval begins when the agent starts.

use std::{
    fs,
    io::{self, Read},
    path::Path,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

/// The most that is read of a file of the kernel. The processors come first, and a line is shorter than 256 bytes.
const MAXIMUM_FILE: u64 = 256 << 10;
const MIB: u64 = 1 << 20;

/// The answer. The names are those of the contract, some of them twice.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Metrics {
    /// Seconds since 1970.
    ts: u64,
    cpu_count: u32,
    /// Of all processors together, from 0 to 100, with two decimals.
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_used: u64,
    disk_total: u64,
}

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MetricsError {
    #[error("cannot read {path}")]
    Read {
        path: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{0} is not what it must be")]
    Form(&'static str),
}

/// Remembers what the processors had done when somebody asked last.
#[derive(Debug)]
pub(crate) struct Meter {
    last: Mutex<Processors>,
}

impl Meter {
    /// Begins the first interval.
    pub(crate) fn start() -> Self {
        // Without a beginning the first interval is the time since boot.
        let now = processors().unwrap_or_default();
        Self { last: Mutex::new(now) }
    }

    /// What is used now.
    pub(crate) fn read(&self) -> Result<Metrics, MetricsError> {
        let memory = Memory::parse(&read("/proc/meminfo")?).ok_or(MetricsError::Form("/proc/meminfo"))?;
        let disk = rustix::fs::statvfs(Path::new("/"))
            .map_err(|error| MetricsError::Read { path: "/", source: error.into() })?;
        let disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
        let disk_free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let now = processors()?;
        let before = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), now);
        Ok(Metrics {
            ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            cpu_count: now.count,
            cpu_used_pct: now.used_since(&before),
            mem_total: memory.total,
            mem_used: memory.used(),
            mem_cache: memory.cache,
            mem_total_mib: memory.total / MIB,
            mem_used_mib: memory.used() / MIB,
            disk_used: disk_total.saturating_sub(disk_free),
            disk_total,
        })
    }
}

fn processors() -> Result<Processors, MetricsError> {
    Processors::parse(&read("/proc/stat")?).ok_or(MetricsError::Form("/proc/stat"))
}

fn read(path: &'static str) -> Result<Vec<u8>, MetricsError> {
    let attempt = || {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(MAXIMUM_FILE).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    attempt().map_err(|source| MetricsError::Read { path, source })
}

/// What all processors have done since boot, in ticks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Processors {
    count: u32,
    busy: u64,
    all: u64,
}

impl Processors {
    /// Reads `/proc/stat`: `cpu user nice system idle iowait irq softirq steal …`, then one line for each processor.
    fn parse(text: &[u8]) -> Option<Self> {
        let mut sum = None;
        let mut count = 0_u32;
        for line in text.split(|byte| *byte == b'\n') {
            match line.strip_prefix(b"cpu") {
                Some([b' ', ticks @ ..]) if sum.is_none() => sum = Some(ticks),
                Some([b'0'..=b'9', ..]) => count = count.saturating_add(1),
                _ => {}
            }
        }
        let mut ticks = [0_u64; 8];
        let mut fields = std::str::from_utf8(sum?).ok()?.split_ascii_whitespace();
        for (index, tick) in ticks.iter_mut().enumerate() {
            match fields.next() {
                Some(field) => *tick = field.parse().ok()?,
                // Kernels of old have fewer.
                None if index >= 4 => break,
                None => return None,
            }
        }
        let all = ticks.iter().fold(0_u64, |all, tick| all.saturating_add(*tick));
        let idle = ticks[3].saturating_add(ticks[4]);
        Some(Self { count: count.max(1), busy: all.saturating_sub(idle), all })
    }

    /// The share that was not idle since `before`, in percent with two decimals. The kernel's counters of idle time
    /// may go back a little.
    fn used_since(&self, before: &Self) -> f64 {
        let busy = self.busy.saturating_sub(before.busy);
        let all = self.all.saturating_sub(before.all);
        if all == 0 {
            return 0.0;
        }
        // In hundredths of a percent, so that what is printed is exact.
        let share = u128::from(busy.min(all)) * 10_000 / u128::from(all);
        u16::try_from(share).map_or(100.0, |share| f64::from(share) / 100.0)
    }
}

/// The memory, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Memory {
    total: u64,
    available: u64,
    cache: u64,
}

impl Memory {
    /// Reads `/proc/meminfo`.
    fn parse(text: &[u8]) -> Option<Self> {
        let value = |name: &[u8]| {
            let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name))?;
            let (number, unit) = std::str::from_utf8(line).ok()?.trim().split_once(' ')?;
            (unit == "kB").then_some(())?;
            number.parse::<u64>().ok()?.checked_mul(1024)
        };
        let total = value(b"MemTotal:")?;
        let available = value(b"MemAvailable:").or_else(|| value(b"MemFree:"))?;
        let cache = value(b"Cached:")?.saturating_add(value(b"SReclaimable:").unwrap_or_default());
        Some(Self { total, available: available.min(total), cache: cache.min(total) })
    }

    /// What programs could not get if they asked for it.
    fn used(&self) -> u64 {
        self.total - self.available
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAT: &[u8] =
        b"cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 50 0 25 400 25 0 0 0 0 0\ncpu1 1 2 3\nintr 5 0 0\nctxt 7\n";
    const MEMORY: &[u8] = b"MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     600 kB\n\
                            Buffers:           10 kB\nCached:           300 kB\nSwapCached:         0 kB\n\
                            SReclaimable:      50 kB\n";

    #[test]
    fn the_processors_are_counted_and_summed() {
        let first = Processors::parse(STAT).unwrap();
        assert_eq!(first, Processors { count: 2, busy: 150, all: 1000 });
        let later = Processors { count: 2, busy: 183, all: 1100 };
        assert!((later.used_since(&first) - 33.0).abs() < f64::EPSILON);
        assert!((first.used_since(&first)).abs() < f64::EPSILON);
        assert!(first.used_since(&later).abs() < f64::EPSILON, "counters that went back");
        assert_eq!(Processors::parse(b"cpu  1 2 3\n"), None);
        assert_eq!(Processors::parse(b"cpu  1 2 3 x\n"), None);
        assert_eq!(Processors::parse(b"cpu  1 2 3 4\n").unwrap().busy, 6);
    }

    #[test]
    fn the_memory_in_use_is_what_nobody_else_can_have() {
        let memory = Memory::parse(MEMORY).unwrap();
        assert_eq!((memory.total, memory.used(), memory.cache), (1000 << 10, 400 << 10, 350 << 10));
        assert_eq!(Memory::parse(b"MemTotal: 5 kB\n"), None);
        assert_eq!(Memory::parse(b"MemTotal: 5 MB\nMemFree: 1 kB\nCached: 0 kB"), None);
    }

    #[test]
    fn this_machine_can_be_measured() {
        let metrics = Meter::start().read().unwrap();
        assert!(metrics.mem_total > metrics.mem_used && metrics.mem_used > 0, "{metrics:?}");
        assert!(metrics.disk_total >= metrics.disk_used && metrics.disk_total > 0, "{metrics:?}");
        assert!(metrics.cpu_count > 0 && metrics.ts > 1_700_000_000, "{metrics:?}");
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct), "{metrics:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            Processors::parse(&bytes);
            Memory::parse(&bytes);
        }

        #[test]
        fn a_share_is_a_share(
            ticks in prop::collection::vec(any::<u64>(), 0..12),
            busy in any::<u64>(),
            all in any::<u64>(),
        ) {
            let text: String = ticks.iter().map(|tick| format!(" {tick}")).collect();
            if let Some(now) = Processors::parse(format!("cpu {text}\n").as_bytes()) {
                prop_assert!(ticks.len() >= 4);
                let used = now.used_since(&Processors { count: 1, busy, all });
                prop_assert!((0.0..=100.0).contains(&used));
            }
        }

        #[test]
        fn memory_in_use_is_never_more_than_there_is(
            total in any::<u64>(), available in any::<u64>(), cached in any::<u64>(), slab in any::<u64>(),
        ) {
            let text = format!(
                "MemTotal: {total} kB\nMemAvailable: {available} kB\nCached: {cached} kB\nSReclaimable: {slab} kB\n"
            );
            if let Some(memory) = Memory::parse(text.as_bytes()) {
                prop_assert!(memory.used() <= memory.total && memory.cache <= memory.total);
            }
        }
    }
}
