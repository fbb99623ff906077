//! Samples and what is said of them. Nothing is trimmed: a failure is counted, and every success is in.

use std::time::Duration;

/// What came of one operation that was done many times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Samples {
    durations: Vec<Duration>,
    failures: Vec<String>,
}

/// The numbers of a table's row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// How many succeeded.
    pub count: usize,
    /// How many failed.
    pub failures: usize,
    /// The median.
    pub p50: Duration,
    /// What 99 of 100 are not above.
    pub p99: Duration,
    /// The largest.
    pub max: Duration,
}

impl Samples {
    /// Takes one outcome in.
    pub fn add<E: std::fmt::Display>(&mut self, outcome: Result<Duration, E>) {
        match outcome {
            Ok(duration) => self.durations.push(duration),
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }

    /// How many there are, failures included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.durations.len() + self.failures.len()
    }

    /// Whether nothing has been taken in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Why operations failed.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The numbers; none where nothing succeeded.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.durations.clone();
        sorted.sort_unstable();
        Some(Summary {
            count: sorted.len(),
            failures: self.failures.len(),
            p50: nearest_rank(&sorted, 50)?,
            p99: nearest_rank(&sorted, 99)?,
            max: *sorted.last()?,
        })
    }
}

/// The smallest sample that so many percent are not above: always one that was measured.
fn nearest_rank(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.max(1) - 1).copied()
}

/// How many times as long.
#[must_use]
pub fn ratio(long: Duration, short: Duration) -> f64 {
    long.as_secs_f64() / short.as_secs_f64()
}

/// The smallest, the one in the middle and the largest; none of none.
#[must_use]
pub fn spread<T: Copy + Ord>(values: &[T]) -> Option<[T; 3]> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len().saturating_sub(1) / 2;
    Some([*sorted.first()?, *sorted.get(middle)?, *sorted.last()?])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples(millis: &[u64]) -> Samples {
        let mut samples = Samples::default();
        for milli in millis {
            samples.add(Ok::<_, String>(Duration::from_millis(*milli)));
        }
        samples
    }

    #[test]
    fn of_a_hundred_the_second_largest_is_the_99th() {
        let all: Vec<u64> = (1..=100).rev().collect();
        let summary = samples(&all).summary().unwrap();
        assert_eq!(summary.p50, Duration::from_millis(50));
        assert_eq!(summary.p99, Duration::from_millis(99));
        assert_eq!(summary.max, Duration::from_millis(100));
    }

    #[test]
    fn failures_are_counted_and_are_no_durations() {
        let mut samples = samples(&[5]);
        samples.add(Err("refused"));
        let summary = samples.summary().unwrap();
        assert_eq!((summary.count, summary.failures, samples.len()), (1, 1, 2));
        assert_eq!(Samples::default().summary(), None);
    }

    #[test]
    fn a_spread_is_of_what_was_measured() {
        assert_eq!(spread(&[5, -1, 3]), Some([-1, 3, 5]));
        assert_eq!(spread(&[4]), Some([4, 4, 4]));
        assert_eq!(spread::<u64>(&[]), None);
    }

    proptest! {
        #[test]
        fn percentiles_are_samples_and_in_order(millis in proptest::collection::vec(0_u64..10_000, 1..300)) {
            let summary = samples(&millis).summary().unwrap();
            prop_assert!(summary.p50 <= summary.p99 && summary.p99 <= summary.max);
            for value in [summary.p50, summary.p99, summary.max] {
                prop_assert!(millis.iter().any(|milli| Duration::from_millis(*milli) == value));
            }
            let not_above = millis.iter().filter(|milli| Duration::from_millis(**milli) <= summary.p99).count();
            prop_assert!(not_above * 100 >= millis.len() * 99);
        }
    }
}
