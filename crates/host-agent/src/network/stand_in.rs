//! Slots that are nothing but numbers, for tests that need many of them and no packets.
//!
//! The keeper is another one; the slots that it gives out are the real type, and so is what is asked of it. A
//! number is given out once, so that nobody who still knows an old one reaches the guest of another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use camino::Utf8PathBuf;
use tokio::{net::TcpStream, sync::mpsc};
use wrenn_host_linux::{lock::FileLock, netns::NetworkNamespace};
use wrenn_types::InstanceId;

use super::{
    Policy, Slot, SlotError, SlotPool, Uplink,
    addresses::SlotNumber,
    lease::Lease,
    making::Prepared,
    pool::{Request, SlotCounts},
    uplink::OpenUplink,
};

type Connect = dyn Fn(SlotNumber) -> io::Result<TcpStream> + Send + Sync;

/// Who plays the guests: a connection to the one behind a number, and what that may reach.
#[derive(Clone)]
pub(crate) struct Guests {
    connect: Arc<Connect>,
    policies: Policies,
}

/// What is in force, by number.
pub(crate) type Policies = Arc<Mutex<BTreeMap<SlotNumber, Policy>>>;

impl Guests {
    pub(crate) fn new(connect: impl Fn(SlotNumber) -> io::Result<TcpStream> + Send + Sync + 'static) -> Self {
        Self { connect: Arc::new(connect), policies: Policies::default() }
    }

    /// What is in force, now and later.
    pub(crate) fn policies(&self) -> Policies {
        Arc::clone(&self.policies)
    }

    pub(super) fn put_in_force(&self, number: SlotNumber, policy: &Policy) {
        self.policies.lock().unwrap_or_else(PoisonError::into_inner).insert(number, policy.clone());
    }

    pub(super) fn connect(&self, number: SlotNumber) -> io::Result<TcpStream> {
        (self.connect)(number)
    }
}

impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guests")
    }
}

/// The numbers of one instance. It outlives the pools of its agents, as the machine does.
#[derive(Debug, Clone)]
pub(crate) struct Numbers {
    directory: Utf8PathBuf,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    last: u16,
    given: BTreeSet<SlotNumber>,
    refuse: bool,
}

impl Numbers {
    /// No number is given out. The leases are in `directory`.
    pub(crate) fn new(directory: Utf8PathBuf) -> Self {
        Self { directory, inner: Arc::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers that are in somebody's hands.
    pub(crate) fn given(&self) -> BTreeSet<SlotNumber> {
        self.inner().given.clone()
    }

    /// Whether there is none for whoever asks.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.inner().refuse = refuse;
    }

    /// Takes back what the records of an agent that died do not name, as a collection would.
    pub(crate) fn keep(&self, numbers: &BTreeSet<SlotNumber>) {
        self.inner().given.retain(|number| numbers.contains(number));
    }

    fn take(&self) -> Result<SlotNumber, SlotError> {
        let mut inner = self.inner();
        if inner.refuse {
            return Err(SlotError::Exhausted);
        }
        inner.last += 1;
        let number = SlotNumber::new(inner.last).map_err(|_| SlotError::Exhausted)?;
        inner.given.insert(number);
        Ok(number)
    }

    fn lock(&self, number: SlotNumber) -> Result<FileLock, SlotError> {
        let path = self.directory.join(number.to_string());
        let acquired = FileLock::try_acquire(path.as_std_path());
        acquired.map_err(|source| SlotError::Lease { number, source })?.ok_or(SlotError::Held(number))
    }
}

impl SlotPool {
    /// A pool that gives out `numbers`, behind which `guests` are. `going_on` is asked before each request is
    /// served; one that is not to be served never is.
    pub(crate) async fn stand_in(
        instance: &InstanceId,
        numbers: Numbers,
        guests: Guests,
        policy: Policy,
        going_on: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Self, SlotError> {
        let uplink = OpenUplink::open(instance, &Uplink::Host).await.map_err(SlotError::Uplink)?;
        let (requests, mut incoming) = mpsc::unbounded_channel();
        let pool = requests.downgrade();
        let uplink = Arc::new(uplink);
        tokio::spawn(async move {
            while let Some(request) = incoming.recv().await {
                let Some(pool) = pool.upgrade() else { return };
                if !going_on() {
                    std::future::pending::<()>().await;
                }
                let slot = |number, lock: Result<FileLock, SlotError>, policy: &Policy| {
                    let (lease, namespace) = (Lease::found(number, lock?), NetworkNamespace::current()?);
                    let mut prepared =
                        Prepared::new(lease, namespace, Some(policy.clone()), Arc::clone(&uplink));
                    guests.put_in_force(number, policy);
                    prepared.played = Some(guests.clone());
                    Ok(Slot::new(prepared, pool.clone()))
                };
                match request {
                    Request::Take { slot: caller } => {
                        let taken =
                            numbers.take().and_then(|number| slot(number, numbers.lock(number), &policy));
                        // A slot that nobody waits for any more comes back by its drop.
                        drop(caller.send(taken));
                    }
                    Request::Adopt { number, policy, slot: caller } => {
                        // The lock is its machine's; this one stands for having no part of it.
                        let aside = numbers.directory.join(format!("adopted-{number}"));
                        let lock = FileLock::try_acquire(aside.as_std_path())
                            .map_err(|source| SlotError::Lease { number, source })
                            .and_then(|lock| lock.ok_or(SlotError::InUse(number)));
                        drop(caller.send(slot(number, lock, &policy)));
                    }
                    Request::Return { prepared, done } => {
                        numbers.inner().given.remove(&prepared.lease.number());
                        drop(prepared);
                        if let Some(done) = done {
                            let _ = done.send(());
                        }
                    }
                    Request::Count { counts } => {
                        let _ = counts.send(SlotCounts { used: numbers.given().len(), ready: 0 });
                    }
                    Request::Shutdown { done } => {
                        let _ = done.send(numbers.given().len());
                    }
                }
            }
        });
        Ok(Self { requests })
    }
}
