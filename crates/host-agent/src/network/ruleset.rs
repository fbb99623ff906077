//! The rules of the network, as texts for `nft -f -`. Pure: what is decided here is seen in the tests.
//!
//! A packet of a guest passes two sets of rules, each of which would be enough. The first is in the
//! guest's own namespace ([`slot`]), the second where the namespace ends ([`uplink`]):
//!
//! ```text
//!  guest ──► tap0 ─ from_guest ─► forward ─ leaving ─► eth0 ══► wrenn-v-N ─ from_sandbox ─► forward ─ leaving ─► outside
//!             │ its own addresses,     │ not to what is            │ the sandbox's addresses,     │ not to a sandbox,
//!             │ IPv4 and ARP only      │ unreachable, nor against  │ IPv4, not to this host, not  │ not to what is
//!             ▼ else dropped           ▼ the policy: refused       ▼ to what is unreachable       ▼ unreachable after NAT
//! ```
//!
//! - What a guest may send is decided anew for every packet, never by the state of a connection, so that a
//!   change of policy also ends what is open. What comes back has to belong to a connection, and the other
//!   end of that has to be one that the policy still allows (`arriving`).
//! - What the policy forbids is refused with an ICMP message, or with a reset where a connection was open,
//!   so that a program in the guest sees an error instead of a timeout. What is forged is dropped.
//! - Where names matter, `to_filter` hands the guest's questions for names, and the connections that no list of
//!   networks leaves open, to the domain filter ([`super::filter`]) in the namespace; what it sends out passes
//!   `asking` here, and then the uplink's rules as everything does.
//! - The rules of a slot never change. What a policy decides are the contents of five sets that they look
//!   into ([`SETS`]), and those are changed by transactions ([`change`]): there is no moment without rules.
//! - **What a transaction is worth.** The kernel exchanges the rules of a table at once, but the contents of
//!   sets after them and set by set, those with ranges last, and a packet may be between two lookups meanwhile. So all
//!   lists of a policy are one set; what is said of a whole TAP device comes after the lists where it opens, and before
//!   them where it closes; and a table that is in use is never replaced by another one, whose rules would
//!   count before its ranges do: tables and sets stay ([`slot_again`], [`uplink`]).
//! - **An element that is taken out and put back** in one transaction may be missed meanwhile, seen with Linux 6.1
//!   about once in several million packets. So nothing that closes where it is found is ever taken out to be put
//!   back: what is unreachable is written into the rules, and a set of TAP devices is either filled or emptied. In a set
//!   that opens where it is found, the worst is that a packet is refused.
//! - The uplink's table matches only links of the group that is the instance's id as a number. No rule of
//!   it says anything about a link of anybody else.

use std::collections::HashSet;

use wrenn_types::InstanceId;

use super::{
    addresses::{
        GATEWAY, GUEST, GUEST_MAC, INNER, OUTER_PREFIX, SlotNumber, TAP, VETH_NETWORK, VETH_NETWORK_PREFIX,
    },
    filter::{NAMES_PORT, STREAMS_PORT, WEB_PORTS, confinement},
    policy::{DNS_PORTS, Policy, UNREACHABLE},
};

/// How many connections one guest may have open. They are remembered in a table that all sandboxes and
/// the host share, and one guest must not be able to fill it.
const CONNECTIONS: u32 = 4096;

/// The sets that a policy fills, each with what it puts into it.
///
/// A TAP device that is `offline` reaches nothing. That is said by an addition, because a transaction that
/// only adds is quick: a slot that was prepared with the internet loses it without delay. One that is `named` reaches
/// no web port but through the domain filter, and one that is `filtered` has one.
const SETS: [(&str, &str, Contents); 5] = [
    ("offline", DEVICES, |policy| tap_if(!policy.internet())),
    ("named", DEVICES, |policy| tap_if(policy.looks_for_names())),
    ("filtered", DEVICES, |policy| tap_if(policy.is_filtered())),
    ("reachable", "type ipv4_addr; flags interval", |policy| policy.reachable().elements()),
    ("name_servers", "type ipv4_addr", |policy| {
        // The guest's own questions go to the filter where there is one.
        let servers = if policy.is_filtered() { &[] } else { policy.name_servers() };
        let mut servers = servers.to_vec();
        servers.sort_unstable();
        servers.iter().map(ToString::to_string).collect()
    }),
];

/// The definition of a set of devices.
const DEVICES: &str = "type ifname";

fn tap_if(said: bool) -> Vec<String> {
    if said { vec![format!("\"{TAP}\"")] } else { Vec::new() }
}

/// What a policy puts into one of the sets: elements as `nft` writes them, none twice.
type Contents = fn(&Policy) -> Vec<String>;

/// The group of an instance's links: its id, read as a number.
///
/// None for the one id that is the number of the group in which every other link is.
#[must_use]
pub(super) fn link_group(instance: &InstanceId) -> Option<u32> {
    u32::from_str_radix(instance.as_str(), 16).ok().filter(|group| *group != 0)
}

/// The name of the table in the uplink.
#[must_use]
pub(super) fn uplink_table(instance: &InstanceId) -> String {
    format!("wrenn_{instance}")
}

/// The rules of one slot's namespace, with a policy in force.
///
/// The namespace is new: rules that were there already would make this fail. The text names `tap0`, which
/// must be there.
#[must_use]
pub(super) fn slot(instance: &InstanceId, number: SlotNumber, policy: &Policy) -> String {
    format!("create table netdev wrenn\ncreate table inet wrenn\n\n{}", slot_tables(instance, number, policy))
}

/// The same for a namespace in use, instead of the rules and the policy that are there. It is one
/// transaction, and there is no moment without rules. Sets that are there have to be of the same type.
#[must_use]
pub(super) fn slot_again(instance: &InstanceId, number: SlotNumber, policy: &Policy) -> String {
    let (mut defined, mut flushed) = (String::new(), String::new());
    for (name, kind, contents) in SETS {
        // What is flushed has to be there.
        defined.push_str(&format!("\tset {name} {{ {kind}; }}\n"));
        // Nothing but this one device can be in a set of devices, and it is never taken out to be put back.
        if kind != DEVICES || contents(policy).is_empty() {
            flushed.push_str(&format!("flush set inet wrenn {name}\n"));
        }
    }
    let emptied =
        [without_rules("netdev wrenn", ""), without_rules("inet wrenn", &defined), flushed].concat();
    format!("{emptied}\n{}", slot_tables(instance, number, policy))
}

/// Leaves no rules in a table, which need not be there yet; what is `defined` in it is there afterwards.
fn without_rules(table: &str, defined: &str) -> String {
    format!("table {table} {{\n{defined}}}\nflush table {table}\n")
}

fn slot_tables(instance: &InstanceId, slot: SlotNumber, policy: &Policy) -> String {
    let owner = format!("instance {instance}, slot {slot}");
    let sets = sets(policy);
    let [unreachable_not_filtered, unreachable_not_asked, unreachable_refused] =
        ["accept", "drop", "goto refuse"].map(unreachable);
    let mac = mac(GUEST_MAC);
    let user = confinement::user(slot);
    let [dns, dns_over_tls] = DNS_PORTS;
    let [http, https] = WEB_PORTS;
    format!(
        "table netdev wrenn {{
	comment \"{owner}\"

	# All that a guest can say: IPv4 and ARP, as itself.
	chain from_guest {{
		type filter hook ingress device \"{TAP}\" priority 0; policy drop;
		ether saddr != {mac} drop
		arp saddr ip {GUEST} arp daddr ip {GATEWAY} accept
		ip saddr {GUEST} accept
	}}
}}

table inet wrenn {{
	comment \"{owner}\"

	# The policy. A TAP device that is offline reaches nothing.
{sets}
	# Where names matter: to the domain filter, which learns from the kernel where it was meant to go.
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname @offline accept
		iifname @filtered goto to_filter
	}}

	chain to_filter {{
{unreachable_not_filtered}
		udp dport {dns} redirect to :{NAMES_PORT}
		tcp dport {dns} redirect to :{NAMES_PORT}
		iifname @named tcp dport {{ {http}, {https} }} redirect to :{STREAMS_PORT}
		ip daddr != @reachable meta l4proto tcp redirect to :{STREAMS_PORT}
	}}

	# To the namespace itself: answers to the agent's connections, which begin here, what was redirected, and
	# answers to the filter.
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname \"{TAP}\" ip saddr {GUEST} ct direction reply ct state established accept
		iifname @offline drop
		iifname \"{TAP}\" ip saddr {GUEST} ct status dnat ct direction original goto heard
		iifname \"{INNER}\" ct direction reply ct state established,related accept
	}}

	chain heard {{
		ct state invalid drop
		ct state new ct count over {CONNECTIONS} drop
		tcp dport {{ {NAMES_PORT}, {STREAMS_PORT} }} accept
		udp dport {NAMES_PORT} accept
		drop
	}}

	# From the namespace itself: those connections, and refusals.
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname \"{TAP}\" ip daddr {GUEST} accept
		oifname \"{INNER}\" goto asking
	}}

	# What the filter asks, and nobody else in here.
	chain asking {{
{unreachable_not_asked}
		ct state established accept
		ct state new ct count over {CONNECTIONS} drop
		meta skuid {user} meta l4proto {{ tcp, udp }} accept
		drop
	}}

	chain forward {{
		type filter hook forward priority filter; policy drop;
		iifname @offline goto refuse
		oifname @offline drop
		iifname \"{TAP}\" oifname \"{INNER}\" goto leaving
		iifname \"{INNER}\" oifname \"{TAP}\" ct state established,related goto arriving
	}}

	chain leaving {{
		ct state invalid drop
{unreachable_refused}
		ip daddr != @reachable goto refuse
		meta l4proto != {{ icmp, tcp, udp }} goto refuse
		meta l4proto {{ tcp, udp }} th dport {{ {dns}, {dns_over_tls} }} ip daddr != @name_servers goto refuse
		iifname @named meta l4proto {{ tcp, udp }} th dport {{ {http}, {https} }} goto refuse
		ct state new ct count over {CONNECTIONS} drop
		accept
	}}

	# An answer, or what a router says of a question. Either way it is about an address that was asked.
	chain arriving {{
		ct original ip daddr != @reachable drop
		meta l4proto {{ tcp, udp }} th sport {{ {dns}, {dns_over_tls} }} ip saddr != @name_servers drop
		oifname @named meta l4proto {{ tcp, udp }} th sport {{ {http}, {https} }} drop
		accept
	}}

	chain refuse {{
		meta l4proto tcp ct state established reject with tcp reset
		reject with icmp type admin-prohibited
	}}

	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname \"{INNER}\" masquerade
	}}
}}
"
    )
}

/// Puts a policy in force in a slot's namespace instead of the former one; none where that is unknown. The
/// answer is up to three transactions, to be loaded one after the other.
///
/// At no moment does a packet pass that neither of the policies lets pass, and none is refused that both of
/// them let pass, so that what may go on is not interrupted.
///
/// The rules stay, and only what differs is said. That matters: `nft` does not end before the kernel has
/// freed what a transaction removed, which takes 5 to 30 ms; one that only adds takes none of that. So to
/// take the internet away from a prepared slot is quick.
#[must_use]
pub(super) fn change(former: Option<&Policy>, policy: &Policy) -> Vec<String> {
    let [offline, named, filtered, reachable, name_servers] =
        SETS.map(|set| Difference::of(set, former, policy));
    // These go together: whoever is a name server is also reachable, so that no mixture of the former and
    // the new contents lets more pass than one of the policies. What is redirected passes the filter's rules.
    let lists = [filtered, reachable, name_servers].map(|set| set.delete + &set.add).concat();
    let (mut before, mut after) = (String::new(), String::new());
    for (set, closes) in [(offline, !policy.internet()), (named, policy.looks_for_names())] {
        if closes {
            before += &set.add;
        } else {
            after += &set.delete;
        }
    }
    [before, lists, after].into_iter().filter(|text| !text.is_empty()).collect()
}

/// How the contents of one set become others.
#[derive(Debug)]
struct Difference {
    /// To be said first: a new range may overlap a former one.
    delete: String,
    add: String,
}

impl Difference {
    fn of((set, _, contents): (&str, &str, Contents), former: Option<&Policy>, policy: &Policy) -> Self {
        let wanted = contents(policy);
        let present = former.map(contents).unwrap_or_default();
        let say = |verb: &str, all: &[String], others: &[String]| {
            let others = others.iter().collect::<HashSet<_>>();
            let elements = all.iter().filter(|one| !others.contains(one)).cloned().collect::<Vec<_>>();
            if elements.is_empty() {
                String::new()
            } else {
                format!("{verb} element inet wrenn {set} {{ {} }}\n", elements.join(", "))
            }
        };
        let delete = match former {
            Some(_) => say("delete", &present, &wanted),
            None => format!("flush set inet wrenn {set}\n"),
        };
        Self { delete, add: say("add", &wanted, &present) }
    }
}

/// The definitions of the sets that a policy fills. There is no empty list of elements.
fn sets(policy: &Policy) -> String {
    let define = |(name, kind, contents): (&str, &str, Contents)| {
        let contents = contents(policy);
        let kind = kind.replace("; ", "\n\t\t");
        let elements = if contents.is_empty() {
            String::new()
        } else {
            format!("\t\telements = {{ {} }}\n", contents.join(", "))
        };
        format!("\tset {name} {{\n\t\t{kind}\n{elements}\t}}\n")
    };
    SETS.map(define).join("\n")
}

/// The rules at the uplink's ends of all of an instance's slots. They replace those that were there.
#[must_use]
pub(super) fn uplink(instance: &InstanceId, group: u32) -> String {
    let table = uplink_table(instance);
    let emptied = without_rules(&format!("inet {table}"), "");
    let unreachable = unreachable("drop");
    format!(
        "{emptied}
table inet {table} {{
	comment \"sandboxes of instance {instance}\"

	# Before any translation of this host's: what a packet says is what the sandbox said.
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifgroup {group} goto from_sandbox
	}}

	# The last rule is about every address of this host, whichever network it is in.
	chain from_sandbox {{
		meta nfproto != ipv4 drop
		ip saddr != {VETH_NETWORK}/{VETH_NETWORK_PREFIX} drop
{unreachable}
		fib daddr type != unicast drop
	}}

	chain input {{
		type filter hook input priority filter; policy accept;
		iifgroup {group} drop
	}}

	chain output {{
		type filter hook output priority filter; policy accept;
		oifgroup {group} ct state != {{ established, related }} drop
	}}

	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifgroup {group} goto leaving
		oifgroup {group} ct state != {{ established, related }} drop
	}}

	# Not to a sandbox of whichever stack, and once more after the host's own translation.
	chain leaving {{
		oifname \"{OUTER_PREFIX}*\" drop
{unreachable}
	}}

	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		iifgroup {group} masquerade
	}}
}}
"
    )
}

/// Removes an instance's table from the uplink, and says nothing where there is none.
#[must_use]
pub(super) fn without_uplink(instance: &InstanceId) -> String {
    let table = uplink_table(instance);
    format!("table inet {table} {{}}\ndelete table inet {table}\n")
}

/// Rules, and not a set: the kernel exchanges them at once. They are few enough to be as quick as one.
fn unreachable(verdict: &str) -> String {
    UNREACHABLE.map(|network| format!("\t\tip daddr {network} {verdict}")).join("\n")
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        net::Ipv4Addr,
    };

    use proptest::prelude::*;
    use wrenn_types::NetworkPolicy;

    use super::{super::policy::tests::words, *};

    fn instance() -> InstanceId {
        "0a1b2c3d".parse().unwrap()
    }

    fn resolved(words: &NetworkPolicy) -> Policy {
        Policy::resolve(words, &[[1, 1, 1, 1].into(), [8, 8, 8, 8].into()]).unwrap()
    }

    fn internet() -> Policy {
        resolved(&NetworkPolicy::simple(true))
    }

    fn listed() -> NetworkPolicy {
        let cidrs = |texts: [&str; 2]| texts.map(|text| text.parse().unwrap()).to_vec();
        NetworkPolicy {
            allow_cidrs: cidrs(["1.0.0.0/8", "203.0.113.0/24"]),
            deny_cidrs: cidrs(["203.0.113.64/26", "203.0.113.7"]),
            ..NetworkPolicy::simple(true)
        }
    }

    #[test]
    fn the_rules_of_a_slot() {
        let number = SlotNumber::new(7).unwrap();
        let user = format!("skuid {} ", confinement::user(number));
        let rules = slot(&instance(), number, &internet());
        assert_eq!(rules.matches(&user).count(), 1);
        // It is another one in a user namespace.
        insta::assert_snapshot!(rules.replace(&user, "skuid USER "));
    }

    #[test]
    fn the_rules_of_an_adopted_slot() {
        let (number, policy) = (SlotNumber::new(7).unwrap(), internet());
        let again = slot_again(&instance(), number, &policy);
        let tables = slot_tables(&instance(), number, &policy);
        insta::assert_snapshot!(again.strip_suffix(&tables).unwrap());
        assert!(slot(&instance(), number, &policy).ends_with(&tables));
    }

    #[test]
    fn no_device_is_taken_out_of_a_set_to_be_put_back() {
        let (number, off) = (SlotNumber::new(7).unwrap(), Policy::offline());
        let again = slot_again(&instance(), number, &off);
        assert!(!again.contains("flush set inet wrenn offline") && again.contains("elements = { \"tap0\" }"));
        assert!(slot_again(&instance(), number, &internet()).contains("flush set inet wrenn offline"));
    }

    #[test]
    fn the_sets_of_a_policy_with_lists() {
        insta::assert_snapshot!(sets(&resolved(&listed())));
    }

    #[test]
    fn the_rules_of_the_uplink() {
        insta::assert_snapshot!(uplink(&instance(), link_group(&instance()).unwrap()));
    }

    #[test]
    fn the_internet_is_taken_away_by_adding_only() {
        let off = resolved(&NetworkPolicy::simple(false));
        assert_eq!(change(Some(&internet()), &off), ["add element inet wrenn offline { \"tap0\" }\n"]);
        assert_eq!(change(Some(&internet()), &Policy::offline())[0], change(Some(&internet()), &off)[0]);
        assert_eq!(change(Some(&off), &internet()), ["delete element inet wrenn offline { \"tap0\" }\n"]);
        assert_eq!(change(Some(&internet()), &resolved(&listed())).len(), 1);
    }

    #[test]
    fn the_group_of_links_is_the_id_as_a_number() {
        assert_eq!(link_group(&instance()), Some(0x0a1b_2c3d));
        assert_eq!(link_group(&"ffffffff".parse().unwrap()), Some(u32::MAX));
        assert_eq!(link_group(&"00000000".parse().unwrap()), None, "the group of everybody");
    }

    type Sets = BTreeMap<String, BTreeSet<String>>;

    fn contents(policy: &Policy) -> Sets {
        SETS.into_iter()
            .map(|(name, _, contents)| (name.to_owned(), contents(policy).into_iter().collect()))
            .collect()
    }

    /// What `nft` would do with a text of [`change`]. It fails where `nft` would: on the deletion of what
    /// is not there.
    fn perform(text: &str, mut sets: Sets) -> Sets {
        for line in text.lines() {
            let words = line.split([' ', ',', '{', '}']).filter(|word| !word.is_empty()).collect::<Vec<_>>();
            match words.as_slice() {
                ["flush", "set", "inet", "wrenn", set] => sets.get_mut(*set).unwrap().clear(),
                ["add", "element", "inet", "wrenn", set, elements @ ..] => {
                    sets.get_mut(*set).unwrap().extend(elements.iter().map(ToString::to_string));
                }
                ["delete", "element", "inet", "wrenn", set, elements @ ..] => {
                    let set = sets.get_mut(*set).unwrap();
                    assert!(elements.iter().all(|element| set.remove(*element)), "{line}");
                }
                other => panic!("{other:?}"),
            }
        }
        sets
    }

    /// What the chain `leaving` decides of a TCP segment or a UDP datagram, given what is in the sets.
    fn leaves(sets: &Sets, address: Ipv4Addr, port: u16) -> bool {
        let within = |set: &str| {
            sets[set].iter().any(|element| {
                let (first, last) = element.split_once('-').unwrap_or((element, element));
                let (first, last) = (first.parse::<Ipv4Addr>().unwrap(), last.parse::<Ipv4Addr>().unwrap());
                (first..=last).contains(&address)
            })
        };
        let tap_in = |set: &str| sets[set].contains("\"tap0\"");
        let refused = tap_in("offline")
            || UNREACHABLE.iter().any(|network| network.contains(address))
            || !within("reachable")
            || (matches!(port, 53 | 853) && !within("name_servers"))
            || (matches!(port, 80 | 443) && tap_in("named"));
        !refused
    }

    fn ports() -> impl Strategy<Value = u16> {
        prop_oneof![50_u16..56, Just(80), Just(443)]
    }

    fn policies() -> impl Strategy<Value = Policy> {
        words().prop_map(|words| resolved(&words))
    }

    proptest! {
        #[test]
        fn a_change_leads_to_the_new_policy(former in policies(), policy in policies()) {
            for known in [true, false] {
                let texts = change(known.then_some(&former), &policy);
                prop_assert!(texts.len() <= 3);
                let changed = texts.iter().fold(contents(&former), |sets, text| perform(text, sets));
                prop_assert_eq!(&changed, &contents(&policy));
            }
            prop_assert!(change(Some(&policy), &policy).is_empty());
        }

        /// Whichever of the sets are exchanged already when a packet comes.
        #[test]
        fn on_the_way_nothing_passes_and_nothing_is_refused_against_both(
            former in policies(), policy in policies(), low in 0_u32..64, port in ports(), known: bool,
        ) {
            let address = Ipv4Addr::from_bits(0xcb00_7100 | low);
            let (before, after) = (former.reaches(address, port), policy.reaches(address, port));
            let mut sets = contents(&former);
            for text in change(known.then_some(&former), &policy) {
                let changed = perform(&text, sets.clone());
                for exchanged in 0..1 << SETS.len() {
                    let mut mixed = sets.clone();
                    for (index, (name, ..)) in SETS.iter().enumerate() {
                        if exchanged & (1 << index) != 0 {
                            mixed.insert((*name).to_owned(), changed[*name].clone());
                        }
                    }
                    let passes = leaves(&mixed, address, port);
                    prop_assert!(!passes || before || after, "{} passes: {:?}", address, mixed);
                    prop_assert!(passes || !before || !after, "{} is refused: {:?}", address, mixed);
                }
                sets = changed;
            }
        }

        #[test]
        fn the_sets_say_what_the_policy_says(policy in policies(), low in 0_u32..64, any: u32, port in ports()) {
            let sets = contents(&policy);
            for bits in [0xcb00_7100 | low, any] {
                for port in [port, 853] {
                    let address = Ipv4Addr::from_bits(bits);
                    prop_assert_eq!(leaves(&sets, address, port), policy.reaches(address, port), "{}:{}", address, port);
                }
            }
        }
    }
}
