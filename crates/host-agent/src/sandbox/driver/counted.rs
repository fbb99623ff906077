//! Counts what the driver does, and for how long.

use tokio::time::Instant;

use super::{Driver, OperationError, Residence};
use crate::{
    metrics::operations::Operation,
    sandbox::{Outcome, queue::Verb},
};

impl Driver {
    /// Does one thing, and counts it. The sandbox is what it was before if it fails.
    pub(super) async fn perform_counted(
        &self,
        residence: Residence,
        verb: Verb,
    ) -> (Residence, Result<Outcome, OperationError>) {
        // What is so already takes no time, and is none.
        let operation = match (&residence, &verb) {
            (Residence::Up(_), Verb::Pause(_)) => Some(Operation::Pause),
            (Residence::Paused(_), Verb::Resume { .. }) => Some(Operation::Resume),
            (_, Verb::Snapshot { .. }) => Some(Operation::Snapshot),
            (_, Verb::Rollback { .. }) => Some(Operation::Rollback),
            _ => None,
        };
        let begun = Instant::now();
        let (next, outcome) = self.perform(residence, verb).await;
        let is_over = outcome.as_ref().err().is_none_or(|error| !error.is_end());
        if let Some(operation) = operation.filter(|_| is_over) {
            self.count(operation, begun, outcome.is_ok());
        }
        (next, outcome)
    }

    /// Counts what began then and is over now.
    pub(super) fn count(&self, operation: Operation, begun: Instant, is_done: bool) {
        let operations = &self.host.operations;
        if is_done { operations.done(operation, begun.elapsed()) } else { operations.failed(operation) }
    }
}
