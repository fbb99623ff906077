//! What a name leads to, and through which mount.
//!
//! A file system can be mounted at several places, within itself too (`mount --bind`). What lies below such a place
//! belongs to another tree as well, and nothing tells it apart but the number of its mount. A kernel before 5.8 does
//! not say that number; there only a directory of another file system is told apart, by its device.

use std::{ffi::CStr, os::fd::AsFd};

use rustix::{
    fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, statx},
    io::Errno,
};

/// The device and the inode: a file, whatever its names are.
pub(super) type File = ((u32, u32), u64);

/// What was found under a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) kind: FileType,
    pub(super) file: File,
    /// How many names it has.
    pub(super) links: u32,
    mount: Option<u64>,
    is_mount_root: bool,
}

impl Found {
    /// What has this name; of a link it is the link itself.
    pub(super) fn at(directory: impl AsFd, name: &CStr) -> Result<Self, Errno> {
        Self::look(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
    }

    /// What is open.
    pub(super) fn open(file: impl AsFd) -> Result<Self, Errno> {
        Self::look(file, c"", AtFlags::EMPTY_PATH)
    }

    fn look(directory: impl AsFd, name: &CStr, flags: AtFlags) -> Result<Self, Errno> {
        statx(directory, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).map(Self::of)
    }

    fn of(stat: Statx) -> Self {
        Self {
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            file: ((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino),
            links: stat.stx_nlink,
            mount: (stat.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(stat.stx_mnt_id),
            is_mount_root: stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        }
    }

    /// This, if it can be the top of a tree that is taken away: what is mounted somewhere cannot.
    pub(super) fn as_top(self) -> Result<Self, Errno> {
        if self.is_mount_root { Err(Errno::BUSY) } else { Ok(self) }
    }

    /// Refuses what was found in the tree of `top` and is no part of it.
    pub(super) fn check_part_of(&self, top: &Self) -> Result<(), Errno> {
        // Not the device of a file: a union of file systems gives its files the devices that they come from.
        let elsewhere = self.kind.is_dir() && self.file.0 != top.file.0;
        if self.mount != top.mount || elsewhere { Err(Errno::BUSY) } else { Ok(()) }
    }
}
