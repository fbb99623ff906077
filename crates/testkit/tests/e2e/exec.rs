//! Running commands.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use base64::Engine as _;
use serde_json::json;

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("exec::output_exit_code_and_errors_come_back", comes_back),
        case("exec::environment_directory_and_user_are_taken", surroundings),
        case("exec::output_that_is_no_text_travels_as_base64", no_text),
        case("exec::standard_input_is_given", standard_input),
        case("exec::a_timeout_kills_the_whole_group", timeout_kills),
        case("exec::a_background_process_is_listed_and_killed", background),
        case("exec::a_grandchild_that_keeps_the_output_does_not_hold_the_answer", grandchild),
        case("exec::many_short_commands_lose_nothing", many),
        case("exec::a_missing_command_user_or_directory_is_named", missing),
    ]
}

async fn comes_back(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let result = sandbox.shell("echo out; echo err >&2; exit 7").await?;
    ensure!(result["stdout"] == "out\n" && result["stderr"] == "err\n", "{result}");
    ensure!(result["exit_code"] == 7 && result["encoding"] == "utf-8", "{result}");
    ensure!(result["sandbox_id"] == sandbox.id.as_str() && result["duration_ms"].is_u64(), "{result}");
    let killed = sandbox.shell("kill -9 $$").await?;
    ensure!(killed["exit_code"] != 0, "{killed}");
    sandbox.destroy().await
}

async fn surroundings(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let body = json!({
        "cmd": "/bin/sh", "args": ["-c", "echo $A; pwd; id -un; echo $HOME"],
        "envs": { "A": "b c" }, "cwd": "/var/tmp", "user": "root",
    });
    let result = sandbox.exec(&body).await?;
    ensure!(result["stdout"] == "b c\n/var/tmp\nroot\n/root\n", "{result}");
    let plain = sandbox.output("echo $A; pwd; id -un; echo $HOME").await?;
    ensure!(
        plain == "\n/home/user\nuser\n/home/user\n",
        "nothing of one command stays for the next: {plain}"
    );
    sandbox.destroy().await
}

async fn no_text(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let result = sandbox.shell("printf '\\377\\000a'").await?;
    ensure!(result["encoding"] == "base64", "{result}");
    let bytes = base64::engine::general_purpose::STANDARD.decode(result["stdout"].as_str().unwrap())?;
    ensure!(bytes == b"\xff\x00a", "{bytes:?}");
    sandbox.destroy().await
}

async fn standard_input(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let result = sandbox.exec(&json!({ "cmd": "wc", "args": ["-c"], "stdin": "12345" })).await?;
    ensure!(result["stdout"].as_str().unwrap().trim() == "5", "{result}");
    let none = sandbox.exec(&json!({ "cmd": "cat" })).await?;
    ensure!(none["exit_code"] == 0 && none["stdout"] == "", "without input it is at its end: {none}");
    sandbox.destroy().await
}

async fn timeout_kills(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let body = json!({ "cmd": "/bin/sh", "args": ["-c", "sleep 321 & sleep 321"], "timeout_sec": 1 });
    let path = sandbox.path("/exec");
    let answer = sandbox.client.post(&path, &body).await?;
    ensure!(answer.status.is_client_error() || answer.status.is_server_error(), "{}", answer.text());
    ensure!(answer.error_code().contains("timeout"), "{}", answer.text());
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    // The brackets keep the pattern from finding the shell that looks for it.
    while sandbox.output("pgrep -fc 'sleep 32[1]' || true").await?.trim() != "0" {
        ensure!(tokio::time::Instant::now() < end, "the group is still there");
    }
    sandbox.destroy().await
}

async fn background(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/exec");
    let body = json!({ "cmd": "sleep", "args": ["300"], "background": true, "tag": "mine" });
    let started = sandbox.client.post(&path, &body).await?.expect(202)?.json();
    ensure!(started["tag"] == "mine" && started["pid"].as_u64().is_some_and(|pid| pid > 1), "{started}");
    let processes = sandbox.path("/processes");
    let listed = sandbox.client.get(&processes).await?.expect(200)?.json();
    let mine = listed["processes"].as_array().unwrap().iter().find(|one| one["tag"] == "mine");
    ensure!(mine.is_some_and(|one| one["pid"] == started["pid"]), "{listed}");
    sandbox.client.delete(&format!("{processes}/mine")).await?.expect(204)?;
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        let listed = sandbox.client.get(&processes).await?.expect(200)?.json();
        if listed["processes"].as_array().unwrap().iter().all(|one| one["tag"] != "mine") {
            break;
        }
        ensure!(tokio::time::Instant::now() < end, "{listed}");
    }
    sandbox.client.delete(&format!("{processes}/mine")).await?.expect(404)?;
    sandbox.destroy().await
}

async fn grandchild(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let begin = tokio::time::Instant::now();
    let result = sandbox.shell("sleep 60 & echo done").await?;
    ensure!(result["stdout"] == "done\n", "{result}");
    ensure!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    sandbox.destroy().await
}

async fn many(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    for number in 0..50 {
        let said = sandbox.output(&format!("echo {number}; echo and {number}")).await?;
        ensure!(said == format!("{number}\nand {number}\n"), "{said}");
    }
    sandbox.destroy().await
}

async fn missing(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/exec");
    for (body, word) in [
        (json!({ "cmd": "no-such-command" }), "no-such-command"),
        (json!({ "cmd": "true", "user": "nobody-like-this" }), "nobody-like-this"),
        (json!({ "cmd": "true", "cwd": "/no/such/directory" }), "/no/such/directory"),
    ] {
        let answer = sandbox.client.post(&path, &body).await?;
        ensure!(answer.status.is_client_error(), "{body}: {} {}", answer.status, answer.text());
        ensure!(answer.text().contains(word), "{body}: {}", answer.text());
    }
    sandbox.destroy().await
}
