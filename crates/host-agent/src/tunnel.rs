//! `GET /tunnel/{sandbox_id}/{port}`: a byte stream to a port of a guest.
//!
//! The caller asks for the upgrade `wrenn-tunnel`; after the 101 both directions are copied until either
//! side ends. A port on which the guest's program listens for itself alone is reached as well
//! ([`crate::guest::loopback`]). Every byte moves the sandbox's inactivity clock; a
//! connection that is open does not, nor does its end. What the bytes mean is
//! none of the agent's business: it neither parses nor buffers what a guest sends.
//!
//! | answer | when |
//! |---|---|
//! | 101 | the guest's port took the connection |
//! | 400 | the id or the port is not one, or no upgrade was asked for |
//! | 404 | no such sandbox |
//! | 409 | it is not running, or is being paused and that takes long |
//! | 502 | nothing listens on the port, or the guest did not answer in time |

use std::{io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::watch,
    time::timeout,
};
use wrenn_types::SandboxId;

use crate::{
    guest::loopback::GuestStream,
    registry::Registry,
    sandbox::{Handle, Stage, Status},
};

/// The name of the protocol in the `Upgrade` header.
pub const PROTOCOL: &str = "wrenn-tunnel";
/// How long a guest may take to accept a connection.
const CONNECT_BOUND: Duration = Duration::from_secs(5);
/// Bytes carried at once in each direction.
const BUFFER: usize = 64 * 1024;

/// The route, to be merged into the agent's router.
pub fn routes(registry: Arc<Registry>) -> Router {
    Router::new().route("/tunnel/{sandbox_id}/{port}", get(open)).with_state(registry)
}

fn refuse(status: StatusCode, code: &str, message: String) -> Response {
    (status, Json(json!({ "code": code, "message": message }))).into_response()
}

fn asks_for_tunnel(headers: &HeaderMap) -> bool {
    let value = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok());
    value.is_some_and(|value| value.eq_ignore_ascii_case(PROTOCOL))
}

async fn open(
    State(registry): State<Arc<Registry>>,
    Path((id, port)): Path<(String, String)>,
    mut request: Request,
) -> Response {
    let id = match id.parse::<SandboxId>() {
        Ok(id) => id,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, "invalid_argument", error.to_string()),
    };
    let Some(port) = port.parse::<u16>().ok().filter(|port| *port > 0) else {
        let message = "a port is a number from 1 to 65535".to_owned();
        return refuse(StatusCode::BAD_REQUEST, "invalid_argument", message);
    };
    if !asks_for_tunnel(request.headers()) {
        let message = format!("ask for the upgrade {PROTOCOL}");
        return refuse(StatusCode::BAD_REQUEST, "invalid_argument", message);
    }
    let Some(handle) = registry.get(&id) else {
        return refuse(StatusCode::NOT_FOUND, "not_found", format!("there is no sandbox {id} here"));
    };
    // A guest that is being paused takes nothing more, and is gone in a moment, unless that fails.
    let mut watch = handle.watch();
    let outcome = watch.wait_for(|status| status.stage != Stage::Pausing);
    let goes_on = timeout(CONNECT_BOUND, outcome).await.is_ok();
    let Some(connector) = handle.connector().filter(|_| goes_on) else {
        let message = format!("sandbox {id} is {}", handle.stage().word());
        return refuse(StatusCode::CONFLICT, "failed_precondition", message);
    };
    let guest = match timeout(CONNECT_BOUND, handle.connect(&connector, port)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let message = format!("port {port} of sandbox {id} cannot be reached: {error}");
            return refuse(StatusCode::BAD_GATEWAY, "unavailable", message);
        }
        Err(_) => {
            let message = format!("port {port} of sandbox {id} did not answer within {CONNECT_BOUND:?}");
            return refuse(StatusCode::BAD_GATEWAY, "unavailable", message);
        }
    };
    handle.activity().touch();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(caller) => carry(TokioIo::new(caller), guest, handle).await,
            Err(error) => {
                tracing::debug!(%id, error = &error as &dyn std::error::Error, "tunnel not taken up")
            }
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, PROTOCOL)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Waits until a guest that is being saved goes on: what arrived at it meanwhile would be refused. One that does not
/// go on loses its tunnels, and this one with them.
async fn saved(watch: &mut watch::Receiver<Status>) {
    let goes_on = |status: &Status| !matches!(status.stage, Stage::Snapshotting | Stage::Pausing);
    if !goes_on(&watch.borrow()) {
        let _ = watch.wait_for(goes_on).await;
    }
}

/// Copies both directions until both have ended, the caller is gone, or the machine is no longer the sandbox's.
async fn carry(caller: impl AsyncRead + AsyncWrite, guest: GuestStream, handle: Handle) {
    let (caller_read, caller_write) = tokio::io::split(caller);
    let (guest_read, guest_write) = guest.stream.into_split();
    let guest_read = std::io::Cursor::new(guest.first).chain(guest_read);
    let mut watch = handle.watch();
    let incarnation = watch.borrow().incarnation;
    let both = async {
        let up = copy(caller_read, guest_write, &handle, true);
        let down = copy(guest_read, caller_write, &handle, false);
        tokio::pin!(up, down);
        tokio::select! {
            // A guest that takes no more may still have something to say: why it took no more.
            _ = &mut up => drop(down.await),
            // A caller that takes no more is gone; one that was told the end may still be sending.
            told = &mut down => if told.is_ok() { drop(up.await) },
        }
    };
    tokio::select! {
        // A broken stream is the normal end of a tunnel whose caller has gone: there is nobody to tell.
        () = both => {}
        // Dropping the streams here breaks them without a proper end, so that a caller cannot take the end
        // of the sandbox for the end of its answer.
        _ = watch.wait_for(|status| !status.stage.has_guest() || status.incarnation != incarnation) => {}
    }
}

/// Copies one direction to its end. Each piece moves the inactivity clock.
pub(crate) async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    handle: &Handle,
    into_guest: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut watch = handle.watch();
    loop {
        let length = from.read(&mut buffer).await?;
        // An end is no activity: connections that were kept for later are closed when nobody has used them for long.
        if length > 0 {
            handle.activity().touch();
        }
        if into_guest {
            saved(&mut watch).await;
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}
