//! Why an operation is refused, and the code and text that a client is told.

use std::io;

use connectrpc::{ConnectError, ErrorDetail};
use rustix::io::Errno;
use wrenn_proto::NO_SPACE_DETAIL;

use super::{MAXIMUM_ENTRIES, watch::WatchError};
use crate::{
    agent::{paths::PathError, threads::RunError, users::UserError},
    console::chain,
};

/// Why an operation was refused. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesystemError {
    #[error(transparent)]
    User(#[from] UserError),
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

impl From<RunError> for FilesystemError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Busy => Self::Busy,
            RunError::Interrupted => Self::Interrupted,
        }
    }
}

impl From<FilesystemError> for ConnectError {
    fn from(error: FilesystemError) -> Self {
        let message = chain(&error);
        match error {
            FilesystemError::User(UserError::Unknown(_)) => Self::unauthenticated(message),
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
            FilesystemError::User(UserError::Accounts(_)) | FilesystemError::Interrupted => {
                Self::internal(message)
            }
        }
    }
}

impl From<WatchError> for ConnectError {
    fn from(error: WatchError) -> Self {
        let message = chain(&error);
        match error {
            WatchError::NotFound(_) | WatchError::NoWatcher(_) => Self::not_found(message),
            WatchError::NotADirectory(_) | WatchError::Network(_) => Self::invalid_argument(message),
            WatchError::TooMany | WatchError::Busy | WatchError::Limit { .. } | WatchError::Lost(_) => {
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
        // Something is mounted there, or runs from there: that can be changed, and then it can be done.
        io::ErrorKind::ResourceBusy | io::ErrorKind::ExecutableFileBusy => {
            ConnectError::failed_precondition(message)
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let detail = ErrorDetail { type_url: NO_SPACE_DETAIL.to_owned(), value: None, debug: None };
            ConnectError::resource_exhausted(message).with_detail(detail)
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ConnectError::permission_denied(message)
        }
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename => ConnectError::invalid_argument(message),
        _ => ConnectError::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use connectrpc::ErrorCode;

    use super::{
        super::watch::{FollowError, Loss},
        *,
    };

    fn io(operation: &'static str, errno: Errno) -> FilesystemError {
        FilesystemError::Io { operation, path: "/p".to_owned(), source: errno.into() }
    }

    fn limit(source: FollowError) -> WatchError {
        WatchError::Limit { path: "/p".to_owned(), source }
    }

    /// Every refusal, those too that no test can bring about from outside.
    #[test]
    fn every_refusal_has_its_code_and_its_words() {
        use ErrorCode::{
            AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound, PermissionDenied,
            ResourceExhausted, Unauthenticated,
        };
        let path = || "/p".to_owned();
        let table = [
            (UserError::Unknown("x".to_owned()).into(), Unauthenticated, "invalid username: 'x'"),
            (
                UserError::Accounts(Errno::ISDIR.into()).into(),
                Internal,
                "cannot read the user database: Is a directory (os error 21)",
            ),
            (FilesystemError::Path(PathError::ZeroByte), InvalidArgument, "path contains a zero byte"),
            (FilesystemError::Path(PathError::TooLong), InvalidArgument, "path is longer than 4095 bytes"),
            (
                FilesystemError::Path(PathError::OtherHome),
                InvalidArgument,
                "cannot expand user-specific home dir",
            ),
            (FilesystemError::FileNotFound(path()), NotFound, "file not found: /p"),
            (FilesystemError::PathNotFound(path()), NotFound, "path not found: /p"),
            (FilesystemError::SourceNotFound(path()), NotFound, "source file not found: /p"),
            (FilesystemError::NotADirectory(path()), InvalidArgument, "path is not a directory: /p"),
            (FilesystemError::DirectoryExists(path()), AlreadyExists, "directory already exists: /p"),
            (
                FilesystemError::FileExists(path()),
                InvalidArgument,
                "path already exists but it is not a directory: /p",
            ),
            (FilesystemError::Root(path()), InvalidArgument, "/p is the root of the file system"),
            (
                FilesystemError::TooManyEntries,
                ResourceExhausted,
                "there are more than 100000 entries: ask for less depth",
            ),
            (
                FilesystemError::Cycle(path()),
                FailedPrecondition,
                "cyclic symlink or chain >255 links at \"/p\"",
            ),
            (FilesystemError::IntoItself(path()), InvalidArgument, "cannot move /p into itself"),
            (FilesystemError::Busy, ResourceExhausted, "too many file system operations are under way"),
            (FilesystemError::Interrupted, Internal, "the work was interrupted"),
            (
                io("stat", Errno::LOOP),
                FailedPrecondition,
                "cannot stat /p: Too many levels of symbolic links (os error 40)",
            ),
            (
                io("remove", Errno::BUSY),
                FailedPrecondition,
                "cannot remove /p: Device or resource busy (os error 16)",
            ),
            (
                io("move to", Errno::TXTBSY),
                FailedPrecondition,
                "cannot move to /p: Text file busy (os error 26)",
            ),
            (
                io("move to", Errno::NOSPC),
                ResourceExhausted,
                "cannot move to /p: No space left on device (os error 28)",
            ),
            (
                io("move to", Errno::DQUOT),
                ResourceExhausted,
                "cannot move to /p: Disk quota exceeded (os error 122)",
            ),
            (io("list", Errno::ACCESS), PermissionDenied, "cannot list /p: Permission denied (os error 13)"),
            (
                io("remove", Errno::PERM),
                PermissionDenied,
                "cannot remove /p: Operation not permitted (os error 1)",
            ),
            (
                io("remove", Errno::ROFS),
                PermissionDenied,
                "cannot remove /p: Read-only file system (os error 30)",
            ),
            (
                io("stat", Errno::NAMETOOLONG),
                InvalidArgument,
                "cannot stat /p: File name too long (os error 36)",
            ),
            (
                io("move to", Errno::NOTDIR),
                InvalidArgument,
                "cannot move to /p: Not a directory (os error 20)",
            ),
            (io("move to", Errno::ISDIR), InvalidArgument, "cannot move to /p: Is a directory (os error 21)"),
            (
                io("move to", Errno::NOTEMPTY),
                InvalidArgument,
                "cannot move to /p: Directory not empty (os error 39)",
            ),
            (
                io("move to", Errno::INVAL),
                InvalidArgument,
                "cannot move to /p: Invalid argument (os error 22)",
            ),
            (io("stat", Errno::IO), Internal, "cannot stat /p: Input/output error (os error 5)"),
        ];
        for (error, code, message) in table {
            let error = ConnectError::from(error);
            assert_eq!((error.code, error.message.as_deref()), (code, Some(message)));
        }
        let table = [
            (WatchError::NotFound(path()), NotFound, "path /p not found"),
            (WatchError::NotADirectory(path()), InvalidArgument, "path /p not a directory"),
            (WatchError::Network(path()), InvalidArgument, "cannot watch path on network filesystem: /p"),
            (WatchError::NoWatcher("w".to_owned()), NotFound, "watcher with id w not found"),
            (WatchError::TooMany, ResourceExhausted, "too many watchers"),
            (WatchError::Busy, ResourceExhausted, "too many watchers wait for their file systems"),
            (
                limit(FollowError::Instances),
                ResourceExhausted,
                "cannot watch /p: there is no room for another watcher",
            ),
            (
                limit(FollowError::Directories),
                ResourceExhausted,
                "cannot watch /p: there are too many directories to watch",
            ),
            (
                limit(FollowError::TooFast),
                ResourceExhausted,
                "cannot watch /p: the directory changes faster than it can be watched",
            ),
            (
                WatchError::Lost(Loss::Kernel),
                ResourceExhausted,
                "events were lost: more happened at once than could be noted",
            ),
            (
                WatchError::Lost(Loss::Slow),
                ResourceExhausted,
                "events were lost: they were not taken in time",
            ),
            (
                WatchError::Lost(Loss::Directories),
                ResourceExhausted,
                "events will be missing: not every directory can be watched",
            ),
            (
                WatchError::System { path: path(), source: Errno::ACCESS.into() },
                PermissionDenied,
                "cannot watch /p: Permission denied (os error 13)",
            ),
            (WatchError::Interrupted, Internal, "the work was interrupted"),
        ];
        for (error, code, message) in table {
            let error = ConnectError::from(error);
            assert_eq!((error.code, error.message.as_deref()), (code, Some(message)));
        }
    }
}
