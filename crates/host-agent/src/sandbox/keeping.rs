//! What of a capture is done on threads that cannot be called back: the last step, in which what was saved becomes a
//! snapshot, and the record.
//!
//! ```text
//!  thread:  … digest, make durable, put in place ─► kept? ──► the snapshot is there
//!  waiter:  … bound, or the end of the sandbox ──► given up? ─► the thread takes away what it has made
//! ```
//!
//! Whichever asks first decides ([`Fate`]). So nobody is told that there is no snapshot who finds one later, and nothing
//! waits for a disk that hangs.

use std::{sync::Arc, time::Duration};

use tokio_util::task::TaskTracker;

use super::{
    capture::CaptureError,
    record::{Ledger, RecordError},
    within::{Fate, Overdue, decided_within},
};
use crate::snapshots::{Kept, Snapshots, SnapshotsResult};

/// What becomes of one snapshot. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Keeping {
    fate: Fate,
    writes: TaskTracker,
}

impl Keeping {
    /// Gives it up, unless it is kept; whether it is given up now.
    pub(super) fn give_up(&self) -> bool {
        self.fate.give_up()
    }

    /// Writes the record as it is, durably.
    ///
    /// # Errors
    /// As [`Ledger::change`].
    pub(super) async fn write(&self, ledger: &Arc<Ledger>) -> Result<(), RecordError> {
        let ledger = Arc::clone(ledger);
        match self.writes.spawn(async move { ledger.change(|_| {}).await }).await {
            Ok(written) => written,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Waits for a write whose future was dropped: what is removed must not be written to any more.
    pub(super) async fn written(&self) {
        self.writes.close();
        self.writes.wait().await;
    }

    /// Makes a snapshot on a thread of its own. If the future is dropped, [`Self::give_up`] says what becomes of it.
    ///
    /// # Errors
    /// There is none, or there is none any more in a moment.
    pub(super) async fn keep(
        &self,
        snapshots: &Snapshots,
        bound: Duration,
        make: impl FnOnce() -> SnapshotsResult<Kept> + Send + 'static,
    ) -> Result<Kept, CaptureError> {
        let (fate, snapshots) = (self.fate.clone(), snapshots.clone());
        let made = decided_within(bound, &self.fate, move || {
            let kept = make()?;
            if !fate.keep()
                && let Err(error) = snapshots.delete(&kept.id)
            {
                let id = &kept.id;
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "a snapshot that was given up stays");
            }
            Ok(kept)
        });
        match made.await {
            Ok(made) => made.map_err(CaptureError::Store),
            Err(Overdue(bound)) => Err(CaptureError::Timeout { step: "making the snapshot durable", bound }),
        }
    }
}
