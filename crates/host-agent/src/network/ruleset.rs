//! The rules of the network, as texts for `nft -f -`. Pure: what is decided here is seen in the tests.
//!
//! A packet of a guest passes two sets of rules, each of which would be enough. The first is in the
//! guest's own namespace ([`slot`]), the second where the namespace ends ([`uplink`]):
//!
//! ```text
//!  guest ──► tap0 ─ from_guest ─► forward ─ leaving ─► eth0 ══► wrenn-v-N ─ from_sandbox ─► forward ─ leaving ─► outside
//!             │ its own addresses,     │ not to what is            │ the sandbox's addresses,     │ not to a sandbox,
//!             │ IPv4 and ARP only      │ unreachable, DNS only     │ IPv4, not to this host, not  │ not to what is
//!             ▼ else dropped           ▼ where it may: refused     ▼ to what is unreachable       ▼ unreachable after NAT
//! ```
//!
//! - What a guest may send is decided anew for every packet, never by the state of a connection, so that a
//!   change of policy also ends what is open. State only says what may come back.
//! - What the policy forbids is refused with an ICMP message, so that a program in the guest sees an error
//!   instead of a timeout. What is forged is dropped.
//! - The rules of a slot never change. What a policy decides are the contents of two sets that they look
//!   into, and those are changed in one transaction ([`change`]): there is no moment without rules.
//! - The uplink's table matches only links of the group that is the instance's id as a number. No rule of
//!   it says anything about a link of anybody else.

use wrenn_types::InstanceId;

use super::{
    addresses::{
        GATEWAY, GUEST, GUEST_MAC, INNER, OUTER_PREFIX, SlotNumber, TAP, VETH_NETWORK, VETH_NETWORK_PREFIX,
    },
    policy::{Policy, UNREACHABLE},
};

/// How many connections one guest may have open. They are remembered in a table that all sandboxes and
/// the host share, and one guest must not be able to fill it.
const CONNECTIONS: u32 = 4096;

/// The group of an instance's links: its id, read as a number.
///
/// None for the one id that is the number of the group in which every other link is.
#[must_use]
pub fn link_group(instance: &InstanceId) -> Option<u32> {
    u32::from_str_radix(instance.as_str(), 16).ok().filter(|group| *group != 0)
}

/// The name of the table in the uplink.
#[must_use]
pub fn uplink_table(instance: &InstanceId) -> String {
    format!("wrenn_{instance}")
}

/// The rules of one slot's namespace, with a policy in force.
///
/// The namespace is new: rules that were there already would make this fail. The text names `tap0`, which
/// must be there.
#[must_use]
pub fn slot(instance: &InstanceId, slot: SlotNumber, policy: &Policy) -> String {
    let owner = format!("instance {instance}, slot {slot}");
    let offline = elements(&offline(policy));
    let name_servers = elements(&name_servers(policy));
    let unreachable = unreachable();
    let mac = mac(GUEST_MAC);
    format!(
        "create table netdev wrenn
create table inet wrenn

table netdev wrenn {{
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

	set unreachable {{
		type ipv4_addr
		flags interval
		elements = {{
{unreachable}
		}}
	}}

	# The policy, in two sets. A TAP device that is offline reaches nothing.
	set offline {{
		type ifname
{offline}	}}

	set name_servers {{
		type ipv4_addr
{name_servers}	}}

	# To the namespace itself: answers to the agent's connections, which begin here.
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname \"{TAP}\" ip saddr {GUEST} ct state established accept
	}}

	# From the namespace itself: those connections, and refusals.
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname \"{TAP}\" ip daddr {GUEST} accept
	}}

	chain forward {{
		type filter hook forward priority filter; policy drop;
		iifname @offline goto refuse
		oifname @offline drop
		iifname \"{TAP}\" oifname \"{INNER}\" goto leaving
		iifname \"{INNER}\" oifname \"{TAP}\" ct state established,related accept
	}}

	chain leaving {{
		ct state invalid drop
		ip daddr @unreachable goto refuse
		meta l4proto != {{ icmp, tcp, udp }} goto refuse
		meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} ip daddr != @name_servers goto refuse
		ct state new ct count over {CONNECTIONS} drop
		accept
	}}

	chain refuse {{
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

/// Puts a policy in force in a slot's namespace instead of the former one; none where that is unknown.
///
/// The rules stay, and only what differs is said. That matters: `nft` does not end before the kernel has
/// freed what a transaction removed, which takes 5 to 30 ms; one that only adds takes none of that. So to
/// take the internet away from a prepared slot is quick.
#[must_use]
pub fn change(former: Option<&Policy>, policy: &Policy) -> String {
    let sets = [("offline", offline as fn(&Policy) -> Vec<String>), ("name_servers", name_servers)];
    let mut text = String::new();
    for (set, contents) in sets {
        let wanted = contents(policy);
        let present = former.map(contents);
        if present.is_none() {
            text.push_str(&format!("flush set inet wrenn {set}\n"));
        }
        let present = present.unwrap_or_default();
        let without = |all: &[String], others: &[String]| -> Vec<String> {
            all.iter().filter(|one| !others.contains(one)).cloned().collect()
        };
        for (verb, elements) in [("add", without(&wanted, &present)), ("delete", without(&present, &wanted))]
        {
            if !elements.is_empty() {
                text.push_str(&format!("{verb} element inet wrenn {set} {{ {} }}\n", elements.join(", ")));
            }
        }
    }
    text
}

/// What a policy puts into the set of that name.
fn offline(policy: &Policy) -> Vec<String> {
    if policy.internet { Vec::new() } else { vec![format!("\"{TAP}\"")] }
}

/// What a policy puts into the set of that name.
fn name_servers(policy: &Policy) -> Vec<String> {
    let mut servers = policy.dns_servers.clone();
    servers.sort_unstable();
    servers.dedup();
    servers.iter().map(ToString::to_string).collect()
}

/// A set's contents in its definition, which has no empty list.
fn elements(contents: &[String]) -> String {
    if contents.is_empty() {
        String::new()
    } else {
        format!("\t\telements = {{ {} }}\n", contents.join(", "))
    }
}

/// The rules at the uplink's ends of all of an instance's slots. They replace those that were there.
#[must_use]
pub fn uplink(instance: &InstanceId, group: u32) -> String {
    let table = uplink_table(instance);
    let unreachable = unreachable();
    format!(
        "table inet {table} {{}}
delete table inet {table}

table inet {table} {{
	comment \"sandboxes of instance {instance}\"

	set unreachable {{
		type ipv4_addr
		flags interval
		elements = {{
{unreachable}
		}}
	}}

	# Before any translation of this host's: what a packet says is what the sandbox said.
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifgroup {group} goto from_sandbox
	}}

	# The last rule is about every address of this host, whichever network it is in.
	chain from_sandbox {{
		meta nfproto != ipv4 drop
		ip saddr != {VETH_NETWORK}/{VETH_NETWORK_PREFIX} drop
		ip daddr @unreachable drop
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
		ip daddr @unreachable drop
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
pub fn without_uplink(instance: &InstanceId) -> String {
    let table = uplink_table(instance);
    format!("table inet {table} {{}}\ndelete table inet {table}\n")
}

fn unreachable() -> String {
    UNREACHABLE.iter().map(|network| format!("\t\t\t{network}")).collect::<Vec<_>>().join(",\n")
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::Ipv4Addr};

    use proptest::prelude::*;

    use super::*;

    fn instance() -> InstanceId {
        "0a1b2c3d".parse().unwrap()
    }

    fn internet() -> Policy {
        Policy { internet: true, dns_servers: vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(8, 8, 8, 8)] }
    }

    #[test]
    fn the_rules_of_a_slot() {
        insta::assert_snapshot!(slot(&instance(), SlotNumber::new(7).unwrap(), &internet()));
    }

    #[test]
    fn the_rules_of_the_uplink() {
        insta::assert_snapshot!(uplink(&instance(), link_group(&instance()).unwrap()));
    }

    #[test]
    fn the_internet_is_taken_away_by_adding_only() {
        let off = Policy { internet: false, ..internet() };
        assert_eq!(change(Some(&internet()), &off), "add element inet wrenn offline { \"tap0\" }\n");
        assert_eq!(change(Some(&off), &internet()), "delete element inet wrenn offline { \"tap0\" }\n");
    }

    #[test]
    fn the_group_of_links_is_the_id_as_a_number() {
        assert_eq!(link_group(&instance()), Some(0x0a1b_2c3d));
        assert_eq!(link_group(&"ffffffff".parse().unwrap()), Some(u32::MAX));
        assert_eq!(link_group(&"00000000".parse().unwrap()), None, "the group of everybody");
    }

    type Sets = [BTreeSet<String>; 2];

    fn sets(policy: &Policy) -> Sets {
        [offline(policy), name_servers(policy)].map(|contents| contents.into_iter().collect())
    }

    /// What `nft` would do with a text of [`change`]. It fails where `nft` would: on the deletion of what
    /// is not there.
    fn perform(text: &str, mut sets: Sets) -> Sets {
        for line in text.lines() {
            let words = line.split([' ', ',', '{', '}']).filter(|word| !word.is_empty()).collect::<Vec<_>>();
            let index = |name| ["offline", "name_servers"].iter().position(|known| *known == name).unwrap();
            match words.as_slice() {
                ["flush", "set", "inet", "wrenn", set] => sets[index(*set)].clear(),
                ["add", "element", "inet", "wrenn", set, elements @ ..] => {
                    sets[index(*set)].extend(elements.iter().map(ToString::to_string));
                }
                ["delete", "element", "inet", "wrenn", set, elements @ ..] => {
                    assert!(elements.iter().all(|element| sets[index(*set)].remove(*element)), "{line}");
                }
                other => panic!("{other:?}"),
            }
        }
        sets
    }

    fn policies() -> impl Strategy<Value = Policy> {
        (any::<bool>(), proptest::collection::vec(0_u8..6, 0..5)).prop_map(|(internet, servers)| Policy {
            internet,
            dns_servers: servers.into_iter().map(|last| Ipv4Addr::new(9, 9, 9, last)).collect(),
        })
    }

    proptest! {
        #[test]
        fn a_change_leads_to_the_new_policy(former in policies(), policy in policies()) {
            let known = perform(&change(Some(&former), &policy), sets(&former));
            prop_assert_eq!(&known, &sets(&policy));
            let unknown = perform(&change(None, &policy), sets(&former));
            prop_assert_eq!(&unknown, &sets(&policy));
        }
    }
}
