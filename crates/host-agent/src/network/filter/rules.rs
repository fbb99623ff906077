//! What a domain filter decides by: the owner's words, and the decisions as pure functions of them.

use std::net::{Ipv4Addr, SocketAddrV4};

use serde::{Deserialize, Serialize};
use wrenn_types::{Cidr, DomainPattern, network::is_domain_name};

use super::super::policy::{DNS_PORTS, UNREACHABLE};

/// The ports on which a connection has to say the name that it is for.
pub(crate) const WEB_PORTS: [u16; 2] = [80, 443];

/// What a connection says about whom it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// A name, or what stands in the place of one.
    Name(String),
    /// It could be read, and there is no name in it.
    Nothing,
    /// It is neither TLS nor HTTP that can be understood: whoever gets it may find a name in it.
    Unread,
}

/// The owner's words about one sandbox, with the name servers that were chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rules {
    /// Whether anything at all is reached.
    pub internet: bool,
    /// Networks that may be reached.
    pub allow_cidrs: Vec<Cidr>,
    /// Networks that may not.
    pub deny_cidrs: Vec<Cidr>,
    /// Names that may be reached.
    pub allow_domains: Vec<DomainPattern>,
    /// Names that may not.
    pub deny_domains: Vec<DomainPattern>,
    /// Who is asked for names, in this order.
    pub name_servers: Vec<Ipv4Addr>,
}

impl Rules {
    /// Whether names matter at all. Where they do not, there is nothing to filter.
    #[must_use]
    pub(crate) fn are_about_names(&self) -> bool {
        !self.allow_domains.is_empty() || self.names_are_denied()
    }

    /// Whether every connection to a [web port](WEB_PORTS) has to be looked into, wherever it leads.
    #[must_use]
    pub(crate) fn names_are_denied(&self) -> bool {
        !self.deny_domains.is_empty()
    }

    /// Whether a name is on the deny list.
    #[must_use]
    pub(crate) fn denies(&self, name: &str) -> bool {
        self.deny_domains.iter().any(|pattern| pattern.matches(name))
    }

    /// Whether a name is on the allow list and not on the deny list: its addresses may be reached because of it.
    #[must_use]
    pub(crate) fn allows(&self, name: &str) -> bool {
        is_name(name) && !self.denies(name) && self.allow_domains.iter().any(|pattern| pattern.matches(name))
    }

    /// Whether a name server is asked for a name.
    #[must_use]
    pub(crate) fn may_resolve(&self, name: &str) -> bool {
        self.internet
            && is_name(name)
            && !self.denies(name)
            && (self.allow_domains.is_empty() || self.allows(name))
    }

    /// Whether an address may be reached because of a name: it is neither denied nor where no sandbox may go,
    /// whoever says that it is the name's.
    #[must_use]
    pub(crate) fn may_pin(&self, address: Ipv4Addr) -> bool {
        self.internet && !within(&UNREACHABLE, address) && !within(&self.deny_cidrs, address)
    }

    /// Whether an address may be reached whatever the name, because it is on the allow list of networks.
    fn lists(&self, address: Ipv4Addr) -> bool {
        self.may_pin(address) && within(&self.allow_cidrs, address)
    }

    /// Whether an address may be reached without any name that is allowed.
    fn leaves_open(&self, address: Ipv4Addr) -> bool {
        let unlisted = self.allow_cidrs.is_empty() && self.allow_domains.is_empty();
        if unlisted { self.may_pin(address) } else { self.lists(address) }
    }

    /// Whether what is decided of a connection depends on the name that it says.
    #[must_use]
    pub(crate) fn depend_on_name(&self, target: SocketAddrV4) -> bool {
        self.are_about_names()
            && WEB_PORTS.contains(&target.port())
            && self.may_pin(*target.ip())
            && (self.names_are_denied() || !self.lists(*target.ip()))
    }

    /// Whether a TCP connection to `target` may be, by what it has said, and whose address is (or is not) `pinned`:
    /// the answer to a question for a name that is allowed.
    #[must_use]
    pub(crate) fn permit(&self, target: SocketAddrV4, said: &Said, pinned: bool) -> bool {
        let (address, port) = (*target.ip(), target.port());
        if !self.may_pin(address) {
            return false;
        }
        if DNS_PORTS.contains(&port) {
            // Where names matter nobody but the filter asks for them.
            return !self.are_about_names()
                && self.leaves_open(address)
                && self.name_servers.contains(&address);
        }
        // On other ports a name cannot be looked for, and one address serves many names.
        if !self.are_about_names() || !WEB_PORTS.contains(&port) {
            return self.leaves_open(address);
        }
        match said {
            Said::Name(name) if is_name(name) => {
                !self.denies(name) && (pinned && self.allows(name) || self.leaves_open(address))
            }
            Said::Name(_) | Said::Nothing => self.lists(address),
            Said::Unread => !self.names_are_denied() && self.lists(address),
        }
    }
}

fn is_name(name: &str) -> bool {
    is_domain_name(name.strip_suffix('.').unwrap_or(name))
}

fn within(networks: &[Cidr], address: Ipv4Addr) -> bool {
    networks.iter().any(|network| network.contains(address))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wrenn_types::NetworkPolicy;

    use super::{
        Said::{Nothing, Unread},
        *,
    };
    use crate::network::{Policy, policy::tests::words};

    fn rules(words: &[&str]) -> Rules {
        let mut rules = Rules { internet: true, ..Rules::default() };
        for word in words {
            match word.split_once(' ').unwrap() {
                ("allow", text) if text.contains('/') => rules.allow_cidrs.push(text.parse().unwrap()),
                ("deny", text) if text.contains('/') => rules.deny_cidrs.push(text.parse().unwrap()),
                ("allow", text) => rules.allow_domains.push(text.parse().unwrap()),
                ("deny", text) => rules.deny_domains.push(text.parse().unwrap()),
                other => panic!("{other:?}"),
            }
        }
        rules
    }

    fn named(text: &str) -> Said {
        Said::Name(text.to_owned())
    }

    fn target(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    #[test]
    fn what_a_name_opens() {
        let rules = rules(&[
            "allow *.example.com",
            "deny bad.example.com",
            "deny 203.0.113.64/26",
            "allow 9.0.0.0/8",
        ]);
        let web = target("203.0.113.10:443");
        assert!(rules.permit(web, &named("a.example.com"), true));
        assert!(!rules.permit(web, &named("a.example.com"), false), "nobody said that it lives there");
        for wrong in [
            Unread,
            Nothing,
            named("example.com"),
            named("bad.example.com"),
            named("x y.example.com"),
            named(""),
        ] {
            assert!(!rules.permit(web, &wrong, true), "{wrong:?}");
        }
        for other in ["203.0.113.10:22", "203.0.113.10:8443", "203.0.113.10:853", "203.0.113.10:53"] {
            assert!(!rules.permit(target(other), &named("a.example.com"), true), "{other}");
        }
        for never in ["203.0.113.65:443", "10.0.0.1:443", "169.254.169.254:80", "127.0.0.1:80"] {
            assert!(!rules.permit(target(never), &named("a.example.com"), true), "{never}");
            assert!(!rules.may_pin(*target(never).ip()));
        }
        let listed = target("9.1.1.1:443");
        assert!(
            rules.permit(listed, &Nothing, false) && rules.permit(listed, &named("other.example"), false)
        );
        assert!(!rules.permit(listed, &named("bad.example.com"), false), "to deny is stronger");
        assert!(
            rules.depend_on_name(listed)
                && rules.depend_on_name(web)
                && !rules.depend_on_name(target("9.1.1.1:22"))
        );
        assert!(
            rules.may_resolve("a.example.com.")
                && !rules.may_resolve("bad.example.com")
                && !rules.may_resolve("x.org")
        );
    }

    #[test]
    fn what_a_deny_list_alone_closes() {
        let rules = rules(&["deny bad.example"]);
        let web = target("203.0.113.10:80");
        assert!(rules.permit(web, &named("good.example"), false) && rules.may_resolve("good.example"));
        assert!(!rules.permit(web, &named("BAD.example."), false) && !rules.may_resolve("bad.EXAMPLE"));
        assert!(!rules.permit(web, &Nothing, false), "who says no name might mean that one");
        assert!(!rules.permit(web, &Unread, false), "nor what cannot be read");
        assert!(rules.permit(target("203.0.113.10:22"), &Nothing, false));
    }

    #[test]
    fn an_allowed_network_needs_no_name() {
        let rules = rules(&["allow a.example", "allow 9.0.0.0/8"]);
        assert!(!rules.depend_on_name(target("9.1.1.1:443")));
        assert!(rules.permit(target("9.1.1.1:443"), &Nothing, false));
        assert!(rules.permit(target("9.1.1.1:443"), &Unread, false));
    }

    #[test]
    fn what_cannot_be_read_goes_nowhere_where_names_are_denied() {
        let rules = rules(&["deny bad.example", "allow 9.0.0.0/8"]);
        let listed = target("9.1.1.1:443");
        assert!(rules.permit(listed, &Nothing, false) && !rules.permit(listed, &Unread, false));
    }

    fn with_domains() -> impl Strategy<Value = Rules> {
        words().prop_map(|words| Policy::resolve(&words, &[]).unwrap().rules().clone())
    }

    proptest! {
        #[test]
        fn nothing_opens_what_no_sandbox_reaches(rules in with_domains(), bits: u32, port: u16, pinned: bool, name in "[a-c]\\.(x|y)|.{0,9}") {
            let address = Ipv4Addr::from_bits(bits);
            let permitted = rules.permit(SocketAddrV4::new(address, port), &named(&name), pinned);
            let open = rules.internet && !within(&UNREACHABLE, address) && !within(&rules.deny_cidrs, address);
            prop_assert!(!permitted || open);
        }

        #[test]
        fn without_names_it_is_what_the_rules_of_the_kernel_say(words in words(), low in 0_u32..64, port in 50_u16..56) {
            let words = NetworkPolicy { allow_domains: vec![], deny_domains: vec![], ..words };
            let policy = Policy::resolve(&words, &[]).unwrap();
            let address = Ipv4Addr::from_bits(0xcb00_7100 | low);
            prop_assert_eq!(policy.rules().permit(SocketAddrV4::new(address, port), &Nothing, false), policy.reaches(address, port));
        }

        #[test]
        fn what_the_kernel_lets_pass_the_filter_does_too(words in words(), low in 0_u32..64, web: bool) {
            let policy = Policy::resolve(&words, &[]).unwrap();
            let address = Ipv4Addr::from_bits(0xcb00_7100 | low);
            let port = if web { 443 } else { 22 };
            let permitted = policy.rules().permit(SocketAddrV4::new(address, port), &Nothing, false);
            prop_assert!(!policy.reaches(address, port) || permitted);
        }

        #[test]
        fn a_name_that_does_not_matter_changes_nothing(rules in with_domains(), low in 0_u32..64, port in prop::sample::select(vec![22_u16, 53, 80, 443]), pinned: bool, name in "[ab]\\.(x|y)") {
            let target = SocketAddrV4::new(Ipv4Addr::from_bits(0xcb00_7100 | low), port);
            if !rules.depend_on_name(target) {
                prop_assert_eq!(rules.permit(target, &Nothing, pinned), rules.permit(target, &named(&name), pinned));
            }
        }
    }
}
