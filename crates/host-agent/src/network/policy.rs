//! What a sandbox may reach: the decision, as plain data.

use std::{fmt, net::Ipv4Addr};

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: Ipv4Addr,
    prefix: u8,
}

const fn network(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Network {
    Network { address: Ipv4Addr::new(a, b, c, d), prefix }
}

/// What no sandbox ever reaches, whatever its policy says. No two of them overlap.
pub const UNREACHABLE: [Network; 13] = [
    network(0, 0, 0, 0, 8),        // "this host"
    network(10, 0, 0, 0, 8),       // private; our own veth pairs too
    network(100, 64, 0, 0, 10),    // carrier NAT; the metadata of one cloud
    network(127, 0, 0, 0, 8),      // loopback
    network(168, 63, 129, 16, 32), // the host agent's address in Azure, public in form only
    network(169, 254, 0, 0, 16),   // link-local; the metadata of most clouds
    network(172, 16, 0, 0, 12),    // private
    network(192, 0, 0, 0, 24),     // protocol assignments; the metadata of one cloud
    network(192, 88, 99, 0, 24),   // 6to4 relays, a way to IPv6
    network(192, 168, 0, 0, 16),   // private
    network(198, 18, 0, 0, 15),    // benchmarks inside of a network
    network(224, 0, 0, 0, 4),      // multicast
    network(240, 0, 0, 0, 4),      // reserved, and the broadcast address
];

impl Network {
    /// Whether an address is in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        let shift = 32 - u32::from(self.prefix);
        // A prefix of 0 would shift by the whole width.
        let high = |address: Ipv4Addr| address.to_bits().checked_shr(shift).unwrap_or(0);
        high(self.address) == high(address)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// What one sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Whether it may reach the internet. Without it, it reaches nothing at all, name servers included.
    pub internet: bool,
    /// The only machines that it may ask for names. None: it may ask nobody.
    pub dns_servers: Vec<Ipv4Addr>,
}

/// A policy that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A name server is where no sandbox may go.
    #[error("the name server {server} is in {network}, which no sandbox may reach")]
    UnreachableServer {
        /// The name server.
        server: Ipv4Addr,
        /// Where it is.
        network: Network,
    },
}

impl Policy {
    /// Whether the policy can be put in force.
    ///
    /// # Errors
    /// [`PolicyError`] says what is wrong with it.
    pub fn check(&self) -> Result<(), PolicyError> {
        for &server in &self.dns_servers {
            if let Some(&network) = UNREACHABLE.iter().find(|network| network.contains(server)) {
                return Err(PolicyError::UnreachableServer { server, network });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unreachable(address: Ipv4Addr) -> bool {
        UNREACHABLE.iter().any(|network| network.contains(address))
    }

    #[test]
    fn the_edges_of_the_networks() {
        for inside in [
            "0.0.0.0",
            "10.255.255.255",
            "100.127.255.255",
            "127.0.0.53",
            "168.63.129.16",
            "169.254.169.254",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.0.0",
            "198.19.255.255",
            "224.0.0.251",
            "255.255.255.255",
        ] {
            assert!(unreachable(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "168.63.129.17",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.169.0.0",
            "198.20.0.0",
            "203.0.113.10",
        ] {
            assert!(!unreachable(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn a_name_server_inside_is_named() {
        let policy = Policy {
            internet: true,
            dns_servers: vec![Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(10, 0, 0, 2)],
        };
        assert_eq!(
            policy.check().unwrap_err().to_string(),
            "the name server 10.0.0.2 is in 10.0.0.0/8, which no sandbox may reach"
        );
    }

    proptest! {
        /// The standard library knows the same networks by other words.
        #[test]
        fn nothing_that_is_not_global_is_reachable(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            let not_global = address.is_private() || address.is_loopback() || address.is_link_local()
                || address.is_multicast() || address.is_broadcast() || address.is_unspecified();
            prop_assert!(!not_global || unreachable(address));
        }
    }

    #[test]
    fn no_two_networks_overlap() {
        for (index, one) in UNREACHABLE.iter().enumerate() {
            for other in &UNREACHABLE[index + 1..] {
                assert!(!one.contains(other.address) && !other.contains(one.address), "{one} {other}");
            }
        }
    }
}
