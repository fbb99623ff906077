//! What belongs to a slot number: names and addresses. Pure arithmetic.
//!
//! ```text
//!   guest                      namespace wrenn-ns-N                      uplink
//!   169.254.0.21 ─── tap0 169.254.0.22   eth0 10.12.x.y+1 ═══ wrenn-v-N 10.12.x.y ─── outside
//!                                                              (x.y = 2N)
//! ```
//!
//! What is inside of the namespace is the same in every namespace, so that a snapshot fits in each. What
//! is outside of it follows from the number, and no two numbers share any of it.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use camino::Utf8PathBuf;
use wrenn_host_linux::netns;

/// Where the leases of slots are, for all stacks of the machine.
pub(super) const SLOTS_DIR: &str = "/run/wrenn/slots";

/// The name of the TAP device in every namespace.
pub(super) const TAP: &str = "tap0";
/// The name of the namespace's end of the veth pair.
pub(super) const INNER: &str = "eth0";
/// How the host's ends of all veth pairs begin, of whichever stack.
pub(crate) const OUTER_PREFIX: &str = "wrenn-v-";
/// How the names of all namespaces begin, of whichever stack.
pub(super) const NAMESPACE_PREFIX: &str = "wrenn-ns-";

/// The guest.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// What the guest sends everything to: the address of the TAP device.
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// How many bits of the two name the network.
pub(super) const GUEST_PREFIX: u8 = 30;
/// The guest's Ethernet address.
pub(super) const GUEST_MAC: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 0x05];
/// The TAP device's: a restored guest remembers it.
pub(super) const TAP_MAC: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 0x06];

/// The network of all veth pairs.
pub(super) const VETH_NETWORK: Ipv4Addr = Ipv4Addr::new(10, 12, 0, 0);
/// How many bits name it.
pub(super) const VETH_NETWORK_PREFIX: u8 = 16;
/// How many bits name one pair.
pub(super) const VETH_PREFIX: u8 = 31;

/// A slot, from 1 to 32767. The number is the machine's: whoever holds its lease uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotNumber(u16);

/// The text or number is not a slot's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a slot is a number from {} to {}", SlotNumber::FIRST.0, SlotNumber::LAST.0)]
pub struct NotASlot;

impl SlotNumber {
    /// The smallest.
    pub const FIRST: Self = Self(1);
    /// The largest.
    pub const LAST: Self = Self(32_767);

    /// The slot with this number.
    ///
    /// # Errors
    /// [`NotASlot`] outside of 1 to 32767.
    pub fn new(number: u16) -> Result<Self, NotASlot> {
        if (Self::FIRST.0..=Self::LAST.0).contains(&number) { Ok(Self(number)) } else { Err(NotASlot) }
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }

    /// The one after it; after the last comes the first.
    #[must_use]
    pub fn next(self) -> Self {
        if self == Self::LAST { Self::FIRST } else { Self(self.0 + 1) }
    }

    /// The file whose lock is the lease.
    #[must_use]
    pub fn lease(self) -> Utf8PathBuf {
        format!("{SLOTS_DIR}/{self}").into()
    }

    /// The path of the namespace.
    #[must_use]
    pub fn namespace(self) -> Utf8PathBuf {
        format!("{}/{NAMESPACE_PREFIX}{self}", netns::NAMES).into()
    }

    /// The name of the uplink's end of the veth pair.
    #[must_use]
    pub fn outer(self) -> String {
        format!("{OUTER_PREFIX}{self}")
    }

    /// The address of the uplink's end.
    #[must_use]
    pub fn outer_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(VETH_NETWORK.to_bits() + 2 * u32::from(self.0))
    }

    /// The address of the namespace's end: the sandbox, as the uplink sees it.
    #[must_use]
    pub fn inner_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.outer_address().to_bits() + 1)
    }
}

impl fmt::Display for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SlotNumber {
    type Err = NotASlot;

    /// Only the one way in which a number is written: what `007` would name is another file than `7`.
    fn from_str(text: &str) -> Result<Self, NotASlot> {
        let number = Self::new(text.parse().map_err(|_| NotASlot)?)?;
        if number.to_string() == text { Ok(number) } else { Err(NotASlot) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn all() -> impl Iterator<Item = SlotNumber> {
        (SlotNumber::FIRST.get()..=SlotNumber::LAST.get()).map(|number| SlotNumber::new(number).unwrap())
    }

    #[test]
    fn no_two_slots_share_a_name_or_an_address() {
        let mut addresses = HashSet::new();
        let mut names = HashSet::new();
        for slot in all() {
            assert!(addresses.insert(slot.outer_address()), "{slot}");
            assert!(addresses.insert(slot.inner_address()), "{slot}");
            assert!(names.insert(slot.outer()), "{slot}");
            assert!(names.insert(slot.namespace().into()), "{slot}");
            assert!(names.insert(slot.lease().into()), "{slot}");
        }
    }

    #[test]
    fn every_name_and_address_is_within_its_bounds() {
        let network = VETH_NETWORK.to_bits() >> (32 - VETH_NETWORK_PREFIX);
        for slot in all() {
            assert!(slot.outer().len() <= 15, "{slot}");
            let (outer, inner) = (slot.outer_address().to_bits(), slot.inner_address().to_bits());
            assert_eq!(outer >> 1, inner >> 1, "both ends of {slot} are in one /31");
            assert_eq!(inner >> (32 - VETH_NETWORK_PREFIX), network, "{slot}");
        }
        assert_eq!(SlotNumber::FIRST.outer_address(), Ipv4Addr::new(10, 12, 0, 2));
        assert_eq!(SlotNumber::LAST.inner_address(), Ipv4Addr::new(10, 12, 255, 255));
        assert_eq!(SlotNumber::new(300).unwrap().outer_address(), Ipv4Addr::new(10, 12, 2, 88));
    }

    #[test]
    fn numbers_outside_are_refused() {
        assert_eq!(SlotNumber::new(0), Err(NotASlot));
        assert_eq!(SlotNumber::new(32_768), Err(NotASlot));
        assert_eq!(SlotNumber::LAST.next(), SlotNumber::FIRST);
    }

    proptest! {
        #[test]
        fn only_what_a_slot_writes_is_read(text in "[0-9+ ./-]{0,7}|.{0,8}") {
            if let Ok(slot) = text.parse::<SlotNumber>() {
                prop_assert_eq!(slot.to_string(), text);
            }
        }

        #[test]
        fn what_a_slot_writes_is_read(number in 1_u16..=32_767) {
            let slot = SlotNumber::new(number).unwrap();
            prop_assert_eq!(slot.to_string().parse(), Ok(slot));
        }
    }
}
