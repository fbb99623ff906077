//! A byte stream to a port of a guest: `GET /tunnel/{sandbox_id}/{port}` on the agent's socket.
//!
//! ```text
//! HTTP client ── connector ── Unix socket ── agent ── guest's port
//!   pool per sandbox   │ upgrade, 101, then raw bytes │
//! ```
//!
//! The connector is what an HTTP client asks for a connection to `http://{sandbox_id}:{port}`, so that the
//! client's own pool keeps tunnels open between requests, one pool per sandbox.

use std::{
    error::Error as StdError,
    io::{self, IoSlice},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::upgrade::Upgraded;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use serde::Deserialize;
use tokio::net::UnixStream;
use wrenn_types::{ParseIdError, SandboxId};

/// The name of the protocol in the `Upgrade` header.
const PROTOCOL: &str = "wrenn-tunnel";
/// The largest error body that is read.
const ERROR_BODY: usize = 16 * 1024;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    /// The agent's socket cannot be connected to.
    #[error("the host agent cannot be reached")]
    Connect(#[source] io::Error),
    /// The agent does not speak HTTP, or broke off.
    #[error("the host agent broke off the upgrade")]
    Handshake(#[source] hyper::Error),
    /// The address does not name a sandbox.
    #[error("the address of a tunnel is no sandbox")]
    Address(#[source] ParseIdError),
    /// The agent has no such sandbox.
    #[error("{message}")]
    NoSandbox {
        /// The agent's sentence.
        message: String,
    },
    /// The sandbox is not running.
    #[error("{message}")]
    NotRunning {
        /// The agent's sentence.
        message: String,
    },
    /// The guest does not take the connection, or the agent failed.
    #[error("{message}")]
    Refused {
        /// The agent's sentence.
        message: String,
    },
    /// It took too long.
    #[error("the tunnel was not open within {0:?}")]
    TimedOut(Duration),
}

impl TunnelError {
    /// The tunnel error that an HTTP client's error comes from, if it comes from one.
    pub(crate) fn beneath<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(tunnel) = error.downcast_ref::<Self>() {
                return Some(tunnel);
            }
            next = error.source();
        }
        None
    }
}

/// Opens tunnels for an HTTP client.
#[derive(Debug, Clone)]
pub(crate) struct TunnelConnector {
    socket: Arc<PathBuf>,
    bound: Duration,
}

impl TunnelConnector {
    pub(crate) fn new(socket: PathBuf, bound: Duration) -> Self {
        Self { socket: Arc::new(socket), bound }
    }

    async fn open(self, address: Uri) -> Result<Tunnel<Upgraded>, TunnelError> {
        let id: SandboxId = address.host().unwrap_or_default().parse().map_err(TunnelError::Address)?;
        let port = address.port_u16().unwrap_or(80);
        let stream = UnixStream::connect(&*self.socket).await.map_err(TunnelError::Connect)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(TunnelError::Handshake)?;
        // It ends when the connection is upgraded or dropped.
        tokio::spawn(connection.with_upgrades());
        let request = Request::get(format!("/tunnel/{id}/{port}"))
            .header(header::HOST, "host-agent")
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, PROTOCOL)
            .body(Empty::new())
            .expect("an id and a port make a path");
        let response = sender.send_request(request).await.map_err(TunnelError::Handshake)?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return hyper::upgrade::on(response).await.map(Tunnel::new).map_err(TunnelError::Handshake);
        }
        let status = response.status();
        let body = Limited::new(response.into_body(), ERROR_BODY).collect().await;
        let message = body
            .ok()
            .and_then(|body| serde_json::from_slice::<Refusal>(&body.to_bytes()).ok())
            .map_or_else(|| format!("the host agent answered {status}"), |refusal| refusal.message);
        Err(match status {
            StatusCode::NOT_FOUND => TunnelError::NoSandbox { message },
            StatusCode::CONFLICT => TunnelError::NotRunning { message },
            _ => TunnelError::Refused { message },
        })
    }
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

impl tower::Service<Uri> for TunnelConnector {
    type Response = Tunnel<Upgraded>;
    type Error = TunnelError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, address: Uri) -> Self::Future {
        let bound = self.bound;
        let opening = tokio::time::timeout(bound, self.clone().open(address));
        Box::pin(async move { opening.await.unwrap_or(Err(TunnelError::TimedOut(bound))) })
    }
}

/// Whether a request was answered over a connection. Who sends one marks it; the HTTP client hands it out with each
/// answer, and with each error of a connection that broke.
#[derive(Debug, Clone, Default)]
pub(crate) struct History(Arc<AtomicBool>);

impl History {
    pub(crate) fn set_served(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_served(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection of an HTTP client that is no TCP connection.
#[derive(Debug)]
pub(crate) struct Tunnel<T> {
    stream: T,
    history: History,
}

impl<T> Tunnel<T> {
    pub(crate) fn new(stream: T) -> Self {
        Self { stream, history: History::default() }
    }
}

impl<T> Connection for Tunnel<T> {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.history.clone())
    }
}

impl<T: hyper::rt::Read + Unpin> hyper::rt::Read for Tunnel<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: hyper::rt::Write + Unpin> hyper::rt::Write for Tunnel<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }
}
