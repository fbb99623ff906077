//! What can go wrong with a warm snapshot, or with a snapshot of a sandbox.

use std::{io, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};

use super::SnapshotKey;

/// How a file is not what the manifest records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// It was cut or has grown.
    #[error("it has {found} bytes instead of {recorded}")]
    Size {
        /// As it was made.
        recorded: u64,
        /// As it is.
        found: u64,
    },
    /// A byte in it is another one.
    #[error("its content has changed")]
    Content,
    /// The disk does not give back what is in it.
    #[error("the disk cannot read its content")]
    Unreadable,
}

/// An operation on a snapshot that failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotStoreError {
    /// The filesystem of the snapshots has no room.
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
    /// There is something where a new one should be.
    #[error("{path} exists already")]
    Exists {
        /// The file or directory.
        path: Utf8PathBuf,
    },
    /// The manifest is of a format that this program does not read.
    #[error("the format of {path} is {found}, and this program reads format {known}")]
    Format {
        /// The manifest.
        path: Utf8PathBuf,
        /// The number in it.
        found: u32,
        /// The number that is known.
        known: u32,
    },
    /// The manifest does not say what it must.
    #[error("{path} does not say what it must")]
    Manifest {
        /// The manifest.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The snapshot was made for something else.
    #[error("{path} is of another {field}: {recorded}, and not {wanted}")]
    Mismatch {
        /// The manifest.
        path: Utf8PathBuf,
        /// What differs.
        field: &'static str,
        /// What it was made for.
        recorded: String,
        /// What it is asked for.
        wanted: String,
    },
    /// A file is not what it was when the snapshot was made.
    #[error("{path} is damaged: {damage}")]
    Damaged {
        /// The file.
        path: Utf8PathBuf,
        /// In which way.
        damage: Damage,
    },
    /// A file that was to become part of a snapshot cannot.
    #[error("{path} cannot become part of a snapshot: {problem}")]
    Incomplete {
        /// The file.
        path: Utf8PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Someone else makes the same snapshot and does not finish.
    #[error("another process has been making the snapshot {key} for more than {bound:?}")]
    Busy {
        /// The snapshot.
        key: SnapshotKey,
        /// How long it was waited for.
        bound: Duration,
    },
}

impl SnapshotStoreError {
    /// Names a failed operation, and a full disk as such.
    pub(crate) fn file(operation: &'static str, path: &Utf8Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { operation, path, source }
            }
            _ => Self::File { operation, path, source },
        }
    }

    /// Whether there is a snapshot that can only be replaced: by [`super::SnapshotStore::begin`].
    #[must_use]
    pub fn is_unusable(&self) -> bool {
        matches!(
            self,
            Self::Format { .. } | Self::Manifest { .. } | Self::Mismatch { .. } | Self::Damaged { .. }
        )
    }

    /// Whether the host has no room for it: the caller may come back when it has.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }
}
