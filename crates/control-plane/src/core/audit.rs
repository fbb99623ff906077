//! What is done to sandboxes and snapshots, in the audit log whatever becomes of it.
//!
//! ```text
//!  begin ─► there is room in the log ─► it is done ─► done: `success`, or the code of the error
//!              │                            └──────► dropped, because its caller has gone: `abandoned`
//!              └ none: refused, and nothing is done
//! ```

use std::future::Future;

use jiff::Timestamp;
use serde_json::Value;
use wrenn_types::SandboxId;

use super::{Caller, Core, CoreError, recorder::Place};
use crate::store::AuditEntry;

/// The outcome of what nobody waited for to its end. Its effect may be there all the same.
const ABANDONED: &str = "abandoned";

/// Something that is about to be done, and its place in the log.
#[must_use]
#[derive(Debug)]
pub(super) struct Act {
    kept: Option<(Place, AuditEntry)>,
}

impl Act {
    /// To what it is done, where that is known only later.
    pub(super) fn to(&mut self, resource: &str) {
        if let Some((_, entry)) = &mut self.kept {
            resource.clone_into(&mut entry.resource_id);
        }
    }

    /// More to be kept of it.
    pub(super) fn note(&mut self, name: &str, value: Value) {
        if let Some((_, entry)) = &mut self.kept {
            entry.metadata[name] = value;
        }
    }

    /// Records what has become of it.
    pub(super) fn done<T>(mut self, outcome: &Result<T, CoreError>) {
        let status = outcome.as_ref().err().map_or_else(|| "success".to_owned(), crate::http::code_word);
        self.record(status);
    }

    fn record(&mut self, status: String) {
        if let Some((place, entry)) = self.kept.take() {
            place.send(AuditEntry { status, at: Timestamp::now(), ..entry });
        }
    }
}

impl Drop for Act {
    fn drop(&mut self) {
        self.record(ABANDONED.to_owned());
    }
}

impl Core {
    /// Takes a place in the audit log for something that is about to be done.
    ///
    /// # Errors
    /// [`CoreError::AuditFull`]: then it must not be done.
    pub(super) fn act(
        &self,
        caller: &Caller,
        resource: &str,
        action: &'static str,
        metadata: Value,
    ) -> Result<Act, CoreError> {
        let place = self.recorder.reserve()?;
        let entry = AuditEntry {
            team: caller.team.0,
            actor_id: caller.key.to_string(),
            actor_name: caller.key_name.clone(),
            resource_id: resource.to_owned(),
            action,
            status: String::new(),
            metadata,
            at: Timestamp::now(),
        };
        Ok(Act { kept: Some((place, entry)) })
    }

    /// Does something that belongs in the audit log, and puts it there with its outcome.
    pub(crate) async fn audited<T>(
        &self,
        caller: &Caller,
        id: &SandboxId,
        action: &'static str,
        metadata: Value,
        operation: impl Future<Output = Result<T, CoreError>>,
    ) -> Result<T, CoreError> {
        let act = self.act(caller, id.as_str(), action, metadata)?;
        let outcome = operation.await;
        act.done(&outcome);
        outcome
    }
}
