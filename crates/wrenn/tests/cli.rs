//! The command line against a small API in this process: what goes over the wire, what comes out, exit codes.
#![allow(clippy::unwrap_used, reason = "the helpers of a test fail as the test does")]

mod fake_api;

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    process::{Output, Stdio},
    time::Duration,
};

use fake_api::{FakeApi, KEY};
use rustix::{
    process::{Pid, Signal, kill_process},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

const BOUND: Duration = Duration::from_secs(60);
const ID: &str = "sb-00000001";

fn wrenn(api: &FakeApi, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
    command
        .args(words)
        .env("WRENN_BASE_URL", api.base_url())
        .env("WRENN_API_KEY", KEY)
        .env_remove("WRENN_PROXY_DOMAIN");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn say(api: &FakeApi, words: &[&str]) -> Output {
    timeout(BOUND, wrenn(api, words).output()).await.unwrap().unwrap()
}

async fn say_with_input(api: &FakeApi, words: &[&str], input: &[u8]) -> Output {
    let mut child = wrenn(api, words).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writing = tokio::spawn(async move {
        // A command that ends before it has read everything is no failure of the test.
        let _ = stdin.write_all(&input).await;
    });
    let output = timeout(BOUND, child.wait_with_output()).await.unwrap().unwrap();
    writing.await.unwrap();
    output
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[tokio::test]
async fn where_a_port_is() {
    let api = FakeApi::start().await;
    let base_url = api.base_url();
    let (_, server_port) = base_url.rsplit_once(':').unwrap();
    let told = say(&api, &["sandbox", "url", ID, "8000"]).await;
    assert_eq!(stdout(&told), format!("http://8000-{ID}.localhost:{server_port}\n"));
    let named = ["--output", "json", "sandbox", "url", ID, "1"];
    let told =
        timeout(BOUND, wrenn(&api, &named).env("WRENN_PROXY_DOMAIN", "s.example.com:81").output()).await;
    let told: Value = serde_json::from_slice(&told.unwrap().unwrap().stdout).unwrap();
    assert_eq!(told, json!({ "url": format!("http://1-{ID}.s.example.com:81") }));
    for wrong in ["0", "65536", "http"] {
        assert_eq!(say(&api, &["sandbox", "url", ID, wrong]).await.status.code(), Some(2), "{wrong}");
    }
}

#[tokio::test]
async fn run_passes_output_and_exit_code_and_cleans_up() {
    let api = FakeApi::start().await;
    let output = say(
        &api,
        &[
            "run",
            "--template",
            "base",
            "--vcpus",
            "2",
            "--env",
            "A=b",
            "--no-internet",
            "--",
            "say",
            "out",
            "err",
            "7",
        ],
    )
    .await;
    assert_eq!((stdout(&output), stderr(&output), output.status.code()), ("out", "err", Some(7)));
    let created = api.requests("POST /v1/sandboxes");
    assert_eq!(created[0]["template"], "base");
    assert_eq!(created[0]["vcpus"], 2);
    assert_eq!(created[0]["allow_internet_access"], false);
    // If this process is killed, the sandbox goes by itself, and is not kept for later.
    assert!(created[0]["timeout_sec"].as_i64().unwrap() > 0);
    assert_eq!(created[0]["on_timeout"], "kill");
    let started = api.requests("exec/stream");
    assert_eq!(started[0]["envs"], json!({ "A": "b" }));
    assert!(api.sandboxes().is_empty());
}

#[tokio::test]
async fn output_that_is_not_utf8_comes_through() {
    let api = FakeApi::start().await;
    let output = say_with_input(&api, &["run", "--", "cat"], b"\xff\x00\xfe").await;
    assert_eq!((output.stdout.as_slice(), output.status.code()), (b"\xff\x00\xfe".as_slice(), Some(0)));
}

#[tokio::test]
async fn a_long_pipe_comes_through_whole() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let input: Vec<u8> = (0..4_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    let output = say_with_input(&api, &["sandbox", "exec", &id, "--", "cat"], &input).await;
    assert!(output.stdout == input, "{} of {} bytes", output.stdout.len(), input.len());
}

#[tokio::test]
async fn run_as_json_is_one_value() {
    let api = FakeApi::start().await;
    let output = say(&api, &["--output", "json", "run", "--", "say", "out", "err", "3"]).await;
    assert_eq!(output.status.code(), Some(3));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&value["stdout"], &value["stderr"], &value["exit_code"], &value["encoding"]),
        (&json!("out"), &json!("err"), &json!(3), &json!("utf-8"))
    );
    let output = say_with_input(&api, &["-o", "json", "run", "--", "cat"], b"\xff").await;
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&value["stdout"], &value["encoding"]), (&json!("/w=="), &json!("base64")));
}

#[tokio::test]
async fn a_command_that_a_signal_ended_has_the_code_of_a_shell() {
    let api = FakeApi::start().await;
    assert_eq!(say(&api, &["run", "--", "killed"]).await.status.code(), Some(137));
}

#[tokio::test]
async fn failures_of_run_have_their_own_codes() {
    let api = FakeApi::start().await;
    let output = say(&api, &["run", "--template", "nonesuch", "--", "true"]).await;
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("there is no template nonesuch"), "{}", stderr(&output));

    let output = say(&api, &["run", "--", "missing-program"]).await;
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("no such program"), "{}", stderr(&output));
    assert!(api.sandboxes().is_empty());

    assert_eq!(say(&api, &["run", "--", "too-slow"]).await.status.code(), Some(124));
    assert_eq!(say(&api, &["run"]).await.status.code(), Some(2));
}

#[tokio::test]
async fn a_server_that_goes_away_is_no_success() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let output = say(&api, &["sandbox", "exec", &id, "--", "vanish"]).await;
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("before the end"), "{}", stderr(&output));
}

#[tokio::test]
async fn ctrl_c_stops_the_command_and_cleans_up() {
    for (sent, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let api = FakeApi::start().await;
        let mut child = wrenn(&api, &["run", "--", "wait"]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert_eq!(timeout(BOUND, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("waiting"));
        assert_eq!(api.sandboxes().len(), 1);
        signal(&child, sent);
        assert_eq!(timeout(BOUND, child.wait()).await.unwrap().unwrap().code(), Some(code));
        assert_eq!(api.requests("stop").len(), 1);
        assert!(api.sandboxes().is_empty());
    }
}

#[tokio::test]
async fn ctrl_c_during_the_create_leaves_nothing() {
    let api = FakeApi::start().await;
    let mut child = wrenn(&api, &["run", "--template", "slow", "--", "true"]).spawn().unwrap();
    api.until_requested("POST /v1/sandboxes").await;
    signal(&child, Signal::INT);
    let mut said = String::new();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    timeout(BOUND, errors.read_line(&mut said)).await.unwrap().unwrap();
    assert!(said.contains("to destroy it"), "{said}");
    api.release();
    assert_eq!(timeout(BOUND, child.wait()).await.unwrap().unwrap().code(), Some(130));
    assert!(api.requests("exec/stream").is_empty());
    assert!(api.sandboxes().is_empty());
}

#[tokio::test]
async fn a_reader_that_has_seen_enough_ends_it() {
    let api = FakeApi::start().await;
    let mut child = wrenn(&api, &["run", "--", "flood"]).spawn().unwrap();
    let mut first = [0; 10];
    timeout(BOUND, child.stdout.as_mut().unwrap().read_exact(&mut first)).await.unwrap().unwrap();
    drop(child.stdout.take());
    assert_eq!(timeout(BOUND, child.wait()).await.unwrap().unwrap().code(), Some(141));
    assert!(api.sandboxes().is_empty());
}

#[tokio::test]
async fn create_list_get_rm() {
    let api = FakeApi::start().await;
    let output =
        say(&api, &["sandbox", "create", "--quiet", "--metadata", "a=b", "--timeout", "60", "--timings"])
            .await;
    let id = stdout(&output).trim().to_owned();
    assert_eq!(id, ID);
    assert!(
        stderr(&output).contains("restore") && stderr(&output).contains("41.5 ms"),
        "{}",
        stderr(&output)
    );
    let request = &api.requests("POST /v1/sandboxes")[0];
    assert_eq!((&request["metadata"], &request["timeout_sec"]), (&json!({ "a": "b" }), &json!(60)));

    let output = say(&api, &["sandbox", "list"]).await;
    assert!(stdout(&output).starts_with("ID") && stdout(&output).contains(&id), "{}", stdout(&output));
    let output =
        say(&api, &["sandbox", "list", "-o", "json", "--status", "running", "--metadata", "a=b c"]).await;
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list[0]["id"], ID);
    assert_eq!(api.requests("query").last().unwrap(), "status=running&metadata.a=b%20c");

    let output = say(&api, &["sandbox", "get", &id]).await;
    assert!(stdout(&output).contains("running"), "{}", stdout(&output));
    let output = say(&api, &["sandbox", "create", "--output", "json", "--timings"]).await;
    let created: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&created["status"], &created["timings"][0]["name"]), (&json!("running"), &json!("restore")));

    let output = say(&api, &["sandbox", "rm", &id, "sb-ffffffff"]).await;
    assert_eq!((stdout(&output).trim(), output.status.code()), (ID, Some(1)));
    assert!(stderr(&output).contains("sb-ffffffff"), "{}", stderr(&output));
    assert!(say(&api, &["sandbox", "rm", "--all"]).await.status.success());
    assert!(api.sandboxes().is_empty());
}

#[tokio::test]
async fn what_a_sandbox_has_used() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let output = say(&api, &["sandbox", "metrics", &id]).await;
    let lines: Vec<_> = stdout(&output).lines().map(str::split_whitespace).map(Vec::from_iter).collect();
    assert_eq!(lines[0], ["TIME", "CPU", "MEMORY", "DISK", "SENT", "RECEIVED"]);
    let row = ["2027-01-15T08:00:00Z", "97.2", "%", "64", "MiB", "12", "KiB", "9", "B/s", "0", "B/s"];
    assert_eq!(lines[1], row);
    let output = say(&api, &["sandbox", "metrics", &id, "--range", "24h", "-o", "json"]).await;
    let metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&metrics["range"], &metrics["points"][0]["cpu_pct"]), (&json!("24h"), &json!(97.25)));
    let output = say(&api, &["sandbox", "metrics", &id, "--range", "5m"]).await;
    assert!(output.status.success() && stderr(&output).contains("--range 24h"), "{}", stderr(&output));
    let output = say(&api, &["sandbox", "metrics", &id, "--range", "3h"]).await;
    assert!(output.status.code() == Some(2) && stderr(&output).contains("5m"), "{}", stderr(&output));
}

#[tokio::test]
async fn pause_resume_rollback() {
    let api = FakeApi::start().await;
    // The second takes its time, which is waited for.
    let (one, other) = (api.put_sandbox(), api.put_sandbox());
    let output = say(&api, &["sandbox", "pause", &one, &other, "-o", "json"]).await;
    let paused: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&paused[0]["status"], &paused[1]["status"]), (&json!("paused"), &json!("paused")));
    let output = say(&api, &["sandbox", "pause", "--disk-only", &one]).await;
    assert!(stdout(&output).contains("paused"), "{}", stdout(&output));
    assert_eq!(api.requests("pause"), [json!({}), json!({}), json!({ "memory": false })]);

    let output = say(&api, &["sandbox", "resume", &one, "sb-ffffffff", &other, "--timeout", "9"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot resume sb-ffffffff"), "{}", stderr(&output));
    assert_eq!(stdout(&output).matches("running").count(), 2, "{}", stdout(&output));
    assert_eq!(api.requests("resume"), [json!({ "timeout_sec": 9 }), json!({ "timeout_sec": 9 })]);

    assert!(say(&api, &["sandbox", "rollback", &other, "known"]).await.status.success());
    let output = say(&api, &["sandbox", "rollback", &one, "unknown"]).await;
    assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""));
}

#[tokio::test]
async fn forks_and_snapshots() {
    let api = FakeApi::start().await;
    let (one, other) = (api.put_sandbox(), api.put_sandbox());
    let output = say(&api, &["sandbox", "fork", &one, "-n", "2", "-m", "a=b", "--quiet"]).await;
    assert_eq!(stdout(&output), "sb-00000003\nsb-00000004\n");
    assert_eq!(api.requests("fork"), [json!({ "count": 2, "metadata": { "a": "b" } })]);

    let output = say(&api, &["snapshot", "create", &one, "first", "--quiet"]).await;
    assert_eq!(stdout(&output), "first\n");
    assert_eq!(say(&api, &["snapshot", "create", &one, "first"]).await.status.code(), Some(1));
    let output = say(&api, &["snapshot", "create", &one, "first", "--overwrite", "-o", "json"]).await;
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&made["name"], &made["type"]), (&json!("first"), &json!("snapshot")));
    assert_eq!(api.requests("snapshot").last().unwrap()["query"], "overwrite=true");
    assert_eq!(say(&api, &["snapshot", "create", &one, "--overwrite"]).await.status.code(), Some(2));
    // One that takes its time, with a name and without.
    for words in [&["snapshot", "create", &other, "slow", "-q"][..], &["snapshot", "create", &other, "-q"]] {
        let output = say(&api, words).await;
        let name = words.get(3).filter(|word| **word == "slow").copied().unwrap_or("s");
        assert!(output.status.success() && stdout(&output).starts_with(name), "{}", stderr(&output));
    }

    let output = say(&api, &["snapshot", "list"]).await;
    assert!(stdout(&output).contains("first") && stdout(&output).contains("3 MiB"), "{}", stdout(&output));
    assert_eq!(api.requests("snapshots").last().unwrap(), "type=snapshot");
    assert!(say(&api, &["snapshot", "ls", "--all", "--quiet"]).await.status.success());
    assert_eq!(api.requests("snapshots").last().unwrap(), &Value::Null);
    let output = say(&api, &["snapshot", "rm", "first", "nothing"]).await;
    assert_eq!((stdout(&output), output.status.code()), ("first\n", Some(1)));

    let words = ["sandbox", "create", "--from", "first", "--on-timeout", "kill", "--auto-resume"];
    assert!(say(&api, &words).await.status.success());
    let request = &api.requests("POST /v1/sandboxes")[0];
    let said = (&request["template"], &request["on_timeout"], &request["auto_resume"]);
    assert_eq!(said, (&json!("first"), &json!("kill"), &json!(true)));
    let both = ["run", "--from", "first", "--template", "base", "--", "true"];
    assert_eq!(say(&api, &both).await.status.code(), Some(2));
}

#[tokio::test]
async fn settings_are_shown_and_set() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let output = say(&api, &["sandbox", "network", &id]).await;
    assert!(stdout(&output).contains("203.0.113.0/24") && stdout(&output).contains("5 Mbit/s"));
    assert!(api.requests("network").is_empty(), "to look changes nothing");
    let words = ["sandbox", "network", &id, "--allow-domain", "a.example", "--allow-domain", "*.b.example"];
    assert!(say(&api, &words).await.status.success());
    assert!(say(&api, &["sandbox", "network", &id, "--no-internet", "-o", "json"]).await.status.success());
    assert_eq!(
        api.requests("network"),
        [json!({ "allow_domains": ["a.example", "*.b.example"] }), json!({ "allow_internet_access": false })]
    );

    assert!(say(&api, &["sandbox", "timeout", &id]).await.status.success());
    assert!(api.requests("timeout").is_empty(), "to look changes nothing");
    let words = ["sandbox", "timeout", &id, "--timeout", "60", "--deadline", "2100-01-01T00:00:00Z"];
    let output = say(&api, &[&words[..], &["--deadline-action", "kill"]].concat()).await;
    assert!(stdout(&output).contains("2100-01-01T00:00:00Z: kill"), "{}", stdout(&output));
    let request = json!({ "timeout_sec": 60, "deadline": "2100-01-01T00:00:00Z", "deadline_action": "kill" });
    assert_eq!(api.requests("timeout"), [request]);

    let words = ["sandbox", "create", "--deny-cidr", "203.0.113.0/24", "--egress-mbps", "7"];
    assert!(say(&api, &words).await.status.success());
    let request = &api.requests("POST /v1/sandboxes")[0];
    assert_eq!(request["network"], json!({ "deny_cidrs": ["203.0.113.0/24"], "egress_mbps": 7 }));
    let output = say(&api, &["completions", "bash"]).await;
    for word in ["pause", "rollback", "--overwrite", "--allow-domain"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
}

#[tokio::test]
async fn a_background_command_is_named() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let words =
        ["sandbox", "exec", "-b", "--user", "root", "--cwd", "/", "--tag", "t", &id, "--", "sleep", "9"];
    let output = say(&api, &words).await;
    assert!(output.status.success() && stdout(&output).contains("42"), "{}", stderr(&output));
    let request = &api.requests("exec")[0];
    assert_eq!(request["background"], true);
    assert_eq!(
        (&request["user"], &request["cwd"], &request["tag"]),
        (&json!("root"), &json!("/"), &json!("t"))
    );
}

#[tokio::test]
async fn files_go_both_ways() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    fs::write(path("data"), &content).unwrap();

    let cp = async |source: &str, destination: &str| {
        let output = say(&api, &["sandbox", "cp", source, destination]).await;
        assert!(output.status.success(), "{}", stderr(&output));
    };
    cp(&path("data"), &format!("{id}:/tmp/a ü?&x")).await;
    assert!(api.file("/tmp/a ü?&x").unwrap() == content);
    // Into a directory, whether or not it is written as one.
    cp(&path("data"), &format!("{id}:/dir")).await;
    cp(&path("data"), &format!("{id}:/new/")).await;
    cp(&path("data"), &format!("{id}:")).await;
    for stored in ["/dir/data", "/new/data", "data"] {
        assert!(api.file(stored).unwrap() == content, "{stored}");
    }
    cp(&format!("{id}:/dir/data"), &path("copy")).await;
    assert!(fs::read(path("copy")).unwrap() == content);
    fs::create_dir(path("into")).unwrap();
    cp(&format!("{id}:/dir/data"), &path("into")).await;
    assert!(fs::read(path("into/data")).unwrap() == content);

    let remote = format!("{id}:/piped");
    let output = say_with_input(&api, &["sandbox", "cp", "-", &remote], &content).await;
    assert!(output.status.success(), "{}", stderr(&output));
    let output = say(&api, &["sandbox", "cp", &remote, "-"]).await;
    assert!(output.stdout == content);
}

#[tokio::test]
async fn a_copy_that_fails_leaves_what_was_there() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("target");
    fs::write(&target, "before").unwrap();
    for source in ["/missing", "/cut"] {
        let words = ["sandbox", "cp", &format!("{id}:{source}"), target.to_str().unwrap()];
        let output = say(&api, &words).await;
        assert_eq!(output.status.code(), Some(1), "{source}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "before");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    let words = ["sandbox", "cp", directory.path().to_str().unwrap(), &format!("{id}:/x")];
    assert!(stderr(&say(&api, &words).await).contains("is a directory"));
    for words in [["a", "b"], ["sb-00000001:/a", "sb-00000001:/b"]] {
        assert_eq!(say(&api, &["sandbox", "cp", words[0], words[1]]).await.status.code(), Some(1));
    }
}

#[tokio::test]
async fn nothing_there_says_what_to_do() {
    let api = FakeApi::start().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = wrenn(&api, &["sandbox", "list"]);
    command.env("WRENN_BASE_URL", format!("http://{free}"));
    let output = timeout(BOUND, command.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot connect") && stderr(&output).contains("wrenn dev"),
        "{}",
        stderr(&output)
    );

    let mut command = wrenn(&api, &["sandbox", "list", "--output", "json"]);
    command.env("WRENN_API_KEY", "wrn_ffffffffffffffffffffffffffffffff");
    let output = timeout(BOUND, command.output()).await.unwrap().unwrap();
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["code"], "unauthorized");

    let elsewhere = tempfile::tempdir().unwrap();
    let mut command = wrenn(&api, &["run", "--", "true"]);
    command.env_remove("WRENN_BASE_URL").env_remove("WRENN_API_KEY").env_remove("WRENN_DIR");
    command.current_dir(elsewhere.path());
    let output = timeout(BOUND, command.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains(".wrenn/env"), "{}", stderr(&output));
    // The stack of the directory one is in.
    fs::create_dir(elsewhere.path().join(".wrenn")).unwrap();
    let env = format!("export WRENN_BASE_URL={}\nexport WRENN_API_KEY={KEY}\n", api.base_url());
    fs::write(elsewhere.path().join(".wrenn/env"), env).unwrap();
    assert!(timeout(BOUND, command.status()).await.unwrap().unwrap().success());
}

#[tokio::test]
async fn a_doctor_that_refuses_has_a_code_of_its_own() {
    let api = FakeApi::start().await;
    // Whatever this host is: QEMU is not for production.
    let output = say(&api, &["doctor", "--json", "--vmm", "qemu", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["schema"], &report["production"]), (&json!(1), &json!(false)));
    let findings = report["findings"].as_array().unwrap();
    let of = |name: &str| findings.iter().find(|finding| finding["name"] == name).unwrap();
    assert_eq!((&of("vmm")["outcome"], &of("vmm")["blocks"]), (&json!("failure"), &json!(true)));
    assert_eq!(of("ports")["outcome"], "ok");

    let table = say(&api, &["doctor", "--vmm", "qemu", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(table.status.code(), Some(3));
    assert!(stdout(&table).contains("failure vmm"), "{}", stdout(&table));
    assert!(stdout(&table).contains("Production must not start here"), "{}", stdout(&table));
}

#[tokio::test]
async fn completions_are_printed() {
    let api = FakeApi::start().await;
    for shell in ["bash", "zsh", "fish"] {
        let output = say(&api, &["completions", shell]).await;
        assert!(output.status.success() && stdout(&output).contains("sandbox"), "{shell}");
        assert!(!stdout(&output).contains("unprivileged"), "{shell}");
    }
}

/// Both ends of a terminal.
fn terminal() -> (OwnedFd, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
    (ours, theirs)
}

fn size(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

#[tokio::test]
async fn a_shell_is_raw_resizes_and_gives_the_terminal_back() {
    let api = FakeApi::start().await;
    let id = api.put_sandbox();
    let (ours, theirs) = terminal();
    tcsetwinsize(&ours, size(100, 30)).unwrap();
    let before = tcgetattr(&theirs).unwrap();
    assert!(before.local_modes.contains(LocalModes::ICANON));
    let words = ["sandbox", "shell", "--user", "root", &id];
    let mut command = wrenn(&api, &words);
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap()).env("TERM", "vt100");
    let mut child = command.spawn().unwrap();
    let mut screen = tokio::fs::File::from_std(fs::File::from(ours.try_clone().unwrap()));
    let mut keys = tokio::fs::File::from_std(fs::File::from(ours.try_clone().unwrap()));

    let mut shown = Vec::new();
    let mut until_shown = async |text: &str| {
        let reading = async {
            while !String::from_utf8_lossy(&shown).contains(text) {
                let mut piece = [0; 1024];
                let length = screen.read(&mut piece).await.unwrap();
                shown.extend_from_slice(&piece[..length]);
            }
        };
        assert!(timeout(BOUND, reading).await.is_ok(), "never shown: {text}");
    };
    until_shown("welcome 100x30").await;
    let raw = tcgetattr(theirs.as_fd()).unwrap();
    assert!(!raw.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    let start = &api.requests("terminal")[0];
    assert_eq!((&start["user"], &start["envs"]["TERM"]), (&json!("root"), &json!("vt100")));

    // Ctrl-C is a key like any other.
    keys.write_all(b"a\x03b").await.unwrap();
    keys.flush().await.unwrap();
    until_shown("a\u{3}b").await;
    tcsetwinsize(&ours, size(120, 40)).unwrap();
    signal(&child, Signal::WINCH);
    until_shown("resized 120x40").await;

    keys.write_all(b"exit").await.unwrap();
    keys.flush().await.unwrap();
    assert_eq!(timeout(BOUND, child.wait()).await.unwrap().unwrap().code(), Some(3));
    let after = tcgetattr(theirs.as_fd()).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
}

#[tokio::test]
async fn a_shell_that_is_left_gives_the_terminal_back() {
    for way in ["signal", "keys", "server"] {
        let api = FakeApi::start().await;
        let id = api.put_sandbox();
        let (ours, theirs) = terminal();
        let before = tcgetattr(&theirs).unwrap();
        let mut command = wrenn(&api, &["sandbox", "shell", &id]);
        command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        let mut errors = child.stderr.take().unwrap();
        api.until_requested("resize").await;
        let mut keys = tokio::fs::File::from_std(fs::File::from(ours.try_clone().unwrap()));
        let code = match way {
            "signal" => {
                signal(&child, Signal::TERM);
                143
            }
            "keys" => {
                keys.write_all(b"\r~.").await.unwrap();
                keys.flush().await.unwrap();
                0
            }
            _ => {
                keys.write_all(b"vanish").await.unwrap();
                keys.flush().await.unwrap();
                125
            }
        };
        assert_eq!(timeout(BOUND, child.wait()).await.unwrap().unwrap().code(), Some(code), "{way}");
        assert_eq!(tcgetattr(theirs.as_fd()).unwrap().local_modes, before.local_modes, "{way}");
        let mut said = String::new();
        timeout(BOUND, errors.read_to_string(&mut said)).await.unwrap().unwrap();
        let expected = if way == "server" { "before the end" } else { "--connect pty-00000001" };
        assert!(said.contains(expected), "{way}: {said}");
    }
}
