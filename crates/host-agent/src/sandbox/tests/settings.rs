//! What of a sandbox can be changed: what may hold, and what its clocks make of it. Pure.

use std::{collections::BTreeMap, time::Duration};

use wrenn_types::{InactivityTimeout, NetworkPolicy, SandboxId, TimeoutAction};

use super::{
    IDLE_SECONDS,
    model::{Ask, State, Told},
    world::{spec, wall},
};
use crate::{
    network::Policy,
    sandbox::{Deadline, Settings, Status, Update, record::Record},
};

fn action(kills: bool) -> TimeoutAction {
    if kills { TimeoutAction::Kill } else { TimeoutAction::Pause }
}

/// A change of what becomes of it when it is idle.
pub(super) fn timeout(kills: bool) -> Box<Update> {
    let timeout = InactivityTimeout::new(IDLE_SECONDS).ok();
    Box::new(Update { timeout, on_timeout: Some(action(kills)), ..Update::default() })
}

/// A change of its deadline.
pub(super) fn deadline(kills: bool) -> Box<Update> {
    let at = wall() + Duration::from_secs(IDLE_SECONDS.unsigned_abs());
    let deadline = Some(Some(Deadline { at, action: action(kills) }));
    Box::new(Update { deadline, ..Update::default() })
}

/// A change of what it may reach.
pub(super) fn network(number: u8) -> Box<Update> {
    let denied = format!("203.0.113.{number}/32").parse().unwrap();
    let network = NetworkPolicy { deny_cidrs: vec![denied], ..NetworkPolicy::simple(true) };
    Box::new(Update { network: Some(network), ..Update::default() })
}

/// What may hold for each sandbox.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<SandboxId, Vec<Settings>>);

impl Known {
    /// What was asked of a sandbox, one after the other, and what was told.
    pub(super) fn answered(&mut self, id: &SandboxId, asked: &[(Ask, Told)]) {
        let all = self.0.entry(id.clone()).or_insert_with(|| vec![spec(id.clone(), None).settings]);
        for (ask, told) in asked {
            let Ask::Update(update) = ask else { continue };
            let changed = all.iter().map(|settings| settings.with(update)).collect::<Vec<_>>();
            match told {
                Told::Done => *all = changed,
                // The agent was killed.
                Told::Nothing => all.extend(changed),
                // What was asked for in vain changes nothing.
                Told::Failed | Told::Denied | Told::Late => {}
            }
        }
    }

    /// What was published, recorded and put in force of a sandbox, when nothing was under way.
    pub(super) fn seen(
        &mut self,
        id: &SandboxId,
        status: &Status,
        record: Option<&Record>,
        in_force: Option<Policy>,
    ) -> Result<(), String> {
        let seen = &status.settings;
        if let Some(record) = record
            && record.settings != *seen
        {
            return Err(format!("{id} has {seen:?}, and its record says {:?}", record.settings));
        }
        let wanted = Policy::resolve(&seen.network, &[]).map_err(|error| error.to_string())?;
        if in_force.is_some_and(|policy| policy != wanted) {
            return Err(format!("{id} may reach something else than {:?}", seen.network));
        }
        let may = self.0.entry(id.clone()).or_default();
        // A deadline that was met is none any more.
        let is_it = |settings: &Settings| {
            let met = settings.deadline.is_some_and(|deadline| Some(deadline.at) == status.deadline_met);
            let deadline = settings.deadline.filter(|_| !met);
            Settings { deadline, ..settings.clone() } == *seen
        };
        if !may.iter().any(is_it) {
            return Err(format!("{id} has {seen:?}, and that may be {may:?}"));
        }
        *may = vec![seen.clone()];
        Ok(())
    }

    /// One that is gone.
    pub(super) fn forget(&mut self, id: &SandboxId) {
        self.0.remove(id);
    }

    /// What a sandbox may be after more time than its clocks have.
    pub(super) fn slept(&self, id: &SandboxId, state: State) -> Vec<State> {
        use TimeoutAction::{Kill, Pause};
        let Some([settings]) = self.0.get(id).map(Vec::as_slice) else { return vec![state] };
        let idle = settings.timeout.duration().map(|_| settings.on_timeout);
        let deadline = settings.deadline.map(|deadline| deadline.action);
        match (state, idle, deadline) {
            (State::Absent, ..) | (_, _, Some(Kill)) => vec![State::Absent],
            (State::Up(_), Some(Kill), None) => vec![State::Absent],
            // Whichever comes first.
            (State::Up(content), Some(Kill), Some(Pause)) => vec![State::Absent, State::Paused(content)],
            (State::Up(content), Some(Pause), _) | (State::Up(content), None, Some(Pause)) => {
                vec![State::Paused(content)]
            }
            (State::Up(_), None, None) | (State::Paused(_) | State::PausedDisk(_), ..) => vec![state],
        }
    }
}
