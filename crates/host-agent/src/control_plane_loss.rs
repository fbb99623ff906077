//! What becomes of running sandboxes when nobody commands their host any more.
//!
//! A control plane is there for as long as it watches: a *session* is an open stream of `WatchSandboxes`. There may be
//! several. With none for the bound, the control plane is lost, which is so once per absence:
//!
//! ```text
//!        first session                no session left          nobody for the bound
//!  alone ────────────► accompanied ──────────────────► alone ──────────────────────► lost: policy done, report kept
//!    │                      ▲                            │                              │
//!    │ nobody for the bound └──────── a session ─────────┴──────────────────────────────┘ each session is told
//!    └───────► lost
//! ```
//!
//! [`Presence`] decides, without any waiting. [`watch_over`] waits and acts. With the policy `keep`, sandboxes go on and
//! only the report is made. With `pause`, all that run are paused, a few at a time; one whose pause fails goes on, and
//! the report says so. A control plane that comes back meanwhile ends that: what has not been begun then is left as it is.
//!
//! What is paused is durable at once, as with every pause. The report lives as long as the agent.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::StreamExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use wrenn_types::SandboxId;

use crate::{
    config::OnControlPlaneLoss,
    registry::Registry,
    sandbox::{Handle, RequestError, Stage, driver::chain, queue::Verb},
    snapshots::Extent,
};

/// How many sandboxes are paused at once.
const AT_ONCE: usize = 4;
/// How long the pause of one may take until it is reported as not done; it goes on.
const PAUSE_BOUND: Duration = Duration::from_secs(300);

/// How many sessions are open, and how many there ever were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count {
    open: usize,
    ever: u64,
}

/// The sessions of control planes, and what they are told of the time without them. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    count: watch::Sender<Count>,
    report: watch::Sender<Option<Arc<Report>>>,
}

impl Sessions {
    /// A session that lasts until it is dropped.
    #[must_use]
    pub fn open(&self) -> Session {
        self.count.send_modify(|count| {
            count.open += 1;
            count.ever += 1;
        });
        Session { count: self.count.clone() }
    }

    /// The last report, to be read now and waited for.
    #[must_use]
    pub fn reports(&self) -> watch::Receiver<Option<Arc<Report>>> {
        self.report.subscribe()
    }
}

/// Somebody watches.
#[derive(Debug)]
pub struct Session {
    count: watch::Sender<Count>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.count.send_modify(|count| count.open -= 1);
    }
}

/// What happened while no control plane was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Since when there was none.
    pub away_since: SystemTime,
    /// When it was called lost.
    pub lost_at: SystemTime,
    /// What was to be done.
    pub policy: OnControlPlaneLoss,
    /// How many sandboxes had a machine then.
    pub running: usize,
    /// Those that were paused for it.
    pub paused: Vec<SandboxId>,
    /// Those that go on because their pause failed, and why it did.
    pub failed: Vec<(SandboxId, String)>,
}

/// Decides when a control plane is lost. Time comes from outside.
#[derive(Debug)]
struct Presence {
    bound: Duration,
    seen: Count,
    /// Since when nobody has been there, if nobody is.
    alone_since: Option<Instant>,
    /// Whether this absence has been called a loss.
    called: bool,
}

impl Presence {
    fn new(bound: Duration, now: Instant) -> Self {
        Self { bound, seen: Count::default(), alone_since: Some(now), called: false }
    }

    /// Takes note of who is there. One who came and went since the last look was there.
    fn observe(&mut self, count: Count, now: Instant) {
        let left = self.seen.open > 0 && count.open == 0;
        if count.ever != self.seen.ever || left {
            self.alone_since = Some(now);
            self.called = false;
        }
        if count.open > 0 {
            self.alone_since = None;
        }
        self.seen = count;
    }

    /// When it will be lost if nobody comes.
    fn due(&self) -> Option<Instant> {
        self.alone_since.filter(|_| !self.called).map(|since| since + self.bound)
    }

    /// Since when nobody has been there, if that is a loss of which nothing has been said yet.
    fn lost(&mut self, now: Instant) -> Option<Instant> {
        let lost = self.due().is_some_and(|due| due <= now);
        self.called |= lost;
        self.alone_since.filter(|_| lost)
    }
}

/// Watches over the sessions, for as long as the agent lives, and does what is to be done at a loss.
pub async fn watch_over(
    registry: Arc<Registry>,
    sessions: Sessions,
    policy: OnControlPlaneLoss,
    bound: Duration,
) {
    let mut count = sessions.count.subscribe();
    let mut presence = Presence::new(bound, Instant::now());
    loop {
        presence.observe(*count.borrow_and_update(), Instant::now());
        if let Some(since) = presence.lost(Instant::now()) {
            let report = act(&registry, &mut count, policy, since.elapsed()).await;
            sessions.report.send_replace(Some(Arc::new(report)));
            continue;
        }
        let due = async {
            match presence.due() {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The sender is ours.
            _ = count.changed() => {}
            () = due => {}
        }
    }
}

/// Does what is to be done, and says what has been.
async fn act(
    registry: &Registry,
    count: &mut watch::Receiver<Count>,
    policy: OnControlPlaneLoss,
    away: Duration,
) -> Report {
    let lost_at = SystemTime::now();
    let is_up = |handle: &Handle| !matches!(handle.stage(), Stage::Paused | Stage::Stopping | Stage::Stopped);
    let up: Vec<Handle> = registry.all().into_iter().filter(is_up).collect();
    let mut report = Report {
        away_since: lost_at.checked_sub(away).unwrap_or(lost_at),
        lost_at,
        policy,
        running: up.len(),
        paused: Vec::new(),
        failed: Vec::new(),
    };
    tracing::warn!(?away, running = up.len(), ?policy, "no control plane has been there for its bound");
    if policy == OnControlPlaneLoss::Pause {
        let is_back = || count.borrow().open > 0;
        let pauses = futures::stream::iter(up).take_while(|_| std::future::ready(!is_back()));
        let mut pauses = pauses.map(pause).buffer_unordered(AT_ONCE);
        while let Some((id, outcome)) = pauses.next().await {
            match outcome {
                Some(Ok(())) => report.paused.push(id),
                Some(Err(why)) => {
                    tracing::warn!(%id, why, "a sandbox could not be paused; it runs");
                    report.failed.push((id, why));
                }
                None => {}
            }
        }
        tracing::warn!(
            paused = report.paused.len(),
            failed = report.failed.len(),
            "paused what nobody commands"
        );
    }
    report
}

/// Pauses one; nothing is said of one that has ended meanwhile.
async fn pause(handle: Handle) -> (SandboxId, Option<Result<(), String>>) {
    let id = handle.spec().id.clone();
    // The agent's own request has no generation, so that it cannot be denied for it.
    let outcome = match timeout(PAUSE_BOUND, handle.request(Verb::Pause(Extent::Machine), None)).await {
        Ok(Ok(_)) => Some(Ok(())),
        Ok(Err(_)) if matches!(handle.stage(), Stage::Stopping | Stage::Stopped) => None,
        Ok(Err(RequestError::Failed(error))) => Some(Err(chain(error.as_ref()))),
        Ok(Err(error @ RequestError::Denied(_))) => Some(Err(chain(&error))),
        Err(_) => Some(Err(format!("it was not paused within {PAUSE_BOUND:?}"))),
    };
    (id, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUND: Duration = Duration::from_secs(10);

    fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn an_absence_is_called_a_loss_once() {
        let start = Instant::now();
        let mut presence = Presence::new(BOUND, start);
        assert_eq!(presence.due(), Some(start + BOUND), "an agent that begins alone is alone");
        presence.observe(Count { open: 1, ever: 1 }, start + seconds(3));
        assert_eq!((presence.due(), presence.lost(start + seconds(99))), (None, None));
        presence.observe(Count { open: 0, ever: 1 }, start + seconds(100));
        assert_eq!(presence.lost(start + seconds(109)), None);
        assert_eq!(presence.lost(start + seconds(110)), Some(start + seconds(100)));
        assert_eq!((presence.lost(start + seconds(200)), presence.due()), (None, None), "said once");
        // Who came and went between two looks was there.
        presence.observe(Count { open: 0, ever: 2 }, start + seconds(300));
        assert_eq!(presence.due(), Some(start + seconds(310)));
    }

    #[test]
    fn sessions_are_counted() {
        let sessions = Sessions::default();
        let (one, other) = (sessions.open(), sessions.clone().open());
        drop(one);
        assert_eq!(*sessions.count.borrow(), Count { open: 1, ever: 2 });
        drop(other);
        assert_eq!(*sessions.count.borrow(), Count { open: 0, ever: 2 });
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Open,
        Close,
        Wait(u64),
    }

    proptest! {
        /// A loss is called if and only if nobody has been there for the bound, once for each such time, and never
        /// while somebody is.
        #[test]
        fn a_loss_is_an_absence_of_the_bound(
            steps in prop::collection::vec(
                prop_oneof![Just(Step::Open), Just(Step::Close), (0_u64..15).prop_map(Step::Wait)],
                0..60,
            ),
            looks in prop::collection::vec(prop::bool::ANY, 60),
        ) {
            let start = Instant::now();
            let mut presence = Presence::new(BOUND, start);
            let (mut count, mut now) = (Count::default(), start);
            // The model: since when nobody is there, and whether that was called a loss.
            let (mut alone, mut called) = (Some(start), false);
            for (step, look) in steps.into_iter().zip(looks) {
                match step {
                    Step::Open => {
                        count = Count { open: count.open + 1, ever: count.ever + 1 };
                        (alone, called) = (None, false);
                    }
                    Step::Close if count.open > 0 => {
                        count.open -= 1;
                        if count.open == 0 {
                            alone = Some(now);
                        }
                    }
                    Step::Close => {}
                    Step::Wait(number) => {
                        // Time passes only after what happened has been seen: the task is woken by it.
                        presence.observe(count, now);
                        now += seconds(number);
                    }
                }
                if look {
                    presence.observe(count, now);
                    let lost = presence.lost(now);
                    let expected = alone.filter(|since| !called && now - *since >= BOUND);
                    prop_assert_eq!(lost, expected);
                    called |= lost.is_some();
                    prop_assert!(count.open == 0 || presence.due().is_none());
                }
            }
        }
    }
}
