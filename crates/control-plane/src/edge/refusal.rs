//! What a caller is told when a sandbox does not answer: JSON of the form that published clients know.
//!
//! | status | when |
//! |---|---|
//! | 400 | the host name begins like that of a port and is none, or the request cannot be carried |
//! | 401 | there is no API key, or it is not known |
//! | 403 | the port is that of the guest's agent |
//! | 409 | the sandbox is being paused |
//! | 502 | "The sandbox was not found": there is none, or it is another team's, or it is paused or has ended |
//! | 502 | "The sandbox is running but port is not open", or what listens there does not speak HTTP |
//! | 503 | the sandbox is about to run, or its host or the database does not answer |
//! | 504 | nothing was said for too long |
//!
//! Clients try again after a 5xx and give up after a 4xx, so what may be otherwise in a moment is a 5xx.

use axum::body::Body;
use http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;
use wrenn_types::SandboxState;

use super::address::Address;
use crate::{
    core::CoreError,
    guest::{GuestError, Reach},
    http::{ApiError, log},
};

/// Published clients compare this.
const NOT_FOUND: &str = "The sandbox was not found";
/// And this.
const NOT_OPEN: &str = "The sandbox is running but port is not open";

/// Why a request has no answer of a guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("a port of a sandbox has the host name PORT-SANDBOX.{0}")]
    Malformed(String),
    #[error("a tunnel cannot be asked for: connect to the port itself")]
    Tunnel,
    #[error("this port is that of the sandbox's agent and cannot be reached from outside")]
    AgentPort,
    #[error("the request has no path")]
    Path,
    #[error("the sandbox changed a protocol that it was not asked to change")]
    Upgrade,
    #[error("the sandbox did not answer in time")]
    Silence,
    #[error(transparent)]
    Core(#[from] CoreError),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Told<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox_id: Option<&'a str>,
    message: String,
    code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

impl Refusal {
    fn parts(&self) -> (StatusCode, String) {
        let status = match self {
            Self::Malformed(_) | Self::Tunnel | Self::Path => StatusCode::BAD_REQUEST,
            Self::AgentPort => StatusCode::FORBIDDEN,
            Self::Upgrade => StatusCode::BAD_GATEWAY,
            Self::Silence => StatusCode::GATEWAY_TIMEOUT,
            Self::Core(error) => return core_parts(error),
        };
        (status, self.to_string())
    }

    pub(super) fn response(self, address: Option<&Address>) -> Response<Body> {
        let (status, message) = self.parts();
        let told = Told {
            sandbox_id: address.map(|address| address.shown.as_str()),
            message,
            code: status.as_u16(),
            port: address.map(|address| address.port.get()),
        };
        if let Self::Core(error) = self {
            tell_log(error);
        }
        let mut response = Response::new(Body::from(serde_json::to_vec(&told).unwrap_or_default()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

fn core_parts(error: &CoreError) -> (StatusCode, String) {
    use SandboxState::{Missing, Pausing, Pending, Resuming, Snapshotting, Starting};
    let not_found = || (StatusCode::BAD_GATEWAY, NOT_FOUND.to_owned());
    match error {
        CoreError::NoSuchSandbox(_) | CoreError::Destroyed(_) => not_found(),
        CoreError::NotRunning { state, .. } => match state {
            Pending | Starting | Resuming | Snapshotting | Missing => {
                (StatusCode::SERVICE_UNAVAILABLE, format!("The sandbox is {state}"))
            }
            Pausing => (StatusCode::CONFLICT, format!("The sandbox is {state}")),
            _ => not_found(),
        },
        CoreError::Guest(GuestError::Tunnel { reach: Reach::SandboxGone, .. }) => not_found(),
        CoreError::Guest(GuestError::Tunnel { reach: Reach::AgentSilent, .. }) => {
            (StatusCode::BAD_GATEWAY, NOT_OPEN.to_owned())
        }
        CoreError::Guest(GuestError::Lost(_)) => {
            (StatusCode::BAD_GATEWAY, "The sandbox is running but port gave no HTTP answer".to_owned())
        }
        error => {
            let parts = crate::http::core_parts(error);
            (parts.status, parts.message)
        }
    }
}

/// Logs what is a fault of ours; what a guest or a caller does is told to the caller alone.
fn tell_log(error: CoreError) {
    if !matches!(error, CoreError::Guest(_)) {
        let error = ApiError::from(error);
        log(&error, &error.parts());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(error: CoreError) -> (u16, String) {
        let (status, message) = core_parts(&error);
        (status.as_u16(), message)
    }

    #[test]
    fn every_state_has_its_answer() {
        let id: wrenn_types::SandboxId = "sb-00000001".parse().unwrap();
        for state in SandboxState::ALL {
            let (status, message) = told(CoreError::NotRunning { id: id.clone(), state, reason: None });
            let expected = match state.as_str() {
                "pending" | "starting" | "resuming" | "snapshotting" | "missing" => 503,
                "pausing" => 409,
                _ => 502,
            };
            assert_eq!(status, expected, "{state}");
            assert_eq!(message == NOT_FOUND, expected == 502, "{state}: {message}");
        }
    }

    #[test]
    fn clients_find_what_they_compare() {
        let tunnel = |reach| CoreError::Guest(GuestError::Tunnel { message: "inside".to_owned(), reach });
        assert_eq!(told(tunnel(Reach::AgentSilent)), (502, NOT_OPEN.to_owned()));
        assert_eq!(told(tunnel(Reach::SandboxGone)), (502, NOT_FOUND.to_owned()));
        assert_eq!(told(tunnel(Reach::HostAway)).0, 503);
        assert_eq!(told(CoreError::NoSuchSandbox("sb-00000001".to_owned())), (502, NOT_FOUND.to_owned()));
        assert_eq!((told(CoreError::NoKey).0, told(CoreError::UnknownKey).0), (401, 401));
        assert_eq!(told(CoreError::NoHost).0, 503);
    }

    #[test]
    fn a_refusal_names_the_sandbox_as_it_was_named() {
        let address = Address {
            id: "sb-00000001".parse().unwrap(),
            shown: "sb00000001".to_owned(),
            port: std::num::NonZeroU16::MIN,
        };
        let response = Refusal::AgentPort.response(Some(&address));
        assert_eq!(response.status(), 403);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    }
}
