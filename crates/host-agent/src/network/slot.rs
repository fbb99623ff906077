//! A slot in a sandbox's hands.

use std::{io, net::Ipv4Addr, os::fd::OwnedFd, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::mpsc,
    time::timeout,
};
use wrenn_host_linux::netns::NetworkNamespace;

use super::{
    addresses::{GUEST, SlotNumber, TAP},
    error::SlotError,
    making::Prepared,
    nft,
    policy::Policy,
    pool::Request,
    ruleset, shaping,
};

/// How long a connection to the guest may take to be made.
const CONNECT_BOUND: Duration = Duration::from_secs(10);

/// One sandbox's network: a namespace with a TAP device, its rules, and the lease of its number.
///
/// It goes back by `SlotPool::release` once its VMM has ended. One that is dropped, because a bring-up was
/// broken off, is dismantled in the background.
#[derive(Debug)]
pub struct Slot {
    /// None only after it was given back.
    prepared: Option<Prepared>,
    namespace_path: Utf8PathBuf,
    pool: mpsc::UnboundedSender<Request>,
}

impl Slot {
    pub(super) fn new(prepared: Prepared, pool: mpsc::UnboundedSender<Request>) -> Self {
        let namespace_path = prepared.lease.number().namespace();
        Self { prepared: Some(prepared), namespace_path, pool }
    }

    #[expect(clippy::expect_used, reason = "only what consumes the slot takes it out")]
    fn prepared(&self) -> &Prepared {
        self.prepared.as_ref().expect("the slot is still held")
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> SlotNumber {
        self.prepared().lease.number()
    }

    /// The path of its network namespace, for the VMM to be started in.
    #[must_use]
    pub fn netns_path(&self) -> &Utf8Path {
        &self.namespace_path
    }

    /// The name of the TAP device there.
    #[must_use]
    pub fn tap(&self) -> &str {
        TAP
    }

    /// The lock on its number, for the VMM to inherit: the number stays taken as long as the VMM lives,
    /// whatever becomes of the agent.
    ///
    /// An adopted slot's lock is its VMM's until that has ended; then another one can be started in it.
    ///
    /// # Errors
    /// No descriptor is left, or the VMM of an adopted slot has not ended ([`SlotError::Held`]).
    pub fn lock(&self) -> Result<OwnedFd, SlotError> {
        self.prepared().lease.share()
    }

    /// Who the guest may ask for names, in this order: what its resolver has to be told. Nobody, while the
    /// policy in force is unknown because a change of it failed.
    #[must_use]
    pub fn name_servers(&self) -> &[Ipv4Addr] {
        self.prepared().policy.as_ref().map_or(&[], Policy::name_servers)
    }

    /// How connections to the guest are made.
    #[must_use]
    pub fn connector(&self) -> GuestConnector {
        GuestConnector {
            namespace: self.prepared().namespace.clone(),
            #[cfg(test)]
            played: self.prepared().played.clone().map(|played| (played, self.number())),
        }
    }

    /// Puts a policy in force, before the guest runs or while it does. A policy that is in force already
    /// costs nothing; another one is a run of `nft`, or up to three. What the new one forbids ends at once, open
    /// connections included, and what both of them allow is not interrupted. One exception: a connection to a web
    /// port that began when names did not matter ends when they do, as nobody knows which name it is for.
    ///
    /// # Errors
    /// The rules could not be loaded, or the bandwidth could not be limited. Then what is in force is the
    /// former policy, or on the way from it to the new one; whoever tries again tries all of it.
    pub async fn apply(&mut self, policy: &Policy) -> Result<(), SlotError> {
        let Some(prepared) = self.prepared.as_mut() else { return Err(SlotError::Stopped) };
        if prepared.policy.as_ref() == Some(policy) {
            return Ok(());
        }
        #[cfg(test)]
        if let Some(played) = &prepared.played {
            played.put_in_force(prepared.lease.number(), policy);
            prepared.policy = Some(policy.clone());
            return Ok(());
        }
        let number = prepared.lease.number();
        // If this future is dropped half-way, nobody knows which of the two it is.
        let former = prepared.policy.take();
        // A filter first: what the rules of the kernel send to it it decides by the new policy already.
        prepared.filter_with(policy).await?;
        // There is none where only the order of name servers differs, or the bandwidth.
        for (index, rules) in ruleset::change(former.as_ref(), policy).into_iter().enumerate() {
            if let Err(source) = nft::load(&prepared.namespace, rules).await {
                // A refused transaction changed nothing; one that was ended may have. A filter has the new rules
                // already: then whoever applies any policy next, the former one too, does all of it.
                if index == 0 && prepared.filter.is_none() && source.changed_nothing() {
                    prepared.policy = former;
                }
                return Err(SlotError::Rules { number, source });
            }
        }
        shaping::apply(prepared, former.as_ref().map(Policy::bandwidth), policy.bandwidth()).await?;
        prepared.policy = Some(policy.clone());
        Ok(())
    }

    /// Lets go of the slot as it is: for an agent that ends while the VMM goes on. Its rules stay in force,
    /// here and in the uplink, its domain filter goes on, and `SlotPool::adopt` of a later agent takes it over by its number.
    pub fn leave(mut self) -> SlotNumber {
        let number = self.number();
        self.prepared = None;
        number
    }

    pub(super) fn into_prepared(mut self) -> Option<Prepared> {
        self.prepared.take()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(prepared) = self.prepared.take() {
            // A pool that is gone leaves it to the next start, which finds its lease free.
            let _ = self.pool.send(Request::Return { prepared, done: None });
        }
    }
}

/// Makes connections to one guest, from within its namespace. Cheap to clone.
///
/// It names the namespace by a descriptor and not by its path, so that it can never reach another guest
/// than its own: once the slot is dismantled it reaches nobody.
#[derive(Debug, Clone)]
pub struct GuestConnector {
    namespace: NetworkNamespace,
    /// In tests without namespaces, who plays the guest.
    #[cfg(test)]
    played: Option<(super::stand_in::Guests, SlotNumber)>,
}

impl GuestConnector {
    /// A connection to a port of the guest.
    ///
    /// Only the socket is made in the namespace, and it stays there; what is done with it is ordinary.
    ///
    /// # Errors
    /// As for every connection; `TimedOut` after ten seconds.
    pub async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        #[cfg(test)]
        if let Some((guests, number)) = &self.played {
            return guests.connect(*number);
        }
        let attempt = async {
            let socket = self.namespace.run(TcpSocket::new_v4).await??;
            // What goes through here is small questions and answers as often as it is files.
            socket.set_nodelay(true)?;
            socket.connect((GUEST, port).into()).await
        };
        timeout(CONNECT_BOUND, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
