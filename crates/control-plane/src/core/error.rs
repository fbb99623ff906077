//! What can go wrong, in the words of the operation. Statuses and codes are the surface's business.

use std::time::Duration;

use wrenn_types::{ResourceError, SandboxId, SandboxState, TemplateName};

use crate::{guest, host, store};

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoreError {
    /// The request says something that cannot be done for anybody.
    #[error("{0}")]
    Invalid(String),
    /// A number is out of its bounds.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// There is no API key in the request.
    #[error("send an API key in the header X-API-Key")]
    NoKey,
    /// The API key is not known.
    #[error("the API key is not known")]
    UnknownKey,
    /// The team has no such sandbox.
    #[error("no sandbox has the id {0}")]
    NoSuchSandbox(String),
    /// The sandbox is not in a state in which this can be done.
    #[error("sandbox {id} is {state}{}", because(.reason.as_deref()))]
    NotRunning {
        /// Which one.
        id: SandboxId,
        /// Its state.
        state: SandboxState,
        /// Why it is in it, where that is known.
        reason: Option<String>,
    },
    /// Nothing is known of what the sandbox used: it has not run yet, or is gone.
    #[error("sandbox {0} is {1}: there are no measurements of it")]
    NoMetrics(SandboxId, SandboxState),
    /// The sandbox was destroyed while something else was done to it.
    #[error("sandbox {0} was destroyed meanwhile")]
    Destroyed(SandboxId),
    /// The team has no such snapshot, and the platform no such template.
    #[error("no snapshot or template has the name {0}")]
    NoSuchSnapshot(String),
    /// A snapshot of the team has the name already.
    #[error("a snapshot has the name {0} already; with overwrite=true it is replaced")]
    NameTaken(TemplateName),
    /// The name is one of the platform's templates.
    #[error("{0} is a template of the platform")]
    NameReserved(TemplateName),
    /// What belongs to the platform cannot be deleted by a team.
    #[error("{0} is a template of the platform and cannot be deleted")]
    Platform(String),
    /// Some of the children of a fork did not come up, so there are none.
    #[error("none of the children is there")]
    Fork(#[source] Box<CoreError>),
    /// The command did not end within its time.
    #[error("the command did not end within {} s and was killed", .0.as_secs())]
    CommandTimedOut(Duration),
    /// Too much of something is going on.
    #[error("{0}")]
    TooMany(&'static str),
    /// The audit log cannot take more, so nothing that must be in it can be done.
    #[error("the audit log cannot be written now")]
    AuditFull,
    /// No host has been heard of yet.
    #[error("no host is connected")]
    NoHost,
    /// The database did not do its part.
    #[error("the request could not be completed")]
    Store(#[from] store::StoreError),
    /// The host agent did not do its part.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// The guest did not do its part.
    #[error(transparent)]
    Guest(#[from] guest::GuestError),
    /// A task of ours died.
    #[error("the request was broken off")]
    Task(#[source] tokio::task::JoinError),
}

fn because(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(": {reason}"))
}
