//! Telling the disk which of its blocks hold nothing.

use std::{fs::File, io, os::fd::AsFd, path::Path};

use rustix::{
    io::Errno,
    ioctl::{self, Updater, opcode},
};

const FITRIM: ioctl::Opcode = opcode::read_write::<Range>(b'X', 121);

/// `struct fstrim_range`. The kernel answers in `length` how many bytes it trimmed.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    minimum: u64,
}

/// Why free blocks were not trimmed.
#[derive(Debug, thiserror::Error)]
pub enum TrimError {
    /// The mount point could not be opened.
    #[error("cannot open the file system")]
    Open(#[source] io::Error),
    /// The file system, or the disk below it, knows no trimming.
    #[error("the file system cannot be trimmed")]
    Unsupported,
    /// The kernel refused.
    #[error("cannot trim the file system")]
    Trim(#[source] Errno),
}

/// Trims the free blocks of the file system mounted at `mount_point` that lie in `length` bytes from `start` on.
/// Returns how many bytes were trimmed, or nothing when `start` lies behind the end.
pub fn trim(mount_point: &Path, start: u64, length: u64) -> Result<Option<u64>, TrimError> {
    let directory = File::open(mount_point).map_err(TrimError::Open)?;
    let mut range = Range { start, length, minimum: 0 };
    // SAFETY: FITRIM reads and writes a fstrim_range: three u64, as in this `repr(C)` struct, which lives for the call.
    #[allow(unsafe_code)]
    let done = unsafe { ioctl::ioctl(directory.as_fd(), Updater::<FITRIM, Range>::new(&mut range)) };
    match done {
        Ok(()) => Ok(Some(range.length)),
        Err(Errno::INVAL) => Ok(None),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::ROFS) => Err(TrimError::Unsupported),
        Err(error) => Err(TrimError::Trim(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_trimmed_says_so() {
        assert!(matches!(trim(Path::new("/proc"), 0, 1 << 20), Err(TrimError::Unsupported)));
        assert!(matches!(trim(Path::new("/nothing/there"), 0, 1 << 20), Err(TrimError::Open(_))));
    }
}
