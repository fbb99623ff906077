//! WebSockets: a command's output as it comes, and terminals.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tokio::time::timeout;
use wrenn_testkit::socket::{Frame, Socket};

use crate::context::{Case, Context, Sandbox, case};

/// How long output may take to come, on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(30);
/// More pieces than wait anywhere on their way.
const PIECES: usize = 200;

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("streams::a_command_streams_in_order_and_closes", exec_stream),
        case("streams::a_stop_ends_the_command", stop),
        case("streams::a_terminal_echoes_resizes_and_exits", terminal),
        case("streams::a_terminal_survives_its_connection", reattach),
        case("streams::a_megabyte_arrives_whole", volume),
        case("streams::output_goes_on_after_a_resume_and_in_a_clone", goes_on),
        case("streams::an_unknown_sandbox_is_an_error_frame", unknown),
    ]
}

async fn exec_stream(context: Arc<Context>) -> Result<()> {
    let sandbox = Sandbox::create(context.client()).await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/exec/stream")).await?;
    socket
        .send(&json!({ "type": "start", "cmd": "/bin/sh", "args": ["-c", "echo a; echo b >&2; echo c; exit 3"] }))
        .await?;
    let (mut out, mut err, mut kinds) = (String::new(), String::new(), Vec::new());
    loop {
        match socket.next().await? {
            Frame::Json(frame) => {
                let kind = frame["type"].as_str().unwrap_or_default().to_owned();
                match kind.as_str() {
                    "stdout" => out.push_str(frame["data"].as_str().unwrap()),
                    "stderr" => err.push_str(frame["data"].as_str().unwrap()),
                    "exit" => ensure!(frame["exit_code"] == 3, "{frame}"),
                    "start" => ensure!(frame["pid"].as_u64().is_some(), "{frame}"),
                    _ => bail!("{frame}"),
                }
                kinds.push(kind);
            }
            Frame::Binary(bytes) => bail!("{bytes:?}"),
            Frame::Closed => break,
        }
    }
    ensure!(out == "a\nc\n" && err == "b\n", "{out:?} {err:?}");
    ensure!(kinds.first().unwrap() == "start" && kinds.last().unwrap() == "exit", "{kinds:?}");
    sandbox.destroy().await
}

async fn stop(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/exec/stream")).await?;
    socket.send(&json!({ "type": "start", "cmd": "sleep", "args": ["654"] })).await?;
    socket.until("start").await?;
    socket.send(&json!({ "type": "stop" })).await?;
    socket.until("exit").await?;
    ensure!(sandbox.output("pgrep -fc 'sleep 65[4]' || true").await?.trim() == "0", "it is still there");
    sandbox.destroy().await
}

/// Reads a terminal until its output contains this text, and answers with all of it.
async fn read_until(socket: &mut Socket, text: &str) -> Result<String> {
    let mut output = String::new();
    loop {
        match socket.next().await? {
            Frame::Binary(bytes) => output.push_str(&String::from_utf8_lossy(&bytes)),
            Frame::Json(frame) if frame["type"] == "ping" => socket.send(&json!({ "type": "pong" })).await?,
            Frame::Json(frame) if frame["type"] == "error" => bail!("{frame}"),
            Frame::Json(_) => {}
            Frame::Closed => bail!("closed after {output:?}"),
        }
        if output.contains(text) {
            return Ok(output);
        }
    }
}

async fn terminal(context: Arc<Context>) -> Result<()> {
    let sandbox = Sandbox::create(context.client()).await?;
    for route in ["/terminal", "/pty"] {
        let mut socket = Socket::open(&sandbox.client, &sandbox.path(route)).await?;
        socket.send(&json!({ "type": "start", "cmd": "/bin/bash", "cols": 81, "rows": 25 })).await?;
        let started = socket.until("started").await?;
        ensure!(started["tag"].as_str().is_some_and(|tag| tag.starts_with("pty-")), "{started}");
        socket.send_binary(b"stty size; id -un\n").await?;
        read_until(&mut socket, "25 81").await?;
        read_until(&mut socket, "user").await?;
        socket.send(&json!({ "type": "resize", "cols": 120, "rows": 40 })).await?;
        socket.send_binary(b"stty size\n").await?;
        read_until(&mut socket, "40 120").await?;
        socket.send_binary(b"exit 5\n").await?;
        let exit = socket.until("exit").await?;
        ensure!(exit["exit_code"] == 5, "{exit}");
        ensure!(socket.next().await? == Frame::Closed, "it closes after the exit");
    }
    sandbox.destroy().await
}

async fn reattach(context: Arc<Context>) -> Result<()> {
    let sandbox = Sandbox::create(context.client()).await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/terminal")).await?;
    socket.send(&json!({ "type": "start", "cols": 80, "rows": 24 })).await?;
    let tag = socket.until("started").await?["tag"].as_str().unwrap().to_owned();
    socket.send_binary(b"KEPT=still-here; echo ready\n").await?;
    read_until(&mut socket, "ready").await?;
    drop(socket);
    let mut again = Socket::open(&sandbox.client, &sandbox.path("/terminal")).await?;
    again.send(&json!({ "type": "connect", "tag": tag })).await?;
    again.until("started").await?;
    again.send_binary(b"echo is-$KEPT\n").await?;
    read_until(&mut again, "is-still-here").await?;
    again.send(&json!({ "type": "kill" })).await?;
    again.until("exit").await?;
    sandbox.destroy().await
}

async fn volume(context: Arc<Context>) -> Result<()> {
    let sandbox = Sandbox::create(context.client()).await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/exec/stream")).await?;
    let line = "head -c 1048576 /dev/zero | tr '\\0' x";
    socket.send(&json!({ "type": "start", "cmd": "/bin/sh", "args": ["-c", line] })).await?;
    let mut length = 0;
    loop {
        match socket.next().await? {
            Frame::Json(frame) if frame["type"] == "stdout" => {
                length += frame["data"].as_str().unwrap().len()
            }
            Frame::Json(frame) if frame["type"] == "error" => bail!("{frame}"),
            Frame::Closed => break,
            Frame::Json(_) | Frame::Binary(_) => {}
        }
    }
    ensure!(length == 1 << 20, "{length} bytes");
    sandbox.destroy().await
}

/// Follows the talker of a sandbox until it has said something for a while.
async fn follow(sandbox: &Sandbox) -> Result<Socket> {
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/processes/talker/stream")).await?;
    listen(&mut socket).await?;
    Ok(socket)
}

async fn listen(socket: &mut Socket) -> Result<()> {
    let more = async {
        for _ in 0..PIECES {
            socket.until("stdout").await?;
        }
        Ok(())
    };
    timeout(SOON, more).await.context("the output goes on soon")?
}

/// A guest that is restored has connections to nobody, and a program that writes to one of them must not wait for it.
async fn goes_on(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/exec");
    let line = "while :; do echo some line of output; done";
    let body = json!({ "cmd": "/bin/sh", "args": ["-c", line], "background": true, "tag": "talker" });
    sandbox.client.post(&path, &body).await?.expect(202)?;
    // Held to the end: nobody says to the guest that they are over.
    let mut held = vec![follow(&sandbox).await?];
    for _ in 0..2 {
        for (verb, then) in [("/pause", "paused"), ("/resume", "running")] {
            let path = sandbox.path(verb);
            sandbox.client.post(&path, &json!({})).await?;
            let id = sandbox.id.clone();
            crate::lifecycle::wait_for_status(&mut sandbox.client, &id, then, 2 * SOON).await?;
        }
        held.push(follow(&sandbox).await.context("after the resume")?);
    }
    let path = sandbox.path("/fork");
    let children = sandbox.client.post(&path, &json!({ "count": 1 })).await?.expect(201)?.json();
    let id = children[0]["id"].as_str().context("an id")?.to_owned();
    let child = Sandbox { id, client: context.client() };
    held.push(follow(&child).await.context("in the clone")?);
    // The one that it is a clone of goes on where it was, for who listened then.
    let last = held.len() - 2;
    listen(&mut held[last]).await.context("beside the clone")?;
    child.destroy().await?;
    sandbox.destroy().await
}

async fn unknown(context: Arc<Context>) -> Result<()> {
    let mut socket = Socket::open(&context.client(), "/v1/sandboxes/sb-00000000/exec/stream").await?;
    socket.send(&json!({ "type": "start", "cmd": "true" })).await?;
    socket.until("error").await?;
    ensure!(socket.next().await? == Frame::Closed, "it closes after the error");
    Ok(())
}
