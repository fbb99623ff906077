//! When a deadline is over. Pure.
//!
//! ```text
//!            kill ─► the sandbox ends with it
//!  ahead ─at─┤                    ┌─ the pause is done, or it was paused already ─► met: there is none any more
//!            pause ─► still there ┤
//!                                 └─ the pause fails: it runs, and is paused a while later
//! ```
//!
//! One that was *met* must not pause the sandbox again at its resume. Until the control plane has heard of it, it may
//! still repeat the deadline with a change of something else, which is then no new one.

use jiff::Timestamp;
use wrenn_types::TimeoutAction;

use super::{Deadline, Settings};

/// The moment of a deadline that asks for a pause and has passed: a sandbox that is paused has met it.
#[must_use]
pub fn met_by_pause(deadline: Option<Deadline>, now: Timestamp) -> Option<Timestamp> {
    deadline
        .filter(|deadline| deadline.action == TimeoutAction::Pause && deadline.at <= now)
        .map(|deadline| deadline.at)
}

/// Moves the deadline of a sandbox that is paused from what is to come to what was met, if it has passed.
pub fn meet(settings: &mut Settings, met: &mut Option<Timestamp>, now: Timestamp) {
    if let Some(at) = met_by_pause(settings.deadline, now) {
        settings.deadline = None;
        *met = Some(at);
    }
}

/// What is left to be told of the deadline that was met, once these settings are asked for: it is no deadline of
/// theirs, and another one takes its place.
#[must_use]
pub fn after_change(settings: &mut Settings, met: Option<Timestamp>) -> Option<Timestamp> {
    match (settings.deadline, met) {
        (Some(Deadline { at, action: TimeoutAction::Pause }), Some(moment)) if at == moment => {
            settings.deadline = None;
            met
        }
        (Some(_), _) => None,
        (None, _) => met,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wrenn_types::NetworkPolicy;

    fn settings(deadline: Option<Deadline>) -> Settings {
        Settings {
            timeout: Default::default(),
            on_timeout: Default::default(),
            deadline,
            network: NetworkPolicy::simple(true),
        }
    }

    fn moment(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn pause(second: i64) -> Option<Deadline> {
        Some(Deadline { at: moment(second), action: TimeoutAction::Pause })
    }

    #[test]
    fn a_deadline_is_met_once() {
        let (mut settings, mut met) = (settings(pause(5)), None);
        meet(&mut settings, &mut met, moment(4));
        assert_eq!((settings.deadline, met), (pause(5), None));
        meet(&mut settings, &mut met, moment(5));
        assert_eq!((settings.deadline, met), (None, Some(moment(5))));
        meet(&mut settings, &mut met, moment(6));
        assert_eq!(met, Some(moment(5)));

        // The control plane has not heard of it yet.
        settings.deadline = pause(5);
        met = after_change(&mut settings, met);
        assert_eq!((settings.deadline, met), (None, Some(moment(5))));
        met = after_change(&mut settings, met);
        assert_eq!(met, Some(moment(5)), "it is told until there is another one");
        settings.deadline = pause(9);
        met = after_change(&mut settings, met);
        assert_eq!((settings.deadline, met), (pause(9), None));
    }

    #[test]
    fn a_deadline_that_kills_is_met_by_no_pause() {
        let kill = Some(Deadline { at: moment(0), action: TimeoutAction::Kill });
        assert_eq!(met_by_pause(kill, moment(9)), None);
        let mut settings = settings(kill);
        assert_eq!(after_change(&mut settings, Some(moment(0))), None);
        assert_eq!(settings.deadline, kill);
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Time passes.
        Wait(i64),
        /// Somebody asks for a deadline that lies ahead.
        Ask(i64),
        /// The settings are told again, as whoever has not heard of anything has them.
        Repeat,
        /// It is paused and resumed.
        Rest,
    }

    proptest! {
        /// Every deadline that was asked for pauses at most once, never early, and only if no other took its place.
        #[test]
        fn each_deadline_pauses_at_most_once(
            steps in prop::collection::vec(
                prop_oneof![
                    (0_i64..4).prop_map(Step::Wait),
                    (1_i64..6).prop_map(Step::Ask),
                    Just(Step::Repeat),
                    Just(Step::Rest),
                ],
                0..60,
            ),
        ) {
            let (mut agent, mut met) = (settings(None), None);
            let (mut told, mut now) = (None, 0);
            let mut pauses: Vec<Timestamp> = Vec::new();
            for step in steps {
                match step {
                    Step::Wait(seconds) => now += seconds,
                    Step::Ask(ahead) => {
                        told = pause(now + ahead);
                        agent.deadline = told;
                        met = after_change(&mut agent, met);
                    }
                    Step::Repeat => {
                        agent.deadline = told;
                        met = after_change(&mut agent, met);
                    }
                    Step::Rest => meet(&mut agent, &mut met, moment(now)),
                }
                // What its driver does as soon as it looks.
                if let Some(at) = met_by_pause(agent.deadline, moment(now)) {
                    prop_assert_eq!(Some(at), told.map(|deadline| deadline.at), "another took its place");
                    prop_assert!(!pauses.contains(&at), "{at} paused twice");
                    pauses.push(at);
                    meet(&mut agent, &mut met, moment(now));
                    prop_assert_eq!((agent.deadline, met), (None, Some(at)));
                }
            }
        }
    }
}
