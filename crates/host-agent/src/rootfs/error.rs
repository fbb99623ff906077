//! What can go wrong with a root disk, named by the operation.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};

use super::{DmSnapshotError, HeaderError};

/// The result of an operation on a root disk.
pub type RootfsResult<T> = Result<T, RootfsError>;

/// An operation on a root disk that failed.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The filesystem that holds the disks has no room, or the quota is used up.
    #[error("no space is left on the host: could not {operation} {path}")]
    NoSpace {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be read, written or moved.
    #[error("could not {operation} {path}")]
    File {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is a file where the new one should be.
    #[error("{path} exists already")]
    Exists {
        /// The file.
        path: Utf8PathBuf,
    },
    /// The disk would be smaller than its base.
    #[error("a disk of {wanted_bytes} bytes is smaller than its base {base}, which has {base_bytes}")]
    TooSmall {
        /// The base.
        base: Utf8PathBuf,
        /// Its size as the guest sees it.
        base_bytes: u64,
        /// The size that was asked for.
        wanted_bytes: u64,
    },
    /// The file cannot be the base of such a disk.
    #[error("{path} cannot be the base of a disk: {problem}")]
    Base {
        /// The file.
        path: Utf8PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The kernel would not make, change or remove a device.
    #[error("could not {operation} {device}")]
    Device {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody has the disk, or the disks, open.
    #[error("{path} is in use")]
    InUse {
        /// The file.
        path: Utf8PathBuf,
    },
    /// Something that was written to the disk could not be kept, and the kernel takes and gives nothing any more.
    #[error(
        "the kernel has given up the disk {path}: what was written to it could not be kept, most likely for lack of space on the host"
    )]
    GivenUp {
        /// The file.
        path: Utf8PathBuf,
    },
    /// The file is no dm-snapshot, or not one that can be used.
    #[error("{path} is not usable as a dm-snapshot")]
    DmSnapshot {
        /// The file.
        path: Utf8PathBuf,
        /// What is wrong with it.
        #[source]
        source: DmSnapshotError,
    },
    /// A qcow2 file is not one, or not in a state in which it can be used.
    #[error("{path} is not usable as a qcow2 file")]
    Header {
        /// The file.
        path: Utf8PathBuf,
        /// What is wrong with its header.
        #[source]
        source: HeaderError,
    },
}

impl RootfsError {
    /// Whether the host has no room for it: the caller may come back when it has.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }

    /// Names a failed operation, and a full disk as such.
    pub(super) fn file(operation: &'static str, path: &Utf8Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { operation, path, source }
            }
            io::ErrorKind::AlreadyExists => Self::Exists { path },
            _ => Self::File { operation, path, source },
        }
    }
}
