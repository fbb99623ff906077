//! A pause of the disk alone: files stay, processes do not, and what boots is a sandbox like any other after that.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tokio::time::Instant;
use wrenn_testkit::{Client, Stack, StackOptions};

use crate::{
    context::{Case, Context, OwnCase, Sandbox, case, own_case},
    faults::{agent_of, eventually, left_of},
    lifecycle::wait_for_status,
    persistence::{ask, start_server, verb, with_server},
    soak::entries,
};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![case("disk_only::files_stay_and_what_boots_is_like_any_other", files_stay)]
}

/// The cases of this file that harm their stack.
pub(crate) fn own_cases() -> Vec<OwnCase> {
    vec![own_case("disk_only::an_agent_killed_while_a_sandbox_boots_loses_nothing", killed_in_a_boot)]
}

/// How long a guest may take to boot on a machine that has other things to do.
const BOOT_BOUND: Duration = Duration::from_secs(240);
/// How much the guest has in memory, and not on its disk.
const HELD_MIB: u64 = 48;
/// Prints what a guest is told that it is, and how large its disk is.
const WHO: &str = "cat /etc/machine-id /etc/resolv.conf; hostname; id -un; df --output=size / | tail -n 1";
/// When the agent is killed after a resume was asked for: while the machine is made, in its kernel, in its guest.
const MOMENTS: [u64; 4] = [50, 400, 1500, 4000];

/// Asks for a resume, and waits until the guest has booted.
async fn boot(sandbox: &mut Sandbox) -> Result<()> {
    let path = sandbox.path("/resume");
    let answer = sandbox.client.post(&path, &json!({})).await?;
    ensure!(matches!(answer.status.as_u16(), 200 | 202), "{} {}", answer.status, answer.text());
    let id = sandbox.id.clone();
    wait_for_status(&mut sandbox.client, &id, "running", BOOT_BOUND).await
}

/// Pauses a sandbox, and answers with how much is saved of it.
async fn paused_size(sandbox: &mut Sandbox, memory: bool) -> Result<u64> {
    verb(sandbox, "pause", &json!({ "memory": memory }), "paused").await?;
    let path = sandbox.path("");
    let seen = sandbox.client.get(&path).await?.expect(200)?.json();
    seen["disk_used_mb"].as_u64().with_context(|| seen.to_string())
}

async fn files_stay(context: Arc<Context>) -> Result<()> {
    let body = json!({
        "envs": { "COLOUR": "green" }, "metadata": { "kept": "yes" }, "disk_size_mb": 24_576, "timeout_sec": 3600,
    });
    let mut sandbox = with_server(&context, &body).await?;
    let before = ask(&mut sandbox).await?;
    sandbox
        .output(&format!(
            "head -c $(({HELD_MIB} << 20)) /dev/urandom > /dev/shm/held; \
             head -c 4194304 /dev/urandom > /home/user/data; sha256sum /home/user/data > /home/user/sum"
        ))
        .await?;
    let who = sandbox.output(WHO).await?;
    let kernel = sandbox.output("cat /proc/sys/kernel/random/boot_id").await?;
    let whole = paused_size(&mut sandbox, true).await?;
    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    // The last of it is in no file of the disk yet when the pause is asked for.
    sandbox.output("echo last > /home/user/last").await?;
    let disk = paused_size(&mut sandbox, false).await?;
    ensure!(disk + HELD_MIB <= whole, "{disk} MiB of the disk alone, and {whole} MiB with the memory");

    let mut client = context.client();
    let listed = client.get("/v1/sandboxes").await?.expect(200)?.json();
    let mut listed = listed.as_array().context("an array")?.iter();
    let shown = listed.find(|one| one["id"] == sandbox.id.as_str()).context("it is listed")?;
    ensure!(shown["status"] == "paused" && shown["metadata"]["kept"] == "yes", "{shown}");
    // There is nothing in it to go on from elsewhere.
    for (path, body) in [
        (sandbox.path("/fork"), json!({ "count": 1 })),
        ("/v1/snapshots".to_owned(), json!({ "sandbox_id": sandbox.id, "name": "of-a-disk" })),
    ] {
        let refused = client.post(&path, &body).await?;
        ensure!(refused.status == 409, "{path}: {} {}", refused.status, refused.text());
    }
    let id = sandbox.id.clone();
    wait_for_status(&mut client, &id, "paused", Duration::from_secs(60)).await?;

    boot(&mut sandbox).await?;
    sandbox.output("sha256sum --check --quiet /home/user/sum").await?;
    ensure!(sandbox.output("cat /home/user/last").await?.trim() == "last", "what was written is there");
    ensure!(sandbox.shell("pgrep -f '[s]erver.py'").await?["exit_code"] == 1, "processes are gone");
    ensure!(sandbox.shell("ls /dev/shm/held").await?["exit_code"] == 2, "memory too");
    ensure!(sandbox.output("echo $COLOUR").await?.trim() == "green", "the environment stays");
    let now = sandbox.output(WHO).await?;
    ensure!(now == who, "it is who it was: {who:?}, {now:?}");
    let rebooted = sandbox.output("cat /proc/sys/kernel/random/boot_id").await?;
    ensure!(rebooted != kernel, "its kernel is another one");

    // From here on it is like any other.
    start_server(&mut sandbox).await?;
    let booted = ask(&mut sandbox).await?;
    ensure!(booted.1 != before.1, "another server");
    for _ in 0..2 {
        verb(&mut sandbox, "pause", &json!({}), "paused").await?;
        verb(&mut sandbox, "resume", &json!({}), "running").await?;
        let after = ask(&mut sandbox).await?;
        ensure!((&after.0, &after.1) == (&booted.0, &booted.1), "{booted:?} became {after:?}");
    }
    let path = sandbox.path("/fork");
    let children = sandbox.client.post(&path, &json!({ "count": 1 })).await?.expect(201)?.json();
    let id = children[0]["id"].as_str().context("an id")?.to_owned();
    let mut child = Sandbox { id, client: context.client() };
    let forked = ask(&mut child).await?;
    ensure!((&forked.0, &forked.1) == (&booted.0, &booted.1), "{booted:?} became {forked:?} in a fork");
    ensure!(child.output("cat /home/user/last").await?.trim() == "last", "with its files");
    ensure!(child.output("cat /etc/machine-id").await?.trim() != who.lines().next().unwrap_or_default());
    child.destroy().await?;
    ask(&mut sandbox).await?;

    // A boot on what was booted, because somebody needs it.
    let path = sandbox.path("/timeout");
    sandbox.client.patch(&path, &json!({ "auto_resume": true })).await?.expect(200)?;
    paused_size(&mut sandbox, false).await?;
    woken(&mut sandbox).await?;
    sandbox.output("sha256sum --check --quiet /home/user/sum").await?;
    sandbox.destroy().await
}

/// Asks for a command until it is done: who asks is made to wait for a part of the boot only.
async fn woken(sandbox: &mut Sandbox) -> Result<()> {
    let path = sandbox.path("/exec");
    let end = Instant::now() + BOOT_BOUND;
    loop {
        let answer = sandbox.client.post(&path, &json!({ "cmd": "true" })).await?;
        if answer.status == 200 {
            return Ok(());
        }
        ensure!(answer.status == 409 && Instant::now() < end, "{} {}", answer.status, answer.text());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What the API says that a sandbox is, once it stays so; none where nobody can say it now.
async fn settled(client: &mut Client, id: &str) -> Option<String> {
    let answer = client.get(&format!("/v1/sandboxes/{id}")).await.ok()?;
    let status = answer.json()["status"].as_str()?.to_owned();
    (answer.status == 200 && status != "resuming" && status != "missing").then_some(status)
}

async fn killed_in_a_boot() -> Result<()> {
    let stack = Stack::start(StackOptions::default()).await?;
    let instance = stack.instance()?;
    let mut sandbox = Sandbox::create(stack.client()).await?;
    sandbox.output("echo here > /home/user/state").await?;
    for moment in MOMENTS {
        verb(&mut sandbox, "pause", &json!({ "memory": false }), "paused").await?;
        let (path, mut client) = (sandbox.path("/resume"), stack.client());
        // What an agent answers that is killed is nothing to go by.
        let resume = tokio::spawn(async move { client.post(&path, &json!({})).await.map(drop) });
        tokio::time::sleep(Duration::from_millis(moment)).await;
        let agent = agent_of(&stack)?;
        kill(agent, Signal::SIGKILL)?;
        resume.await??;
        let another = async || agent_of(&stack).is_ok_and(|now| now != agent);
        ensure!(eventually(BOOT_BOUND, another).await, "it is followed by another one");
        let (mut client, id) = (stack.client(), sandbox.id.clone());
        let end = Instant::now() + BOOT_BOUND;
        let status = loop {
            if let Some(status) = settled(&mut client, &id).await {
                break status;
            }
            ensure!(Instant::now() < end, "it is still resuming\n{}", stack.log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        ensure!(
            status == "paused" || status == "running",
            "after {moment} ms it is {status}\n{}",
            stack.log()
        );
        if status == "paused" {
            boot(&mut sandbox).await.with_context(|| stack.log())?;
        }
        let state = sandbox.output("cat /home/user/state").await?;
        ensure!(state.trim() == "here", "after {moment} ms: {state}");
        ensure!(entries(&stack, "sandboxes")? == [sandbox.id.as_str()], "one record");
    }
    sandbox.destroy().await?;
    stack.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}
