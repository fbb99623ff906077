//! What to do where the database and a host disagree. Pure: it looks at two lists and says what should
//! change, and [`super::watch`] does it.
//!
//! ```text
//! the database says │ the host says        │ so
//! ──────────────────┼──────────────────────┼───────────────────────────────────────────────
//! starting          │ running              │ it runs (whoever asked for it has gone)
//! starting          │ stopped              │ it is in error
//! starting          │ nothing, for a while │ it is in error: its control plane died too early
//! running           │ stopped, or nothing  │ it has stopped, for the host's reason
//! missing           │ running              │ it runs: the host is back
//! stopping          │ running              │ it is destroyed again
//! stopping          │ stopped, or nothing  │ it has stopped, as was asked
//! ended, or nothing │ running              │ nobody knows it: it is destroyed
//! ```
//!
//! What this process is itself creating is left alone: the create does its own writing.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use wrenn_types::{EndReason, SandboxId, SandboxState};

use crate::host::{Observed, Stage};

/// What the database knows of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) id: SandboxId,
    pub(crate) state: SandboxState,
    pub(crate) generation: i64,
    pub(crate) created_at: Timestamp,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Run {
        id: SandboxId,
        generation: i64,
        disk_mib: u32,
        at: Timestamp,
    },
    End {
        id: SandboxId,
        generation: i64,
        state: SandboxState,
        reason: EndReason,
        message: String,
    },
    Destroy {
        id: SandboxId,
        generation: i64,
    },
    /// To be destroyed, unless a second look at the database finds a reason why not: the host's list is
    /// newer than ours.
    DestroyUnknown {
        id: SandboxId,
        generation: i64,
    },
}

/// Compares everything: what is live in the database, read *before* the host was asked, with all that the
/// host has. `young_since` is the time after which a sandbox may still be on its way to the host.
pub(crate) fn compare(
    known: &[Known],
    seen: &HashMap<SandboxId, Observed>,
    creating: &HashSet<SandboxId>,
    young_since: Timestamp,
) -> Vec<Action> {
    let mut actions: Vec<Action> = Vec::new();
    for row in known.iter().filter(|row| !creating.contains(&row.id)) {
        match seen.get(&row.id) {
            Some(observed) => actions.extend(settle(row, observed)),
            None => actions.extend(absent(row, young_since)),
        }
    }
    let live: HashSet<&SandboxId> = known.iter().map(|row| &row.id).collect();
    for observed in seen.values() {
        let alive = matches!(observed.stage, Stage::Starting | Stage::Running);
        if alive && !live.contains(&observed.id) && !creating.contains(&observed.id) {
            let generation = observed.generation.saturating_add(1);
            actions.push(Action::DestroyUnknown { id: observed.id.clone(), generation });
        }
    }
    actions
}

/// Compares one sandbox that both know.
pub(crate) fn settle(row: &Known, observed: &Observed) -> Option<Action> {
    let Known { id, generation, .. } = row.clone();
    let end = |state, reason| {
        let message = if observed.end_message.is_empty() {
            observed.end_reason.to_string()
        } else {
            observed.end_message.clone()
        };
        Some(Action::End { id: id.clone(), generation, state, reason, message })
    };
    match (row.state, observed.stage) {
        (SandboxState::Starting | SandboxState::Missing, Stage::Running) => Some(Action::Run {
            id: id.clone(),
            generation,
            disk_mib: observed.disk_mib,
            at: observed.started_at,
        }),
        (SandboxState::Starting, Stage::Stopped) => end(SandboxState::Error, observed.end_reason),
        (SandboxState::Running | SandboxState::Missing, Stage::Stopped) => {
            end(SandboxState::Stopped, observed.end_reason)
        }
        (SandboxState::Stopping, Stage::Starting | Stage::Running) => {
            Some(Action::Destroy { id: id.clone(), generation })
        }
        (SandboxState::Stopping, Stage::Stopped) => end(SandboxState::Stopped, EndReason::Requested),
        _ => None,
    }
}

fn absent(row: &Known, young_since: Timestamp) -> Option<Action> {
    let (state, reason, message) = match row.state {
        SandboxState::Starting if row.created_at > young_since => return None,
        SandboxState::Starting => (
            SandboxState::Error,
            EndReason::StartFailed,
            "the control plane stopped before the host was told to start it",
        ),
        SandboxState::Running | SandboxState::Missing => {
            (SandboxState::Stopped, EndReason::AgentStopped, "its host does not know it any more")
        }
        SandboxState::Stopping => (SandboxState::Stopped, EndReason::Requested, ""),
        _ => return None,
    };
    let (id, generation) = (row.id.clone(), row.generation);
    Some(Action::End { id, generation, state, reason, message: message.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn row(state: SandboxState, age_seconds: i64) -> Known {
        let created_at = Timestamp::from_second(now().as_second() - age_seconds).unwrap();
        Known { id: SandboxId::random(), state, generation: 1, created_at }
    }

    fn observed(id: &SandboxId, stage: Stage) -> Observed {
        Observed {
            id: id.clone(),
            generation: 1,
            stage,
            disk_mib: 1024,
            started_at: now(),
            last_active_at: None,
            end_reason: EndReason::VmmCrash,
            end_message: String::new(),
            disk_used_bytes: None,
        }
    }

    fn decide(row: &Known, stage: Option<Stage>) -> Vec<Action> {
        let seen = stage.map(|stage| (row.id.clone(), observed(&row.id, stage))).into_iter().collect();
        let young = Timestamp::from_second(now().as_second() - 10).unwrap();
        compare(std::slice::from_ref(row), &seen, &HashSet::new(), young)
    }

    fn word(actions: &[Action]) -> String {
        match actions {
            [] => "nothing".to_owned(),
            [Action::Run { .. }] => "run".to_owned(),
            [Action::End { state, reason, .. }] => format!("{state} {reason:?}"),
            [Action::Destroy { .. }] => "destroy".to_owned(),
            [Action::DestroyUnknown { .. }] => "destroy unknown".to_owned(),
            more => format!("{more:?}"),
        }
    }

    #[test]
    fn the_table_of_the_module() {
        use SandboxState::{Missing, Running, Starting, Stopping};
        for (state, age, stage, expected) in [
            (Starting, 0, Some(Stage::Running), "run"),
            (Starting, 99, Some(Stage::Starting), "nothing"),
            (Starting, 0, Some(Stage::Stopped), "error VmmCrash"),
            (Starting, 0, None, "nothing"),
            (Starting, 99, None, "error StartFailed"),
            (Running, 99, Some(Stage::Running), "nothing"),
            (Running, 99, Some(Stage::Stopped), "stopped VmmCrash"),
            (Running, 0, None, "stopped AgentStopped"),
            (Missing, 99, Some(Stage::Running), "run"),
            (Missing, 99, None, "stopped AgentStopped"),
            (Stopping, 0, Some(Stage::Running), "destroy"),
            (Stopping, 0, Some(Stage::Stopping), "nothing"),
            (Stopping, 0, Some(Stage::Stopped), "stopped Requested"),
            (Stopping, 0, None, "stopped Requested"),
        ] {
            let row = row(state, age);
            assert_eq!(word(&decide(&row, stage)), expected, "{state} {stage:?}");
        }
    }

    #[test]
    fn what_nobody_knows_is_destroyed_and_what_is_being_created_is_left_alone() {
        let id = SandboxId::random();
        let seen = HashMap::from([(id.clone(), observed(&id, Stage::Running))]);
        let actions = compare(&[], &seen, &HashSet::new(), now());
        assert_eq!(actions, [Action::DestroyUnknown { id: id.clone(), generation: 2 }]);
        let creating = HashSet::from([id.clone()]);
        assert_eq!(compare(&[], &seen, &creating, now()), []);
        let starting = Known { id, ..row(SandboxState::Starting, 99) };
        assert_eq!(compare(&[starting], &HashMap::new(), &creating, now()), []);
    }

    proptest! {
        /// Nothing that runs for its owner is ever destroyed or called ended.
        #[test]
        fn a_running_sandbox_survives_every_comparison(age in 0_i64..1000, others in 0_usize..5) {
            let mine = row(SandboxState::Running, age);
            let mut seen = HashMap::from([(mine.id.clone(), observed(&mine.id, Stage::Running))]);
            for _ in 0..others {
                let id = SandboxId::random();
                seen.insert(id.clone(), observed(&id, Stage::Running));
            }
            let actions = compare(std::slice::from_ref(&mine), &seen, &HashSet::new(), now());
            prop_assert_eq!(actions.len(), others);
            for action in actions {
                let Action::DestroyUnknown { id, .. } = action else { panic!("{action:?}") };
                prop_assert_ne!(id, mine.id.clone());
            }
        }
    }
}
