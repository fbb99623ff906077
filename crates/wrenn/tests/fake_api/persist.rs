//! Pause, resume, fork, rollback, snapshots and settings of the small API. A sandbox with an even number takes its
//! time: it is answered with 202, and is where it should be at the second look.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, RawQuery, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, patch, post},
};
use serde_json::{Value, json};

use super::{Shared, error, not_found, sandbox};

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route(
            "/v1/sandboxes/{id}/pause",
            post(async |state, path, body| change(state, path, body, "pause").await),
        )
        .route(
            "/v1/sandboxes/{id}/resume",
            post(async |state, path, body| change(state, path, body, "resume").await),
        )
        .route(
            "/v1/sandboxes/{id}/rollback",
            post(async |state, path, body| change(state, path, body, "rollback").await),
        )
        .route("/v1/sandboxes/{id}/fork", post(fork))
        .route("/v1/sandboxes/{id}/metrics", get(metrics))
        .route("/v1/sandboxes/{id}/network", get(network).put(set_network))
        .route("/v1/sandboxes/{id}/timeout", patch(timeout))
        .route("/v1/snapshots", post(snapshot).get(snapshots))
        .route("/v1/snapshots/{name}", get(find_snapshot).delete(delete_snapshot))
}

impl Shared {
    /// A sandbox as it is now; each look brings what is under way nearer to its end.
    pub(super) fn look(&self, id: &str) -> Value {
        let mut states = self.states.lock().unwrap();
        let mut shown = sandbox(id);
        if let Some((state, looks)) = states.get_mut(id) {
            *looks = looks.saturating_sub(1);
            if *looks == 0 {
                *state = match *state {
                    "pausing" => "paused",
                    "paused" => "paused",
                    _ => "running",
                };
            }
            shown["status"] = json!(*state);
        }
        shown
    }
}

fn takes_long(id: &str) -> bool {
    id.ends_with(['2', '4', '6', '8'])
}

async fn change(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Bytes,
    verb: &'static str,
) -> Response {
    if !shared.sandboxes.lock().unwrap().contains(&id) {
        return not_found(&id);
    }
    let request: Value = serde_json::from_slice(&body).unwrap();
    if verb == "rollback" && request["snapshot"] != "known" {
        return not_found("that snapshot");
    }
    shared.note(verb, request);
    let (through, goal) = if verb == "pause" { ("pausing", "paused") } else { ("resuming", "running") };
    let long = takes_long(&id);
    let state = if long { (through, 2) } else { (goal, 0) };
    shared.states.lock().unwrap().insert(id.clone(), state);
    let mut shown = sandbox(&id);
    shown["status"] = json!(state.0);
    (if long { StatusCode::ACCEPTED } else { StatusCode::OK }, Json(shown)).into_response()
}

async fn fork(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    Json(request): Json<Value>,
) -> Response {
    if !shared.sandboxes.lock().unwrap().contains(&id) {
        return not_found(&id);
    }
    let count = request["count"].as_i64().unwrap();
    shared.note("fork", request);
    let children: Vec<Value> = (0..count).map(|_| sandbox(&shared.add_sandbox())).collect();
    (StatusCode::CREATED, Json(children)).into_response()
}

async fn network(Path(_): Path<String>) -> Json<Value> {
    Json(json!({ "allow_internet_access": true, "deny_cidrs": ["203.0.113.0/24"], "egress_mbps": 5 }))
}

async fn set_network(State(shared): State<Arc<Shared>>, Json(request): Json<Value>) -> Json<Value> {
    shared.note("network", request.clone());
    Json(request)
}

async fn timeout(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    Json(request): Json<Value>,
) -> Json<Value> {
    let mut shown = sandbox(&id);
    for (name, value) in request.as_object().unwrap() {
        shown[name] = value.clone();
    }
    shared.note("timeout", request);
    Json(shown)
}

fn template(name: &str, sandbox: &str) -> Value {
    json!({
        "name": name, "type": "snapshot", "id": "sn-00000001", "sandbox_id": sandbox, "vcpus": 1, "memory_mb": 512,
        "size_bytes": 3 << 20, "created_at": "2026-01-02T00:00:00Z", "platform": false,
    })
}

async fn snapshot(
    State(shared): State<Arc<Shared>>,
    RawQuery(query): RawQuery,
    Json(request): Json<Value>,
) -> Response {
    let id = request["sandbox_id"].as_str().unwrap().to_owned();
    let name = request["name"].as_str().unwrap_or("sn-00000001").to_owned();
    shared.note("snapshot", json!({ "request": request, "query": query }));
    let taken = shared.snapshots.lock().unwrap().contains_key(&name);
    if taken && query.is_none() {
        return error(StatusCode::CONFLICT, "conflict", "the name is taken");
    }
    shared.snapshots.lock().unwrap().insert(name.clone(), id.clone());
    if takes_long(&id) {
        shared.states.lock().unwrap().insert(id.clone(), ("snapshotting", 2));
        let mut shown = sandbox(&id);
        shown["status"] = json!("snapshotting");
        return (StatusCode::ACCEPTED, Json(shown)).into_response();
    }
    (StatusCode::CREATED, Json(template(&name, &id))).into_response()
}

async fn snapshots(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Json<Value> {
    shared.note("snapshots", query.into());
    Json(shared.snapshots.lock().unwrap().iter().map(|(name, id)| template(name, id)).collect())
}

async fn find_snapshot(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    match shared.snapshots.lock().unwrap().get(&name) {
        Some(id) => Json(template(&name, id)).into_response(),
        None => not_found(&name),
    }
}

async fn delete_snapshot(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    match shared.snapshots.lock().unwrap().remove(&name) {
        Some(_) => StatusCode::NO_CONTENT.into_response(),
        None => not_found(&name),
    }
}

async fn metrics(Path(id): Path<String>, RawQuery(query): RawQuery) -> Json<Value> {
    let range = query.unwrap_or_default().replace("range=", "");
    let point = json!({
        "timestamp_unix": 1_800_000_000, "timestamp_unix_ms": 1_800_000_000_500_i64, "cpu_pct": 97.25,
        "mem_bytes": 64 << 20, "disk_bytes": 12_345, "net_sent_bytes_per_sec": 9, "net_received_bytes_per_sec": 0,
    });
    // Nothing is known of the last five minutes.
    let points = if range == "5m" { json!([]) } else { json!([point]) };
    Json(json!({ "sandbox_id": id, "range": range, "points": points }))
}
