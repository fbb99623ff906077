//! What a sandbox may reach: the decision, as plain data.
//!
//! ```text
//!  NetworkPolicy ─ resolve ─► Policy ─ ruleset ─► the contents of sets that the rules look into
//!  the owner's words          checked and whole     └── say what Policy::reaches says
//!                               └ rules, where they are about names ─► the domain filter
//! ```

use std::{net::Ipv4Addr, num::NonZeroU64};

use wrenn_types::{Cidr, NetworkPolicy};

use super::{filter::Rules, networks::Networks};

const fn network(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Cidr {
    match Cidr::new(Ipv4Addr::new(a, b, c, d), prefix) {
        Some(network) => network,
        None => panic!("a bit behind the prefix is set"),
    }
}

/// What no sandbox ever reaches, whatever its policy says. No two of them overlap.
pub(super) const UNREACHABLE: [Cidr; 13] = [
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

/// The ports at which names are asked for: in the clear, and over TLS.
pub(super) const DNS_PORTS: [u16; 2] = [53, 853];

/// What one sandbox may reach: checked, with the host's choices filled in, and ready to become rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    reachable: Networks,
    bandwidth: Bandwidth,
    /// The owner's words, with the name servers in the order in which they are asked.
    rules: Rules,
}

/// How much a sandbox may send and receive, in bits per second. None: as much as there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// What it sends.
    pub egress: Option<NonZeroU64>,
    /// What it receives.
    pub ingress: Option<NonZeroU64>,
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
        network: Cidr,
    },
    /// All of a network that is to be allowed is where no sandbox may go.
    #[error("{allowed} cannot be allowed: no sandbox may reach {network}")]
    UnreachableNetwork {
        /// The network that is to be allowed.
        allowed: Cidr,
        /// Where it is, or where its beginning is.
        network: Cidr,
    },
}

impl Policy {
    /// Nothing at all.
    #[must_use]
    pub fn offline() -> Self {
        Self { reachable: Networks::everything(), bandwidth: Bandwidth::default(), rules: Rules::default() }
    }

    /// What the owner of a sandbox says, as something that can be put in force. Where the owner names no
    /// name servers, these of the host are asked. One that the lists forbid is not asked.
    ///
    /// # Errors
    /// [`PolicyError`] says what is wrong with it.
    pub fn resolve(policy: &NetworkPolicy, host_dns: &[Ipv4Addr]) -> Result<Self, PolicyError> {
        let unreachable = Networks::merged(UNREACHABLE);
        if let Some(&allowed) = policy.allow_cidrs.iter().find(|allowed| unreachable.covers(**allowed)) {
            let network = UNREACHABLE.into_iter().find(|network| network.overlaps(allowed));
            return Err(PolicyError::UnreachableNetwork { allowed, network: network.unwrap_or(allowed) });
        }
        let allowed = if policy.allow_cidrs.is_empty() && policy.allow_domains.is_empty() {
            Networks::everything()
        } else {
            Networks::merged(policy.allow_cidrs.iter().copied())
        };
        let denied = Networks::merged(policy.deny_cidrs.iter().copied());
        let reachable = allowed.without(&denied);
        let mut rules = Rules {
            internet: policy.internet,
            allow_cidrs: policy.allow_cidrs.clone(),
            deny_cidrs: policy.deny_cidrs.clone(),
            allow_domains: policy.allow_domains.clone(),
            deny_domains: policy.deny_domains.clone(),
            name_servers: Vec::new(),
        };
        // Where names matter the guest asks the filter, and the filter asks them.
        let may_ask = |server| {
            if rules.are_about_names() { !denied.contains(server) } else { reachable.contains(server) }
        };
        let servers = if policy.dns_servers.is_empty() { host_dns } else { &policy.dns_servers };
        let mut name_servers = Vec::with_capacity(servers.len());
        for &server in servers {
            if let Some(network) = UNREACHABLE.into_iter().find(|network| network.contains(server)) {
                return Err(PolicyError::UnreachableServer { server, network });
            }
            if may_ask(server) && !name_servers.contains(&server) {
                name_servers.push(server);
            }
        }
        let bandwidth =
            Bandwidth { egress: policy.egress_bits_per_second, ingress: policy.ingress_bits_per_second };
        rules.name_servers = name_servers;
        Ok(Self { reachable, bandwidth, rules })
    }

    /// Whether it may reach the internet. Without it, it reaches nothing at all, name servers included.
    #[must_use]
    pub(super) fn internet(&self) -> bool {
        self.rules.internet
    }

    /// What its lists of networks leave: what is allowed and not denied. Without lists it is everything, and what no
    /// sandbox may reach is still to be taken away from it. What names open is not in it.
    #[must_use]
    pub(super) fn reachable(&self) -> &Networks {
        &self.reachable
    }

    /// The only machines that it may ask for names, in the order in which they are asked. What it asks
    /// them is asked by the domain filter where there is one.
    #[must_use]
    pub fn name_servers(&self) -> &[Ipv4Addr] {
        &self.rules.name_servers
    }

    /// Whether it needs a domain filter.
    #[must_use]
    pub(super) fn is_filtered(&self) -> bool {
        self.rules.internet && self.rules.are_about_names()
    }

    /// Whether the domain filter has to look into every connection to a web port.
    #[must_use]
    pub(super) fn looks_for_names(&self) -> bool {
        self.rules.internet && self.rules.names_are_denied()
    }

    /// What a domain filter has to know.
    #[must_use]
    pub(super) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How much it may send and receive.
    #[must_use]
    pub fn bandwidth(&self) -> Bandwidth {
        self.bandwidth
    }

    /// Whether it reaches a TCP or UDP port of an address by itself, and not through a domain filter. The rules
    /// are made to say the same.
    #[must_use]
    #[cfg(test)]
    pub(super) fn reaches(&self, address: Ipv4Addr, port: u16) -> bool {
        self.internet()
            && !UNREACHABLE.iter().any(|network| network.contains(address))
            && self.reachable.contains(address)
            && !(self.looks_for_names() && super::filter::WEB_PORTS.contains(&port))
            && (!DNS_PORTS.contains(&port) || (!self.is_filtered() && self.name_servers().contains(&address)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::{super::networks::tests::networks, *};

    fn unreachable(address: Ipv4Addr) -> bool {
        UNREACHABLE.iter().any(|network| network.contains(address))
    }

    /// The owner's words, such as they can be put in force. Their addresses are near each other.
    pub(in super::super) fn words() -> impl Strategy<Value = NetworkPolicy> {
        let unreachable = Networks::merged(UNREACHABLE);
        let reachable = networks().prop_filter("unreachable", move |network| !unreachable.covers(*network));
        let servers = vec((0_u32..64).prop_map(|low| Ipv4Addr::from_bits(0xcb00_7100 | low)), 0..4);
        let limits = || option::of(any::<u64>().prop_filter_map("zero", NonZeroU64::new));
        let domains = || vec("(\\*\\.)?[a-c]\\.[xy]".prop_map(|text| text.parse().unwrap()), 0..3);
        // As often as not there are none.
        let domains = || prop_oneof![Just(Vec::new()), domains()];
        let names = (domains(), domains());
        (any::<bool>(), vec(reachable, 0..6), vec(networks(), 0..6), names, servers, limits(), limits())
            .prop_map(
                |(
                    internet,
                    allow_cidrs,
                    deny_cidrs,
                    (allow_domains, deny_domains),
                    dns_servers,
                    egress,
                    ingress,
                )| NetworkPolicy {
                    allow_cidrs,
                    deny_cidrs,
                    allow_domains,
                    deny_domains,
                    dns_servers,
                    egress_bits_per_second: egress,
                    ingress_bits_per_second: ingress,
                    ..NetworkPolicy::simple(internet)
                },
            )
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
        let host = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(10, 0, 0, 2)];
        let words = NetworkPolicy::simple(true);
        assert_eq!(
            Policy::resolve(&words, &host).unwrap_err().to_string(),
            "the name server 10.0.0.2 is in 10.0.0.0/8, which no sandbox may reach"
        );
        let own = NetworkPolicy { dns_servers: vec![[8, 8, 4, 4].into()], ..words };
        let policy = Policy::resolve(&own, &host).unwrap();
        assert_eq!(policy.name_servers(), [Ipv4Addr::new(8, 8, 4, 4)], "the host's are not asked then");
    }

    #[test]
    fn what_no_sandbox_may_reach_is_not_allowed() {
        for (allowed, error) in [
            ("10.1.0.0/16", "10.1.0.0/16 cannot be allowed: no sandbox may reach 10.0.0.0/8"),
            ("169.254.169.254", "169.254.169.254/32 cannot be allowed: no sandbox may reach 169.254.0.0/16"),
            ("224.0.0.0/3", "224.0.0.0/3 cannot be allowed: no sandbox may reach 224.0.0.0/4"),
        ] {
            let allow_cidrs = vec!["203.0.113.0/24".parse().unwrap(), allowed.parse().unwrap()];
            let words = NetworkPolicy { allow_cidrs, ..NetworkPolicy::simple(true) };
            assert_eq!(Policy::resolve(&words, &[]).unwrap_err().to_string(), error);
        }
        let all =
            NetworkPolicy { allow_cidrs: vec!["0.0.0.0/0".parse().unwrap()], ..NetworkPolicy::simple(true) };
        let policy = Policy::resolve(&all, &[]).unwrap();
        assert!(policy.reaches([203, 0, 113, 10].into(), 80) && !policy.reaches([10, 0, 0, 1].into(), 80));
    }

    #[test]
    fn names_need_a_filter() {
        let (server, other) = (Ipv4Addr::new(9, 9, 9, 9), Ipv4Addr::new(203, 0, 113, 10));
        for allow in [true, false] {
            let mut words = NetworkPolicy::simple(true);
            let domains = if allow { &mut words.allow_domains } else { &mut words.deny_domains };
            domains.push("example.com".parse().unwrap());
            let policy = Policy::resolve(&words, &[server]).unwrap();
            assert!(policy.is_filtered() && policy.looks_for_names() != allow);
            assert_eq!(policy.name_servers(), [server], "the filter asks it");
            assert!(!policy.reaches(server, 53) && !policy.reaches(other, 443), "and nobody else");
            assert_eq!(
                policy.reaches(other, 22),
                !allow,
                "an allow list of names opens no address by itself"
            );
            words.internet = false;
            assert!(!Policy::resolve(&words, &[server]).unwrap().is_filtered());
        }
    }

    proptest! {
        /// The standard library knows the same networks by other words.
        #[test]
        fn nothing_that_is_not_global_is_reachable(bits: u32, port: u16) {
            let address = Ipv4Addr::from_bits(bits);
            let not_global = address.is_private() || address.is_loopback() || address.is_link_local()
                || address.is_multicast() || address.is_broadcast() || address.is_unspecified();
            prop_assert!(!not_global || unreachable(address));
            let everything = Policy::resolve(&NetworkPolicy::simple(true), &[]).unwrap();
            prop_assert!(!unreachable(address) || !everything.reaches(address, port));
        }

        #[test]
        fn the_owners_words_mean_what_they_say(words in words(), low in 0_u32..64, port in 50_u16..56) {
            let address = Ipv4Addr::from_bits(0xcb00_7100 | low);
            let policy = Policy::resolve(&words, &[]).unwrap();
            let reached = policy.reaches(address, port);
            let denied = words.deny_cidrs.iter().any(|network| network.contains(address));
            let allowed = (words.allow_cidrs.is_empty() && words.allow_domains.is_empty())
                || words.allow_cidrs.iter().any(|network| network.contains(address));
            let names = !words.allow_domains.is_empty() || !words.deny_domains.is_empty();
            let asks = !DNS_PORTS.contains(&port) || (!names && words.dns_servers.contains(&address));
            prop_assert_eq!(reached, words.internet && allowed && !denied && asks);
        }
    }

    #[test]
    fn no_two_networks_overlap() {
        for (index, one) in UNREACHABLE.iter().enumerate() {
            for other in &UNREACHABLE[index + 1..] {
                assert!(!one.overlaps(*other), "{one} {other}");
            }
        }
    }
}
