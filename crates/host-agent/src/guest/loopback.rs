//! Ports on which a program in the guest listens for itself alone.
//!
//! ```text
//!  caller ── tunnel ──┬─► 169.254.0.21:PORT                      a service that listens to the world
//!                     └─► envd ── POST /connect/PORT, upgrade    only after a refusal
//!                               └─► 127.0.0.1:PORT or [::1]:PORT
//! ```
//!
//! Most servers of a development machine listen on the loopback address. Nobody has to start a relay for them in
//! the guest, and nothing watches for ports: envd is asked when somebody comes.

use std::{future::poll_fn, io};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::ENVD_PORT;
use crate::network::GuestConnector;

/// The name of the protocol in the `Upgrade` header.
const PROTOCOL: &str = "wrenn-tunnel";

/// A stream to a port of a guest.
#[derive(Debug)]
pub struct GuestStream {
    /// The stream.
    pub stream: TcpStream,
    /// What the guest said on it before it was ours; it comes before everything that is read from the stream.
    pub first: Bytes,
}

impl From<TcpStream> for GuestStream {
    fn from(stream: TcpStream) -> Self {
        Self { stream, first: Bytes::new() }
    }
}

/// A connection to a port of the guest, on its address or, where that is refused, inside of it. The caller bounds
/// how long it may take.
///
/// # Errors
/// As for every connection; that of the first attempt if the second is refused as well.
pub async fn connect(connector: &GuestConnector, port: u16) -> io::Result<GuestStream> {
    match connector.connect(port).await {
        Ok(stream) => Ok(stream.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && port != ENVD_PORT => {
            match through_envd(connector, port).await {
                Ok(Some(stream)) => Ok(stream),
                Ok(None) | Err(_) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// Asks envd for a connection inside of the guest; none when nothing listens there either.
async fn through_envd(connector: &GuestConnector, port: u16) -> io::Result<Option<GuestStream>> {
    let stream = connector.connect(ENVD_PORT).await?;
    let (mut sender, mut connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let request = Request::post(format!("/connect/{port}"))
        .header(header::HOST, "guest")
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, PROTOCOL)
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let answer = sender.send_request(request);
    tokio::pin!(answer);
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // It ends with the upgrade, or because the guest broke off.
        _ = poll_fn(|context| connection.poll_without_shutdown(context)) => answer.await,
    };
    if answer.map_err(io::Error::other)?.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(None);
    }
    let parts = connection.into_parts();
    Ok(Some(GuestStream { stream: parts.io.into_inner(), first: parts.read_buf }))
}
