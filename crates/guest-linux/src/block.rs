//! Growing a mounted ext4 file system to the size of its device.

use std::{fs::File, os::fd::AsFd, path::Path};

use rustix::{
    fs::statvfs,
    io::Errno,
    ioctl::{self, Setter, opcode},
};

const EXT4_RESIZE: ioctl::Opcode = opcode::write::<u64>(b'f', 16);

/// Why a file system could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The mount point could not be opened.
    #[error("cannot open the mount point")]
    Open(#[source] std::io::Error),
    /// The block size of the file system is not known.
    #[error("cannot read the block size")]
    BlockSize(#[source] Errno),
    /// The kernel refused to resize.
    #[error("cannot resize to {blocks} blocks")]
    Resize {
        /// How many blocks were asked for.
        blocks: u64,
        #[source]
        source: Errno,
    },
}

/// Grows the ext4 file system mounted at `mount_point` to `bytes`, rounded down to whole blocks.
///
/// A file system that has this size already is left alone by the kernel, at the price of one call.
pub fn resize_ext4(mount_point: &Path, bytes: u64) -> Result<(), ResizeError> {
    let directory = File::open(mount_point).map_err(ResizeError::Open)?;
    let block_size = statvfs(mount_point).map_err(ResizeError::BlockSize)?.f_bsize.max(1);
    let blocks = bytes / block_size;
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, the new number of blocks.
    #[allow(unsafe_code)]
    unsafe { ioctl::ioctl(directory.as_fd(), Setter::<EXT4_RESIZE, u64>::new(blocks)) }
        .map_err(|source| ResizeError::Resize { blocks, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ext4_is_refused() {
        let error = resize_ext4(Path::new("/proc"), 1 << 30).unwrap_err();
        assert!(matches!(error, ResizeError::Resize { blocks: 262_144, .. }), "{error:?}");
    }
}
