//! The error envelope: `{"error":{"code","message"}}`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Every answer with a status of 400 or more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// A code for programs and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// What kind of error it is. A client must expect codes that it does not know.
    pub code: ErrorCode,
    /// One sentence that names what was wrong.
    pub message: String,
}

/// The kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// 400: the request says something that cannot be done for anybody.
    InvalidRequest,
    /// 401: no API key, or one that is not known.
    Unauthorized,
    /// 403: the guest's operating system does not permit it, or what is meant belongs to the platform.
    Forbidden,
    /// 404: the sandbox, template, path or process is not there.
    NotFound,
    /// 405: the path is known and the method is not.
    MethodNotAllowed,
    /// 409: the sandbox is not in a state in which this can be done.
    InvalidState,
    /// 409: what should be made is there already, or what is there is of another kind.
    Conflict,
    /// 413: the body is larger than this route takes.
    TooLarge,
    /// 429: too many at once.
    TooMany,
    /// 500: our fault.
    InternalError,
    /// 502: the host agent or the guest's agent failed, or broke the connection.
    AgentError,
    /// 503: no host can take it now.
    HostUnavailable,
    /// 503: the database does not answer, or the sandbox has too much to do at once; try again.
    Unavailable,
    /// 504: the command did not end within its time and was killed.
    Timeout,
    /// 507: the sandbox's disk is full.
    DiskFull,
    /// A code of a newer server.
    #[serde(other)]
    Other,
}

impl ErrorBody {
    /// An envelope of its two parts.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { error: ErrorDetail { code, message: message.into() } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_is_the_published_one() {
        let body = ErrorBody::new(ErrorCode::InvalidState, "no");
        let json = serde_json::to_value(&body).unwrap();
        assert_eq!(json, serde_json::json!({"error": {"code": "invalid_state", "message": "no"}}));
        let newer: ErrorBody =
            serde_json::from_str(r#"{"error":{"code":"brand_new","message":"m","more":1}}"#).unwrap();
        assert_eq!(newer.error.code, ErrorCode::Other);
    }
}
