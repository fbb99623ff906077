//! The bytes of a file from the kernel's memory to a socket, without a copy of them in this program.
//!
//! What writes an answer takes bytes and knows nothing of files. So it is given *stand-ins*: slices of one stretch of
//! memory that is there for nothing else, which the connection below it knows by where they lie. In the place of each
//! the connection sends what was promised: as many bytes of a file.
//!
//! ```text
//!  a body ── promise(file, offset, length) ──► the outlet: promises, in order ──┐ the first one
//!     │                                                                         │
//!     │ a stand-in of that length                                               ▼
//!     └──► hyper: head, stand-in, text, stand-in, … ──────────────────────► Connection ── sendfile(2) ──► socket
//!
//!  a promise:  open ──► some of it is sent ──► kept
//!               └────────────────┴───────────► broken: its stand-in is gone
//! ```
//!
//! No byte of a stand-in is ever sent itself, and no byte of a file in the place of another's:
//!
//! - A slice that lies in the stretch is never written. It stands for the first open promise; how far into the stretch
//!   it begins is how much of that was sent before, and its length is what is left. If one of the two is otherwise, the
//!   connection fails.
//! - Whoever copied a stand-in, instead of handing it on, would let go of it before its promise is kept. Then the
//!   promise is broken, and the connection fails before the copy is written.
//! - Other bytes in the midst of a promise fail the connection too.
//!
//! A connection that failed writes nothing any more, so that its client knows that there should be more. The same
//! happens when a file ends before what was promised of it.
//!
//! What waits in the kernel for a slow client are pages of the file and no copies. Where somebody writes to the file
//! meanwhile, the client may get what they wrote: it is read as it is sent, and not before.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use rustix::{
    fs::sendfile,
    io::Errno,
    net::{SendFlags, send},
};

use super::threads::Aside;

/// The most that one promise is about.
pub(super) const LARGEST: usize = 1024 * 1024;
/// How much is copied at a time of a file that cannot be sent otherwise.
const COPIED: usize = 64 * 1024;

/// What stand-ins are slices of. Nothing writes to it and nothing reads it, so that it takes up no memory.
static STRETCH: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; LARGEST]);

/// Where a connection is promised parts of files to send. It has one, which its requests share.
#[derive(Debug, Clone, Default)]
pub(super) struct Outlet(Arc<Mutex<Promises>>);

#[derive(Debug, Default)]
struct Promises {
    /// In the order in which they were made.
    open: VecDeque<Promise>,
    /// How many were kept, which is the number of the first open one.
    kept: u64,
    /// Whether a stand-in is gone whose promise was not kept.
    broken: bool,
}

/// A part of a file that is to be sent.
#[derive(Debug)]
struct Promise {
    file: Arc<Aside<File>>,
    /// Where in the file is what is sent next.
    offset: u64,
    sent: usize,
    left: usize,
}

/// The owner of the bytes of a stand-in.
#[derive(Debug)]
struct StandIn {
    length: usize,
    number: u64,
    outlet: Outlet,
}

impl AsRef<[u8]> for StandIn {
    fn as_ref(&self) -> &[u8] {
        &STRETCH[..self.length]
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let mut promises = self.outlet.promises();
        if self.number >= promises.kept {
            promises.broken = true;
        }
    }
}

/// What is written first of slices among which there is a stand-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    /// The slice of this number, which is ordinary bytes. Somewhere behind it is a stand-in.
    One(usize),
    /// A stand-in, of which so much was written already and so much is left.
    StandIn { written: usize, left: usize },
}

impl First {
    /// Looks where slices lie, not what is in them. None when all of them are ordinary bytes.
    fn of(slices: &[IoSlice<'_>]) -> Option<Self> {
        slices.iter().find(|slice| place(slice).is_some())?;
        let (index, slice) = slices.iter().enumerate().find(|(_, slice)| !slice.is_empty())?;
        Some(match place(slice) {
            Some(written) => Self::StandIn { written, left: slice.len() },
            None => Self::One(index),
        })
    }
}

/// Where in the stretch a slice begins, if it does.
fn place(slice: &[u8]) -> Option<usize> {
    let (stretch, start) = (STRETCH.as_ptr_range(), slice.as_ptr());
    (stretch.contains(&start) && !slice.is_empty()).then(|| start.addr() - stretch.start.addr())
}

impl Outlet {
    fn promises(&self) -> MutexGuard<'_, Promises> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises to send `length` bytes of a file from `offset` on, or the first [`LARGEST`] of them, and answers with
    /// as many bytes that stand for them. They are to be written to the connection in the order of their promises.
    pub(super) fn promise(&self, file: &Arc<Aside<File>>, offset: u64, length: usize) -> Bytes {
        let length = length.min(LARGEST);
        if length == 0 {
            return Bytes::new();
        }
        let mut promises = self.promises();
        let number = promises.kept + promises.open.len() as u64;
        promises.open.push_back(Promise { file: Arc::clone(file), offset, sent: 0, left: length });
        drop(promises);
        Bytes::from_owner(StandIn { length, number, outlet: self.clone() })
    }

    /// What of these slices is written first, by [`Outlet::write`]. None when all of them are ordinary bytes, which
    /// can be written as ever.
    ///
    /// # Errors
    /// Nothing may be written to the connection any more.
    pub(super) fn first(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<First>> {
        let (first, promises) = (First::of(slices), self.promises());
        let begun = promises.open.front().is_some_and(|promise| promise.sent > 0);
        if promises.broken || begun && !matches!(first, Some(First::StandIn { .. })) {
            return Err(broken());
        }
        Ok(first)
    }

    /// Sends some of what a stand-in stands for.
    fn keep(&self, socket: BorrowedFd<'_>, written: usize, left: usize) -> io::Result<usize> {
        let mut promises = self.promises();
        let open = promises.open.front_mut();
        let promise =
            open.filter(|promise| (promise.sent, promise.left) == (written, left)).ok_or_else(broken)?;
        let sent = promise.send(socket)?;
        if promise.left == 0 {
            promises.open.pop_front();
            promises.kept += 1;
        }
        Ok(sent)
    }

    /// Writes some of what is first to a socket that does not block, and says how many bytes.
    pub(super) fn write(&self, socket: impl AsFd, slices: &[IoSlice<'_>], first: First) -> io::Result<usize> {
        Ok(match first {
            // What follows should be in the same packet.
            First::One(index) => send(socket, &slices[index], SendFlags::MORE | SendFlags::NOSIGNAL)?,
            First::StandIn { written, left } => self.keep(socket.as_fd(), written, left)?,
        })
    }
}

impl Promise {
    fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut offset = self.offset;
        let sent = match sendfile(socket, self.file.get()?, Some(&mut offset), self.left) {
            // Not every file system can.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.copy(socket)?,
            sent => sent?,
        };
        if sent == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += sent as u64;
        self.sent += sent;
        self.left -= sent;
        Ok(sent)
    }

    /// Reads and writes. What the socket does not take is read again the next time.
    fn copy(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut bytes = vec![0; self.left.min(COPIED)];
        let read = self.file.get()?.read_at(&mut bytes, self.offset)?;
        Ok(if read == 0 { 0 } else { send(socket, &bytes[..read], SendFlags::NOSIGNAL)? })
    }
}

fn broken() -> io::Error {
    io::Error::other("a file was not sent as it was promised")
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, future::poll_fn, io::Write, pin::Pin};

    use bytes::Buf;
    use proptest::prelude::*;
    use rustix::net::sockopt::set_socket_send_buffer_size;
    use tokio::{
        io::{AsyncReadExt, AsyncWrite},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::agent::{
        callers::Callers,
        connection::{Connection, TURN},
        state::Place,
    };

    /// A connection whose queue in the kernel is short, and its other end.
    async fn connection() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        set_socket_send_buffer_size(&ours, 64 * 1024).unwrap();
        let address = ours.local_addr().unwrap();
        let seat = Arc::new(Callers::new(Place::Outside)).enter(&ours, address).unwrap().unwrap();
        (Connection::new(Vec::new(), ours, seat), listener.accept().await.unwrap().0)
    }

    async fn write(connection: &mut Connection, slices: &[&[u8]]) -> io::Result<usize> {
        let slices: Vec<_> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
        poll_fn(|context| Pin::new(&mut *connection).poll_write_vectored(context, &slices)).await
    }

    /// Writes all pieces, so many at a time, as whoever writes answers does it.
    async fn write_all(connection: &mut Connection, pieces: Vec<Bytes>, together: usize) -> io::Result<()> {
        let mut queue = VecDeque::from(pieces);
        while !queue.is_empty() {
            let slices: Vec<&[u8]> = queue.iter().take(together).map(AsRef::as_ref).collect();
            let mut written = write(connection, &slices).await?;
            while let Some(piece) = queue.front_mut() {
                let taken = written.min(piece.len());
                piece.advance(taken);
                written -= taken;
                if !piece.is_empty() {
                    break;
                }
                queue.pop_front();
            }
        }
        Ok(())
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap()
    }

    fn file_of(content: &[u8]) -> Arc<Aside<File>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        Arc::new(Aside::new(file))
    }

    fn noise(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect()
    }

    #[tokio::test]
    async fn what_copies_a_stand_in_writes_nothing() {
        let (mut connection, mut other) = connection().await;
        let stand_in = connection.outlet().promise(&file_of(b"content"), 0, 7);
        let copy = stand_in.to_vec();
        drop(stand_in);
        for bytes in [copy.as_slice(), b"anything"] {
            assert_eq!(write(&mut connection, &[bytes]).await.unwrap_err().kind(), io::ErrorKind::Other);
        }
        drop(connection);
        assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn only_what_is_left_of_the_first_promise_is_written_for_a_stand_in() {
        let file = file_of(&noise(LARGEST));
        for wrong in
            ["a shorter one", "a later part", "the next one", "other bytes", "one of another connection"]
        {
            let ((mut connection, mut other), (elsewhere, _)) = (connection().await, connection().await);
            let outlet = connection.outlet();
            let first = outlet.promise(&file, 0, LARGEST);
            let next = outlet.promise(&file, 0, 5);
            let foreign = elsewhere.outlet().promise(&file, 0, 7);
            let mut written = 0;
            let slice: &[u8] = match wrong {
                "a shorter one" => &first[..6],
                "a later part" => &first[1..],
                "the next one" => &next,
                "other bytes" => {
                    // In the midst of a promise. In front of it they are in order.
                    assert_eq!(write(&mut connection, &[b"head", &first]).await.unwrap(), 4);
                    written = 4 + write(&mut connection, &[&first]).await.unwrap();
                    assert!(written < LARGEST);
                    b"other bytes"
                }
                _ => &foreign,
            };
            let error = write(&mut connection, &[slice]).await.unwrap_err();
            assert_eq!(error.to_string(), "a file was not sent as it was promised", "{wrong}");
            drop(connection);
            let mut sent = Vec::new();
            other.read_to_end(&mut sent).await.unwrap();
            assert_eq!(sent.len(), written, "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_promise_is_kept_once() {
        let (mut connection, mut other) = connection().await;
        let stand_in = connection.outlet().promise(&file_of(b"content"), 0, 7);
        assert_eq!(write(&mut connection, &[b"", &stand_in]).await.unwrap(), 7);
        assert!(write(&mut connection, &[&stand_in]).await.is_err());
        drop(stand_in);
        assert_eq!(write(&mut connection, &[b"!"]).await.unwrap(), 1);
        drop(connection);
        let mut sent = String::new();
        other.read_to_string(&mut sent).await.unwrap();
        assert_eq!(sent, "content!");
    }

    #[tokio::test]
    async fn a_file_that_ends_too_early_fails_the_connection_after_what_there_is() {
        let (mut connection, mut other) = connection().await;
        let pieces = vec![connection.outlet().promise(&file_of(b"short"), 0, 100)];
        let error = write_all(&mut connection, pieces, 1).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(write(&mut connection, &[b"more"]).await.is_err());
        drop(connection);
        let mut sent = String::new();
        other.read_to_string(&mut sent).await.unwrap();
        assert_eq!(sent, "short");
    }

    #[tokio::test]
    async fn what_cannot_be_sent_from_where_it_is_gets_copied() {
        let (mut connection, mut other) = connection().await;
        // Nobody can splice it.
        let file = File::open("/proc/self/environ").unwrap();
        let mut content = vec![0; 4096];
        let length = file.read_at(&mut content, 0).unwrap();
        content.truncate(length);
        assert!(content.len() > 2, "cargo sets variables");
        let (null, mut offset) = (File::options().write(true).open("/dev/null").unwrap(), 0);
        assert_eq!(sendfile(&null, &file, Some(&mut offset), 1), Err(Errno::INVAL));
        let (outlet, file) = (connection.outlet(), Arc::new(Aside::new(file)));
        let pieces = vec![outlet.promise(&file, 0, 2), outlet.promise(&file, 2, content.len() - 2)];
        write_all(&mut connection, pieces, 2).await.unwrap();
        drop(connection);
        let mut sent = Vec::new();
        other.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, content);
    }

    #[tokio::test]
    async fn others_have_their_turn_however_fast_a_client_is() {
        let (mut connection, other) = connection().await;
        let mut other = other.into_std().unwrap();
        other.set_nonblocking(false).unwrap();
        let reading = std::thread::spawn(move || io::copy(&mut other, &mut io::sink()).unwrap());
        let file = file_of(&noise(LARGEST));
        let mut in_a_row = 0;
        for _ in 0..64 {
            let mut stand_in = connection.outlet().promise(&file, 0, LARGEST);
            while !stand_in.is_empty() {
                let written = poll_fn(|context| {
                    let slices = [IoSlice::new(&stand_in)];
                    let written = Pin::new(&mut connection).poll_write_vectored(context, &slices);
                    if written.is_pending() {
                        in_a_row = 0;
                    }
                    written
                });
                let written = written.await.unwrap();
                stand_in.advance(written);
                in_a_row += written;
                assert!(in_a_row < TURN + LARGEST);
            }
        }
        drop(connection);
        assert_eq!(reading.join().unwrap(), 64 * LARGEST as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn text_and_parts_come_in_order_to_whoever_reads_in_pieces(
            parts in prop::collection::vec((0..LARGEST, 0..LARGEST, "[a-z]{0,9}"), 1..12),
            together in 1..5_usize,
            read in prop_oneof![1000..5000_usize, Just(1 << 20)],
        ) {
            let content = noise(2 * LARGEST);
            let file = file_of(&content);
            runtime().block_on(async {
                let (mut connection, mut other) = connection().await;
                let outlet = connection.outlet();
                let (mut pieces, mut wanted) = (Vec::new(), Vec::new());
                for (start, length, text) in parts {
                    wanted.extend_from_slice(text.as_bytes());
                    wanted.extend_from_slice(&content[start..start + length]);
                    pieces.extend([Bytes::from(text), outlet.promise(&file, start as u64, length)]);
                }
                pieces.retain(|piece| !piece.is_empty());
                let writing = async {
                    write_all(&mut connection, pieces, together).await.unwrap();
                    drop(connection);
                };
                let reading = async {
                    let (mut all, mut buffer) = (Vec::new(), vec![0; read]);
                    loop {
                        match other.read(&mut buffer).await.unwrap() {
                            0 => break all,
                            length => all.extend_from_slice(&buffer[..length]),
                        }
                    }
                };
                let ((), all) = tokio::join!(writing, reading);
                assert!(all == wanted);
            });
        }
    }
}
