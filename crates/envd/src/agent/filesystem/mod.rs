//! The filesystem service: stat, list, make, move, remove.
//!
//! Everything is done by the agent itself, which is root; what it makes is given to the user of the request. The work
//! runs on threads that may block, because a path can lead to a file system that does not answer.
//!
//! What a client is told of a file is made in [`entry`].

mod entry;

use std::{io, path::Path, sync::Arc};

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use http::HeaderMap;
use wrenn_proto::filesystem as wire;

use super::{
    auth::basic_user,
    paths::{self, PathError},
    state::{Agent, Identity},
    users::{Accounts, User},
};
use crate::{console::chain, tree};

/// How many entries one list may hold.
const MAXIMUM_ENTRIES: usize = 100_000;

/// The service.
#[derive(Debug)]
pub(crate) struct FilesystemService {
    agent: Arc<Agent>,
}

/// Why an operation was refused. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
enum FilesystemError {
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
    #[error("cannot {operation} {path}")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Who asks, and what paths mean to them.
struct Asker {
    accounts: Accounts,
    user: User,
    identity: Arc<Identity>,
}

impl Asker {
    fn new(name: Option<String>, identity: Arc<Identity>) -> Result<Self, FilesystemError> {
        let accounts = Accounts::load().map_err(FilesystemError::Accounts)?;
        let name = name.unwrap_or_else(|| identity.default_user.clone());
        let user = accounts.user(&name).ok_or(FilesystemError::User(name))?;
        Ok(Self { accounts, user, identity })
    }

    fn resolve(&self, path: &str) -> Result<String, FilesystemError> {
        paths::resolve(path, &self.user, self.identity.default_directory.as_deref())
            .map_err(FilesystemError::Path)
    }

    fn describe(&self, path: &str) -> Result<wire::EntryInfo, FilesystemError> {
        entry::describe(path, &self.accounts).map_err(|source| {
            if tree::is_absent(&source) {
                FilesystemError::FileNotFound(path.to_owned())
            } else {
                FilesystemError::Io { operation: "stat", path: path.to_owned(), source }
            }
        })
    }

    fn list(&self, path: &str, depth: u32) -> Result<Vec<wire::EntryInfo>, FilesystemError> {
        let path = self.resolve(path)?;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => FilesystemError::PathNotFound(path.clone()),
            io::ErrorKind::NotADirectory => FilesystemError::NotADirectory(path.clone()),
            _ => FilesystemError::Io { operation: "list", path: path.clone(), source },
        };
        let found = tree::list(&path, depth.max(1), MAXIMUM_ENTRIES).map_err(failed)?;
        let found = found.ok_or(FilesystemError::TooManyEntries)?;
        // What went away since it was found is not there.
        Ok(found.iter().filter_map(|path| entry::describe(path, &self.accounts).ok()).collect())
    }

    fn make_directory(&self, path: &str) -> Result<wire::EntryInfo, FilesystemError> {
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

    fn rename(&self, source: &str, destination: &str) -> Result<wire::EntryInfo, FilesystemError> {
        let (source, destination) = (self.resolve(source)?, self.resolve(destination)?);
        if !entry::exists(&source) {
            return Err(FilesystemError::SourceNotFound(source));
        }
        let failed = |error: io::Error| FilesystemError::Io {
            operation: "move to",
            path: destination.clone(),
            source: error,
        };
        if let Some(parent) = Path::new(&destination).parent() {
            tree::make_directories(parent, self.user.uid, self.user.gid).map_err(failed)?;
        }
        std::fs::rename(&source, &destination).map_err(failed)?;
        self.describe(&destination)
    }

    fn remove(&self, path: &str) -> Result<(), FilesystemError> {
        let path = self.resolve(path)?;
        if path == "/" {
            return Err(FilesystemError::Root(path));
        }
        tree::remove(&path).map_err(|source| FilesystemError::Io { operation: "remove", path, source })
    }
}

impl FilesystemService {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Does something for whoever asks, on a thread that may block.
    async fn ask<T: Send + 'static>(
        &self,
        headers: &HeaderMap,
        work: impl FnOnce(&Asker) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let (name, identity) = (basic_user(headers), self.agent.identity());
        let work = move || work(&Asker::new(name, identity)?);
        let answer = tokio::task::spawn_blocking(work).await;
        answer.map_err(|_| ConnectError::internal("the work was interrupted"))?.map_err(ConnectError::from)
    }
}

impl wire::Filesystem for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let path = request.path.to_owned();
        let work = move |asker: &Asker| asker.describe(&asker.resolve(&path)?);
        let entry = self.ask(context.headers(), work).await?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let path = request.path.to_owned();
        let entry = self.ask(context.headers(), move |asker| asker.make_directory(&path)).await?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let (source, destination) = (request.source.to_owned(), request.destination.to_owned());
        let entry = self.ask(context.headers(), move |asker| asker.rename(&source, &destination)).await?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<wire::ListDirResponse> {
        let (path, depth) = (request.path.to_owned(), request.depth);
        let entries = self.ask(context.headers(), move |asker| asker.list(&path, depth)).await?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        let path = request.path.to_owned();
        self.ask(context.headers(), move |asker| asker.remove(&path)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        Err(no_watching())
    }

    async fn create_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        Err(no_watching())
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        Err(no_watching())
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        Err(no_watching())
    }
}

fn no_watching() -> ConnectError {
    ConnectError::unimplemented("this version of the guest agent does not watch directories")
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
            | FilesystemError::Root(_) => Self::invalid_argument(message),
            FilesystemError::TooManyEntries => Self::resource_exhausted(message),
            FilesystemError::Io { ref source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::resource_exhausted(message)
                }
                io::ErrorKind::PermissionDenied => Self::permission_denied(message),
                io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::DirectoryNotEmpty
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidFilename => Self::invalid_argument(message),
                _ => Self::internal(message),
            },
            FilesystemError::Accounts(_) => Self::internal(message),
        }
    }
}
