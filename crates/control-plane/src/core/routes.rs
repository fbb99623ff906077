//! Which team a sandbox belongs to, what its guest asks of callers and how long it may be idle: these
//! hardly ever change, so they are remembered, and the database stays off the path of an exec. Whether the sandbox still runs is not
//! remembered: its host says so each time a tunnel is opened, and breaks the tunnels when it ends.
//!
//! ```text
//!  moment() ─► the row is read ─► remember(moment): only if nothing was forgotten since
//!                    └─ meanwhile the row is changed, and forget()
//! ```

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use wrenn_types::{AccessToken, InactivityTimeout, SandboxId, TeamId};

/// How many are remembered. With more, all are forgotten and asked for again.
const ROOM: usize = 65_536;

/// The way to one guest.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) token: AccessToken,
    pub(super) timeout: InactivityTimeout,
}

/// A moment at which no row had been read yet: what is read after it is true until something is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment {
    forgotten: u64,
}

#[derive(Debug, Default)]
pub(super) struct Routes {
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    routes: HashMap<SandboxId, (TeamId, Route)>,
    /// How often something was forgotten. One count for all of them: a row that is read meanwhile is only read again.
    forgotten: u64,
}

impl Routes {
    /// To be asked for before a row is read that shall be remembered.
    pub(super) fn moment(&self) -> Moment {
        Moment { forgotten: self.known.read().unwrap_or_else(PoisonError::into_inner).forgotten }
    }

    pub(super) fn find(&self, team: TeamId, id: &SandboxId) -> Option<Route> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let (owner, route) = known.routes.get(id)?;
        (*owner == team).then(|| route.clone())
    }

    /// Remembers what was read after `moment`, unless something was forgotten since: it may have been this.
    pub(super) fn remember(&self, moment: Moment, team: TeamId, id: SandboxId, route: Route) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.forgotten != moment.forgotten {
            return;
        }
        if known.routes.len() >= ROOM {
            known.routes.clear();
        }
        known.routes.insert(id, (team, route));
    }

    /// To be called after a row was changed.
    pub(super) fn forget(&self, id: &SandboxId) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.routes.remove(id);
        known.forgotten += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_before_a_change_is_not_remembered_after_it() {
        let (routes, team) = (Routes::default(), TeamId::new());
        let id: SandboxId = "sb-00000001".parse().unwrap();
        let route = || Route { token: AccessToken::random(), timeout: InactivityTimeout::default() };
        let moment = routes.moment();
        routes.remember(moment, team, id.clone(), route());
        assert!(routes.find(team, &id).is_some() && routes.find(TeamId::new(), &id).is_none());
        let before = routes.moment();
        routes.forget(&id);
        routes.remember(before, team, id.clone(), route());
        assert!(routes.find(team, &id).is_none());
        routes.remember(routes.moment(), team, id.clone(), route());
        assert!(routes.find(team, &id).is_some());
    }
}
