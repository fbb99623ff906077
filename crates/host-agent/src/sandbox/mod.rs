//! One sandbox.
//!
//! ```text
//!              create                                     destroy (cancels the bring-up)
//!  (nothing) ─────────► starting ─────────────────────────────────────────┐
//!                          │  bring-up: disk, slot, machine, identity      │
//!                          ▼                                               ▼
//!                       running ── destroy · inactivity · VM exit ──► stopping ──► stopped
//! ```
//!
//! One task, the *driver* ([`driver`]), owns the sandbox and is the only one that changes it. Others hold a
//! [`Handle`]: they put requests into its queue ([`queue`], a pure policy), read its published [`Status`],
//! open connections to its guest and move its inactivity clock ([`activity`]). A stopped sandbox stays
//! known for a while, so that whoever asks late learns why it ended.

pub mod activity;
pub mod bring_up;
pub mod driver;
pub mod queue;
pub mod record;

use std::{collections::BTreeMap, io, sync::Arc, time::SystemTime};

use tokio::sync::{Notify, watch};
use wrenn_types::{AccessToken, DiskMib, EndReason, InactivityTimeout, SandboxId, Shape, TemplateName};

use self::{activity::Activity, bring_up::BringUpError, queue::RequestQueue};
use crate::{
    guest::{
        ENVD_PORT, IdleConnection,
        loopback::{self, GuestStream},
    },
    network::GuestConnector,
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
    /// How long it may be idle.
    pub timeout: InactivityTimeout,
    /// What its guest asks of every caller.
    pub access_token: AccessToken,
    /// Environment of every process in it.
    pub environment: BTreeMap<String, String>,
    /// Whether it may reach the internet.
    pub allow_internet_access: bool,
    /// Instead of the template's default user.
    pub default_user: Option<String>,
    /// Instead of the template's default directory.
    pub default_workdir: Option<String>,
}

/// Where it is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Being brought up.
    Starting,
    /// Its guest has taken its identity and answers.
    Running,
    /// Being taken down.
    Stopping,
    /// Gone, with everything that was made for it.
    Stopped,
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
    /// When it began to run.
    pub started_at: Option<SystemTime>,
    /// The steps of its bring-up so far.
    pub phases: Vec<Phase>,
    /// Set with [`Stage::Stopping`] and kept.
    pub end: Option<End>,
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
    requests: std::sync::Mutex<RequestQueue>,
    /// Told after every change of `requests`.
    requested: Notify,
    status: watch::Receiver<Status>,
    activity: Activity,
    /// Set by the driver once the slot is there.
    connector: std::sync::OnceLock<GuestConnector>,
    /// Put there and removed by the driver, taken by the first who connects to the guest's agent.
    idle: std::sync::Mutex<Option<IdleConnection>>,
}

impl Shared {
    fn set_idle(&self, idle: Option<IdleConnection>) {
        *self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = idle;
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

    /// The publication itself, to wait for changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// How connections to its guest are made, once it is running.
    #[must_use]
    pub fn connector(&self) -> Option<&GuestConnector> {
        (self.inner.status.borrow().stage == Stage::Running).then(|| self.inner.connector.get()).flatten()
    }

    /// A connection to a port of its guest, once it is running: to the guest's agent the one on which it became
    /// itself, if nobody has had that yet.
    ///
    /// # Errors
    /// As [`loopback::connect`].
    pub async fn connect(&self, connector: &GuestConnector, port: u16) -> io::Result<GuestStream> {
        if port == ENVD_PORT {
            let idle = self.inner.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            if let Some(stream) = idle.and_then(IdleConnection::into_usable) {
                return Ok(stream.into());
            }
        }
        loopback::connect(connector, port).await
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// The reason why the queue denies it.
    pub fn request(&self, request: queue::Request) -> Result<queue::Queued, queue::Denied> {
        let verdict =
            self.inner.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).put(request);
        self.inner.requested.notify_one();
        verdict
    }

    /// Waits until the sandbox has come up or is gone, and answers what it then is.
    pub async fn settled(&self) -> Status {
        self.wait_for(|status| matches!(status.stage, Stage::Running | Stage::Stopped)).await
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
