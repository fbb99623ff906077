//! Connections: accepted, bounded while they say what they want, and ended in order.

use std::{convert::Infallible, time::Duration};

use axum::{Router, body::Body};
use http::Request;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::lingering::{Lingering, Patience};

/// How long a connection may take to send the head of a request, and how long it may stay open without one.
const HEAD: Duration = Duration::from_secs(60);
/// For the rest of a body that was refused, so that its sender gets to read why.
const REFUSED: Patience = Patience { bytes: 256 << 20, time: Duration::from_secs(10) };
/// The pause after an accept that failed, as it does when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until it is told to stop, then waits up to `drain` for requests in flight.
pub(crate) async fn serve(listener: TcpListener, app: Router, stop: CancellationToken, drain: Duration) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => drop(connections.spawn(connect(stream, app.clone(), stop.clone()))),
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

async fn connect(stream: TcpStream, app: Router, stop: CancellationToken) {
    // Small answers go out at once.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let app = app.clone();
        async move {
            app.oneshot(request.map(|body| Body::new(Lingering::new(body, REFUSED))))
                .await
                .map_err(|never: Infallible| match never {})
        }
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
