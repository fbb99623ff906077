//! Host names: which requests are for a port of a sandbox, and for which.
//!
//! ```text
//! Host: 8000-sb-1a2b3c4d.localhost:8000
//!       │    │           │         └ the port of this server, if it is not 80
//!       │    │           └ the domain of the proxy
//!       │    └ the sandbox, with its dash or without
//!       └ the port in the guest
//! ```
//!
//! All of this is pure, and a stranger writes the name.

use std::{fmt, num::NonZeroU16, str::FromStr};

use wrenn_types::SandboxId;

/// The longest host name with a port that is looked at; a DNS name has at most 253 characters.
const LONGEST: usize = 253 + ":65535".len();
/// The longest domain, so that every name below it can be a DNS name.
const LONGEST_DOMAIN: usize = 253 - "65535-sb-00000000.".len();
const LONGEST_LABEL: usize = 63;
/// What sandbox ids begin with, with their dash and without.
const PREFIXES: [&str; 2] = ["sb-", "sb"];

/// The domain below which the ports of sandboxes have their host names, in lower case.
///
/// Read from text with or without the port that clients connect to, which makes no difference here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyDomain(String);

/// The text is no domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a domain name; it looks like localhost or sandboxes.example.com")]
pub struct ParseProxyDomainError {
    text: String,
}

impl ProxyDomain {
    /// The domain, without a port.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProxyDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ProxyDomain {
    type Err = ParseProxyDomainError;

    fn from_str(text: &str) -> Result<Self, ParseProxyDomainError> {
        let wrong = || ParseProxyDomainError { text: text.chars().take(80).collect() };
        let name = without_port(text.trim()).to_ascii_lowercase();
        let labels = || name.split('.');
        // An address would take the place of names, and none is below it.
        let is_address = labels().next_back().is_none_or(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if name.len() <= LONGEST_DOMAIN && labels().all(is_label) && !is_address {
            Ok(Self(name))
        } else {
            Err(wrong())
        }
    }
}

fn is_label(label: &str) -> bool {
    let is_inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=LONGEST_LABEL).contains(&label.len())
        && label.bytes().all(is_inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// A port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) id: SandboxId,
    /// The id as the caller wrote it, in lower case: who uses it without its dash finds it so in errors.
    pub(super) shown: String,
    pub(super) port: NonZeroU16,
}

/// Whose a request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Addressee {
    /// The API's.
    Api,
    /// A sandbox's.
    Port(Address),
    /// Nobody's: it is meant for a sandbox, and names none.
    Malformed,
}

/// Whose a request with this host name is.
///
/// Names below the domain that begin with a digit are the proxy's; a domain may have others, such as that of the API.
pub(super) fn addressee(host: &[u8], domain: &ProxyDomain) -> Addressee {
    if host.len() > LONGEST {
        return Addressee::Api;
    }
    let Ok(host) = std::str::from_utf8(host) else { return Addressee::Api };
    let host = without_port(host).to_ascii_lowercase();
    let below = host.strip_suffix(domain.as_str()).and_then(|rest| rest.strip_suffix('.'));
    match below {
        Some(label) if label.starts_with(|c: char| c.is_ascii_digit()) => {
            parse_label(label).map_or(Addressee::Malformed, Addressee::Port)
        }
        _ => Addressee::Api,
    }
}

/// `{port}-{sandbox}`.
fn parse_label(label: &str) -> Option<Address> {
    let (port, shown) = label.split_once('-')?;
    // One name for each port: `08000` would be another origin with the same content.
    let is_number = port.len() <= 5 && !port.starts_with('0') && port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|_| is_number)?;
    let digits = PREFIXES.iter().find_map(|prefix| shown.strip_prefix(prefix))?;
    let id = format!("sb-{digits}").parse().ok()?;
    Some(Address { id, shown: shown.to_owned(), port })
}

/// A host without `:port` and without the dot that ends a full name.
fn without_port(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn domain(text: &str) -> ProxyDomain {
        text.parse().unwrap()
    }

    fn port(host: &str, below: &str) -> Option<(String, String, u16)> {
        match addressee(host.as_bytes(), &domain(below)) {
            Addressee::Port(address) => Some((address.id.to_string(), address.shown, address.port.get())),
            _ => None,
        }
    }

    #[test]
    fn names_of_ports() {
        let full = "sb-1a2b3c4d".to_owned();
        let short = "sb1a2b3c4d".to_owned();
        for (host, shown, number) in [
            ("8000-sb-1a2b3c4d.localhost", &full, 8000),
            ("8000-sb-1a2b3c4d.localhost:9000", &full, 8000),
            ("8000-sb-1a2b3c4d.localhost.", &full, 8000),
            ("8000-sb-1a2b3c4d.localhost.:", &full, 8000),
            ("8000-SB-1A2B3C4D.LocalHost", &full, 8000),
            ("1-sb1a2b3c4d.localhost", &short, 1),
            ("65535-sb1a2b3c4d.localhost:1", &short, 65535),
        ] {
            assert_eq!(port(host, "localhost"), Some((full.clone(), shown.clone(), number)), "{host}");
        }
        assert!(port("80-sb-1a2b3c4d.s.example.com", "S.Example.com:8443").is_some());
    }

    #[test]
    fn names_of_nothing() {
        for host in [
            "0-sb-1a2b3c4d.localhost",
            "65536-sb-1a2b3c4d.localhost",
            "99999999999999999999-sb-1a2b3c4d.localhost",
            "08000-sb-1a2b3c4d.localhost",
            "8000.localhost",
            "8000-.localhost",
            "8000sb-1a2b3c4d.localhost",
            "8000-1a2b3c4d.localhost",
            "8000-sb-1a2b3c4.localhost",
            "8000-sb-1a2b3c4dd.localhost",
            "8000-sb--1a2b3c4d.localhost",
            "8000-sb-1a2b3c4g.localhost",
            "8000-sb-../../et.localhost",
            "8000-sb-1a2b3c4d.more.localhost",
            "8000-sb-1a2b3c4d..localhost",
            "8000-host-1a2b3c4d.localhost",
            "8\0-sb-1a2b3c4d.localhost",
        ] {
            assert_eq!(addressee(host.as_bytes(), &domain("localhost")), Addressee::Malformed, "{host}");
        }
    }

    #[test]
    fn names_of_the_api() {
        for host in [
            "",
            ":",
            ".",
            "localhost",
            "localhost:8000",
            ".localhost",
            "api.localhost",
            "sb-1a2b3c4d.localhost",
            "127.0.0.1:8000",
            "[::1]:8000",
            "8000-sb-1a2b3c4d.localhost.example.com",
            "8000-sb-1a2b3c4d.notlocalhost",
            "8000-sb-1a2b3c4dlocalhost",
            "8000-sb-1a2b3c4d",
            "8000-sb-1a2b3c4d.localhost:80:80",
            "8000-sb-1a2b3c4d.localhost:port",
            "8000-sb-1a2b3c4d.localhost:123456",
        ] {
            assert_eq!(addressee(host.as_bytes(), &domain("localhost")), Addressee::Api, "{host}");
        }
        assert_eq!(addressee(b"8000-sb-1a2b3c4d.\xff.localhost", &domain("localhost")), Addressee::Api);
    }

    #[test]
    fn domains() {
        assert_eq!(domain(" LocalHost:8000 ").as_str(), "localhost");
        assert_eq!(domain("a-1.example.com.").to_string(), "a-1.example.com");
        let long = "a.".repeat(LONGEST_DOMAIN / 2 + 2);
        for wrong in
            ["", ".", ":80", "a..b", "-a.b", "a-.b", "a b", "a_b", "ä.de", "127.0.0.1", "[::1]", "x.1", &long]
        {
            assert!(wrong.parse::<ProxyDomain>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_decided(host in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = addressee(&host, &domain("localhost"));
        }

        #[test]
        fn what_looks_like_a_name_is_decided(
            host in "[0-9]{0,7}-?(sb-?)?[-0-9a-fA-F.]{0,12}\\.?(localhost)?\\.?(:[0-9]{0,7})?",
        ) {
            if let Addressee::Port(address) = addressee(host.as_bytes(), &domain("localhost")) {
                let name = format!("{}-{}.localhost", address.port, address.shown);
                prop_assert!(host.to_ascii_lowercase().starts_with(&name));
                prop_assert_eq!(address.shown.replace("sb-", "sb"), address.id.as_str().replace("sb-", "sb"));
            }
        }

        #[test]
        fn each_port_of_each_sandbox_has_its_name(
            digits in "[0-9a-f]{8}", number in 1..=u16::MAX, dash in any::<bool>(), upper in any::<bool>(),
        ) {
            let dash = if dash { "-" } else { "" };
            let mut host = format!("{number}-sb{dash}{digits}.s.example.com");
            if upper {
                host.make_ascii_uppercase();
            }
            let found = port(&host, "s.example.com");
            prop_assert_eq!(found, Some((format!("sb-{digits}"), format!("sb{dash}{digits}"), number)));
        }
    }
}
