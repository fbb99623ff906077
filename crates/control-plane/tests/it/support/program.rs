//! Programs of a user that listen in a sandbox.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{
        Request, State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    response::{AppendHeaders, IntoResponse, Response},
    routing,
};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// One that listens until it is dropped.
pub(crate) struct Program {
    pub(crate) address: SocketAddr,
    /// How many connections or, of the usual one, requests it has seen.
    seen: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Program {
    /// A server with routes that show what comes through.
    pub(crate) async fn start() -> Self {
        let (listener, seen) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::default());
        let app = Router::new()
            .route("/echo", routing::any(echo))
            .route("/hostile", routing::get(hostile))
            .route("/socket", routing::get(socket))
            .route("/ticks", routing::get(ticks))
            .route("/silent", routing::get(std::future::pending::<()>))
            .fallback(show)
            .with_state(Arc::clone(&seen));
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, seen, serving }
    }

    /// A server that does with each connection what it is told, after the head of its first request.
    pub(crate) async fn raw<F>(serve: impl Fn(TcpStream, String) -> F + Clone + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, seen) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
        let count = Arc::clone(&seen);
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let serve = serve.clone();
                connections.spawn(async move {
                    if let Some(head) = head(&mut stream).await {
                        serve(stream, head).await;
                    }
                });
            }
        });
        Self { address, seen, serving }
    }

    pub(crate) fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The head of the next request; none when the connection ends before.
pub(crate) async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

/// Says what it was asked.
async fn show(State(seen): State<Arc<AtomicUsize>>, request: Request) -> Json<serde_json::Value> {
    seen.fetch_add(1, Ordering::SeqCst);
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().map(pairs);
    Json(json!({
        "method": parts.method.as_str(),
        "path": parts.uri.to_string(),
        "headers": pairs(&parts.headers),
        "body": String::from_utf8_lossy(&body.to_bytes()),
        "trailers": trailers,
    }))
}

fn pairs(headers: &HeaderMap) -> serde_json::Value {
    let pairs = headers.iter().map(|(name, value)| json!([name.as_str(), value.to_str().unwrap()]));
    pairs.collect()
}

/// Sends each piece back as it comes, trailers included.
async fn echo(request: Request) -> Response {
    ([("trailer", "x-sum")], request.into_body()).into_response()
}

/// Says what could harm others.
async fn hostile() -> Response {
    let headers = AppendHeaders([
        ("connection", "x-inner"),
        ("x-inner", "1"),
        ("keep-alive", "timeout=1"),
        ("clear-site-data", "\"*\""),
        ("set-cookie", "a=b; Domain=localhost; Path=/"),
        ("set-cookie", "c=d; Path=/"),
        ("location", "http://elsewhere.example/"),
    ]);
    (http::StatusCode::IM_A_TEAPOT, headers, "short and stout").into_response()
}

/// Says something ten times a second, for ever.
async fn ticks() -> Response {
    let ticks = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"data: tick\n\n"))), ()))
    });
    let first = stream::once(async { Ok(Frame::data(Bytes::from_static(b": hello\n\n"))) });
    let body = Body::new(StreamBody::new(first.chain(ticks)));
    ([("content-type", "text/event-stream")], body).into_response()
}

/// Sends each message back.
async fn socket(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|mut socket: WebSocket| {
        async move {
            while let Some(Ok(message)) = socket.recv().await {
                if matches!(message, Message::Text(_) | Message::Binary(_))
                    && socket.send(message).await.is_err()
                {
                    break;
                }
            }
        }
        .boxed()
    })
}
