//! What breaks, and what is left of it: nothing, and a true answer.

use std::time::{Duration, Instant};

use axum::routing::post;
use bytes::Bytes;
use connectrpc::ConnectError;
use http::header::CONTENT_TYPE;
use serde_json::json;
use wrenn_control_plane::Bounds;
use wrenn_proto::hostagent::v1 as wire;

use super::support::{World, agent::QUIET, eventually, postgres::Cluster, short_bounds};

async fn status(world: &World, id: &str) -> String {
    world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"].as_str().unwrap().to_owned()
}

async fn rows(world: &World) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM sandboxes").fetch_one(&world.database().await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_the_host_cannot_do_leaves_nothing() {
    let world = World::new().await;
    for (error, status, code, destroyed) in [
        (ConnectError::invalid_argument("the disk is too small"), 400, "invalid_request", false),
        (ConnectError::resource_exhausted("the host's disk is full"), 503, "host_unavailable", false),
        (ConnectError::unavailable("qemu-system-x86_64 is missing"), 503, "host_unavailable", false),
        (ConnectError::internal("something broke"), 502, "agent_error", true),
        (ConnectError::deadline_exceeded("the guest did not come up"), 503, "host_unavailable", true),
    ] {
        let before = world.agent.destroyed().len();
        let message = error.message.clone().unwrap();
        world.agent.faults(|faults| faults.create = Some(error));
        let answer = world.client.post("/v1/sandboxes", json!({})).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{}", answer.text());
        if status != 503 || code == "agent_error" || !destroyed {
            assert!(answer.text().contains(&message), "{}", answer.text());
        }
        assert_eq!(world.agent.destroyed().len() > before, destroyed, "{message}");
        assert_eq!(rows(&world).await, 0, "{message}");
    }
    world.agent.faults(|faults| faults.create = None);
    world.sandbox().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_ends_by_itself_is_known_to_have() {
    let world = World::new().await;
    let id = world.sandbox().await;
    assert_eq!(world.client.shell(&id, "true").await.status, 200);
    let client = world.client.clone();
    let running = tokio::spawn({
        let id = id.clone();
        async move { client.shell(&id, "sleep 86500").await }
    });
    eventually("the command runs", async || {
        let path = format!("/v1/sandboxes/{id}/processes");
        world.client.get(&path).await.json()["processes"].as_array().unwrap().len() == 1
    })
    .await;
    world.agent.crash(&id);
    let broken = running.await.unwrap();
    assert_eq!((broken.status.as_u16(), broken.code().as_str()), (409, "invalid_state"), "{}", broken.text());
    eventually("it has stopped", async || status(&world, &id).await == "stopped").await;
    let one = world.client.get(&format!("/v1/sandboxes/{id}")).await.json();
    assert_eq!(one["end_reason"], "vmm_crash");
    assert_eq!(one["end_message"], "the virtual machine monitor was killed by signal 9");
    let refused = world.client.shell(&id, "true").await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (409, "invalid_state"));
    assert!(refused.text().contains("signal 9"), "{}", refused.text());
}

/// It was taken for the end of the process, which went on for nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_which_nothing_more_is_told_is_killed() {
    // A message that says that process 7 was started, and then the end of the stream, without an error.
    const TOLD: &[u8] = b"\0\0\0\0\x06\x0a\x04\x0a\x02\x08\x07\x02\0\0\0\x02{}";
    let world = World::new().await;
    let id = world.sandbox().await;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let answer = |kind: &'static str, body: &'static [u8]| ([(CONTENT_TYPE, kind)], body);
    let start = async move || answer("application/connect+proto", TOLD);
    let signal = async move |request: Bytes| {
        tell.send(request).unwrap();
        answer("application/proto", b"")
    };
    let guest = axum::Router::new()
        .route("/process.Process/Start", post(start))
        .route("/process.Process/SendSignal", post(signal));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.agent.put_guest(&id, listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, guest).await });

    let answer = world.client.shell(&id, "sleep 86500").await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "agent_error"), "{}", answer.text());
    let request = tokio::time::timeout(Duration::from_secs(20), told.recv()).await.unwrap().unwrap();
    // Process 7, and SIGKILL.
    assert_eq!(request[..], [0x0a, 2, 8, 7, 0x10, 9]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_of_a_host_that_was_away_is_settled_when_it_is_back() {
    // No comparison would take the intent for a lost one, nor the host for a missing one.
    let never = Duration::from_secs(3600);
    let bounds = Bounds { start_grace: never, sweep: never, host_missing: never, ..short_bounds() };
    let mut world = World::with(bounds, Cluster::shared().database().await).await;
    let (paused, snapshotted) = (world.sandbox().await, world.sandbox().await);
    world.agent.go_away().await;
    let answer = world.client.post(&format!("/v1/sandboxes/{paused}/pause"), json!({})).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "host_unavailable"));
    let answer = world.client.post("/v1/snapshots", json!({ "sandbox_id": snapshotted })).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "host_unavailable"));
    assert_eq!(status(&world, &paused).await, "pausing");
    assert_eq!(status(&world, &snapshotted).await, "snapshotting");
    world.agent.serve();
    for id in [&paused, &snapshotted] {
        eventually("it runs, as its host says", async || status(&world, id).await == "running").await;
        assert_eq!(world.client.shell(id, "true").await.status, 200);
    }
    let answer = world.client.post(&format!("/v1/sandboxes/{paused}/pause"), json!({})).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["status"]),
        (200, &json!("paused")),
        "{}",
        answer.text()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_goes_away_and_comes_back() {
    let mut world = World::new().await;
    let (kept, lost, deleted) = (world.sandbox().await, world.sandbox().await, world.sandbox().await);
    assert_eq!(world.client.shell(&kept, "true").await.status, 200);
    world.agent.go_away().await;

    let begin = Instant::now();
    for answer in [
        world.client.post("/v1/sandboxes", json!({})).await,
        world.client.shell(&kept, "true").await,
        world.client.get(&format!("/v1/sandboxes/{kept}/files?path=/etc/hostname")).await,
        world.client.get("/v1/templates").await,
        world.client.delete(&format!("/v1/sandboxes/{deleted}")).await,
    ] {
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "host_unavailable"));
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    eventually("it is missing", async || status(&world, &kept).await == "missing").await;
    assert_eq!(status(&world, &deleted).await, "stopping");

    world.agent.lose(&lost);
    world.agent.serve();
    eventually("it runs again", async || status(&world, &kept).await == "running").await;
    eventually("the other has stopped", async || status(&world, &lost).await == "stopped").await;
    eventually("what was to go has gone", async || status(&world, &deleted).await == "stopped").await;
    assert_eq!(world.agent.sandboxes(), std::slice::from_ref(&kept));
    assert_eq!(world.client.shell(&kept, "echo still here").await.json()["stdout"], "still here\n");
    assert_eq!(rows(&world).await, 3, "the create that was refused has left a row");
}

/// What its host could not read was called ended, and destroyed once it could be read again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_cannot_read_is_there_when_it_can_again() {
    use wire::SandboxState::{SANDBOX_STATE_PAUSED, SANDBOX_STATE_RUNNING, SANDBOX_STATE_UNREADABLE};
    let mut world = World::new().await;
    let (runs, sleeps) = (world.sandbox().await, world.sandbox().await);
    let answer = world.client.post(&format!("/v1/sandboxes/{sleeps}/pause"), json!({})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let lost = world.sandbox().await;
    world.agent.go_away().await;
    world.agent.lose(&lost);
    world.agent.make_unknown("sb-0badcafe").await;
    for id in [runs.as_str(), sleeps.as_str(), "sb-0badcafe"] {
        world.agent.tell(id, SANDBOX_STATE_UNREADABLE);
    }
    world.agent.serve();
    // What is not there at all is called ended when the two are compared.
    eventually("they are compared", async || status(&world, &lost).await == "stopped").await;
    assert!(["running", "missing"].contains(&status(&world, &runs).await.as_str()));
    assert_eq!(status(&world, &sleeps).await, "paused");
    world.agent.lose("sb-0badcafe");

    let lost = world.sandbox().await;
    world.agent.go_away().await;
    world.agent.lose(&lost);
    world.agent.tell(&runs, SANDBOX_STATE_RUNNING);
    world.agent.tell(&sleeps, SANDBOX_STATE_PAUSED);
    world.agent.serve();
    eventually("they are compared", async || status(&world, &lost).await == "stopped").await;
    eventually("it runs", async || status(&world, &runs).await == "running").await;
    assert_eq!(status(&world, &sleeps).await, "paused");
    assert_eq!(world.agent.destroyed(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_knows_is_destroyed() {
    let mut world = World::new().await;
    let kept = world.sandbox().await;
    // One is there when the control plane comes, one appears while it looks on.
    world.agent.go_away().await;
    world.agent.make_unknown("sb-0badcafe").await;
    world.agent.serve();
    eventually("the first is destroyed", async || world.agent.sandboxes() == std::slice::from_ref(&kept))
        .await;
    world.agent.make_unknown("sb-1badcafe").await;
    eventually("the second is destroyed", async || world.agent.sandboxes() == std::slice::from_ref(&kept))
        .await;
    assert_eq!(status(&world, &kept).await, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_dies_in_the_middle_of_a_create() {
    let mut world = World::new().await;
    world.agent.faults(|faults| faults.hold_creates = true);
    let client = world.client.clone();
    let creating = tokio::spawn(async move {
        let request = client.request(http::Method::POST, "/v1/sandboxes");
        client
            .try_send(request.body(super::support::client::full("{}")).unwrap())
            .await
            .map(|answer| answer.status())
    });
    eventually("the create has reached the host", async || world.agent.creates().len() == 1).await;
    let id = world.agent.creates()[0].sandbox_id.clone();

    // One that the host never heard of, as after a death a moment earlier.
    let database = world.database().await;
    sqlx::query(
        "INSERT INTO sandboxes (id, team_id, host_id, template, state, generation, vcpus, memory_mb, timeout_sec,
             allow_internet_access, access_token)
         SELECT 'sb-00000001', team_id, host_id, template, 'starting', 1, 1, 512, 0, true, 'x' FROM sandboxes",
    )
    .execute(&database)
    .await
    .unwrap();

    world.kill_and_start().await;
    creating.abort();
    world.agent.release();
    eventually("the one that came up after all runs", async || status(&world, &id).await == "running").await;
    assert_eq!(world.client.shell(&id, "echo here").await.json()["stdout"], "here\n");
    eventually("the other is in error", async || status(&world, "sb-00000001").await == "error").await;
    assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    assert!(world.agent.sandboxes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_away_and_comes_back() {
    let cluster = Cluster::start();
    let world = World::with(short_bounds(), cluster.database().await).await;
    let id = world.sandbox().await;

    // One create is at the host when the database goes.
    world.agent.faults(|faults| faults.hold_creates = true);
    let client = world.client.clone();
    let creating = tokio::spawn(async move { client.post("/v1/sandboxes", json!({})).await });
    eventually("the create has reached the host", async || world.agent.creates().len() == 2).await;
    tokio::task::block_in_place(|| cluster.stop());
    world.agent.release();

    let begin = Instant::now();
    let answer = creating.await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "unavailable"), "{}", answer.text());
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(world.agent.sandboxes(), std::slice::from_ref(&id), "a sandbox that no row tells of");
    while begin.elapsed() < Duration::from_secs(8) {
        let asked = Instant::now();
        for answer in [
            world.client.get("/v1/sandboxes").await,
            world.client.post("/v1/sandboxes", json!({})).await,
            world.client.delete(&format!("/v1/sandboxes/{id}")).await,
        ] {
            assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "unavailable"));
        }
        assert!(asked.elapsed() < Duration::from_secs(9), "{:?}", asked.elapsed());
    }
    assert_eq!(world.client.get("/health").await.status, 200);
    tokio::task::block_in_place(|| cluster.bring_back());
    eventually("it answers again", async || world.client.get("/v1/sandboxes").await.status == 200).await;

    assert_eq!(world.client.shell(&id, "echo fine").await.json()["stdout"], "fine\n");
    let other = world.sandbox().await;
    eventually("the create that was broken off is in error", async || {
        world.client.get("/v1/sandboxes?status=error").await.json().as_array().unwrap().len() == 1
    })
    .await;
    for id in [&id, &other] {
        assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    }
    assert!(world.agent.sandboxes().is_empty());
    assert_eq!(world.client.get("/v1/sandboxes").await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_leaves_no_half_create() {
    let world = World::new().await;
    world.agent.faults(|faults| faults.hold_creates = true);
    let client = world.client.clone();
    let creating = tokio::spawn(async move { client.post("/v1/sandboxes", json!({})).await });
    eventually("the create has reached the host", async || world.agent.creates().len() == 1).await;
    creating.abort();
    tokio::time::sleep(QUIET).await;
    world.agent.release();
    let id = world.agent.creates()[0].sandbox_id.clone();
    eventually("it runs", async || status(&world, &id).await == "running").await;
    assert_eq!(world.agent.sandboxes(), [id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let world = World::new().await;
    let creates = (0..16).map(|_| world.client.post("/v1/sandboxes", json!({})));
    let ids: Vec<String> = futures::future::join_all(creates)
        .await
        .iter()
        .map(|answer| answer.json()["id"].as_str().unwrap().to_owned())
        .collect();
    let execs = ids.iter().flat_map(|id| (0..4).map(move |_| id)).map(|id| world.client.shell(id, "echo ok"));
    for answer in futures::future::join_all(execs).await {
        assert_eq!(answer.json()["stdout"], "ok\n");
    }
    let deletes = ids.iter().map(|id| format!("/v1/sandboxes/{id}"));
    let deletes = deletes.map(|path| async {
        let path = path;
        world.client.delete(&path).await
    });
    for answer in futures::future::join_all(deletes).await {
        assert_eq!(answer.status, 204);
    }
    assert!(world.agent.sandboxes().is_empty());
}
