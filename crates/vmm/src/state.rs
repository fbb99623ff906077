//! What a machine of a real driver is doing, as far as its owner knows.
//!
//! ```text
//!  running ──pause──► stopping ──answered──► paused ──a snapshot that its memory is part of──► saved
//!     ▲                  │                     │
//!     └──────resume──────┴─────────────────────┘
//! ```

use crate::{SnapshotFiles, VmmError, VmmResult};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// It was told to stop, and nobody knows whether it has.
    Stopping,
    Paused,
    /// Its memory is part of this snapshot, which must not change any more.
    Saved(SnapshotFiles),
}

impl State {
    fn word(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Paused => "paused",
            Self::Saved(_) => "saved",
        }
    }

    /// That it is in the wrong state for something.
    pub(crate) fn wrong_for(&self, operation: &'static str) -> VmmError {
        VmmError::WrongState { operation, state: self.word() }
    }

    /// Whether a machine that is asked for a snapshot into these files has to make one: it may have done so.
    pub(crate) fn is_to_be_saved(&self, operation: &'static str, into: &SnapshotFiles) -> VmmResult<bool> {
        match self {
            Self::Paused => Ok(true),
            Self::Saved(files) if files == into => Ok(false),
            other => Err(other.wrong_for(operation)),
        }
    }

    /// The machine's disk, if it has one and something may be done with it now.
    pub(crate) fn may_change_disk<D>(&self, operation: &'static str, disk: Option<D>) -> VmmResult<D> {
        let none = || VmmError::Spec { field: "disk", problem: "the machine has none".to_owned() };
        let disk = disk.ok_or_else(none)?;
        match self {
            Self::Saved(_) => Err(self.wrong_for(operation)),
            _ => Ok(disk),
        }
    }
}

/// That the memory of a machine that booted is in no file, or in another one than its snapshot is to be.
pub(crate) fn other_memory(operation: &'static str) -> VmmError {
    let problem = "it was not booted with its memory in the snapshot's file";
    VmmError::Unsupported { operation, problem }
}
