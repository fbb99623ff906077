//! What clients get, as it is on the wire: names, kinds of values, flags and sizes, which are the contract with clients
//! that nobody here builds.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use harness::Agent;
use http::Request;
use serde_json::{Value, json};

/// The frames of a `Start`, each with its flags.
async fn start(agent: &Agent, request: Value) -> Vec<(u8, Value)> {
    let message = request.to_string();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0], length.as_slice(), message.as_bytes()].concat();
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .header("connect-protocol-version", "1")
        .header("connect-accept-encoding", "gzip")
        .header("accept-encoding", "gzip");
    let answer = agent.send(request, body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/connect+json");
    for name in ["content-encoding", "connect-content-encoding"] {
        assert!(answer.headers.get(name).is_none_or(|value| value == "identity"), "{:?}", answer.headers);
    }
    let mut bytes = answer.body.unwrap();
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let head = bytes.split_to(5);
        let length = u32::from_be_bytes(head[1..].try_into().unwrap());
        let message = bytes.split_to(usize::try_from(length).unwrap());
        frames.push((head[0], serde_json::from_slice(&message).unwrap()));
    }
    frames
}

fn shell(script: &str) -> Value {
    json!({ "process": { "cmd": "/bin/sh", "args": ["-c", script] }, "stdin": false })
}

#[tokio::test]
async fn the_events_of_a_process() {
    let agent = Agent::start();
    let table = [
        ("printf hi; exit 0", json!({ "exited": true, "status": "exit status 0" })),
        (
            "printf hi; exit 3",
            json!({ "exitCode": 3, "exited": true, "status": "exit status 3", "error": "exit status 3" }),
        ),
        (
            "printf hi; kill -9 $$",
            json!({ "exitCode": -1, "status": "signal: killed", "error": "signal: killed" }),
        ),
    ];
    for (script, end) in table {
        let frames = start(&agent, shell(script)).await;
        let pid = frames[0].1["event"]["start"]["pid"].clone();
        assert!(pid.is_u64(), "{pid}");
        let expected = [
            (0, json!({ "event": { "start": { "pid": pid } } })),
            (0, json!({ "event": { "data": { "stdout": "aGk=" } } })),
            (0, json!({ "event": { "end": end } })),
            (2, json!({})),
        ];
        assert_eq!(frames, expected, "{script}");
    }
    let missing = start(&agent, json!({ "process": { "cmd": "/nowhere" } })).await;
    let message = "fork/exec /nowhere: No such file or directory (os error 2)";
    assert_eq!(missing, [(2, json!({ "error": { "code": "invalid_argument", "message": message } }))]);
}

/// It is much, and would pack well.
#[tokio::test]
async fn output_is_cut_into_pieces_and_not_packed() {
    let agent = Agent::start();
    let script = "dd if=/dev/zero bs=1M count=4 2>/dev/null";
    let mut terminal = shell(script);
    terminal["pty"] = json!({ "size": { "cols": 80, "rows": 24 } });
    for (request, name, most) in [(shell(script), "stdout", 32 << 10), (terminal, "pty", 16 << 10)] {
        let frames = start(&agent, request).await;
        let (last, rest) = frames.split_last().unwrap();
        assert_eq!(last, &(2, json!({})));
        assert!(rest.iter().all(|(flags, _)| *flags == 0), "a frame that is packed");
        let pieces = rest.iter().filter_map(|(_, frame)| frame["event"]["data"][name].as_str());
        let lengths: Vec<_> = pieces.map(|piece| STANDARD.decode(piece).unwrap().len()).collect();
        assert_eq!(lengths.iter().sum::<usize>(), 4 << 20);
        assert!(lengths.iter().all(|length| *length <= most), "{name}: {:?}", lengths.iter().max());
    }
}

#[tokio::test]
async fn what_is_told_of_a_file() {
    let agent = Agent::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = File::create(&path).unwrap();
    file.set_len(5_000_000_000).unwrap();
    file.set_permissions(Permissions::from_mode(0o640)).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::from_millis(1_767_323_045_250)).unwrap();
    let path = path.to_str().unwrap();
    let answer = agent.call("filesystem.Filesystem/Stat", "root", json!({ "path": path })).await;
    let entry = json!({
        "name": "file", "type": "FILE_TYPE_FILE", "path": path, "size": "5000000000", "mode": 0o640,
        "permissions": "-rw-r-----", "owner": "root", "group": "root", "modifiedTime": "2026-01-02T03:04:05.250Z",
    });
    assert_eq!(answer.json(), json!({ "entry": entry }));
}

#[tokio::test]
async fn the_name_that_a_file_is_to_be_kept_under() {
    let agent = Agent::start();
    let directory = tempfile::tempdir().unwrap();
    let table = [
        ("plain-1.txt", "inline; filename=plain-1.txt"),
        ("a \"b\" \\c", r#"inline; filename="a \"b\" \\c""#),
        ("ü", "inline; filename*=utf-8''%C3%BC"),
    ];
    for (name, header) in table {
        let path = directory.path().join(name);
        std::fs::write(&path, "x").unwrap();
        let answer = agent.get(&format!("/files?path={}", harness::encode(path.to_str().unwrap()))).await;
        assert_eq!(answer.headers["content-disposition"], header);
    }
}
