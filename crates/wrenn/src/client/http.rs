//! Plain HTTP/1.1 calls: one connection pool, a bound on every wait, errors as types.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Empty, Full, Limited, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client as Pool, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::{Serialize, de::DeserializeOwned};
use wrenn_api::{API_KEY_HEADER, ErrorBody, ErrorCode};

use super::{
    endpoint::Endpoint,
    error::{ClientError, Source},
};

/// How long a connection may take to be made.
pub(super) const CONNECT_BOUND: Duration = Duration::from_secs(10);
/// How long a call without a reason to take long may take.
pub(super) const CALL_BOUND: Duration = Duration::from_secs(60);
/// How long a stream may stand still.
pub(super) const IDLE_BOUND: Duration = Duration::from_secs(120);
/// No JSON answer is larger: the output of a command is at most 16 MiB of each stream, in base64.
const LARGEST_ANSWER: usize = 64 << 20;

pub(super) type RequestBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// The pool and what every request carries.
#[derive(Debug, Clone)]
pub(super) struct Transport {
    pub(super) endpoint: Endpoint,
    pool: Pool<HttpConnector, RequestBody>,
}

/// A request that has not been sent.
pub(super) struct Call {
    method: Method,
    path: String,
    body: RequestBody,
    json: bool,
    length: Option<u64>,
    bound: Duration,
}

impl Call {
    pub(super) fn new(method: Method, path: impl Into<String>) -> Self {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        Self { method, path: path.into(), body, json: false, length: None, bound: CALL_BOUND }
    }

    pub(super) fn json(mut self, value: &impl Serialize) -> Result<Self, ClientError> {
        let text = serde_json::to_vec(value).map_err(|error| ClientError::Request(error.into()))?;
        self.body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
        self.json = true;
        Ok(self)
    }

    pub(super) fn stream(mut self, body: RequestBody, length: Option<u64>) -> Self {
        self.body = body;
        self.length = length;
        self
    }

    pub(super) fn within(mut self, bound: Duration) -> Self {
        self.bound = bound;
        self
    }

    /// The call in words, for errors.
    fn name(&self) -> String {
        let path = self.path.split('?').next().unwrap_or_default();
        format!("{} {path}", self.method)
    }
}

impl Transport {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_BOUND));
        connector.set_nodelay(true);
        let pool = Pool::builder(TokioExecutor::new()).build(connector);
        Self { endpoint, pool }
    }

    /// Sends a call and waits for the head of its answer; an answer that is an error becomes one.
    pub(super) async fn send(&self, call: Call) -> Result<Response<Incoming>, ClientError> {
        let name = call.name();
        let bound = call.bound;
        let answer = self.exchange(call);
        let response = match tokio::time::timeout(bound, answer).await {
            Ok(response) => response?,
            Err(_) => return Err(ClientError::Timeout { call: name, bound }),
        };
        refuse(&name, response).await
    }

    /// Sends a call with a streamed body. Only standing still is bounded, not the whole.
    pub(super) async fn send_stream(&self, mut call: Call) -> Result<Response<Incoming>, ClientError> {
        let name = call.name();
        let progress = Arc::new(Progress::new());
        call.body = Watched { inner: call.body, progress: Arc::clone(&progress) }.boxed_unsync();
        let answer = self.exchange(call);
        tokio::pin!(answer);
        let response = loop {
            match tokio::time::timeout(IDLE_BOUND, &mut answer).await {
                Ok(response) => break response?,
                Err(_) if progress.idle() < IDLE_BOUND => {}
                Err(_) => return Err(ClientError::Timeout { call: name, bound: IDLE_BOUND }),
            }
        };
        refuse(&name, response).await
    }

    /// Sends a call whose answer is JSON.
    pub(super) async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<Answer<T>, ClientError> {
        let name = call.name();
        let response = self.send(call).await?;
        let (head, body) = response.into_parts();
        let bytes = collect(&name, body).await?;
        let value = serde_json::from_slice(&bytes).map_err(|error| ClientError::Unexpected {
            call: name,
            status: head.status.as_u16(),
            source: Some(error.into()),
        })?;
        Ok(Answer { value, status: head.status, headers: head.headers })
    }

    async fn exchange(&self, call: Call) -> Result<Response<Incoming>, ClientError> {
        let name = call.name();
        let base = &self.endpoint.base;
        let mut request = Request::builder()
            .method(call.method)
            .uri(format!("{base}{}", call.path))
            .header(API_KEY_HEADER, self.endpoint.key.expose())
            .header("user-agent", concat!("wrenn/", env!("CARGO_PKG_VERSION")));
        if call.json {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(length) = call.length {
            request = request.header("content-length", length);
        }
        let request = request.body(call.body).map_err(|error| ClientError::Request(error.into()))?;
        self.pool.request(request).await.map_err(|error| {
            if error.is_connect() {
                ClientError::Connect { base_url: base.to_string(), source: innermost(&error).into() }
            } else {
                ClientError::Broken { call: name, source: error.into() }
            }
        })
    }
}

/// The cause of a failed connection. The layers around it say only that it failed.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A JSON answer.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) value: T,
    pub(super) status: StatusCode,
    pub(super) headers: http::HeaderMap,
}

/// The answer, or the error that it is.
async fn refuse(name: &str, response: Response<Incoming>) -> Result<Response<Incoming>, ClientError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let bytes = collect(name, response.into_body()).await.unwrap_or_default();
    Err(refusal(name, status, &bytes))
}

/// The error that an answer with this status and body is.
pub(super) fn refusal(name: &str, status: StatusCode, body: &[u8]) -> ClientError {
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => ClientError::Refused {
            status: status.as_u16(),
            code: body.error.code,
            message: body.error.message,
        },
        Err(_) => ClientError::Unexpected { call: name.to_owned(), status: status.as_u16(), source: None },
    }
}

/// The error that a frame of a WebSocket tells.
pub(super) fn refusal_of_frame(message: String, code: Option<ErrorCode>) -> ClientError {
    ClientError::Refused { status: 0, code: code.unwrap_or(ErrorCode::Other), message }
}

async fn collect(name: &str, body: Incoming) -> Result<Bytes, ClientError> {
    let broken = |source: Source| ClientError::Broken { call: name.to_owned(), source };
    match tokio::time::timeout(CALL_BOUND, Limited::new(body, LARGEST_ANSWER).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) => Err(broken(error)),
        Err(_) => Err(ClientError::Timeout { call: name.to_owned(), bound: CALL_BOUND }),
    }
}

/// When a body was last asked for more.
struct Progress {
    start: Instant,
    last_millis: AtomicU64,
}

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), last_millis: AtomicU64::new(0) }
    }

    fn happened(&self) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_millis.store(millis, Ordering::Relaxed);
    }

    fn idle(&self) -> Duration {
        let last = Duration::from_millis(self.last_millis.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

/// A body that notes its progress.
struct Watched {
    inner: RequestBody,
    progress: Arc<Progress>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.progress.happened();
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

/// One part of a path or a value of a query, with everything escaped that could mean something there.
pub(super) fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte))
            }
            // Writing to a string cannot fail.
            _ => drop(write!(escaped, "%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_odd_is_escaped() {
        assert_eq!(escape("/home/ü a&b=c?#%"), "%2Fhome%2F%C3%BC%20a%26b%3Dc%3F%23%25");
        assert_eq!(escape("aZ09-._~"), "aZ09-._~");
    }

    #[test]
    fn a_refusal_has_its_reason() {
        let body = br#"{"error":{"code":"not_found","message":"no such sandbox"}}"#;
        let error = refusal("GET /x", StatusCode::NOT_FOUND, body);
        assert_eq!(
            (error.code(), error.to_string()),
            (Some(ErrorCode::NotFound), "no such sandbox".to_owned())
        );
        let other = refusal("GET /x", StatusCode::BAD_GATEWAY, b"<html>");
        assert!(matches!(other, ClientError::Unexpected { status: 502, .. }));
    }
}
