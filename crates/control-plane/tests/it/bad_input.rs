//! Every route, with everything that can be wrong. Each answer has the published envelope, the right status
//! and code, and leaves nothing behind.

use http::Method;
use serde_json::json;

use super::support::{World, client::full};

struct Case<'a> {
    method: Method,
    path: String,
    body: &'a str,
    status: u16,
    code: &'a str,
    /// What the message must name.
    names: &'a str,
}

fn case<'a>(
    method: Method,
    path: impl Into<String>,
    body: &'a str,
    status: u16,
    code: &'a str,
    names: &'a str,
) -> Case<'a> {
    Case { method, path: path.into(), body, status, code, names }
}

async fn check(world: &World, cases: &[Case<'_>]) {
    for Case { method, path, body, status, code, names } in cases {
        let request = world.client.request(method.clone(), path).header("content-type", "application/json");
        let answer = world.client.whole(request.body(full((*body).to_owned())).unwrap()).await;
        let shown: String = path.chars().take(100).collect();
        let body: String = body.chars().take(200).collect();
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (*status, *code),
            "{method} {shown} {body}: {}",
            answer.text()
        );
        assert!(answer.text().contains(names), "{method} {shown} {body}: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn creates_that_cannot_be() {
    let world = World::new().await;
    let path = "/v1/sandboxes";
    let invalid = |body, names| case(Method::POST, path, body, 400, "invalid_request", names);
    check(
        &world,
        &[
            invalid("", "JSON"),
            invalid("{", "JSON"),
            invalid("[]", "JSON"),
            invalid("null", "JSON"),
            invalid("{} {}", "JSON"),
            invalid("\u{0}", "JSON"),
            invalid(r#"{"vcpus": "two"}"#, "vcpus"),
            invalid(r#"{"vcpus": 1.5}"#, "vcpus"),
            invalid(r#"{"vcpus": 0}"#, "vcpus must be between 1 and 16, not 0"),
            invalid(r#"{"vcpus": -1}"#, "vcpus must be between 1 and 16, not -1"),
            invalid(r#"{"vcpus": 17}"#, "vcpus must be between 1 and 16, not 17"),
            invalid(r#"{"vcpus": 9223372036854775807}"#, "vcpus must be between"),
            invalid(r#"{"vcpus": 18446744073709551616}"#, "vcpus"),
            invalid(r#"{"memory_mb": 0}"#, "memory_mb must be between 128 and 65536, not 0"),
            invalid(r#"{"memory_mb": 1000000000}"#, "memory_mb must be between"),
            invalid(r#"{"disk_size_mb": 0}"#, "disk_size_mb must be between 512 and 1048576, not 0"),
            invalid(r#"{"disk_size_mb": 1e3}"#, "disk_size_mb"),
            invalid(r#"{"disk_size_mb": 1048577}"#, "disk_size_mb must be between"),
            invalid(r#"{"timeout_sec": -1}"#, "timeout_sec must be between 0 and 2592000, not -1"),
            invalid(r#"{"timeout_sec": 2592001}"#, "timeout_sec must be between"),
            invalid(r#"{"template": ""}"#, "template"),
            invalid(r#"{"template": "../.."}"#, "template"),
            invalid(r#"{"template": 7}"#, "template"),
            invalid(r#"{"metadata": []}"#, "metadata"),
            invalid(r#"{"metadata": {"a": 1}}"#, "metadata"),
            invalid(r#"{"metadata": {"a b": ""}}"#, "metadata"),
            invalid(r#"{"metadata": {"envd_version": "1"}}"#, "reserved"),
            invalid(r#"{"envs": {"A=B": ""}}"#, "envs"),
            invalid(r#"{"envs": {"": ""}}"#, "envs"),
            invalid(r#"{"envs": {"A": "\u0000"}}"#, "envs"),
            invalid(r#"{"allow_internet_access": "no"}"#, "allow_internet_access"),
            case(Method::POST, path, r#"{"template": "nothing"}"#, 404, "not_found", "nothing"),
            case(Method::PUT, path, "{}", 405, "method_not_allowed", "method"),
            case(Method::GET, "/v1/sandboxes?limit=0", "", 400, "invalid_request", "limit"),
            case(Method::GET, "/v1/sandboxes?cursor=AAAA", "", 400, "invalid_request", "cursor"),
            case(Method::GET, "/v1/sandboxes?status=asleep", "", 400, "invalid_request", "status"),
            case(Method::GET, "/v1/nothing", "", 404, "not_found", "route"),
            case(Method::GET, "/", "", 404, "not_found", "route"),
        ],
    )
    .await;
    let long = format!(r#"{{"template": "{}"}}"#, "a".repeat(10_240));
    check(&world, &[invalid(&long, "template")]).await;
    let huge = format!(r#"{{"metadata": {{"a": "{}"}}}}"#, "a".repeat(1 << 20));
    check(&world, &[case(Method::POST, path, &huge, 413, "too_large", "1048576")]).await;
    let deep = "[".repeat(100_000);
    check(&world, &[invalid(&deep, "JSON")]).await;

    // Nothing of all this is anywhere.
    assert!(world.agent.sandboxes().is_empty());
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM sandboxes")
        .fetch_one(&world.database().await)
        .await
        .unwrap();
    assert_eq!(rows, 0);
}

/// Each route that names a sandbox.
fn routes_of(id: &str) -> Vec<(Method, String, &'static str)> {
    let base = format!("/v1/sandboxes/{id}");
    vec![
        (Method::GET, base.clone(), ""),
        (Method::DELETE, base.clone(), ""),
        (Method::POST, format!("{base}/ping"), ""),
        (Method::POST, format!("{base}/pause"), ""),
        (Method::POST, format!("{base}/resume"), ""),
        (Method::POST, format!("{base}/fork"), ""),
        (Method::POST, format!("{base}/rollback"), r#"{"snapshot": "x"}"#),
        (Method::GET, format!("{base}/network"), ""),
        (Method::PUT, format!("{base}/network"), "{}"),
        (Method::PATCH, format!("{base}/timeout"), "{}"),
        (Method::POST, format!("{base}/exec"), r#"{"cmd": "true"}"#),
        (Method::GET, format!("{base}/processes"), ""),
        (Method::DELETE, format!("{base}/processes/1"), ""),
        (Method::PUT, format!("{base}/files?path=/tmp/x"), ""),
        (Method::GET, format!("{base}/files?path=/tmp/x"), ""),
        (Method::POST, format!("{base}/files/read"), r#"{"path": "/tmp/x"}"#),
        (Method::POST, format!("{base}/files/stream/read"), r#"{"path": "/tmp/x"}"#),
        (Method::POST, format!("{base}/files/stat"), r#"{"path": "/tmp/x"}"#),
        (Method::POST, format!("{base}/files/list"), r#"{"path": "/tmp"}"#),
        (Method::POST, format!("{base}/files/mkdir"), r#"{"path": "/tmp/x"}"#),
        (Method::POST, format!("{base}/files/move"), r#"{"source": "/tmp/x", "destination": "/tmp/y"}"#),
        (Method::POST, format!("{base}/files/remove"), r#"{"path": "/tmp/x"}"#),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_none() {
    let world = World::new().await;
    let long = "a".repeat(10_240);
    for id in [
        "sb-00000000",
        "sb-0000000",
        "SB-00000000",
        "cl-00000000",
        "..%2F..",
        "%2e%2e%2f%2e%2e",
        "sb-..%2f..%2f",
        "%00",
        "%ff%fe",
        "%20",
        "x",
        &long,
    ] {
        let cases: Vec<Case<'_>> = routes_of(id)
            .into_iter()
            .map(|(method, path, body)| case(method, path, body, 404, "not_found", ""))
            .collect();
        check(&world, &cases).await;
    }
    // And no id at all.
    check(&world, &[case(Method::POST, "/v1/sandboxes//exec", "{}", 404, "not_found", "")]).await;
    assert!(world.agent.destroyed().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_files_that_cannot_be() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().to_str().unwrap();
    std::fs::write(scratch.path().join("file"), "x").unwrap();

    let exec = format!("{base}/exec");
    let invalid = |body, names| case(Method::POST, exec.clone(), body, 400, "invalid_request", names);
    check(
        &world,
        &[
            invalid("", "JSON"),
            invalid("{}", "cmd"),
            invalid(r#"{"cmd": ""}"#, "cmd"),
            invalid(r#"{"cmd": 1}"#, "cmd"),
            invalid(r#"{"cmd": "true", "args": "x"}"#, "args"),
            invalid(r#"{"cmd": "true", "timeout_sec": 0}"#, "timeout_sec must be between 1 and 86400, not 0"),
            invalid(r#"{"cmd": "true", "timeout_sec": 99999999}"#, "timeout_sec"),
            invalid(r#"{"cmd": "true", "cwd": ""}"#, "cwd"),
            invalid(r#"{"cmd": "true", "cwd": "/no/such/directory"}"#, "/no/such/directory"),
            invalid(r#"{"cmd": "true", "user": "nobody-of-that-name"}"#, "nobody-of-that-name"),
            invalid(r#"{"cmd": "true", "user": "a:b"}"#, "user"),
            invalid(r#"{"cmd": "true", "tag": "123"}"#, "tag"),
            invalid(r#"{"cmd": "true", "stdin": "%", "stdin_encoding": "base64"}"#, "stdin"),
            case(Method::DELETE, format!("{base}/processes/999999"), "", 404, "not_found", "999999"),
            case(
                Method::DELETE,
                format!("{base}/processes/no-such-tag"),
                "",
                404,
                "not_found",
                "no-such-tag",
            ),
            case(
                Method::DELETE,
                format!("{base}/processes/1?signal=SIGSTOP"),
                "",
                400,
                "invalid_request",
                "signal",
            ),
        ],
    )
    .await;
    let unknown = world.client.post(&exec, json!({"cmd": "no-such-command-anywhere"})).await;
    assert!([400, 404].contains(&unknown.status.as_u16()), "{}", unknown.text());
    assert!(unknown.text().contains("no-such-command-anywhere"), "{}", unknown.text());
    unknown.code();

    let post = |route: &str, body, status, code, names| {
        case(Method::POST, format!("{base}/files/{route}"), body, status, code, names)
    };
    let missing = format!(r#"{{"path": "{directory}/missing"}}"#);
    let a_file = format!(r#"{{"path": "{directory}/file"}}"#);
    let a_directory = format!(r#"{{"path": "{directory}"}}"#);
    let beneath = format!(r#"{{"path": "{directory}/file/x"}}"#);
    let move_missing = format!(r#"{{"source": "{directory}/missing", "destination": "{directory}/y"}}"#);
    check(
        &world,
        &[
            post("read", "{}", 400, "invalid_request", "path"),
            post("read", r#"{"path": ""}"#, 400, "invalid_request", "path"),
            post("read", r#"{"path": "a\u0000b"}"#, 400, "invalid_request", "path"),
            post("read", &missing, 404, "not_found", "missing"),
            post("read", &a_directory, 400, "invalid_request", "director"),
            post("stream/read", &missing, 404, "not_found", "missing"),
            post("stat", &missing, 404, "not_found", "missing"),
            post("list", &missing, 404, "not_found", "missing"),
            post("list", &a_file, 400, "invalid_request", "director"),
            post("list", r#"{"path": "/", "depth": 1000}"#, 400, "invalid_request", "depth"),
            post("list", r#"{"path": "/", "depth": -1}"#, 400, "invalid_request", "depth"),
            post("mkdir", &a_directory, 409, "conflict", ""),
            post("mkdir", &beneath, 400, "invalid_request", ""),
            post("move", &move_missing, 404, "not_found", "missing"),
            post("move", r#"{"source": "/x"}"#, 400, "invalid_request", "destination"),
            post("remove", &missing, 404, "not_found", "missing"),
            post("write", "{}", 400, "invalid_request", "form"),
            case(Method::GET, format!("{base}/files"), "", 400, "invalid_request", "path"),
            case(Method::GET, format!("{base}/files?path="), "", 400, "invalid_request", "path"),
            case(
                Method::GET,
                format!("{base}/files?path={directory}/missing"),
                "",
                404,
                "not_found",
                "missing",
            ),
            case(
                Method::GET,
                format!("{base}/files?path={directory}"),
                "",
                400,
                "invalid_request",
                "director",
            ),
            case(Method::PUT, format!("{base}/files?path={directory}"), "x", 400, "invalid_request", ""),
            case(
                Method::PUT,
                format!("{base}/files?path={directory}/file/x"),
                "x",
                400,
                "invalid_request",
                "",
            ),
            case(Method::GET, format!("{base}/terminal"), "", 400, "invalid_request", "WebSocket"),
            case(Method::GET, format!("{base}/exec/stream"), "", 400, "invalid_request", "WebSocket"),
        ],
    )
    .await;
    let long = "a".repeat(5000);
    check(
        &world,
        &[case(Method::GET, format!("{base}/files?path=/{long}"), "", 400, "invalid_request", "path")],
    )
    .await;
}
