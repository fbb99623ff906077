//! What the control plane decides. It knows nothing of HTTP: the surfaces in [`crate::http`] and
//! [`crate::edge`] translate.
//!
//! - [`auth`]: whose key it is. [`spec`]: what may be asked for.
//! - [`lifecycle`]: create, list, get, delete, ping. [`persist`]: pause, resume, rollback. [`snapshots`] and
//!   [`fork`]: copies. [`settings`]: what a sandbox may reach, and when its time is over.
//! - [`metrics`]: what a sandbox has used. [`exec`]: commands and processes. [`files`]: files.
//! - [`plan`] and [`watch`]: what hosts say, compared with the database. [`busy`]: what the watch leaves alone.
//! - [`audit`]: what goes into the audit log. [`recorder`]: how that and the times of last use are written.

mod audit;
mod auth;
mod busy;
mod error;
mod exec;
mod files;
mod fork;
mod hosts;
mod lifecycle;
mod metrics;
mod persist;
mod plan;
mod recorder;
mod routes;
pub(crate) mod settings;
mod snapshots;
pub(crate) mod spec;
mod watch;

use std::{
    collections::HashSet,
    future::Future,
    num::NonZeroU16,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, watch as latest},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_types::{AccessToken, HostId, SandboxId, SandboxState, TeamId};

use crate::{
    config::Bounds,
    guest::{Guest, GuestError, Guests, Outgoing, Reach},
    host::{HostClient, Stage},
    store::{SandboxRow, Store},
};

pub(crate) use auth::Caller;
pub(crate) use error::CoreError;
pub(crate) use exec::{Control, Session, random_tag};
pub(crate) use files::Place;
pub(crate) use fork::{Forking, Litter};
pub(crate) use lifecycle::{Creation, Deletion, Listed};
pub(crate) use persist::{Change, Verb};
pub(crate) use recorder::Recorder;
pub(crate) use snapshots::{Order, Snapshotting};
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
    busy: busy::BusySandboxes,
    /// Wakes those who wait for what becomes of a sandbox.
    moved: Notify,
    /// The names of the host's templates, as it last told them. Written by who asks the host.
    platform: RwLock<HashSet<String>>,
    /// The host, once it has been heard of.
    host_id: latest::Sender<Option<HostId>>,
    /// The last loss of the control plane of which the host has told, so that it is in the log once.
    loss_told: Mutex<Option<Timestamp>>,
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
            busy: busy::BusySandboxes::default(),
            moved: Notify::new(),
            platform: RwLock::default(),
            host_id: latest::Sender::new(None),
            loss_told: Mutex::default(),
            tasks,
            stop,
        })
    }

    /// The host. One that was not heard of since the start is waited for: it tells of itself in a moment.
    async fn host_id(&self) -> Result<HostId, CoreError> {
        let mut told = self.host_id.subscribe();
        let host = timeout(self.bounds.host, told.wait_for(Option::is_some)).await;
        host.ok().and_then(Result::ok).and_then(|host| host.clone()).ok_or(CoreError::NoHost)
    }

    /// Whether a name is one of the host's templates.
    fn is_platform(&self, name: &str) -> bool {
        self.platform.read().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// The way to the guest of a sandbox that should be running. One that is paused and asks for it is resumed; of one that
    /// resumes by itself it is certain that it did not sleep a moment ago, so that it can be sent what is sent only once.
    async fn guest(self: &Arc<Self>, caller: &Caller, id: &SandboxId) -> Result<Guest, CoreError> {
        if let Some(route) = self.routes.find(caller.team, id) {
            return Ok(self.guests.of(id.clone(), route.token, route.timeout));
        }
        let moment = self.routes.moment();
        let row = self.settled_row(caller, id).await?;
        let row = if sleeps(&row) { self.wake(caller, id).await? } else { is_live(row, id)? };
        let route = self.remember_route(moment, caller.team, id, &row);
        Ok(self.guests.of(id.clone(), route.token, route.timeout))
    }

    /// Asks a guest for something. One that resumes by itself is asked only when its host says that it runs: what is sent
    /// over a connection that a pause is just breaking may have been done or not, and is not sent again. One that is paused
    /// in the meantime, and refused the connection, is woken and asked once more: nothing has been sent to it then.
    async fn ask_guest<T, F>(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        ask: impl Fn(Guest) -> F,
    ) -> Result<(Guest, T), CoreError>
    where
        F: Future<Output = Result<T, GuestError>>,
    {
        let guest = self.guest(caller, id).await?;
        let error = match ask(guest.clone()).await {
            Ok(answer) => return Ok((guest, answer)),
            Err(error) => error,
        };
        let was_sent = !matches!(error, GuestError::Tunnel { reach: Reach::SandboxGone, .. });
        if was_sent || !self.is_asleep(caller, id).await {
            return Err(self.explain(caller, id, error).await);
        }
        let guest = self.guest(caller, id).await?;
        match ask(guest.clone()).await {
            Ok(answer) => Ok((guest, answer)),
            Err(error) => Err(self.explain(caller, id, error).await),
        }
    }

    /// Sends a request to a port of a sandbox, which is woken if it has to be. Nothing is in the audit log of it, as of no
    /// traffic that a caller has with a program.
    pub(crate) async fn send_to_port(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        port: NonZeroU16,
        outgoing: &Outgoing,
    ) -> Result<http::Response<hyper::body::Incoming>, CoreError> {
        let ask = |guest: Guest| async move { guest.send_to_port(port, outgoing).await };
        let (_, response) = self.ask_guest(caller, id, ask).await?;
        self.recorder.sandbox_used(id, Timestamp::now());
        Ok(response)
    }

    /// Whether the host says that a sandbox runs.
    pub(crate) async fn runs(&self, id: &SandboxId) -> bool {
        let seen = self.host.sandbox(id).await;
        matches!(seen, Ok(Some(seen)) if matches!(seen.stage, Stage::Running | Stage::Snapshotting))
    }

    /// Whether a sandbox resumes by itself and has to. Where the row says that it runs, its host may know better: what
    /// that says is written first.
    async fn is_asleep(&self, caller: &Caller, id: &SandboxId) -> bool {
        self.settled_row(caller, id).await.is_ok_and(|row| sleeps(&row))
    }

    /// The row of a sandbox: of one that resumes by itself once what its host says is written there.
    async fn settled_row(&self, caller: &Caller, id: &SandboxId) -> Result<SandboxRow, CoreError> {
        use SandboxState::{Missing, Running};
        let row = self.row(caller.team, id).await?;
        match row.state() {
            Running | Missing if row.auto_resume => {
                watch::settle_now(self, id, row.generation).await?;
                self.row(caller.team, id).await
            }
            _ => Ok(row),
        }
    }

    /// Remembers the way to a guest, if it can be trusted without a look at the row: one that resumes by itself
    /// has to be found paused *before* its guest is asked. The row was read after `moment`.
    fn remember_route(
        &self,
        moment: routes::Moment,
        team: TeamId,
        id: &SandboxId,
        row: &SandboxRow,
    ) -> routes::Route {
        let token = AccessToken::from_stored(row.access_token.clone());
        let route = routes::Route { timeout: row.timeout(), token };
        if !row.auto_resume {
            self.routes.remember(moment, team, id.clone(), route.clone());
        }
        route
    }

    /// The row of a sandbox in a state in which its guest can be asked.
    async fn live_row(&self, caller: &Caller, id: &SandboxId) -> Result<SandboxRow, CoreError> {
        is_live(self.row(caller.team, id).await?, id)
    }

    /// A guest's error as the caller should see it: where the sandbox has ended or is paused, that is the error,
    /// and not the broken connection that came of it.
    pub(crate) async fn explain(&self, caller: &Caller, id: &SandboxId, error: GuestError) -> CoreError {
        let refused = matches!(&error, GuestError::Tunnel { reach: Reach::SandboxGone, .. });
        let broken =
            matches!(&error, GuestError::Lost(_) | GuestError::Tunnel { reach: Reach::AgentSilent, .. });
        if !refused && !broken {
            return error.into();
        }
        // The connection may have broken because of what has happened to the sandbox a moment ago.
        let state = match self.host.sandbox(id).await {
            Ok(Some(observed)) => match observed.stage {
                Stage::Starting | Stage::Running | Stage::Snapshotting | Stage::Unreadable => {
                    return error.into();
                }
                Stage::Stopping | Stage::Stopped => SandboxState::Stopped,
                stage @ (Stage::Pausing | Stage::Paused | Stage::Resuming) => stage.state(),
            },
            Ok(None) => SandboxState::Stopped,
            Err(_) if refused => SandboxState::Stopped,
            Err(_) => return error.into(),
        };
        self.routes.forget(id);
        match self.live_row(caller, id).await {
            // The host has not been heard of it yet.
            Ok(_) => {
                let reason = state.is_final().then(|| "it has ended on its host".to_owned());
                CoreError::NotRunning { id: id.clone(), state, reason }
            }
            Err(known) => known,
        }
    }
}

/// Whether a sandbox has no guest and gets one by itself.
fn sleeps(row: &SandboxRow) -> bool {
    use SandboxState::{Paused, Pausing, Resuming};
    row.auto_resume && matches!(row.state(), Paused | Pausing | Resuming)
}

fn is_live(row: SandboxRow, id: &SandboxId) -> Result<SandboxRow, CoreError> {
    use SandboxState::{Missing, Running, Snapshotting};
    match row.state() {
        // A missing sandbox may well be there: the tunnel will tell.
        Running | Missing | Snapshotting => Ok(row),
        _ => Err(persist::wrong_state(id, &row)),
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
