//! When a process that ended by itself is started again: a pure decision.
//!
//! ```text
//!   ended ──► fewer than LIMIT ends within WINDOW ──► start again after a pause that doubles
//!        └──► else ──────────────────────────────► give up, and say why
//! ```

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How many ends within [`WINDOW`] are too many.
const LIMIT: usize = 6;
/// Ends longer ago than this are forgotten.
const WINDOW: Duration = Duration::from_secs(60);
/// The pause after the first end.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What to do about a process that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Start it again after this pause.
    StartAfter(Duration),
    /// It ended this many times in a row.
    GiveUp(usize),
}

/// The recent ends of one process.
#[derive(Debug, Default)]
pub(super) struct RestartPolicy {
    ends: VecDeque<Instant>,
}

impl RestartPolicy {
    /// Counts one more end and decides.
    pub(super) fn ended(&mut self, now: Instant) -> Verdict {
        while self.ends.front().is_some_and(|end| now.saturating_duration_since(*end) > WINDOW) {
            self.ends.pop_front();
        }
        self.ends.push_back(now);
        let count = self.ends.len();
        if count >= LIMIT {
            return Verdict::GiveUp(count);
        }
        let doublings = u32::try_from(count - 1).unwrap_or(u32::MAX);
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(doublings));
        Verdict::StartAfter(pause.min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pauses_grow_and_then_it_gives_up() {
        let mut policy = RestartPolicy::default();
        let start = Instant::now();
        let verdicts: Vec<_> =
            (0..6).map(|second| policy.ended(start + Duration::from_secs(second))).collect();
        let pause = |millis| Verdict::StartAfter(Duration::from_millis(millis));
        assert_eq!(
            verdicts,
            [pause(200), pause(400), pause(800), pause(1600), pause(3200), Verdict::GiveUp(6)]
        );
    }

    #[test]
    fn old_ends_are_forgotten() {
        let mut policy = RestartPolicy::default();
        let start = Instant::now();
        for minute in 0..100 {
            let now = start + Duration::from_secs(minute * 61);
            assert_eq!(policy.ended(now), Verdict::StartAfter(FIRST_PAUSE));
        }
    }

    proptest! {
        #[test]
        fn every_pause_is_bounded_and_rapid_ends_stop(gaps in prop::collection::vec(0_u64..90_000, 1..40)) {
            let mut policy = RestartPolicy::default();
            let mut now = Instant::now();
            let mut recent: Vec<Instant> = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                recent.retain(|end| now.duration_since(*end) <= WINDOW);
                recent.push(now);
                match policy.ended(now) {
                    Verdict::StartAfter(pause) => {
                        prop_assert!(pause >= FIRST_PAUSE && pause <= LONGEST_PAUSE);
                        prop_assert!(recent.len() < LIMIT);
                    }
                    Verdict::GiveUp(count) => {
                        prop_assert_eq!(count, recent.len());
                        prop_assert!(count >= LIMIT);
                    }
                }
            }
        }
    }
}
