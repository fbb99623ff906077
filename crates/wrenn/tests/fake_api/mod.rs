//! A small API that plays the control plane for the tests of the command line: sandboxes are numbers in a map,
//! commands are a handful of words, files are in memory. It notes what it was asked.

mod persist;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        Path, Query, RawQuery, Request, State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::Notify;
use wrenn_api::Encoding;

/// The one key that is known.
pub(crate) const KEY: &str = "wrn_0123456789abcdef0123456789abcdef";

#[derive(Default)]
struct Shared {
    sandboxes: Mutex<BTreeSet<String>>,
    /// Those that are in another state than running, and for how many more looks.
    states: Mutex<BTreeMap<String, (&'static str, usize)>>,
    snapshots: Mutex<BTreeMap<String, String>>,
    files: Mutex<BTreeMap<String, Bytes>>,
    requests: Mutex<Vec<(String, Value)>>,
    requested: Notify,
    released: Notify,
}

impl Shared {
    fn note(&self, what: &str, value: Value) {
        self.requests.lock().unwrap().push((what.to_owned(), value));
        self.requested.notify_waiters();
    }

    fn add_sandbox(&self) -> String {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let id = format!("sb-{:08x}", sandboxes.len() + 1);
        sandboxes.insert(id.clone());
        id
    }
}

/// The running API.
pub(crate) struct FakeApi {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeApi {
    /// Starts it on a free port.
    pub(crate) async fn start() -> Self {
        let shared = Arc::new(Shared::default());
        let routes = Router::new()
            .route("/v1/sandboxes", post(create).get(list))
            .route("/v1/sandboxes/{id}", get(one).delete(delete))
            .route("/v1/sandboxes/{id}/ping", post(async || StatusCode::NO_CONTENT))
            .route("/v1/sandboxes/{id}/exec", post(exec))
            .route("/v1/sandboxes/{id}/exec/stream", get(exec_stream))
            .route("/v1/sandboxes/{id}/terminal", get(terminal))
            .route("/v1/sandboxes/{id}/files", get(read_file).put(write_file))
            .route("/v1/sandboxes/{id}/files/stat", post(stat))
            .merge(persist::routes())
            .layer(axum::extract::DefaultBodyLimit::disable())
            .layer(middleware::from_fn(authenticate))
            .with_state(Arc::clone(&shared));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { shared, address, server }
    }

    pub(crate) fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A sandbox that is there already.
    pub(crate) fn put_sandbox(&self) -> String {
        self.shared.add_sandbox()
    }

    pub(crate) fn sandboxes(&self) -> BTreeSet<String> {
        self.shared.sandboxes.lock().unwrap().clone()
    }

    pub(crate) fn file(&self, path: &str) -> Option<Bytes> {
        self.shared.files.lock().unwrap().get(path).cloned()
    }

    /// What was asked of one kind.
    pub(crate) fn requests(&self, what: &str) -> Vec<Value> {
        let requests = self.shared.requests.lock().unwrap();
        requests.iter().filter(|(found, _)| found == what).map(|(_, value)| value.clone()).collect()
    }

    pub(crate) async fn until_requested(&self, what: &str) {
        let waiting = async {
            loop {
                let notified = self.shared.requested.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                if !self.requests(what).is_empty() {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap();
    }

    /// Lets a create of the template `slow` go on.
    pub(crate) fn release(&self) {
        self.shared.released.notify_one();
    }
}

fn error(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({ "error": { "code": code, "message": message } }))).into_response()
}

fn not_found(what: &str) -> Response {
    error(StatusCode::NOT_FOUND, "not_found", &format!("{what} is not there"))
}

async fn authenticate(request: Request, next: Next) -> Response {
    if request.headers().get("x-api-key").is_some_and(|key| key == KEY) {
        next.run(request).await
    } else {
        error(StatusCode::UNAUTHORIZED, "unauthorized", "this API key is not known")
    }
}

fn sandbox(id: &str) -> Value {
    json!({
        "id": id, "status": "running", "template": "base", "vcpus": 1, "memory_mb": 512, "timeout_sec": 0,
        "allow_internet_access": true, "created_at": "2026-01-01T00:00:00Z", "last_updated": "2026-01-01T00:00:00Z",
    })
}

async fn create(State(shared): State<Arc<Shared>>, Json(request): Json<Value>) -> Response {
    let template = request["template"].as_str().unwrap_or("base").to_owned();
    shared.note("POST /v1/sandboxes", request);
    match template.as_str() {
        "nonesuch" => return error(StatusCode::NOT_FOUND, "not_found", "there is no template nonesuch"),
        "slow" => shared.released.notified().await,
        _ => {}
    }
    let id = shared.add_sandbox();
    let timing = [("server-timing", "restore;dur=41.5, init;dur=3")];
    (StatusCode::CREATED, timing, Json(sandbox(&id))).into_response()
}

async fn list(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Json<Value> {
    shared.note("query", query.into());
    Json(shared.sandboxes.lock().unwrap().iter().map(|id| sandbox(id)).collect())
}

async fn one(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Response {
    if shared.sandboxes.lock().unwrap().contains(&id) {
        Json(shared.look(&id)).into_response()
    } else {
        not_found(&id)
    }
}

async fn delete(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Response {
    if shared.sandboxes.lock().unwrap().remove(&id) {
        StatusCode::NO_CONTENT.into_response()
    } else {
        not_found(&id)
    }
}

async fn exec(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    Json(request): Json<Value>,
) -> Response {
    let answer = json!({ "sandbox_id": id, "cmd": request["cmd"], "pid": 42, "tag": request["tag"] });
    shared.note("exec", request);
    (StatusCode::ACCEPTED, Json(answer)).into_response()
}

async fn exec_stream(State(shared): State<Arc<Shared>>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async move |mut socket| {
        // A client that goes away in the middle is what some tests are about.
        let _ = run(&shared, &mut socket).await;
        close(socket).await;
    })
}

/// Ends a conversation as the control plane does: a connection that is closed with unread bytes is reset, and a reset
/// takes with it what the client has not read yet.
async fn close(mut socket: WebSocket) {
    if socket.send(Message::Close(None)).await.is_ok() {
        while let Some(Ok(_)) = socket.recv().await {}
    }
}

async fn frame(socket: &mut WebSocket, frame: Value) -> Result<(), axum::Error> {
    socket.send(Message::text(frame.to_string())).await
}

async fn output(socket: &mut WebSocket, kind: &str, bytes: &[u8]) -> Result<(), axum::Error> {
    frame(socket, json!({ "type": kind, "data": Encoding::Base64.encode(bytes) })).await
}

/// The next text frame of the client.
async fn heard(socket: &mut WebSocket) -> Option<Value> {
    loop {
        match socket.recv().await?.ok()? {
            Message::Text(text) => return serde_json::from_str(&text).ok(),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

async fn run(shared: &Shared, socket: &mut WebSocket) -> Result<(), axum::Error> {
    let Some(start) = heard(socket).await else { return Ok(()) };
    shared.note("exec/stream", start.clone());
    assert_eq!(start["encoding"], "base64");
    let args: Vec<&str> = start["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    frame(socket, json!({ "type": "start", "pid": 7 })).await?;
    let exit =
        |code: i64, status: Option<&str>| json!({ "type": "exit", "exit_code": code, "status": status });
    match start["cmd"].as_str().unwrap() {
        "true" => frame(socket, exit(0, None)).await,
        "say" => {
            output(socket, "stdout", args[0].as_bytes()).await?;
            output(socket, "stderr", args[1].as_bytes()).await?;
            frame(socket, exit(args[2].parse().unwrap(), Some("exit status"))).await
        }
        "cat" => {
            while let Some(input) = heard(socket).await {
                match input["type"].as_str() {
                    Some("stdin") => {
                        let bytes = Encoding::Base64.decode(input["data"].as_str().unwrap()).unwrap();
                        output(socket, "stdout", &bytes).await?;
                    }
                    Some("stdin_close") => return frame(socket, exit(0, None)).await,
                    _ => {}
                }
            }
            Ok(())
        }
        "wait" => {
            output(socket, "stdout", b"waiting\n").await?;
            while let Some(input) = heard(socket).await {
                if input["type"] == "stop" {
                    shared.note("stop", input);
                    return frame(socket, exit(-1, Some("signal: terminated"))).await;
                }
            }
            Ok(())
        }
        "flood" => loop {
            output(socket, "stdout", &[b'y'; 4096]).await?;
        },
        "killed" => frame(socket, exit(-1, Some("signal: killed"))).await,
        "too-slow" => {
            frame(socket, json!({ "type": "error", "data": "it took too long", "code": "timeout" })).await
        }
        "vanish" => Ok(()),
        _ => frame(socket, json!({ "type": "error", "data": "no such program", "code": "not_found" })).await,
    }
}

async fn terminal(State(shared): State<Arc<Shared>>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async move |mut socket| {
        let _ = serve_terminal(&shared, &mut socket).await;
        close(socket).await;
    })
}

async fn serve_terminal(shared: &Shared, socket: &mut WebSocket) -> Result<(), axum::Error> {
    let Some(start) = heard(socket).await else { return Ok(()) };
    frame(socket, json!({ "type": "started", "tag": "pty-00000001", "pid": 7 })).await?;
    frame(socket, json!({ "type": "ping" })).await?;
    let welcome = format!("welcome {}x{}\r\n", start["cols"], start["rows"]);
    shared.note("terminal", start);
    socket.send(Message::binary(welcome.into_bytes())).await?;
    while let Some(Ok(message)) = socket.recv().await {
        match message {
            Message::Binary(bytes) if &bytes[..] == b"exit" => {
                return frame(socket, json!({ "type": "exit", "exit_code": 3 })).await;
            }
            Message::Binary(bytes) if &bytes[..] == b"vanish" => return Ok(()),
            Message::Binary(bytes) => socket.send(Message::Binary(bytes)).await?,
            Message::Text(text) => {
                let control: Value = serde_json::from_str(&text).unwrap();
                if control["type"] == "pong" {
                    // Now it is known that the client reads: every size goes on the screen.
                    shared.note("resize", control);
                } else if control["type"] == "resize" {
                    let shown = format!("resized {}x{}\r\n", control["cols"], control["rows"]);
                    socket.send(Message::binary(shown.into_bytes())).await?;
                }
            }
            Message::Close(_) => return Ok(()),
            _ => {}
        }
    }
    Ok(())
}

async fn read_file(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let path = &query["path"];
    if path == "/cut" {
        // Ends in the middle: more was promised than comes.
        let pieces =
            futures::stream::iter([Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("cut"))]);
        return Body::from_stream(pieces).into_response();
    }
    match shared.files.lock().unwrap().get(path) {
        Some(content) => content.clone().into_response(),
        None => not_found(path),
    }
}

async fn write_file(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
    body: Body,
) -> StatusCode {
    let mut content = Vec::new();
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let Ok(piece) = piece else { return StatusCode::BAD_REQUEST };
        content.extend_from_slice(&piece);
    }
    shared.files.lock().unwrap().insert(query["path"].clone(), content.into());
    StatusCode::NO_CONTENT
}

async fn stat(State(_): State<Arc<Shared>>, Json(request): Json<Value>) -> Response {
    let path = request["path"].as_str().unwrap();
    if path != "/dir" {
        return not_found(path);
    }
    Json(json!({ "entry": {
        "name": "dir", "path": path, "type": "directory", "size": 0, "mode": 493, "permissions": "drwxr-xr-x",
        "owner": "root", "group": "root", "modified_at": 0,
    }}))
    .into_response()
}
