//! Clones of one snapshot are not each other.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use wrenn_testkit::{
    Client,
    socket::{Frame, Socket},
    stack,
};

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("identity::clones_share_nothing_that_must_differ", clones_differ),
        case("identity::the_clock_is_the_hosts", clock),
        case("identity::programs_know_where_they_are", variables),
    ]
}

async fn clones_differ(context: Arc<Context>) -> Result<()> {
    let questions = [
        "head -c 16 /dev/urandom | od -An -tx1",
        "cat /proc/sys/kernel/random/uuid",
        "cat /etc/machine-id",
        "hostname",
        "python3 -c 'import random, secrets; print(random.random(), secrets.token_hex(8))'",
    ];
    let mut answers: Vec<BTreeSet<String>> = vec![BTreeSet::new(); questions.len()];
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(Sandbox::create(context.client()).await?);
    }
    for sandbox in &mut made {
        for (question, answers) in questions.iter().zip(&mut answers) {
            let said = sandbox.output(question).await?;
            ensure!(!said.trim().is_empty(), "{question} says nothing");
            ensure!(answers.insert(said.clone()), "two clones say {said:?} to {question}");
        }
    }
    for sandbox in made {
        let id = sandbox.id.clone();
        ensure!(answers[3].contains(&format!("{id}\n")), "the hostname is the id");
        sandbox.destroy().await?;
    }
    Ok(())
}

/// How far the clock of a new sandbox may be from the host's. In the lab, where eight guests share one emulated processor, even the
/// fastest of their lines is on its way for longer.
fn allowed() -> Duration {
    Duration::from_millis(if stack::is_lab() { 1000 } else { 50 })
}
/// Tells the time again and again.
const TELL: &str =
    "import time\nfor _ in range(150):\n    print(time.time_ns(), flush=True)\n    time.sleep(0.02)";

/// By how much the clock is late at most, by the first program of all: each line was printed before it came.
async fn lateness(client: Client) -> Result<(Sandbox, i128)> {
    let sandbox = Sandbox::create(client).await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/exec/stream")).await?;
    socket.send(&json!({ "type": "start", "cmd": "python3", "args": ["-c", TELL] })).await?;
    let mut least = i128::MAX;
    let mut rest = String::new();
    loop {
        match socket.next().await? {
            Frame::Json(frame) if frame["type"] == "stdout" => {
                let now = jiff::Timestamp::now().as_nanosecond();
                rest.push_str(frame["data"].as_str().context("text")?);
                while let Some((line, after)) = rest.split_once('\n') {
                    least = least.min(now - line.parse::<i128>()?);
                    rest = after.to_owned();
                }
            }
            Frame::Closed => break,
            _ => {}
        }
    }
    ensure!(least != i128::MAX, "it told no time");
    Ok((sandbox, least))
}

/// One at a time, and as many at once as keep a small machine busy.
async fn clock(context: Arc<Context>) -> Result<()> {
    for count in [1, 8] {
        let made = futures::future::join_all((0..count).map(|_| lateness(context.client()))).await;
        for made in made {
            let (sandbox, least) = made?;
            // What it is late by is this and less; what it is ahead by is seen as less than nothing.
            let allowed = i128::try_from(allowed().as_nanos())?;
            ensure!((-allowed..=allowed).contains(&least), "of {count}, one is {least} ns late");
            sandbox.destroy().await?;
        }
    }
    Ok(())
}

/// Programs find out that they are in a sandbox, and in which; what its owner says goes before.
async fn variables(context: Arc<Context>) -> Result<()> {
    let body = json!({ "template": "base", "envs": { "E2B_TEMPLATE_ID": "mine", "COLOUR": "green" } });
    let mut sandbox = Sandbox::create_with(context.client(), &body).await?;
    let id = sandbox.id.clone();
    let said = sandbox.output("env | grep -E '^(E2B|WRENN)_|^COLOUR' | sort").await?;
    let wanted = format!(
        "COLOUR=green\nE2B_SANDBOX=true\nE2B_SANDBOX_ID={id}\nE2B_TEMPLATE_ID=mine\n\
         WRENN_SANDBOX=true\nWRENN_SANDBOX_ID={id}\nWRENN_TEMPLATE_ID=base\n"
    );
    ensure!(said == wanted, "{said}");
    sandbox.destroy().await
}
