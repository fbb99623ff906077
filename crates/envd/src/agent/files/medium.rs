//! Where the bytes of a file are: what only copies memory is done at once, what may wait for a disk is handed to a
//! thread that may.

use std::os::fd::AsFd;

use rustix::fs::fstatfs;

/// `f_type` of file systems that have no disk: tmpfs and ramfs.
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// Where the bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// Nowhere else than in memory: reading and writing is copying.
    Memory,
    /// On a disk, behind a network or with another program, as far as they are not in the cache.
    Other,
}

impl Medium {
    /// Asks the file system, which may block where it is behind a network.
    pub(super) fn of(file: impl AsFd) -> Self {
        // A file system of which this cannot be told is none in memory.
        let kind = fstatfs(file).ok().and_then(|system| u32::try_from(system.f_type).ok());
        if kind.is_some_and(|kind| IN_MEMORY.contains(&kind)) { Self::Memory } else { Self::Other }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn only_what_has_no_disk_is_in_memory() {
        assert_eq!(Medium::of(tempfile::tempfile_in("/dev/shm").unwrap()), Medium::Memory);
        assert_eq!(Medium::of(File::open("/proc/self/stat").unwrap()), Medium::Other);
        assert_eq!(Medium::of(File::open("/sys/kernel").unwrap()), Medium::Other);
    }
}
