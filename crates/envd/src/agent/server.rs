//! The listener, and which request goes where.
//!
//! | route | who may | also while not open |
//! |---|---|---|
//! | `GET /health` | anybody | yes |
//! | `POST /init` | the host, with the current token once there is one | yes |
//! | `POST /snapshot/prepare`, `/freeze`, `/unfreeze` | the host, with the token | yes |
//! | `POST /connect/PORT` | the host | no |
//! | `GET`, `HEAD`, `POST /files` | token or signature | no |
//! | `POST /files/compose` | token | no |
//! | `GET /metrics`, `/processes`, `/envs` | token | no |
//! | `POST /process.Process/…`, `/filesystem.Filesystem/…` | token | no |
//!
//! What the host alone may ask for the edge must never forward: `wrenn_types::guest::HOST_ONLY_PATHS`. A web page of
//! any origin may ask whatever it has the token for ([`cors`]).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectRpcService, Limits, Router};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinError,
};
use tower::Service;

use super::{
    auth::{self, UNAUTHORIZED},
    callers::{Caller, Seat},
    cors, files,
    filesystem::FilesystemService,
    host,
    identity::{self, Arrival, InitError},
    loopback,
    process::ProcessService,
    protocol,
    reply::{self, Body},
    snapshot::{self, SnapshotError},
    state::Agent,
    tasks,
    threads::RunError,
};
use crate::console::{chain, say};

/// The version that `/health` names.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How the paths of the services begin. Their errors are those of Connect; all others are plain.
const SERVICES: [&str; 2] = ["/process.Process/", "/filesystem.Filesystem/"];
const VERSION_HEADER: &str = "x-wrenn-envd-version";
/// The most that one message of a client may hold.
const MAXIMUM_MESSAGE: usize = 4 << 20;
/// How long to let others go on when there are no descriptors left for a connection. Nothing tells when there are.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection may be silent before the other side is asked whether it is still there, how long to wait for
/// its answer, and how often.
const SILENCE: Duration = Duration::from_secs(60);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const QUESTIONS: u32 = 6;

/// Serves until the listener fails.
pub(crate) async fn serve(agent: Arc<Agent>, listener: TcpListener) -> io::Result<()> {
    let router = Router::new()
        .add_service(Arc::new(ProcessService::new(Arc::clone(&agent))))
        .add_service(Arc::new(FilesystemService::new(Arc::clone(&agent))));
    let limits =
        Limits::default().with_max_message_size(MAXIMUM_MESSAGE).with_max_request_body_size(MAXIMUM_MESSAGE);
    let services = ConnectRpcService::new(router).with_limits(limits);
    // Connections have from their listener what they are not told themselves.
    notice_the_dead(&listener)?;
    loop {
        let (stream, peer) = accept(&listener).await?;
        match agent.callers.enter(&stream, peer) {
            Ok(Some(seat)) => {
                tokio::spawn(connection(Arc::clone(&agent), services.clone(), stream, seat));
            }
            // Closed at once, and not left waiting: behind it may be the host.
            Ok(None) => {}
            Err(error) => say(format_args!("cannot keep a connection: {error}")),
        }
    }
}

fn notice_the_dead(listener: &TcpListener) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, SILENCE)?;
    sockopt::set_tcp_keepintvl(listener, ANSWER_LIMIT)?;
    Ok(sockopt::set_tcp_keepcnt(listener, QUESTIONS)?)
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

async fn connection(agent: Arc<Agent>, services: ConnectRpcService, stream: TcpStream, seat: Seat) {
    let caller = seat.caller();
    let answer = move |request| {
        let (agent, services) = (Arc::clone(&agent), services.clone());
        async move { route(&agent, services, caller, request).await }
    };
    protocol::serve(stream, seat, answer).await;
}

async fn route(
    agent: &Arc<Agent>,
    services: ConnectRpcService,
    caller: Caller,
    request: Request<Incoming>,
) -> Response<Body> {
    let mut response = if cors::is_preflight(&request) {
        cors::preflight(request.headers())
    } else {
        answer(agent, services, caller, request).await
    };
    cors::allow(response.headers_mut());
    response
}

async fn answer(
    agent: &Arc<Agent>,
    services: ConnectRpcService,
    caller: Caller,
    request: Request<Incoming>,
) -> Response<Body> {
    let path = request.uri().path();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    match path {
        "/health" if reads => health(),
        "/health" => not_allowed(),
        "/init" | "/snapshot/prepare" | "/freeze" | "/unfreeze" if request.method() != Method::POST => {
            not_allowed()
        }
        "/init" => initialise(agent, caller, request).await,
        "/snapshot/prepare" | "/freeze" | "/unfreeze" => stand_still(agent, caller, request).await,
        _ => match agent.identity().gate.refusal() {
            Some(reason) => reply::error(StatusCode::SERVICE_UNAVAILABLE, reason),
            None => answer_while_open(agent, services, caller, request).await,
        },
    }
}

async fn answer_while_open(
    agent: &Arc<Agent>,
    mut services: ConnectRpcService,
    caller: Caller,
    request: Request<Incoming>,
) -> Response<Body> {
    if let Some(port) = request.uri().path().strip_prefix("/connect/") {
        if request.method() != Method::POST {
            return not_allowed();
        }
        if let Err(error) = host::check_caller(agent.place, caller.address) {
            return reply::error(error.status(), &error.to_string());
        }
        let port = port.to_owned();
        return loopback::serve(&agent.streams, agent.address, &port, request).await;
    }
    if request.uri().path() == "/files" {
        return match *request.method() {
            Method::GET | Method::HEAD | Method::POST => files::serve(agent, request).await,
            _ => not_allowed(),
        };
    }
    if agent.identity().token.as_ref().is_some_and(|token| !auth::has_token(request.headers(), token)) {
        let answer = reply::error(StatusCode::UNAUTHORIZED, UNAUTHORIZED);
        return files::refuse(answer, request.into_body());
    }
    if request.uri().path() == "/files/compose" {
        return match *request.method() {
            Method::POST => files::compose(agent, request).await,
            _ => not_allowed(),
        };
    }
    match (request.uri().path(), matches!(*request.method(), Method::GET | Method::HEAD)) {
        ("/metrics", true) => match agent.meter.read() {
            Ok(metrics) => json(&metrics),
            Err(error) => failed(&error),
        },
        ("/envs", true) => json(&agent.identity().environment),
        ("/processes", true) => match agent.listing.run(tasks::list).await {
            Ok(Ok(tasks)) => json(&tasks),
            Ok(Err(error)) => failed(&error),
            Err(RunError::Busy) => {
                reply::error(StatusCode::SERVICE_UNAVAILABLE, "the processes are being listed already")
            }
            Err(error @ RunError::Interrupted) => failed(&error),
        },
        ("/metrics" | "/envs" | "/processes", false) => not_allowed(),
        (path, _) if !SERVICES.iter().any(|service| path.starts_with(service)) => files::refuse(
            reply::error(StatusCode::NOT_FOUND, "there is nothing at this path"),
            request.into_body(),
        ),
        _ => match services.call(request).await {
            Ok(response) => response.map(|body| body.map_err(|never| match never {}).boxed_unsync()),
            Err(never) => match never {},
        },
    }
}

fn health() -> Response<Body> {
    let mut response = reply::empty(StatusCode::NO_CONTENT);
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    not_stored(response)
}

fn not_allowed() -> Response<Body> {
    reply::error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
}

fn failed(error: &dyn std::error::Error) -> Response<Body> {
    reply::error(StatusCode::INTERNAL_SERVER_ERROR, &chain(error))
}

/// What is so now and may be otherwise a moment later.
fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(text) => not_stored(reply::full(StatusCode::OK, "application/json", text)),
        Err(error) => failed(&error),
    }
}

fn not_stored(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn initialise(agent: &Arc<Agent>, caller: Caller, request: Request<Incoming>) -> Response<Body> {
    let arrival = Arrival { at: Instant::now(), connection: caller.connection };
    let (parts, body) = request.into_parts();
    if let Err(error) = host::check_caller(agent.place, caller.address) {
        return reply::error(error.status(), &error.to_string());
    }
    let Some(body) = collect(body, identity::MAXIMUM_BODY).await else {
        return reply::error(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or ended early");
    };
    // A task of its own: a host that goes away in the middle must not leave a guest that is half of two.
    let agent = Arc::clone(agent);
    let done =
        tokio::spawn(async move { identity::initialise(&agent, arrival, &parts.headers, &body).await });
    let mut response = done_for_host(done.await, InitError::status);
    if response.status().is_success()
        && let Ok(time) = SystemTime::now().duration_since(UNIX_EPOCH)
        && let Ok(time) = HeaderValue::try_from(time.as_nanos().to_string())
    {
        response.headers_mut().insert(identity::CLOCK_HEADER, time);
    }
    response
}

async fn stand_still(agent: &Arc<Agent>, caller: Caller, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    if let Err(error) = host::check_caller(agent.place, caller.address) {
        return reply::error(error.status(), &error.to_string());
    }
    let Some(body) = collect(body, snapshot::MAXIMUM_BODY).await else {
        return reply::error(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or ended early");
    };
    let agent = Arc::clone(agent);
    let done = tokio::spawn(async move {
        match parts.uri.path() {
            "/freeze" => snapshot::freeze(&agent, &parts.headers).await,
            "/unfreeze" => snapshot::unfreeze(&agent, &parts.headers).await,
            _ => snapshot::prepare(&agent, &parts.headers, &body).await,
        }
    });
    done_for_host(done.await, SnapshotError::status)
}

/// What the host is told of a task that it asked for.
fn done_for_host<E: std::error::Error>(
    done: Result<Result<(), E>, JoinError>,
    status: impl Fn(&E) -> StatusCode,
) -> Response<Body> {
    match done {
        Ok(Ok(())) => not_stored(reply::empty(StatusCode::NO_CONTENT)),
        Ok(Err(error)) => reply::error(status(&error), &chain(&error)),
        Err(error) => failed(&error),
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
