//! `GET` and `POST /files`: whole files, down and up, piece by piece. `POST /files/compose`: one file of several.
//!
//! However large a file is, only a few pieces of it are in memory. What may have to wait for a disk, and what packs,
//! runs on threads that may block, one piece at a time, so a slow client holds no thread. What only copies memory is
//! done where the bytes come and go: to hand them to a thread would cost more. What goes as it is, over a connection of
//! its own, is not even copied ([`super::outlet`]).
//!
//! | module | what it is |
//! |---|---|
//! | [`query`] | the query of a request |
//! | [`encoding`] | which encodings a client sends and takes |
//! | [`conditions`] | whether a client wants a file that is as it is |
//! | [`range`] | which parts of a file a client wants |
//! | [`download`] | a file to a client |
//! | [`source`] | the pieces of a file, read ahead, as they are or packed |
//! | [`upload`] | a body to a file, or to several |
//! | [`gunzip`] | a packed body, unpacked as it comes |
//! | [`form`] | `multipart/form-data`, read as it comes |
//! | [`sink`] | a file that is being written, and what becomes of half a file |
//! | [`medium`] | whether a file is in memory, or may have to be waited for |
//! | [`mod@compose`] | one file of several |

mod compose;
mod conditions;
mod download;
mod encoding;
mod form;
mod gunzip;
mod medium;
mod query;
mod range;
mod sink;
mod source;
mod upload;

use std::{
    io,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use rustix::io::Errno;

use self::{form::FormError, gunzip::GzipError};
use super::{
    auth::{self, FileAuthError, FileQuery, Operation, Proof},
    metadata::MetadataError,
    paths::{self, PathError},
    reply::{self, Body},
    state::{Agent, Identity},
    threads::{Job, RunError, Threads},
    users::{Accounts, User, UserError},
};
use crate::console::chain;

/// How many threads open, read and write files.
pub(crate) const THREADS: usize = 16;
/// How much of a body that is refused is still read, so that its sender gets to see the answer, and for how long.
const DRAIN_BYTES: u64 = 16 << 30;
const DRAIN_TIME: Duration = Duration::from_secs(60);
/// After a longer rest of a body the connection is not used again.
const WORTH_A_CONNECTION: u64 = 1 << 20;
/// How long a client may send nothing in the middle of a body.
const PATIENCE: Duration = Duration::from_secs(620);

/// Why a file was not read or written. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
enum FilesError {
    #[error("{0}")]
    Auth(FileAuthError),
    #[error("{0}")]
    Query(query::QueryError),
    #[error(transparent)]
    User(#[from] UserError),
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
    #[error("source file not found: {0}")]
    NoSource(String),
    #[error("unsupported content type: {0}, expected multipart/form-data or application/octet-stream")]
    ContentType(String),
    #[error("error decompressing request body: unsupported Content-Encoding: {0}, supported: [gzip]")]
    Encoding(String),
    #[error("error decompressing request body: {0}")]
    Gzip(GzipError),
    #[error("error parsing Accept-Encoding: {0}")]
    NotAcceptable(&'static str),
    #[error("invalid metadata: {0}")]
    Metadata(MetadataError),
    #[error("{0}")]
    Form(FormError),
    #[error(
        "you cannot upload multiple files to the same path '{0}' in one upload request, only the first specified file was uploaded"
    )]
    Twice(String),
    #[error("the body ended early")]
    BodyEnded,
    #[error("the body stopped coming")]
    BodyStopped,
    #[error("the work was interrupted")]
    Interrupted,
    #[error("too many files are being read and written")]
    Busy,
    #[error("{}not enough disk space available", attempted(*.0))]
    NoSpace(Option<u64>),
    #[error("not enough inodes available")]
    NoInodes,
    #[error("not enough space for file metadata")]
    NoSpaceForMetadata,
    #[error("the file is not the one that the conditions name")]
    Precondition,
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
            Self::Auth(_) | Self::User(UserError::Unknown(_)) => StatusCode::UNAUTHORIZED,
            Self::Query(_)
            | Self::Path(_)
            | Self::Directory(_)
            | Self::NotRegular(_)
            | Self::Request(_)
            | Self::ContentType(_)
            | Self::Encoding(_)
            | Self::Gzip(_)
            | Self::Metadata(_)
            | Self::Form(_)
            | Self::Twice(_)
            | Self::BodyEnded => StatusCode::BAD_REQUEST,
            Self::NotFound(_) | Self::NoSource(_) => StatusCode::NOT_FOUND,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::BodyStopped => StatusCode::REQUEST_TIMEOUT,
            Self::Precondition => StatusCode::PRECONDITION_FAILED,
            Self::NoSpace(_) | Self::NoInodes | Self::NoSpaceForMetadata => StatusCode::INSUFFICIENT_STORAGE,
            Self::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => StatusCode::FORBIDDEN,
                // A program that runs, for example: it can be written once it has ended.
                io::ErrorKind::ExecutableFileBusy | io::ErrorKind::ResourceBusy => StatusCode::CONFLICT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::User(UserError::Accounts(_)) | Self::Interrupted => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the operating system's error on a file means.
    fn from_io(operation: &'static str, path: &str, source: io::Error) -> Self {
        let cannot_be = |source| Self::Request(format!("path '{path}' cannot be: {source}"));
        if Errno::from_io_error(&source) == Some(Errno::LOOP) {
            return cannot_be(source);
        }
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path.to_owned()),
            io::ErrorKind::IsADirectory => Self::Directory(path.to_owned()),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(None),
            io::ErrorKind::NotADirectory if operation == "read" => Self::NotFound(path.to_owned()),
            io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename => cannot_be(source),
            _ => Self::Io { operation, path: path.to_owned(), source },
        }
    }
}

impl From<RunError> for FilesError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Busy => Self::Busy,
            RunError::Interrupted => Self::Interrupted,
        }
    }
}

impl From<FormError> for FilesError {
    fn from(error: FormError) -> Self {
        Self::Form(error)
    }
}

impl From<GzipError> for FilesError {
    fn from(error: GzipError) -> Self {
        Self::Gzip(error)
    }
}

/// Does something on one of the threads for files.
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Job<T> {
    /// As the runtime's threads themselves, they are the process's.
    static OURS: LazyLock<Threads> = LazyLock::new(|| Threads::new(THREADS));
    OURS.run(work)
}

fn attempted(bytes: Option<u64>) -> String {
    bytes.map(|bytes| format!("attempted to write {bytes} bytes: ")).unwrap_or_default()
}

/// Who asks, and what paths mean to them.
#[derive(Debug, Clone)]
struct Asker {
    user: User,
    identity: Arc<Identity>,
}

impl Asker {
    fn new(name: Option<String>, identity: Arc<Identity>) -> Result<Self, FilesError> {
        let (_, user) = Accounts::load_with_user(name.as_deref(), &identity.default_user)?;
        Ok(Self { user, identity })
    }

    fn resolve(&self, path: &str) -> Result<String, FilesError> {
        paths::resolve(path, &self.user, self.identity.default_directory.as_deref()).map_err(FilesError::Path)
    }
}

/// Serves a request for `/files`: `GET`, `HEAD` or `POST`.
pub(crate) async fn serve(agent: &Agent, request: Request<Incoming>) -> Response<Body> {
    let (parts, mut body) = request.into_parts();
    let answer = match check(agent, &parts) {
        Err(error) => Err(error),
        Ok((query, operation, proof, identity)) => {
            let chosen = || (proof == Proof::Token).then(|| auth::basic_user(&parts.headers)).flatten();
            let name = query.username.or_else(chosen);
            match operation {
                Operation::Read => download::serve(query.path, name, identity, &parts).await,
                Operation::Write => {
                    upload::serve(query.path, name, identity, &parts.headers, &mut body).await
                }
            }
        }
    };
    finish(answer, body)
}

/// Serves a request for `/files/compose`, of somebody who showed the token.
pub(crate) async fn compose(agent: &Agent, request: Request<Incoming>) -> Response<Body> {
    let (parts, mut body) = request.into_parts();
    let name = auth::basic_user(&parts.headers);
    let answer = compose::serve(name, agent.identity(), &mut body).await;
    finish(answer, body)
}

fn finish(answer: Result<Response<Body>, FilesError>, body: Incoming) -> Response<Body> {
    answer.unwrap_or_else(|error| {
        let mut response = reply::error(error.status(), &chain(&error));
        if let FilesError::Range { size } = error {
            range::mark_unsatisfiable(response.headers_mut(), size);
        }
        refuse(response, body)
    })
}

fn check(
    agent: &Agent,
    parts: &http::request::Parts,
) -> Result<(FileQuery, Operation, Proof, Arc<Identity>), FilesError> {
    let operation = if parts.method == Method::POST { Operation::Write } else { Operation::Read };
    let query = query::parse(parts.uri.query().unwrap_or_default()).map_err(FilesError::Query)?;
    let identity = agent.identity();
    let proof = match &identity.token {
        None => Proof::Token,
        Some(token) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
            auth::check_file_request(&parts.headers, &query, operation, token, now)
                .map_err(FilesError::Auth)?
        }
    };
    Ok((query, operation, proof, identity))
}

/// The next frame of a body that should go on.
async fn next_frame(body: &mut Incoming) -> Result<Option<Frame<Bytes>>, FilesError> {
    let frame = tokio::time::timeout(PATIENCE, body.frame()).await.map_err(|_| FilesError::BodyStopped)?;
    frame.transpose().map_err(|_| FilesError::BodyEnded)
}

/// Answers before a body was read to its end. What is left of it is read and dropped, within bounds, while the answer
/// goes out: closing with unread bytes would reset the connection, and a sender that first sends all would never get
/// to read the answer.
pub(crate) fn refuse(mut response: Response<Body>, mut body: Incoming) -> Response<Body> {
    if body.is_end_stream() {
        return response;
    }
    if body.size_hint().upper().is_none_or(|left| left > WORTH_A_CONNECTION) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    tokio::spawn(async move {
        let read = async {
            let mut left = DRAIN_BYTES;
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                match left.checked_sub(length) {
                    Some(rest) => left = rest,
                    None => break,
                }
            }
        };
        // Giving up is the point of the limit.
        let _ = tokio::time::timeout(DRAIN_TIME, read).await;
    });
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no test can bring about from outside, or not on every machine.
    #[test]
    fn refusals_that_are_rare_have_their_status_and_their_words() {
        let io = |operation, errno: Errno| FilesError::from_io(operation, "/p", errno.into());
        let table = [
            (FilesError::BodyStopped, 408, "the body stopped coming"),
            (FilesError::Interrupted, 500, "the work was interrupted"),
            (FilesError::Busy, 503, "too many files are being read and written"),
            (FilesError::NoInodes, 507, "not enough inodes available"),
            (FilesError::NoSpaceForMetadata, 507, "not enough space for file metadata"),
            (
                UserError::Accounts(Errno::ISDIR.into()).into(),
                500,
                "cannot read the user database: Is a directory (os error 21)",
            ),
            (io("read", Errno::NOENT), 404, "path '/p' does not exist"),
            (io("read", Errno::NOTDIR), 404, "path '/p' does not exist"),
            (io("write", Errno::NOTDIR), 400, "path '/p' cannot be: Not a directory (os error 20)"),
            (io("read", Errno::NAMETOOLONG), 400, "path '/p' cannot be: File name too long (os error 36)"),
            (
                io("read", Errno::LOOP),
                400,
                "path '/p' cannot be: Too many levels of symbolic links (os error 40)",
            ),
            (io("write", Errno::ISDIR), 400, "path '/p' is a directory"),
            (io("write", Errno::NOSPC), 507, "not enough disk space available"),
            (io("write", Errno::DQUOT), 507, "not enough disk space available"),
            (io("read", Errno::ACCESS), 403, "cannot read '/p': Permission denied (os error 13)"),
            (io("write", Errno::PERM), 403, "cannot write '/p': Operation not permitted (os error 1)"),
            (io("write", Errno::ROFS), 403, "cannot write '/p': Read-only file system (os error 30)"),
            (io("write", Errno::TXTBSY), 409, "cannot write '/p': Text file busy (os error 26)"),
            (io("write", Errno::BUSY), 409, "cannot write '/p': Device or resource busy (os error 16)"),
            (io("read", Errno::IO), 500, "cannot read '/p': Input/output error (os error 5)"),
        ];
        for (error, status, message) in table {
            assert_eq!((error.status().as_u16(), chain(&error).as_str()), (status, message));
        }
    }
}
