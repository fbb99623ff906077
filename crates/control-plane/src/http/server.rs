//! Connections: accepted, bounded while they say what they want, and ended in order.

use std::{convert::Infallible, net::IpAddr, time::Duration};

use axum::{Router, body::Body};
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::{
    edge::Edge,
    lingering::{Lingering, Patience},
};

/// How long a connection may take to send the head of a request, and how long it may stay open without one.
const HEAD: Duration = Duration::from_secs(60);
/// For the rest of a body that was refused, so that its sender gets to read why.
const REFUSED: Patience = Patience { bytes: 256 << 20, time: Duration::from_secs(10) };
/// The pause after an accept that failed, as it does when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who has not said anything for this long is asked whether it is still there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// How often it is asked, and how often in all.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMES: u32 = 4;

/// All that answers on one address.
#[derive(Debug, Clone)]
pub(crate) struct Surfaces {
    pub(crate) api: Router,
    /// The ports of sandboxes, by host name.
    pub(crate) edge: Option<Edge>,
}

impl Surfaces {
    async fn answer(self, request: Request<Body>, peer: IpAddr) -> Response<Body> {
        if let Some(edge) = self.edge
            && let Some(called) = edge.called(&request)
        {
            return edge.answer(called, request, peer).await;
        }
        match self.api.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// Serves until it is told to stop, then waits up to `drain` for requests in flight.
pub(crate) async fn serve(listener: TcpListener, app: Surfaces, stop: CancellationToken, drain: Duration) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                drop(connections.spawn(connect(stream, peer.ip(), app.clone(), stop.clone())));
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(drain, connections.wait()).await.is_err() {
        tracing::warn!("requests were still in flight when the server stopped");
    }
}

/// Has the kernel find out when a peer is gone without a word: a stream may be silent for as long as it likes.
fn watch_over(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_TIMES)
}

async fn connect(stream: TcpStream, peer: IpAddr, app: Surfaces, stop: CancellationToken) {
    // Small answers go out at once.
    let _ = stream.set_nodelay(true);
    if let Err(error) = watch_over(&stream) {
        tracing::debug!(error = &error as &dyn std::error::Error, "a connection is not watched over");
    }
    let service = service_fn(move |request: Request<Incoming>| {
        let request = request.map(|body| Body::new(Lingering::new(body, REFUSED)));
        let answer = app.clone().answer(request, peer);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            // The request in flight is answered; there is no next one.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // A client that goes away in the middle is the client's business.
        tracing::debug!(error = &error as &dyn std::error::Error, "a connection broke");
    }
}
