//! The process of a machine: what holds it, what waits for its end, and how one that runs without an owner is found.
//!
//! ```text
//!  machine ── Leash ── kills when it is dropped, or lets go ──► Held ── monitor ── waits for the end, and tells it
//!               ▲                                                         │
//!               └───────────────────── exit, once ────────────────────────┘
//! ```

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use camino::Utf8Path;
use tokio::{
    sync::{oneshot, watch},
    task::spawn_blocking,
    time::timeout,
};
use wrenn_host_linux::process::{Child, Exit, Opens, Process, argument_of, find_by_argument};

use crate::{
    AdoptedMachine, ExitReason, VmmError, VmmResult,
    files::{cannot, failed_thread},
};

/// How long a process that lost its connection may take to be gone.
const DEATH_BOUND: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// Kills the process when it is dropped, unless it was let go; what a machine holds.
#[derive(Debug)]
pub(crate) struct Leash {
    process: Process,
    exit: watch::Receiver<Option<ExitReason>>,
    ending: Ending,
    /// Tells the monitor that the process was let go; none once that was told.
    release: Option<oneshot::Sender<()>>,
}

/// Whether the end of the process is our own wish.
#[derive(Debug, Clone, Default)]
struct Ending(Arc<AtomicBool>);

impl Ending {
    fn wish(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The other end of a [`Leash`]: what the monitor of its process has.
#[derive(Debug)]
pub(crate) struct Held {
    exit: watch::Sender<Option<ExitReason>>,
    ending: Ending,
    /// None once nobody can let it go any more.
    released: Option<oneshot::Receiver<()>>,
}

impl Held {
    /// Waits until the process is let go; for ever if it is not. Cancel-safe.
    pub(crate) async fn let_go(&mut self) {
        if let Some(released) = &mut self.released {
            let is_let_go = released.await.is_ok();
            self.released = None;
            if is_let_go {
                return;
            }
        }
        // A leash that is dropped without it kills, and that is waited for otherwise.
        std::future::pending().await
    }

    /// Whether the end of the process is the wish of its owner.
    pub(crate) fn is_end_wished(&self) -> bool {
        self.ending.0.load(Ordering::SeqCst)
    }

    /// Tells why the process is gone.
    pub(crate) fn tell(self, reason: ExitReason) {
        self.exit.send_replace(Some(reason));
    }
}

impl Leash {
    pub(crate) fn new(process: Process) -> (Self, Held) {
        let (release, released) = oneshot::channel();
        let (told, exit) = watch::channel(None);
        let ending = Ending::default();
        let held = Held { exit: told, ending: ending.clone(), released: Some(released) };
        (Self { process, exit, ending, release: Some(release) }, held)
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// See [`crate::Vm::exit`].
    pub(crate) fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.clone()
    }

    /// Why it is gone, if it is.
    pub(crate) fn reason(&self) -> Option<ExitReason> {
        self.exit.borrow().clone()
    }

    /// Fails when it is gone.
    pub(crate) fn alive(&self, operation: &'static str) -> VmmResult<()> {
        match self.reason() {
            Some(reason) => Err(VmmError::Exited { operation, reason }),
            None => Ok(()),
        }
    }

    /// Why it is gone, once it is; none when it is not within the bound.
    pub(crate) async fn gone_within(&self, bound: Duration) -> Option<ExitReason> {
        let mut exit = self.exit();
        let gone = timeout(bound, exit.wait_for(Option::is_some)).await;
        gone.ok()?.ok()?.clone()
    }

    /// What is to come is what its owner wants: see [`ExitReason::Stopped`].
    pub(crate) fn wish_end(&self) {
        self.ending.wish();
    }

    /// Kills it, and waits until it is gone: the end of [`crate::Vm::stop`].
    pub(crate) async fn kill(&self) -> VmmResult<ExitReason> {
        self.wish_end();
        let kill = self.process.kill();
        match self.gone_within(KILL_BOUND).await {
            Some(reason) => Ok(reason),
            None => match kill {
                Ok(()) => Err(VmmError::Timeout { operation: "stop", bound: KILL_BOUND }),
                Err(source) => Err(VmmError::Connection { command: "kill".to_owned(), source }),
            },
        }
    }

    pub(crate) fn let_go(&mut self) {
        if let Some(release) = self.release.take() {
            // The monitor is gone when the process is.
            let _ = release.send(());
        }
    }

    /// Turns a lost connection into what it means: that the process is gone, and why.
    pub(crate) async fn explain<T>(&self, operation: &'static str, result: VmmResult<T>) -> VmmResult<T> {
        match result {
            Err(error @ VmmError::Connection { .. }) => Err(self.gone_or(operation, error).await),
            other => other,
        }
    }

    /// Reads or writes the memory of the process on a thread, as [`on_thread`] does. That there is none to be read of a
    /// process that is gone is told as its end.
    pub(crate) async fn with_memory<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&AtomicBool) -> VmmResult<T> + Send + 'static,
    ) -> VmmResult<T> {
        match on_thread(operation, work).await {
            Err(error @ VmmError::File { .. }) if !self.process.is_alive().unwrap_or(true) => {
                Err(self.gone_or(operation, error).await)
            }
            other => other,
        }
    }

    async fn gone_or(&self, operation: &'static str, error: VmmError) -> VmmError {
        match self.gone_within(DEATH_BOUND).await {
            Some(reason) => VmmError::Exited { operation, reason },
            None => error,
        }
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if self.release.is_none() {
            return;
        }
        self.ending.wish();
        if let Err(error) = self.process.kill() {
            tracing::error!(pid = self.process.pid(), %error, "a VMM cannot be killed");
        }
    }
}

/// Does something on a thread that may wait for the disk. It ends early when nobody waits for it any more.
pub(crate) async fn on_thread<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce(&AtomicBool) -> VmmResult<T> + Send + 'static,
) -> VmmResult<T> {
    let given_up = GivenUp::default();
    let told = Arc::clone(&given_up.0);
    let done = spawn_blocking(move || work(&told)).await;
    done.map_err(|error| failed_thread(operation, error))?
}

/// Fails where nobody waits any more for what a thread does with a file.
pub(crate) fn unless_given_up(given_up: &AtomicBool, path: &Utf8Path) -> VmmResult<()> {
    match given_up.load(Ordering::Relaxed) {
        true => Err(cannot("go on with", path)(io::ErrorKind::Interrupted.into())),
        false => Ok(()),
    }
}

/// Tells a thread, when it is dropped, that nobody waits for it.
#[derive(Debug, Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The process of which the end is waited for.
#[derive(Debug)]
pub(crate) enum Watched {
    Child(Child),
    /// Somebody else's child: that it ends is told, and not how.
    Adopted(Process),
}

impl Watched {
    pub(crate) async fn wait(&mut self) -> io::Result<Option<Exit>> {
        match self {
            Self::Child(child) => child.wait().await.map(Some),
            Self::Adopted(process) => process.ended().await.map(|()| None),
        }
    }

    /// The files that it is about to open, if somebody else opens them for it.
    pub(crate) fn take_opens(&mut self) -> Option<Opens> {
        match self {
            Self::Child(child) => child.take_opens(),
            Self::Adopted(_) => None,
        }
    }

    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::Child(child) => child.process(),
            Self::Adopted(process) => process,
        }
    }
}

/// The argument by which the process of a machine of this name is known in the process table, whatever VMM it is; of the
/// beginning of a name, the beginning of the argument.
pub(crate) fn mark(name: &str) -> String {
    format!("guest={name}")
}

/// The operation of [`crate::Vmm::adopt`].
pub(crate) const ADOPT: &str = "adopt";

/// The process of a machine that is to be adopted.
pub(crate) async fn find_adopted(machine: &AdoptedMachine) -> VmmResult<Process> {
    let (mark, hint) = (mark(&machine.name), machine.pid_hint);
    let found = spawn_blocking(move || find(&mark, hint)).await;
    let found = found.map_err(io::Error::other).and_then(|found| found).map_err(lost)?;
    found.ok_or_else(|| not_there(machine))
}

/// What became of taking a process over: whatever failed, it is not there any more when it has ended meanwhile.
pub(crate) fn unless_ended<T>(
    taken: VmmResult<T>,
    process: &Process,
    machine: &AdoptedMachine,
) -> VmmResult<T> {
    match taken {
        Err(_) if !process.is_alive().map_err(lost)? => Err(not_there(machine)),
        other => other,
    }
}

/// A connection that could not be made to a process that is to be adopted.
pub(crate) fn lost(source: io::Error) -> VmmError {
    VmmError::Connection { command: ADOPT.to_owned(), source }
}

fn not_there(machine: &AdoptedMachine) -> VmmError {
    VmmError::NotThere { name: machine.name.clone() }
}

/// The process with this argument.
pub(crate) fn find(mark: &str, hint: Option<u32>) -> io::Result<Option<Process>> {
    if let Some(pid) = hint
        && let Some(found) = argument_of(pid, mark)?
        && found.argument == mark
    {
        return Ok(Some(found.process));
    }
    let mut found = find_by_argument(mark)?.into_iter().filter(|found| found.argument == mark);
    let first = found.next().map(|found| found.process);
    if found.next().is_some() {
        return Err(io::Error::other("several processes have its name"));
    }
    Ok(first)
}
