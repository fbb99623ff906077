//! Pause, resume, rollback: intent, command, observation.
//!
//! ```text
//!             pause: row `pausing`, generation + 1 ──► host saves ────► row `paused`
//!  `running` ─┤                                          │ fails
//!             ◄──────────── what the host says ──────────┤
//!                                                        │ fails
//!  `paused` ──► resume: row `resuming`, generation + 1 ──► host restores, or boots ──► row `running`
//!               (rollback also, from `running` too)
//! ```
//!
//! [`Verb::admit`] says, without doing anything, what a verb means in each state. Of several callers one writes the
//! intent and commands; the others wait for what becomes of it. Each verb is a task of its own, so that a caller
//! that goes away leaves nothing half-done. What this process cannot finish, because it dies or the host does not
//! answer, is settled by the comparison in [`super::plan`].

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use wrenn_api::Sandbox;
use wrenn_types::{InactivityTimeout, SandboxId, SandboxState, SnapshotId, TeamId};

use super::{Caller, Core, CoreError, busy::Busy, lifecycle::public, watch};
use crate::{
    host::{HostError, Observed, Phase, Stage},
    store::{SandboxRow, Seen},
};

/// How often an intent is tried again when somebody was faster.
const ATTEMPTS: usize = 16;
/// How often a state that another control plane is about to change is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What is to become of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verb {
    Pause { disk_only: bool },
    Resume { timeout: Option<InactivityTimeout>, automatic: bool },
    Rollback { snapshot: SnapshotId },
}

/// What a verb means for a sandbox in some state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is to be done.
    Begin,
    /// It is so already.
    Done,
    /// Somebody is at it.
    Join,
    /// It cannot be done.
    Refuse,
}

impl Verb {
    pub(super) fn admit(&self, state: SandboxState) -> Admission {
        use SandboxState::{Paused, Pausing, Resuming, Running};
        match (self, state) {
            (Self::Pause { .. }, Running) | (Self::Resume { .. }, Paused) => Admission::Begin,
            (Self::Rollback { .. }, Running | Paused) => Admission::Begin,
            (Self::Pause { .. }, Paused) | (Self::Resume { .. }, Running) => Admission::Done,
            (Self::Pause { .. }, Pausing) | (Self::Resume { .. }, Resuming) => Admission::Join,
            _ => Admission::Refuse,
        }
    }

    /// The state until it is done.
    fn through(&self) -> SandboxState {
        match self {
            Self::Pause { .. } => SandboxState::Pausing,
            Self::Resume { .. } | Self::Rollback { .. } => SandboxState::Resuming,
        }
    }

    /// The state once it is done.
    fn goal(&self) -> SandboxState {
        match self {
            Self::Pause { .. } => SandboxState::Paused,
            Self::Resume { .. } | Self::Rollback { .. } => SandboxState::Running,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Rollback { .. } => "rollback",
        }
    }

    /// What the audit log says beside the word.
    fn details(&self) -> Value {
        match self {
            Self::Pause { disk_only } => json!({ "memory": !disk_only }),
            Self::Resume { automatic, .. } => json!({ "automatic": automatic }),
            Self::Rollback { snapshot } => json!({ "snapshot": snapshot }),
        }
    }
}

/// What became of a verb.
#[derive(Debug)]
pub(crate) enum Change {
    Done {
        sandbox: Sandbox,
        phases: Vec<Phase>,
    },
    /// It goes on.
    UnderWay {
        sandbox: Sandbox,
    },
}

struct Moved {
    row: SandboxRow,
    phases: Vec<Phase>,
}

impl Core {
    /// Does a verb, or says that it goes on.
    pub(crate) async fn change(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        verb: Verb,
    ) -> Result<Change, CoreError> {
        let task = self.spawn_change(caller, id, verb);
        match timeout(self.bounds.lifecycle_answer, task).await {
            Ok(done) => {
                let Moved { row, phases } = done.map_err(CoreError::Task)??;
                Ok(Change::Done { sandbox: public(&row)?, phases })
            }
            Err(_) => {
                let row = self.row(caller.team, id).await?;
                Ok(Change::UnderWay { sandbox: public(&row)? })
            }
        }
    }

    fn spawn_change(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        verb: Verb,
    ) -> tokio::task::JoinHandle<Result<Moved, CoreError>> {
        let (core, caller, id) = (Arc::clone(self), caller.clone(), id.clone());
        self.tasks.spawn(async move {
            let (word, details) = (verb.word(), verb.details());
            // Boxed: it is large, and would be a part of each future around it.
            let work = Box::pin(core.bring_about(caller.team, &id, &verb));
            core.audited(&caller, &id, word, details, work).await
        })
    }

    async fn bring_about(
        self: &Arc<Self>,
        team: TeamId,
        id: &SandboxId,
        verb: &Verb,
    ) -> Result<Moved, CoreError> {
        for _ in 0..ATTEMPTS {
            let row = self.row(team, id).await?;
            match verb.admit(row.state()) {
                Admission::Done => return Ok(Moved { row, phases: Vec::new() }),
                Admission::Refuse => return Err(wrong_state(id, &row)),
                Admission::Join => {
                    let row = self.outlast(team, id, verb.through()).await?;
                    // It was tried, and failed for whoever was first.
                    let is_done = row.state() == verb.goal();
                    return if is_done {
                        Ok(Moved { row, phases: Vec::new() })
                    } else {
                        Err(wrong_state(id, &row))
                    };
                }
                Admission::Begin => {
                    let busy = Busy::begin(self, id.clone());
                    let Some(row) = self.store.intend(&row, verb.through()).await? else { continue };
                    return self.carry_out(id, &row, verb, busy).await;
                }
            }
        }
        Err(CoreError::TooMany("too many change this sandbox at once"))
    }

    async fn carry_out(
        self: &Arc<Self>,
        id: &SandboxId,
        intent: &SandboxRow,
        verb: &Verb,
        busy: Busy,
    ) -> Result<Moved, CoreError> {
        self.routes.forget(id);
        let generation = intent.generation;
        let commanded = match verb {
            Verb::Pause { disk_only } => {
                let bound = self.bounds.capture(intent.size());
                self.host.pause(id, generation, *disk_only, bound).await.map(|seen| (seen, Vec::new()))
            }
            Verb::Resume { timeout, .. } => {
                let bound = self.bounds.bring_up(intent.size());
                self.host.resume(id, generation, *timeout, bound).await
            }
            Verb::Rollback { snapshot } => {
                let bound = self.bounds.bring_up(intent.size());
                self.host.rollback(id, generation, snapshot, bound).await
            }
        };
        let outcome = match commanded {
            Ok((observed, phases)) => self.observe(id, generation, &observed, verb, phases).await,
            Err(error) => Err(self.explain_failure(id, generation, error).await),
        };
        drop(busy);
        self.moved.notify_waiters();
        outcome
    }

    /// Writes what the host says once it has done what it was told.
    async fn observe(
        self: &Arc<Self>,
        id: &SandboxId,
        generation: i64,
        observed: &Observed,
        verb: &Verb,
        phases: Vec<Phase>,
    ) -> Result<Moved, CoreError> {
        let store = self.store.with_bound(self.bounds.database_patient);
        let seen = Seen::from(observed);
        let written = match (verb.goal(), observed.stage) {
            (SandboxState::Paused, Stage::Paused) => {
                use SandboxState::{Missing, Paused, Pausing, Running};
                // Another control plane may have looked before the host had begun.
                store.mark_paused(id, generation, &[Pausing, Paused, Running, Missing], seen).await?
            }
            (SandboxState::Running, Stage::Running) => {
                use SandboxState::{Missing, Resuming, Running};
                store.mark_running(id, generation, &[Resuming, Running, Missing], seen).await?
            }
            _ => {
                let error = HostError::Malformed { what: "a sandbox in another state than was asked for" };
                return Err(self.explain_failure(id, generation, error).await);
            }
        };
        match written {
            Some(row) => Ok(Moved { row, phases }),
            None => Err(self.overtaken(id).await),
        }
    }

    /// Why a command was not carried out. What the sandbox is now is written first, if its host tells; a host that is
    /// away is asked when it is back.
    pub(super) async fn explain_failure(
        self: &Arc<Self>,
        id: &SandboxId,
        generation: i64,
        error: HostError,
    ) -> CoreError {
        watch::settle_when_back(self, id, generation).await;
        match self.store.sandbox_of_host(id).await {
            Ok(Some(row)) if row.generation > generation => self.overtaken(id).await,
            Ok(Some(row)) if row.state().is_final() => wrong_state(id, &row),
            _ => error.into(),
        }
    }

    /// What to say when a newer intent was written meanwhile.
    async fn overtaken(&self, id: &SandboxId) -> CoreError {
        match self.store.sandbox_of_host(id).await {
            Ok(Some(row)) if matches!(row.state(), SandboxState::Stopping) => {
                CoreError::Destroyed(id.clone())
            }
            Ok(Some(row)) if row.end_reason() == Some(wrenn_types::EndReason::Requested) => {
                CoreError::Destroyed(id.clone())
            }
            Ok(Some(row)) => wrong_state(id, &row),
            Ok(None) => CoreError::NoSuchSandbox(id.to_string()),
            Err(error) => error.into(),
        }
    }

    /// Waits while a sandbox is in a state in between. Whoever brought it there, or the comparison with its host,
    /// brings it out again; the bound is for a host that stays away.
    pub(super) async fn outlast(
        &self,
        team: TeamId,
        id: &SandboxId,
        state: SandboxState,
    ) -> Result<SandboxRow, CoreError> {
        let wait = async {
            loop {
                let moved = self.moved.notified();
                let row = self.row(team, id).await?;
                if row.state() != state {
                    return Ok(row);
                }
                tokio::select! {
                    () = moved => {}
                    () = sleep(LOOK_AGAIN) => {}
                }
            }
        };
        let size = self.row(team, id).await?.size();
        match timeout(self.bounds.capture(size).max(self.bounds.bring_up(size)), wait).await {
            Ok(row) => row,
            Err(_) => Err(wrong_state(id, &self.row(team, id).await?)),
        }
    }

    /// Resumes a sandbox that asks for it, because somebody needs it running. Of many who do, one resumes.
    pub(super) async fn wake(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
    ) -> Result<SandboxRow, CoreError> {
        let wake = async {
            self.outlast(caller.team, id, SandboxState::Pausing).await?;
            let row = self.row(caller.team, id).await?;
            let verb = Verb::Resume { timeout: None, automatic: true };
            match verb.admit(row.state()) {
                // Those who only wait are in no audit log.
                Admission::Join => self.outlast(caller.team, id, SandboxState::Resuming).await,
                Admission::Begin => {
                    let woken = self.spawn_change(caller, id, verb).await.map_err(CoreError::Task)?;
                    woken.map(|moved| moved.row)
                }
                Admission::Done | Admission::Refuse => Ok(row),
            }
        };
        let row = match timeout(self.bounds.lifecycle_answer, Box::pin(wake)).await {
            Ok(row) => row?,
            Err(_) => self.row(caller.team, id).await?,
        };
        if row.state() == SandboxState::Running { Ok(row) } else { Err(wrong_state(id, &row)) }
    }

    /// The row of a sandbox of a team.
    pub(super) async fn row(&self, team: TeamId, id: &SandboxId) -> Result<SandboxRow, CoreError> {
        self.store.sandbox(team, id).await?.ok_or_else(|| CoreError::NoSuchSandbox(id.to_string()))
    }
}

/// The error of a verb that does not fit the state of a sandbox.
pub(super) fn wrong_state(id: &SandboxId, row: &SandboxRow) -> CoreError {
    CoreError::NotRunning { id: id.clone(), state: row.state(), reason: row.end_message.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_verb_means_in_each_state() {
        use Admission::{Begin, Done, Join, Refuse};
        let pause = Verb::Pause { disk_only: false };
        let resume = Verb::Resume { timeout: None, automatic: false };
        let rollback = Verb::Rollback { snapshot: SnapshotId::random() };
        for state in SandboxState::ALL {
            let expected = match state {
                SandboxState::Running => [Begin, Done, Begin],
                SandboxState::Paused => [Done, Begin, Begin],
                SandboxState::Pausing => [Join, Refuse, Refuse],
                SandboxState::Resuming => [Refuse, Join, Refuse],
                _ => [Refuse; 3],
            };
            let found = [&pause, &resume, &rollback].map(|verb| verb.admit(state));
            assert_eq!(found, expected, "{state}");
        }
        for verb in [pause, resume, rollback] {
            // Who is in the middle of it is joined or refused, never overtaken.
            assert_ne!(verb.admit(verb.through()), Begin);
            assert!(matches!(verb.admit(verb.goal()), Begin | Done));
        }
    }
}
