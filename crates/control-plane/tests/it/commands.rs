//! Commands whose answer is one document, and processes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::{World, agent::QUIET, client::full, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_command_and_all_that_can_be_said_of_it() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let exec = format!("/v1/sandboxes/{id}/exec");
    let answer = world
        .client
        .post(
            &exec,
            json!({
                "cmd": "/bin/sh", "args": ["-c", "pwd; echo $GREETING $0; cat; echo oops >&2; exit 7", "zero"],
                "cwd": "/usr", "envs": {"GREETING": "hello"}, "stdin": "typed", "user": "root",
                "background": false, "tag": null,
            }),
        )
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    assert_eq!(json["stdout"], "/usr\nhello zero\ntyped");
    assert_eq!(json["stderr"], "oops\n");
    assert_eq!((&json["exit_code"], &json["encoding"]), (&json!(7), &json!("utf-8")));
    assert_eq!((&json["sandbox_id"], &json["cmd"]), (&json!(id), &json!("/bin/sh")));
    assert_eq!((&json["truncated"], json["duration_ms"].is_u64()), (&json!(false), true));

    let bytes = world.client.shell(&id, r"printf '\377\000x'; printf ok >&2").await.json();
    assert_eq!(bytes["encoding"], "base64");
    assert_eq!((&bytes["stdout"], &bytes["stderr"]), (&json!("/wB4"), &json!("b2s=")));

    let killed = world.client.shell(&id, "kill -9 $$").await.json();
    assert_eq!(killed["exit_code"], -1);
    assert!(killed["status"].as_str().unwrap().contains("killed"), "{killed}");
    // A command that reads nothing of what it is given, and one that is given nothing.
    let deaf = world.client.post(&exec, json!({"cmd": "true", "stdin": "x".repeat(500_000)})).await;
    assert_eq!(deaf.json()["exit_code"], 0, "{}", deaf.text());
    assert_eq!(world.client.post(&exec, json!({"cmd": "cat"})).await.json()["stdout"], "");
    // One that writes much before it reads.
    let both = json!({
        "cmd": "/bin/sh", "args": ["-c", "head -c 3000000 /dev/zero | tr '\\0' y; cat"], "stdin": "z".repeat(300_000),
    });
    let both = world.client.post(&exec, both).await.json();
    assert_eq!(both["stdout"].as_str().unwrap().len(), 3_300_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_are_kept_for_the_next_command() {
    let world = World::new().await;
    let id = world.sandbox().await;
    for _ in 0..20 {
        assert_eq!(world.client.shell(&id, "true").await.status, 200);
    }
    assert!(world.agent.tunnels() <= 3, "{} tunnels for 20 commands in a row", world.agent.tunnels());
}

#[tokio::test(flavor = "multi_thread")]
async fn output_has_a_bound_and_the_command_none() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let answer = world.client.shell(&id, "head -c 40000000 /dev/zero | tr '\\0' x; exit 3").await;
    assert_eq!(answer.status, 200);
    let json = answer.json();
    assert_eq!(json["stdout"].as_str().unwrap().len(), 16 << 20);
    assert_eq!((&json["truncated"], &json["exit_code"]), (&json!(true), &json!(3)));
}

fn is_running(marker: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        std::fs::read(entry.path().join("cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(marker))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_takes_too_long_is_killed() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let exec = format!("/v1/sandboxes/{id}/exec");
    let begin = Instant::now();
    let answer = world
        .client
        .post(&exec, json!({"cmd": "/bin/sh", "args": ["-c", "sleep 86123 & sleep 86123"], "timeout_sec": 1}))
        .await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (504, "timeout"));
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(answer.text().contains("1 s"), "{}", answer.text());
    eventually("the whole group is killed", async || !is_running("sleep\086123")).await;
    assert_eq!(
        world.client.get(&format!("/v1/sandboxes/{id}/processes")).await.json(),
        json!({"processes": []})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_dies_with_its_caller() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let body = json!({"cmd": "sleep", "args": ["86124"], "timeout_sec": 600}).to_string();
    let request = world.client.request(http::Method::POST, &format!("/v1/sandboxes/{id}/exec"));
    let request = request.header("connection", "close").body(full(body)).unwrap();
    let client = world.client.clone();
    let calling = tokio::spawn(async move { client.send(request).await.status() });
    eventually("it runs", async || is_running("sleep\086124")).await;
    calling.abort();
    eventually("it is killed", async || !is_running("sleep\086124")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn background_commands_run_on_until_they_are_ended() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    let exec = format!("{base}/exec");
    let processes = async || {
        let listed = world.client.get(&format!("{base}/processes")).await.json();
        let mut listed: Vec<Value> = listed["processes"].as_array().unwrap().clone();
        listed.sort_by_key(|process| process["pid"].as_u64());
        listed
    };

    let named = json!({"cmd": "sleep", "args": ["86125"], "background": true, "tag": "my-server"});
    let named = world.client.post(&exec, named).await;
    assert_eq!(named.status, 202, "{}", named.text());
    let named = named.json();
    assert_eq!((&named["tag"], &named["cmd"]), (&json!("my-server"), &json!("sleep")));
    let unnamed =
        world.client.post(&exec, json!({"cmd": "sleep", "args": ["86125"], "background": true})).await;
    let unnamed = unnamed.json();
    let tag = unnamed["tag"].as_str().unwrap();
    assert!(tag.starts_with("proc-") && tag.len() == 13, "{tag}");

    tokio::time::sleep(QUIET).await;
    let listed = processes().await;
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0]["pid"], named["pid"]);
    assert_eq!((&listed[0]["cmd"], &listed[0]["args"]), (&json!("sleep"), &json!(["86125"])));

    assert_eq!(world.client.delete(&format!("{base}/processes/my-server?signal=SIGTERM")).await.status, 204);
    let pid = &unnamed["pid"];
    assert_eq!(world.client.delete(&format!("{base}/processes/{pid}")).await.status, 204);
    eventually("both have ended", async || processes().await.is_empty()).await;
    assert_eq!(world.client.delete(&format!("{base}/processes/{pid}")).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_caller_breaks_off_is_in_the_audit_log() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let begun = scratch.path().join("begun");
    let line = format!("touch {}; sleep 86100", begun.display());
    let exec = format!("/v1/sandboxes/{id}/exec");
    let asked = world.client.post(&exec, json!({"cmd": "/bin/sh", "args": ["-c", line]}));
    tokio::select! {
        answer = asked => panic!("{answer:?}"),
        () = eventually("the command has begun", async || begun.exists()) => {}
    }
    let database = world.database().await;
    eventually("it is recorded", async || {
        let rows: Vec<String> = sqlx::query_scalar("SELECT status FROM audit_log WHERE action = 'exec'")
            .fetch_all(&database)
            .await
            .unwrap();
        rows == ["abandoned"]
    })
    .await;
}
