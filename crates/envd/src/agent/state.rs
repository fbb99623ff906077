//! What the agent knows: who it is, whether it may serve, and which processes it runs.
//!
//! ```text
//!            /init fails                       /init succeeds
//!   closed ─────────────► closed (says why) ─────────────────► open ──┐
//!     ▲  starts here in a virtual machine                       ▲     │ /init, with the current token
//!     │                                                         └─────┘
//!     └────────────────────── /init fails ──────────────────────┘
//! ```
//!
//! A guest that is closed answers `/health` and `/init` and nothing else: what a snapshot wakes up with is the
//! identity and the randomness of every other clone, and no instruction of a user may run on that. Outside a
//! virtual machine there is nothing to restore, so the agent starts open.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use super::{auth::Token, process::Registry};

/// Where the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a virtual machine that is its own: it may set the clock and all else.
    Guest,
    /// Beside other programs, for tests and for clients in debug mode: it leaves the machine alone.
    Outside,
}

/// Whether requests of users are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// The reason is for the host, which alone reaches the agent.
    Closed(String),
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

/// The agent. One exists; every request holds it.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) place: Place,
    pub(crate) processes: Arc<Registry>,
    /// The cgroup in which processes of users are born, if there is one.
    pub(crate) cgroup: Option<Arc<OwnedFd>>,
    /// Held by the one `/init` that runs.
    pub(crate) initialising: tokio::sync::Mutex<()>,
    identity: Mutex<Arc<Identity>>,
}

impl Agent {
    pub(crate) fn new(place: Place, default_user: String, cgroup: Option<OwnedFd>) -> Self {
        let gate = match place {
            Place::Guest => Gate::Closed("this guest has not been initialised".to_owned()),
            Place::Outside => Gate::Open,
        };
        let identity = Identity {
            gate,
            token: None,
            environment: BTreeMap::new(),
            default_user,
            default_directory: None,
        };
        Self {
            place,
            processes: Arc::default(),
            cgroup: cgroup.map(Arc::new),
            initialising: tokio::sync::Mutex::new(()),
            identity: Mutex::new(Arc::new(identity)),
        }
    }

    /// Who this guest is now.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes who this guest is; only `/init` does.
    pub(crate) fn set_identity(&self, identity: Identity) {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
    }
}
