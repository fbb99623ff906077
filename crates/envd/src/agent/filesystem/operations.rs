//! What is done for one who asks: stat, list, make, move, remove. All of it may block.

use std::{io, path::Path, sync::Arc};

use rustix::io::Errno;
use wrenn_proto::filesystem as wire;

use super::{MAXIMUM_ENTRIES, entry, error::FilesystemError};
use crate::{
    agent::{
        paths,
        state::Identity,
        users::{Accounts, User},
    },
    tree::{self, MoveError},
};

/// Who asks, and what paths mean to them.
pub(super) struct Asker {
    accounts: Accounts,
    user: User,
    identity: Arc<Identity>,
}

impl Asker {
    pub(super) fn new(name: Option<String>, identity: Arc<Identity>) -> Result<Self, FilesystemError> {
        let (accounts, user) = Accounts::load_with_user(name.as_deref(), &identity.default_user)?;
        Ok(Self { accounts, user, identity })
    }

    pub(super) fn resolve(&self, path: &str) -> Result<String, FilesystemError> {
        paths::resolve(path, &self.user, self.identity.default_directory.as_deref())
            .map_err(FilesystemError::Path)
    }

    pub(super) fn describe(&self, path: &str) -> Result<wire::EntryInfo, FilesystemError> {
        entry::describe(Path::new(path), &self.accounts).map_err(|source| {
            if tree::is_absent(&source) {
                FilesystemError::FileNotFound(path.to_owned())
            } else {
                FilesystemError::Io { operation: "stat", path: path.to_owned(), source }
            }
        })
    }

    pub(super) fn list(&self, path: &str, depth: u32) -> Result<Vec<wire::EntryInfo>, FilesystemError> {
        let path = self.resolve(path)?;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => FilesystemError::PathNotFound(path.clone()),
            io::ErrorKind::NotADirectory => FilesystemError::NotADirectory(path.clone()),
            _ if Errno::from_io_error(&source) == Some(Errno::LOOP) => FilesystemError::Cycle(path.clone()),
            _ => FilesystemError::Io { operation: "list", path: path.clone(), source },
        };
        let found = tree::list(Path::new(&path), depth.max(1), MAXIMUM_ENTRIES).map_err(failed)?;
        let found = found.ok_or(FilesystemError::TooManyEntries)?;
        // What went away since it was found is not there.
        Ok(found.iter().filter_map(|path| entry::describe(path, &self.accounts).ok()).collect())
    }

    pub(super) fn make_directory(&self, path: &str) -> Result<wire::EntryInfo, FilesystemError> {
        let path = self.resolve(path)?;
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => return Err(FilesystemError::DirectoryExists(path)),
            Ok(_) => return Err(FilesystemError::FileExists(path)),
            Err(_) => {}
        }
        tree::make_directories(Path::new(&path), self.user.uid, self.user.gid).map_err(
            |source| match source.kind() {
                io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
                    FilesystemError::FileExists(path.clone())
                }
                _ => FilesystemError::Io { operation: "make the directory", path: path.clone(), source },
            },
        )?;
        self.describe(&path)
    }

    pub(super) fn rename(&self, source: &str, destination: &str) -> Result<wire::EntryInfo, FilesystemError> {
        let (source, destination) = (self.resolve(source)?, self.resolve(destination)?);
        match std::fs::symlink_metadata(&source) {
            Ok(_) => {}
            Err(error) if tree::is_absent(&error) => return Err(FilesystemError::SourceNotFound(source)),
            Err(error) => {
                return Err(FilesystemError::Io { operation: "move", path: source, source: error });
            }
        }
        let failed = |error: io::Error| FilesystemError::Io {
            operation: "move to",
            path: destination.clone(),
            source: error,
        };
        if let Some(parent) = Path::new(&destination).parent() {
            tree::make_directories(parent, self.user.uid, self.user.gid).map_err(failed)?;
        }
        tree::move_to(Path::new(&source), Path::new(&destination)).map_err(|error| match error {
            MoveError::IntoItself => FilesystemError::IntoItself(source.clone()),
            MoveError::Move(error) => failed(error),
            MoveError::Leftover { .. } => failed(io::Error::other(error)),
        })?;
        self.describe(&destination)
    }

    pub(super) fn remove(&self, path: &str) -> Result<(), FilesystemError> {
        let path = self.resolve(path)?;
        if path == "/" {
            return Err(FilesystemError::Root(path));
        }
        tree::remove(&path).map_err(|source| FilesystemError::Io { operation: "remove", path, source })
    }
}
