//! The one place where errors become statuses and codes.

use std::error::Error as _;

use axum::{
    Json,
    extract::ws::rejection::WebSocketUpgradeRejection,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use utoipa::IntoResponses;
use wrenn_api::{ErrorBody, ErrorCode};

use crate::{
    core::CoreError,
    guest::{self, Reach},
    host, store,
};

/// What a handler answers when it cannot do what it was asked.
#[derive(Debug)]
pub(crate) enum ApiError {
    /// The core said no.
    Core(CoreError),
    /// The body is larger than the route takes.
    TooLarge {
        /// In bytes.
        limit: usize,
    },
    /// The method is not one of this path.
    Method,
    /// There is no such route.
    Route,
    /// The caller did not send the rest of the body.
    SlowBody,
    /// A handler panicked.
    Panic,
}

impl From<CoreError> for ApiError {
    fn from(error: CoreError) -> Self {
        Self::Core(error)
    }
}

impl From<WebSocketUpgradeRejection> for ApiError {
    fn from(rejection: WebSocketUpgradeRejection) -> Self {
        Self::Core(CoreError::Invalid(format!("this route is a WebSocket: {}", rejection.body_text())))
    }
}

/// The parts of an error's answer.
pub(crate) struct Parts {
    pub(crate) status: StatusCode,
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl ApiError {
    pub(crate) fn parts(&self) -> Parts {
        let (status, code, message) = match self {
            Self::Core(error) => return core_parts(error),
            Self::TooLarge { limit } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                ErrorCode::TooLarge,
                format!("the body is larger than {limit} bytes"),
            ),
            Self::Method => (
                StatusCode::METHOD_NOT_ALLOWED,
                ErrorCode::MethodNotAllowed,
                "this path does not take this method".to_owned(),
            ),
            Self::Route => (StatusCode::NOT_FOUND, ErrorCode::NotFound, "there is no such route".to_owned()),
            Self::SlowBody => (
                StatusCode::REQUEST_TIMEOUT,
                ErrorCode::InvalidRequest,
                "the rest of the body did not come".to_owned(),
            ),
            Self::Panic => {
                (StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::InternalError, "the server failed".to_owned())
            }
        };
        Parts { status, code, message }
    }
}

/// What an error of the core means over HTTP.
pub(crate) fn core_parts(error: &CoreError) -> Parts {
    let (status, code) = match error {
        CoreError::Invalid(_) | CoreError::Resource(_) => {
            (StatusCode::BAD_REQUEST, ErrorCode::InvalidRequest)
        }
        CoreError::NoKey | CoreError::UnknownKey => (StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized),
        CoreError::NoSuchSandbox(_) | CoreError::NoSuchSnapshot(_) | CoreError::NoMetrics(..) => {
            (StatusCode::NOT_FOUND, ErrorCode::NotFound)
        }
        CoreError::NotRunning { .. } => (StatusCode::CONFLICT, ErrorCode::InvalidState),
        CoreError::Destroyed(_) | CoreError::NameTaken(_) | CoreError::NameReserved(_) => {
            (StatusCode::CONFLICT, ErrorCode::Conflict)
        }
        CoreError::Platform(_) => (StatusCode::FORBIDDEN, ErrorCode::Forbidden),
        CoreError::Fork(error) => {
            let cause = core_parts(error);
            let message = format!("none of the children is there: {}", cause.message);
            return Parts { message, ..cause };
        }
        CoreError::CommandTimedOut(_) => (StatusCode::GATEWAY_TIMEOUT, ErrorCode::Timeout),
        CoreError::TooMany(_) => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable),
        CoreError::AuditFull => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable),
        CoreError::NoHost => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::HostUnavailable),
        CoreError::Store(store::StoreError::Unavailable { .. }) => {
            let message = "the database does not answer; try again".to_owned();
            let (status, code) = (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable);
            return Parts { status, code, message };
        }
        // What the database said is for the log, and not for a caller.
        CoreError::Store(_) | CoreError::Task(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::InternalError)
        }
        CoreError::Host(error) => host_parts(error),
        CoreError::Guest(error) => guest_parts(error),
    };
    Parts { status, code, message: error.to_string() }
}

fn host_parts(error: &host::HostError) -> (StatusCode, ErrorCode) {
    use host::{HostError, Refusal};
    match error {
        HostError::Unreachable(_) | HostError::TimedOut(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::HostUnavailable)
        }
        HostError::Refused { refusal, .. } => match refusal {
            Refusal::NotFound => (StatusCode::NOT_FOUND, ErrorCode::NotFound),
            Refusal::Invalid => (StatusCode::BAD_REQUEST, ErrorCode::InvalidRequest),
            Refusal::State => (StatusCode::CONFLICT, ErrorCode::InvalidState),
            Refusal::Full => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::HostUnavailable),
        },
        HostError::Failed { .. } | HostError::Malformed { .. } | HostError::MalformedId(_) => {
            (StatusCode::BAD_GATEWAY, ErrorCode::AgentError)
        }
    }
}

fn guest_parts(error: &guest::GuestError) -> (StatusCode, ErrorCode) {
    use guest::{GuestError, Refusal};
    match error {
        GuestError::Tunnel { reach: Reach::HostAway, .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::HostUnavailable)
        }
        GuestError::Tunnel { reach: Reach::SandboxGone, .. } => {
            (StatusCode::CONFLICT, ErrorCode::InvalidState)
        }
        GuestError::Tunnel { reach: Reach::AgentSilent, .. } | GuestError::Lost(_) => {
            (StatusCode::BAD_GATEWAY, ErrorCode::AgentError)
        }
        GuestError::TimedOut => (StatusCode::GATEWAY_TIMEOUT, ErrorCode::Timeout),
        GuestError::Refused { refusal, .. } => match refusal {
            Refusal::NotFound => (StatusCode::NOT_FOUND, ErrorCode::NotFound),
            Refusal::Invalid => (StatusCode::BAD_REQUEST, ErrorCode::InvalidRequest),
            Refusal::Conflict => (StatusCode::CONFLICT, ErrorCode::Conflict),
            Refusal::Forbidden => (StatusCode::FORBIDDEN, ErrorCode::Forbidden),
            Refusal::Full => (StatusCode::INSUFFICIENT_STORAGE, ErrorCode::DiskFull),
            Refusal::Busy => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable),
            Refusal::Failed => (StatusCode::BAD_GATEWAY, ErrorCode::AgentError),
        },
    }
}

/// The code of an error as a word, for the audit log.
pub(crate) fn code_word(error: &CoreError) -> String {
    match serde_json::to_value(core_parts(error).code) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "error".to_owned(),
    }
}

/// Logs an error of ours with all that led to it. What a caller did wrong is told to the caller alone.
pub(crate) fn log(error: &ApiError, parts: &Parts) {
    if !parts.status.is_server_error() {
        return;
    }
    let ApiError::Core(error) = error else { return };
    let mut causes = String::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push_str(": ");
        causes.push_str(&cause.to_string());
        next = cause.source();
    }
    tracing::warn!(status = parts.status.as_u16(), "{error}{causes}");
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let parts = self.parts();
        log(&self, &parts);
        let mut response = (parts.status, Json(ErrorBody::new(parts.code, parts.message))).into_response();
        if parts.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// The errors that any route can answer with, for the OpenAPI document.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) enum Errors {
    /// The request says something that cannot be done.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// There is no API key in the request, or it is not known.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// The sandbox, template, snapshot, path or process is not there.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The state of the sandbox, or what is there already, does not allow it.
    #[response(status = 409)]
    Conflict(ErrorBody),
    /// The host agent or the guest failed.
    #[response(status = 502)]
    Agent(ErrorBody),
    /// The database or the host does not answer; try again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}
