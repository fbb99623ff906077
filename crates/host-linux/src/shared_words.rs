//! Numbers that two processes see: a file that is mapped, shared.
//!
//! One process changes them at the price of a write to its own memory; whoever has the file reads them from it, also
//! after the process has ended, however it did.

use std::{fs::File, io, os::fd::AsRawFd as _, ptr::NonNull, sync::atomic::AtomicU64};

use nix::libc;

/// The beginning of a file, as numbers of 64 bits, in the order of this machine's bytes.
#[derive(Debug)]
pub struct SharedWords {
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: it is memory of this process that nobody else unmaps, and all access to it is atomic.
#[allow(unsafe_code)]
unsafe impl Send for SharedWords {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `count` words of a file that is open for reading and writing. All of them have to have their place on
    /// the disk: of a process that writes where there is none, or where the file was cut short, nothing is left
    /// (`SIGBUS`).
    ///
    /// # Errors
    /// The file is shorter, or cannot be mapped.
    pub fn map(file: &File, count: usize) -> io::Result<Self> {
        let bytes = count.checked_mul(size_of::<AtomicU64>()).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses touches nothing that is there.
        #[allow(unsafe_code)]
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, rights, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::Other))?;
        Ok(Self { words, count })
    }

    /// The words.
    #[must_use]
    pub fn as_slice(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, at the beginning of a page, for as long as this lives; any bytes are
        // such a number; and whoever else has the file mapped changes them as the processor does, without any
        // reference of Rust being wrong, because the type says that others do.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.words.as_ptr(), self.count)
        }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, to which there is no reference any more.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.words.as_ptr().cast(), self.count * size_of::<AtomicU64>());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt as _, sync::atomic::Ordering};

    use super::*;

    #[test]
    fn who_reads_the_file_sees_what_was_stored() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(SharedWords::map(&file, 2).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(SharedWords::map(&file, 0).is_err());
        file.set_len(1025 * 8).unwrap();
        let words = SharedWords::map(&file, 1025).unwrap();
        assert_eq!(words.as_slice().len(), 1025);
        words.as_slice()[1024].store(7, Ordering::Release);
        let mut read = [0; 8];
        file.read_exact_at(&mut read, 1024 * 8).unwrap();
        assert_eq!(u64::from_ne_bytes(read), 7);
        file.write_all_at(&9_u64.to_ne_bytes(), 8).unwrap();
        assert_eq!(words.as_slice()[1].load(Ordering::Acquire), 9);
        drop(words);
        file.read_exact_at(&mut read, 1024 * 8).unwrap();
        assert_eq!(u64::from_ne_bytes(read), 7);
    }
}
