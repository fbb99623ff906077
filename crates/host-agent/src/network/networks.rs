//! Lists of networks as the kernel's sets want them: ranges that are in order and apart. Pure.

use std::{fmt, net::Ipv4Addr};

use wrenn_types::Cidr;

/// The addresses from one to another, both of them included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// A set of addresses. Two that hold the same addresses are equal, however they were said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Networks {
    /// In order, and between any two of them there is an address that is in neither.
    ranges: Vec<Range>,
}

impl Networks {
    /// All addresses of all of these networks, which may overlap and repeat each other.
    #[must_use]
    pub(super) fn merged(networks: impl IntoIterator<Item = Cidr>) -> Self {
        let mut parts = networks
            .into_iter()
            .map(|network| Range { first: network.first(), last: network.last() })
            .collect::<Vec<_>>();
        parts.sort_unstable_by_key(|range| range.first);
        let mut ranges = Vec::<Range>::with_capacity(parts.len());
        for part in parts {
            match ranges.last_mut() {
                // No sum here can pass the last address: a range that reaches it reaches everything after.
                Some(range) if part.first.to_bits() <= range.last.to_bits().saturating_add(1) => {
                    range.last = range.last.max(part.last);
                }
                _ => ranges.push(part),
            }
        }
        Self { ranges }
    }

    /// Every address there is.
    #[must_use]
    pub(super) fn everything() -> Self {
        Self { ranges: vec![Range { first: Ipv4Addr::UNSPECIFIED, last: Ipv4Addr::BROADCAST }] }
    }

    /// What is in it and not in the other.
    #[must_use]
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut ranges = Vec::with_capacity(self.ranges.len() + other.ranges.len());
        for range in &self.ranges {
            // None: nothing comes after the last address of all.
            let mut next = Some(range.first.to_bits());
            for hole in &other.ranges {
                if hole.last < range.first || hole.first > range.last {
                    continue;
                }
                if let Some(first) = next.filter(|first| *first < hole.first.to_bits()) {
                    let last = Ipv4Addr::from_bits(hole.first.to_bits() - 1);
                    ranges.push(Range { first: Ipv4Addr::from_bits(first), last });
                }
                next = hole.last.to_bits().checked_add(1);
            }
            if let Some(first) = next.map(Ipv4Addr::from_bits).filter(|first| *first <= range.last) {
                ranges.push(Range { first, last: range.last });
            }
        }
        Self { ranges }
    }

    /// Whether an address is in it.
    #[must_use]
    pub(super) fn contains(&self, address: Ipv4Addr) -> bool {
        self.range_of(address).is_some()
    }

    /// Whether every address of a network is in it.
    #[must_use]
    pub(super) fn covers(&self, network: Cidr) -> bool {
        self.range_of(network.first()).is_some_and(|range| range.last >= network.last())
    }

    fn range_of(&self, address: Ipv4Addr) -> Option<Range> {
        let after = self.ranges.partition_point(|range| range.first <= address);
        let before = self.ranges.get(after.checked_sub(1)?)?;
        (before.last >= address).then_some(*before)
    }

    /// As elements of a set of `nft` with the flag `interval`.
    #[must_use]
    pub(super) fn elements(&self) -> Vec<String> {
        self.ranges.iter().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Networks of every size, many of which are near each other.
    pub(in super::super) fn networks() -> impl Strategy<Value = Cidr> {
        let near = (0_u32..64, 26_u8..=32).prop_map(|(low, prefix)| (0xcb00_7100 | low, prefix));
        let anywhere = (any::<u32>(), 0_u8..=32);
        prop_oneof![3 => near, 1 => anywhere].prop_map(|(bits, prefix)| {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Cidr::new(Ipv4Addr::from_bits(bits & mask), prefix).unwrap()
        })
    }

    fn cidrs(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn examples() {
        for (given, elements) in [
            (&[][..], &[][..]),
            (&["8.8.8.8"], &["8.8.8.8"]),
            (&["203.0.113.0/25", "203.0.113.128/25"], &["203.0.113.0-203.0.113.255"]),
            (&["203.0.113.0/24", "203.0.113.7", "203.0.113.0/24"], &["203.0.113.0-203.0.113.255"]),
            (&["9.9.9.9", "1.1.1.0/31"], &["1.1.1.0-1.1.1.1", "9.9.9.9"]),
            (&["1.1.1.1", "1.1.1.3"], &["1.1.1.1", "1.1.1.3"]),
            (&["255.255.255.255", "0.0.0.0/0", "0.0.0.0"], &["0.0.0.0-255.255.255.255"]),
        ] {
            assert_eq!(Networks::merged(cidrs(given)).elements(), elements, "{given:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_merged_holds_what_its_parts_hold(parts in vec(networks(), 0..12), other: u32, near in 0_u32..64) {
            let merged = Networks::merged(parts.clone());
            let edges = parts.iter().flat_map(|part| {
                let (first, last) = (part.first().to_bits(), part.last().to_bits());
                [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
            });
            for bits in edges.chain([other, 0xcb00_7100 | near]) {
                let address = Ipv4Addr::from_bits(bits);
                let held = parts.iter().any(|part| part.contains(address));
                prop_assert_eq!(merged.contains(address), held, "{}", address);
            }
        }

        #[test]
        fn ranges_are_in_order_and_apart(parts in vec(networks(), 0..12)) {
            let merged = Networks::merged(parts.clone());
            for range in &merged.ranges {
                prop_assert!(range.first <= range.last);
            }
            for pair in merged.ranges.windows(2) {
                prop_assert!(u64::from(pair[0].last.to_bits()) + 1 < u64::from(pair[1].first.to_bits()));
            }
            let other_way = Networks::merged(parts.iter().rev().chain(&parts).copied());
            prop_assert_eq!(&merged, &other_way);
        }

        #[test]
        fn what_is_taken_away_is_not_there(one in vec(networks(), 0..8), other in vec(networks(), 0..8), any: u32) {
            let (one, other) = (Networks::merged(one), Networks::merged(other));
            let rest = one.without(&other);
            let edges = rest.ranges.iter().chain(&one.ranges).chain(&other.ranges).flat_map(|range| {
                let (first, last) = (range.first.to_bits(), range.last.to_bits());
                [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
            });
            for bits in edges.chain([any]) {
                let address = Ipv4Addr::from_bits(bits);
                prop_assert_eq!(rest.contains(address), one.contains(address) && !other.contains(address), "{}", address);
            }
            for pair in rest.ranges.windows(2) {
                prop_assert!(u64::from(pair[0].last.to_bits()) + 1 < u64::from(pair[1].first.to_bits()));
            }
            prop_assert_eq!(Networks::everything().without(&Networks::everything().without(&one)), one);
        }

        #[test]
        fn a_network_is_covered_if_nothing_of_it_is_missing(parts in vec(networks(), 0..12), network in networks()) {
            let merged = Networks::merged(parts.clone());
            let with = Networks::merged(parts.into_iter().chain([network]));
            prop_assert_eq!(merged.covers(network), with == merged);
        }
    }
}
