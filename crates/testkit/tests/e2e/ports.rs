//! Ports of sandboxes by their host names: a real server in a real guest.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use http::Method;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use wrenn_testkit::{Client, http::full};

use crate::{
    context::{Case, Context, Sandbox, case},
    lifecycle::wait_for_status,
    persistence::verb,
};

/// How long one piece may take.
const BOUND: Duration = Duration::from_secs(60);
/// The server, on port 8000 for everybody and on port 8001 for the guest alone.
const SERVER: &str = include_str!("ports.py");

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("ports::a_server_is_reached", a_server_is_reached),
        case("ports::any_protocol_after_an_upgrade", any_protocol_after_an_upgrade),
        case("ports::a_request_wakes", a_request_wakes),
        case("ports::a_stream_keeps_awake", a_stream_keeps_awake),
    ]
}

/// A sandbox whose server listens, and a caller of it.
async fn served(context: &Context, body: &Value) -> Result<(Sandbox, Client)> {
    let mut sandbox = Sandbox::create_with(context.client(), body).await?;
    let path = sandbox.path("/files?path=/tmp/ports.py");
    sandbox.client.put(&path, SERVER).await?.expect(204)?;
    let path = sandbox.path("/exec");
    let start = json!({ "cmd": "python3", "args": ["/tmp/ports.py"], "background": true });
    sandbox.client.post(&path, &start).await?.expect(202)?;
    let mut port = context.stack().port(&sandbox.id, 8000);
    // A port that is not open yet says so, and that it can be tried again.
    let up = async {
        loop {
            let answer = port.get("/").await?;
            if answer.status == 200 {
                return Ok(());
            }
            ensure!(answer.status == 502 && answer.text().contains("port is not open"), "{}", answer.text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(BOUND, up).await.context("the server does not listen")??;
    Ok((sandbox, port))
}

async fn a_server_is_reached(context: Arc<Context>) -> Result<()> {
    let (sandbox, mut port) = served(&context, &json!({})).await?;
    let seen = port.send(Method::POST, "/a%20b?c=d", &[("x-mine", "1")], "body").await?.expect(200)?.json();
    ensure!(
        seen["path"] == "/a%20b?c=d" && seen["body"] == "body" && seen["headers"]["x-mine"] == "1",
        "{seen}"
    );
    ensure!(seen["headers"]["host"] == port.host(), "{seen}");
    ensure!(seen["headers"].get("x-api-key").is_none() && !seen.to_string().contains(port.key()), "{seen}");
    // One that listens for the guest alone is reached as well; the guest's agent is not.
    let mut inner = context.stack().port(&sandbox.id, 8001);
    ensure!(inner.get("/inner").await?.expect(200)?.json()["path"] == "/inner", "it is the same server");
    context.stack().port(&sandbox.id, 49_983).get("/health").await?.expect(403)?;
    let closed = context.stack().port(&sandbox.id, 8002).get("/").await?.expect(502)?.json();
    ensure!(closed["message"] == "The sandbox is running but port is not open", "{closed}");
    ensure!(closed["port"] == 8002 && closed["sandboxId"] == sandbox.id.as_str(), "{closed}");
    port.without_key().get("/").await?.expect(401)?;
    // A large body in both directions.
    let large = vec![b'l'; 8 << 20];
    let echoed = port.send(Method::POST, "/echo", &[], large.clone()).await?.expect(200)?;
    ensure!(echoed.body == large, "{} bytes came back", echoed.body.len());
    sandbox.destroy().await?;
    let gone = port.get("/").await?.expect(502)?.json();
    ensure!(gone["message"] == "The sandbox was not found", "{gone}");
    Ok(())
}

async fn any_protocol_after_an_upgrade(context: Arc<Context>) -> Result<()> {
    let (mut sandbox, mut port) = served(&context, &json!({})).await?;
    let mut open = async || {
        let headers = [("connection", "upgrade"), ("upgrade", "reverse")];
        let answer = port.open(Method::GET, "/", &headers, full("")).await?;
        ensure!(answer.status() == 101, "{answer:?}");
        anyhow::Ok(TokioIo::new(hyper::upgrade::on(answer).await?))
    };
    let mut stream = open().await?;
    for line in ["one\n", "two\n", "three\n"] {
        stream.write_all(line.as_bytes()).await?;
        let mut said = vec![0; line.len()];
        timeout(BOUND, stream.read_exact(&mut said)).await??;
        let expected: String = line.trim().chars().rev().chain(['\n']).collect();
        ensure!(said == expected.as_bytes(), "{said:?}");
    }
    // What the caller has ended is ended for the guest, which then says a last word.
    stream.shutdown().await?;
    let mut rest = String::new();
    timeout(BOUND, stream.read_to_string(&mut rest)).await??;
    ensure!(rest == "bye\n", "{rest:?}");
    // A pause breaks what is open.
    let mut stream = open().await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let mut rest = Vec::new();
    let _ = timeout(BOUND, stream.read_to_end(&mut rest)).await.context("it was not broken")?;
    ensure!(rest.is_empty(), "{rest:?}");
    sandbox.destroy().await
}

async fn a_request_wakes(context: Arc<Context>) -> Result<()> {
    let (mut sandbox, mut port) = served(&context, &json!({ "auto_resume": true })).await?;
    let before = port.get("/").await?.expect(200)?.json();
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let asked = (0..5).map(|_| {
        let mut port = context.stack().port(&sandbox.id, 8000);
        tokio::spawn(async move { port.send(Method::POST, "/again", &[], "x").await })
    });
    let asked: Vec<_> = asked.collect();
    for answer in asked {
        let seen = answer.await??.expect(200)?.json();
        ensure!(
            seen["pid"] == before["pid"] && seen["body"] == "x",
            "it is the same process: {before} {seen}"
        );
    }
    // Without that it stays paused.
    let path = sandbox.path("/timeout");
    sandbox.client.patch(&path, &json!({ "auto_resume": false })).await?.expect(200)?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let refused = port.get("/").await?.expect(502)?.json();
    ensure!(refused["message"] == "The sandbox was not found", "{refused}");
    let path = sandbox.path("");
    ensure!(sandbox.client.get(&path).await?.json()["status"] == "paused", "it was not woken");
    sandbox.destroy().await
}

async fn a_stream_keeps_awake(context: Arc<Context>) -> Result<()> {
    let (mut sandbox, mut port) = served(&context, &json!({})).await?;
    let path = sandbox.path("/timeout");
    sandbox.client.patch(&path, &json!({ "timeout_sec": 2 })).await?.expect(200)?;
    // Twenty pieces, one every half second: only they move its clock.
    let mut body = port.open(Method::GET, "/ticks", &[], full("")).await?.into_body();
    let mut ticks = String::new();
    while let Some(frame) = timeout(BOUND, body.frame()).await.context("a tick is missing")? {
        let data = frame.context("the stream broke")?.into_data().unwrap_or_default();
        ticks.push_str(&String::from_utf8_lossy(&data));
    }
    ensure!(ticks.lines().count() == 20, "{ticks}");
    let id = sandbox.id.clone();
    wait_for_status(&mut sandbox.client, &id, "paused", BOUND).await?;
    sandbox.destroy().await
}
