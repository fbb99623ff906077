//! The agent's side: starts a filter, finds one that is there, tells it rules, and replaces one that has ended.
//!
//! ```text
//!  mark on disk ─► started ─► "ok" ─► kept ─ ended by itself ─► started again, with the rules that it had
//!                    ▲                 │ left: the agent ends, the filter does not
//!                    │ not there,      ▼
//!                    └ or mute ◄──── found by the next agent, by its socket
//! ```
//!
//! Before a filter is started there is a file beside the lease of its slot, and it is there until every process with
//! the slot's name in its command line has ended. So whoever clears a slot, of which nobody knows anything any
//! more, knows whether there are processes to look for; and as it says whose they were, also where their control group
//! is, whichever stack clears the slot.

use std::{
    fs, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixStream as StdUnixStream},
    },
    time::Duration,
};

use camino::Utf8PathBuf;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use wrenn_host_linux::{
    netns::NetworkNamespace,
    process::{Process, Spawn, SpawnError, find_by_argument},
};
use wrenn_types::InstanceId;

use super::{
    confinement,
    process::{CONTROL, DONE},
    rules::Rules,
};
use crate::network::addresses::SlotNumber;

/// How the name of the file ends that says that a slot has had a filter.
pub(in super::super) const MARK_SUFFIX: &str = ".filter";
/// How long a filter may take to begin, or to put rules in force.
const BOUND: Duration = Duration::from_secs(10);
/// How long after a start the next one is tried, when filters do not live.
const RETRY: Duration = Duration::from_secs(1);

/// Why there is no filter, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The file that says that there is one could not be written, looked for or removed.
    #[error("could not use {path}")]
    Mark {
        /// Which file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process could not be made.
    #[error("could not start a domain filter")]
    Start(#[source] SpawnError),
    /// Its control group could not be made or removed.
    #[error("could not use the control group of a domain filter")]
    Group(#[source] io::Error),
    /// No socket could be made for it.
    #[error("could not make a socket for a domain filter")]
    Socket(#[source] io::Error),
    /// It did not put rules in force.
    #[error("a domain filter did not take its rules")]
    Tell(#[source] io::Error),
    /// It could not be ended.
    #[error("could not end a domain filter")]
    End(#[source] io::Error),
    /// Nobody keeps it any more.
    #[error("the domain filter is not kept any more")]
    Unkept,
}

/// A filter that is kept. When this is dropped it goes on, and nobody keeps it.
#[derive(Debug)]
pub(in super::super) struct Filter {
    requests: mpsc::Sender<Request>,
    keeping: JoinHandle<()>,
}

#[derive(Debug)]
enum Request {
    Tell(Rules, oneshot::Sender<Result<(), FilterError>>),
    End(oneshot::Sender<()>),
}

impl Filter {
    /// The filter of a slot, with rules in force: the one that an earlier agent left there, or a new one.
    ///
    /// # Errors
    /// There is none, and nothing that names open is open.
    pub(in super::super) async fn open(
        instance: InstanceId,
        number: SlotNumber,
        namespace: NetworkNamespace,
        rules: Rules,
    ) -> Result<Self, FilterError> {
        let mut keeper = Keeper { instance, number, namespace, rules, running: None, started: None };
        let found = if was_started(number)? { keeper.find().await } else { None };
        match found {
            Some(found) => keeper.running = Some(found),
            None => keeper.start().await?,
        }
        let (requests, incoming) = mpsc::channel(1);
        let keeping = tokio::spawn(keeper.keep(incoming));
        Ok(Self { requests, keeping })
    }

    /// Puts rules in force. When this answers, whatever they forbid has ended or is ending.
    ///
    /// # Errors
    /// They are not in force, and there may be no filter: it is started again with these rules.
    pub(in super::super) async fn tell(&self, rules: Rules) -> Result<(), FilterError> {
        let (done, told) = oneshot::channel();
        self.requests.send(Request::Tell(rules, done)).await.map_err(|_| FilterError::Unkept)?;
        told.await.map_err(|_| FilterError::Unkept)?
    }

    /// Ends it, and its streams.
    pub(in super::super) async fn end(self) {
        let (done, ended) = oneshot::channel();
        if self.requests.send(Request::End(done)).await.is_ok() {
            let _ = ended.await;
        }
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

/// A process and a way to tell it rules.
#[derive(Debug)]
struct Running {
    control: UnixStream,
    process: Process,
}

impl Running {
    async fn tell(&mut self, rules: &Rules) -> io::Result<()> {
        let mut line = serde_json::to_vec(rules)?;
        line.push(b'\n');
        let conversation = async {
            self.control.write_all(&line).await?;
            let mut answer = [0; DONE.len()];
            self.control.read_exact(&mut answer).await?;
            if answer == DONE.as_bytes() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        };
        timeout(BOUND, conversation).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn end(self) -> io::Result<()> {
        self.process.kill_and_wait().await?;
        self.process.reap_if_ours()
    }
}

#[derive(Debug)]
struct Keeper {
    instance: InstanceId,
    number: SlotNumber,
    namespace: NetworkNamespace,
    /// Those that are in force, or shall be.
    rules: Rules,
    running: Option<Running>,
    /// When the last one was started.
    started: Option<Instant>,
}

impl Keeper {
    async fn keep(mut self, mut incoming: mpsc::Receiver<Request>) {
        loop {
            let absent = self.running.is_none();
            let due = self.started.map_or_else(Instant::now, |started| started + RETRY);
            let ended = async {
                match &self.running {
                    // That it cannot be watched is a reason to replace it.
                    Some(running) => drop(running.process.ended().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = incoming.recv() => match request {
                    Some(Request::Tell(rules, done)) => {
                        self.rules = rules;
                        let _ = done.send(self.tell().await);
                    }
                    Some(Request::End(done)) => {
                        self.stop().await;
                        let _ = done.send(());
                        return;
                    }
                    None => return,
                },
                () = ended => {
                    tracing::warn!(slot = %self.number, "the domain filter has ended; what names open is closed until it is replaced");
                    self.stop().await;
                }
                () = sleep_until(due), if absent => {
                    if let Err(error) = self.start().await {
                        let error = &error as &dyn std::error::Error;
                        tracing::error!(slot = %self.number, error, "no domain filter; the next attempt is in {RETRY:?}");
                    }
                }
            }
        }
    }

    /// Tells the one that is there, or starts one.
    async fn tell(&mut self) -> Result<(), FilterError> {
        if let Some(running) = &mut self.running {
            match running.tell(&self.rules).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(slot = %self.number, error, "the domain filter does not listen; it is replaced");
                }
            }
            self.stop().await;
        }
        self.start().await
    }

    async fn stop(&mut self) {
        if let Some(running) = self.running.take()
            && let Err(error) = running.end().await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(slot = %self.number, error, "a domain filter could not be ended");
        }
    }

    /// What an earlier agent left, with the rules in force; none if it is not there or does not listen.
    async fn find(&self) -> Option<Running> {
        let connect = || StdUnixStream::connect_addr(&SocketAddr::from_abstract_name(CONTROL)?);
        let stream = self.namespace.run(connect).await.and_then(|connected| connected).ok()?;
        stream.set_nonblocking(true).ok()?;
        let control = UnixStream::from_std(stream).ok()?;
        // The process that has made the socket, which is held before it is asked.
        let pid = u32::try_from(control.peer_cred().ok()?.pid()?).ok()?;
        let found = wrenn_host_linux::process::argument_of(pid, &name(self.number)).ok()??;
        let mut running = Running { control, process: found.process };
        running.tell(&self.rules).await.ok()?;
        Some(running)
    }

    async fn start(&mut self) -> Result<(), FilterError> {
        self.started = Some(Instant::now());
        // One that nobody keeps has the ports.
        end_leftovers(self.number).await?;
        let path = mark(self.number);
        fs::write(&path, self.instance.as_str()).map_err(|source| FilterError::Mark { path, source })?;
        let (ours, theirs) = StdUnixStream::pair().map_err(FilterError::Socket)?;
        ours.set_nonblocking(true).map_err(FilterError::Socket)?;
        let control = UnixStream::from_std(ours).map_err(FilterError::Socket)?;
        let mut spawn = program()
            .arg(name(self.number))
            .env(confinement::USER_VARIABLE, confinement::user(self.number).to_string())
            .network_namespace(self.number.namespace().into_std_path_buf())
            .new_session()
            .no_core_dump()
            .stdin(theirs);
        if let Some(group) =
            confinement::enter_group(&self.instance, self.number).map_err(FilterError::Group)?
        {
            spawn = spawn.control_group(group);
        }
        let mut child = spawn.start().map_err(FilterError::Start)?;
        let process = child.process().clone();
        let mut running = Running { control, process };
        if let Err(source) = running.tell(&self.rules).await {
            // None if it is there and does not listen.
            let exit = child.try_wait().ok().flatten();
            tracing::warn!(slot = %self.number, ?exit, "a domain filter did not begin");
            let _ = running.end().await;
            return Err(FilterError::Tell(source));
        }
        self.running = Some(running);
        Ok(())
    }
}

/// The program that becomes a filter: this one, whatever has become of its file.
#[cfg(not(test))]
fn program() -> Spawn {
    Spawn::new("/proc/self/exe").arg(super::WORD)
}

/// In a test it is the test's program, which is told to run nothing but what becomes a filter.
#[cfg(test)]
fn program() -> Spawn {
    Spawn::new("/proc/self/exe")
        .args(["--exact", "network::filter::process::tests::becomes_a_filter"])
        .env("WRENN_TEST_FILTER", "1")
}

/// What is in the command line of a slot's filters, and no beginning of what is in that of another slot's.
fn name(number: SlotNumber) -> String {
    format!("wrenn-filter-of-{:05}", number.get())
}

/// The file that says that a slot has had a filter.
fn mark(number: SlotNumber) -> Utf8PathBuf {
    format!("{}{MARK_SUFFIX}", number.lease()).into()
}

/// Whether a slot may have a filter, or parts of one.
///
/// # Errors
/// It cannot be said.
pub(in super::super) fn was_started(number: SlotNumber) -> Result<bool, FilterError> {
    let path = mark(number);
    path.try_exists().map_err(|source| FilterError::Mark { path, source })
}

/// Ends all filters of a slot that were ever started, whoever did it.
///
/// # Errors
/// One could not be ended, or it is not known whether there is one.
pub(in super::super) async fn end_leftovers(number: SlotNumber) -> Result<(), FilterError> {
    if !was_started(number)? {
        return Ok(());
    }
    for found in find_by_argument(&name(number)).map_err(FilterError::End)? {
        found.process.kill_and_wait().await.map_err(FilterError::End)?;
        found.process.reap_if_ours().map_err(FilterError::End)?;
    }
    let path = mark(number);
    let owner = fs::read_to_string(&path).ok().and_then(|text| text.parse::<InstanceId>().ok());
    if let Some(owner) = owner {
        confinement::remove_group(&owner, number).map_err(FilterError::Group)?;
    }
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FilterError::Mark { path, source }),
        _ => Ok(()),
    }
}
