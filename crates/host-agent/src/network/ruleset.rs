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
//! - A table is replaced as a whole, in one transaction: there is no moment without rules.
//! - The uplink's table matches only links of the group that is the instance's id as a number. No rule of
//!   it says anything about a link of anybody else.

use std::{
    fmt::Write as _,
    net::Ipv4Addr,
};

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

/// The rules of one slot's namespace. They name `tap0`, which must be there.
#[must_use]
pub fn slot(instance: &InstanceId, slot: SlotNumber, policy: &Policy) -> String {
    let owner = format!("instance {instance}, slot {slot}");
    let unreachable = unreachable();
    let mac = mac(GUEST_MAC);
    let forward = if policy.internet {
        format!(
            "\
\t\tiifname \"{TAP}\" oifname \"{INNER}\" goto leaving
\t\tiifname \"{INNER}\" oifname \"{TAP}\" ct state established,related accept"
        )
    } else {
        format!("\t\tiifname \"{TAP}\" goto refuse")
    };
    let names = match policy.dns_servers.as_slice() {
        [] => String::new(),
        servers => format!("\t\tip daddr {{ {} }} goto counted\n", list(servers)),
    };
    let device = replace(
        "netdev",
        "wrenn",
        &format!(
            "\
	comment \"{owner}\"

	# All that a guest can say: IPv4 and ARP, as itself.
	chain from_guest {{
		type filter hook ingress device \"{TAP}\" priority 0; policy drop;
		ether saddr != {mac} drop
		arp saddr ip {GUEST} arp daddr ip {GATEWAY} accept
		ip saddr {GUEST} accept
	}}
"
        ),
    );
    let rest = replace(
        "inet",
        "wrenn",
        &format!(
            "\
	comment \"{owner}\"

	set unreachable {{
		type ipv4_addr
		flags interval
		elements = {{
{unreachable}
		}}
	}}

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
{forward}
	}}

	chain leaving {{
		ct state invalid drop
		ip daddr @unreachable goto refuse
		meta l4proto != {{ icmp, tcp, udp }} goto refuse
		meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto names
		goto counted
	}}

	chain names {{
{names}		goto refuse
	}}

	chain counted {{
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
"
        ),
    );
    format!("{device}\n{rest}")
}

/// The rules at the uplink's ends of all of an instance's slots.
#[must_use]
pub fn uplink(instance: &InstanceId, group: u32) -> String {
    let unreachable = unreachable();
    replace(
        "inet",
        &uplink_table(instance),
        &format!(
            "\
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
"
        ),
    )
}

/// Removes an instance's table from the uplink, and says nothing where there is none.
#[must_use]
pub fn without_uplink(instance: &InstanceId) -> String {
    let table = uplink_table(instance);
    format!("table inet {table} {{}}\ndelete table inet {table}\n")
}

/// One transaction: the table as it was is gone, and the new one is there.
fn replace(family: &str, name: &str, body: &str) -> String {
    format!("table {family} {name} {{}}\ndelete table {family} {name}\ntable {family} {name} {{\n{body}}}\n")
}

fn unreachable() -> String {
    UNREACHABLE.iter().map(|network| format!("\t\t\t{network}")).collect::<Vec<_>>().join(",\n")
}

fn list(addresses: &[Ipv4Addr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn mac(address: [u8; 6]) -> String {
    let mut text = String::with_capacity(17);
    for (index, byte) in address.iter().enumerate() {
        let colon = if index == 0 { "" } else { ":" };
        // Writing to a string cannot fail.
        let _ = write!(text, "{colon}{byte:02x}");
    }
    text
}
