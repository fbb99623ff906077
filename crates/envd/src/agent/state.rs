//! What the agent knows: who it is, whether it may serve, and which processes it runs.
//!
//! ```text
//!            /init fails                       /init succeeds
//!   closed ─────────────► closed (says why) ─────────────────► open ──┐
//!     ▲  starts here in a virtual machine                      ▲ ▲    │ /init, with the current token
//!     │                                                        │ └────┘
//!     │                    /init succeeds                      │   │ /freeze, /unfreeze: frozen, and back
//!     │ /init fails  ┌─────────────────────────────────────────┘   │
//!     └───────── prepared ◄────────────────────────────────────────┘ /snapshot/prepare
//! ```
//!
//! A guest that is not open answers `/health` and what the host asks, and nothing else: what a snapshot wakes up with
//! is the identity and the randomness of every other clone, and no instruction of a user may run on that. Outside a
//! virtual machine there is nothing to restore, so the agent starts open.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{sync::Semaphore, time::Instant};

use super::{
    auth::Token,
    callers::Callers,
    freezer::{FreezeError, Freezer, Scope},
    handover::Handover,
    loopback::Streams,
    metrics::Meter,
    process::{Registry, Starts},
    tasks,
    threads::Threads,
};

/// Where the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a virtual machine that is its own: it may set the clock and all else.
    Guest,
    /// Beside other programs, for tests and for clients in debug mode: it leaves the machine alone.
    Outside,
}

/// Whether requests of users are served, and their processes run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// Stopped by `/freeze`, until `/unfreeze`.
    Frozen,
    /// Stopped by `/snapshot/prepare`, until an `/init` succeeds.
    Prepared,
    /// Until an `/init` succeeds. The reason is for the host, which alone reaches the agent.
    Closed(String),
}

impl Gate {
    /// What a request of a user is told, if it is not served.
    pub(crate) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Open => None,
            Self::Frozen => Some("this guest is frozen"),
            Self::Prepared => Some("this guest is prepared for a snapshot"),
            Self::Closed(reason) => Some(reason),
        }
    }
}

/// Who this guest is. Replaced as a whole by each `/init`, so that a request sees one or the other.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) gate: Gate,
    pub(crate) token: Option<Token>,
    /// The environment of every process.
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) default_user: String,
    pub(crate) default_directory: Option<String>,
}

/// The cgroup in which the processes of users are born.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directory: OwnedFd,
    freezer: Freezer,
}

impl Cgroup {
    /// Opens the cgroup of this directory.
    pub(crate) fn open(directory: PathBuf, place: Place) -> io::Result<Self> {
        let scope = match place {
            Place::Guest => Scope::Machine,
            Place::Outside => Scope::Cgroup,
        };
        Ok(Self { directory: fs::File::open(&directory)?.into(), freezer: Freezer::new(directory, scope) })
    }
}

/// The agent. One exists; every request holds it.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) place: Place,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    pub(crate) processes: Arc<Registry>,
    /// The cgroup in which processes of users are born, if there is one.
    pub(crate) cgroup: Option<Arc<OwnedFd>>,
    /// Held by the one call that changes who the guest is, or stops it.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// Held by the one thread that puts the file systems in order.
    pub(crate) settling: Arc<Semaphore>,
    /// The threads on which processes start.
    pub(crate) starts: Starts,
    /// The thread on which processes are listed.
    pub(crate) listing: Threads,
    pub(crate) meter: Meter,
    pub(crate) streams: Streams,
    pub(crate) callers: Arc<Callers>,
    freezer: Option<Freezer>,
    handover: Option<Handover>,
    identity: Mutex<Arc<Identity>>,
}

impl Agent {
    pub(crate) fn new(
        place: Place,
        address: SocketAddr,
        default_user: String,
        cgroup: Option<Cgroup>,
        handover: Option<Handover>,
    ) -> Self {
        let gate = match place {
            Place::Guest => Gate::Closed("this guest has not been initialised".to_owned()),
            Place::Outside => Gate::Open,
        };
        let left = handover.as_ref().and_then(Handover::take);
        let identity = left.unwrap_or_else(|| Identity {
            gate,
            token: None,
            environment: BTreeMap::new(),
            default_user,
            default_directory: None,
        });
        let (cgroup, freezer) = cgroup.map(|cgroup| (Arc::new(cgroup.directory), cgroup.freezer)).unzip();
        Self {
            place,
            address,
            processes: Arc::default(),
            cgroup,
            changing: tokio::sync::Mutex::new(()),
            settling: Arc::new(Semaphore::new(1)),
            starts: Starts::default(),
            listing: Threads::new(tasks::THREADS),
            meter: Meter::start(),
            streams: Streams::default(),
            callers: Arc::new(Callers::new(place)),
            freezer,
            handover,
            identity: Mutex::new(Arc::new(identity)),
        }
    }

    /// Who this guest is now.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes who this guest is; only `/init` does.
    pub(crate) fn set_identity(&self, identity: Identity) {
        let mut current = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handover) = &self.handover {
            handover.leave(&identity);
        }
        *current = Arc::new(identity);
    }

    /// Opens or closes the guest, for whoever holds `changing`.
    pub(crate) fn set_gate(&self, gate: Gate) {
        let identity = Identity { gate, ..Identity::clone(&self.identity()) };
        self.set_identity(identity);
    }

    /// Stops every process of users, and waits until they stand still.
    pub(crate) async fn freeze(&self, deadline: Instant) -> Result<(), FreezeError> {
        self.freezer.as_ref().ok_or(FreezeError::NoCgroup)?.freeze(deadline).await
    }

    /// Asks for the processes to be stopped, where that is possible.
    pub(crate) fn request_freeze(&self) -> Result<(), FreezeError> {
        self.freezer.as_ref().map_or(Ok(()), Freezer::request)
    }

    /// Lets the processes go on.
    pub(crate) fn thaw(&self) -> Result<(), FreezeError> {
        self.freezer.as_ref().map_or(Ok(()), Freezer::thaw)
    }
}
