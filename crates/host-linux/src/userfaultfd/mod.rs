//! Serving the page faults of another process (`userfaultfd`).
//!
//! The process that faults makes the descriptor, registers parts of its memory with it, and sends it; whoever has it is
//! told of each page that is touched and is not there, and puts a content in its place. The thread that
//! touched the page waits until then.
//!
//! ```text
//!  thread of the other process                             whoever has the descriptor
//!  touches a page that is not there ── Event::Fault ──►    copy(), or zero() ──► the thread goes on
//!  madvise(MADV_DONTNEED) ─────────── Event::Removed ──►   is read, and the thread goes on: the pages are not there any more
//! ```

#[cfg(feature = "arena")]
pub mod arena;

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use nix::libc;

/// The size of `struct uffd_msg`.
const MESSAGE: usize = 32;
/// How many messages are read at once.
pub const BATCH: usize = 16;

const EVENT_FAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

/// The requests (`linux/userfaultfd.h`).
pub(crate) const WAKE: u32 = 0x8010_aa02;
pub(crate) const COPY: u32 = 0xc028_aa03;
pub(crate) const ZEROPAGE: u32 = 0xc020_aa04;

/// What happened to the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page, which this address is in.
    Fault(u64),
    /// The pages from the first address to the second are about to be taken away.
    Removed(u64, u64),
    /// Something that nobody asked to be told, with its number.
    Other(u8),
}

impl Event {
    fn parse(message: &[u8; MESSAGE]) -> Self {
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| message[at + byte]));
        match message[0] {
            EVENT_FAULT => Self::Fault(word(16)),
            EVENT_REMOVE => Self::Removed(word(8), word(16)),
            other => Self::Other(other),
        }
    }
}

/// Why pages were not put where they should be.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// There is a page already.
    #[error("there is a page already")]
    Exists,
    /// The process changes its memory at this moment: it is possible again when that event was read.
    #[error("the memory is being changed")]
    Changing,
    /// The process is gone.
    #[error("the process is gone")]
    Gone,
    /// Anything else: most likely the memory is not registered.
    #[error("the kernel refuses")]
    Refused(#[source] io::Error),
}

impl PlaceError {
    fn of(error: i32) -> Self {
        match error {
            libc::EEXIST => Self::Exists,
            libc::EAGAIN => Self::Changing,
            libc::ESRCH => Self::Gone,
            other => Self::Refused(io::Error::from_raw_os_error(other)),
        }
    }
}

/// A descriptor of a memory.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

/// As the kernel has them.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    /// Answered: how many bytes were copied, or the error.
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

impl Userfaultfd {
    /// Takes a descriptor that somebody sent. That it is one of a memory is found out by using it: of any other, each
    /// request fails.
    #[must_use]
    pub fn from_received(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Reads what has happened, which is no more than [`BATCH`] events, and none if nothing has. `buffer` is for the
    /// bytes.
    ///
    /// # Errors
    /// It is no such descriptor.
    pub fn read<'a>(&self, buffer: &'a mut Buffer) -> io::Result<impl Iterator<Item = Event> + Clone + 'a> {
        let length = loop {
            match rustix::io::read(&self.0, &mut buffer.0) {
                Ok(length) => break length,
                Err(rustix::io::Errno::AGAIN) => break 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let (messages, _) = buffer.0[..length].as_chunks::<MESSAGE>();
        Ok(messages.iter().map(Event::parse))
    }

    /// Puts pages with this content at an address of the other process, and lets those go on who wait for them. Both
    /// are whole pages. Answers how many bytes: it can be less, when something was in the way of the rest.
    ///
    /// # Errors
    /// Nothing was put there.
    pub fn copy(&self, to: u64, content: &[u8]) -> Result<u64, PlaceError> {
        let length = content.len() as u64;
        let mut copy = Copy { to, from: content.as_ptr() as u64, length, mode: 0, copied: 0 };
        // SAFETY: the kernel reads `length` bytes from the slice, which lives until after the call, and writes its answer into
        // the structure, which is the one of this request. What it writes elsewhere are pages that are not
        // there, in memory that was registered with the descriptor to be filled so: nothing that anybody has
        // a reference to.
        #[allow(unsafe_code)]
        let outcome =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::c_ulong::from(COPY) as _, &raw mut copy) };
        answer(outcome, copy.copied)
    }

    /// The same with zeros, for which the other process needs no memory until it writes.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn zero(&self, to: u64, length: u64) -> Result<u64, PlaceError> {
        let mut zero = ZeroPage { range: Range { start: to, length }, mode: 0, zeroed: 0 };
        // SAFETY: as for `copy`, without a source.
        #[allow(unsafe_code)]
        let outcome =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::c_ulong::from(ZEROPAGE) as _, &raw mut zero) };
        answer(outcome, zero.zeroed)
    }

    /// Has those try again who wait for a page between `start` and `length` bytes further.
    ///
    /// # Errors
    /// It is no such descriptor, or these are no pages.
    pub fn wake(&self, start: u64, length: u64) -> io::Result<()> {
        let mut range = Range { start, length };
        // SAFETY: the kernel only reads the structure, which is the one of this request.
        #[allow(unsafe_code)]
        let outcome =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::c_ulong::from(WAKE) as _, &raw mut range) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// What the kernel says of pages: some may have been placed although the request failed.
fn answer(outcome: libc::c_int, placed: i64) -> Result<u64, PlaceError> {
    let error = io::Error::last_os_error();
    match u64::try_from(placed) {
        Ok(placed) if outcome == 0 || placed > 0 => Ok(placed),
        _ => Err(PlaceError::of(error.raw_os_error().unwrap_or_default())),
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Room for the events that are read at once.
#[derive(Debug)]
pub struct Buffer([u8; BATCH * MESSAGE]);

impl Default for Buffer {
    fn default() -> Self {
        Self([0; BATCH * MESSAGE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_kernel_writes_them() {
        let mut message = [0; MESSAGE];
        message[0] = EVENT_FAULT;
        message[8..16].copy_from_slice(&1_u64.to_ne_bytes());
        message[16..24].copy_from_slice(&0x7f00_1000_u64.to_ne_bytes());
        assert_eq!(Event::parse(&message), Event::Fault(0x7f00_1000));
        message[0] = EVENT_REMOVE;
        assert_eq!(Event::parse(&message), Event::Removed(1, 0x7f00_1000));
        message[0] = 0x13;
        assert_eq!(Event::parse(&message), Event::Other(0x13));
    }

    #[test]
    fn the_requests_have_the_sizes_that_their_numbers_say() {
        for (request, size) in
            [(WAKE, size_of::<Range>()), (COPY, size_of::<Copy>()), (ZEROPAGE, size_of::<ZeroPage>())]
        {
            assert_eq!((request >> 16) as usize & 0x3fff, size);
        }
    }

    #[test]
    fn what_is_no_such_descriptor_fails_at_every_use() {
        let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let other = Userfaultfd::from_received(read);
        assert_eq!(other.read(&mut Buffer::default()).unwrap().count(), 0);
        assert!(matches!(other.copy(4096, &[0; 4096]), Err(PlaceError::Refused(_))));
        assert!(matches!(other.zero(4096, 4096), Err(PlaceError::Refused(_))));
        assert!(other.wake(4096, 4096).is_err());
    }

    #[test]
    fn a_part_that_was_placed_counts() {
        assert_eq!(answer(-1, 4096).unwrap(), 4096);
        assert_eq!(answer(0, 8192).unwrap(), 8192);
        assert!(answer(-1, -11).is_err());
    }
}
