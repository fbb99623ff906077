//! Which team a sandbox belongs to, what its guest asks of callers and how long it may be idle: these
//! hardly ever change, so they are remembered, and the database stays off the path of an exec. Whether the sandbox still runs is not
//! remembered: its host says so each time a tunnel is opened, and breaks the tunnels when it ends.

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

#[derive(Debug, Default)]
pub(super) struct Routes {
    routes: RwLock<HashMap<SandboxId, (TeamId, Route)>>,
}

impl Routes {
    pub(super) fn find(&self, team: TeamId, id: &SandboxId) -> Option<Route> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let (owner, route) = routes.get(id)?;
        (*owner == team).then(|| route.clone())
    }

    pub(super) fn remember(&self, team: TeamId, id: SandboxId, route: Route) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        if routes.len() >= ROOM {
            routes.clear();
        }
        routes.insert(id, (team, route));
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.routes.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}
