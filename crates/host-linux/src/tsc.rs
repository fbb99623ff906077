//! The rate of the processor's time stamp counter, measured.
//!
//! A guest whose instructions are translated in software reads the host's counter. It is told its rate,
//! because measuring it with emulated timers takes long and goes wrong when the machine is busy. What
//! `/proc/cpuinfo` shows is the processor's present speed, which is another thing.

use std::time::{Duration, Instant};

/// The counter and the clock at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    cycles: u64,
    at: Instant,
}

impl Sample {
    /// Reads both, as close to each other as it can.
    #[must_use]
    pub fn now() -> Self {
        // The narrowest of a few readings: in between, the thread may have lost the processor.
        (0..16)
            .map(|_| {
                let before = Instant::now();
                let cycles = counter();
                let width = before.elapsed();
                (width, Self { cycles, at: before + width / 2 })
            })
            .min_by_key(|(width, _)| *width)
            .map_or_else(|| Self { cycles: counter(), at: Instant::now() }, |(_, sample)| sample)
    }

    /// The rate in kHz since an earlier sample: exact to about ten parts in a million after 50 ms. None
    /// when no time has passed or the counter went backwards.
    #[must_use]
    pub fn khz_since(&self, earlier: &Self) -> Option<u32> {
        let cycles = self.cycles.checked_sub(earlier.cycles)?;
        khz(cycles, self.at.checked_duration_since(earlier.at)?)
    }
}

fn khz(cycles: u64, elapsed: Duration) -> Option<u32> {
    let khz = (u128::from(cycles) * 1_000_000).checked_div(elapsed.as_nanos())?;
    u32::try_from(khz).ok().filter(|khz| *khz > 0)
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it only reads.
    #[allow(unsafe_code, unused_unsafe)]
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

/// There is none: the rate is then none too.
#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_cycles_over_time() {
        assert_eq!(khz(26_000_000, Duration::from_millis(10)), Some(2_600_000));
        assert_eq!(khz(1, Duration::ZERO), None);
        assert_eq!(khz(0, Duration::from_secs(1)), None);
        assert_eq!(khz(u64::MAX, Duration::from_nanos(1)), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn this_processor_counts_at_a_rate_that_one_can_have() {
        let first = Sample::now();
        while first.at.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        let khz = Sample::now().khz_since(&first).unwrap();
        assert!((100_000..10_000_000).contains(&khz), "{khz} kHz");
    }

    #[test]
    fn a_sample_does_not_precede_an_earlier_one() {
        let first = Sample::now();
        assert!(Sample::now().at >= first.at);
    }
}
