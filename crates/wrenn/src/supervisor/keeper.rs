//! Keeping one child process alive.
//!
//! ```text
//!            ┌───────────────── pause, from the restart policy ◄──────────────┐
//!            ▼                                                                │
//!   ──► start it ──► wait until it is ready ──► publish ──► wait ──► it ended by itself
//!            │             │ (bounded)                        │               │ young, too often
//!            ▼             ▼                                  ▼               ▼
//!        failure: at the first start at once              told to stop     failure
//! ```
//!
//! A keeper is one task, and the only owner of its process.
//! It is told to stop by a token, and reports a failure once, over a channel that all keepers share.

use std::{
    io,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use camino::Utf8PathBuf;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    Event, Observer, Role, files,
    identity::ProcessIdentity,
    leftovers::Children,
    policy::{RestartPolicy, Verdict},
    postgres::{Cluster, PostgresError},
};

/// How often a long wait is reported.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What a child says on its standard output when it is ready.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Ready {
    ready: bool,
    /// Where it listens, if it listens on TCP.
    pub(super) address: Option<std::net::SocketAddr>,
}

/// How a child shows that it is ready.
#[derive(Debug, Clone)]
pub(super) enum Readiness {
    /// One line of JSON on its standard output.
    Line,
    /// PostgreSQL's own way.
    Postgres(Arc<Cluster>),
}

/// Makes the command to run; it is given what the child said when it was ready the last time.
pub(super) type MakeCommand = Box<dyn Fn(Option<&Ready>) -> Command + Send + Sync>;

/// What to run, and how long each thing may take.
pub(super) struct Recipe {
    pub(super) role: Role,
    pub(super) command: MakeCommand,
    pub(super) log: Utf8PathBuf,
    pub(super) readiness: Readiness,
    pub(super) ready_within: Duration,
    /// Signals to stop it with, and how long each may take. After the last comes SIGKILL.
    pub(super) stop: Vec<(Signal, Duration)>,
}

/// Why a child is not kept any more.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// It could not be started.
    #[error("cannot start {role}")]
    Start {
        /// Which child.
        role: Role,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The way for it could not be cleared.
    #[error("cannot start {role}")]
    Prepare {
        /// Which child.
        role: Role,
        /// Why.
        #[source]
        source: PostgresError,
    },
    /// It ended before it was ready.
    #[error("{role} ended before it was ready ({status}); the end of {log}:\n{}", .tail.join("\n"))]
    EndedEarly {
        /// Which child.
        role: Role,
        /// How it ended.
        status: String,
        /// Its log.
        log: Utf8PathBuf,
        /// The end of its log.
        tail: Vec<String>,
    },
    /// It was not ready in time.
    #[error("{role} was not ready within {} s; the end of {log}:\n{}", .bound.as_secs(), .tail.join("\n"))]
    NotReady {
        /// Which child.
        role: Role,
        /// The bound.
        bound: Duration,
        /// Its log.
        log: Utf8PathBuf,
        /// The end of its log.
        tail: Vec<String>,
    },
    /// It ended again and again, and never served for long.
    #[error("{role} ended {times} times in a row soon after its start, so it is not started again")]
    TooOften {
        /// Which child.
        role: Role,
        /// How often.
        times: u32,
        /// How the last time went.
        #[source]
        last: Box<KeeperError>,
    },
    /// It ended by itself after it had been ready.
    #[error("{role} ended by itself ({status}); the end of {log}:\n{}", .tail.join("\n"))]
    Ended {
        /// Which child.
        role: Role,
        /// How it ended.
        status: String,
        /// Its log.
        log: Utf8PathBuf,
        /// The end of its log.
        tail: Vec<String>,
    },
}

/// What all keepers of a stack share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) observer: Observer,
    pub(super) children: Arc<Mutex<Children>>,
    pub(super) failures: mpsc::UnboundedSender<KeeperError>,
    /// Cancelled when stopping has to be quick.
    pub(super) force: CancellationToken,
}

impl Shared {
    fn observe(&self, event: Event) {
        (self.observer)(event);
    }

    fn record(&self, role: Role, process: Option<ProcessIdentity>) {
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = children.record(role, process) {
            // The record only helps the start after a kill, so running goes on without it.
            tracing::warn!(%role, %error, "cannot record a child process");
        }
    }
}

/// The handle of the task that keeps a child.
pub(super) struct Keeper {
    role: Role,
    stop: CancellationToken,
    ready: watch::Receiver<Option<Ready>>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Starts to keep a child.
    pub(super) fn start(recipe: Recipe, shared: Shared) -> Self {
        let (publish, ready) = watch::channel(None);
        let stop = CancellationToken::new();
        let role = recipe.role;
        let keeping = Keeping { recipe, shared: shared.clone(), publish, stop: stop.clone() };
        let task = tokio::spawn(async move {
            if let Err(error) = keeping.keep().await {
                // A receiver that is gone has seen a failure before and is stopping everything.
                let _ = shared.failures.send(error);
            }
        });
        Self { role, stop, ready, task }
    }

    /// Waits until the child is ready for the first time. Never ends if it fails: that goes over the channel.
    pub(super) async fn ready(&mut self) -> Ready {
        if let Ok(ready) = self.ready.wait_for(Option::is_some).await
            && let Some(ready) = ready.clone()
        {
            return ready;
        }
        std::future::pending().await
    }

    /// Stops the child and waits for its end, which the recipe and the force token bound.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(role = %self.role, %error, "a keeper failed");
        }
    }
}

/// How the wait for something of a child ended.
enum Outcome<T> {
    Happened(T),
    Stop,
}

/// A child that runs.
struct Running {
    child: Child,
    pid: Pid,
    stdout: Option<ChildStdout>,
    log_start: u64,
    started: Instant,
    ready_at: Option<Instant>,
}

/// The end of a child that nobody asked for.
struct Death {
    error: KeeperError,
    /// How long it had been ready, if it ever was.
    ready_for: Option<Duration>,
}

impl Death {
    fn unready(error: KeeperError) -> Self {
        Self { error, ready_for: None }
    }
}

struct Keeping {
    recipe: Recipe,
    shared: Shared,
    publish: watch::Sender<Option<Ready>>,
    stop: CancellationToken,
}

impl Keeping {
    async fn keep(self) -> Result<(), KeeperError> {
        let role = self.recipe.role;
        let mut policy = RestartPolicy::default();
        loop {
            let first = self.publish.borrow().is_none();
            let Death { error, ready_for } = match self.start_and_wait().await {
                Ok(()) => return Ok(()),
                Err(death) if first && death.ready_for.is_none() => return Err(death.error),
                Err(death) => death,
            };
            match policy.ended(ready_for) {
                Verdict::GiveUp(times) => {
                    return Err(KeeperError::TooOften { role, times, last: Box::new(error) });
                }
                Verdict::StartAfter(pause) => {
                    self.shared.observe(Event::Restarting { role, why: error.to_string(), pause });
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.stop.cancelled() => return Ok(()),
                    }
                }
            }
        }
    }

    /// One life of the child; fine only if it was told to stop.
    async fn start_and_wait(&self) -> Result<(), Death> {
        let role = self.recipe.role;
        self.shared.observe(Event::Starting { role });
        if let Readiness::Postgres(cluster) = &self.recipe.readiness {
            let prepared = async {
                cluster.clear_the_way().await?;
                cluster.prepare().await
            };
            // Stopping does not wait for this: a cluster half made is made anew at the next start.
            tokio::select! {
                result = prepared => {
                    result.map_err(|source| Death::unready(KeeperError::Prepare { role, source }))?;
                }
                () = self.stop.cancelled() => return Ok(()),
            }
        }
        let mut running =
            self.start().map_err(|source| Death::unready(KeeperError::Start { role, source }))?;
        let result = self.attend(&mut running).await;
        let ready_for = running.ready_at.map(|since| since.elapsed());
        // Whatever happened, the process is gone when this returns.
        self.end(&mut running).await;
        self.shared.record(role, None);
        result.map_err(|error| Death { error, ready_for })
    }

    fn start(&self) -> io::Result<Running> {
        let log_start = files::length(&self.recipe.log);
        let log = files::open_log(&self.recipe.log)?;
        let mut command = (self.recipe.command)(self.publish.borrow().as_ref());
        command.stdin(Stdio::null()).stderr(log.try_clone()?);
        match self.recipe.readiness {
            Readiness::Line => command.stdout(Stdio::piped()),
            Readiness::Postgres(_) => command.stdout(log),
        };
        let mut child = command.spawn()?;
        let stdout = child.stdout.take();
        let raw = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = raw.and_then(Pid::from_raw).ok_or_else(|| io::Error::other("it ended at once"))?;
        self.shared.record(self.recipe.role, ProcessIdentity::of(pid.as_raw_nonzero().get()));
        Ok(Running { child, pid, stdout, log_start, started: Instant::now(), ready_at: None })
    }

    async fn attend(&self, running: &mut Running) -> Result<(), KeeperError> {
        let role = self.recipe.role;
        let ready = match self.until_ready(running).await? {
            Outcome::Happened(ready) => ready,
            Outcome::Stop => return Ok(()),
        };
        self.shared.observe(Event::Ready { role, after: running.started.elapsed() });
        running.ready_at = Some(Instant::now());
        self.publish.send_replace(Some(ready));
        tokio::select! {
            status = running.child.wait() => Err(KeeperError::Ended {
                role,
                status: describe(status),
                log: self.recipe.log.clone(),
                tail: files::tail_since(&self.recipe.log, running.log_start),
            }),
            () = self.stop.cancelled() => Ok(()),
        }
    }

    async fn until_ready(&self, running: &mut Running) -> Result<Outcome<Ready>, KeeperError> {
        let (role, bound) = (self.recipe.role, self.recipe.ready_within);
        let log = self.recipe.log.clone();
        let (log_start, started) = (running.log_start, running.started);
        let Running { child, stdout, pid, .. } = running;
        let ready = async {
            match &self.recipe.readiness {
                Readiness::Line => ready_line(stdout.take()).await,
                Readiness::Postgres(cluster) => postgres_ready(cluster, *pid).await,
            }
        };
        let reports = async {
            let mut ticks = tokio::time::interval(REPORT_EVERY);
            ticks.tick().await;
            loop {
                ticks.tick().await;
                self.shared.observe(Event::StillStarting {
                    role,
                    since: started.elapsed(),
                    log: log.clone(),
                });
            }
        };
        tokio::select! {
            // A child that ended is not ready, even if it said so just before.
            biased;
            () = self.stop.cancelled() => Ok(Outcome::Stop),
            status = child.wait() => Err(KeeperError::EndedEarly {
                role, status: describe(status), tail: files::tail_since(&log, log_start), log: log.clone(),
            }),
            ready = ready => Ok(Outcome::Happened(ready)),
            () = tokio::time::sleep(bound) => Err(KeeperError::NotReady {
                role, bound, tail: files::tail_since(&log, log_start), log: log.clone(),
            }),
            () = reports => Ok(Outcome::Stop),
        }
    }

    /// Ends the process in the way its recipe says, if it has not ended yet.
    async fn end(&self, running: &mut Running) {
        let role = self.recipe.role;
        // Once it is reaped there is no id, and nothing to signal.
        if running.child.id().is_none() {
            return;
        }
        self.shared.observe(Event::Stopping { role });
        for (signal, bound) in &self.recipe.stop {
            if self.shared.force.is_cancelled() {
                break;
            }
            // It is our child and not reaped, so its id is still its own.
            if let Err(error) = kill_process(running.pid, *signal) {
                tracing::warn!(%role, %error, "cannot signal a child process");
            }
            tokio::select! {
                _ = running.child.wait() => return,
                () = tokio::time::sleep(*bound) => {}
                () = self.shared.force.cancelled() => {}
            }
        }
        self.shared.observe(Event::Killing { role });
        // Kills and reaps; a process that survives SIGKILL hangs in the kernel, and nothing here can help it.
        let killed = tokio::time::timeout(Duration::from_secs(5), running.child.kill()).await;
        if !matches!(killed, Ok(Ok(()))) {
            tracing::error!(%role, pid = %running.pid, "a child process does not end even by SIGKILL");
        }
    }
}

/// The ready line on the standard output of a child. What follows it is read and dropped, so that a child that
/// writes more never finds a full or closed pipe.
async fn ready_line(stdout: Option<ChildStdout>) -> Ready {
    if let Some(stdout) = stdout {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str::<Ready>(&line) {
                Ok(ready) if ready.ready => {
                    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                    return ready;
                }
                _ => tracing::debug!(line, "a child says something else before it is ready"),
            }
        }
    }
    // Its output is closed. Either it ends now, or it never gets ready: both are noticed elsewhere.
    std::future::pending().await
}

/// The server writes its state into a file, and that is the only place where it tells it:
/// so this looks again every 10 ms, which is short beside the start of a server, and bounded by the caller.
async fn postgres_ready(cluster: &Cluster, pid: Pid) -> Ready {
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    while !cluster.is_ready(pid) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ready { ready: true, address: None }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("its end could not be observed: {error}"),
    }
}
