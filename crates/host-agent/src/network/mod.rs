//! The network of the sandboxes: a numbered *slot* for each, made ahead of need.
//!
//! A slot is a network namespace with a TAP device for the VMM, a veth pair that leads out of it, and rules
//! that are in force before anything is up. Its inside is the same for every slot, so that one snapshot
//! fits all; its outside follows from its number ([`addresses`]).
//!
//! ```text
//!   ┌ namespace wrenn-ns-N ───────────────────┐      ┌ uplink: the host's namespace, or a named one ┐
//!   │  VMM ═ tap0 ─ rules ─ NAT ─ eth0 ═══════╪══════╪═ wrenn-v-N ─ rules ─ NAT ─ … outside          │
//!   │         ▲                               │      └──────────────────────────────────────────────┘
//!   └─────────┼───────────────────────────────┘
//!             └ sockets of the agent, made in here ([`GuestConnector`])
//! ```
//!
//! - **Nothing leads in.** There is no route and no translation from outside to a guest. The agent reaches it
//!   with sockets that it makes inside of the namespace.
//! - **What a guest reaches** is the internet, some networks of it, or nothing, as its [`Policy`] says, and
//!   the name servers that the policy names. This host, other sandboxes, private, link-local and metadata
//!   addresses and IPv6 are never reached ([`policy::UNREACHABLE`], [`ruleset`]). How fast, the policy may
//!   say too. All of it changes while the guest runs ([`Slot::apply`]).
//! - **Names.** Where the policy says something about names, a process of the slot's own answers the guest's
//!   questions for them, and carries what they open ([`filter`]).
//! - **Whose it is.** Numbers are the machine's, and several stacks share it. The lease of a number is an
//!   flock on `/run/wrenn/slots/N`; the VMM inherits it, so that it outlives the agent. The links of a stack
//!   carry its instance id as their group, and its rules match only that group.
//! - **A slot is used once.** Then it is dismantled, and another one is made ([`SlotPool`]).
//! - **A slot outlives the agent** if its VMM does. The agent [leaves](Slot::leave) it or dies, and the next
//!   one [adopts](SlotPool::adopt) it; in between its rules are in force, and it keeps its connections.
//!
//! What is on the path of a create: taking a slot from the queue, and for a sandbox with less than the
//! internet one run of `nft`, and where names matter the start of a filter. Everything else happens before or after.
//!
//! What a host must offer: root, `/dev/net/tun`, nftables. In the uplink `net.ipv4.ip_forward` is turned on
//! if it was off, and stays on. Rules of others that forbid forwarding (a default of Docker's, for one) are
//! not overruled: where they drop what sandboxes send, an exception for `wrenn-v-*` has to be made there.

pub(crate) mod addresses;
mod collect;
mod error;
pub mod filter;
mod lease;
mod making;
mod netlink;
mod networks;
mod nft;
mod policy;
mod pool;
mod ruleset;
mod shaping;
mod slot;
#[cfg(test)]
pub(crate) mod stand_in;
mod stock;
#[cfg(test)]
mod tests;
mod uplink;

pub use addresses::{NotASlot, SlotNumber};
pub(crate) use collect::{collect, collect_slots};
pub use error::SlotError;
pub use netlink::NetlinkError;
pub use nft::NftError;
pub use policy::{Bandwidth, Policy, PolicyError};
pub use pool::{PoolConfig, SlotCounts, SlotPool};
pub use slot::{GuestConnector, Slot};
pub use uplink::{NamespaceName, Uplink, UplinkError};
