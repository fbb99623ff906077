//! When a process that ended by itself is started again: a pure decision.
//!
//! ```text
//!             ┌─ had been ready for STEADY ──► start again at once; what was before is forgotten
//!   ended ────┤
//!             └─ died young ──┬─ the first time in a row ──► start again at once
//!                             ├─ fewer than LIMIT ─────────► start again after a pause that doubles
//!                             └─ else ─────────────────────► give up, and say why
//! ```
//!
//! What served for a while and then ended was ended by something that happened, and whoever uses it waits: a pause
//! would help nobody. What dies young again and again will do so the next time too, and only that is slowed down.

use std::time::Duration;

/// How long a process must have been ready for its end to be news.
const STEADY: Duration = Duration::from_secs(2);
/// How many young deaths in a row are too many.
const LIMIT: u32 = 6;
/// The pause after the second young death in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What to do about a process that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Start it again after this pause.
    StartAfter(Duration),
    /// It died young this many times in a row.
    GiveUp(u32),
}

/// What is remembered of the lives of one process.
#[derive(Debug, Default)]
pub(super) struct RestartPolicy {
    young_deaths: u32,
}

impl RestartPolicy {
    /// Takes in one more end, of a process that had been ready for this long, if it ever was, and decides.
    pub(super) fn ended(&mut self, ready_for: Option<Duration>) -> Verdict {
        if ready_for.is_some_and(|served| served >= STEADY) {
            self.young_deaths = 0;
            return Verdict::StartAfter(Duration::ZERO);
        }
        self.young_deaths += 1;
        match self.young_deaths {
            LIMIT.. => Verdict::GiveUp(self.young_deaths),
            0 | 1 => Verdict::StartAfter(Duration::ZERO),
            more => {
                let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(more - 2));
                Verdict::StartAfter(pause.min(LONGEST_PAUSE))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn after(millis: u64) -> Verdict {
        Verdict::StartAfter(Duration::from_millis(millis))
    }

    #[test]
    fn pauses_grow_for_what_dies_young_and_then_it_gives_up() {
        for ready_for in [None, Some(Duration::ZERO), Some(STEADY - Duration::from_millis(1))] {
            let mut policy = RestartPolicy::default();
            let verdicts: Vec<_> = (0..6).map(|_| policy.ended(ready_for)).collect();
            assert_eq!(
                verdicts,
                [after(0), after(200), after(400), after(800), after(1600), Verdict::GiveUp(6)]
            );
        }
    }

    #[test]
    fn what_served_for_a_while_is_started_at_once_however_often_it_ends() {
        let mut policy = RestartPolicy::default();
        for _ in 0..1000 {
            assert_eq!(policy.ended(Some(STEADY)), after(0));
        }
    }

    proptest! {
        #[test]
        fn every_pause_is_bounded_and_only_young_deaths_in_a_row_end_it(
            lives in prop::collection::vec(prop::option::of(0_u64..4_000), 1..60),
        ) {
            let mut policy = RestartPolicy::default();
            let mut in_a_row = 0;
            let mut last = Duration::ZERO;
            for life in lives {
                let life = life.map(Duration::from_millis);
                let is_young = life.is_none_or(|served| served < STEADY);
                in_a_row = if is_young { in_a_row + 1 } else { 0 };
                match policy.ended(life) {
                    Verdict::StartAfter(pause) => {
                        prop_assert!(in_a_row < LIMIT);
                        prop_assert!(pause <= LONGEST_PAUSE);
                        prop_assert_eq!(pause.is_zero(), in_a_row < 2);
                        prop_assert!(in_a_row < 3 || pause >= last);
                        last = pause;
                    }
                    Verdict::GiveUp(times) => {
                        prop_assert_eq!(times, in_a_row);
                        prop_assert!(times >= LIMIT);
                        break;
                    }
                }
            }
        }
    }
}
