//! A failure of a command of this program: the reason, what to do about it, and the exit code.

use std::fmt::Write as _;

use wrenn_api::{ErrorBody, ErrorCode};

use super::output::{Format, Output};
use crate::client::{ClientError, EndpointError};

/// `run`, `exec` and `shell` failed themselves.
pub(super) const OF_COMMAND: u8 = 125;
/// The command in the sandbox did not end in time.
pub(super) const TIMEOUT: u8 = 124;

/// Why there is no result.
#[derive(Debug)]
pub(super) struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    pub(super) fn new(code: u8, error: impl Into<anyhow::Error>) -> Self {
        Self { code, error: error.into() }
    }

    /// A failure of what would otherwise pass on an exit code.
    pub(super) fn of_command(error: impl Into<anyhow::Error>) -> Self {
        let error = error.into();
        let timeout =
            error.downcast_ref::<ClientError>().and_then(ClientError::code) == Some(ErrorCode::Timeout);
        Self { code: if timeout { TIMEOUT } else { OF_COMMAND }, error }
    }

    /// Prints the failure and returns the exit code.
    pub(super) fn report(&self, output: Output) -> u8 {
        // Whoever closed our standard output has seen enough.
        let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
            cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
        };
        if self.error.chain().next().is_some_and(broken_pipe) {
            return self.code;
        }
        match output.format() {
            Format::Json => {
                let client = self.error.downcast_ref::<ClientError>();
                let code = client.and_then(ClientError::code).unwrap_or(ErrorCode::Other);
                let body = ErrorBody::new(code, self.sentence());
                output.note(&serde_json::to_string(&body).unwrap_or_else(|_| self.sentence()));
            }
            Format::Table => {
                output.note(&format!("error: {}", self.sentence()));
                if let Some(hint) = self.hint() {
                    output.note(&format!("hint: {hint}"));
                }
            }
        }
        self.code
    }

    /// The error and its causes.
    fn sentence(&self) -> String {
        let mut text = self.error.to_string();
        for cause in self.error.chain().skip(1) {
            let cause = cause.to_string();
            // Libraries repeat their causes; people need to read them once.
            if !text.contains(&cause) {
                // Writing to a string cannot fail.
                let _ = write!(text, ": {cause}");
            }
        }
        text
    }

    /// What a person can do about it.
    fn hint(&self) -> Option<&'static str> {
        if let Some(error) = self.error.downcast_ref::<EndpointError>() {
            return match error {
                EndpointError::Unset { .. } => {
                    Some("start a stack here with `wrenn dev` or `wrenn up`, or set the two variables")
                }
                EndpointError::Half { .. } => Some("a stack writes both into .wrenn/env: `. .wrenn/env`"),
                _ => None,
            };
        }
        match self.error.downcast_ref::<ClientError>()? {
            ClientError::Connect { .. } => Some(
                "is the stack running? `wrenn dev` or `wrenn up` starts one; WRENN_BASE_URL names another",
            ),
            ClientError::Refused { code: ErrorCode::Unauthorized, .. } => {
                Some("the key is not one of this stack; `. .wrenn/env` sets the one it made")
            }
            ClientError::Refused { code: ErrorCode::Unavailable | ErrorCode::HostUnavailable, .. } => {
                Some("try again; if it stays so, the logs are in .wrenn/logs")
            }
            ClientError::Unexpected { .. } => Some("does WRENN_BASE_URL lead to a Wrenn API?"),
            _ => None,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(1, error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(1, error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(1, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_read_once() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let text = refused.to_string();
        let error = ClientError::Connect { base_url: "http://h".to_owned(), source: refused.into() };
        let failure = Failure::of_command(error);
        assert_eq!(failure.sentence(), format!("cannot connect to http://h: {text}"));
        assert_eq!(failure.code, OF_COMMAND);
        assert!(failure.hint().unwrap().contains("wrenn dev"));
    }

    #[test]
    fn a_timeout_has_a_code_of_its_own() {
        let error =
            ClientError::Refused { status: 504, code: ErrorCode::Timeout, message: "too slow".to_owned() };
        assert_eq!(Failure::of_command(error).code, TIMEOUT);
    }
}
