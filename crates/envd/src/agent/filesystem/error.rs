//! Why an operation is refused, and the code and text that a client is told.

use std::io;

use connectrpc::ConnectError;
use rustix::io::Errno;

use super::{MAXIMUM_ENTRIES, watch::WatchError};
use crate::{agent::paths::PathError, console::chain};

/// Why an operation was refused. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesystemError {
    #[error("invalid username: '{0}'")]
    User(String),
    #[error("cannot read the user database")]
    Accounts(#[source] io::Error),
    #[error("{0}")]
    Path(PathError),
    #[error("file not found: {0}")]
    FileNotFound(String),
    #[error("path not found: {0}")]
    PathNotFound(String),
    #[error("source file not found: {0}")]
    SourceNotFound(String),
    #[error("path is not a directory: {0}")]
    NotADirectory(String),
    #[error("directory already exists: {0}")]
    DirectoryExists(String),
    #[error("path already exists but it is not a directory: {0}")]
    FileExists(String),
    #[error("{0} is the root of the file system")]
    Root(String),
    #[error("there are more than {MAXIMUM_ENTRIES} entries: ask for less depth")]
    TooManyEntries,
    #[error("cyclic symlink or chain >255 links at \"{0}\"")]
    Cycle(String),
    #[error("cannot move {0} into itself")]
    IntoItself(String),
    #[error("too many file system operations are under way")]
    Busy,
    #[error("the work was interrupted")]
    Interrupted,
    #[error("cannot {operation} {path}")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

impl From<FilesystemError> for ConnectError {
    fn from(error: FilesystemError) -> Self {
        let message = chain(&error);
        match error {
            FilesystemError::User(_) => Self::unauthenticated(message),
            FilesystemError::FileNotFound(_)
            | FilesystemError::PathNotFound(_)
            | FilesystemError::SourceNotFound(_) => Self::not_found(message),
            FilesystemError::DirectoryExists(_) => Self::already_exists(message),
            FilesystemError::Path(_)
            | FilesystemError::NotADirectory(_)
            | FilesystemError::FileExists(_)
            | FilesystemError::IntoItself(_)
            | FilesystemError::Root(_) => Self::invalid_argument(message),
            FilesystemError::TooManyEntries | FilesystemError::Busy => Self::resource_exhausted(message),
            FilesystemError::Io { ref source, .. } => from_io(source, message),
            FilesystemError::Cycle(_) => Self::failed_precondition(message),
            FilesystemError::Accounts(_) | FilesystemError::Interrupted => Self::internal(message),
        }
    }
}

impl From<WatchError> for ConnectError {
    fn from(error: WatchError) -> Self {
        let message = chain(&error);
        match error {
            WatchError::NotFound(_) | WatchError::NoWatcher(_) => Self::not_found(message),
            WatchError::NotADirectory(_) | WatchError::Network(_) => Self::invalid_argument(message),
            WatchError::TooMany | WatchError::Limit { .. } | WatchError::Lost(_) => {
                Self::resource_exhausted(message)
            }
            WatchError::System { ref source, .. } => from_io(source, message),
            WatchError::Interrupted => Self::internal(message),
        }
    }
}

fn from_io(error: &io::Error, message: String) -> ConnectError {
    if Errno::from_io_error(error) == Some(Errno::LOOP) {
        return ConnectError::failed_precondition(message);
    }
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ConnectError::resource_exhausted(message)
        }
        io::ErrorKind::PermissionDenied => ConnectError::permission_denied(message),
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename => ConnectError::invalid_argument(message),
        _ => ConnectError::internal(message),
    }
}
