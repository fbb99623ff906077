//! Which addresses were answered for which names, for how long. Pure: the time is given.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// How many pairs of an address and a name are remembered. The oldest make room.
const PINS: usize = 4096;
/// How many names of one address are.
const NAMES: usize = 64;
/// The least time for which an address is remembered: a program connects a while after it has asked.
pub(super) const LEAST: Duration = Duration::from_secs(60);
/// The most: what a name server says of the far future is not believed.
pub(super) const MOST: Duration = Duration::from_secs(3600);

/// Addresses that may be reached because of a name. None for longer than its name server said, within bounds.
#[derive(Debug, Default)]
pub(super) struct Pins {
    until: BTreeMap<(Ipv4Addr, String), Instant>,
}

impl Pins {
    /// Remembers an address of a name.
    pub(super) fn add(&mut self, address: Ipv4Addr, name: &str, time_to_live: Duration, now: Instant) {
        let until = now + time_to_live.clamp(LEAST, MOST);
        let pin = (address, name.to_ascii_lowercase());
        if self.until.len() >= PINS && !self.until.contains_key(&pin) {
            self.until.retain(|_, until| *until > now);
            // Whoever asks for that many names loses those that end first.
            while self.until.len() >= PINS {
                let first = self.until.iter().min_by_key(|(_, until)| **until).map(|(pin, _)| pin.clone());
                first.and_then(|pin| self.until.remove(&pin));
            }
        }
        self.until.insert(pin.clone(), until);
        // Every stream to an address asks for all of its names, so they are few: this one, and those that end last.
        while self.of(address).count() > NAMES {
            let others = self.of(address).filter(|(other, _)| **other != pin);
            let first = others.min_by_key(|(_, until)| **until).map(|(pin, _)| pin.clone());
            first.and_then(|pin| self.until.remove(&pin));
        }
    }

    fn of(&self, address: Ipv4Addr) -> impl Iterator<Item = (&(Ipv4Addr, String), &Instant)> {
        self.until.range((address, String::new())..).take_while(move |((pinned, _), _)| *pinned == address)
    }

    /// The names for which an address was answered and which are not forgotten.
    #[must_use]
    pub(super) fn names(&self, address: Ipv4Addr, now: Instant) -> Vec<String> {
        self.of(address).filter(|(_, until)| **until > now).map(|((_, name), _)| name.clone()).collect()
    }

    /// Forgets what is not to be kept any more.
    pub(super) fn keep(&mut self, keeps: impl Fn(Ipv4Addr, &str) -> bool) {
        self.until.retain(|(address, name), _| keeps(*address, name));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

    #[test]
    fn a_pin_ends() {
        let (mut pins, now) = (Pins::default(), Instant::now());
        pins.add(HERE, "Short.example", Duration::ZERO, now);
        pins.add(HERE, "long.example", Duration::MAX, now);
        assert_eq!(pins.names(HERE, now), ["long.example", "short.example"]);
        assert_eq!(pins.names(HERE, now + LEAST), ["long.example"], "no sooner and no later than it may");
        assert!(pins.names(HERE, now + MOST).is_empty());
        assert!(pins.names(Ipv4Addr::new(203, 0, 113, 11), now).is_empty());
        pins.keep(|_, name| name != "long.example");
        assert_eq!(pins.names(HERE, now), ["short.example"]);
    }

    #[test]
    fn there_are_no_more_than_that() {
        let (mut pins, now) = (Pins::default(), Instant::now());
        for number in 0..u32::try_from(PINS).unwrap() + 10 {
            pins.add(
                Ipv4Addr::from_bits(number),
                "a.example",
                MOST,
                now + Duration::from_millis(number.into()),
            );
        }
        assert_eq!(pins.until.len(), PINS);
        assert!(
            pins.names(Ipv4Addr::from_bits(3), now).is_empty()
                && !pins.names(Ipv4Addr::from_bits(4000), now).is_empty()
        );
    }

    #[test]
    fn an_address_has_few_names_and_the_newest_is_one_of_them() {
        let (mut pins, now, address) = (Pins::default(), Instant::now(), Ipv4Addr::new(9, 9, 9, 9));
        for number in 0..1000 {
            pins.add(address, &format!("n{number}.example"), MOST, now);
        }
        pins.add(address, "last.example", LEAST, now);
        let names = pins.names(address, now);
        assert_eq!(names.len(), NAMES);
        assert!(names.iter().any(|name| name == "last.example"), "{names:?}");
    }

    proptest! {
        #[test]
        fn only_what_was_added_is_there(added in prop::collection::vec((0_u32..4, "[ab]", 0_u64..9000), 0..20), asked in 0_u32..4, later in 0_u64..9000) {
            let (mut pins, now) = (Pins::default(), Instant::now());
            for (address, name, seconds) in &added {
                pins.add(Ipv4Addr::from_bits(*address), name, Duration::from_secs(*seconds), now);
            }
            for name in pins.names(Ipv4Addr::from_bits(asked), now + Duration::from_secs(later)) {
                let is_left = |(address, added, seconds): &(u32, String, u64)| {
                    *address == asked && *added == name && later < (*seconds).clamp(60, 3600)
                };
                prop_assert!(added.iter().any(is_left));
            }
        }
    }
}
