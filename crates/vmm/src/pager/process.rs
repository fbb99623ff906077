//! The life of a pager's process.
//!
//! ```text
//!  started as root ─► its order ─► files open, socket bound ─► "ready" ─► which VMM ─► fate shared, confined ─► "ready"
//!        │ whoever started it ends before it has a memory                                            │
//!        ▼                                                                                           ▼
//!       ends ◄── the VMM ends: 0 ── serves ◄── regions and descriptor ◄── Firecracker connects ── waits
//!             ◄── anything else: 1, and why on standard error; the kernel ends the VMM
//! ```
//!
//! - **User.** One that nobody else is: a number of its own, by that of its process. Where such numbers are not mapped, because all of
//!   this is in a user namespace, it is `nobody`.
//! - **Bounds.** Memory of its own, descriptors, how long a file can become; no further tasks.
//! - **System calls.** Those of serving: it cannot open a file, connect, execute, signal or trace.
//! - **Fate.** The VMM is sent `SIGKILL` by the kernel when this process ends, however it does, and `SIGHUP`, at which a Firecracker
//!   ends that is the first process of its namespace, which `SIGKILL` from such a source does not reach.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, BufRead as _, BufReader, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{
            fs::{OpenOptionsExt as _, PermissionsExt as _, chown},
            net::{UnixListener, UnixStream},
        },
    },
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FlockOperation, flock},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt::socket_peercred},
};
use serde::{Deserialize, Serialize};
use wrenn_host_linux::{
    privileges::{self, Bounds},
    process::{Process, SharedFate, Signal},
    syscalls,
    userfaultfd::Userfaultfd,
};

use super::{
    regions::{Regions, RegionsError},
    serve::{Record, ServeError, Server, retried, timespec},
    source::Source,
    state::{self, Phase, State},
    working_set::{self, Ahead, WorkingSet},
};
use crate::{
    VmmError, VmmResult,
    files::{cannot, remove_stale_of_kind},
};

/// The first word of the command line that makes a process a pager.
pub const WORD: &str = "pager";
/// What says that a step is done.
pub(super) const DONE: &str = "ready\n";
/// The user of the pager with the number 0, which there is not. In a part of the numbers that no registry of users gives
/// out; the numbers of processes end below 2^22.
const FIRST_USER: u32 = 0x7700_0000;
/// Who nobody is.
const NOBODY: u32 = 65_534;
/// How many bytes of memory of its own it may have. The largest thing is the table of a snapshot's pages.
const MEMORY: u64 = 256 << 20;
const DESCRIPTORS: u64 = 64;
/// How long an order may be: a few paths.
const ORDER_LIMIT: u64 = 64 << 10;
/// How long what Firecracker sends may be.
const REGIONS_LIMIT: usize = 4096;
/// How long Firecracker may take to send it, once it has connected.
const SEND_BOUND: Duration = Duration::from_secs(10);

/// What a pager is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    /// Where it listens for its VMM.
    pub(super) socket: Utf8PathBuf,
    /// Whose the socket is, if not root's.
    pub(super) socket_owner: Option<u32>,
    /// The memory that it serves, what was saved over it, and how long it is.
    pub(super) base: Utf8PathBuf,
    pub(super) pages: Option<Utf8PathBuf>,
    pub(super) bytes: u64,
    /// Where it says what it does.
    pub(super) state: Utf8PathBuf,
    /// Where the order of the first pages is kept, if it is to be used or recorded.
    pub(super) working_set: Option<Utf8PathBuf>,
}

/// Why a pager ended, whose VMM has not.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Whoever started it said nothing that makes sense.
    #[error("got no order")]
    Order(#[source] io::Error),
    /// A file could not be opened, made or used.
    #[error("could not prepare")]
    Prepare(#[source] VmmError),
    /// It could not be bounded, or become unprivileged.
    #[error("could not give up privileges")]
    Privileges(#[source] io::Error),
    /// Its VMM is not there.
    #[error("could not share the fate of its VMM")]
    Fate(#[source] io::Error),
    /// The VMM did not connect, or sent no memory.
    #[error("got no memory")]
    Memory(#[source] io::Error),
    /// What the VMM sent cannot be its memory.
    #[error("the VMM sent regions that cannot be the memory")]
    Regions(#[source] RegionsError),
    /// It cannot go on.
    #[error("could not go on to serve")]
    Serve(#[source] ServeError),
}

/// Becomes a pager: to be called by a process that does nothing else, and whose standard input is a Unix socket. Comes back
/// when the VMM has ended.
///
/// # Errors
/// [`PagerError`] says why it ended, and that its VMM does, too.
pub fn main() -> Result<(), PagerError> {
    let stdin = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3);
    let mut parent = Parent::of(stdin.map_err(|error| PagerError::Order(error.into()))?)?;
    let order: Order = parent.hear()?;
    let longest = (working_set::LONGEST.max(ERROR_LIMIT) as u64).max(state::file_bytes(order.bytes));
    let bounds = Bounds { descriptors: DESCRIPTORS, memory: MEMORY, file: longest };
    privileges::bound(bounds).map_err(PagerError::Privileges)?;
    let prepared = Prepared::make(&order).map_err(PagerError::Prepare)?;
    parent.done()?;
    let vmm = Process::open(parent.hear()?).map_err(PagerError::Fate)?;
    let fate = SharedFate::with(&vmm, &[Signal::KILL, Signal::HUP]).map_err(PagerError::Fate)?;
    give_up().map_err(PagerError::Privileges)?;
    parent.done()?;
    let Some(connection) = wait_for_vmm(&prepared.listener, &parent, &vmm)? else {
        prepared.state.set_phase(Phase::Done);
        return Ok(());
    };
    let (json, memory) = receive(&connection).map_err(PagerError::Memory)?;
    let page_bytes = rustix::param::page_size() as u64;
    let regions = Regions::parse(&json, order.bytes, page_bytes).map_err(PagerError::Regions)?;
    let Prepared { listener, source, state, ahead, record } = prepared;
    drop((listener, connection, parent));
    let server = Server { memory, regions, source, state, vmm, ahead, record };
    let served = server.run().map_err(PagerError::Serve);
    // Whatever it was, it is over now.
    drop(fate);
    served
}

/// How much a pager may say on its standard error.
pub(super) const ERROR_LIMIT: usize = 64 << 10;

/// Whoever started it.
#[derive(Debug)]
struct Parent(BufReader<UnixStream>);

impl Parent {
    fn of(descriptor: OwnedFd) -> Result<Self, PagerError> {
        Ok(Self(BufReader::new(UnixStream::from(descriptor))))
    }

    /// Reads a line of JSON.
    fn hear<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T, PagerError> {
        let mut line = Vec::new();
        let heard = (&mut self.0).take(ORDER_LIMIT).read_until(b'\n', &mut line);
        let heard = heard.and_then(|_| match line.last() {
            Some(b'\n') => serde_json::from_slice(&line).map_err(io::Error::from),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        heard.map_err(PagerError::Order)
    }

    fn done(&mut self) -> Result<(), PagerError> {
        self.0.get_mut().write_all(DONE.as_bytes()).map_err(PagerError::Order)
    }
}

/// Everything that needs the rights of root.
#[derive(Debug)]
struct Prepared {
    listener: UnixListener,
    source: Source,
    state: State,
    ahead: Ahead,
    record: Option<Record>,
}

impl Prepared {
    fn make(order: &Order) -> VmmResult<Self> {
        let source = Source::open(&order.base, order.pages.as_deref(), order.bytes)?;
        let page_bytes = rustix::param::page_size() as u64;
        let memory_pages = order.bytes / page_bytes;
        let state = State::create(&order.state, memory_pages, page_bytes)?;
        let saved = source.saved().map(|saved| saved.file().as_raw_fd());
        state.set_descriptors(source.base().as_raw_fd(), saved);
        let (ahead, record) = working_set(order.working_set.as_deref(), memory_pages);
        let listener = listen(&order.socket, order.socket_owner)?;
        Ok(Self { listener, source, state, ahead, record })
    }
}

/// The working set that was recorded, and where more of it is to be. It is a hint: what goes wrong is as if there were none.
fn working_set(path: Option<&Utf8Path>, memory_pages: u64) -> (Ahead, Option<Record>) {
    let none = || (Ahead::default(), None);
    let Some(path) = path else { return none() };
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let Ok(mut file) = opened else { return none() };
    // One of those that begin at the same time records it, and reads before what is recorded by then.
    let records = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let mut bytes = Vec::new();
    if (&mut file).take(working_set::LONGEST as u64).read_to_end(&mut bytes).is_err() {
        return none();
    }
    let WorkingSet { pages, is_whole } = working_set::decode(&bytes, memory_pages).unwrap_or_default();
    let record = (records && !is_whole).then(|| Record { file, after: pages.clone() });
    (Ahead::new(pages), record)
}

fn listen(path: &Utf8Path, owner: Option<u32>) -> VmmResult<UnixListener> {
    remove_stale_of_kind(path, std::os::unix::fs::FileTypeExt::is_socket)?;
    let listener = UnixListener::bind(path).map_err(cannot("listen at", path))?;
    // In a directory that others cannot enter.
    let made = fs::set_permissions(path, Permissions::from_mode(0o600));
    let made = made.and_then(|()| owner.map_or(Ok(()), |owner| chown(path, Some(owner), Some(owner))));
    made.map_err(cannot("give away", path))?;
    Ok(listener)
}

/// From here on it can do nothing but serve.
fn give_up() -> io::Result<()> {
    let user = FIRST_USER + std::process::id();
    match privileges::give_up(user, user) {
        // There is no such user in this namespace.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => privileges::give_up(NOBODY, NOBODY)?,
        other => other?,
    }
    syscalls::allow_only(&[syscalls::OF_PAGING, syscalls::OF_MEMORY, syscalls::OF_TIME].concat())
}

/// Waits for the connection of the VMM; none when it has ended, or whoever wanted it.
fn wait_for_vmm(
    listener: &UnixListener,
    parent: &Parent,
    vmm: &Process,
) -> Result<Option<UnixStream>, PagerError> {
    loop {
        let mut polled = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(parent.0.get_ref().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(vmm.pidfd(), PollFlags::IN),
        ];
        retried(|| poll(&mut polled, None)).map_err(PagerError::Memory)?;
        let [listener_is_ready, parent_ended, vmm_ended] = polled.map(|polled| !polled.revents().is_empty());
        if vmm_ended {
            return Ok(None);
        }
        if listener_is_ready {
            let (connection, _) = listener.accept().map_err(PagerError::Memory)?;
            let peer = socket_peercred(&connection).map_err(|error| PagerError::Memory(error.into()))?;
            if u32::try_from(peer.pid.as_raw_nonzero().get()).is_ok_and(|pid| pid == vmm.pid()) {
                return Ok(Some(connection));
            }
            // Somebody else, who is not listened to.
            continue;
        }
        if parent_ended {
            return Err(PagerError::Order(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// What Firecracker sends once: where the memory is, and its descriptor.
fn receive(connection: &UnixStream) -> io::Result<(Vec<u8>, Userfaultfd)> {
    let end = Instant::now() + SEND_BOUND;
    let (mut json, mut memory) = (Vec::new(), None);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(connection, PollFlags::IN)];
        if retried(|| poll(&mut polled, Some(&timespec(left))))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut bytes = [0; REGIONS_LIMIT];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let received = retried(|| {
            recvmsg(connection, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                memory = memory.or_else(|| descriptors.last());
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        json.extend_from_slice(&bytes[..received.bytes]);
        if json.len() > REGIONS_LIMIT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // It is one array, of objects without any: sent at once, but a stream may deliver it in parts.
        if json.ends_with(b"]") {
            let memory = memory.ok_or_else(|| io::Error::other("it came without a descriptor"))?;
            return Ok((json, Userfaultfd::from_received(memory)));
        }
    }
}

#[cfg(test)]
mod tests {
    /// Not a test: what the tests start as a pager's process, which has this variable.
    #[test]
    fn becomes_a_pager() {
        if std::env::var_os(crate::pager::TEST_VARIABLE).is_some()
            && let Err(error) = super::main()
        {
            panic!("{error:?}");
        }
    }
}
