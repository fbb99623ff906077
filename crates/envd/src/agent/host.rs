//! What only the host may ask for, and how it is known.
//!
//! In a virtual machine the host is who calls from the gateway's address, so that no program in the guest can make
//! itself the owner by a request to the agent. Clients come from the same address, by way of the edge, which must not
//! forward these paths; `wrenn_types::guest` has the list. Once there is a token, what changes the guest must prove it
//! too. Outside of a virtual machine nobody is kept out by address.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderValue, StatusCode};

use super::{
    auth::{TOKEN_HEADER, UNAUTHORIZED},
    state::{Identity, Place},
};
use crate::network::GATEWAY;

/// Why a caller is not taken for the host.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HostError {
    #[error("only the host may call this")]
    NotTheHost,
    #[error("{UNAUTHORIZED}")]
    Unauthorized,
}

impl HostError {
    /// The HTTP status of this error.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NotTheHost => StatusCode::FORBIDDEN,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
        }
    }
}

/// Whether the caller is where the host is.
pub(crate) fn check_caller(place: Place, caller: SocketAddr) -> Result<(), HostError> {
    match place {
        Place::Guest if caller.ip() != IpAddr::V4(GATEWAY) => Err(HostError::NotTheHost),
        Place::Guest | Place::Outside => Ok(()),
    }
}

/// Whether the current token is proven, if there is one: by the header, else by what the body says.
pub(crate) fn check_token(
    identity: &Identity,
    headers: &HeaderMap,
    in_body: Option<&str>,
) -> Result<(), HostError> {
    let Some(token) = &identity.token else { return Ok(()) };
    let in_header = headers.get(TOKEN_HEADER).map(HeaderValue::as_bytes);
    let proof = in_header.or_else(|| in_body.map(str::as_bytes));
    if proof.is_some_and(|proof| token.matches(proof)) { Ok(()) } else { Err(HostError::Unauthorized) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_guest_only_the_gateway_may_call() {
        let from = |address: &str| check_caller(Place::Guest, format!("{address}:1").parse().unwrap());
        assert!(from("169.254.0.22").is_ok());
        for address in ["127.0.0.1", "169.254.0.21", "172.17.0.2", "[::1]", "[::ffff:127.0.0.1]"] {
            assert_eq!(from(address).unwrap_err().status(), StatusCode::FORBIDDEN, "{address}");
        }
        assert!(check_caller(Place::Outside, "127.0.0.1:1".parse().unwrap()).is_ok());
    }
}
