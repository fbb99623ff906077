//! Memory of this process whose faults somebody else serves: what a VMM has, for tests of who serves it.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, Ordering},
};

use nix::libc;

const API: u32 = 0xc018_aa3f;
const REGISTER: u32 = 0xc020_aa00;
/// `UFFD_API`, `UFFD_FEATURE_EVENT_REMOVE` and `UFFDIO_REGISTER_MODE_MISSING`.
const VERSION: u64 = 0xaa;
const EVENT_REMOVE: u64 = 1 << 3;
const MISSING: u64 = 1;

/// Anonymous memory, all of which is missing at first. Threads that touch it wait until somebody has put a page there.
#[derive(Debug)]
pub struct Arena {
    address: NonNull<u8>,
    bytes: usize,
    descriptor: OwnedFd,
}

// SAFETY: the memory is this value's alone, and all access to it is atomic.
#[allow(unsafe_code)]
unsafe impl Send for Arena {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Arena {}

#[repr(C)]
struct Interface {
    version: u64,
    features: u64,
    requests: u64,
}

#[repr(C)]
struct Registration {
    start: u64,
    length: u64,
    mode: u64,
    requests: u64,
}

impl Arena {
    /// Maps so many bytes, which are whole pages, and makes the descriptor as Firecracker does.
    ///
    /// # Errors
    /// Not permitted, or no memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: takes flags alone.
        #[allow(unsafe_code)]
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let number = i32::try_from(number).ok().filter(|number| *number >= 0);
        let number = number.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just made it, for us.
        #[allow(unsafe_code)]
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        let mut interface = Interface { version: VERSION, features: EVENT_REMOVE, requests: 0 };
        // SAFETY: the structure is the one of this request, and lives until after the call.
        #[allow(unsafe_code)]
        let outcome = unsafe { libc::ioctl(number, libc::c_ulong::from(API) as _, &raw mut interface) };
        done(outcome)?;
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at a place that the kernel chooses touches nothing that is there.
        #[allow(unsafe_code)]
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, rights, kind, -1, 0) };
        let address = match address {
            libc::MAP_FAILED => None,
            address => NonNull::new(address.cast()),
        };
        let address = address.ok_or_else(io::Error::last_os_error)?;
        let arena = Self { address, bytes, descriptor };
        let mut registration =
            Registration { start: arena.address(), length: bytes as u64, mode: MISSING, requests: 0 };
        // SAFETY: as above. The memory is not used by anybody but this value.
        #[allow(unsafe_code)]
        let outcome =
            unsafe { libc::ioctl(number, libc::c_ulong::from(REGISTER) as _, &raw mut registration) };
        done(outcome)?;
        Ok(arena)
    }

    /// Where it is in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// The descriptor.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// A byte of it. Waits until its page is there.
    ///
    /// # Panics
    /// It is not in it, as in the other functions.
    #[must_use]
    pub fn read(&self, at: usize) -> u8 {
        self.byte(at).load(Ordering::Relaxed)
    }

    /// Changes a byte. Waits until its page is there.
    pub fn write(&self, at: usize, value: u8) {
        self.byte(at).store(value, Ordering::Relaxed);
    }

    /// Takes pages away, as a balloon does. Waits until whoever serves has read of it.
    ///
    /// # Errors
    /// They are no whole pages.
    pub fn remove(&self, at: usize, bytes: usize) -> io::Result<()> {
        assert!(at + bytes <= self.bytes);
        // SAFETY: the pages are this value's, nobody has a reference to them but as atomics, of which zero is a value.
        #[allow(unsafe_code)]
        let outcome =
            unsafe { libc::madvise(self.address.as_ptr().add(at).cast(), bytes, libc::MADV_DONTNEED) };
        done(outcome)
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.bytes);
        // SAFETY: it is within the mapping, which lives as long as this value; any byte is one; and whoever
        // else changes it does so atomically.
        #[allow(unsafe_code)]
        unsafe {
            AtomicU8::from_ptr(self.address.as_ptr().add(at))
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, to which there is no reference any more.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.address.as_ptr().cast(), self.bytes);
        }
    }
}

fn done(outcome: libc::c_int) -> io::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
