//! How many creates, pauses, resumes, … there were, and how long they took.

use std::{
    array,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Operation {
    /// From the request to a guest that answers.
    Create,
    /// From a machine that runs to what was saved of it.
    Pause,
    /// From what was saved to a guest that answers.
    Resume,
    /// A snapshot of a sandbox that stays.
    Snapshot,
    /// Back to a snapshot, in place.
    Rollback,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Create, Self::Pause, Self::Resume, Self::Snapshot, Self::Rollback];

    /// The word in a label.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::Rollback => "rollback",
        }
    }
}

/// The upper bounds of the buckets, in milliseconds; one more bucket is for what takes longer.
pub const BUCKETS_MS: [u64; 12] = [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000];

#[derive(Debug, Default)]
struct Durations {
    buckets: [AtomicU64; BUCKETS_MS.len() + 1],
    micros: AtomicU64,
    failed: AtomicU64,
}

/// The counters. Whoever does an operation counts it; they are never set back.
#[derive(Debug, Default)]
pub struct Operations {
    counted: [Durations; Operation::ALL.len()],
}

/// What was counted of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// Which.
    pub operation: Operation,
    /// How many that were done took at most as long as each of [`BUCKETS_MS`], those of lower buckets included.
    pub at_most: [u64; BUCKETS_MS.len()],
    /// How many were done.
    pub done: u64,
    /// How long these took together.
    pub duration: Duration,
    /// How many failed.
    pub failed: u64,
}

impl Operations {
    /// Counts one that was done.
    pub fn done(&self, operation: Operation, duration: Duration) {
        let counted = &self.counted[operation as usize];
        let bucket = BUCKETS_MS.partition_point(|bound| Duration::from_millis(*bound) < duration);
        counted.buckets[bucket].fetch_add(1, Relaxed);
        counted.micros.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Counts one that failed.
    pub fn failed(&self, operation: Operation) {
        self.counted[operation as usize].failed.fetch_add(1, Relaxed);
    }

    /// What was counted.
    #[must_use]
    pub fn counted(&self) -> Vec<Counted> {
        let one = |operation: Operation| {
            let counted = &self.counted[operation as usize];
            let mut sum = 0;
            let cumulative = counted.buckets.each_ref().map(|bucket| {
                sum += bucket.load(Relaxed);
                sum
            });
            Counted {
                operation,
                at_most: array::from_fn(|index| cumulative[index]),
                done: sum,
                duration: Duration::from_micros(counted.micros.load(Relaxed)),
                failed: counted.failed.load(Relaxed),
            }
        };
        Operation::ALL.map(one).into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_bound_is_in_its_bucket() {
        let operations = Operations::default();
        operations.done(Operation::Pause, Duration::from_millis(25));
        operations.done(Operation::Pause, Duration::from_micros(25_001));
        operations.done(Operation::Pause, Duration::from_secs(600));
        operations.failed(Operation::Pause);
        let counted = operations.counted();
        let pause = counted.iter().find(|counted| counted.operation == Operation::Pause).unwrap();
        assert_eq!(pause.at_most[..3], [0, 1, 2]);
        assert_eq!((pause.at_most[BUCKETS_MS.len() - 1], pause.done, pause.failed), (2, 3, 1));
        assert!(
            counted
                .iter()
                .filter(|counted| counted.operation != Operation::Pause)
                .all(|other| other.done == 0)
        );
    }

    proptest! {
        #[test]
        fn every_one_is_in_one_bucket(durations in vec(0_u64..200_000, 0..50)) {
            let operations = Operations::default();
            for millis in &durations {
                operations.done(Operation::Create, Duration::from_millis(*millis));
            }
            let create = &operations.counted()[0];
            prop_assert_eq!(create.done, durations.len() as u64);
            prop_assert!(create.at_most.is_sorted() && create.at_most[BUCKETS_MS.len() - 1] <= create.done);
            for (bound, count) in BUCKETS_MS.iter().zip(create.at_most) {
                prop_assert_eq!(count, durations.iter().filter(|millis| *millis <= bound).count() as u64);
            }
        }
    }
}
