//! The command line, as a person uses it.

use std::{process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};
use wrenn_testkit::stack;

use crate::context::{Case, Context, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("command_line::run_streams_and_passes_the_exit_code", run_passes),
        case("command_line::a_sandbox_from_create_to_rm", whole_life),
        case("command_line::errors_say_what_to_do", errors),
        case("command_line::completions_are_there", completions),
    ]
}

/// What a command said and how it ended.
struct Said {
    code: i32,
    out: String,
    err: String,
}

async fn wrenn(context: &Context, arguments: &[&str], input: &[u8]) -> Result<Said> {
    let running = context.stack();
    let mut child = Command::new(stack::binary()?)
        .args(arguments)
        .env("WRENN_BASE_URL", running.base_url())
        .env("WRENN_API_KEY", running.key())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin is piped")?;
    stdin.write_all(input).await?;
    drop(stdin);
    let output = timeout(Duration::from_secs(120), child.wait_with_output()).await??;
    Ok(Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

async fn run_passes(context: Arc<Context>) -> Result<()> {
    let line = "import sys; print('hello'); print('oops', file=sys.stderr); sys.exit(3)";
    let said = wrenn(&context, &["run", "--", "python3", "-c", line], b"").await?;
    ensure!(
        said.code == 3 && said.out == "hello\n" && said.err.contains("oops"),
        "{} {} {}",
        said.code,
        said.out,
        said.err
    );
    Ok(())
}

async fn whole_life(context: Arc<Context>) -> Result<()> {
    let created = wrenn(&context, &["--output", "json", "sandbox", "create"], b"").await?;
    ensure!(created.code == 0, "{}", created.err);
    let id = serde_json::from_str::<Value>(&created.out)?["id"].as_str().context("an id")?.to_owned();
    let said = wrenn(&context, &["sandbox", "exec", &id, "--", "echo", "from inside"], b"").await?;
    ensure!(said.code == 0 && said.out == "from inside\n", "{} {}", said.out, said.err);

    let files = tempfile::tempdir()?;
    let (up, down) = (files.path().join("up"), files.path().join("down"));
    std::fs::write(&up, vec![7_u8; 3 << 20])?;
    let remote = format!("{id}:/home/user/copied");
    let said = wrenn(&context, &["sandbox", "cp", up.to_str().unwrap(), &remote], b"").await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = wrenn(&context, &["sandbox", "cp", &remote, down.to_str().unwrap()], b"").await?;
    ensure!(said.code == 0, "{}", said.err);
    ensure!(std::fs::read(&down)? == std::fs::read(&up)?, "what goes up comes down");

    let listed = wrenn(&context, &["sandbox", "list", "--output", "json"], b"").await?;
    let all: Value = serde_json::from_str(&listed.out)?;
    ensure!(all.as_array().unwrap().iter().any(|one| one["id"] == id.as_str()), "{all}");
    let got = wrenn(&context, &["sandbox", "get", &id], b"").await?;
    ensure!(got.code == 0 && got.out.contains(&id) && got.out.contains("running"), "{}", got.out);
    let removed = wrenn(&context, &["sandbox", "rm", &id], b"").await?;
    ensure!(removed.code == 0, "{}", removed.err);
    let gone = wrenn(&context, &["sandbox", "get", &id, "--output", "json"], b"").await?;
    ensure!(serde_json::from_str::<Value>(&gone.out)?["status"] == "stopped", "{}", gone.out);
    Ok(())
}

async fn errors(context: Arc<Context>) -> Result<()> {
    let unknown = wrenn(&context, &["sandbox", "exec", "sb-00000000", "--", "true"], b"").await?;
    ensure!(unknown.code != 0 && unknown.err.contains("sb-00000000"), "{} {}", unknown.code, unknown.err);
    let output = Command::new(stack::binary()?)
        .args(["sandbox", "list"])
        .env("WRENN_BASE_URL", "http://127.0.0.1:9")
        .env("WRENN_API_KEY", context.stack().key())
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && text.contains("wrenn dev"), "{text}");
    Ok(())
}

async fn completions(context: Arc<Context>) -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let said = wrenn(&context, &["completions", shell], b"").await?;
        ensure!(said.code == 0 && said.out.contains("sandbox"), "{shell}: {}", said.err);
    }
    Ok(())
}
