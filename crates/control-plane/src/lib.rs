//! The control plane: the public API, and the only writer of the database.
//!
//! ```text
//! callers ──HTTP, WebSocket──► http ──► core ──► store ──► PostgreSQL
//!                            translates  decides │
//!                                                ├─ host ── Connect RPC ──► host agent
//!                                                └─ guest ── its own protocol, through a tunnel ──► envd
//! callers ──any HTTP─────────► edge ──► core ───────└─ guest ── the same, through a tunnel ──► a program's port
//! ```
//!
//! - `http` translates; `edge` passes on; `core` decides; `store` remembers.
//! - `host` commands the host agent and opens tunnels; `guest` speaks to `envd` through them.
//! - Nothing that must outlive the process is anywhere but in the database: any number of these can run
//!   over one.
//!
//! [`start`] gives a [`Running`] server; [`run`] is that until a token is cancelled.

mod config;
mod core;
mod edge;
mod guest;
mod host;
mod http;
mod lingering;
mod store;

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_types::ApiKey;

pub use config::{Bounds, Config};
pub use edge::{ParseProxyDomainError, ProxyDomain};
pub use http::openapi;
pub use store::StoreError;

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database cannot be used.
    #[error("the database cannot be used")]
    Store(#[source] store::StoreError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The first API key cannot be written to its file.
    #[error("cannot write the first API key to {path}")]
    KeyFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A control plane that serves.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    record_stop: CancellationToken,
    tasks: TaskTracker,
    serving: JoinHandle<()>,
    recording: JoinHandle<()>,
    following: JoinHandle<()>,
    store: store::Store,
    bounds: Bounds,
}

impl Running {
    /// The address that it serves on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no new requests, lets those in flight end within a bound, writes what is still to be written,
    /// and closes the database. Sandboxes stay as they are.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        let drain = self.bounds.drain;
        let ended = tokio::time::timeout(drain * 2, async {
            let _ = self.serving.await;
            self.tasks.wait().await;
            let _ = self.following.await;
        });
        if ended.await.is_err() {
            tracing::warn!("work was still going on when the control plane stopped");
        }
        self.record_stop.cancel();
        if tokio::time::timeout(drain, self.recording).await.is_err() {
            tracing::warn!("audit entries were lost: the database did not take them");
        }
        let _ = tokio::time::timeout(drain, self.store.close()).await;
    }
}

/// Opens the database, makes the first team and key where there is none, and serves.
///
/// The host agent need not be there yet: it is connected to as soon as it is.
///
/// # Errors
/// [`StartError`] names what cannot be used.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let bounds = config.bounds;
    let store = store::Store::open(&config.database_url, bounds.database, bounds.database_start)
        .await
        .map_err(StartError::Store)?;
    if let Some(key) = store::first_key(&store).await.map_err(StartError::Store)? {
        publish_first_key(&key, config.first_key_file.as_deref())?;
    }
    let listen_error = |source| StartError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;

    let (stop, record_stop, tasks) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
    let (recorder, record) =
        core::Recorder::new(store.with_bound(bounds.database_patient), record_stop.clone());
    let core = core::Core::new(
        store.clone(),
        bounds.clone(),
        config.agent_socket,
        recorder,
        tasks.clone(),
        stop.clone(),
    );
    let recording = tokio::spawn(record);
    let following = tokio::spawn(core::follow_host(std::sync::Arc::clone(&core)));
    let surfaces = http::Surfaces {
        edge: config.proxy_domain.map(|domain| edge::Edge::new(std::sync::Arc::clone(&core), domain)),
        api: http::router(core),
    };
    let serving = tokio::spawn(http::serve(listener, surfaces, stop.clone(), bounds.drain));
    tracing::info!(%address, "the control plane serves");
    Ok(Running { address, stop, record_stop, tasks, serving, recording, following, store, bounds })
}

/// Serves until `shutdown` is cancelled; `ready` is called with the address once it does.
///
/// # Errors
/// [`StartError`] names what cannot be used.
pub async fn run(
    config: Config,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), StartError> {
    let running = start(config).await?;
    ready(running.address());
    shutdown.cancelled().await;
    running.stop().await;
    Ok(())
}

/// Shows the first key once: in its file, and on the log.
fn publish_first_key(key: &ApiKey, file: Option<&Path>) -> Result<(), StartError> {
    if let Some(path) = file {
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
            writeln!(file, "{}", key.expose())?;
            file.sync_all()
        };
        write().map_err(|source| StartError::KeyFile { path: path.to_owned(), source })?;
    }
    tracing::warn!(key = key.expose(), "made the team default and its first API key; it is not shown again");
    Ok(())
}
