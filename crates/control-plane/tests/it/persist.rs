//! Pause, resume, and what breaks between them.

use std::time::Duration;

use connectrpc::ConnectError;
use http::Method;
use serde_json::{Value, json};
use wrenn_proto::hostagent::v1::SandboxState as Host;

use super::support::{World, agent::QUIET, client::Answer, eventually, postgres::Cluster, short_bounds};

async fn status(world: &World, id: &str) -> String {
    world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"].as_str().unwrap().to_owned()
}

async fn verb(world: &World, id: &str, verb: &str) -> Answer {
    world.client.post_bytes(&format!("/v1/sandboxes/{id}/{verb}"), "").await
}

#[track_caller]
fn assert_answer(answer: &Answer, status: u16, state: &str) {
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["status"]),
        (status, &json!(state)),
        "{}",
        answer.text()
    );
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, code: &str, names: &str) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{}", answer.text());
    assert!(answer.text().contains(names), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_paused_and_resumed() {
    let world = World::new().await;
    let id = world.sandbox().await;
    assert_eq!(world.client.shell(&id, "true").await.status, 200);
    let base = format!("/v1/sandboxes/{id}");

    let paused = verb(&world, &id, "pause").await;
    assert_answer(&paused, 200, "paused");
    assert!(paused.json()["paused_at"].as_str().unwrap().ends_with('Z'), "{}", paused.text());
    assert_eq!(world.agent.state(&id), Some(Host::SANDBOX_STATE_PAUSED));
    let shown = world.client.get(&base).await.json();
    assert_eq!((&shown["status"], &shown["disk_used_mb"]), (&json!("paused"), &json!(7)));
    assert_eq!(world.client.get("/v1/sandboxes").await.json()[0]["status"], "paused");

    // To pause it again is no error, and no command.
    assert_answer(&world.client.post(&format!("{base}/pause"), json!({"memory": true})).await, 200, "paused");
    assert_eq!(world.agent.commanded("pause").len(), 1);
    for answer in [
        world.client.shell(&id, "true").await,
        world.client.get(&format!("{base}/files?path=/etc/hostname")).await,
        world.client.get(&format!("{base}/processes")).await,
        world.client.post(&format!("{base}/ping"), json!({})).await,
    ] {
        assert_refused(&answer, 409, "invalid_state", "paused");
    }

    let resumed = world.client.post(&format!("{base}/resume"), json!({"timeout_sec": 77})).await;
    assert_answer(&resumed, 200, "running");
    assert_eq!(resumed.headers["server-timing"], "load;dur=2.500");
    assert_eq!((&resumed.json()["timeout_sec"], &resumed.json()["paused_at"]), (&json!(77), &Value::Null));
    assert_eq!(world.client.shell(&id, "echo back").await.json()["stdout"], "back\n");
    assert_answer(&verb(&world, &id, "resume").await, 200, "running");
    let commands = world.agent.commanded("resume");
    assert_eq!((commands.len(), commands[0].generation), (1, 3), "each intent has a generation of its own");

    assert_answer(
        &world.client.post(&format!("{base}/pause"), json!({"memory": false})).await,
        200,
        "paused",
    );
    assert_eq!(world.agent.commanded("pause disk").len(), 1);
    assert_eq!(world.client.delete(&base).await.status, 204);
    assert!(world.agent.sandboxes().is_empty());
    for word in ["pause", "resume"] {
        assert_refused(&verb(&world, &id, word).await, 409, "invalid_state", "stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_leaves_what_was_there() {
    let world = World::new().await;
    let id = world.sandbox().await;
    for (error, status, code) in [
        (ConnectError::resource_exhausted("the host's disk is full"), 503, "host_unavailable"),
        (ConnectError::internal("the pages were not written"), 502, "agent_error"),
        (ConnectError::failed_precondition("not now"), 409, "invalid_state"),
    ] {
        let message = error.message.clone().unwrap();
        world.agent.faults(|faults| faults.pause = Some(error));
        assert_refused(&verb(&world, &id, "pause").await, status, code, &message);
        assert_eq!(super::persist::status(&world, &id).await, "running");
        assert_eq!(world.client.shell(&id, "echo here").await.json()["stdout"], "here\n");
    }
    world.agent.faults(|faults| faults.pause = None);
    assert_answer(&verb(&world, &id, "pause").await, 200, "paused");
    world.agent.faults(|faults| faults.resume = Some(ConnectError::internal("state: its digest is wrong")));
    assert_refused(&verb(&world, &id, "resume").await, 502, "agent_error", "digest");
    assert_eq!(status(&world, &id).await, "paused");
    world.agent.faults(|faults| faults.resume = None);
    assert_answer(&verb(&world, &id, "resume").await, 200, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let (one, other) = tokio::join!(verb(&world, &id, "pause"), verb(&world, &id, "pause"));
    assert_answer(&one, 200, "paused");
    assert_answer(&other, 200, "paused");
    assert_eq!(world.agent.commanded("pause").len(), 1);

    world.agent.faults(|faults| faults.hold_resumes = true);
    let resumes = (0..8).map(|_| {
        let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/resume"));
        tokio::spawn(async move { client.post(&path, json!({})).await })
    });
    let resumes: Vec<_> = resumes.collect();
    eventually("a resume has begun", async || status(&world, &id).await == "resuming").await;
    for word in ["pause", "fork"] {
        assert_refused(&verb(&world, &id, word).await, 409, "invalid_state", "resuming");
    }
    assert_refused(&world.client.shell(&id, "true").await, 409, "invalid_state", "resuming");
    world.agent.release();
    for resume in resumes {
        assert_answer(&resume.await.unwrap(), 200, "running");
    }
    assert_eq!(world.agent.commanded("resume").len(), 1);

    // All of those who wait for a resume that fails are told that it has.
    verb(&world, &id, "pause").await;
    world.agent.faults(|faults| {
        faults.hold_resumes = true;
        faults.resume = Some(ConnectError::internal("it does not come up"));
    });
    let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/resume"));
    let first = tokio::spawn(async move { client.post(&path, json!({})).await });
    eventually("a resume has begun", async || status(&world, &id).await == "resuming").await;
    let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/resume"));
    let second = tokio::spawn(async move { client.post(&path, json!({})).await });
    tokio::time::sleep(QUIET).await;
    world.agent.release();
    assert_refused(&first.await.unwrap(), 502, "agent_error", "does not come up");
    assert_refused(&second.await.unwrap(), 409, "invalid_state", "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_overtakes_everything() {
    let world = World::new().await;
    for word in ["pause", "resume", "snapshot"] {
        let id = world.sandbox().await;
        if word == "resume" {
            assert_answer(&verb(&world, &id, "pause").await, 200, "paused");
        }
        world.agent.faults(|faults| {
            faults.hold_pauses = true;
            faults.hold_resumes = true;
            faults.hold_snapshots = true;
        });
        let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/{word}"));
        let (path, body) = match word {
            "snapshot" => ("/v1/snapshots".to_owned(), json!({"sandbox_id": id, "name": "overtaken"})),
            _ => (path, json!({})),
        };
        let doing = tokio::spawn(async move { client.post(&path, body).await });
        eventually("it has begun", async || {
            let begun =
                [Host::SANDBOX_STATE_PAUSING, Host::SANDBOX_STATE_RESUMING, Host::SANDBOX_STATE_SNAPSHOTTING];
            world.agent.state(&id).is_some_and(|state| begun.contains(&state))
        })
        .await;
        assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
        // Nothing is let go: who waited is told at once.
        let told = tokio::time::timeout(Duration::from_secs(20), doing).await;
        assert_refused(&told.unwrap().unwrap(), 409, "conflict", "destroyed");
        world.agent.release();
        tokio::time::sleep(QUIET).await;
        assert!(world.agent.snapshots().is_empty());
        assert_eq!(status(&world, &id).await, "stopped");
        assert!(world.agent.sandboxes().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_breaks_a_command_and_says_so() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let client = world.client.clone();
    let running = tokio::spawn({
        let id = id.clone();
        async move { client.shell(&id, "sleep 86501").await }
    });
    eventually("the command runs", async || {
        let path = format!("/v1/sandboxes/{id}/processes");
        world.client.get(&path).await.json()["processes"].as_array().unwrap().len() == 1
    })
    .await;
    assert_answer(&verb(&world, &id, "pause").await, 200, "paused");
    assert_refused(&running.await.unwrap(), 409, "invalid_state", "paus");
    assert_answer(&verb(&world, &id, "resume").await, 200, "running");
    assert_eq!(world.client.shell(&id, "echo on").await.json()["stdout"], "on\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_pauses_by_itself_is_paused_at_once() {
    let mut world = World::new().await;
    let (seen, missed) = (world.sandbox().await, world.sandbox().await);
    assert_eq!(world.client.shell(&seen, "true").await.status, 200);
    world.agent.pause_by_itself(&seen);
    // Well within a sweep: it was pushed.
    eventually("it is paused", async || status(&world, &seen).await == "paused").await;
    assert_refused(&world.client.shell(&seen, "true").await, 409, "invalid_state", "paused");

    // One that fails leaves it running, and says so.
    world.agent.begin_pause_by_itself(&missed);
    eventually("it is pausing", async || status(&world, &missed).await == "pausing").await;
    world.agent.fail_pause_by_itself(&missed, "the host's disk is full");
    eventually("it runs", async || status(&world, &missed).await == "running").await;
    let shown = world.client.get(&format!("/v1/sandboxes/{missed}")).await.json();
    assert_eq!(shown["last_failure"], "the host's disk is full");
    assert_eq!(world.client.shell(&missed, "echo on").await.json()["stdout"], "on\n");

    // What happened while nobody looked is found, and is never called stopped.
    world.agent.go_away().await;
    eventually("it is missing", async || status(&world, &missed).await == "missing").await;
    assert_eq!(status(&world, &seen).await, "paused", "nothing can have happened to it");
    world.agent.pause_by_itself(&missed);
    world.agent.serve();
    eventually("it is paused", async || status(&world, &missed).await == "paused").await;
    for id in [&seen, &missed] {
        assert_answer(&verb(&world, id, "resume").await, 200, "running");
    }

    // A paused sandbox that its host does not have is no sandbox that was stopped.
    verb(&world, &seen, "pause").await;
    world.agent.lose(&seen);
    eventually("it is in error", async || status(&world, &seen).await == "error").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_dies_in_between() {
    let mut world = World::new().await;
    let (pausing, resuming, unheard) = (world.sandbox().await, world.sandbox().await, world.sandbox().await);
    assert_answer(&verb(&world, &resuming, "pause").await, 200, "paused");
    world.agent.faults(|faults| {
        faults.hold_pauses = true;
        faults.hold_resumes = true;
    });
    let mut calls = Vec::new();
    for (id, word) in [(&pausing, "pause"), (&resuming, "resume")] {
        let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/{word}"));
        calls.push(tokio::spawn(async move {
            let request = client.request(Method::POST, &path);
            let body = super::support::client::full("");
            client.try_send(request.body(body).unwrap()).await.map(|answer| answer.status())
        }));
    }
    eventually("both have begun", async || {
        world.agent.state(&pausing) == Some(Host::SANDBOX_STATE_PAUSING)
            && world.agent.state(&resuming) == Some(Host::SANDBOX_STATE_RESUMING)
    })
    .await;
    world.kill_and_start().await;
    // An intent of which the host never heard.
    sqlx::query("UPDATE sandboxes SET state = 'pausing', generation = 9, last_updated = now() WHERE id = $1")
        .bind(&unheard)
        .execute(&world.database().await)
        .await
        .unwrap();
    eventually("it runs, as its host says", async || status(&world, &unheard).await == "running").await;
    assert_eq!(status(&world, &pausing).await, "pausing");
    assert_eq!(status(&world, &resuming).await, "resuming");
    world.agent.release();
    eventually("one is paused", async || status(&world, &pausing).await == "paused").await;
    eventually("the other runs", async || status(&world, &resuming).await == "running").await;
    for call in calls {
        call.abort();
    }
    assert_eq!(world.client.shell(&resuming, "echo here").await.json()["stdout"], "here\n");

    // What its host does by itself counts, although it has not heard of the newest intent.
    world.agent.pause_by_itself(&unheard);
    eventually("it is paused", async || status(&world, &unheard).await == "paused").await;
    for id in [&pausing, &unheard] {
        assert_answer(&verb(&world, id, "resume").await, 200, "running");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_is_answered_with_its_state() {
    let bounds =
        wrenn_control_plane::Bounds { lifecycle_answer: Duration::from_millis(300), ..short_bounds() };
    let world = World::with(bounds, Cluster::shared().database().await).await;
    let id = world.sandbox().await;
    world.agent.faults(|faults| {
        faults.hold_pauses = true;
        faults.hold_resumes = true;
    });
    assert_answer(&verb(&world, &id, "pause").await, 202, "pausing");
    world.agent.release();
    eventually("it is paused", async || status(&world, &id).await == "paused").await;
    world.agent.faults(|faults| faults.hold_resumes = true);
    assert_answer(&verb(&world, &id, "resume").await, 202, "resuming");
    world.agent.release();
    eventually("it runs", async || status(&world, &id).await == "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_resume_for_all_who_need_it() {
    let world = World::new().await;
    let created = world.client.post("/v1/sandboxes", json!({"auto_resume": true})).await.json();
    assert_eq!(created["auto_resume"], true);
    let id = created["id"].as_str().unwrap().to_owned();
    assert_eq!(world.client.shell(&id, "true").await.status, 200);
    for by_itself in [false, true] {
        let before = world.agent.commanded("resume").len();
        if by_itself {
            world.agent.pause_by_itself(&id);
            eventually("it is paused", async || status(&world, &id).await == "paused").await;
        } else {
            assert_answer(&verb(&world, &id, "pause").await, 200, "paused");
        }
        let execs = (0..8).map(|_| world.client.shell(&id, "echo awake"));
        for answer in futures::future::join_all(execs).await {
            assert_eq!(answer.json()["stdout"], "awake\n");
        }
        assert_eq!(world.agent.commanded("resume").len(), before + 1);
    }

    // A pause that is under way is waited for.
    world.agent.faults(|faults| faults.hold_pauses = true);
    let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/pause"));
    let pausing = tokio::spawn(async move { client.post(&path, json!({})).await });
    eventually("a pause has begun", async || status(&world, &id).await == "pausing").await;
    let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}/files?path=/etc/passwd"));
    let reading = tokio::spawn(async move { client.get(&path).await });
    tokio::time::sleep(QUIET).await;
    world.agent.release();
    assert_answer(&pausing.await.unwrap(), 200, "paused");
    assert_eq!(reading.await.unwrap().status, 200);

    // So is one that its host has begun by itself.
    world.agent.begin_pause_by_itself(&id);
    eventually("a pause has begun", async || status(&world, &id).await == "pausing").await;
    let client = world.client.clone();
    let running = tokio::spawn({
        let id = id.clone();
        async move { client.shell(&id, "echo awake").await }
    });
    tokio::time::sleep(QUIET).await;
    world.agent.pause_by_itself(&id);
    assert_eq!(running.await.unwrap().json()["stdout"], "awake\n");

    // One of which nobody has heard yet is found when its guest is asked for.
    for round in 0..5 {
        let before = world.agent.commanded("resume").len();
        let what = format!("round {round}");
        world.agent.pause_unheard(&id);
        let answer = match round {
            0 => world.client.get(&format!("/v1/sandboxes/{id}/processes")).await,
            1 => world.client.get(&format!("/v1/sandboxes/{id}/files?path=/etc/passwd")).await,
            2 => {
                let path = format!("/v1/sandboxes/{id}/files?path=/tmp/{id}");
                let put = world.client.request(Method::PUT, &path);
                world.client.whole(put.body(super::support::client::full(what.clone())).unwrap()).await
            }
            _ => world.client.shell(&id, "echo awake").await,
        };
        assert!(answer.status.is_success(), "{what}: {}", answer.text());
        assert_eq!(world.agent.commanded("resume").len(), before + 1, "{what}");
    }

    // A resume that fails is the error of who needed it.
    assert_answer(&verb(&world, &id, "pause").await, 200, "paused");
    world.agent.faults(|faults| faults.resume = Some(ConnectError::internal("the snapshot is broken")));
    assert_refused(&world.client.shell(&id, "true").await, 502, "agent_error", "broken");
    assert_eq!(status(&world, &id).await, "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    for (path, body, names) in [
        ("pause", "[]", "JSON"),
        ("pause", r#"{"memory": "no"}"#, "memory"),
        ("resume", r#"{"timeout_sec": -1}"#, "timeout_sec"),
        ("rollback", "{}", "snapshot"),
        ("rollback", r#"{"snapshot": "../.."}"#, "snapshot"),
        ("fork", r#"{"count": 0}"#, "count"),
        ("fork", r#"{"count": 21}"#, "count"),
        ("fork", r#"{"metadata": {"a b": ""}}"#, "metadata"),
    ] {
        let answer = world.client.post_bytes(&format!("{base}/{path}"), body).await;
        assert_refused(&answer, 400, "invalid_request", names);
    }
    for path in ["pause", "resume", "fork"] {
        assert_refused(&verb(&world, "sb-00000000", path).await, 404, "not_found", "sb-00000000");
        assert_refused(&verb(&world, "..%2F..", path).await, 404, "not_found", "..");
    }
    assert_eq!(status(&world, &id).await, "running");
}
