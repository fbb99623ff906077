//! A slot in a sandbox's hands.

use std::{io, os::fd::OwnedFd, time::Duration};

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
    ruleset,
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
        let namespace_path = prepared.number.namespace();
        Self { prepared: Some(prepared), namespace_path, pool }
    }

    #[expect(clippy::expect_used, reason = "only what consumes the slot takes it out")]
    fn prepared(&self) -> &Prepared {
        self.prepared.as_ref().expect("the slot is still held")
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> SlotNumber {
        self.prepared().number
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
    /// # Errors
    /// No descriptor is left.
    pub fn lock(&self) -> Result<OwnedFd, SlotError> {
        let prepared = self.prepared();
        prepared.lease.share().map_err(|source| SlotError::Lease { number: prepared.number, source })
    }

    /// How connections to the guest are made.
    #[must_use]
    pub fn connector(&self) -> GuestConnector {
        GuestConnector { namespace: self.prepared().namespace.clone() }
    }

    /// Puts a policy in force, before the guest runs or while it does. A policy that is in force already
    /// costs nothing; another one is one run of `nft`. What the new one forbids ends at once, open
    /// connections included.
    ///
    /// # Errors
    /// The policy cannot be, or the rules could not be loaded; then the former ones are in force.
    pub async fn apply(&mut self, policy: &Policy) -> Result<(), SlotError> {
        let Some(prepared) = self.prepared.as_mut() else { return Err(SlotError::Stopped) };
        if prepared.policy.as_ref() == Some(policy) {
            return Ok(());
        }
        policy.check().map_err(SlotError::Policy)?;
        let number = prepared.number;
        // If this future is dropped half-way, nobody knows which of the two it is.
        let former = prepared.policy.take();
        let rules = ruleset::change(former.as_ref(), policy);
        if rules.is_empty() {
            // The same servers in another order.
            prepared.policy = former;
            return Ok(());
        }
        match nft::load(&prepared.namespace, rules).await {
            Ok(()) => {
                prepared.policy = Some(policy.clone());
                Ok(())
            }
            Err(source) => {
                // A refused transaction changed nothing; one that was ended may have.
                if matches!(source, nft::NftError::Refused { .. } | nft::NftError::Missing) {
                    prepared.policy = former;
                }
                Err(SlotError::Rules { number, source })
            }
        }
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
}

impl GuestConnector {
    /// A connection to a port of the guest.
    ///
    /// Only the socket is made in the namespace, and it stays there; what is done with it is ordinary.
    ///
    /// # Errors
    /// As for every connection; `TimedOut` after ten seconds.
    pub async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let attempt = async {
            let socket = self.namespace.run(TcpSocket::new_v4).await??;
            // What goes through here is small questions and answers as often as it is files.
            socket.set_nodelay(true)?;
            socket.connect((GUEST, port).into()).await
        };
        timeout(CONNECT_BOUND, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
