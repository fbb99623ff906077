//! `POST /connect/PORT`: a stream to a service that listens only on the guest's loopback interface.
//!
//! Whatever listens on the guest's own address the host reaches by itself. For the rest it asks here:
//!
//! ```text
//!   host ── POST /connect/8080, Upgrade: wrenn-tunnel ──► agent ── 127.0.0.1:8080, else [::1]:8080
//!        ◄─ 101, then bytes both ways ──────────────────►
//!        ◄─ 502: nothing listens there
//! ```
//!
//! Each direction ends by itself, as with a connection: a service sees the end of what it was sent, and its answer
//! still arrives. When one side breaks off, the other is reset and does not take that for an end; so is a service whose
//! stream a snapshot cut. There is a bound on how many streams there are, and each holds two small buffers.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    connection::Connection,
    reply::{self, Body},
};
use crate::network::PORT;

/// What the `Upgrade` header must name.
pub(crate) const PROTOCOL: &str = "wrenn-tunnel";
/// How many streams there may be at once.
const MAXIMUM_STREAMS: usize = 1024;
/// How much each direction of one holds.
const BUFFER: usize = 16 << 10;
/// How long a service may take to accept; on this interface it takes none, or its queue is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the port must be a number from 1 to 65535")]
    Port,
    #[error("the agent is not reached through itself")]
    Agent,
    #[error("this needs 'Upgrade: {PROTOCOL}' over HTTP/1.1")]
    Upgrade,
    #[error("there are {MAXIMUM_STREAMS} streams already")]
    TooMany,
    #[error("nothing listens on {0}: port is not open")]
    Closed(u16),
    #[error("port {0} did not accept the connection in time")]
    Late(u16),
    #[error("cannot connect to port {port}: {source}")]
    Connect {
        port: u16,
        /// It is in the text: the text is all that the host gets.
        source: io::Error,
    },
}

impl ConnectError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Port | Self::Agent => StatusCode::BAD_REQUEST,
            Self::Upgrade => StatusCode::UPGRADE_REQUIRED,
            Self::TooMany => StatusCode::SERVICE_UNAVAILABLE,
            Self::Closed(_) | Self::Late(_) | Self::Connect { .. } => StatusCode::BAD_GATEWAY,
        }
    }
}

/// The streams to loopback ports.
#[derive(Debug)]
pub(crate) struct Streams {
    free: Arc<Semaphore>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(MAXIMUM_STREAMS)) }
    }
}

/// Serves a request for `/connect/` and `port`. `own` is where the agent itself listens.
pub(crate) async fn serve(
    streams: &Streams,
    own: SocketAddr,
    port: &str,
    mut request: Request<Incoming>,
) -> Response<Body> {
    match open(streams, own, port, &mut request).await {
        Ok((service, upgrade, permit)) => {
            tokio::spawn(async move {
                relay(upgrade, service).await;
                drop(permit);
            });
            let mut response = reply::empty(StatusCode::SWITCHING_PROTOCOLS);
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
            response
        }
        Err(error) => {
            let mut response = reply::error(error.status(), &error.to_string());
            if matches!(error, ConnectError::Upgrade) {
                response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
            }
            response
        }
    }
}

async fn open(
    streams: &Streams,
    own: SocketAddr,
    port: &str,
    request: &mut Request<Incoming>,
) -> Result<(TcpStream, OnUpgrade, OwnedSemaphorePermit), ConnectError> {
    let port = parse_port(port).ok_or(ConnectError::Port)?;
    if port == PORT || port == own.port() {
        return Err(ConnectError::Agent);
    }
    let named = request.headers().get(header::UPGRADE);
    if !named.is_some_and(|name| name.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes())) {
        return Err(ConnectError::Upgrade);
    }
    // Present where the connection can be taken over, which is in HTTP/1.1.
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().ok_or(ConnectError::Upgrade)?;
    let permit = Arc::clone(&streams.free).try_acquire_owned().map_err(|_| ConnectError::TooMany)?;
    Ok((connect(port).await?, upgrade, permit))
}

/// A port as it is written in a path: digits, and nothing else.
fn parse_port(text: &str) -> Option<u16> {
    let digits = text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

async fn connect(port: u16) -> Result<TcpStream, ConnectError> {
    let mut answer = ConnectError::Closed(port);
    for address in ADDRESSES {
        match timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) if is_of_another(&stream) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Ok(_)) => {}
            // Also where the guest has no such address: nothing listens on it then.
            Ok(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::AddrNotAvailable
                        | io::ErrorKind::NetworkUnreachable
                        | io::ErrorKind::Unsupported
                ) => {}
            Ok(Err(source)) => answer = ConnectError::Connect { port, source },
            Err(_) => return Err(ConnectError::Late(port)),
        }
    }
    Err(answer)
}

/// Whether somebody else is at the other end. Where nothing listens, the kernel may choose the very port for our end,
/// and then connects a socket to itself.
fn is_of_another(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(local), Ok(peer)) => local != peer,
        // It is gone by now, which its reader will see.
        _ => true,
    }
}

/// Carries bytes until both directions have ended or one side broke off. An end that is none must not look like one to
/// the other side: it is reset instead.
async fn relay(upgrade: OnUpgrade, mut service: TcpStream) {
    // The host went away before it had its answer.
    let Ok(upgraded) = upgrade.await else { return };
    match upgraded.downcast::<TokioIo<Connection>>() {
        Ok(parts) => {
            let mut host = parts.io.into_inner();
            // What the host sent right behind its request.
            let begun = service.write_all(&parts.read_buf).await;
            if begun.is_err() || copy(&mut host, &mut service).await.is_err() {
                let _ = service.set_zero_linger();
                host.break_off();
            }
        }
        // A stream of HTTP/2: its own end cannot be chosen.
        Err(upgraded) => {
            if copy(&mut TokioIo::new(upgraded), &mut service).await.is_err() {
                let _ = service.set_zero_linger();
            }
        }
    }
}

async fn copy<H: AsyncRead + AsyncWrite + Unpin>(host: &mut H, service: &mut TcpStream) -> io::Result<()> {
    copy_bidirectional_with_sizes(host, service, BUFFER, BUFFER).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_port_is_written_in_digits() {
        assert_eq!(parse_port("8080"), Some(8080));
        assert_eq!(parse_port("65535"), Some(65535));
        for text in ["", "0", "+80", "-1", "65536", "80/", " 80", "0x50", "000080", "٣"] {
            assert_eq!(parse_port(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_port_or_none(text in ".{0,8}") {
            if let Some(port) = parse_port(&text) {
                prop_assert!(port > 0);
                prop_assert_eq!(text.trim_start_matches('0'), port.to_string());
            }
        }
    }
}
