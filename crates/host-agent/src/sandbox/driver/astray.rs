//! A machine that lives and that this agent could not take over.
//!
//! ```text
//!  astray ── taken over at last ──► as any that runs
//!    │ ▲ └── a destroy, or its end ──► stopped
//!    └─┘ every other request: refused, with the reason
//! ```
//!
//! It goes on meanwhile, with what it may reach as it was. Its clocks are looked at once it is under control.

use std::sync::Arc;

use tokio::time::{Instant, sleep_until};

use super::{Driver, OperationError, ended, exited};
use crate::sandbox::{
    End, Stage,
    bring_up::Up,
    driver::chain,
    queue::Next,
    record::Ledger,
    regain::{REGAIN_AGAIN, RegainError, end_uncontrolled, regain},
};
use wrenn_vmm::ExitReason;

/// What became of it.
pub(super) enum Found {
    /// It is under control.
    Up(Box<Up>),
    /// It has ended.
    Ended(End),
    /// It goes on without this agent.
    Left,
}

impl Driver {
    /// Tries again until it is under control, or has ended.
    pub(super) async fn find(&self, ledger: &Arc<Ledger>, error: RegainError) -> Found {
        let mut error = Arc::new(error);
        let mut at = Instant::now() + REGAIN_AGAIN;
        loop {
            self.tell(&error, ledger);
            let next = tokio::select! {
                biased;
                next = self.next_request() => Some(next),
                () = sleep_until(at) => None,
            };
            match next {
                Some(Next::Leave) => return Found::Left,
                Some(Next::End(reason)) => return Found::Ended(self.end_astray(ledger, ended(reason)).await),
                Some(Next::Do(_)) => {
                    for reply in self.handle.inner.requests().done() {
                        let _ = reply.send(Err(Arc::new(OperationError::Astray(Arc::clone(&error)))));
                    }
                    continue;
                }
                None => {}
            }
            // What is broken off has left the machine as it is, or has it in hand: either way it is ended then.
            let Some(regained) = self.unless_overtaken(regain(&self.host, ledger)).await else { continue };
            match regained {
                Ok(up) => {
                    self.status.send_modify(|status| status.last_failure = None);
                    return Found::Up(Box::new(up));
                }
                Err(gone) if gone.is_gone() => {
                    let end = exited(&ExitReason::Stopped, false);
                    return Found::Ended(self.end_astray(ledger, end).await);
                }
                Err(again) => error = Arc::new(again),
            }
            at = Instant::now() + REGAIN_AGAIN;
        }
    }

    fn tell(&self, error: &RegainError, ledger: &Ledger) {
        let message = chain(error);
        if self.status.borrow().last_failure.as_ref() == Some(&message) {
            return;
        }
        tracing::error!(id = %self.handle.spec().id, error = message, "a machine lives and is not under control; it is tried again");
        let started_at = ledger.record().started_at.map(Into::into);
        self.publish(|status| {
            status.stage = Stage::Running;
            status.started_at = started_at;
            status.last_failure = Some(message);
        });
    }

    async fn end_astray(&self, ledger: &Arc<Ledger>, end: End) -> End {
        drop(self.handle.inner.requests().ended());
        self.publish(|status| {
            status.stage = Stage::Stopping;
            status.end = Some(end.clone());
        });
        let id = &self.handle.spec().id;
        if let Err(error) = end_uncontrolled(&self.host, &ledger.record()).await {
            tracing::error!(%id, error = &error as &dyn std::error::Error, "its machine is left to be collected");
            return end;
        }
        if let Err(error) = ledger.remove().await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "its record stays until the next start");
        }
        self.host.collect_soon();
        end
    }
}
