//! One sandbox.
//!
//! ```text
//!              create                       pause                        resume
//!  (nothing) ─────────► starting ─► running ─────► pausing ─► paused ─────────► resuming ─► running
//!                          │         │  ▲  snapshot  │          ▲                  │
//!                          │         ▼  │            └─ fails ─► running           │
//!                          │     snapshotting                   └────── fails ─────┘
//!                          ▼
//!                       stopping ─► stopped     destroy, a clock that ran out, the machine's own end: from anywhere
//! ```
//!
//! One task, the *driver* ([`driver`]), owns the sandbox and is the only one that changes it. Others hold a
//! [`Handle`]: they put requests into its queue ([`queue`], a pure policy), read its published [`Status`],
//! open connections to its guest and move its inactivity clock ([`activity`]). A stopped sandbox stays
//! known for a while, so that whoever asks late learns why it ended.
//!
//! What the driver does is made of two things: [`bring_up`] makes a machine from a template or a snapshot,
//! [`capture`] makes a snapshot of a machine. Every other verb is an order of these. What a new agent needs to
//! take the sandbox over is in its [`record`]. The tests of this module drive all of it against a model.

pub mod activity;
pub mod bring_up;
pub mod capture;
pub mod deadline;
pub mod driver;
pub mod host;
mod keeping;
pub mod machine;
pub mod queue;
pub mod record;
pub mod regain;
pub mod source;
#[cfg(test)]
mod tests;
pub(crate) mod within;

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot, watch};
pub(crate) use wrenn_types::bounds;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, InactivityTimeout, NetworkPolicy, SandboxId, Shape, SnapshotId,
    TemplateName, TimeoutAction,
};

use self::{
    activity::Activity,
    bring_up::BringUpError,
    driver::OperationError,
    queue::{Denied, RequestQueue, Verb},
    record::Ledger,
};
use crate::{
    guest::{
        ENVD_PORT, IdleConnection,
        loopback::{self, GuestStream},
    },
    network::{GuestConnector, addresses::SlotNumber},
};

/// What a sandbox is to be: a create request, parsed and within its bounds.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// Its id, given by the control plane.
    pub id: SandboxId,
    /// The control plane's generation: requests of an older one are refused.
    pub generation: u64,
    /// The name by which the template was asked for; it may be an alias.
    pub template: TemplateName,
    /// CPUs and memory.
    pub shape: Shape,
    /// Size of the root disk.
    pub disk: DiskMib,
    /// What its guest asks of every caller.
    pub access_token: AccessToken,
    /// Environment of every process in it.
    pub environment: BTreeMap<String, String>,
    /// Instead of the template's default user.
    pub default_user: Option<String>,
    /// Instead of the template's default directory.
    pub default_workdir: Option<String>,
    /// What it starts from instead of the template: then template and shape are those of this.
    pub snapshot: Option<SnapshotId>,
    /// What can be changed later.
    pub settings: Settings,
}

/// What of a sandbox can be changed while it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How long it may be idle.
    pub timeout: InactivityTimeout,
    /// What becomes of it then.
    pub on_timeout: TimeoutAction,
    /// A moment that activity does not move.
    pub deadline: Option<Deadline>,
    /// What it may reach.
    pub network: NetworkPolicy,
}

/// A moment, and what becomes of a sandbox then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// When.
    pub at: jiff::Timestamp,
    /// What.
    pub action: TimeoutAction,
}

/// A change of [`Settings`]; what is none stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Update {
    /// How long it may be idle.
    pub timeout: Option<InactivityTimeout>,
    /// What becomes of it then.
    pub on_timeout: Option<TimeoutAction>,
    /// The deadline, or that there is none.
    pub deadline: Option<Option<Deadline>>,
    /// What it may reach.
    pub network: Option<NetworkPolicy>,
}

impl Settings {
    /// These settings with a change.
    #[must_use]
    pub fn with(&self, update: &Update) -> Self {
        Self {
            timeout: update.timeout.unwrap_or(self.timeout),
            on_timeout: update.on_timeout.unwrap_or(self.on_timeout),
            deadline: update.deadline.unwrap_or(self.deadline),
            network: update.network.clone().unwrap_or_else(|| self.network.clone()),
        }
    }
}

/// Where it is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Being brought up.
    Starting,
    /// Its guest has taken its identity and answers.
    Running,
    /// Being saved; its machine ends after that.
    Pausing,
    /// Saved, with no machine.
    Paused,
    /// Being brought back from what was saved.
    Resuming,
    /// Being saved; it goes on after that.
    Snapshotting,
    /// Being taken down.
    Stopping,
    /// Gone, with everything that was made for it.
    Stopped,
}

impl Stage {
    /// All of them, in the order of a life.
    pub const ALL: [Self; 8] = [
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Snapshotting,
        Self::Stopping,
        Self::Stopped,
    ];

    /// Whether it is in a state in which it stays until somebody asks for another.
    #[must_use]
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Stopped)
    }

    /// Whether there is a machine whose guest can be spoken to, now or in a moment.
    #[must_use]
    pub fn has_guest(self) -> bool {
        matches!(self, Self::Running | Self::Snapshotting | Self::Pausing)
    }

    /// The public word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Snapshotting => "snapshotting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

/// Why and how a sandbox ended.
#[derive(Debug, Clone)]
pub struct End {
    /// The reason, in one word.
    pub reason: EndReason,
    /// One sentence for a person.
    pub message: String,
    /// The failed step, where the bring-up failed.
    pub error: Option<Arc<BringUpError>>,
}

/// One timed step of a bring-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The step.
    pub name: &'static str,
    /// Microseconds from the beginning of the bring-up.
    pub start_micros: u64,
    /// How long it took, in microseconds.
    pub duration_micros: u64,
}

/// What is published of a sandbox.
#[derive(Debug, Clone)]
pub struct Status {
    /// The stage, true when it is published.
    pub stage: Stage,
    /// The newest generation that was accepted when this was published.
    pub generation: u64,
    /// When it first began to run.
    pub started_at: Option<SystemTime>,
    /// The steps of its last bring-up.
    pub phases: Vec<Phase>,
    /// Which machine of its life this is: it goes up whenever another one takes its place.
    pub incarnation: u64,
    /// What holds now.
    pub settings: Settings,
    /// The moment of the last deadline at which it was paused, until it gets another one.
    pub deadline_met: Option<jiff::Timestamp>,
    /// Set after a pause at its deadline has failed: when it is tried again.
    pub deadline_again: Option<jiff::Timestamp>,
    /// Set while it is paused.
    pub paused: Option<PausedStatus>,
    /// Why the last thing that its own clocks asked for failed.
    pub last_failure: Option<String>,
    /// Set with [`Stage::Stopping`] and kept.
    pub end: Option<End>,
}

/// What is published of a paused sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PausedStatus {
    /// What it is saved as.
    pub snapshot: SnapshotId,
    /// Since when.
    pub at: SystemTime,
    /// What it takes of the host's disk.
    pub bytes: u64,
}

/// What an operation answers with.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It is so now.
    Done,
    /// It was saved, and stood still for so long.
    Saved {
        /// What was saved.
        snapshot: Box<crate::snapshots::Kept>,
        /// How long no process of it ran; nothing for one that was paused.
        stopped: std::time::Duration,
    },
}

/// Where the answer to a request goes.
pub type Reply = oneshot::Sender<Result<Outcome, Arc<OperationError>>>;

/// Why a request has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The queue denied it.
    #[error(transparent)]
    Denied(Denied),
    /// It was tried, and failed.
    #[error(transparent)]
    Failed(Arc<OperationError>),
}

/// What everyone but the driver has of a sandbox. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    inner: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: SandboxSpec,
    /// Owned by whoever holds the lock for the length of one call; the driver takes requests out.
    requests: Mutex<RequestQueue<Reply>>,
    /// Told after every change of `requests`.
    requested: Notify,
    status: watch::Receiver<Status>,
    activity: Activity,
    /// Put there and removed by the driver, with the machine that it leads to.
    guest: Mutex<Option<Guest>>,
}

/// The way into the machine that there is now.
#[derive(Debug)]
struct Guest {
    connector: GuestConnector,
    /// Taken by the first who connects to the guest's agent.
    idle: Option<IdleConnection>,
    footing: Footing,
}

/// What of the host a machine stands on: where what it uses is counted.
#[derive(Debug, Clone)]
pub struct Footing {
    /// Its VMM; none where it is no process.
    pub pid: Option<u32>,
    /// Its network slot.
    pub slot: SlotNumber,
    /// Its record, which tells of its disk.
    pub ledger: Arc<Ledger>,
}

impl Shared {
    fn requests(&self) -> MutexGuard<'_, RequestQueue<Reply>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// What it was made as.
    #[must_use]
    pub fn spec(&self) -> &SandboxSpec {
        &self.inner.spec
    }

    /// Its inactivity clock.
    #[must_use]
    pub fn activity(&self) -> &Activity {
        &self.inner.activity
    }

    /// What is published now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.inner.status.borrow().clone()
    }

    /// The stage that is published now.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.inner.status.borrow().stage
    }

    /// The publication itself, to wait for changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// The newest generation that was accepted.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.inner.requests().generation()
    }

    /// Whether a snapshot of this id is being made of it, or is to be made.
    #[must_use]
    pub fn makes(&self, snapshot: &SnapshotId) -> bool {
        self.inner.requests().makes(snapshot)
    }

    /// How connections to its guest are made, while it has one.
    #[must_use]
    pub fn connector(&self) -> Option<GuestConnector> {
        self.inner.guest().as_ref().map(|guest| guest.connector.clone())
    }

    /// What its machine stands on, while it has one that runs.
    #[must_use]
    pub fn footing(&self) -> Option<Footing> {
        self.inner.guest().as_ref().map(|guest| guest.footing.clone())
    }

    /// A connection to a port of its guest, while it has one: to the guest's agent the one on which it became
    /// itself, if nobody has had that yet.
    ///
    /// # Errors
    /// As [`loopback::connect`].
    pub async fn connect(&self, connector: &GuestConnector, port: u16) -> io::Result<GuestStream> {
        if port == ENVD_PORT {
            let idle = self.inner.guest().as_mut().and_then(|guest| guest.idle.take());
            if let Some(stream) = idle.and_then(IdleConnection::into_usable) {
                return Ok(stream.into());
            }
        }
        loopback::connect(connector, port).await
    }

    /// Asks for something and waits for its outcome. It goes on if nobody waits any more.
    ///
    /// # Errors
    /// The reason why the queue denies it, or what failed; the sandbox is then what it was before.
    pub async fn request(&self, verb: Verb, generation: Option<u64>) -> Result<Outcome, RequestError> {
        let (reply, outcome) = oneshot::channel();
        let verdict = self.inner.requests().put(verb, generation, reply);
        verdict.map_err(|(denied, _)| RequestError::Denied(denied))?;
        self.inner.requested.notify_one();
        match outcome.await {
            Ok(outcome) => outcome.map_err(RequestError::Failed),
            // The driver drops what it can not answer any more: that of a sandbox that ends.
            Err(_) => Err(RequestError::Denied(Denied::Ended)),
        }
    }

    /// Asks for the end; it overtakes everything. Wait for [`Self::stopped`].
    ///
    /// # Errors
    /// When the asker's generation is older.
    pub fn destroy(&self, reason: EndReason, generation: Option<u64>) -> Result<(), Denied> {
        // Whoever waits for what is moot now is told so by the drop.
        let moot = self.inner.requests().destroy(reason, generation)?;
        drop(moot);
        self.inner.requested.notify_one();
        Ok(())
    }

    /// Asks its driver to let go of it as it is, once what is under way is done: the agent is about to end.
    pub fn leave(&self) {
        drop(self.inner.requests().leave());
        self.inner.requested.notify_one();
    }

    /// Waits until the sandbox has come up or is gone, and answers what it then is.
    pub async fn settled(&self) -> Status {
        self.wait_for(|status| status.stage.is_settled()).await
    }

    /// Waits until its driver has begun. What it then does by itself, because a clock ran out meanwhile, is not
    /// waited for.
    pub async fn begun(&self) -> Status {
        self.wait_for(|status| status.stage != Stage::Starting).await
    }

    /// Waits until the sandbox and everything that was made for it is gone.
    pub async fn stopped(&self) -> Status {
        self.wait_for(|status| status.stage == Stage::Stopped).await
    }

    async fn wait_for(&self, is: impl FnMut(&Status) -> bool) -> Status {
        let mut watch = self.watch();
        // The sender is dropped only after the last publication, and that one is `Stopped`.
        let found = watch.wait_for(is).await.map(|status| status.clone());
        found.unwrap_or_else(|_| self.status())
    }
}
