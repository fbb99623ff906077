//! What can go wrong with a call.

use std::time::Duration;

use wrenn_api::ErrorCode;

/// A call that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection to the API.
    #[error("cannot connect to {base_url}")]
    Connect {
        /// The address.
        base_url: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The API did not answer in time.
    #[error("no answer within {} s to: {call}", .bound.as_secs())]
    Timeout {
        /// What was asked.
        call: String,
        /// The bound.
        bound: Duration,
    },
    /// The connection broke.
    #[error("the connection broke during: {call}")]
    Broken {
        /// What was asked.
        call: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The API refused, with a reason.
    #[error("{message}")]
    Refused {
        /// The HTTP status; 0 where the reason came over a WebSocket.
        status: u16,
        /// The kind of reason.
        code: ErrorCode,
        /// The reason.
        message: String,
    },
    /// The answer is not one of this API.
    #[error("the answer to {call} is not one of this API (status {status})")]
    Unexpected {
        /// What was asked.
        call: String,
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        #[source]
        source: Option<Source>,
    },
    /// What should be sent cannot be read.
    #[error("cannot read what should be sent")]
    Input(#[source] std::io::Error),
    /// A request cannot be put into words.
    #[error("the request cannot be sent")]
    Request(#[source] Source),
    /// The other side closed the connection without saying how the command ended.
    #[error("the connection was closed before the end of the command")]
    Closed,
    /// Nothing was heard for too long.
    #[error("nothing was heard from the server for {} s", .0.as_secs())]
    Silent(Duration),
}

/// Any cause.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

impl ClientError {
    /// The code of the reason, where the API gave one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}
