//! `wrenn dev`: a whole stack in one process tree.
//!
//! ```text
//!   wrenn dev (supervisor, holds the lock of DIR)
//!     ├── postgres …            private cluster, unless DATABASE_URL names another database
//!     ├── wrenn agent …         its VMMs live in sessions of their own
//!     └── wrenn control-plane … the public API
//!
//!   claim DIR ─► collect leftovers ─► postgres ─► agent ─► control plane ─► env, ready line
//!                                                                              │ SIGINT, SIGTERM, SIGHUP
//!                                        done ◄─ postgres ◄─ agent ◄─ control plane   (in this order, each bounded)
//! ```
//!
//! - Each child has a keeper (see `keeper.rs`): a child that ends by itself is started again, at once if it had served
//!   for a while, and one that dies young again and again takes the stack down with an error that shows the end of its log.
//! - Stopping the agent destroys the sandboxes that run, unless the stack was started with `--on-stop leave`: then they go
//!   on, and the next start takes them over. It is stopped after the control plane, so that no create comes in between,
//!   and before the database.
//! - A second signal makes stopping quick: children are killed, and the next start collects what they leave.
//! - If the supervisor is killed, the kernel tells its children to stop. If all of them are killed, the next start
//!   finds what is left by the instance id and the data directory, never by a name that another stack could have.
//!
//! The supervisor runs on a runtime with one thread; see [`unprivileged::die_with`] for why.

mod directory;
pub mod env_file;
mod files;
mod identity;
mod keeper;
mod leftovers;
mod policy;
mod postgres;
pub mod unprivileged;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use camino::Utf8PathBuf;
use clap::ValueEnum as _;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::{
    process::Command,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use wrenn_control_plane::ProxyDomain;
use wrenn_host_agent::config::{OnControlPlaneLoss, OnStop};
use wrenn_types::ApiKey;

pub use self::{
    directory::{Claim, ClaimError, Directory, RUN_ROOT},
    identity::ProcessIdentity,
    keeper::KeeperError,
    postgres::PostgresError,
};
use self::{
    files::PRIVATE,
    keeper::{Keeper, Readiness, Ready, Recipe, Shared},
    leftovers::Children,
    postgres::{Cluster, own_executable},
};

/// How long a database may take to be ready: it may have to replay its log first.
const POSTGRES_READY: Duration = Duration::from_secs(120);
/// How long a host agent may take: it probes the accelerators and collects what an earlier one left.
const AGENT_READY: Duration = Duration::from_secs(300);
/// How long a control plane may take: it migrates the database.
const CONTROL_PLANE_READY: Duration = Duration::from_secs(60);

/// What a stack is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory of the stack.
    pub directory: Utf8PathBuf,
    /// Where run directories are, [`RUN_ROOT`] for everyone.
    pub run_root: Utf8PathBuf,
    /// Where the public API listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The domain of the host names of ports.
    pub proxy_domain: ProxyDomain,
    /// Guest bundle and templates.
    pub images: Utf8PathBuf,
    /// Warm snapshots.
    pub snapshots: Utf8PathBuf,
    /// Network slots the agent makes ahead, if not its default.
    pub ready_slots: Option<u32>,
    /// The network namespace that the agent uses as its way out, if not the root namespace.
    pub uplink_netns: Option<String>,
    /// What the agent does with running sandboxes when the control plane is lost, if not its default.
    pub on_control_plane_loss: Option<OnControlPlaneLoss>,
    /// What becomes of running sandboxes when the stack is stopped.
    pub on_stop: OnStop,
    /// After how many seconds it is, if not the agent's default.
    pub control_plane_loss_after: Option<u32>,
    /// A database to use instead of a private one.
    pub database_url: Option<String>,
    /// The program started for agent and control plane, if not this one.
    pub executable: Option<Utf8PathBuf>,
}

/// A child of the supervisor, in the order of the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The private database.
    Postgres,
    /// The host agent.
    Agent,
    /// The control plane.
    ControlPlane,
}

impl Role {
    fn log_name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres.log",
            Self::Agent => "agent.log",
            Self::ControlPlane => "control-plane.log",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Postgres => "PostgreSQL",
            Self::Agent => "the host agent",
            Self::ControlPlane => "the control plane",
        })
    }
}

/// Something a person who watches wants to know.
#[derive(Debug, Clone)]
pub enum Event {
    /// A child is being started.
    Starting {
        /// Which child.
        role: Role,
    },
    /// A child takes long.
    StillStarting {
        /// Which child.
        role: Role,
        /// Since when.
        since: Duration,
        /// Where it logs.
        log: Utf8PathBuf,
    },
    /// A child is ready.
    Ready {
        /// Which child.
        role: Role,
        /// How long it took.
        after: Duration,
    },
    /// A child ended by itself and is started again.
    Restarting {
        /// Which child.
        role: Role,
        /// What happened.
        why: String,
        /// The pause before the start.
        pause: Duration,
    },
    /// A child is told to stop.
    Stopping {
        /// Which child.
        role: Role,
    },
    /// A child is killed, because it did not stop in time or a second signal came.
    Killing {
        /// Which child.
        role: Role,
    },
    /// Everything is ready.
    StackReady(StackReady),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting { role } => write!(f, "starting {role}"),
            Self::StillStarting { role, since, log } => {
                write!(f, "still waiting for {role} after {} s (its log: {log})", since.as_secs())
            }
            Self::Ready { role, after } => write!(f, "{role} is ready after {:.1} s", after.as_secs_f64()),
            Self::Restarting { why, pause, .. } => {
                let when = if pause.is_zero() {
                    "now".to_owned()
                } else {
                    format!("in {:.1} s", pause.as_secs_f64())
                };
                write!(f, "{why}\nstarting it again {when}")
            }
            Self::Stopping { role } => write!(f, "stopping {role}"),
            Self::Killing { role } => write!(f, "killing {role}"),
            Self::StackReady(ready) => write!(f, "ready on {}", ready.base_url),
        }
    }
}

/// Is told what happens.
pub type Observer = Arc<dyn Fn(Event) + Send + Sync>;

/// The ready line of a stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackReady {
    /// Always true.
    pub ready: bool,
    /// Where the public API is.
    pub base_url: String,
    /// Below which host names the ports of sandboxes are, with the port to connect to.
    #[serde(default)]
    pub proxy_domain: String,
    /// The first API key; none if the database was there before and its key is not known here.
    pub api_key: Option<String>,
    /// The directory of the stack.
    pub dir: Utf8PathBuf,
}

/// Why a stack did not come up or did not stay up.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The directory is not ours to use.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// There is no database.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// A child failed.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// What an earlier run left cannot be collected.
    #[error("cannot collect what an earlier run left in {directory}")]
    Collect {
        /// The directory of the stack.
        directory: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control plane did not say where it listens.
    #[error("the control plane is ready but did not say where it listens")]
    NoAddress,
    /// The result could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Runs a stack until a signal ends it.
///
/// # Errors
/// [`StackError`] if it does not come up or stay up; everything that was started is stopped by then.
pub async fn run(config: Config, observer: Observer) -> Result<(), StackError> {
    let mut signals = Signals::new().map_err(StackError::Signals)?;
    let claim = Claim::take(&config.directory, &config.run_root).await?;
    let children = Children::new(claim.directory.children());
    let collect = async {
        children.collect().await?;
        claim.clear_run_directory()
    };
    tokio::select! {
        result = collect => {
            let directory = claim.directory.root().to_owned();
            result.map_err(|source| StackError::Collect { directory, source })?;
        }
        () = signals.next() => return Ok(()),
    }

    let (failures_in, mut failures) = mpsc::unbounded_channel();
    let shared = Shared {
        observer,
        children: Arc::new(Mutex::new(children)),
        failures: failures_in,
        force: CancellationToken::new(),
    };
    let mut stack = Stack { config, claim, shared, keepers: Vec::new() };
    let outcome = tokio::select! {
        biased;
        () = signals.next() => Ok(()),
        Some(failure) = failures.recv() => Err(failure.into()),
        result = stack.bring_up() => match result {
            Err(error) => Err(error),
            // It is up: now only a signal or a failure ends it.
            Ok(()) => tokio::select! {
                () = signals.next() => Ok(()),
                Some(failure) = failures.recv() => Err(failure.into()),
            },
        },
    };
    stack.stop(&mut signals).await;
    outcome
}

struct Stack {
    config: Config,
    claim: Claim,
    shared: Shared,
    keepers: Vec<Keeper>,
}

impl Stack {
    async fn bring_up(&mut self) -> Result<(), StackError> {
        let database_url = match &self.config.database_url {
            Some(url) => url.clone(),
            None => {
                let cluster = Arc::new(Cluster::find(&self.claim)?);
                let url = cluster.url();
                self.keep(self.postgres(cluster)).await;
                url
            }
        };
        self.keep(self.agent()).await;
        let ready = self.keep(self.control_plane(database_url)).await;
        let address = ready.address.ok_or(StackError::NoAddress)?;
        self.announce(address)
    }

    /// Starts a child and waits until it is ready. A failure ends the stack over the channel of failures.
    async fn keep(&mut self, recipe: Recipe) -> Ready {
        self.keepers.push(Keeper::start(recipe, self.shared.clone()));
        match self.keepers.last_mut() {
            Some(keeper) => keeper.ready().await,
            None => std::future::pending().await,
        }
    }

    fn postgres(&self, cluster: Arc<Cluster>) -> Recipe {
        let server = Arc::clone(&cluster);
        Recipe {
            role: Role::Postgres,
            command: Box::new(move |_| own_executable(&server.server())),
            log: self.claim.directory.log(Role::Postgres),
            readiness: Readiness::Postgres(cluster),
            ready_within: POSTGRES_READY,
            // Fast shutdown, then immediate shutdown.
            stop: vec![(Signal::INT, Duration::from_secs(20)), (Signal::QUIT, Duration::from_secs(5))],
        }
    }

    fn agent(&self) -> Recipe {
        let mut arguments = vec!["agent".to_owned()];
        let mut flag = |name: &str, value: &str| arguments.extend([name.to_owned(), value.to_owned()]);
        flag("--dir", self.claim.directory.root().as_str());
        flag("--images", self.config.images.as_str());
        flag("--snapshots", self.config.snapshots.as_str());
        flag("--socket", self.claim.agent_socket().as_str());
        if let Some(what) = self.config.on_stop.to_possible_value() {
            flag("--on-stop", what.get_name());
        }
        if let Some(slots) = self.config.ready_slots {
            flag("--ready-slots", &slots.to_string());
        }
        if let Some(name) = &self.config.uplink_netns {
            flag("--uplink-netns", name);
        }
        if let Some(policy) = self.config.on_control_plane_loss.and_then(|policy| policy.to_possible_value())
        {
            flag("--on-control-plane-loss", policy.get_name());
        }
        if let Some(seconds) = self.config.control_plane_loss_after {
            flag("--control-plane-loss-after", &seconds.to_string());
        }
        let child = self.child();
        Recipe {
            role: Role::Agent,
            command: Box::new(move |_| child.command(&arguments)),
            log: self.claim.directory.log(Role::Agent),
            readiness: Readiness::Line,
            ready_within: AGENT_READY,
            // It destroys every sandbox before it ends, and bounds that itself.
            stop: vec![(Signal::TERM, Duration::from_secs(90))],
        }
    }

    fn control_plane(&self, database_url: String) -> Recipe {
        let child = self.child();
        let listen = self.config.listen;
        let proxy_domain = self.config.proxy_domain.clone();
        let socket = self.claim.agent_socket();
        let first_key = self.claim.directory.first_key();
        Recipe {
            role: Role::ControlPlane,
            command: Box::new(move |last| {
                // A free port is chosen once: clients keep the address over a restart.
                let listen = last.and_then(|ready| ready.address).unwrap_or(listen);
                let arguments = [
                    "control-plane",
                    "--listen",
                    &listen.to_string(),
                    "--proxy-domain",
                    proxy_domain.as_str(),
                    "--agent-socket",
                    socket.as_str(),
                    "--first-key-file",
                    first_key.as_str(),
                ];
                let mut command = child.command(&arguments.map(str::to_owned));
                // Not as an argument: it may hold a password, and arguments are for everyone to see.
                command.env("DATABASE_URL", &database_url);
                command
            }),
            log: self.claim.directory.log(Role::ControlPlane),
            readiness: Readiness::Line,
            ready_within: CONTROL_PLANE_READY,
            // It ends what is in flight, and bounds that itself.
            stop: vec![(Signal::TERM, Duration::from_secs(45))],
        }
    }

    fn child(&self) -> ChildProgram {
        ChildProgram {
            executable: self.config.executable.clone(),
            supervisor: rustix::process::getpid().as_raw_nonzero().get(),
        }
    }

    /// Writes what clients need, and says that everything is ready.
    fn announce(&self, address: SocketAddr) -> Result<(), StackError> {
        let directory = &self.claim.directory;
        let base_url = format!("http://{}", reachable(address));
        let proxy_domain = format!("{}:{}", self.config.proxy_domain, address.port());
        let api_key = known_key(directory);
        let mut variables =
            vec![(env_file::BASE_URL, base_url.as_str()), (env_file::PROXY_DOMAIN, proxy_domain.as_str())];
        variables.extend(api_key.as_ref().map(|key| (env_file::API_KEY, key.expose())));
        let write = |path: Utf8PathBuf, content: &[u8]| {
            files::write_atomically(&path, PRIVATE, content)
                .map_err(|source| StackError::Write { path, source })
        };
        write(directory.env(), env_file::render(&variables).as_bytes())?;

        let ready = StackReady {
            ready: true,
            base_url,
            proxy_domain,
            api_key: api_key.as_ref().map(|key| key.expose().to_owned()),
            dir: directory.root().to_owned(),
        };
        let line = serde_json::to_vec(&ready)
            .map_err(|error| StackError::Write { path: directory.ready(), source: error.into() })?;
        write(directory.ready(), &line)?;
        (self.shared.observer)(Event::StackReady(ready));
        Ok(())
    }

    /// Stops all children, the last started first. One more signal makes it quick.
    async fn stop(self, signals: &mut Signals) {
        let Self { claim, shared, keepers, .. } = self;
        let stopping = async {
            for keeper in keepers.into_iter().rev() {
                keeper.stop().await;
            }
        };
        tokio::pin!(stopping);
        loop {
            tokio::select! {
                () = &mut stopping => break,
                () = signals.next(), if !shared.force.is_cancelled() => shared.force.cancel(),
            }
        }
        if let Err(error) = claim.release() {
            // The next start cleans it as well.
            tracing::warn!(%error, "cannot clean the run directory");
        }
    }
}

/// How agent and control plane are started.
#[derive(Debug)]
struct ChildProgram {
    executable: Option<Utf8PathBuf>,
    supervisor: i32,
}

impl ChildProgram {
    fn command(&self, arguments: &[String]) -> Command {
        // The link is resolved in the child, which is still this program, even when its file was replaced.
        let program = self.executable.as_ref().map_or("/proc/self/exe", |path| path.as_str());
        let mut command = Command::new(program);
        command.arg0("wrenn").args(arguments).args(["--supervisor", &self.supervisor.to_string()]);
        // A group of its own: Ctrl-C in a terminal goes to the supervisor, which stops things in order.
        command.stdin(Stdio::null()).process_group(0);
        command
    }
}

/// The signals that end a stack.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// The key that the control plane wrote at its first start, else the one of the env file there is.
fn known_key(directory: &Directory) -> Option<ApiKey> {
    let first = std::fs::read_to_string(directory.first_key()).ok();
    let first = first.and_then(|text| text.trim().parse().ok());
    first.or_else(|| {
        let env = std::fs::read_to_string(directory.env()).ok()?;
        env_file::lookup(&env, env_file::API_KEY)?.parse().ok()
    })
}

/// An address that a client on this machine can connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, address.port()).into(),
        _ => address,
    }
}

/// How a look for a running stack went.
#[derive(Debug)]
pub enum Found {
    /// It is ready.
    Ready(StackReady),
    /// Nothing runs.
    Nothing,
    /// It runs but was not ready within the bound.
    NotReady(ProcessIdentity),
}

/// Looks for the running stack of a directory and waits until it is ready.
///
/// # Errors
/// Whatever the file system answers.
pub async fn find(directory: &Directory, bound: Duration) -> io::Result<Found> {
    let deadline = Instant::now() + bound;
    loop {
        let Some(holder) = directory.holder()? else { return Ok(Found::Nothing) };
        if let Ok(text) = std::fs::read(directory.ready())
            && let Ok(ready) = serde_json::from_slice(&text)
        {
            return Ok(Found::Ready(ready));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Found::NotReady(holder));
        }
        // A file of another process appears: there is no event to wait for, but its end is noticed at once.
        holder.wait_gone(left.min(Duration::from_millis(100))).await?;
    }
}

/// How stopping a stack went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It ran, and has ended.
    Ended,
    /// It did not run.
    Nothing,
    /// It still runs after the bound.
    StillRuns(ProcessIdentity),
}

/// Stops the running stack of a directory.
///
/// # Errors
/// Whatever the kernel or the file system answers.
pub async fn stop(directory: &Directory, bound: Duration) -> io::Result<Stopped> {
    // Longer than killing all children takes.
    const QUICK: Duration = Duration::from_secs(30);
    let Some(holder) = directory.holder()? else { return Ok(Stopped::Nothing) };
    // To stop in order, and if that takes too long to stop quickly.
    for bound in [bound, QUICK] {
        holder.signal(Signal::TERM)?;
        if holder.wait_gone(bound).await? {
            return Ok(Stopped::Ended);
        }
    }
    Ok(Stopped::StillRuns(holder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_an_address_it_can_use() {
        for (listens, reached) in [
            ("127.0.0.1:8000", "127.0.0.1:8000"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
        ] {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), reached);
        }
    }
}
