//! Why something that was asked of a sandbox was not done.

use std::{sync::Arc, time::Duration};

use wrenn_types::SnapshotId;
use wrenn_vmm::VmmError;

use crate::{
    network::{PolicyError, SlotError},
    sandbox::{bring_up::BringUpError, capture::CaptureError, record::RecordError, regain::RegainError},
    snapshot_store::SnapshotStoreError,
};

/// Why something that was asked of a sandbox was not done. It is what it was before, or about to end.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// Its end was asked for meanwhile.
    #[error("the sandbox was destroyed meanwhile")]
    Ended,
    /// No machine could be made of what was saved.
    #[error("the sandbox could not be brought back")]
    BringUp(#[source] BringUpError),
    /// It could not be saved.
    #[error("the sandbox could not be saved")]
    Capture(#[source] CaptureError),
    /// What was saved could not be copied or found.
    #[error("the snapshot cannot be used")]
    Snapshot(#[source] SnapshotStoreError),
    /// There is no such snapshot here.
    #[error("there is no snapshot {0} on this host")]
    NoSuchSnapshot(SnapshotId),
    /// It was taken of another sandbox.
    #[error("snapshot {0} is of another sandbox: create one from it instead")]
    NotItsOwn(SnapshotId),
    /// It has no memory that could be copied.
    #[error("the sandbox is paused without its memory: resume it, which boots it, and then save it")]
    DiskOnly,
    /// The machine could not be stopped for a rollback.
    #[error("the machine could not be stopped")]
    Stop(#[source] VmmError),
    /// Its machine lives and is not under control.
    #[error("the sandbox runs, but its host agent has no control over it yet, and tries again")]
    Astray(#[source] Arc<RegainError>),
    /// It could not be recorded.
    #[error("the change could not be recorded")]
    Record(#[source] RecordError),
    /// A step took too long. What it was for goes on in vain.
    #[error("{step} took longer than {bound:?}")]
    Timeout {
        /// The step.
        step: &'static str,
        /// How long it may take.
        bound: Duration,
    },
    /// The policy cannot be.
    #[error("the network policy cannot be put in force")]
    Policy(#[source] PolicyError),
    /// The policy is not in force.
    #[error("the network policy could not be put in force")]
    Network(#[source] SlotError),
}

impl OperationError {
    /// Whether it was broken off by the end of the sandbox: then it is neither done nor failed.
    #[must_use]
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Ended | Self::BringUp(BringUpError::Cancelled(_)))
    }

    /// Whether the host's disk is full: the caller may come back when it is not.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::BringUp(error) => error.is_no_space(),
            Self::Capture(error) => error.is_no_space(),
            Self::Snapshot(error) => error.is_no_space(),
            Self::Record(error) => error.is_no_space(),
            _ => false,
        }
    }
}
