//! The life of the filter's process.
//!
//! ```text
//!  started as root, in the guest's namespace ─► rules from the agent ─► sockets ─► confined ─► "ok" ─► serves
//!        │ the agent ends before it has said                                                          │
//!        ▼ any rules: ends                                    rules from whichever agent there is ────┘
//! ```
//!
//! It is told its rules over Unix sockets: first over the one that is its standard input, and later also over those
//! that are made to an abstract address in the namespace, which only processes in that namespace see and of which
//! only root's are listened to. A line of JSON is a set of rules, and `ok` says that they are in force.

use std::{
    convert::Infallible,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{Shared, confinement, names, rules::Rules, streams};
use crate::network::addresses::GATEWAY;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, UdpSocket, UnixListener, UnixStream},
    sync::watch,
    time::timeout,
};

/// The first word of the command line that makes a process a filter.
pub const WORD: &str = "domain-filter";
/// Where the guest's questions are redirected to.
pub(in super::super) const NAMES_PORT: u16 = 15_053;
/// Where the guest's connections are redirected to.
pub(in super::super) const STREAMS_PORT: u16 = 15_080;
/// The abstract address at which it can be told rules.
pub(super) const CONTROL: &[u8] = b"wrenn-domain-filter";
/// What says that rules are in force.
pub(super) const DONE: &str = "ok\n";
/// How long a set of rules may be: 1024 entries of 260 bytes are less.
const RULES_LIMIT: u64 = 1024 * 1024;
/// How long an agent may take to send a whole line, once it has begun.
const LINE_BOUND: Duration = Duration::from_secs(10);

/// Why a filter ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No runtime could be had.
    #[error("could not start a runtime")]
    Runtime(#[source] io::Error),
    /// Whoever started it said no rules.
    #[error("got no rules to begin with")]
    Rules(#[source] io::Error),
    /// A socket could not be made.
    #[error("could not listen for {0}")]
    Listen(&'static str, #[source] io::Error),
    /// It could not be bounded, or become unprivileged.
    #[error("could not give up privileges")]
    Privileges(#[source] io::Error),
    /// A socket does not work any more.
    #[error("could not go on to serve {0}")]
    Serve(&'static str, #[source] io::Error),
}

/// Becomes a filter: to be called by a process that does nothing else, which is in the guest's namespace and whose
/// standard input is a Unix socket. Comes back only when it cannot go on.
///
/// # Errors
/// Always: [`ProcessError`] says why it ended.
pub fn main() -> Result<Infallible, ProcessError> {
    confinement::bound().map_err(ProcessError::Privileges)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ProcessError::Runtime)?;
    runtime.block_on(run())
}

async fn run() -> Result<Infallible, ProcessError> {
    let mut parent = BufReader::new(parent().map_err(ProcessError::Rules)?);
    let first = read_rules(&mut parent).await.map_err(ProcessError::Rules)?;
    let control = control().map_err(|source| ProcessError::Listen("an agent", source))?;
    let listen = |what| move |source| ProcessError::Listen(what, source);
    // At the gateway's address alone: nothing that comes from outside is for it.
    let streams = TcpListener::bind((GATEWAY, STREAMS_PORT)).await.map_err(listen("connections"))?;
    let questions = TcpListener::bind((GATEWAY, NAMES_PORT)).await.map_err(listen("questions over TCP"))?;
    let datagrams = UdpSocket::bind((GATEWAY, NAMES_PORT)).await.map_err(listen("questions"))?;
    confinement::give_up().map_err(ProcessError::Privileges)?;

    let (in_force, watched) = watch::channel(Arc::new(first));
    let shared = Arc::new(Shared { rules: watched, pins: Mutex::default(), questions: Arc::default() });
    let agent = Arc::new(Agent { in_force, shared: Arc::clone(&shared) });
    parent.write_all(DONE.as_bytes()).await.map_err(ProcessError::Rules)?;
    tokio::spawn(Arc::clone(&agent).listen(parent));
    let (what, source) = tokio::select! {
        error = streams::serve(Arc::clone(&shared), streams) => ("connections", error),
        error = names::connections(Arc::clone(&shared), questions) => ("questions over TCP", error),
        error = names::datagrams(shared, datagrams) => ("questions", error),
        error = agent.serve(control) => ("an agent", error),
    };
    Err(ProcessError::Serve(what, source))
}

fn parent() -> io::Result<UnixStream> {
    let stream = StdUnixStream::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn control() -> io::Result<UnixListener> {
    let listener = StdUnixListener::bind_addr(&SocketAddr::from_abstract_name(CONTROL)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

async fn read_rules(from: &mut BufReader<UnixStream>) -> io::Result<Rules> {
    let mut line = Vec::new();
    from.take(RULES_LIMIT).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(io::Error::from)
}

/// What an agent may change.
struct Agent {
    in_force: watch::Sender<Arc<Rules>>,
    shared: Arc<Shared>,
}

impl Agent {
    /// Listens to agents for ever.
    async fn serve(self: Arc<Self>, control: UnixListener) -> io::Error {
        loop {
            let stream = match control.accept().await {
                Ok((stream, _)) => stream,
                Err(error) if streams::is_of_one_connection(&error) => continue,
                Err(error) => return error,
            };
            // There are only the agent and the machine's monitor here, and both are root's.
            if stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) {
                tokio::spawn(Arc::clone(&self).listen(BufReader::new(stream)));
            }
        }
    }

    /// Listens to one agent until it has gone or has said what makes no sense.
    async fn listen(self: Arc<Self>, mut agent: BufReader<UnixStream>) {
        loop {
            // It may be silent for as long as it likes, but not in the middle of a line.
            if !agent.fill_buf().await.is_ok_and(|begun| !begun.is_empty()) {
                return;
            }
            let Ok(Ok(rules)) = timeout(LINE_BOUND, read_rules(&mut agent)).await else { return };
            self.put_in_force(rules);
            if agent.write_all(DONE.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    fn put_in_force(&self, rules: Rules) {
        let rules = Arc::new(rules);
        // First the rules: what is pinned after this is pinned by the new ones.
        self.in_force.send_replace(Arc::clone(&rules));
        self.shared.pins().keep(|address, name| rules.may_pin(address) && rules.allows(name));
    }
}

#[cfg(test)]
mod tests {
    /// Not a test: what the tests of the network start as a filter's process, which has this variable.
    #[test]
    fn becomes_a_filter() {
        if std::env::var_os("WRENN_TEST_FILTER").is_some() {
            let Err(error) = super::main();
            panic!("{error:?}");
        }
    }
}
