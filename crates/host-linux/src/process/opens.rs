//! Files that a process opens for reading and writing, opened by somebody else: for programs that take a path where they
//! should take a descriptor, and ask for more rights than they need.
//!
//! ```text
//!  child    seccomp filter: openat(…, O_RDWR) waits ─► its listener goes to the parent over a socket ─► program
//!  parent   Opens::next ─► Open: its path ─► give(file): the call answers with a descriptor of that file
//!                                        └─► go_on(): the kernel does what was asked for
//!           dropped ─► from then on such calls fail (ENOSYS)
//! ```
//!
//! Only a call with these flags and no other waits: what opens a file in any other way is not held up. **It keeps
//! nobody from anything.** What a process must not open it must not be able to open; this gives it what it could not.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStringExt, fs::FileExt, net::UnixDatagram},
    },
    path::PathBuf,
    ptr,
    time::{Duration, Instant},
};

use nix::libc;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, IoSliceMut},
    ioctl::{Opcode, Setter, Updater, ioctl},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};

use crate::syscalls::{ARGUMENTS_AT, JUMP_IF_EQUAL, LOAD, NUMBER_AT, RETURN, instruction};

const RECEIVE: Opcode = 0xc050_2100;
const SEND: Opcode = 0xc018_2101;
const ADD: Opcode = 0x4018_2103;
const CONTINUE: u32 = 1;
const ADD_AND_SEND: u32 = 2;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`.
const NEW_LISTENER: libc::c_ulong = 8;
/// The longest path that is looked at, with its terminator.
const PATH_BYTES: u64 = 4096;
const PAGE: u64 = 4096;

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// `struct seccomp_notif_addfd`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Addition {
    id: u64,
    flags: u32,
    source: u32,
    number: u32,
    number_flags: u32,
}

/// Lets an `openat` wait whose flags, its third argument, are these and no other. Pure.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the number of a call, which is small and not negative"
)]
fn filter() -> [libc::sock_filter; 6] {
    const OPENAT: u32 = libc::SYS_openat as u32;
    [
        instruction(LOAD, NUMBER_AT, 0, 0),
        instruction(JUMP_IF_EQUAL, OPENAT, 0, 3),
        // Little endian: the lower half comes first.
        instruction(LOAD, ARGUMENTS_AT + 8 * 2, 0, 0),
        instruction(JUMP_IF_EQUAL, libc::O_RDWR.cast_unsigned(), 0, 1),
        instruction(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]
}

/// The filter, and the two ends of the socket over which its listener comes.
#[derive(Debug)]
pub(super) struct Held {
    ours: UnixDatagram,
    theirs: UnixDatagram,
}

impl Held {
    pub(super) fn new() -> io::Result<Self> {
        let (ours, theirs) = UnixDatagram::pair()?;
        Ok(Self { ours, theirs })
    }

    /// Installs the filter, and sends its listener.
    ///
    /// # Errors
    /// -1, with the reason in `errno`.
    ///
    /// # Safety
    /// Only in a fresh child that can get no new privileges: see [`super::spawn`]. It allocates nothing.
    #[allow(unsafe_code)]
    #[allow(clippy::cast_possible_truncation, reason = "a small constant of the kernel")]
    pub(super) unsafe fn install(&self) -> libc::c_int {
        let mut filter = filter();
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the kernel copies the filter, which lives until the call returns. The message is built in memory of this
        // function, of the size that `CMSG_SPACE` asks for and aligned as its head.
        unsafe {
            let operation = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
            let listener = libc::syscall(libc::SYS_seccomp, operation, NEW_LISTENER, ptr::from_ref(&program));
            let Ok(listener) = RawFd::try_from(listener) else { return -1 };
            if listener < 0 {
                return -1;
            }
            let mut space = [0_u64; 8];
            let mut byte = 0_u8;
            let mut part = libc::iovec { iov_base: ptr::from_mut(&mut byte).cast(), iov_len: 1 };
            let mut message = std::mem::zeroed::<libc::msghdr>();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = space.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let head = libc::CMSG_FIRSTHDR(&raw const message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(listener);
            if libc::sendmsg(self.theirs.as_raw_fd(), &raw const message, 0) < 0 { -1 } else { 0 }
        }
    }

    /// The listener that a child has sent before it executed its program.
    pub(super) fn listener(self) -> io::Result<Opens> {
        drop(self.theirs);
        self.ours.set_nonblocking(true)?;
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&self.ours, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut sent = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        let listener = sent.next().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        Ok(Opens { listener })
    }
}

/// The calls of a process that wait for an answer.
#[derive(Debug)]
pub struct Opens {
    listener: OwnedFd,
}

impl Opens {
    /// Waits for the next call; none when there was none within `bound`, or none can come because the process is gone.
    /// Blocks.
    ///
    /// # Errors
    /// The kernel says so.
    pub fn next(&self, bound: Duration) -> io::Result<Option<Open<'_>>> {
        let begin = Instant::now();
        loop {
            let left = bound.saturating_sub(begin.elapsed());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
            match poll(&mut polled, Some(&left)) {
                Err(Errno::INTR) => continue,
                Ok(0) => return Ok(None),
                polls => drop(polls?),
            }
            if !polled[0].revents().contains(PollFlags::IN) {
                return Ok(None);
            }
            if let Some(call) = self.receive()? {
                return Ok(Some(Open { opens: self, call }));
            }
        }
    }

    /// The call that waits; none when it was broken off by a signal in the meantime, after which it is made again.
    fn receive(&self) -> io::Result<Option<Notification>> {
        let mut call = Notification::default();
        // SAFETY: the call fills one `struct seccomp_notif`, of which `Notification` has the size and the layout and which is
        // zero as the kernel demands, and keeps no pointer to it.
        #[allow(unsafe_code)]
        let received = unsafe { ioctl(&self.listener, Updater::<RECEIVE, Notification>::new(&mut call)) };
        match received {
            Ok(()) => Ok(Some(call)),
            Err(Errno::NOENT | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// One call, which waits.
#[derive(Debug)]
pub struct Open<'a> {
    opens: &'a Opens,
    call: Notification,
}

impl Open<'_> {
    /// What is to be opened, as the process says.
    ///
    /// # Errors
    /// The process is gone, or there is no text where it says.
    pub fn path(&self) -> io::Result<PathBuf> {
        let memory = File::open(format!("/proc/{}/mem", self.call.pid))?;
        let mut bytes: Vec<u8> = Vec::new();
        let mut at = self.call.arguments[1];
        while (bytes.len() as u64) < PATH_BYTES {
            // What follows the page of its end need not be there.
            let mut piece = vec![0; usize::try_from(PAGE - at % PAGE).unwrap_or_default()];
            memory.read_exact_at(&mut piece, at)?;
            if let Some(end) = piece.iter().position(|byte| *byte == 0) {
                bytes.extend(&piece[..end]);
                return Ok(std::ffi::OsString::from_vec(bytes).into());
            }
            at += piece.len() as u64;
            bytes.extend(piece);
        }
        Err(io::ErrorKind::InvalidFilename.into())
    }

    /// Answers with a descriptor of this file, which has the rights that `file` has.
    ///
    /// # Errors
    /// `NotFound` when the call was broken off by a signal: it is made again. Or the process has as many files open as it may.
    pub fn give(self, file: impl AsFd) -> io::Result<()> {
        let source = file.as_fd().as_raw_fd().cast_unsigned();
        let flags = libc::O_CLOEXEC.cast_unsigned();
        let addition =
            Addition { id: self.call.id, flags: ADD_AND_SEND, source, number: 0, number_flags: flags };
        // SAFETY: the call reads one `struct seccomp_notif_addfd`, of which `Addition` has the size and the layout.
        #[allow(unsafe_code)]
        unsafe {
            ioctl(&self.opens.listener, Setter::<ADD, Addition>::new(addition))?;
        }
        Ok(())
    }

    /// Has the kernel do what was asked for.
    ///
    /// # Errors
    /// As [`Open::give`].
    pub fn go_on(self) -> io::Result<()> {
        let mut response = Response { id: self.call.id, value: 0, error: 0, flags: CONTINUE };
        // SAFETY: the call reads one `struct seccomp_notif_resp`, of which `Response` has the size and the layout.
        #[allow(unsafe_code)]
        unsafe {
            ioctl(&self.opens.listener, Updater::<SEND, Response>::new(&mut response))?;
        }
        Ok(())
    }
}
