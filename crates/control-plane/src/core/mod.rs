//! What the control plane decides. It knows nothing of HTTP: the surfaces in [`crate::http`] translate.
//!
//! - [`auth`]: whose key it is. [`spec`]: what may be asked for.
//! - [`lifecycle`]: create, list, get, delete, ping.
//! - [`exec`]: commands and processes. [`files`]: files.
//! - [`plan`] and [`watch`]: what hosts say, compared with the database.
//! - [`recorder`]: the audit log and the times of last use.

mod auth;
mod error;
mod exec;
mod files;
mod lifecycle;
mod plan;
mod recorder;
mod routes;
pub(crate) mod spec;
mod watch;

use std::{
    collections::HashSet,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::watch as latest;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_types::{HostId, SandboxId};

use crate::{
    config::Bounds,
    guest::{Guest, Guests, Reach},
    host::{HostClient, Stage},
    store::{AuditEntry, Store},
};

pub(crate) use auth::Caller;
pub(crate) use error::CoreError;
pub(crate) use exec::{Control, Session, random_tag};
pub(crate) use files::Place;
pub(crate) use lifecycle::{Creation, Deletion, Listed};
pub(crate) use recorder::Recorder;
pub(crate) use watch::follow_host;

/// The state of a process of the control plane. All that must outlive it is in the database.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) store: Store,
    pub(crate) bounds: Bounds,
    host: HostClient,
    guests: Guests,
    recorder: Recorder,
    keys: auth::KnownKeys,
    routes: routes::Routes,
    /// What this process is creating now. Owned by the creates; the watch only looks.
    creating: Mutex<HashSet<SandboxId>>,
    /// The host, once it has been heard of.
    host_id: latest::Sender<Option<HostId>>,
    /// Work that goes on when its caller has gone.
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Core {
    pub(crate) fn new(
        store: Store,
        bounds: Bounds,
        agent_socket: std::path::PathBuf,
        recorder: Recorder,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            host: HostClient::new(agent_socket.clone(), bounds.host),
            guests: Guests::new(agent_socket, bounds.tunnel, bounds.guest),
            recorder,
            bounds,
            keys: auth::KnownKeys::default(),
            routes: routes::Routes::default(),
            creating: Mutex::default(),
            host_id: latest::Sender::new(None),
            tasks,
            stop,
        })
    }

    fn host_id(&self) -> Result<HostId, CoreError> {
        self.host_id.borrow().clone().ok_or(CoreError::NoHost)
    }

    fn is_creating(&self, id: &SandboxId) -> bool {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    fn creating_now(&self) -> HashSet<SandboxId> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        let place = self.recorder.reserve()?;
        let outcome = operation.await;
        let status = match &outcome {
            Ok(_) => "success".to_owned(),
            Err(error) => crate::http::code_word(error),
        };
        place.send(entry(caller, id.as_str(), action, status, metadata));
        outcome
    }

    /// The way to the guest of a sandbox that should be running.
    pub(crate) async fn guest(&self, caller: &Caller, id: &SandboxId) -> Result<Guest, CoreError> {
        let route = match self.routes.find(caller.team, id) {
            Some(route) => route,
            None => {
                let row = self.live_row(caller, id).await?;
                let route = routes::Route {
                    timeout: row.timeout(),
                    token: wrenn_types::AccessToken::from_stored(row.access_token),
                };
                self.routes.remember(caller.team, id.clone(), route.clone());
                route
            }
        };
        Ok(self.guests.of(id.clone(), route.token, route.timeout))
    }

    /// The row of a sandbox in a state in which its guest can be asked.
    async fn live_row(&self, caller: &Caller, id: &SandboxId) -> Result<crate::store::SandboxRow, CoreError> {
        use wrenn_types::SandboxState::{Missing, Running};
        let row = self.store.sandbox(caller.team, id).await?;
        let row = row.ok_or_else(|| CoreError::NoSuchSandbox(id.to_string()))?;
        match row.state() {
            // A missing sandbox may well be there: the tunnel will tell.
            Running | Missing => Ok(row),
            state => Err(CoreError::NotRunning { id: id.clone(), state, reason: row.end_message }),
        }
    }

    /// A guest's error as the caller should see it: where the sandbox has ended, that is the error, and not
    /// the broken connection that came of it.
    pub(crate) async fn explain(
        &self,
        caller: &Caller,
        id: &SandboxId,
        error: crate::guest::GuestError,
    ) -> CoreError {
        use crate::guest::GuestError;
        let gone = match &error {
            GuestError::Tunnel { reach: Reach::SandboxGone, .. } => true,
            GuestError::Lost(_) | GuestError::Tunnel { reach: Reach::AgentSilent, .. } => {
                // The connection may have broken because the sandbox has ended a moment ago.
                match self.host.sandbox(id).await {
                    Ok(Some(observed)) => matches!(observed.stage, Stage::Stopping | Stage::Stopped),
                    Ok(None) => true,
                    Err(_) => false,
                }
            }
            _ => false,
        };
        if !gone {
            return error.into();
        }
        self.routes.forget(id);
        match self.live_row(caller, id).await {
            // The host has ended it and has not yet been heard of it.
            Ok(_) => CoreError::NotRunning {
                id: id.clone(),
                state: wrenn_types::SandboxState::Stopped,
                reason: Some("it has ended on its host".to_owned()),
            },
            Err(known) => known,
        }
    }
}

fn entry(
    caller: &Caller,
    resource: &str,
    action: &'static str,
    status: String,
    metadata: Value,
) -> AuditEntry {
    AuditEntry {
        team: caller.team.0,
        actor_id: caller.key.to_string(),
        actor_name: caller.key_name.clone(),
        resource_id: resource.to_owned(),
        action,
        status,
        metadata,
        at: Timestamp::now(),
    }
}

impl Core {
    /// Work that goes on when its caller has gone.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Ends when the control plane is to stop.
    pub(crate) async fn stopping(&self) {
        self.stop.cancelled().await;
    }
}
