//! What a sandbox may reach, as its owner says it: plain data, parsed and within its bounds.

use std::{fmt, net::Ipv4Addr, num::NonZeroU64, str::FromStr};

use serde::{Deserialize, Serialize};

/// How many entries each list of a policy may have.
pub const ENTRIES_LIMIT: usize = 256;
/// How many name servers a policy may name: a resolver looks at no more.
pub const DNS_SERVERS_LIMIT: usize = 3;

/// Why a text is not part of a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParsePolicyError {
    /// Not an IPv4 network.
    #[error("{0:?} is not an IPv4 network such as 203.0.113.0/24, with nothing set behind its prefix")]
    Cidr(String),
    /// Not a name.
    #[error("{0:?} is not a domain name, or *. and a domain name")]
    Domain(String),
}

/// An IPv4 network: an address whose bits behind the prefix are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// A network, if nothing is set behind the prefix.
    #[must_use]
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if prefix > 32 || address.to_bits() & !Self::mask(prefix) != 0 {
            return None;
        }
        Some(Self { address, prefix })
    }

    const fn mask(prefix: u8) -> u32 {
        // A shift by the whole width is not one.
        if prefix == 0 { 0 } else { u32::MAX << (32 - prefix as u32) }
    }

    /// Whether an address is in it.
    #[must_use]
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & Self::mask(self.prefix) == self.address.to_bits()
    }

    /// Whether any address is in both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }

    /// Its first address.
    #[must_use]
    pub const fn first(self) -> Ipv4Addr {
        self.address
    }

    /// Its last address.
    #[must_use]
    pub const fn last(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !Self::mask(self.prefix))
    }
}

impl FromStr for Cidr {
    type Err = ParsePolicyError;

    /// `a.b.c.d/n`, or an address alone for the network that holds nothing else.
    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        // `u8` would take a plus sign.
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let parsed = digits.then(|| (address.parse().ok(), prefix.parse().ok()));
        match parsed {
            Some((Some(address), Some(prefix))) => Self::new(address, prefix),
            _ => None,
        }
        .ok_or_else(|| ParsePolicyError::Cidr(shortened(text)))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Cidr {
    type Error = ParsePolicyError;

    fn try_from(text: String) -> Result<Self, ParsePolicyError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// A domain name in lower case, or all names below one: `*.example.com`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainPattern(String);

impl DomainPattern {
    /// The pattern as it was given, in lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a name is meant by it. `*.example.com` means every name below, and not `example.com` itself.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        match self.0.strip_prefix("*.") {
            None => name.eq_ignore_ascii_case(&self.0),
            Some(parent) => name.len().checked_sub(parent.len() + 1).is_some_and(|at| {
                at > 0
                    && name.as_bytes()[at] == b'.'
                    && name.as_bytes()[at + 1..].eq_ignore_ascii_case(parent.as_bytes())
            }),
        }
    }
}

/// Whether it is a name that a resolver can be asked for and a TLS client can name, without a dot at its end.
#[must_use]
pub fn is_domain_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // An address is not a name: it would never be looked up.
    name.len() <= 253 && name.split('.').all(is_label) && name.parse::<Ipv4Addr>().is_err()
}

impl FromStr for DomainPattern {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        if is_domain_name(name) {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(ParsePolicyError::Domain(shortened(text)))
        }
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DomainPattern {
    type Error = ParsePolicyError;

    fn try_from(text: String) -> Result<Self, ParsePolicyError> {
        text.parse()
    }
}

impl From<DomainPattern> for String {
    fn from(pattern: DomainPattern) -> Self {
        pattern.0
    }
}

/// What of a text is repeated in an error.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// What one sandbox may reach. What no sandbox ever reaches is not part of it.
///
/// With an allow list (of networks, of domains, or both) nothing that is on none of them is reached. A deny
/// list is stronger than an allow list. Without `internet` nothing is reached, whatever the lists say.
///
/// Domains are about what a guest asks a name server for, and about the name in a connection to port 80 or 443.
/// By a name on the allow list it reaches these two ports of the addresses that it was answered for that name. Where
/// names are denied, a connection to them that is neither TLS nor HTTP is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// Whether it reaches anything at all.
    pub internet: bool,
    /// Networks that it may reach.
    #[serde(default)]
    pub allow_cidrs: Vec<Cidr>,
    /// Networks that it may not reach.
    #[serde(default)]
    pub deny_cidrs: Vec<Cidr>,
    /// Names that are resolved for it and whose addresses it may reach, on TCP ports 80 and 443.
    #[serde(default)]
    pub allow_domains: Vec<DomainPattern>,
    /// Names that are not resolved for it, and that no connection of it may name.
    #[serde(default)]
    pub deny_domains: Vec<DomainPattern>,
    /// Who is asked for names; none means the host's choice.
    #[serde(default)]
    pub dns_servers: Vec<Ipv4Addr>,
    /// How many bits per second it may send.
    #[serde(default)]
    pub egress_bits_per_second: Option<NonZeroU64>,
    /// How many bits per second it may receive.
    #[serde(default)]
    pub ingress_bits_per_second: Option<NonZeroU64>,
}

impl NetworkPolicy {
    /// The internet, or nothing.
    #[must_use]
    pub fn simple(internet: bool) -> Self {
        Self {
            internet,
            allow_cidrs: Vec::new(),
            deny_cidrs: Vec::new(),
            allow_domains: Vec::new(),
            deny_domains: Vec::new(),
            dns_servers: Vec::new(),
            egress_bits_per_second: None,
            ingress_bits_per_second: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks() {
        for (text, first, last) in [
            ("203.0.113.0/24", "203.0.113.0", "203.0.113.255"),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
            ("8.8.8.8", "8.8.8.8", "8.8.8.8"),
        ] {
            let cidr: Cidr = text.parse().unwrap();
            assert_eq!(
                (cidr.first(), cidr.last()),
                (first.parse().unwrap(), last.parse().unwrap()),
                "{text}"
            );
        }
        for wrong in
            ["", "203.0.113.1/24", "1.2.3.4/33", "1.2.3.4/", "1.2.3.4/+8", "::1/128", "1.2.3.0/24 ", "a/8"]
        {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names() {
        let exact: DomainPattern = "Example.COM".parse().unwrap();
        assert!(exact.matches("example.com") && exact.matches("EXAMPLE.com."));
        assert!(!exact.matches("www.example.com") && !exact.matches("example.com.evil"));
        let below: DomainPattern = "*.example.com".parse().unwrap();
        assert!(below.matches("a.example.com") && below.matches("a.b.example.com."));
        for other in ["example.com", ".example.com", "badexample.com", "", "x", "é.com"] {
            assert!(!below.matches(other), "{other}");
        }
        for wrong in
            ["", "*", "*.", "a..b", "a b", "-a.com", "1.2.3.4", "a.*.com", "a\n.com", &"a".repeat(64)]
        {
            assert!(wrong.parse::<DomainPattern>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_network_holds_what_lies_between_its_ends(bits: u32, prefix in 0_u8..=32, other: u32) {
            let address = Ipv4Addr::from_bits(bits & Cidr::mask(prefix));
            let cidr = Cidr::new(address, prefix).unwrap();
            let other = Ipv4Addr::from_bits(other);
            prop_assert_eq!(cidr.contains(other), (cidr.first()..=cidr.last()).contains(&other));
            prop_assert_eq!(cidr.to_string().parse(), Ok(cidr));
        }

        #[test]
        fn no_text_is_too_strange(text in ".{0,300}") {
            let _ = text.parse::<Cidr>();
            if let Ok(pattern) = text.parse::<DomainPattern>() {
                prop_assert!(pattern.as_str().is_ascii());
            }
        }
    }
}
