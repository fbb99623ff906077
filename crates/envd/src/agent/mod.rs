//! The agent role: the guest contract over HTTP/1.1 and HTTP/2.
//!
//! ```text
//!            ┌ server ─ route ─┬─ /health
//!  TCP ──────┤                 ├─ /init ──────── identity ── machine      who this guest is
//!            └ auth, gate,     ├─ /snapshot/… ── snapshot ── freezer      standing still
//!              host, cors      ├─ /connect/… ─── loopback                 ports of the loopback interface
//!                              ├─ /metrics, … ── metrics, tasks           what is used, and by whom
//!                              ├─ /files ─────── files                    whole files, streamed
//!                              └─ Connect RPC ─┬ process                  programs and terminals
//!                                              └ filesystem               stat, list, make, move, remove
//! ```
//!
//! One thread serves everything: a guest often has one processor, and switching threads costs more than it brings.
//! What may block (files, starting a program) runs on threads that are kept for that ([`threads`]).

mod auth;
mod callers;
mod connection;
mod cors;
mod files;
mod filesystem;
mod freezer;
mod handover;
mod host;
mod identity;
mod loopback;
mod machine;
mod metadata;
mod metrics;
mod outlet;
mod paths;
mod process;
mod protocol;
mod reply;
mod server;
mod snapshot;
mod state;
mod tasks;
mod threads;
mod users;

use std::{
    fs,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;

use self::{
    handover::Handover,
    state::{Agent, Cgroup, Place},
};
use crate::{
    console::say,
    layout::{READY_LINE, USER_CGROUP},
    network::PORT,
};

/// How many threads may block at once: all that each kind of work has of its own, so that none of them waits for one that
/// another kind has, and a few for what waits for nothing but the kernel.
const BLOCKING_THREADS: usize = files::THREADS
    + filesystem::THREADS
    + filesystem::WATCH_THREADS
    + process::THREADS
    + tasks::THREADS
    + OTHER_THREADS;
const OTHER_THREADS: usize = 8;
/// How long an idle one is kept. Long, because a restored snapshot should find one ready.
const THREAD_KEPT_FOR: Duration = Duration::from_secs(3600);
/// How many descriptors the agent, and what it starts, may have open.
const DESCRIPTORS: u64 = 65_536;

/// How the agent is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) place: Place,
    pub(crate) listen: SocketAddr,
    pub(crate) default_user: String,
    /// The directory of the cgroup in which the processes of users are born.
    pub(crate) cgroup: Option<PathBuf>,
    /// Whether standard input is where an agent leaves the identity to the next one.
    pub(crate) handover: bool,
}

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("{0} needs a value")]
    NoValue(String),
    #[error("{option} cannot be '{value}'")]
    Value { option: String, value: String },
    #[error("unknown option {0}")]
    Unknown(String),
}

impl Options {
    /// Reads the words after `envd agent`.
    ///
    /// Outside a virtual machine only the machine itself may reach the agent, unless an address is given.
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, OptionsError> {
        let mut place = Place::Outside;
        let (mut port, mut listen) = (PORT, None);
        let mut default_user = "root".to_owned();
        let (mut cgroup, mut handover) = (None, false);
        while let Some(option) = words.next() {
            match option.as_str() {
                "--guest" => {
                    place = Place::Guest;
                    continue;
                }
                "--handover" => {
                    handover = true;
                    continue;
                }
                _ => {}
            }
            if !["--port", "--listen", "--user", "--cgroup"].contains(&option.as_str()) {
                return Err(OptionsError::Unknown(option));
            }
            let value = words.next().ok_or_else(|| OptionsError::NoValue(option.clone()))?;
            let wrong = || OptionsError::Value { option: option.clone(), value: value.clone() };
            match option.as_str() {
                "--port" => port = value.parse().map_err(|_| wrong())?,
                "--listen" => listen = Some(value.parse().map_err(|_| wrong())?),
                "--cgroup" => cgroup = Some(PathBuf::from(value)),
                _ => default_user = value,
            }
        }
        let address = match place {
            Place::Guest => Ipv4Addr::UNSPECIFIED,
            Place::Outside => Ipv4Addr::LOCALHOST,
        };
        let listen = listen.unwrap_or_else(|| (address, port).into());
        let ours = || PathBuf::from(USER_CGROUP);
        let cgroup = cgroup.or_else(|| (place == Place::Guest).then(ours));
        Ok(Self { place, listen, default_user, cgroup, handover })
    }
}

/// Runs the agent until its listener fails.
pub(crate) fn run(options: Options) -> io::Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    raise_descriptor_limit();
    wrenn_guest_linux::heap::share_one();
    // A name for those who list processes; without it they see how the agent was started.
    let _ = rustix::thread::set_name(c"envd");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(THREAD_KEPT_FOR)
        .thread_name("envd-blocking")
        .build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    let cgroup = options.cgroup.and_then(|directory| user_cgroup(directory, options.place));
    let handover = options.handover.then(Handover::on_standard_input).transpose()?;
    let agent = Arc::new(Agent::new(options.place, address, options.default_user, cgroup, handover));
    announce(options.place, address)?;
    server::serve(agent, listener).await
}

/// Says that the agent listens: to the host on the console, to a developer or test as a line of JSON.
fn announce(place: Place, address: SocketAddr) -> io::Result<()> {
    match place {
        Place::Guest => writeln!(fs::OpenOptions::new().write(true).open("/dev/console")?, "{READY_LINE}"),
        Place::Outside => {
            let line = serde_json::json!({ "ready": true, "address": address });
            let mut output = io::stdout();
            writeln!(output, "{line}")?;
            output.flush()
        }
    }
}

/// The cgroup for the processes of users: in a guest the one that init made.
fn user_cgroup(directory: PathBuf, place: Place) -> Option<Cgroup> {
    match Cgroup::open(directory, place) {
        Ok(cgroup) => Some(cgroup),
        Err(error) => {
            say(format_args!("no cgroup for users: {error}"));
            None
        }
    }
}

fn raise_descriptor_limit() {
    let current = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: Some(DESCRIPTORS),
        maximum: Some(current.maximum.map_or(DESCRIPTORS, |now| now.max(DESCRIPTORS))),
    };
    // Who is not root gets what there is.
    if setrlimit(Resource::Nofile, wanted).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: current.maximum, ..current });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, OptionsError> {
        Options::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn only_a_guest_listens_to_the_world_by_default() {
        assert_eq!(parse(&[]).unwrap().listen, "127.0.0.1:49983".parse().unwrap());
        let guest = parse(&["--guest", "--port", "49983"]).unwrap();
        assert_eq!((guest.place, guest.listen), (Place::Guest, "0.0.0.0:49983".parse().unwrap()));
        let open = parse(&["--listen", "0.0.0.0:0", "--user", "user"]).unwrap();
        assert_eq!((open.listen, open.default_user.as_str()), ("0.0.0.0:0".parse().unwrap(), "user"));
        assert_eq!((open.cgroup, guest.cgroup), (None, Some(USER_CGROUP.into())));
        assert_eq!(parse(&["--cgroup", "/a"]).unwrap().cgroup, Some("/a".into()));
        assert!(matches!(parse(&["--port"]), Err(OptionsError::NoValue(_))));
        assert!(matches!(parse(&["--port", "x"]), Err(OptionsError::Value { .. })));
        assert!(matches!(parse(&["-x"]), Err(OptionsError::Unknown(_))));
    }
}
