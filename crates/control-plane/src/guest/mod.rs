//! The guest's agent, `envd`, in its own protocol through a tunnel: processes and the file system by
//! Connect RPC, the contents of files by plain HTTP. What else listens in a guest is asked in [`ports`].
//!
//! One HTTP client serves all sandboxes; the authority of a request is the sandbox's id, so the client's
//! pool keeps the tunnels of each sandbox apart and warm.

mod body;
mod files;
mod ports;
mod process;

use std::{error::Error as StdError, path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use connectrpc::{
    ConnectError, ErrorCode,
    client::{BoxFuture, CallOptions, ClientBody, ClientConfig, ClientTransport},
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper_util::{
    client::legacy::{Client, Error as ClientError},
    rt::{TokioExecutor, TokioTimer},
};
use wrenn_proto::NO_SPACE_DETAIL;
use wrenn_types::{AccessToken, InactivityTimeout, SandboxId};

use crate::{
    host::{TunnelConnector, TunnelError},
    lingering::{Lingering, Patience},
};

pub(crate) use body::{Pieces, upload_body};
pub(crate) use files::Download;
pub(crate) use ports::Outgoing;
pub(crate) use process::{End, Input, Launch, ProcessEvent, ProcessStream, Selector, Signal};

/// Where `envd` listens in every guest.
const PORT: u16 = 49_983;
/// For the end of a stream of events whose last one was read. Much more is only in a stream that goes on,
/// and that one is to be broken off.
const ABANDONED: Patience = Patience { bytes: 64 * 1024, time: Duration::from_secs(1) };
const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");

type Http = Client<TunnelConnector, ClientBody>;

/// The HTTP client as the RPC library wants it.
#[derive(Debug, Clone)]
struct Transport(Http);

impl ClientTransport for Transport {
    type ResponseBody = Lingering;
    type Error = ClientError;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Lingering>, ClientError>> {
        let answer = self.0.request(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Lingering::new(body, ABANDONED))) })
    }
}

/// Why a guest did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// There is no way to it.
    #[error("{message}")]
    Tunnel {
        /// What the tunnel's error says.
        message: String,
        /// What the sandbox's host thinks of it.
        reach: Reach,
    },
    /// It refused.
    #[error("{message}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// Its sentence.
        message: String,
    },
    /// It did not answer in time.
    #[error("the guest did not answer in time")]
    TimedOut,
    /// The connection broke, or what came over it made no sense.
    #[error("the connection to the guest was lost")]
    Lost(#[source] Box<dyn StdError + Send + Sync>),
}

/// How far towards a guest one gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Its host does not answer.
    HostAway,
    /// Its host does not know it, or it is not running.
    SandboxGone,
    /// It runs, and its agent does not answer.
    AgentSilent,
}

/// Why a guest refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no such path, process or program.
    NotFound,
    /// The request cannot be carried out, such as a directory where a file is meant.
    Invalid,
    /// It is there already, or what is there is in the way.
    Conflict,
    /// The user may not.
    Forbidden,
    /// The disk is full.
    Full,
    /// The guest's agent has too much to do now.
    Busy,
    /// The guest's agent failed.
    Failed,
}

impl From<ConnectError> for GuestError {
    fn from(error: ConnectError) -> Self {
        if let Some(source) = error.source() {
            return match TunnelError::beneath(source) {
                Some(tunnel) => Self::from(tunnel),
                None => Self::Lost(Box::new(error)),
            };
        }
        let message = error.message.clone().unwrap_or_else(|| error.code.as_str().to_owned());
        let refusal = match error.code {
            ErrorCode::NotFound => Refusal::NotFound,
            // An unknown user is `unauthenticated` in this contract; our own token is always right.
            ErrorCode::InvalidArgument | ErrorCode::OutOfRange | ErrorCode::Unauthenticated => {
                Refusal::Invalid
            }
            ErrorCode::AlreadyExists | ErrorCode::FailedPrecondition | ErrorCode::Aborted => {
                Refusal::Conflict
            }
            ErrorCode::PermissionDenied => Refusal::Forbidden,
            ErrorCode::ResourceExhausted => {
                let is_full = error.details.iter().any(|detail| detail.type_url == NO_SPACE_DETAIL);
                if is_full { Refusal::Full } else { Refusal::Busy }
            }
            ErrorCode::DeadlineExceeded | ErrorCode::Canceled => return Self::TimedOut,
            // A stream that breaks in the middle is reported as one of these two.
            ErrorCode::Internal | ErrorCode::Unavailable if is_transport(&message) => {
                return Self::Lost(Box::new(error));
            }
            _ => Refusal::Failed,
        };
        Self::Refused { refusal, message }
    }
}

/// Whether the RPC library, and not the guest, speaks of a stream that ended too soon.
fn is_transport(message: &str) -> bool {
    message.contains("without END_STREAM") || message.contains("failed to read response body")
}

impl From<&TunnelError> for GuestError {
    fn from(error: &TunnelError) -> Self {
        let reach = match error {
            TunnelError::Connect(_) | TunnelError::Handshake(_) | TunnelError::TimedOut(_) => Reach::HostAway,
            TunnelError::Address(_) | TunnelError::NoSandbox { .. } | TunnelError::NotRunning { .. } => {
                Reach::SandboxGone
            }
            TunnelError::Refused { .. } => Reach::AgentSilent,
        };
        Self::Tunnel { message: error.to_string(), reach }
    }
}

impl From<ClientError> for GuestError {
    fn from(error: ClientError) -> Self {
        match TunnelError::beneath(&error) {
            Some(tunnel) => Self::from(tunnel),
            None => Self::Lost(Box::new(error)),
        }
    }
}

/// The way to every guest of a host.
#[derive(Debug, Clone)]
pub(crate) struct Guests {
    http: Http,
    ports: ports::Http,
    question: Duration,
}

impl Guests {
    pub(crate) fn new(socket: PathBuf, tunnel: Duration, question: Duration) -> Self {
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_max_idle_per_host(4)
            .build(TunnelConnector::new(socket.clone(), tunnel));
        Self { http, ports: ports::client(socket, tunnel), question }
    }

    /// The guest of one sandbox.
    pub(crate) fn of(&self, id: SandboxId, token: AccessToken, timeout: InactivityTimeout) -> Guest {
        let (http, ports) = (self.http.clone(), self.ports.clone());
        Guest { id, token, timeout, http, ports, question: self.question }
    }
}

/// One guest.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    id: SandboxId,
    token: AccessToken,
    timeout: InactivityTimeout,
    http: Http,
    ports: ports::Http,
    question: Duration,
}

impl Guest {
    fn authority(&self) -> String {
        format!("http://{}:{PORT}", self.id)
    }

    fn headers(&self, user: Option<&str>) -> Result<HeaderMap, GuestError> {
        let mut headers = HeaderMap::new();
        let mut token =
            HeaderValue::from_str(self.token.expose()).map_err(|error| GuestError::Lost(Box::new(error)))?;
        token.set_sensitive(true);
        headers.insert(ACCESS_TOKEN, token);
        if let Some(user) = user {
            let basic = format!("Basic {}", STANDARD.encode(format!("{user}:")));
            let basic = HeaderValue::from_str(&basic).map_err(|error| GuestError::Lost(Box::new(error)))?;
            headers.insert(header::AUTHORIZATION, basic);
        }
        Ok(headers)
    }

    fn transport(&self, user: Option<&str>) -> Result<(Transport, ClientConfig), GuestError> {
        let address = self
            .authority()
            .parse()
            .map_err(|error: http::uri::InvalidUri| GuestError::Lost(Box::new(error)))?;
        let config = ClientConfig::new(address).proto().with_default_headers(self.headers(user)?);
        Ok((Transport(self.http.clone()), config))
    }

    fn question(&self) -> CallOptions {
        CallOptions::default().with_timeout(self.question)
    }
}

/// What a status of the plain HTTP routes means.
fn refusal_of(status: StatusCode) -> Refusal {
    match status {
        StatusCode::NOT_FOUND => Refusal::NotFound,
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => Refusal::Invalid,
        StatusCode::FORBIDDEN => Refusal::Forbidden,
        StatusCode::CONFLICT => Refusal::Conflict,
        StatusCode::INSUFFICIENT_STORAGE => Refusal::Full,
        StatusCode::SERVICE_UNAVAILABLE => Refusal::Busy,
        _ => Refusal::Failed,
    }
}

#[cfg(test)]
mod tests {
    use connectrpc::ErrorDetail;

    use super::*;

    fn refusal(error: ConnectError) -> Refusal {
        match GuestError::from(error) {
            GuestError::Refused { refusal, .. } => refusal,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_guest_that_is_busy_is_not_full() {
        let busy = || ConnectError::resource_exhausted("too many");
        assert_eq!(refusal(busy()), Refusal::Busy);
        let detail = ErrorDetail { type_url: NO_SPACE_DETAIL.to_owned(), value: None, debug: None };
        assert_eq!(refusal(busy().with_detail(detail)), Refusal::Full);
        assert_eq!(refusal_of(StatusCode::SERVICE_UNAVAILABLE), Refusal::Busy);
        assert_eq!(refusal_of(StatusCode::INSUFFICIENT_STORAGE), Refusal::Full);
    }
}
