//! What to look at next, and how fast to read: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// When each thing was last looked at, by its name: in seconds of the wall's clock, because it outlives the agent.
///
/// ```text
///  met ──► not due ──── `every` seconds ────► due ──► looked at ──► not due …        gone: forgotten
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looks(BTreeMap<String, i64>);

impl Looks {
    /// Notes what there is now. What was not there before has a digest that was just taken of it, so it counts as
    /// looked at; so does what was looked at in the future, after the clock was set back. What is gone is forgotten.
    pub fn meet(&mut self, there: BTreeSet<String>, now: i64) {
        let mut before = std::mem::take(&mut self.0);
        self.0 = there
            .into_iter()
            .map(|name| {
                let looked = before.remove(&name).map_or(now, |at| at.min(now));
                (name, looked)
            })
            .collect();
    }

    /// What was looked at `every` seconds ago or earlier, the earliest first.
    #[must_use]
    pub fn due(&self, now: i64, every: i64) -> Vec<String> {
        let mut due: Vec<_> = self
            .0
            .iter()
            .filter(|(_, at)| now.saturating_sub(**at) >= every)
            .map(|(name, at)| (*at, name))
            .collect();
        due.sort_unstable();
        due.into_iter().map(|(_, name)| name.clone()).collect()
    }

    /// Notes that something was looked at. What is not there any more stays forgotten.
    pub fn looked(&mut self, name: &str, now: i64) {
        if let Some(at) = self.0.get_mut(name) {
            *at = now;
        }
    }
}

/// How long to wait after a piece of so many bytes that took so long, so that no more than `rate` bytes are read in a
/// second.
#[must_use]
pub fn pause_after(bytes: u64, took: Duration, rate: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)).saturating_sub(took)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const EVERY: i64 = 100;

    fn names(present: &[bool]) -> BTreeSet<String> {
        let names = present.iter().enumerate().filter(|(_, is_there)| **is_there);
        names.map(|(number, _)| number.to_string()).collect()
    }

    #[test]
    fn nothing_is_due_at_first_and_all_is_later() {
        let mut looks = Looks::default();
        looks.meet(names(&[true, true]), 1000);
        assert!(looks.due(1000, EVERY).is_empty() && looks.due(1099, EVERY).is_empty());
        looks.looked("1", 1050);
        assert_eq!(looks.due(1100, EVERY), ["0"]);
        assert_eq!(looks.due(1150, EVERY), ["0", "1"]);
        looks.looked("0", 1150);
        // One that is gone does not come back by being looked at.
        looks.meet(names(&[true, false]), 1151);
        looks.looked("1", 1151);
        assert_eq!(looks.due(5000, EVERY), ["0"]);
        // The clock was set back by a year.
        looks.meet(names(&[true, false]), 500);
        assert_eq!(looks.due(600, EVERY), ["0"]);
    }

    #[test]
    fn a_pause_makes_up_for_what_was_faster() {
        let second = Duration::from_secs(1);
        assert_eq!(pause_after(10, Duration::ZERO, 10), second);
        assert_eq!(pause_after(10, second / 4, 10), second * 3 / 4);
        assert_eq!(pause_after(10, second * 3, 10), Duration::ZERO);
        assert_eq!(pause_after(0, Duration::ZERO, 10), Duration::ZERO);
        assert!(pause_after(u64::MAX, Duration::ZERO, 0) > second);
    }

    proptest! {
        /// In rounds that look at so many of what is due, nothing is looked at twice within the interval, what is
        /// there comes up in the order of its age, and nothing that is due is passed over for ever.
        #[test]
        fn everything_comes_up_and_nothing_too_often(
            rounds in vec((1_i64..60, 1_usize..4, vec(any::<bool>(), 6)), 1..80),
        ) {
            let (mut looks, mut now) = (Looks::default(), 0);
            let mut last: BTreeMap<String, i64> = BTreeMap::new();
            for (step, at_most, present) in rounds {
                now += step;
                let there = names(&present);
                last.retain(|name, _| there.contains(name));
                for name in &there {
                    last.entry(name.clone()).or_insert(now);
                }
                looks.meet(there, now);
                let due = looks.due(now, EVERY);
                let expected = last.iter().filter(|(_, at)| now - **at >= EVERY).count();
                prop_assert_eq!(due.len(), expected);
                prop_assert!(due.iter().map(|name| last[name]).is_sorted());
                for name in due.iter().take(at_most) {
                    prop_assert!(now - last[name] >= EVERY);
                    looks.looked(name, now);
                    last.insert(name.clone(), now);
                }
            }
            let text = serde_json::to_string(&looks).unwrap();
            prop_assert_eq!(serde_json::from_str::<Looks>(&text).unwrap(), looks);
        }

        #[test]
        fn no_more_than_the_rate_is_read(pieces in vec((0_u64..1 << 24, 0_u64..500_000_000), 1..50)) {
            let rate: u32 = 32 << 20;
            let (mut bytes, mut took) = (0_u64, Duration::ZERO);
            for (piece, nanoseconds) in pieces {
                let reading = Duration::from_nanos(nanoseconds);
                bytes += piece;
                took += reading + pause_after(piece, reading, rate.into());
                // A nanosecond is lost for each piece.
                let exact = Duration::from_secs(1).mul_f64(bytes as f64 / f64::from(rate));
                prop_assert!(took + Duration::from_micros(1) >= exact);
            }
        }
    }
}
