//! The guest agent in a real guest, also by the way that the control plane takes to it.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::{Duration, timeout},
};

use crate::context::{Case, Context, Sandbox, case};

/// How long one answer may take.
const BOUND: Duration = Duration::from_secs(60);
/// The port of the agent.
const AGENT: u16 = 49983;

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("guest::a_port_of_its_loopback_is_tunnelled", loopback),
        case("guest::a_program_that_takes_all_memory_ends_alone_and_is_told_why", out_of_memory),
        case("guest::the_agent_stays_small", small),
    ]
}

/// Sends a request over a tunnel to a port of a guest, and answers with all that comes until the other side closes.
async fn through(context: &Context, sandbox: &Sandbox, port: u16, request: &str) -> Result<String> {
    let instance = context.stack().instance()?;
    let mut stream = UnixStream::connect(format!("/run/wrenn/{}/agent.sock", instance.trim())).await?;
    let head = format!(
        "GET /tunnel/{}/{port} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: wrenn-tunnel\r\n\r\n",
        sandbox.id
    );
    let mut answer = Vec::new();
    let exchange = async {
        stream.write_all(head.as_bytes()).await?;
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.context("the head of an answer")?);
        }
        let head = String::from_utf8(std::mem::take(&mut answer))?;
        ensure!(head.starts_with("HTTP/1.1 101 "), "{head}");
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    timeout(BOUND, exchange).await.context("in time")?
}

async fn loopback(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/exec");
    let server = json!({
        "cmd": "python3", "args": ["-m", "http.server", "8124", "--bind", "127.0.0.1"], "cwd": "/etc", "background": true,
    });
    sandbox.client.post(&path, &server).await?.expect(202)?;
    let line = "for i in $(seq 200); do curl -s -o /dev/null http://127.0.0.1:8124/ && exit 0; sleep 0.05; done; exit 1";
    sandbox.output(line).await?;
    let answer = through(&context, &sandbox, 8124, "GET /hostname HTTP/1.0\r\n\r\n").await?;
    ensure!(
        answer.starts_with("HTTP/1.0 200 ") && answer.ends_with(&format!("{}\n", sandbox.id)),
        "{answer}"
    );
    let refused = through(&context, &sandbox, 8125, "GET / HTTP/1.0\r\n\r\n").await;
    ensure!(
        refused.is_err_and(|error| error.to_string().starts_with("HTTP/1.1 502 ")),
        "nobody listens there"
    );
    sandbox.destroy().await
}

async fn out_of_memory(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let record = context.stack().dir().join("agent/sandboxes").join(&sandbox.id).join("record.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record)?)?;
    let token = record["access_token"].as_str().context("a token")?;
    let program = "a = []\nwhile True: a.append(bytearray(b'x') * (16 << 20))";
    let message =
        json!({ "process": { "cmd": "python3", "args": ["-c", program] }, "stdin": false }).to_string();
    let length = u32::try_from(message.len())?.to_be_bytes();
    let frame = [&[0], length.as_slice(), message.as_bytes()].concat();
    let request = format!(
        "POST /process.Process/Start HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-access-token: {token}\r\n\
         content-type: application/connect+json\r\nconnect-protocol-version: 1\r\ncontent-length: {}\r\n\r\n{}",
        frame.len(),
        String::from_utf8(frame)?
    );
    let before = sandbox.output("pgrep -x envd").await?;
    for _ in 0..2 {
        let answer = through(&context, &sandbox, AGENT, &request).await?;
        ensure!(answer.contains(r#""error":"signal: killed (out of memory)""#), "{answer}");
        ensure!(sandbox.output("pgrep -x envd").await? == before, "the agent is another one");
    }
    sandbox.destroy().await
}

async fn small(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    for number in 0..100 {
        ensure!(sandbox.output(&format!("echo {number}")).await? == format!("{number}\n"));
    }
    let said = sandbox.output("for pid in $(pgrep -x envd); do grep VmRSS /proc/$pid/status; done").await?;
    let sizes: Vec<u64> =
        said.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect();
    ensure!(!sizes.is_empty() && sizes.iter().all(|size| (500..8 << 10).contains(size)), "{said}");
    sandbox.destroy().await
}
