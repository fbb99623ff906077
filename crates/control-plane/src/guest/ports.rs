//! HTTP requests to programs of a guest, on whichever port they listen.
//!
//! ```text
//! [`Outgoing`] ── request() ──► a pooled connection, or a new one ──► answer, as it comes
//!      ▲                          │ refused: nothing was sent
//!      │                          │ broke, had served before, and the request can be repeated: sent once more
//!      └──────────────────────────┘
//! ```
//!
//! One HTTP client serves all of them. The authority of a request is the sandbox's id and the port, so each pair has a
//! pool of its own; which host the caller named is only in the `Host` header. A pause, a kill and a rollback break the
//! tunnels, so that no connection of before is left in a pool after a resume.

use std::{
    error::Error as StdError,
    num::NonZeroU16,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{Extensions, HeaderMap, Method, Request, Response, Uri, uri::PathAndQuery};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, Error as ClientError},
    rt::{TokioExecutor, TokioTimer},
};

use super::{Guest, GuestError};
use crate::host::{History, TunnelConnector};

/// How long a connection is kept for the next request. Servers close idle ones after 5 seconds and more, and who is
/// faster never sends a request into a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(4);
/// How many are kept for each port of each sandbox.
const IDLE_CONNECTIONS: usize = 16;
/// The largest head of an answer, and the largest piece of a body.
const HEAD: usize = 64 * 1024;
/// The most headers in it.
const HEADERS: usize = 256;

/// The HTTP client of all ports.
pub(super) type Http = Client<TunnelConnector, OnceBody>;

/// A request of a caller on its way to a port, which can be tried more than once as long as nothing of its body was sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    method: Method,
    path: PathAndQuery,
    headers: HeaderMap,
    body: Arc<Mutex<Source>>,
}

/// The one body of all tries.
#[derive(Debug)]
struct Source {
    body: Body,
    /// The try that may read it: the last one.
    turn: usize,
    /// Whether something of it was read.
    is_touched: bool,
}

impl Outgoing {
    pub(crate) fn new(method: Method, path: PathAndQuery, headers: HeaderMap, body: Body) -> Self {
        let body = Arc::new(Mutex::new(Source { body, turn: 0, is_touched: false }));
        Self { method, path, headers, body }
    }

    /// The request, for one more try. A body of an earlier try is not read any more.
    fn request(&self, guest: &Guest, port: NonZeroU16) -> Result<Request<OnceBody>, GuestError> {
        let lost = |error: http::Error| GuestError::Lost(Box::new(error));
        let address = Uri::builder()
            .scheme("http")
            .authority(format!("{}:{port}", guest.id))
            .path_and_query(self.path.clone())
            .build()
            .map_err(lost)?;
        let mut source = self.body.lock().unwrap_or_else(PoisonError::into_inner);
        source.turn += 1;
        let body = OnceBody { source: Arc::clone(&self.body), turn: source.turn };
        let mut request =
            Request::builder().method(self.method.clone()).uri(address).body(body).map_err(lost)?;
        *request.headers_mut() = self.headers.clone();
        Ok(request)
    }

    /// Whether it does no harm to send it again although it may have been received.
    fn can_be_repeated(&self) -> bool {
        let is_touched = self.body.lock().unwrap_or_else(PoisonError::into_inner).is_touched;
        self.method.is_idempotent() && !is_touched
    }
}

impl Guest {
    /// Sends a request to a port. The answer comes as it is, its body and its trailers as the guest sends them.
    pub(crate) async fn send_to_port(
        &self,
        port: NonZeroU16,
        outgoing: &Outgoing,
    ) -> Result<Response<Incoming>, GuestError> {
        let mut stale = 0;
        let response = loop {
            match self.ports.request(outgoing.request(self, port)?).await {
                Ok(response) => break response,
                // The program may have closed it just when the request was on its way, and others that were kept as well.
                Err(error)
                    if stale < IDLE_CONNECTIONS && has_served(&error) && outgoing.can_be_repeated() =>
                {
                    stale += 1;
                }
                Err(error) => return Err(error.into()),
            }
        };
        if let Some(history) = response.extensions().get::<History>() {
            history.set_served();
        }
        Ok(response)
    }
}

/// Whether the connection on which this went wrong had answered a request before.
fn has_served(error: &ClientError) -> bool {
    let mut found = Extensions::new();
    if let Some(connection) = error.connect_info() {
        connection.get_extras(&mut found);
    }
    found.get::<History>().is_some_and(History::has_served)
}

pub(super) fn client(socket: PathBuf, bound: Duration) -> Http {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .http1_max_buf_size(HEAD)
        .http1_max_headers(HEADERS)
        .build(TunnelConnector::new(socket, bound))
}

/// The body of a caller, in the hands of one try.
#[derive(Debug)]
pub(super) struct OnceBody {
    source: Arc<Mutex<Source>>,
    turn: usize,
}

impl OnceBody {
    fn with<T>(&self, read: impl FnOnce(&mut Source) -> T) -> Option<T> {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        (source.turn == self.turn).then(|| read(&mut source))
    }
}

impl http_body::Body for OnceBody {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let polled = self.with(|source| {
            source.is_touched = true;
            Pin::new(&mut source.body).poll_frame(context).map_err(Into::into)
        });
        polled.unwrap_or_else(|| Poll::Ready(Some(Err("the request is sent over another connection".into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.with(|source| source.body.is_end_stream()).unwrap_or(true)
    }

    fn size_hint(&self) -> SizeHint {
        self.with(|source| source.body.size_hint()).unwrap_or_default()
    }
}
