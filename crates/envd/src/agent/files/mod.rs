//! `GET` and `POST /files`: whole files, down and up, piece by piece.
//!
//! However large a file is, only a few pieces of it are in memory. Reading and writing runs on threads that may
//! block, one piece at a time, so a slow client holds no thread.
//!
//! | module | what it is |
//! |---|---|
//! | [`query`] | the query of a request |
//! | [`range`] | which part of a file a client wants |
//! | [`download`] | a file to a client |
//! | [`upload`] | a body to a file, and what becomes of half a file |

mod download;
mod query;
mod range;
mod upload;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::{
    auth::{self, FileAuthError, FileQuery, Operation},
    paths::{self, PathError},
    reply::{self, Body},
    state::{Agent, Identity},
    users::{Accounts, User},
};
use crate::console::chain;

/// How much of a body that is refused is still read, so that its sender gets to see the answer.
const DRAIN_BYTES: usize = 16 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Why a file was not read or written. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
enum FilesError {
    #[error("{0}")]
    Auth(FileAuthError),
    #[error("{0}")]
    Query(query::QueryError),
    #[error("invalid username: '{0}'")]
    User(String),
    #[error("cannot read the user database")]
    Accounts(#[source] io::Error),
    #[error("{0}")]
    Path(PathError),
    #[error("path '{0}' does not exist")]
    NotFound(String),
    #[error("path '{0}' is a directory")]
    Directory(String),
    #[error("path '{0}' is not a regular file")]
    NotRegular(String),
    #[error("{0}")]
    Request(String),
    #[error("content encoding '{0}' is not supported")]
    Encoding(String),
    #[error("the body ended early")]
    BodyEnded,
    #[error("the work was interrupted")]
    Interrupted,
    #[error("not enough disk space")]
    NoSpace,
    #[error("range not satisfiable")]
    Range { size: u64 },
    #[error("cannot {operation} '{path}'")]
    Io {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

impl FilesError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Auth(_) | Self::User(_) => StatusCode::UNAUTHORIZED,
            Self::Query(_)
            | Self::Path(_)
            | Self::Directory(_)
            | Self::NotRegular(_)
            | Self::Request(_)
            | Self::BodyEnded => StatusCode::BAD_REQUEST,
            Self::Encoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Self::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                StatusCode::FORBIDDEN
            }
            Self::Accounts(_) | Self::Interrupted | Self::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the operating system's error on a file means.
    fn from_io(operation: &'static str, path: &str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path.to_owned()),
            io::ErrorKind::IsADirectory => Self::Directory(path.to_owned()),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::NotADirectory if operation == "read" => Self::NotFound(path.to_owned()),
            io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename => {
                Self::Request(format!("path '{path}' cannot be: {source}"))
            }
            _ => Self::Io { operation, path: path.to_owned(), source },
        }
    }
}

/// Who asks, and what paths mean to them.
#[derive(Debug, Clone)]
struct Asker {
    user: User,
    identity: Arc<Identity>,
}

impl Asker {
    fn new(name: Option<String>, identity: Arc<Identity>) -> Result<Self, FilesError> {
        let accounts = Accounts::load().map_err(FilesError::Accounts)?;
        let name = name.unwrap_or_else(|| identity.default_user.clone());
        let user = accounts.user(&name).ok_or(FilesError::User(name))?;
        Ok(Self { user, identity })
    }

    fn resolve(&self, path: &str) -> Result<String, FilesError> {
        paths::resolve(path, &self.user, self.identity.default_directory.as_deref()).map_err(FilesError::Path)
    }
}

/// Serves a request for `/files`.
pub(crate) async fn serve(agent: &Agent, request: Request<Incoming>) -> Response<Body> {
    let (parts, mut body) = request.into_parts();
    let answer = match check(agent, &parts) {
        Err(error) => Err(error),
        Ok((query, operation, identity)) => {
            let name = query.username.clone().or_else(|| auth::basic_user(&parts.headers));
            match operation {
                Operation::Read => download::serve(query.path, name, identity, &parts).await,
                Operation::Write => {
                    upload::serve(query.path, name, identity, &parts.headers, &mut body).await
                }
            }
        }
    };
    match answer {
        Ok(response) => response,
        Err(error) => {
            drain(body).await;
            let mut response = reply::error(error.status(), &chain(&error));
            if let FilesError::Range { size } = error {
                range::mark_unsatisfiable(response.headers_mut(), size);
            }
            response
        }
    }
}

fn check(
    agent: &Agent,
    parts: &http::request::Parts,
) -> Result<(FileQuery, Operation, Arc<Identity>), FilesError> {
    let operation = if parts.method == Method::GET { Operation::Read } else { Operation::Write };
    let query = query::parse(parts.uri.query().unwrap_or_default()).map_err(FilesError::Query)?;
    let identity = agent.identity();
    if let Some(token) = &identity.token {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        auth::check_file_request(&parts.headers, &query, operation, token, now).map_err(FilesError::Auth)?;
    }
    Ok((query, operation, identity))
}

/// Reads what is left of a refused body, within bounds. Closing with unread bytes would reset the connection, and the
/// sender would lose the answer.
pub(crate) async fn drain(mut body: Incoming) {
    let read = async {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, bytes::Bytes::len);
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    };
    // Giving up is the point of the limit.
    let _ = tokio::time::timeout(DRAIN_TIME, read).await;
}
