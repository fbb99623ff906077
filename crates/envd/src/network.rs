//! The addresses that every guest has. Its network namespace on the host makes them unique.

use std::net::Ipv4Addr;

/// The guest's own address on `eth0`.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The length of the network's prefix.
pub(crate) const PREFIX: u8 = 30;
/// The host's end of the guest's interface, and the way to everything else.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The hardware address of the gateway, the same on every host.
pub(crate) const GATEWAY_HARDWARE: [u8; 6] = [0x02, 0xfc, 0x00, 0x00, 0x00, 0x06];
/// The port on which the agent listens.
pub(crate) const PORT: u16 = 49983;
