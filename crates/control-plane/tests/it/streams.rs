//! WebSockets.

use std::time::Duration;

use serde_json::{Value, json};

use super::support::{
    World, eventually,
    postgres::Cluster,
    short_bounds,
    socket::{Said, Socket},
};

async fn exec(world: &World, id: &str, start: Value) -> Socket {
    let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/exec/stream")).await.unwrap();
    socket.send(start).await;
    socket
}

/// The text of all frames of a kind.
fn texts(frames: &[Said], kind: &str) -> String {
    let texts = frames.iter().filter_map(|said| match said {
        Said::Text(frame) if frame["type"] == kind => frame["data"].as_str(),
        _ => None,
    });
    texts.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_over_a_socket() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let line = "pwd; echo $A; printf 'tick €'; sleep 0.1; echo oops >&2; exit 4";
    let start = json!({
        "type": "start", "cmd": "/bin/sh", "args": ["-c", line], "cwd": "/usr", "envs": {"A": "b"}, "newer": 1,
    });
    let frames = exec(&world, &id, start).await.rest().await;
    assert!(matches!(&frames[0], Said::Text(frame) if frame["type"] == "start" && frame["pid"].is_u64()));
    assert_eq!(texts(&frames, "stdout"), "/usr\nb\ntick €");
    assert_eq!(texts(&frames, "stderr"), "oops\n");
    let [.., Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!((&exit["type"], &exit["exit_code"]), (&json!("exit"), &json!(4)));

    // Short commands lose nothing, though their end comes with their output.
    for _ in 0..20 {
        let frames =
            exec(&world, &id, json!({"type": "start", "cmd": "echo", "args": ["x"]})).await.rest().await;
        assert_eq!(texts(&frames, "stdout"), "x\n", "{frames:?}");
        assert_eq!(frames.last(), Some(&Said::Closed(1000)));
    }
    // Many bytes, of characters that are longer than one.
    let line = "for i in $(seq 20000); do printf '€äx'; done";
    let frames =
        exec(&world, &id, json!({"type": "start", "cmd": "sh", "args": ["-c", line]})).await.rest().await;
    assert_eq!(texts(&frames, "stdout"), "€äx".repeat(20_000));
    // What is no text, both ways.
    let bytes = |encoding: Option<&str>| json!({"type": "start", "cmd": "printf", "args": ["\\377a"], "encoding": encoding});
    assert_eq!(texts(&exec(&world, &id, bytes(None)).await.rest().await, "stdout"), "\u{fffd}a");
    assert_eq!(texts(&exec(&world, &id, bytes(Some("base64"))).await.rest().await, "stdout"), "/2E=");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_and_stop() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "cat", "stdin": true})).await;
    assert_eq!(socket.json().await["type"], "start");
    socket.send(json!({"type": "stdin", "data": "one "})).await;
    assert_eq!(socket.json().await, json!({"type": "stdout", "data": "one "}));
    socket.send(json!({"type": "stdin", "data": "dHdv", "encoding": "base64"})).await;
    assert_eq!(socket.json().await, json!({"type": "stdout", "data": "two"}));
    socket.send(json!({"type": "something-new"})).await;
    socket.send(json!({"type": "stdin_close"})).await;
    assert_eq!(socket.json().await, json!({"type": "exit", "exit_code": 0}));
    assert_eq!(socket.next().await, Said::Closed(1000));

    // Input that cannot be passed on is not left out: the command ends with what it was given before.
    let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "cat", "stdin": true})).await;
    assert_eq!(socket.json().await["type"], "start");
    socket.send(json!({"type": "stdin", "data": "%", "encoding": "base64"})).await;
    let frames = socket.rest().await;
    assert!(
        matches!(&frames[..], [Said::Text(frame), Said::Closed(1000)] if frame["code"] == "invalid_request"),
        "{frames:?}"
    );

    // Without asking for it there is no input to wait for.
    let frames = exec(&world, &id, json!({"type": "start", "cmd": "cat"})).await.rest().await;
    assert!(matches!(&frames[1], Said::Text(frame) if frame["exit_code"] == 0), "{frames:?}");

    // One that takes the polite word, and one that does not.
    for line in ["sleep 86200", "trap '' TERM; while :; do sleep 0.2; done"] {
        let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "sh", "args": ["-c", line]})).await;
        assert_eq!(socket.json().await["type"], "start");
        tokio::time::sleep(Duration::from_millis(200)).await;
        socket.send(json!({"type": "stop"})).await;
        let frames = socket.rest().await;
        let [Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!((&exit["type"], &exit["exit_code"]), (&json!("exit"), &json!(-1)));
    }
    let slow = json!({"type": "start", "cmd": "sleep", "args": ["86201"], "timeout_sec": 1});
    let frames = exec(&world, &id, slow).await.rest().await;
    let [_, Said::Text(error), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("timeout")));
    // And one whose caller goes without a word.
    let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "sleep", "args": ["86202"]})).await;
    assert_eq!(socket.json().await["type"], "start");
    drop(socket);
    let path = format!("/v1/sandboxes/{id}/processes");
    eventually("nothing runs any more", async || {
        world.client.get(&path).await.json() == json!({"processes": []})
    })
    .await;
}

/// A connection that is closed with unread bytes is reset, and that takes with it what the client has not read yet.
#[tokio::test(flavor = "multi_thread")]
async fn who_says_more_than_is_heard_still_learns_of_the_end() {
    let world = World::new().await;
    let id = world.sandbox().await;
    for _ in 0..5 {
        let mut socket =
            exec(&world, &id, json!({"type": "start", "cmd": "sleep", "args": ["86203"], "stdin": true}))
                .await;
        assert_eq!(socket.json().await["type"], "start");
        // After the first of them the server does not listen any more until the command has ended.
        socket.send(json!({"type": "stop"})).await;
        for _ in 0..8 {
            socket.send(json!({"type": "stdin", "data": "x".repeat(10_000)})).await;
        }
        let path = format!("/v1/sandboxes/{id}/processes");
        eventually("the command has ended", async || {
            world.client.get(&path).await.json() == json!({"processes": []})
        })
        .await;
        for _ in 0..8 {
            socket.send(json!({"type": "stdin", "data": "y".repeat(10_000)})).await;
        }
        let frames = socket.rest().await;
        let [Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!((&exit["type"], &exit["exit_code"]), (&json!("exit"), &json!(-1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_lose_nothing() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let line = "seq 1000000";
    let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "sh", "args": ["-c", line]})).await;
    assert_eq!(socket.json().await["type"], "start");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let frames = socket.rest().await;
    let text = texts(&frames, "stdout");
    assert!(text.lines().map(|line| line.parse::<u32>().unwrap()).eq(1..=1_000_000));
    assert_eq!(frames.last(), Some(&Said::Closed(1000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_frames_with_a_proper_end() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let good = json!({"type": "start", "cmd": "true"});
    for (route, id, frame, code) in [
        ("exec/stream", "sb-00000000", good.clone(), "not_found"),
        ("exec/stream", "..%2f..", good.clone(), "not_found"),
        ("exec/stream", &id, json!({"type": "stop"}), "invalid_request"),
        ("exec/stream", &id, json!({"type": "start"}), "invalid_request"),
        ("exec/stream", &id, json!([1]), "invalid_request"),
        ("exec/stream", &id, json!({"type": "start", "cmd": "true", "timeout_sec": 0}), "invalid_request"),
        ("exec/stream", &id, json!({"type": "start", "cmd": "true", "cwd": "/no/such"}), "invalid_request"),
        ("processes/999999/stream", &id, json!({}), "not_found"),
        ("processes/no-such/stream", &id, json!({}), "not_found"),
        ("terminal", "sb-00000000", json!({"type": "start"}), "not_found"),
        ("pty", &id, json!({"type": "start", "cols": 0}), "invalid_request"),
        ("pty", &id, json!({"type": "start", "rows": 100_000}), "invalid_request"),
        ("pty", &id, json!({"type": "connect", "tag": "pty-none"}), "not_found"),
        ("pty", &id, json!({"type": "resize", "cols": 1, "rows": 1}), "invalid_request"),
    ] {
        let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/{route}")).await.unwrap();
        socket.send(frame.clone()).await;
        let frames = socket.rest().await;
        let [Said::Text(error), Said::Closed(1000)] = frames.as_slice() else {
            panic!("{route} {frame}: {frames:?}")
        };
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("error"), &json!(code)),
            "{route} {frame} {error}"
        );
        assert!(error["data"].as_str().is_some_and(|data| !data.is_empty()));
    }
    // Bytes before a start.
    let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/terminal")).await.unwrap();
    socket.send_bytes(b"\xff").await;
    assert_eq!(socket.json().await["fatal"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_can_be_followed() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let line = "read -r go < \"$FIFO\"; echo going; echo err >&2; exit 5";
    let scratch = tempfile::tempdir().unwrap();
    let fifo = scratch.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let body = json!({
        "cmd": "sh", "args": ["-c", line], "background": true, "tag": "followed",
        "envs": {"FIFO": fifo.to_str().unwrap()},
    });
    let pid = world.client.post(&format!("/v1/sandboxes/{id}/exec"), body).await.json()["pid"].clone();
    let mut sockets = Vec::new();
    for selector in ["followed".to_owned(), pid.to_string()] {
        let path = format!("/v1/sandboxes/{id}/processes/{selector}/stream");
        let mut socket = Socket::open(&world.client, &path).await.unwrap();
        assert_eq!(socket.json().await, json!({"type": "start", "pid": pid}));
        // Who watches has no say.
        socket.send(json!({"type": "stop"})).await;
        sockets.push(socket);
    }
    tokio::task::spawn_blocking(move || std::fs::write(fifo, "go\n").unwrap()).await.unwrap();
    for mut socket in sockets {
        let frames = socket.rest().await;
        assert_eq!((texts(&frames, "stdout"), texts(&frames, "stderr")), ("going\n".into(), "err\n".into()));
        let [.., Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!(exit["exit_code"], 5);
    }
}

/// Reads what a terminal shows until it has shown this.
async fn shown_until(socket: &mut Socket, wanted: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(wanted) {
        match socket.next().await {
            Said::Binary(bytes) => shown += &String::from_utf8_lossy(&bytes),
            Said::Text(frame) => assert_eq!(frame["type"], "ping", "{frame}"),
            other => panic!("{other:?} after {shown:?}"),
        }
    }
    shown
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_in_the_binary_dialect() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/terminal");
    let mut socket = Socket::open(&world.client, &path).await.unwrap();
    let start = json!({
        "type": "start", "cmd": "/bin/sh", "cols": 91, "rows": 33, "cwd": "/usr", "envs": {"PS1": "> ", "A": "b"},
    });
    socket.send(start).await;
    let started = socket.json().await;
    assert_eq!(started["type"], "started");
    let tag = started["tag"].as_str().unwrap().to_owned();
    assert!(tag.starts_with("pty-") && started["pid"].is_u64(), "{started}");
    socket.send_bytes(b"pwd; stty size; echo $A $TERM | tr a-z A-Z\n").await;
    let shown = shown_until(&mut socket, "B XTERM-256COLOR").await;
    assert!(shown.contains("/usr") && shown.contains("33 91"), "{shown}");
    socket.send(json!({"type": "resize", "cols": 120, "rows": 40})).await;
    socket.send(json!({"type": "pong"})).await;
    // The older way to type is understood too.
    socket.send(json!({"type": "input", "data": "c3R0eSBzaXplCg=="})).await;
    shown_until(&mut socket, "40 120").await;
    socket.send(json!({"type": "resize", "cols": 0, "rows": 40})).await;
    let error = socket.json_between().await;
    assert_eq!((&error["type"], &error["fatal"]), (&json!("error"), &json!(false)));

    // The process survives the connection, and is found again by its tag.
    drop(socket);
    let mut socket = Socket::open(&world.client, &format!("/v1/capsules/{id}/pty")).await.unwrap();
    socket.send(json!({"type": "connect", "tag": tag})).await;
    let again = socket.json().await;
    assert_eq!((&again["tag"], &again["pid"]), (&started["tag"], &started["pid"]));
    socket.send_bytes(b"echo $((6*7))-again\n").await;
    shown_until(&mut socket, "42-again").await;
    socket.send_bytes(b"exit 9\n").await;
    let frames = socket.rest().await;
    let [.., Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!((&exit["type"], &exit["exit_code"]), (&json!("exit"), &json!(9)));

    let mut socket = Socket::open(&world.client, &path).await.unwrap();
    socket.send(json!({"type": "start", "cmd": "sleep", "args": ["86300"]})).await;
    assert_eq!(socket.json().await["type"], "started");
    socket.send(json!({"type": "kill"})).await;
    let frames = socket.rest().await;
    let [.., Said::Text(exit), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!(exit["exit_code"], -1);
}

async fn terminal(world: &World, id: &str, start: Value) -> Socket {
    let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/terminal")).await.unwrap();
    socket.send(start).await;
    assert_eq!(socket.json().await["type"], "started");
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_of_whom_where_and_with_what() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let line = "echo $(id -un) $PWD $GREETING $(stty size)";
    let start = json!({
        "type": "start", "cmd": "/bin/sh", "args": ["-c", line], "user": "daemon", "cwd": "/tmp",
        "envs": {"GREETING": "good day"}, "cols": 132, "rows": 43,
    });
    let mut socket = terminal(&world, &id, start).await;
    let shown = shown_until(&mut socket, "\n").await;
    assert_eq!(shown, "daemon /tmp good day 43 132\r\n");
    assert_eq!(
        socket.rest().await,
        [Said::Text(json!({"type": "exit", "exit_code": 0})), Said::Closed(1000)]
    );

    for (field, value) in [("user", "nobody-we-know"), ("cwd", "/nowhere")] {
        let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/terminal")).await.unwrap();
        socket.send(json!({"type": "start", field: value})).await;
        let frames = socket.rest().await;
        let [Said::Text(error), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!((&error["type"], &error["fatal"]), (&json!("error"), &json!(true)), "{error}");
        assert!(error["data"].as_str().unwrap().contains(value), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_to_silence_is_asked_whether_it_lives() {
    let half_a_minute = wrenn_control_plane::Bounds::default().ping;
    assert_eq!(half_a_minute, Duration::from_secs(30));
    let bounds = wrenn_control_plane::Bounds { ping: Duration::from_millis(50), ..short_bounds() };
    let world = World::with(bounds, Cluster::shared().database().await).await;
    let id = world.sandbox().await;
    let silent = json!({"type": "start", "cmd": "sleep", "args": ["86500"]});
    let mut socket = terminal(&world, &id, silent.clone()).await;
    for _ in 0..3 {
        assert_eq!(socket.json().await, json!({"type": "ping"}));
        socket.send(json!({"type": "pong"})).await;
    }
    socket.send(json!({"type": "kill"})).await;
    let frames = socket.rest().await;
    assert!(frames.contains(&Said::Text(json!({"type": "exit", "exit_code": -1}))), "{frames:?}");

    let mut socket = exec(&world, &id, silent).await;
    assert_eq!(socket.json().await["type"], "start");
    socket.pings(3).await;
}

/// A megabyte that is pasted while nobody reads: the terminal takes it as the program does, and nothing is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_pasted_into_a_terminal_arrives_whole() {
    const PIECES: usize = 16;
    let world = World::new().await;
    let id = world.sandbox().await;
    let pieces: Vec<Vec<u8>> = (0..PIECES)
        .map(|piece| (0..65_536).map(|at| u8::try_from((at * 31 + piece * 7) % 251).unwrap()).collect())
        .collect();
    let sum = pieces.concat().iter().map(|byte| u64::from(*byte)).sum::<u64>();
    let length = PIECES * 65_536;
    let count = "od -An -v -tu1 | awk '{ for (i = 1; i <= NF; i++) { n++; sum += $i } } END { print n, sum, \"counted\" }'";
    let line = format!("stty raw -echo; echo ready; sleep 1; head -c {length} | {count}");
    let mut socket =
        terminal(&world, &id, json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", line]})).await;
    shown_until(&mut socket, "ready").await;
    for piece in &pieces {
        socket.send_bytes(piece).await;
    }
    let shown = shown_until(&mut socket, "counted").await;
    assert!(shown.contains(&format!("{length} {sum} counted")), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_in_the_older_dialect() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let path = format!("/api/legacy/v1/capsules/{id}/pty");
    for _ in 0..10 {
        let mut socket = Socket::open(&world.client, &path).await.unwrap();
        socket.send(json!({"type": "start", "cmd": "/bin/echo", "args": ["hi"]})).await;
        let frames = socket.rest().await;
        let kinds: Vec<&str> = frames
            .iter()
            .map(|said| match said {
                Said::Text(frame) => frame["type"].as_str().unwrap(),
                Said::Closed(1000) => "close",
                other => panic!("{other:?}"),
            })
            .collect();
        // All that is shown comes before the end.
        assert_eq!(kinds.first(), Some(&"started"));
        assert_eq!(kinds[kinds.len() - 2..], ["exit", "close"], "{frames:?}");
        let shown: String = texts(&frames, "output");
        assert_eq!(shown, "aGkNCg==", "{frames:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_told_when_the_sandbox_or_the_server_ends() {
    let mut world = World::new().await;
    let id = world.sandbox().await;
    let mut socket = exec(&world, &id, json!({"type": "start", "cmd": "sleep", "args": ["86400"]})).await;
    assert_eq!(socket.json().await["type"], "start");
    world.agent.crash(&id);
    let frames = socket.rest().await;
    let [Said::Text(error), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("invalid_state")), "{error}");

    let id = world.sandbox().await;
    let mut socket = Socket::open(&world.client, &format!("/v1/sandboxes/{id}/terminal")).await.unwrap();
    socket.send(json!({"type": "start", "cmd": "sleep", "args": ["86401"]})).await;
    assert_eq!(socket.json().await["type"], "started");
    world.stop().await;
    let frames = socket.rest().await;
    let [Said::Text(error), Said::Closed(1000)] = frames.as_slice() else { panic!("{frames:?}") };
    assert_eq!((&error["type"], &error["fatal"]), (&json!("error"), &json!(true)));
    assert_eq!(world.agent.sandboxes(), [id], "stopping the server stops no sandbox");
}
