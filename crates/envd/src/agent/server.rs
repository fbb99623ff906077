//! The listener, and which request goes where.
//!
//! | route | who may | also while closed |
//! |---|---|---|
//! | `GET /health` | anybody | yes |
//! | `POST /init` | the host, with the current token once there is one | yes |
//! | `GET`, `POST /files` | token or signature | no |
//! | `POST /process.Process/…`, `/filesystem.Filesystem/…` | token | no |

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectRpcService, Limits, Router};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tower::Service;

use super::{
    auth::{self, UNAUTHORIZED},
    files,
    filesystem::FilesystemService,
    identity,
    process::ProcessService,
    reply::{self, Body},
    state::{Agent, Gate},
};
use crate::console::{chain, say};

/// The version that `/health` names.
const VERSION: &str = env!("CARGO_PKG_VERSION");
const VERSION_HEADER: &str = "x-wrenn-envd-version";
/// How many connections there may be at once; more wait to be accepted.
const MAXIMUM_CONNECTIONS: usize = 4096;
/// How long a client may take to send the head of a request, and to begin the next one: longer than those who keep
/// connections open for later keep them, so that it is never us who closes one that is about to be used.
const HEAD_LIMIT: Duration = Duration::from_secs(620);
/// The most that one message of a client may hold.
const MAXIMUM_MESSAGE: usize = 4 << 20;
/// How long to let others go on when there are no descriptors left for a connection. Nothing tells when there are.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the listener fails.
pub(crate) async fn serve(agent: Arc<Agent>, listener: TcpListener) -> io::Result<()> {
    let router = Router::new()
        .add_service(Arc::new(ProcessService::new(Arc::clone(&agent))))
        .add_service(Arc::new(FilesystemService::new(Arc::clone(&agent))));
    let limits =
        Limits::default().with_max_message_size(MAXIMUM_MESSAGE).with_max_request_body_size(MAXIMUM_MESSAGE);
    let services = ConnectRpcService::new(router).with_limits(limits);
    let connections = Arc::new(Semaphore::new(MAXIMUM_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return Ok(()) };
        let (stream, peer) = accept(&listener).await?;
        let (agent, services) = (Arc::clone(&agent), services.clone());
        tokio::spawn(async move {
            connection(agent, services, stream, peer).await;
            drop(permit);
        });
    }
}

async fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Without it every small event would wait for the acknowledgement of the one before.
                let _ = stream.set_nodelay(true);
                return Ok((stream, peer));
            }
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::Interrupted => {}
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => return Err(error),
                _ => {
                    say(format_args!("cannot accept a connection: {error}"));
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(agent: Arc<Agent>, services: ConnectRpcService, stream: TcpStream, peer: SocketAddr) {
    let service = service_fn(move |request| {
        let (agent, services) = (Arc::clone(&agent), services.clone());
        async move { Ok::<_, Infallible>(route(&agent, services, peer, request).await) }
    });
    // A connection that breaks is the client's business; whoever serves it notices by itself.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn route(
    agent: &Arc<Agent>,
    mut services: ConnectRpcService,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    match request.uri().path() {
        "/health" if matches!(*request.method(), Method::GET | Method::HEAD) => health(),
        "/init" if request.method() == Method::POST => initialise(agent, peer, request).await,
        "/health" | "/init" => reply::error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"),
        path => {
            if let Gate::Closed(reason) = &agent.identity().gate {
                return reply::error(StatusCode::SERVICE_UNAVAILABLE, reason);
            }
            if path == "/files" {
                return match *request.method() {
                    Method::GET | Method::POST => files::serve(agent, request).await,
                    _ => reply::error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"),
                };
            }
            if agent.identity().token.as_ref().is_some_and(|token| !auth::has_token(request.headers(), token))
            {
                files::drain(request.into_body()).await;
                return reply::error(StatusCode::UNAUTHORIZED, UNAUTHORIZED);
            }
            match services.call(request).await {
                Ok(response) => response.map(|body| body.map_err(|never| match never {}).boxed_unsync()),
                Err(never) => match never {},
            }
        }
    }
}

fn health() -> Response<Body> {
    let mut response = reply::empty(StatusCode::NO_CONTENT);
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    response
}

async fn initialise(agent: &Arc<Agent>, peer: SocketAddr, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    if let Err(error) = identity::check_caller(agent.place, peer) {
        return reply::error(error.status(), &error.to_string());
    }
    let Some(body) = collect(body, identity::MAXIMUM_BODY).await else {
        return reply::error(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or ended early");
    };
    match identity::initialise(agent, &parts.headers, &body).await {
        Ok(()) => reply::empty(StatusCode::NO_CONTENT),
        Err(error) => reply::error(error.status(), &chain(&error)),
    }
}

/// The whole body, unless it is too large or breaks off.
async fn collect(mut body: Incoming, maximum: usize) -> Option<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        if bytes.len() + data.len() > maximum {
            return None;
        }
        bytes.extend_from_slice(&data);
    }
    Some(bytes.freeze())
}
