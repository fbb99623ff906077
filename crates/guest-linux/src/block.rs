//! Growing a mounted ext4 file system to the size of its device.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
};

use rustix::{
    io::Errno,
    ioctl::{self, Setter, opcode},
    mount::{MountFlags, mount_remount},
};

const EXT4_RESIZE: ioctl::Opcode = opcode::write::<u64>(b'f', 16);
/// Where the superblock is, how much of it is read, and what is where in it.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_LENGTH: usize = 0x154;
const BLOCKS_LOW: usize = 0x04;
const LOG_BLOCK_SIZE: usize = 0x18;
const MAGIC: usize = 0x38;
const BLOCKS_HIGH: usize = 0x150;

/// Why a file system could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The device or the mount point could not be opened or read.
    #[error("cannot read the file system")]
    Read(#[source] io::Error),
    /// The device holds no ext4 file system.
    #[error("there is no ext4 file system")]
    NotExt4,
    /// The kernel refused other mount options.
    #[error("cannot change the mount options")]
    Remount(#[source] Errno),
    /// The kernel refused to resize.
    #[error("cannot resize to {blocks} blocks")]
    Resize {
        /// How many blocks were asked for.
        blocks: u64,
        #[source]
        source: Errno,
    },
}

/// The size of an ext4 file system, as its superblock tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    blocks: u64,
    block_size: u64,
}

/// Mount options of a root disk. The kernel would otherwise write zeros into the unused inode tables of every guest in
/// the background; a sandbox's disk is sparse, so they are zeros already.
pub const MOUNT_FLAGS: MountFlags = MountFlags::NOATIME;
/// See [`MOUNT_FLAGS`].
pub const MOUNT_OPTIONS: &std::ffi::CStr = c"noinit_itable";

/// Grows the ext4 file system of `device`, mounted at `mount_point` with [`MOUNT_OPTIONS`], to `bytes`, rounded down
/// to whole blocks. Does nothing if it is as large
/// already: it never shrinks.
pub fn grow_ext4(device: &Path, mount_point: &Path, bytes: u64) -> Result<(), ResizeError> {
    let extent = Extent::of(device)?;
    let blocks = bytes / extent.block_size;
    if blocks <= extent.blocks {
        return Ok(());
    }
    // With the option of the mount the kernel would write out the new inode tables now, before it answers.
    let options = |options| mount_remount(mount_point, MOUNT_FLAGS, options).map_err(ResizeError::Remount);
    options(c"init_itable")?;
    let resized = resize(mount_point, blocks);
    options(MOUNT_OPTIONS)?;
    resized
}

fn resize(mount_point: &Path, blocks: u64) -> Result<(), ResizeError> {
    let directory = File::open(mount_point).map_err(ResizeError::Read)?;
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, the new number of blocks.
    #[allow(unsafe_code)]
    unsafe { ioctl::ioctl(directory.as_fd(), Setter::<EXT4_RESIZE, u64>::new(blocks)) }
        .map_err(|source| ResizeError::Resize { blocks, source })
}

impl Extent {
    /// Reads the superblock from the device; what a mounted file system changes in it is seen there at once.
    fn of(device: &Path) -> Result<Self, ResizeError> {
        let mut superblock = [0; SUPERBLOCK_LENGTH];
        let device = File::open(device).map_err(ResizeError::Read)?;
        device.read_exact_at(&mut superblock, SUPERBLOCK).map_err(ResizeError::Read)?;
        Self::parse(&superblock).ok_or(ResizeError::NotExt4)
    }

    fn parse(superblock: &[u8; SUPERBLOCK_LENGTH]) -> Option<Self> {
        let word = |at: usize| superblock.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        if superblock.get(MAGIC..MAGIC + 2)? != [0x53, 0xef] {
            return None;
        }
        let blocks = u64::from(word(BLOCKS_HIGH)?) << 32 | u64::from(word(BLOCKS_LOW)?);
        // The kernel knows block sizes of 1 to 64 KiB.
        let block_size = 1024_u64 << word(LOG_BLOCK_SIZE).filter(|log| *log <= 6)?;
        Some(Self { blocks, block_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_tells_the_size() {
        let mut superblock = [0; SUPERBLOCK_LENGTH];
        assert_eq!(Extent::parse(&superblock), None);
        superblock[MAGIC..MAGIC + 2].copy_from_slice(&[0x53, 0xef]);
        superblock[LOG_BLOCK_SIZE] = 2;
        superblock[BLOCKS_LOW + 2] = 0x50;
        assert_eq!(Extent::parse(&superblock), Some(Extent { blocks: 0x50_0000, block_size: 4096 }));
        superblock[BLOCKS_HIGH] = 1;
        assert_eq!(Extent::parse(&superblock).map(|extent| extent.blocks), Some(0x1_0050_0000));
        superblock[LOG_BLOCK_SIZE] = 60;
        assert_eq!(Extent::parse(&superblock), None);
    }

    #[test]
    fn what_is_not_ext4_is_refused() {
        let error = grow_ext4(Path::new("/dev/zero"), Path::new("/proc"), 1 << 30).unwrap_err();
        assert!(matches!(error, ResizeError::NotExt4), "{error:?}");
        assert!(matches!(resize(Path::new("/proc"), 7), Err(ResizeError::Resize { blocks: 7, .. })));
    }
}
