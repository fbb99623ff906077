//! Every connection that callers have to the agent: how many there may be, and the end of those that a snapshot held.
//!
//! ```text
//!   accepted ──┬─ a program in the guest ── room? ──┬─ yes ──► open ──► ended by either side
//!              │                                    └─ no ───► closed
//!              └─ the host ─────────────── room? ──┬─ yes ──► open ──┬─► ended by either side
//!                                                  └─ no: the oldest │
//!                                                     of these ends  └─► `/init` of a restored machine: ended, if older
//! ```
//!
//! **Whoever else is connected, the host gets through.** A connection is always accepted, and what programs of the guest
//! hold is counted by itself. The host's own, those of clients among them, come from the gateway. Of those it is the
//! oldest that has to go: it may be left over from another life of the machine, and the newest may be an `/init`.
//!
//! **What a snapshot held is dead.** A machine that was restored takes its connections for established, but nobody is at
//! the other end, and nothing tells: what it sends is not even refused. Until the kernel gives up, which takes a quarter
//! of an hour, a program that writes to one would stand still, and with it everybody else who listens to that program. So
//! the host says in `/init` that the machine was restored, and then every connection of its side that is older than the
//! one which says so is broken off. Whoever serves one finds it reset, and never at its end: what a snapshot cut in the
//! middle must not pass for whole. Connections of programs in the guest go on: the snapshot held both of their ends.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::net::{Shutdown, shutdown, sockopt};

use super::state::Place;
use crate::network::GATEWAY;

/// How many connections programs in the guest may have at once, and, apart from those, the host and who comes through it.
const MAXIMUM: usize = 4096;

/// Somebody who asks something.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) address: SocketAddr,
    /// The number of the connection: a later one has a larger number.
    pub(crate) connection: u64,
}

/// The connections that are open. One exists, and only it ends a connection that others serve.
#[derive(Debug)]
pub(crate) struct Callers {
    place: Place,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    /// By number, and so by age.
    host: BTreeMap<u64, Entry>,
    guest: BTreeMap<u64, Entry>,
}

/// A connection that is open.
#[derive(Debug)]
struct Entry {
    /// A second descriptor of its socket.
    socket: OwnedFd,
    broken: Arc<AtomicBool>,
}

/// The right to be connected. It goes with the connection: the socket is closed when both are gone.
#[derive(Debug)]
pub(crate) struct Seat {
    callers: Arc<Callers>,
    caller: Caller,
    broken: Arc<AtomicBool>,
}

/// What becomes of a new connection.
#[derive(Debug, PartialEq, Eq)]
enum Admission {
    Take,
    /// In the place of the oldest of its kind.
    Replace,
    Refuse,
}

fn is_host(address: SocketAddr) -> bool {
    address.ip() == IpAddr::V4(GATEWAY)
}

/// Decides, by who comes and how many of the kind there are.
fn admit(host: bool, open: usize) -> Admission {
    match (host, open < MAXIMUM) {
        (_, true) => Admission::Take,
        (true, false) => Admission::Replace,
        (false, false) => Admission::Refuse,
    }
}

impl Callers {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, open: Mutex::default() }
    }

    /// Lets a new connection in, or says that there is no room.
    pub(crate) fn enter(
        self: &Arc<Self>,
        stream: impl AsFd,
        address: SocketAddr,
    ) -> io::Result<Option<Seat>> {
        let host = is_host(address);
        let mut open = self.open();
        open.last += 1;
        let connection = open.last;
        let kind = if host { &mut open.host } else { &mut open.guest };
        match admit(host, kind.len()) {
            Admission::Refuse => return Ok(None),
            Admission::Replace => {
                if let Some((_, oldest)) = kind.pop_first() {
                    oldest.break_off();
                }
            }
            Admission::Take => {}
        }
        let broken = Arc::<AtomicBool>::default();
        let socket = stream.as_fd().try_clone_to_owned()?;
        kind.insert(connection, Entry { socket, broken: Arc::clone(&broken) });
        drop(open);
        Ok(Some(Seat { callers: Arc::clone(self), caller: Caller { address, connection }, broken }))
    }

    /// Ends every connection that was there before this one and has an end outside of what was restored.
    pub(crate) fn break_off_before(&self, connection: u64) {
        let open = self.open();
        // Beside other programs, whoever plays the host is one of them.
        let guest = (self.place == Place::Outside).then(|| open.guest.range(..connection));
        for (_, entry) in open.host.range(..connection).chain(guest.into_iter().flatten()) {
            entry.break_off();
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    pub(crate) fn caller(&self) -> Caller {
        self.caller
    }

    /// Whether the connection was ended by the agent, so that an end which is read on it is none that the other side
    /// made.
    pub(super) fn is_broken_off(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.callers.open();
        open.host.remove(&self.caller.connection);
        open.guest.remove(&self.caller.connection);
    }
}

impl Entry {
    /// Ends the connection so that nothing of it stays: whoever serves it finds it reset, and the kernel does not go on to
    /// send what nobody will take.
    fn break_off(&self) {
        // Said before there is an end that could be read.
        self.broken.store(true, Ordering::Release);
        // Where these fail it has ended by itself.
        let _ = sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_house_has_room_for_the_host_alone() {
        assert_eq!(admit(false, MAXIMUM - 1), Admission::Take);
        assert_eq!(admit(false, MAXIMUM), Admission::Refuse);
        assert_eq!(admit(true, MAXIMUM - 1), Admission::Take);
        assert_eq!(admit(true, MAXIMUM), Admission::Replace);
        assert!(is_host("169.254.0.22:5".parse().unwrap()));
        assert!(!is_host("169.254.0.21:5".parse().unwrap()) && !is_host("127.0.0.1:5".parse().unwrap()));
    }

    /// Both ends of a connection.
    fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    proptest! {
        /// Whatever comes and goes, what is older than a connection ends, and nothing else does. In a guest that is
        /// about the host's side alone.
        #[test]
        fn those_that_were_there_before_end(
            steps in prop::collection::vec((any::<bool>(), prop::option::weighted(0.3, 0..8_usize)), 1..10),
            which in any::<prop::sample::Index>(),
            in_guest in any::<bool>(),
        ) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let callers = Arc::new(Callers::new(if in_guest { Place::Guest } else { Place::Outside }));
            let mut open = Vec::new();
            for (host, leaves) in steps {
                let (client, served) = pair(&listener);
                let address = if host { (GATEWAY, 1).into() } else { client.local_addr().unwrap() };
                let seat = callers.enter(&served, address).unwrap().unwrap();
                open.push((client, served, seat));
                if let Some(index) = leaves && index < open.len() {
                    open.remove(index);
                }
            }
            prop_assume!(!open.is_empty());
            let number = open[which.index(open.len())].2.caller().connection;
            callers.break_off_before(number);
            for (client, served, seat) in &mut open {
                let Caller { address, connection } = seat.caller();
                let broken = connection < number && (is_host(address) || !in_guest);
                served.set_nonblocking(true).unwrap();
                prop_assert_eq!(served.read(&mut [0]).is_ok(), broken, "only an end can be read");
                client.set_nonblocking(true).unwrap();
                prop_assert_eq!(client.read(&mut [0]).is_ok(), broken);
                prop_assert_eq!(seat.is_broken_off(), broken);
            }
            drop(open);
            let left = callers.open();
            prop_assert!(left.host.is_empty() && left.guest.is_empty());
        }
    }
}
