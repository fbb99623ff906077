//! Sandboxes that persist: what is paused comes back as it was, what is saved can be started from, and what fails
//! loses nothing.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};
use wrenn_testkit::socket::Socket;

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("persistence::a_paused_sandbox_comes_back_as_it_was", pause_and_resume),
        case("persistence::a_zeroed_page_comes_back_zeroed", zeroed_pages),
        case("persistence::memory_that_was_freed_is_not_saved", freed_memory),
        case("persistence::verbs_are_idempotent_and_name_the_wrong_state", idempotent),
        case("persistence::a_snapshot_starts_others_and_its_sandbox_goes_on", snapshot),
        case("persistence::a_snapshot_of_a_paused_sandbox_is_one", snapshot_of_paused),
        case("persistence::forks_have_identities_of_their_own", fork),
        case("persistence::a_rollback_undoes_what_came_after", rollback),
        case("persistence::an_idle_sandbox_is_paused_not_lost", idle),
        case("persistence::a_deadline_pauses_once_and_on_time", pause_at_deadline),
        case("persistence::a_deadline_kills_on_time", kill_at_deadline),
        case("persistence::a_request_resumes_a_paused_sandbox", auto_resume),
        case("persistence::a_paused_sandbox_can_be_destroyed", destroy_paused),
        case("persistence::many_callers_at_once_end_in_a_legal_state", many_callers),
        case("persistence::the_network_policy_changes_while_it_runs", network),
    ]
}

/// A program that counts in its memory and answers on a port of its own, so that both can be asked for later.
const SERVER: &str = r#"
import http.server, os, threading, time
state = {"ticks": 0, "secret": os.urandom(8).hex()}
def tick():
    while True:
        state["ticks"] += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.getpid()} {state['secret']} {state['ticks']}".encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", 8123), Handler).serve_forever()
"#;

/// Asks it, from inside.
const ASK: &str = "python3 -c 'import urllib.request; print(urllib.request.urlopen(\"http://127.0.0.1:8123\", timeout=20).read().decode())'";

/// What the server says: its process, its secret, its ticks.
pub(crate) async fn ask(sandbox: &mut Sandbox) -> Result<(String, String, u64)> {
    let said = sandbox.output(ASK).await?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [pid, secret, ticks] = words[..] else { anyhow::bail!("{said:?}") };
    Ok((pid.to_owned(), secret.to_owned(), ticks.parse()?))
}

pub(crate) async fn with_server(context: &Context, body: &Value) -> Result<Sandbox> {
    let mut sandbox = Sandbox::create_with(context.client(), body).await?;
    start_server(&mut sandbox).await?;
    Ok(sandbox)
}

/// Starts the server, and waits until it listens.
pub(crate) async fn start_server(sandbox: &mut Sandbox) -> Result<()> {
    let path = sandbox.path("/files?path=/tmp/server.py");
    sandbox.client.put(&path, SERVER).await?;
    let path = sandbox.path("/exec");
    let started = json!({ "cmd": "python3", "args": ["/tmp/server.py"], "background": true });
    sandbox.client.post(&path, &started).await?.expect(202)?;
    let up = sandbox.exec(&json!({ "cmd": "/bin/bash", "args": ["-c", "for i in $(seq 200); do (echo > /dev/tcp/127.0.0.1/8123) 2>/dev/null && exit 0; sleep 0.05; done; exit 1"] })).await?;
    ensure!(up["exit_code"] == 0, "the server does not listen: {up}");
    Ok(())
}

/// Asks for a verb and waits until the sandbox is in the state that it leads to.
pub(crate) async fn verb(sandbox: &mut Sandbox, verb: &str, body: &Value, then: &str) -> Result<Value> {
    let path = sandbox.path(&format!("/{verb}"));
    let answer = sandbox.client.post(&path, body).await?;
    ensure!(matches!(answer.status.as_u16(), 200 | 202), "{verb}: {} {}", answer.status, answer.text());
    let id = sandbox.id.clone();
    crate::lifecycle::wait_for_status(&mut sandbox.client, &id, then, Duration::from_secs(60)).await?;
    Ok(answer.json())
}

async fn pause_and_resume(context: Arc<Context>) -> Result<()> {
    let body = json!({ "envs": { "COLOUR": "green" }, "metadata": { "kept": "yes" } });
    let mut sandbox = with_server(&context, &body).await?;
    let before = ask(&mut sandbox).await?;
    sandbox.output("dd if=/dev/urandom of=/home/user/data bs=1M count=8 2>/dev/null; sha256sum /home/user/data > /home/user/sum").await?;
    let boot = sandbox.output("cat /proc/sys/kernel/random/boot_id /etc/machine-id").await?;
    for round in 0..3 {
        let paused = verb(&mut sandbox, "pause", &json!({}), "paused").await?;
        ensure!(paused["status"] == "paused" || paused["status"] == "pausing", "{paused}");
        let path = sandbox.path("/exec");
        let refused = sandbox.client.post(&path, &json!({ "cmd": "true" })).await?;
        ensure!(refused.status == 409 && refused.error_code() == "invalid_state", "{}", refused.text());
        verb(&mut sandbox, "resume", &json!({}), "running").await?;
        let after = ask(&mut sandbox).await?;
        ensure!((&after.0, &after.1) == (&before.0, &before.1), "round {round}: {before:?} became {after:?}");
        ensure!(after.2 >= before.2, "its memory goes on: {before:?} {after:?}");
        sandbox.output("sha256sum --check --quiet /home/user/sum").await?;
        ensure!(sandbox.output("echo $COLOUR").await?.trim() == "green", "the environment stays");
        let now = sandbox.output("cat /proc/sys/kernel/random/boot_id /etc/machine-id").await?;
        ensure!(now.lines().last() == boot.lines().last(), "it is the same machine: {boot} {now}");
    }
    let seen = sandbox.client.get(&sandbox.path("")).await?.expect(200)?.json();
    ensure!(seen["metadata"]["kept"] == "yes", "{seen}");
    sandbox.destroy().await
}

async fn zeroed_pages(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    // A pattern in memory, saved; then zeros over half of it, saved again: old data must not come back.
    sandbox.output("head -c 8388608 /dev/urandom > /dev/shm/pattern").await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    sandbox.output("dd if=/dev/zero of=/dev/shm/pattern bs=1M count=4 conv=notrunc 2>/dev/null; sha256sum /dev/shm/pattern > /dev/shm/sum").await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    sandbox.output("sha256sum --check --quiet /dev/shm/sum").await?;
    let zeros = sandbox.output("head -c 4194304 /dev/shm/pattern | tr -d '\\0' | wc -c").await?;
    ensure!(zeros.trim() == "0", "{zeros} bytes of what was zeroed came back");
    sandbox.destroy().await
}

async fn freed_memory(context: Arc<Context>) -> Result<()> {
    const HELD: u64 = 64 << 20;
    let mut sandbox = Sandbox::create(context.client()).await?;
    let mut client = context.client();
    let mut sizes = Vec::new();
    for (when, change) in [
        ("held", format!("head -c {HELD} /dev/urandom > /dev/shm/held")),
        ("freed", "rm /dev/shm/held".to_owned()),
    ] {
        sandbox.output(&change).await?;
        let name = unique(when, &sandbox);
        let order = json!({ "sandbox_id": sandbox.id, "name": name });
        let made = client.post("/v1/snapshots", &order).await?.expect(201)?.json();
        sizes.push(made["size_bytes"].as_u64().with_context(|| made.to_string())?);
        client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    }
    ensure!(sizes[0] >= HELD, "what the guest holds is saved: {sizes:?}");
    // The rest is the disk, of which there may be a whole copy.
    ensure!(sizes[0].saturating_sub(sizes[1]) > HELD / 2, "what it freed is not: {sizes:?}");
    sandbox.destroy().await
}

async fn idempotent(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let path = sandbox.path("/rollback");
    let answer = sandbox.client.post(&path, &json!({ "snapshot": "no-such-snapshot" })).await?;
    ensure!(answer.status == 404, "{} {}", answer.status, answer.text());
    let mut client = context.client();
    let answer = client.post("/v1/sandboxes/sb-00000000/pause", &json!({})).await?;
    ensure!(answer.status == 404, "{}", answer.text());
    sandbox.destroy().await
}

fn unique(prefix: &str, sandbox: &Sandbox) -> String {
    format!("{prefix}-{}", sandbox.id.trim_start_matches("sb-"))
}

async fn snapshot(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({})).await?;
    let before = ask(&mut sandbox).await?;
    sandbox.output("echo saved > /home/user/when").await?;
    let name = unique("live", &sandbox);
    let mut client = context.client();
    let made = client.post("/v1/snapshots", &json!({ "sandbox_id": sandbox.id, "name": name })).await?;
    let made = made.expect(201)?.json();
    ensure!(made["name"] == name.as_str() && made["type"] == "snapshot", "{made}");
    // It goes on, and what it does is not in the snapshot.
    sandbox.output("echo later > /home/user/when").await?;
    let after = ask(&mut sandbox).await?;
    ensure!((&after.0, &after.1) == (&before.0, &before.1), "{before:?} became {after:?}");

    let again = client.post("/v1/snapshots", &json!({ "sandbox_id": sandbox.id, "name": name })).await?;
    ensure!(again.status == 409, "{} {}", again.status, again.text());
    let listed = client.get("/v1/snapshots?type=snapshot").await?.expect(200)?.json();
    let listed = listed.as_array().context("an array")?;
    ensure!(listed.iter().any(|one| one["name"] == name.as_str()), "{listed:?}");

    let mut children = Vec::new();
    for _ in 0..2 {
        children.push(Sandbox::create_with(context.client(), &json!({ "template": name })).await?);
    }
    let mut identities = vec![sandbox.output("cat /etc/machine-id; hostname").await?];
    for child in &mut children {
        let (pid, secret, _) = ask(child).await?;
        ensure!((&pid, &secret) == (&before.0, &before.1), "the server is the one that was saved");
        ensure!(child.output("cat /home/user/when").await?.trim() == "saved", "the disk is the saved one");
        identities.push(child.output("cat /etc/machine-id; hostname").await?);
    }
    identities.sort();
    identities.dedup();
    ensure!(identities.len() == 3, "each is itself: {identities:?}");

    // Another shape is refused, and what runs on a deleted snapshot goes on.
    let answer = client.post("/v1/sandboxes", &json!({ "template": name, "memory_mb": 1024 })).await?;
    ensure!(answer.status == 400, "{} {}", answer.status, answer.text());
    client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    let gone = client.post("/v1/sandboxes", &json!({ "template": name })).await?;
    ensure!(gone.status == 404, "{} {}", gone.status, gone.text());
    for mut child in children {
        child.output("sync; cat /home/user/when").await?;
        verb(&mut child, "pause", &json!({}), "paused").await?;
        verb(&mut child, "resume", &json!({}), "running").await?;
        ensure!(child.output("cat /home/user/when").await?.trim() == "saved", "its disk is whole");
        child.destroy().await?;
    }
    sandbox.destroy().await
}

async fn snapshot_of_paused(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    sandbox.output("echo paused > /home/user/state").await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let name = unique("rest", &sandbox);
    let mut client = context.client();
    client.post("/v1/snapshots", &json!({ "sandbox_id": sandbox.id, "name": name })).await?.expect(201)?;
    let seen = client.get(&sandbox.path("")).await?.json();
    ensure!(seen["status"] == "paused", "it stays paused: {seen}");
    sandbox.destroy().await?;
    let mut child = Sandbox::create_with(context.client(), &json!({ "template": name })).await?;
    ensure!(child.output("cat /home/user/state").await?.trim() == "paused", "it outlives its sandbox");
    child.destroy().await?;
    client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    Ok(())
}

async fn fork(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({ "metadata": { "of": "fork" } })).await?;
    let before = ask(&mut sandbox).await?;
    let path = sandbox.path("/fork");
    let answer = sandbox.client.post(&path, &json!({ "count": 3 })).await?.expect(201)?.json();
    let children = answer.as_array().context("an array")?.clone();
    ensure!(children.len() == 3, "{answer}");
    let identity = "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id; hostname";
    let mut seen = vec![sandbox.output(identity).await?];
    for child in &children {
        let id = child["id"].as_str().context("an id")?.to_owned();
        let mut child = Sandbox { id, client: context.client() };
        let (pid, secret, _) = ask(&mut child).await?;
        ensure!((&pid, &secret) == (&before.0, &before.1), "what ran goes on in each");
        seen.push(child.output(identity).await?);
        child.output("echo own > /home/user/own").await?;
        child.destroy().await?;
    }
    for part in 0..3 {
        let mut parts: Vec<_> = seen.iter().filter_map(|identity| identity.lines().nth(part)).collect();
        parts.sort_unstable();
        parts.dedup();
        ensure!(parts.len() == 4, "line {part} is each one's own, the parent's too: {seen:?}");
    }
    let missing = sandbox.shell("cat /home/user/own").await?;
    ensure!(missing["exit_code"] == 1, "what a child writes is its own: {missing}");
    ask(&mut sandbox).await?;
    let path = sandbox.path("/fork");
    let refused = sandbox.client.post(&path, &json!({ "count": 0 })).await?;
    ensure!(refused.status == 400, "{}", refused.text());
    sandbox.destroy().await
}

async fn rollback(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({})).await?;
    let before = ask(&mut sandbox).await?;
    sandbox.output("echo before > /home/user/state").await?;
    let name = unique("back", &sandbox);
    let mut client = context.client();
    client.post("/v1/snapshots", &json!({ "sandbox_id": sandbox.id, "name": name })).await?.expect(201)?;
    for _ in 0..2 {
        sandbox
            .output("echo after > /home/user/state; touch /home/user/more; pkill -f '[s]erver.py'; sync")
            .await?;
        verb(&mut sandbox, "rollback", &json!({ "snapshot": name }), "running").await?;
        ensure!(sandbox.output("cat /home/user/state").await?.trim() == "before", "the disk is as it was");
        ensure!(sandbox.shell("ls /home/user/more").await?["exit_code"] == 2, "what came after is gone");
        let after = ask(&mut sandbox).await?;
        ensure!((&after.0, &after.1) == (&before.0, &before.1), "the server is back: {before:?} {after:?}");
    }
    // A snapshot of another sandbox is nothing to go back to.
    let mut other = Sandbox::create(context.client()).await?;
    let path = other.path("/rollback");
    let answer = other.client.post(&path, &json!({ "snapshot": name })).await?;
    ensure!(answer.status == 400 || answer.status == 409, "{} {}", answer.status, answer.text());
    ensure!(other.output("echo whole").await?.trim() == "whole", "it is untouched");
    other.destroy().await?;
    client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    sandbox.destroy().await
}

async fn idle(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create_with(context.client(), &json!({ "timeout_sec": 2 })).await?;
    sandbox.output("echo here > /home/user/state").await?;
    let id = sandbox.id.clone();
    crate::lifecycle::wait_for_status(&mut sandbox.client, &id, "paused", Duration::from_secs(60)).await?;
    verb(&mut sandbox, "resume", &json!({ "timeout_sec": 0 }), "running").await?;
    ensure!(sandbox.output("cat /home/user/state").await?.trim() == "here", "nothing is lost");
    sandbox.destroy().await
}

/// Sets a deadline that lies a few seconds ahead, and answers with it.
async fn set_deadline(sandbox: &mut Sandbox, action: &str) -> Result<Timestamp> {
    let at = Timestamp::now() + Duration::from_secs(4);
    let path = sandbox.path("/timeout");
    let body = json!({ "deadline": at.to_string(), "deadline_action": action });
    sandbox.client.patch(&path, &body).await?.expect(200)?;
    Ok(at)
}

fn time(seen: &Value, field: &str) -> Result<Timestamp> {
    Ok(seen[field].as_str().with_context(|| format!("{field} of {seen}"))?.parse()?)
}

/// Whether a deadline was kept, by what the stack itself wrote about it.
fn kept(deadline: Timestamp, done: Timestamp) -> Result<()> {
    let late = done.duration_since(deadline).as_secs_f64();
    ensure!((0.0..1.0).contains(&late), "late by {late} s: {deadline} {done}");
    Ok(())
}

async fn pause_at_deadline(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({})).await?;
    let before = ask(&mut sandbox).await?;
    let deadline = set_deadline(&mut sandbox, "pause").await?;
    let path = sandbox.path("");
    // When it began to be paused is told as long as it is at it, and how long that takes is not its deadline's.
    let mut begun = None;
    let end = tokio::time::Instant::now() + Duration::from_secs(60);
    let seen = loop {
        let seen = sandbox.client.get(&path).await?.expect(200)?.json();
        match seen["status"].as_str() {
            Some("pausing") => begun = Some(time(&seen, "last_updated")?),
            Some("paused") => break seen,
            _ => {}
        }
        ensure!(tokio::time::Instant::now() < end, "{seen}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    kept(deadline, begun.map_or_else(|| time(&seen, "paused_at"), Ok)?)?;
    ensure!(time(&seen, "paused_at")? >= deadline, "{seen}");
    ensure!(seen["deadline"].is_null() && seen["deadline_action"].is_null(), "it is over: {seen}");

    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    let path = sandbox.path("/timeout");
    sandbox.client.patch(&path, &json!({ "timeout_sec": 0 })).await?.expect(200)?;
    let after = ask(&mut sandbox).await?;
    ensure!((&after.0, &after.1) == (&before.0, &before.1), "{before:?} became {after:?}");
    sandbox.destroy().await
}

async fn kill_at_deadline(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let deadline = set_deadline(&mut sandbox, "kill").await?;
    let id = sandbox.id.clone();
    crate::lifecycle::wait_for_status(&mut sandbox.client, &id, "stopped", Duration::from_secs(60)).await?;
    let seen = sandbox.client.get(&sandbox.path("")).await?.expect(200)?.json();
    ensure!(seen["end_reason"] == "deadline", "{seen}");
    kept(deadline, time(&seen, "last_updated")?)
}

async fn auto_resume(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({ "auto_resume": true })).await?;
    let before = ask(&mut sandbox).await?;
    for round in 0..3 {
        // While the answer to the pause is on its way, too: nobody is told that it is pausing.
        let (mut client, path) = (context.client(), sandbox.path("/pause"));
        let pausing = tokio::spawn(async move { client.post(&path, &json!({})).await });
        if round == 0 {
            pausing.await??.expect(200)?;
            let after = ask(&mut sandbox).await?;
            ensure!((&after.0, &after.1) == (&before.0, &before.1), "{before:?} became {after:?}");
            continue;
        }
        let id = sandbox.id.clone();
        crate::lifecycle::wait_for_status(
            &mut sandbox.client,
            &id,
            "pausing|paused",
            Duration::from_secs(60),
        )
        .await?;
        let after = ask(&mut sandbox).await?;
        ensure!((&after.0, &after.1) == (&before.0, &before.1), "{before:?} became {after:?}");
        let _ = pausing.await??;
    }
    // A stream does as well as a request.
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let mut socket = Socket::open(&sandbox.client, &sandbox.path("/exec/stream")).await?;
    socket.send(&json!({ "type": "start", "cmd": "echo", "args": ["awake"] })).await?;
    let said = socket.until("stdout").await?;
    ensure!(said["data"] == "awake\n", "{said}");
    sandbox.destroy().await
}

async fn destroy_paused(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    verb(&mut sandbox, "pause", &json!({}), "paused").await?;
    let path = sandbox.path("");
    sandbox.client.delete(&path).await?.expect(204)?;
    let seen = sandbox.client.get(&path).await?.expect(200)?.json();
    ensure!(seen["status"] == "stopped", "{seen}");
    let record = context.stack().dir().join("agent/sandboxes").join(&sandbox.id);
    ensure!(!record.exists(), "nothing is left of it");
    Ok(())
}

async fn many_callers(context: Arc<Context>) -> Result<()> {
    let mut sandbox = with_server(&context, &json!({})).await?;
    let before = ask(&mut sandbox).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..12_u32 {
        let (mut client, id) = (context.client(), sandbox.id.clone());
        let verb = ["pause", "resume", "pause", "resume"][number as usize % 4];
        tasks.spawn(async move { client.post(&format!("/v1/sandboxes/{id}/{verb}"), &json!({})).await });
    }
    while let Some(done) = tasks.join_next().await {
        let answer = done??;
        let status = answer.status.as_u16();
        ensure!(matches!(status, 200 | 202 | 409), "{status} {}", answer.text());
    }
    let id = sandbox.id.clone();
    crate::lifecycle::wait_for_status(&mut sandbox.client, &id, "running|paused", Duration::from_secs(60))
        .await?;
    verb(&mut sandbox, "resume", &json!({}), "running").await?;
    let after = ask(&mut sandbox).await?;
    ensure!((&after.0, &after.1) == (&before.0, &before.1), "{before:?} became {after:?}");
    sandbox.destroy().await
}

async fn network(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/network");
    let policy = sandbox.client.get(&path).await?.expect(200)?.json();
    ensure!(policy["internet"] == true || policy["allow_internet_access"] == true, "{policy}");
    let bad = sandbox.client.put(&path, r#"{"allow_cidrs": ["not a network"]}"#).await?;
    ensure!(bad.status == 400, "{} {}", bad.status, bad.text());
    sandbox.destroy().await
}
