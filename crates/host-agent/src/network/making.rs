//! Makes one slot, and takes one apart. Both begin with the lease in hand.
//!
//! ```text
//!  lease ─► namespace, settings, tap0 ─► its rules ─► veth pair ─► links up: prepared
//!                                         └── nothing is up before they are there
//!
//!  prepared ─► links deleted ─► filter ended, connections forgotten ─► name removed ─► lease removed
//! ```
//!
//! A slot is never used twice. What a sandbox could have left in a namespace goes with the namespace, and
//! a new one is cheaper than the proof that an old one is clean. The links go first and by name, so that
//! nothing can pass even where a process still holds the namespace.

use std::{fs, io, sync::Arc};

use wrenn_host_linux::{conntrack, netns, netns::NetworkNamespace, tap};

use super::{
    addresses::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, INNER, SlotNumber, TAP, TAP_MAC, VETH_PREFIX},
    error::SlotError,
    filter::{self, Filter},
    lease::{Lease, Leases},
    netlink::Netlink,
    nft,
    policy::{Bandwidth, Policy},
    ruleset, shaping,
    uplink::OpenUplink,
};

/// A slot that is leased and made, with a policy in force.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The right to use its number. It is kept as long as anything of the slot exists.
    pub(super) lease: Lease,
    /// Its namespace.
    pub(super) namespace: NetworkNamespace,
    /// The policy in force; none while it is unknown, because a change was broken off.
    pub(super) policy: Option<Policy>,
    /// Where it ends.
    pub(super) uplink: Arc<OpenUplink>,
    /// Its domain filter, once it has needed one.
    pub(super) filter: Option<Filter>,
    /// Who plays the guest in it, if there is nothing but a number.
    #[cfg(test)]
    pub(super) played: Option<super::stand_in::Guests>,
}

impl Prepared {
    pub(super) fn new(
        lease: Lease,
        namespace: NetworkNamespace,
        policy: Option<Policy>,
        uplink: Arc<OpenUplink>,
    ) -> Self {
        Self {
            lease,
            namespace,
            policy,
            uplink,
            filter: None,
            #[cfg(test)]
            played: None,
        }
    }

    /// Ends its domain filter and removes everything that its number stands for.
    pub(super) async fn dismantle(self) -> Result<(), SlotError> {
        let Self { lease, namespace, uplink, filter, .. } = self;
        // Nothing of this process is to hold the namespace when its name goes.
        drop(namespace);
        if let Some(filter) = filter {
            filter.end().await;
        }
        dismantle(&uplink, lease).await
    }

    /// Tells the domain filter a policy, and starts it if the policy needs one. One that is there already stays
    /// when the policy needs none, for the streams that go through it.
    pub(super) async fn filter_with(&mut self, policy: &Policy) -> Result<(), SlotError> {
        let number = self.lease.number();
        let failed = |source| SlotError::Filter { number, source };
        let rules = policy.rules().clone();
        match &self.filter {
            Some(filter) => filter.tell(rules).await.map_err(failed)?,
            None if policy.is_filtered() || filter::was_started(number).map_err(failed)? => {
                let filter =
                    Filter::open(self.uplink.instance.clone(), number, self.namespace.clone(), rules)
                        .await
                        .map_err(failed)?;
                self.filter = Some(filter);
            }
            None => {}
        }
        Ok(())
    }
}

/// Settings of a namespace. They are there before its links, which take theirs from `default`.
const SETTINGS: [(&str, &str); 12] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    // Every refusal reaches the guest: only it is sent any, and none of them counts as the host's.
    ("net/ipv4/icmp_ratemask", "0"),
    // Reverse path: an answer comes from where the question went, or it is dropped.
    ("net/ipv4/conf/all/rp_filter", "1"),
    // An ARP question is answered for the address of the link that it came in by, and for no other.
    ("net/ipv4/conf/all/arp_ignore", "1"),
    // Streams through a domain filter wait in memory that the whole host shares.
    ("net/ipv4/tcp_rmem", "4096 65536 262144"),
    ("net/ipv4/tcp_wmem", "4096 65536 262144"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
];

/// Makes a slot with the first number that is free, beginning with `from`. When that fails, nothing is left.
pub(super) async fn make(
    uplink: Arc<OpenUplink>,
    leases: Arc<Leases>,
    from: SlotNumber,
    policy: Policy,
) -> Result<Prepared, SlotError> {
    let mut lease = leases.take(from)?;
    lease.write(&uplink.instance)?;
    let number = lease.number();
    if number.namespace().exists() {
        // Its owner died: the lease was free. Whoever holds the lease clears what is left.
        clear(&uplink, number).await?;
    }
    let error = match build(&uplink, number, &policy).await {
        Ok(namespace) => {
            let mut prepared = Prepared::new(lease, namespace, Some(policy.clone()), uplink);
            let whole = async {
                prepared.filter_with(&policy).await?;
                shaping::apply(&prepared, Some(Bandwidth::default()), policy.bandwidth()).await
            };
            match whole.await {
                Ok(()) => return Ok(prepared),
                Err(error) => {
                    tell_of_leftovers(number, prepared.dismantle().await);
                    error
                }
            }
        }
        Err(error) => {
            tell_of_leftovers(number, dismantle(&uplink, lease).await);
            error
        }
    };
    Err(error)
}

fn tell_of_leftovers(number: SlotNumber, dismantled: Result<(), SlotError>) {
    if let Err(left) = dismantled {
        let left = &left as &dyn std::error::Error;
        tracing::warn!(slot = %number, error = left, "what was made of a slot stays until its number is used");
    }
}

/// Takes over a slot from an agent that died, with a policy in force. Nothing of it stops: its rules are
/// replaced in one transaction. When that fails it is as it was, but for what was done until then.
pub(super) async fn adopt(
    uplink: Arc<OpenUplink>,
    leases: Arc<Leases>,
    number: SlotNumber,
    policy: Policy,
) -> Result<Prepared, SlotError> {
    let lease = leases.adopt(number, &uplink.instance)?;
    let namespace = NetworkNamespace::open(number.namespace().as_std_path())
        .map_err(|source| SlotError::Namespace { number, source })?;
    let mut prepared = Prepared::new(lease, namespace, None, uplink);
    prepared.filter_with(&policy).await?;
    nft::load(&prepared.namespace, ruleset::slot_again(&prepared.uplink.instance, number, &policy))
        .await
        .map_err(|source| SlotError::Rules { number, source })?;
    shaping::apply(&prepared, None, policy.bandwidth()).await?;
    prepared.policy = Some(policy);
    Ok(prepared)
}

async fn build(
    uplink: &OpenUplink,
    number: SlotNumber,
    policy: &Policy,
) -> Result<NetworkNamespace, SlotError> {
    let link = |source| SlotError::Link { number, source };
    let path = number.namespace();
    let (namespace, ()) = NetworkNamespace::create(path.as_std_path(), make_inside).await?;

    let rules = ruleset::slot(&uplink.instance, number, policy);
    let outer = number.outer();
    let (loaded, paired) = tokio::join!(
        nft::load(&namespace, rules),
        uplink.netlink.add_veth(&outer, uplink.group, INNER, &namespace),
    );
    loaded.map_err(|source| SlotError::Rules { number, source })?;
    paired.map_err(link)?;

    let owner = format!("wrenn {} slot {number}", uplink.instance);
    let inside = Netlink::open(&namespace).await.map_err(link)?;
    let tap = inside.index(TAP).await.map_err(link)?;
    inside.set_mac(tap, TAP_MAC).await.map_err(link)?;
    inside.add_address(tap, GATEWAY, GUEST_PREFIX).await.map_err(link)?;
    inside.up(tap, &owner).await.map_err(link)?;
    inside.add_neighbour(tap, GUEST, GUEST_MAC).await.map_err(link)?;

    let quiet = {
        let outer = outer.clone();
        uplink.namespace.run(move || setting(&format!("net/ipv6/conf/{outer}/disable_ipv6"), "1"))
    };
    quiet.await.map_err(|source| SlotError::Namespace { number, source })??;
    let end = uplink.netlink.index(&outer).await.map_err(link)?;
    uplink.netlink.add_address(end, number.outer_address(), VETH_PREFIX).await.map_err(link)?;
    uplink.netlink.up(end, &owner).await.map_err(link)?;

    let inner = inside.index(INNER).await.map_err(link)?;
    inside.add_address(inner, number.inner_address(), VETH_PREFIX).await.map_err(link)?;
    inside.up(inner, &owner).await.map_err(link)?;
    inside.add_default_route(inner, number.outer_address()).await.map_err(link)?;
    Ok(namespace)
}

/// Runs in the new namespace, before anybody else knows of it.
fn make_inside() -> Result<(), SlotError> {
    for (name, value) in SETTINGS {
        setting(name, value)?;
    }
    tap::create_persistent(TAP, None).map_err(SlotError::Tap)
}

fn setting(name: &str, value: &str) -> Result<(), SlotError> {
    match fs::write(format!("/proc/sys/{name}"), value) {
        // A kernel without IPv6 has nothing to turn off.
        Err(error) if error.kind() == io::ErrorKind::NotFound && name.contains("/ipv6/") => Ok(()),
        other => other.map_err(|source| SlotError::Setting { name: name.to_owned(), source }),
    }
}

/// Removes everything that a number stands for, the lease last. Nothing is touched without its lock: where
/// the VMM of an adopted slot has ended, another stack may have taken the number already.
pub(super) async fn dismantle(uplink: &OpenUplink, lease: Lease) -> Result<(), SlotError> {
    lease.secure()?;
    clear(uplink, lease.number()).await?;
    lease.remove()
}

/// Removes everything but the lease. What is not there is no error.
async fn clear(uplink: &OpenUplink, number: SlotNumber) -> Result<(), SlotError> {
    uplink.netlink.delete(&number.outer()).await.map_err(|source| SlotError::Link { number, source })?;
    // Nothing passes any more. The kernel takes its time for each of the rest, so they go side by side.
    let filters =
        async { filter::end_leftovers(number).await.map_err(|source| SlotError::Filter { number, source }) };
    tokio::try_join!(clear_inside(number), forget_connections(uplink, number), filters)?;
    // An unmount waits for the kernel too, and has no other way to do it than on a thread.
    let name = number.namespace();
    let removed = tokio::task::spawn_blocking(move || netns::remove_name(name.as_std_path()));
    removed
        .await
        .map_err(io::Error::other)
        .flatten()
        .map_err(|source| SlotError::Namespace { number, source })
}

async fn clear_inside(number: SlotNumber) -> Result<(), SlotError> {
    let link = |source| SlotError::Link { number, source };
    match NetworkNamespace::open(number.namespace().as_std_path()) {
        Ok(namespace) => {
            let inside = Netlink::open(&namespace).await.map_err(link)?;
            // It is still there when the pair ends in an uplink other than this one.
            inside.delete(INNER).await.map_err(link)?;
            inside.delete(TAP).await.map_err(link)?;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SlotError::Namespace { number, source }),
    }
}

async fn forget_connections(uplink: &OpenUplink, number: SlotNumber) -> Result<(), SlotError> {
    let address = number.inner_address();
    let forgotten = uplink.namespace.run(move || conntrack::forget(address)).await.and_then(|done| done);
    forgotten.map_err(|source| SlotError::Connections { number, source })?;
    Ok(())
}
