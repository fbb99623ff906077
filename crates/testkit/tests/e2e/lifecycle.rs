//! Create, look, list, destroy; what is left afterwards.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use wrenn_testkit::socket::Socket;

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("lifecycle::a_sandbox_runs_python_and_goes", runs_python),
        case("lifecycle::a_destroyed_sandbox_answers_stopped_and_leaves_nothing", leaves_nothing),
        case("lifecycle::lists_filter_and_page", lists),
        case("lifecycle::what_is_asked_for_is_given", resources),
        case("lifecycle::an_idle_sandbox_ends_and_a_busy_one_does_not", inactivity),
        case("lifecycle::a_killed_machine_is_noticed_at_once", killed_machine),
        case("lifecycle::aliases_of_the_template_have_their_user", aliases),
        case("lifecycle::eight_at_once", eight_at_once),
        case("lifecycle::the_old_paths_are_the_same_router", old_paths),
    ]
}

async fn runs_python(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let result = sandbox.exec(&json!({ "cmd": "python3", "args": ["-c", "print(sum(range(10)))"] })).await?;
    ensure!(result["stdout"] == "45\n" && result["exit_code"] == 0, "{result}");
    sandbox.destroy().await
}

async fn leaves_nothing(context: Arc<Context>) -> Result<()> {
    let stack = context.stack();
    let mut client = context.client();
    let sandbox = Sandbox::create(context.client()).await?;
    let id = sandbox.id.clone();
    let instance = stack.instance()?;
    let process = format!("guest=wrenn-{instance}-{id}");
    ensure!(process_exists(&process)?, "there is a machine");
    let files = stack.dir().join("agent/sandboxes").join(&id);
    ensure!(files.exists(), "there is a directory");

    sandbox.destroy().await?;
    ensure!(!process_exists(&process)?, "the machine is gone");
    ensure!(!files.exists(), "the directory is gone");
    ensure!(!std::path::Path::new(&format!("/run/wrenn/{instance}/vm/{id}")).exists(), "so are the sockets");

    let path = format!("/v1/sandboxes/{id}");
    let found = client.get(&path).await?.expect(200)?.json();
    ensure!(found["status"] == "stopped", "{found}");
    client.delete(&path).await?.expect(204)?;
    let listed = client.get("/v1/sandboxes").await?.expect(200)?.json();
    ensure!(listed.as_array().unwrap().iter().all(|one| one["id"] != id.as_str()), "{listed}");
    client.post(&format!("{path}/exec"), &json!({ "cmd": "true" })).await?.expect(409)?;
    Ok(())
}

/// Whether a process has an argument that begins so.
pub(crate) fn process_exists(argument: &str) -> Result<bool> {
    for entry in std::fs::read_dir("/proc")? {
        let Ok(line) = std::fs::read(entry?.path().join("cmdline")) else { continue };
        if line.split(|byte| *byte == 0).any(|word| word.starts_with(argument.as_bytes())) {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn lists(context: Arc<Context>) -> Result<()> {
    let mark = format!("lists-{}", std::process::id());
    let mut made = Vec::new();
    for number in 0..3 {
        let body = json!({ "metadata": { "mark": mark, "number": number.to_string() } });
        made.push(Sandbox::create_with(context.client(), &body).await?);
    }
    let mut client = context.client();
    let query = format!("/v1/sandboxes?metadata.mark={mark}");
    let all = client.get(&query).await?.expect(200)?.json();
    let ids: Vec<_> = all.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    let expected: Vec<_> = made.iter().rev().map(|sandbox| sandbox.id.as_str()).collect();
    ensure!(ids == expected, "newest first: {ids:?} against {expected:?}");
    let one = client.get(&format!("{query}&metadata.number=1")).await?.expect(200)?.json();
    ensure!(one.as_array().unwrap().len() == 1 && one[0]["id"] == made[1].id.as_str(), "{one}");

    let mut seen = Vec::new();
    let mut token = String::new();
    for _ in 0..5 {
        let page = client.get(&format!("{query}&limit=1{token}")).await?.expect(200)?;
        seen.extend(page.json().as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()));
        match page.headers.get("x-next-token").map(|next| next.to_str().unwrap().to_owned()) {
            Some(next) if !next.is_empty() => token = format!("&next_token={next}"),
            _ => break,
        }
    }
    ensure!(seen == expected, "page by page: {seen:?} against {expected:?}");
    let none = client.get(&format!("{query}&status=paused")).await?.expect(200)?.json();
    ensure!(none.as_array().unwrap().is_empty(), "{none}");
    for sandbox in made {
        sandbox.destroy().await?;
    }
    Ok(())
}

async fn resources(context: Arc<Context>) -> Result<()> {
    let body =
        json!({ "vcpus": 2, "memory_mb": 384, "disk_size_mb": 3072, "envs": { "FROM_CREATE": "yes" } });
    let mut sandbox = Sandbox::create_with(context.client(), &body).await?;
    ensure!(sandbox.output("nproc").await?.trim() == "2", "two processors");
    let memory: u64 =
        sandbox.output("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").await?.trim().parse()?;
    ensure!((256..=384).contains(&memory), "{memory} MiB of memory");
    let disk: u64 = sandbox.output("df -m --output=size / | tail -1").await?.trim().parse()?;
    ensure!((2700..=3072).contains(&disk), "{disk} MiB of disk");
    ensure!(sandbox.output("echo $FROM_CREATE").await?.trim() == "yes", "the environment of the create");
    let found = sandbox.client.get(&sandbox.path("")).await?.json();
    ensure!(found["vcpus"] == 2 && found["memory_mb"] == 384 && found["disk_size_mb"] == 3072, "{found}");
    ensure!(found["disk_used_mb"].is_u64(), "{found}");
    sandbox.destroy().await?;

    let mut usual = Sandbox::create(context.client()).await?;
    let disk: u64 = usual.output("df -m --output=size / | tail -1").await?.trim().parse()?;
    ensure!((19_000..=20_480).contains(&disk), "{disk} MiB of disk");
    usual.destroy().await
}

async fn inactivity(context: Arc<Context>) -> Result<()> {
    let body = json!({ "timeout_sec": 4, "on_timeout": "kill" });
    let idle = Sandbox::create_with(context.client(), &body).await?;
    // Each is used as soon as it is there: on a machine that is busy the next create may take as long as the timeout.
    // One that works hard, and whom nobody follows.
    let mut left = Sandbox::create_with(context.client(), &body).await?;
    let work = "while :; do echo much; done";
    let work = json!({ "cmd": "/bin/sh", "args": ["-c", work], "background": true });
    let path = left.path("/exec");
    left.client.post(&path, &work).await?.expect(202)?;
    // One that says nothing, and is followed.
    let shown = Sandbox::create_with(context.client(), &body).await?;
    let mut socket = Socket::open(&shown.client, &shown.path("/terminal")).await?;
    socket.send(&json!({ "type": "start", "cmd": "sleep", "args": ["11"] })).await?;
    socket.until("started").await?;
    let mut busy = Sandbox::create_with(context.client(), &body).await?;
    let result = busy.exec(&json!({ "cmd": "sleep", "args": ["9"] })).await?;
    ensure!(result["exit_code"] == 0, "a running command is activity: {result}");
    let exit = socket.until("exit").await.context("an open terminal is activity")?;
    ensure!(exit["exit_code"] == 0, "{exit}");
    let mut client = context.client();
    for gone in [&idle.id, &left.id] {
        wait_for_status(&mut client, gone, "stopped", Duration::from_secs(5)).await?;
    }
    for used in [&busy.id, &shown.id] {
        wait_for_status(&mut client, used, "stopped", Duration::from_secs(20)).await?;
    }
    Ok(())
}

/// Asks until a sandbox has one of these statuses, with a bar between them.
pub(crate) async fn wait_for_status(
    client: &mut wrenn_testkit::Client,
    id: &str,
    statuses: &str,
    bound: Duration,
) -> Result<()> {
    let end = tokio::time::Instant::now() + bound;
    loop {
        let found = client.get(&format!("/v1/sandboxes/{id}")).await?.expect(200)?.json();
        if statuses.split('|').any(|status| found["status"] == status) {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < end, "{id} is still {}", found["status"]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn killed_machine(context: Arc<Context>) -> Result<()> {
    let stack = context.stack();
    let sandbox = Sandbox::create(context.client()).await?;
    let argument = format!("guest=wrenn-{}-{}", stack.instance()?, sandbox.id);
    let found = wrenn_host_linux::process::find_by_argument(&argument)?;
    ensure!(found.len() == 1, "one machine, not {}", found.len());
    found[0].process.kill()?;
    let mut client = context.client();
    wait_for_status(&mut client, &sandbox.id, "stopped", Duration::from_secs(3)).await?;
    let ended = client.get(&format!("/v1/sandboxes/{}", sandbox.id)).await?.expect(200)?.json();
    ensure!(ended["end_reason"] == "vmm_crash", "{ended}");
    let files = stack.dir().join("agent/sandboxes").join(&sandbox.id);
    ensure!(!files.exists(), "nothing is left of it");
    Ok(())
}

async fn aliases(context: Arc<Context>) -> Result<()> {
    for (template, user) in [("base", "user"), ("minimal", "wrenn-user"), ("minimal-ubuntu", "wrenn-user")] {
        let mut sandbox = Sandbox::create_with(context.client(), &json!({ "template": template })).await?;
        let said = sandbox.output("id -un; pwd; sudo -n id -un; which python git curl bash").await?;
        let lines: Vec<_> = said.lines().collect();
        ensure!(lines[..3] == [user, &format!("/home/{user}"), "root"], "{template}: {said}");
        ensure!(lines.len() == 7, "{template}: {said}");
        sandbox.destroy().await?;
    }
    Ok(())
}

async fn eight_at_once(context: Arc<Context>) -> Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..8 {
        let client = context.client();
        tasks.spawn(async move {
            let mut sandbox = Sandbox::create(client).await?;
            let said = sandbox.output(&format!("echo {number}")).await?;
            ensure!(said.trim() == number.to_string(), "{said}");
            sandbox.destroy().await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

async fn old_paths(context: Arc<Context>) -> Result<()> {
    let sandbox = Sandbox::create(context.client()).await?;
    let mut client = context.client();
    for prefix in ["/v1/capsules", "/api/v1/capsules", "/api/v1/sandboxes"] {
        let found = client.get(&format!("{prefix}/{}", sandbox.id)).await?.expect(200)?.json();
        ensure!(found["id"] == sandbox.id.as_str(), "{found}");
    }
    sandbox.destroy().await
}
