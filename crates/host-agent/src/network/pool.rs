//! The slots that are made ahead of need.
//!
//! ```text
//!               take                                  release, or dropped
//!  making ───► ready ───► in a sandbox's hands ───────────────────────────► dismantled
//!     ▲          │                     ▲            │
//!     └──────────┘                     │            └─ left: it is there for the next agent
//!      fewer than the target:          └─ adopted, by its number, from an agent that died or left it
//!      more are made, a moment later
//! ```
//!
//! One task, the keeper, owns all of that. It waits for requests and for the tasks in which slots are made
//! and dismantled, and does nothing itself that takes time. What it makes next is decided by [`Stock`].
//!
//! After a take the keeper waits for [`HOLD_BACK`] before it replaces the slot, so that the create that
//! took it has the processor to itself; if somebody has to wait, it does not.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use wrenn_types::InstanceId;

use super::{
    addresses::SlotNumber,
    error::SlotError,
    lease::Leases,
    making::{self, Prepared},
    policy::Policy,
    slot::Slot,
    stock::Stock,
    uplink::{OpenUplink, Uplink},
};

/// How long a caller waits for a slot.
const TAKE_BOUND: Duration = Duration::from_secs(15);
/// How long after a take its slot is replaced.
const HOLD_BACK: Duration = Duration::from_millis(250);
/// How long after a failure the next slot is made that nobody waits for.
const RETRY: Duration = Duration::from_secs(1);
/// How many slots are dismantled at the same time.
const DISMANTLING: usize = 8;

/// How slots are made.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Whose they are.
    pub instance: InstanceId,
    /// Where they end.
    pub uplink: Uplink,
    /// How many are kept ready.
    pub ready: usize,
    /// The policy with which they are prepared: the one that most sandboxes ask for.
    pub policy: Policy,
}

/// The slots of one instance. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SlotPool {
    pub(super) requests: mpsc::UnboundedSender<Request>,
}

/// How many slots there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotCounts {
    /// In a sandbox's hands.
    pub used: usize,
    /// Made ahead.
    pub ready: usize,
}

/// What the keeper is asked for.
#[derive(Debug)]
pub(super) enum Request {
    Take { slot: oneshot::Sender<Result<Slot, SlotError>> },
    Adopt { number: SlotNumber, policy: Policy, slot: oneshot::Sender<Result<Slot, SlotError>> },
    Return { prepared: Prepared, done: Option<oneshot::Sender<()>> },
    Count { counts: oneshot::Sender<SlotCounts> },
    Shutdown { done: oneshot::Sender<usize> },
}

impl SlotPool {
    /// Puts the uplink's rules in force and begins to make slots in the background. What an earlier life
    /// of the instance left behind is collected before this, see `network::collect`.
    ///
    /// # Errors
    /// The uplink cannot be used.
    pub async fn start(config: PoolConfig) -> Result<Self, SlotError> {
        let uplink = OpenUplink::open(&config.instance, &config.uplink).await.map_err(SlotError::Uplink)?;
        uplink.prepare().await.map_err(SlotError::Uplink)?;
        let (requests, incoming) = mpsc::unbounded_channel();
        let keeper = Keeper {
            uplink: Arc::new(uplink),
            leases: Arc::new(Leases::default()),
            policy: config.policy,
            target: config.ready,
            // Weak, so that the keeper ends when everybody else has let go.
            requests: requests.downgrade(),
            next: SlotNumber::FIRST,
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            making: JoinSet::new(),
            adopting: JoinSet::new(),
            dismantling: JoinSet::new(),
            permits: Arc::new(Semaphore::new(DISMANTLING)),
            given: 0,
            // An agent that follows another has sandboxes to take over first.
            refill_at: Some(Instant::now() + HOLD_BACK),
            stopping: Vec::new(),
            stopped: false,
        };
        tokio::spawn(keeper.run(incoming));
        Ok(Self { requests })
    }

    /// A slot with the pool's policy in force: a prepared one, or one that is made now.
    ///
    /// May be dropped at any moment: the slot that was on its way is then the next one's, or dismantled.
    ///
    /// # Errors
    /// None could be made, or not in time.
    pub async fn take(&self) -> Result<Slot, SlotError> {
        let (slot, taken) = oneshot::channel();
        self.requests.send(Request::Take { slot }).map_err(|_| SlotError::Stopped)?;
        match timeout(TAKE_BOUND, taken).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(SlotError::Stopped),
            Err(_) => Err(SlotError::TimedOut(TAKE_BOUND)),
        }
    }

    /// Takes over a slot of an earlier agent of this instance, by the number that was recorded, while its VMM
    /// lives and holds the lock. Its rules are replaced in one transaction and nothing that the policy allows
    /// is interrupted. From then on it is a slot as any other: the pool gives its number to nobody else, and
    /// it can be changed, released and left.
    ///
    /// Call it after `network::collect`, which leaves such a slot alone.
    ///
    /// # Errors
    /// The number is in use here ([`SlotError::InUse`]) or is not this instance's ([`SlotError::NotOurs`]),
    /// or the slot could not be changed. It is left alone then, and may be adopted again.
    pub async fn adopt(&self, number: SlotNumber, policy: &Policy) -> Result<Slot, SlotError> {
        let (slot, adopted) = oneshot::channel();
        let request = Request::Adopt { number, policy: policy.clone(), slot };
        self.requests.send(request).map_err(|_| SlotError::Stopped)?;
        // Each of its steps has its own bound.
        adopted.await.unwrap_or(Err(SlotError::Stopped))
    }

    /// Dismantles a slot whose VMM has ended. When this answers, nothing of it is left; what could not be
    /// removed is in the log, and its number is cleared before it is used again.
    pub async fn release(&self, slot: Slot) {
        let Some(prepared) = slot.into_prepared() else { return };
        let (done, released) = oneshot::channel();
        // Where the keeper is gone, the lease is dropped with the request, and the next start collects.
        if self.requests.send(Request::Return { prepared, done: Some(done) }).is_ok() {
            let _ = released.await;
        }
    }

    /// How many slots there are; nothing once the pool is gone.
    pub async fn counts(&self) -> Option<SlotCounts> {
        let (counts, counted) = oneshot::channel();
        self.requests.send(Request::Count { counts }).ok()?;
        counted.await.ok()
    }

    /// Dismantles all slots that nobody has, and removes the uplink's rules if no slot is left. Answers how
    /// many are still in somebody's hands: theirs are the rules that stay.
    pub async fn shutdown(&self) -> usize {
        let (done, stopped) = oneshot::channel();
        if self.requests.send(Request::Shutdown { done }).is_err() {
            return 0;
        }
        stopped.await.unwrap_or(0)
    }
}

/// An adoption that came to its end, and who waits for it.
type Adoption = (Result<Prepared, SlotError>, oneshot::Sender<Result<Slot, SlotError>>);

#[derive(Debug)]
struct Keeper {
    uplink: Arc<OpenUplink>,
    leases: Arc<Leases>,
    policy: Policy,
    target: usize,
    requests: mpsc::WeakUnboundedSender<Request>,
    /// Where to look for the next free number. It goes round, so that a number rests after its use.
    next: SlotNumber,
    ready: VecDeque<Prepared>,
    waiting: VecDeque<oneshot::Sender<Result<Slot, SlotError>>>,
    making: JoinSet<Result<Prepared, SlotError>>,
    adopting: JoinSet<Adoption>,
    dismantling: JoinSet<()>,
    permits: Arc<Semaphore>,
    /// How many are in somebody's hands, or were left there.
    given: usize,
    /// When to make what nobody waits for; none while there is enough of it.
    refill_at: Option<Instant>,
    /// Who wants to know that everything is gone. With the first of them, nothing more is made.
    stopping: Vec<oneshot::Sender<usize>>,
    stopped: bool,
}

impl Keeper {
    async fn run(mut self, mut incoming: mpsc::UnboundedReceiver<Request>) {
        loop {
            self.make_what_is_missing();
            if self.stopped
                && self.making.is_empty()
                && self.adopting.is_empty()
                && self.dismantling.is_empty()
            {
                self.finish_stop().await;
            }
            // When it is due already, whatever is being made has to be finished first.
            let due = self.refill_at.filter(|at| Instant::now() < *at && !self.stopped);
            let refill = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                request = incoming.recv() => match request {
                    Some(request) => self.serve(request),
                    // Nobody can ask for anything any more, and no slot is in anybody's hands.
                    None => break,
                },
                Some(made) = self.making.join_next() => self.made(made),
                Some(adopted) = self.adopting.join_next() => self.adopted(adopted),
                Some(_) = self.dismantling.join_next() => {}
                () = refill => {}
            }
        }
        self.stop();
        while let Some(made) = self.making.join_next().await {
            self.made(made);
        }
        while let Some(adopted) = self.adopting.join_next().await {
            self.adopted(adopted);
        }
        while self.dismantling.join_next().await.is_some() {}
        self.finish_stop().await;
    }

    fn serve(&mut self, request: Request) {
        match request {
            Request::Take { slot } if self.stopped => {
                let _ = slot.send(Err(SlotError::Stopped));
            }
            Request::Take { slot } => {
                self.waiting.push_back(slot);
                self.hand_out();
            }
            Request::Adopt { slot, .. } if self.stopped => {
                let _ = slot.send(Err(SlotError::Stopped));
            }
            Request::Adopt { number, policy, slot } => {
                let (uplink, leases) = (Arc::clone(&self.uplink), Arc::clone(&self.leases));
                self.adopting
                    .spawn(async move { (making::adopt(uplink, leases, number, policy).await, slot) });
            }
            Request::Return { prepared, done } => {
                self.given -= 1;
                self.dismantle(prepared, done);
            }
            Request::Count { counts } => {
                let _ = counts.send(SlotCounts { used: self.given, ready: self.ready.len() });
            }
            Request::Shutdown { done } => {
                self.stopping.push(done);
                self.stop();
            }
        }
    }

    fn hand_out(&mut self) {
        while !self.waiting.is_empty() {
            let Some(prepared) = self.ready.pop_front() else { return };
            let (Some(caller), Some(requests)) = (self.waiting.pop_front(), self.requests.upgrade()) else {
                self.ready.push_front(prepared);
                return;
            };
            self.given += 1;
            if let Err(Ok(slot)) = caller.send(Ok(Slot::new(prepared, requests))) {
                // The caller has gone away. Nobody has touched the slot.
                self.given -= 1;
                self.ready.extend(slot.into_prepared());
            }
        }
    }

    fn make_what_is_missing(&mut self) {
        if self.stopped {
            return;
        }
        // Callers that have gone away need none.
        self.waiting.retain(|caller| !caller.is_closed());
        let stock = Stock {
            ready: self.ready.len(),
            making: self.making.len(),
            waiting: self.waiting.len(),
            target: self.target,
        };
        let now = Instant::now();
        let hold_back = self.refill_at.is_none_or(|at| now < at);
        for _ in 0..stock.to_make(hold_back) {
            let from = self.next;
            self.next = from.next();
            let (uplink, leases) = (Arc::clone(&self.uplink), Arc::clone(&self.leases));
            self.making.spawn(making::make(uplink, leases, from, self.policy.clone()));
        }
        if !stock.is_low() {
            self.refill_at = None;
        } else if self.refill_at.is_none() {
            self.refill_at = Some(now + HOLD_BACK);
        }
        // Otherwise it stays due, and every slot that is finished makes room for the next one.
    }

    fn made(&mut self, made: Result<Result<Prepared, SlotError>, tokio::task::JoinError>) {
        match made {
            Ok(Ok(prepared)) if self.stopped => self.dismantle(prepared, None),
            Ok(Ok(prepared)) => {
                self.ready.push_back(prepared);
                self.hand_out();
            }
            Ok(Err(error)) => {
                self.refill_at = Some(Instant::now() + RETRY);
                match self.waiting.pop_front() {
                    Some(caller) => {
                        let _ = caller.send(Err(error));
                    }
                    None => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(
                            error,
                            "no network slot could be made; the next attempt is in {RETRY:?}"
                        );
                    }
                }
            }
            Err(panic) => tracing::error!(error = &panic as &dyn std::error::Error, "making a slot panicked"),
        }
    }

    fn adopted(&mut self, adopted: Result<Adoption, tokio::task::JoinError>) {
        let (outcome, caller) = match adopted {
            Ok(adoption) => adoption,
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "adopting a slot panicked");
                return;
            }
        };
        let slot = outcome.and_then(|prepared| {
            let requests = self.requests.upgrade().ok_or(SlotError::Stopped)?;
            Ok(Slot::new(prepared, requests))
        });
        let adopted = usize::from(slot.is_ok());
        self.given += adopted;
        if let Err(Ok(slot)) = caller.send(slot) {
            // Nobody wants it any more; its VMM lives all the same.
            self.given -= adopted;
            slot.leave();
        }
    }

    fn dismantle(&mut self, prepared: Prepared, done: Option<oneshot::Sender<()>>) {
        let permits = Arc::clone(&self.permits);
        self.dismantling.spawn(async move {
            // The semaphore is never closed.
            let _permit = permits.acquire().await;
            let number = prepared.lease.number();
            if let Err(error) = prepared.dismantle().await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(slot = %number, error, "a slot could not be dismantled; it is cleared before its next use");
            }
            if let Some(done) = done {
                let _ = done.send(());
            }
        });
    }

    fn stop(&mut self) {
        self.stopped = true;
        for caller in self.waiting.drain(..) {
            let _ = caller.send(Err(SlotError::Stopped));
        }
        for prepared in std::mem::take(&mut self.ready) {
            self.dismantle(prepared, None);
        }
    }

    /// All that nobody has is gone; so are the rules, unless somebody still has a slot that needs them.
    async fn finish_stop(&mut self) {
        if self.stopping.is_empty() && self.given > 0 {
            return;
        }
        if self.given == 0
            && let Err(error) = self.uplink.withdraw().await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the uplink's rules could not be removed; the next start replaces them");
        }
        for done in self.stopping.drain(..) {
            let _ = done.send(self.given);
        }
    }
}
