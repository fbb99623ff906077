//! What to do where the database and a host disagree. Pure: it looks at two lists and says what should
//! change, and [`super::watch`] does it.
//!
//! ```text
//! the database says     │ the host says          │ so
//! ──────────────────────┼────────────────────────┼─────────────────────────────────────────────────
//! starting              │ running, paused        │ it is (whoever asked for it has gone)
//! starting              │ stopped                │ it is in error
//! starting              │ nothing, for a while   │ it is in error: its control plane died too early
//! running, missing      │ pausing, paused        │ so it is: its time was over
//! running, paused, …    │ stopped                │ it has stopped, for the host's reason
//! running, missing      │ nothing                │ it has stopped: the host does not know it
//! paused                │ running                │ it runs
//! paused                │ nothing                │ it is in error: what was saved is lost
//! pausing               │ paused                 │ it is paused
//! pausing               │ running, and knows of  │ it runs: to pause it has failed
//! resuming              │ running, as was asked  │ it runs
//! pausing, resuming,    │ running, paused,       │ it is what the host says: whoever was to change it has
//!   snapshotting        │   for a while          │   gone, or has failed
//! missing               │ running                │ it runs: the host is back
//! running, paused       │ the same, and its      │ there is no deadline any more
//!                       │   deadline was met     │
//! stopping              │ anything but stopped   │ it is destroyed again
//! stopping              │ stopped, or nothing    │ it has stopped, as was asked
//! ended, or nothing     │ anything but stopped   │ nobody knows it: it is destroyed
//! anything              │ something that cannot  │ nothing changes: what it is is known again once that can be
//!                       │   be read              │   read, and then it is settled like any other
//! ```
//!
//! What a host is in the middle of is waited for: it has bounds of its own. What this process is itself
//! changing is left alone: the change does its own writing.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use wrenn_types::{EndReason, SandboxId, SandboxState};

use crate::{
    host::{Observed, Stage},
    store::Seen,
};

/// What the database knows of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) id: SandboxId,
    pub(crate) state: SandboxState,
    pub(crate) generation: i64,
    /// When it came into this state.
    pub(crate) since: Timestamp,
    pub(crate) deadline: Option<Timestamp>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Run {
        id: SandboxId,
        generation: i64,
        seen: Seen,
    },
    /// Its host has begun to pause it by itself.
    Pausing {
        id: SandboxId,
        generation: i64,
    },
    Pause {
        id: SandboxId,
        generation: i64,
        seen: Seen,
    },
    /// It has met its deadline, and is what that asked for.
    ClearDeadline {
        id: SandboxId,
        generation: i64,
        met: Timestamp,
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
/// host has. `young_since` is the time after which an intent may still be on its way to the host.
pub(crate) fn compare(
    known: &[Known],
    seen: &HashMap<SandboxId, Observed>,
    busy: &HashSet<SandboxId>,
    young_since: Timestamp,
) -> Vec<Action> {
    let mut actions: Vec<Action> = Vec::new();
    for row in known.iter().filter(|row| !busy.contains(&row.id)) {
        match seen.get(&row.id) {
            Some(observed) => actions.extend(settle(row, observed, young_since)),
            None => actions.extend(absent(row, young_since)),
        }
    }
    let live: HashSet<&SandboxId> = known.iter().map(|row| &row.id).collect();
    for observed in seen.values() {
        let ends = matches!(observed.stage, Stage::Stopping | Stage::Stopped | Stage::Unreadable);
        if !ends && !live.contains(&observed.id) && !busy.contains(&observed.id) {
            let generation = observed.generation.saturating_add(1);
            actions.push(Action::DestroyUnknown { id: observed.id.clone(), generation });
        }
    }
    actions
}

/// Compares one sandbox that both know. The row must have been read before the host was asked.
pub(crate) fn settle(row: &Known, observed: &Observed, young_since: Timestamp) -> Option<Action> {
    use SandboxState as State;
    let Known { id, generation, .. } = row.clone();
    let seen = Seen::from(observed);
    let is_young = row.since > young_since;
    let run = Action::Run { id: id.clone(), generation, seen };
    let pause = Action::Pause { id: id.clone(), generation, seen };
    match (row.state, observed.stage) {
        // It is not gone, and nobody knows what it is.
        (_, Stage::Unreadable) => None,
        (State::Stopping, Stage::Stopped) => Some(ended(row, observed, State::Stopped, EndReason::Requested)),
        // The host is at it already.
        (State::Stopping, Stage::Stopping) => None,
        (State::Stopping, _) => Some(Action::Destroy { id, generation }),
        (State::Stopped | State::Error | State::Pending | State::Hibernated, _) => None,
        (State::Starting, Stage::Stopped) => Some(ended(row, observed, State::Error, observed.end_reason)),
        (_, Stage::Stopped) => Some(ended(row, observed, State::Stopped, observed.end_reason)),
        (State::Running | State::Missing, Stage::Pausing) => Some(Action::Pausing { id, generation }),
        (_, Stage::Starting | Stage::Pausing | Stage::Resuming | Stage::Stopping) => None,

        (State::Running, Stage::Running | Stage::Snapshotting) | (State::Paused, Stage::Paused) => {
            met(row, observed)
        }
        // A paused sandbox can be in this stage as well, so only the end of it tells.
        (_, Stage::Snapshotting) => None,
        (State::Starting | State::Missing | State::Paused, Stage::Running) => Some(run),
        (State::Starting | State::Missing | State::Running | State::Pausing, Stage::Paused) => Some(pause),
        (State::Pausing | State::Resuming, Stage::Running) if observed.generation >= generation => Some(run),
        (State::Pausing | State::Resuming | State::Snapshotting, Stage::Running) => {
            (!is_young).then_some(run)
        }
        (State::Resuming | State::Snapshotting, Stage::Paused) => (!is_young).then_some(pause),
    }
}

/// What is left to do for a sandbox whose state is agreed on: its deadline may have passed while it was paused.
fn met(row: &Known, observed: &Observed) -> Option<Action> {
    let met = observed.deadline_met?;
    // A host knows milliseconds.
    let is_this = row.deadline.is_some_and(|at| at.as_millisecond() == met.as_millisecond());
    is_this.then(|| Action::ClearDeadline { id: row.id.clone(), generation: row.generation, met })
}

fn ended(row: &Known, observed: &Observed, state: SandboxState, reason: EndReason) -> Action {
    let message = if observed.end_message.is_empty() {
        observed.end_reason.to_string()
    } else {
        observed.end_message.clone()
    };
    Action::End { id: row.id.clone(), generation: row.generation, state, reason, message }
}

/// What becomes of a sandbox that its host does not have.
pub(crate) fn absent(row: &Known, young_since: Timestamp) -> Option<Action> {
    let (state, reason, message) = match row.state {
        SandboxState::Starting if row.since > young_since => return None,
        SandboxState::Starting => (
            SandboxState::Error,
            EndReason::StartFailed,
            "the control plane stopped before the host was told to start it",
        ),
        SandboxState::Running
        | SandboxState::Missing
        | SandboxState::Pausing
        | SandboxState::Resuming
        | SandboxState::Snapshotting => {
            (SandboxState::Stopped, EndReason::AgentStopped, "its host does not know it any more")
        }
        SandboxState::Paused => {
            (SandboxState::Error, EndReason::AgentStopped, "its host does not have what was saved of it")
        }
        SandboxState::Stopping => (SandboxState::Stopped, EndReason::Requested, ""),
        SandboxState::Pending | SandboxState::Hibernated | SandboxState::Stopped | SandboxState::Error => {
            return None;
        }
    };
    let (id, generation) = (row.id.clone(), row.generation);
    Some(Action::End { id, generation, state, reason, message: message.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAGES: [Stage; 8] = [
        Stage::Starting,
        Stage::Running,
        Stage::Pausing,
        Stage::Paused,
        Stage::Resuming,
        Stage::Snapshotting,
        Stage::Stopping,
        Stage::Stopped,
    ];

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn young() -> Timestamp {
        Timestamp::from_second(now().as_second() - 10).unwrap()
    }

    fn row(state: SandboxState, age_seconds: i64) -> Known {
        let since = Timestamp::from_second(now().as_second() - age_seconds).unwrap();
        Known { id: SandboxId::random(), state, generation: 2, since, deadline: None }
    }

    fn observed(id: &SandboxId, stage: Stage, generation: i64) -> Observed {
        Observed {
            id: id.clone(),
            generation,
            stage,
            disk_mib: 1024,
            timeout_seconds: 0,
            started_at: now(),
            last_active_at: None,
            paused_at: None,
            paused_bytes: None,
            last_failure: String::new(),
            deadline_met: None,
            end_reason: EndReason::VmmCrash,
            end_message: String::new(),
            disk_used_bytes: None,
        }
    }

    fn decide(row: &Known, stage: Option<(Stage, i64)>) -> Vec<Action> {
        let seen = stage
            .map(|(stage, generation)| (row.id.clone(), observed(&row.id, stage, generation)))
            .into_iter()
            .collect();
        compare(std::slice::from_ref(row), &seen, &HashSet::new(), young())
    }

    fn word(actions: &[Action]) -> String {
        match actions {
            [] => "nothing".to_owned(),
            [Action::Run { .. }] => "run".to_owned(),
            [Action::Pausing { .. }] => "pausing".to_owned(),
            [Action::Pause { .. }] => "pause".to_owned(),
            [Action::ClearDeadline { .. }] => "clear deadline".to_owned(),
            [Action::End { state, reason, .. }] => format!("{state} {reason:?}"),
            [Action::Destroy { .. }] => "destroy".to_owned(),
            [Action::DestroyUnknown { .. }] => "destroy unknown".to_owned(),
            more => format!("{more:?}"),
        }
    }

    #[test]
    fn the_table_of_the_module() {
        use SandboxState::{Missing, Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopping};
        for (state, age, stage, expected) in [
            (Starting, 0, Some(Stage::Running), "run"),
            (Starting, 0, Some(Stage::Paused), "pause"),
            (Starting, 99, Some(Stage::Starting), "nothing"),
            (Starting, 0, Some(Stage::Stopped), "error VmmCrash"),
            (Starting, 0, None, "nothing"),
            (Starting, 99, None, "error StartFailed"),
            (Running, 99, Some(Stage::Running), "nothing"),
            (Running, 0, Some(Stage::Pausing), "pausing"),
            (Running, 0, Some(Stage::Paused), "pause"),
            (Running, 99, Some(Stage::Stopped), "stopped VmmCrash"),
            (Running, 0, None, "stopped AgentStopped"),
            (Missing, 99, Some(Stage::Running), "run"),
            (Missing, 99, Some(Stage::Paused), "pause"),
            (Missing, 99, None, "stopped AgentStopped"),
            (Pausing, 0, Some(Stage::Running), "run"),
            (Pausing, 99, Some(Stage::Pausing), "nothing"),
            (Pausing, 0, Some(Stage::Paused), "pause"),
            (Pausing, 0, Some(Stage::Stopped), "stopped VmmCrash"),
            (Resuming, 0, Some(Stage::Paused), "nothing"),
            (Resuming, 99, Some(Stage::Paused), "pause"),
            (Resuming, 0, Some(Stage::Running), "run"),
            (Snapshotting, 0, Some(Stage::Running), "nothing"),
            (Snapshotting, 99, Some(Stage::Running), "run"),
            (Snapshotting, 99, Some(Stage::Paused), "pause"),
            (Snapshotting, 99, Some(Stage::Snapshotting), "nothing"),
            (Paused, 99, Some(Stage::Paused), "nothing"),
            (Paused, 99, Some(Stage::Running), "run"),
            (Paused, 99, Some(Stage::Stopped), "stopped VmmCrash"),
            (Paused, 99, None, "error AgentStopped"),
            (Stopping, 0, Some(Stage::Running), "destroy"),
            (Stopping, 0, Some(Stage::Paused), "destroy"),
            (Stopping, 0, Some(Stage::Resuming), "destroy"),
            (Stopping, 0, Some(Stage::Stopping), "nothing"),
            (Stopping, 0, Some(Stage::Stopped), "stopped Requested"),
            (Stopping, 0, None, "stopped Requested"),
            (Starting, 99, Some(Stage::Unreadable), "nothing"),
            (Running, 99, Some(Stage::Unreadable), "nothing"),
            (Paused, 99, Some(Stage::Unreadable), "nothing"),
            (Resuming, 99, Some(Stage::Unreadable), "nothing"),
            (Stopping, 99, Some(Stage::Unreadable), "nothing"),
        ] {
            let row = row(state, age);
            assert_eq!(word(&decide(&row, stage.map(|stage| (stage, 2)))), expected, "{state} {stage:?}");
        }
        // A host that has not heard of the intent yet says nothing about it, for a while.
        for state in [Pausing, Resuming] {
            for (age, expected) in [(0, "nothing"), (99, "run")] {
                assert_eq!(word(&decide(&row(state, age), Some((Stage::Running, 1)))), expected, "{state}");
            }
        }
    }

    #[test]
    fn a_deadline_that_was_met_is_over_and_no_other_one() {
        use SandboxState::{Paused, Pausing, Running};
        let at = |nanosecond: i64| Timestamp::from_nanosecond(i128::from(nanosecond)).unwrap();
        for (state, stage) in
            [(Running, Stage::Running), (Running, Stage::Snapshotting), (Paused, Stage::Paused)]
        {
            for (deadline, met, expected) in [
                (None, None, "nothing"),
                (Some(at(5_000_000)), None, "nothing"),
                (None, Some(at(5_000_000)), "nothing"),
                (Some(at(5_000_000)), Some(at(5_000_000)), "clear deadline"),
                (Some(at(5_999_000)), Some(at(5_000_000)), "clear deadline"),
                (Some(at(6_000_000)), Some(at(5_000_000)), "nothing"),
            ] {
                let row = Known { deadline, ..row(state, 99) };
                let observed = Observed { deadline_met: met, ..observed(&row.id, stage, 2) };
                let action: Vec<Action> = settle(&row, &observed, young()).into_iter().collect();
                assert_eq!(word(&action), expected, "{state} {deadline:?} {met:?}");
            }
        }
        // On the way to a state it is cleared with the arrival.
        let row = Known { deadline: Some(at(5_000_000)), ..row(Pausing, 0) };
        let observed = Observed { deadline_met: Some(at(5_000_000)), ..observed(&row.id, Stage::Paused, 2) };
        assert!(matches!(settle(&row, &observed, young()), Some(Action::Pause { seen, .. })
            if seen.deadline_met == observed.deadline_met));
    }

    #[test]
    fn what_nobody_knows_is_destroyed_and_what_is_being_changed_is_left_alone() {
        let id = SandboxId::random();
        for stage in [Stage::Running, Stage::Paused, Stage::Snapshotting] {
            let seen = HashMap::from([(id.clone(), observed(&id, stage, 1))]);
            let actions = compare(&[], &seen, &HashSet::new(), now());
            assert_eq!(actions, [Action::DestroyUnknown { id: id.clone(), generation: 2 }]);
            let busy = HashSet::from([id.clone()]);
            assert_eq!(compare(&[], &seen, &busy, now()), []);
            let starting = Known { id: id.clone(), ..row(SandboxState::Starting, 99) };
            assert_eq!(compare(&[starting], &HashMap::new(), &busy, now()), []);
        }
    }

    /// A record that could not be read ended its sandbox here, and destroyed it once it could be read again.
    #[test]
    fn what_a_host_cannot_read_is_left_as_it_is() {
        let id = SandboxId::random();
        let seen = HashMap::from([(id.clone(), observed(&id, Stage::Unreadable, 0))]);
        assert_eq!(compare(&[], &seen, &HashSet::new(), young()), []);
        for state in SandboxState::ALL {
            for age in [0, 99] {
                let row = Known { id: id.clone(), ..row(state, age) };
                assert_eq!(
                    compare(std::slice::from_ref(&row), &seen, &HashSet::new(), young()),
                    [],
                    "{state}"
                );
                assert_eq!(settle(&row, &seen[&id], Timestamp::MAX), None, "{state}");
            }
        }
    }

    /// What the rows of the store and a host do with an action.
    fn perform(row: &mut Known, host: &mut Option<(Stage, i64)>, action: Action) {
        match action {
            Action::Run { generation, .. } if generation == row.generation => {
                row.state = SandboxState::Running
            }
            Action::Pausing { generation, .. } if generation == row.generation => {
                row.state = SandboxState::Pausing
            }
            Action::Pause { generation, .. } if generation == row.generation => {
                row.state = SandboxState::Paused
            }
            Action::End { state, .. } => {
                let asked = row.state == SandboxState::Stopping;
                row.state = if asked { SandboxState::Stopped } else { state };
            }
            Action::Destroy { generation, .. } | Action::DestroyUnknown { generation, .. } => {
                // An agent refuses an older generation.
                assert!(host.is_none_or(|(_, known)| generation >= known), "{generation} {host:?}");
                *host = None;
            }
            Action::ClearDeadline { .. } => row.deadline = None,
            Action::Run { .. } | Action::Pausing { .. } | Action::Pause { .. } => {
                panic!("{action:?} of another generation")
            }
        }
    }

    /// What a host is in the middle of ends, one way or another.
    fn end_of(stage: Stage, well: bool) -> Stage {
        match (stage, well) {
            (Stage::Starting, true) | (Stage::Resuming, true) | (Stage::Pausing, false) => Stage::Running,
            (Stage::Starting, false) | (Stage::Stopping, _) => Stage::Stopped,
            (Stage::Resuming, false) | (Stage::Pausing, true) => Stage::Paused,
            (Stage::Snapshotting, true) => Stage::Running,
            (Stage::Snapshotting, false) => Stage::Paused,
            (stage, _) => stage,
        }
    }

    fn states() -> impl Strategy<Value = SandboxState> {
        // The two that nothing brings about yet are left out.
        let states: Vec<SandboxState> = SandboxState::ALL
            .into_iter()
            .filter(|state| !matches!(state, SandboxState::Pending | SandboxState::Hibernated))
            .collect();
        proptest::sample::select(states)
    }

    /// Those of sandboxes that their owner wants to be there.
    fn wanted_states() -> impl Strategy<Value = SandboxState> {
        let ends = [SandboxState::Stopping, SandboxState::Stopped, SandboxState::Error];
        states().prop_filter("wanted", move |state| !ends.contains(state))
    }

    proptest! {
        /// Nothing that is there for its owner is ever destroyed or called ended, running or paused.
        #[test]
        fn what_is_there_survives_every_comparison(
            state in wanted_states(),
            stage in proptest::sample::select(&STAGES[..7]),
            generation in 1_i64..=2,
            age in 0_i64..1000,
            others in 0_usize..5,
        ) {
            let mine = row(state, age);
            let mut seen = HashMap::from([(mine.id.clone(), observed(&mine.id, stage, generation))]);
            for _ in 0..others {
                let id = SandboxId::random();
                seen.insert(id.clone(), observed(&id, Stage::Running, 1));
            }
            for action in compare(std::slice::from_ref(&mine), &seen, &HashSet::new(), young()) {
                match action {
                    Action::DestroyUnknown { id, .. } => prop_assert_ne!(id, mine.id.clone()),
                    Action::Run { id, .. } => {
                        prop_assert_eq!((id, stage), (mine.id.clone(), Stage::Running));
                    }
                    Action::Pausing { id, .. } => {
                        prop_assert_eq!((id, stage), (mine.id.clone(), Stage::Pausing));
                    }
                    Action::Pause { id, .. } => {
                        prop_assert_eq!((id, stage), (mine.id.clone(), Stage::Paused));
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }

        /// Whatever the two sides say, once what is under way has ended and nobody intends anything more, a few
        /// comparisons bring them to agree, and then nothing is left to do. Nothing stays in between.
        #[test]
        fn every_disagreement_ends(
            state in states(),
            stage in proptest::option::of(proptest::sample::select(&STAGES[..])),
            generation in 1_i64..=2,
            well: bool,
        ) {
            let mut row = row(state, 99);
            let mut host = stage.map(|stage| (stage, generation));
            for _ in 0..4 {
                host = host.map(|(stage, generation)| (end_of(stage, well), generation));
                let live = (!row.state.is_final()).then(|| row.clone());
                let seen = host
                    .map(|(stage, generation)| (row.id.clone(), observed(&row.id, stage, generation)))
                    .into_iter()
                    .collect();
                for action in compare(live.as_slice(), &seen, &HashSet::new(), young()) {
                    perform(&mut row, &mut host, action);
                }
            }
            let agreed = match host {
                Some((Stage::Running, _)) => row.state == SandboxState::Running,
                Some((Stage::Paused, _)) => row.state == SandboxState::Paused,
                Some((Stage::Stopped, _)) | None => row.state.is_final(),
                Some(_) => false,
            };
            prop_assert!(agreed, "{:?} and {:?}", row, host);
        }
    }
}
