//! Snapshots, what is made from them, forks and rollbacks.

use std::time::Duration;

use connectrpc::ConnectError;
use serde_json::{Value, json};
use wrenn_proto::hostagent::v1::SandboxState as Host;

use super::support::{World, agent::QUIET, client::Answer, eventually, postgres::Cluster, short_bounds};

async fn snapshot(world: &World, id: &str, name: &str) -> Answer {
    world.client.post("/v1/snapshots", json!({"sandbox_id": id, "name": name})).await
}

async fn names(world: &World) -> Vec<String> {
    let listed = world.client.get("/v1/snapshots?type=snapshot").await.json();
    listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

async fn count(world: &World, statement: &'static str) -> i64 {
    sqlx::query_scalar(statement).fetch_one(&world.database().await).await.unwrap()
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, code: &str, names: &str) {
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (status, code), "{}", answer.text());
    assert!(answer.text().contains(names), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_from_its_making_to_its_end() {
    let world = World::new().await;
    let body = json!({"vcpus": 2, "memory_mb": 256, "disk_size_mb": 2048});
    let id = world.client.post("/v1/sandboxes", body).await.json()["id"].as_str().unwrap().to_owned();
    let made = snapshot(&world, &id, "first").await;
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.json();
    for (field, value) in [
        ("name", json!("first")),
        ("type", json!("snapshot")),
        ("platform", json!(false)),
        ("sandbox_id", json!(id)),
        ("template", json!("base")),
        ("vcpus", json!(2)),
        ("memory_mb", json!(256)),
        ("minimum_disk_mb", json!(2048)),
        ("size_bytes", json!(3 << 20)),
        ("has_memory", json!(true)),
    ] {
        assert_eq!(made[field], value, "{field}");
    }
    assert!(made["created_at"].as_str().unwrap().ends_with('Z'));
    let number = made["id"].as_str().unwrap().to_owned();
    assert_eq!(world.agent.snapshots(), std::slice::from_ref(&number));
    // The sandbox goes on.
    assert_eq!(world.client.shell(&id, "echo on").await.json()["stdout"], "on\n");
    assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "running");

    // It is listed with the templates, and found by both of its names.
    let all = world.client.get("/v1/snapshots").await.json();
    let all: Vec<&Value> = all.as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(all, ["base", "minimal", "first"]);
    for name in ["first", &number] {
        assert_eq!(world.client.get(&format!("/v1/snapshots/{name}")).await.json(), made);
    }
    assert_eq!(world.client.get("/v1/snapshots/base").await.json()["type"], "base");

    // What is made from it has its shape.
    for template in ["first", &number] {
        let body = json!({"template": template, "vcpus": 2});
        let child = world.client.post("/v1/sandboxes", body).await;
        assert_eq!(child.status, 201, "{}", child.text());
        let child = child.json();
        let shape = (&child["vcpus"], &child["memory_mb"], &child["disk_size_mb"], &child["source_snapshot"]);
        assert_eq!(shape, (&json!(2), &json!(256), &json!(2048), &json!(number)));
        assert_eq!(child["template"], template);
        assert_eq!(world.agent.creates().pop().unwrap().snapshot_id, Some(number.clone()));
        assert_eq!(
            world.client.shell(child["id"].as_str().unwrap(), "echo hi").await.json()["stdout"],
            "hi\n"
        );
    }
    for (field, value) in [("vcpus", 1), ("memory_mb", 512), ("disk_size_mb", 1024)] {
        let answer = world.client.post("/v1/sandboxes", json!({"template": "first", field: value})).await;
        assert_refused(&answer, 400, "invalid_request", field);
    }
    let larger = json!({"template": "first", "disk_size_mb": 4096});
    assert_eq!(world.client.post("/v1/sandboxes", larger).await.json()["disk_size_mb"], 4096);

    // Its name is taken, those of the platform are reserved, and other teams' are nobody's business.
    assert_refused(&snapshot(&world, &id, "first").await, 409, "conflict", "first");
    assert_refused(&snapshot(&world, &id, "minimal").await, 409, "conflict", "minimal");
    assert_refused(&snapshot(&world, &id, "../..").await, 400, "invalid_request", "name");
    assert_refused(&snapshot(&world, &id, "sn-00000000").await, 400, "invalid_request", "name");
    assert_refused(&snapshot(&world, "sb-00000000", "x").await, 404, "not_found", "sb-00000000");
    assert_refused(&snapshot(&world, "../..", "x").await, 404, "not_found", "../..");
    assert_eq!(world.agent.snapshots().len(), 1);

    let delete = async |name: &str| world.client.delete(&format!("/v1/snapshots/{name}")).await;
    assert_refused(&delete("base").await, 403, "forbidden", "base");
    assert_refused(&delete("nothing").await, 404, "not_found", "nothing");
    assert_refused(&delete("..%2F..").await, 404, "not_found", "..");
    assert_eq!(delete("first").await.status, 204);
    assert_refused(&delete("first").await, 404, "not_found", "first");
    assert!(world.agent.snapshots().is_empty());
    let gone = world.client.post("/v1/sandboxes", json!({"template": "first"})).await;
    assert_refused(&gone, 404, "not_found", "first");
    eventually("no row is left", async || count(&world, "SELECT count(*) FROM snapshots").await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_paused_sandbox_and_one_without_a_name() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    assert_eq!(world.client.post(&format!("{base}/pause"), json!({})).await.status, 200);
    let made = world.client.post("/v1/snapshots", json!({"sandbox_id": id})).await;
    assert_eq!(made.status, 201, "{}", made.text());
    assert_eq!(made.json()["name"], made.json()["id"]);
    assert_eq!(world.client.get(&base).await.json()["status"], "paused");
    assert_eq!(world.agent.state(&id), Some(Host::SANDBOX_STATE_PAUSED));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_moves_to_a_newer_snapshot() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let overwrite = async |name: &str| {
        world.client.post("/v1/snapshots?overwrite=true", json!({"sandbox_id": id, "name": name})).await
    };
    let first = overwrite("latest").await;
    assert_eq!(first.status, 201, "{}", first.text());
    let second = overwrite("latest").await;
    assert_eq!(second.status, 201, "{}", second.text());
    assert_ne!(first.json()["id"], second.json()["id"]);
    let kept = second.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(names(&world).await, ["latest"]);
    eventually("the first is gone", async || world.agent.snapshots() == std::slice::from_ref(&kept)).await;

    // One that fails leaves the name where it was.
    world.agent.faults(|faults| faults.snapshot = Some(ConnectError::resource_exhausted("no space")));
    assert_refused(&overwrite("latest").await, 503, "host_unavailable", "no space");
    assert_eq!(world.client.get("/v1/snapshots/latest").await.json()["id"], kept.as_str());
    assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "running");
    eventually("nothing is left of it", async || count(&world, "SELECT count(*) FROM snapshots").await == 1)
        .await;
    world.agent.faults(|faults| faults.snapshot = None);

    // Many at once: one has the name, and the others are gone.
    let all = futures::future::join_all((0..6).map(|_| overwrite("latest"))).await;
    for answer in &all {
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    eventually("one is left", async || world.agent.snapshots().len() == 1).await;
    assert_eq!(names(&world).await, ["latest"]);
    assert_eq!(
        world.client.get("/v1/snapshots/latest").await.json()["id"],
        world.agent.snapshots()[0].as_str()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_outlive_who_gave_them() {
    let bounds = wrenn_control_plane::Bounds { host_work: Some(Duration::from_secs(2)), ..short_bounds() };
    let mut world = World::with(bounds, Cluster::shared().database().await).await;
    let id = world.sandbox().await;
    assert_eq!(snapshot(&world, &id, "doomed").await.status, 201);
    let fault = ConnectError::unavailable("the disk does not answer");
    world.agent.faults(|faults| faults.delete_snapshot = Some(fault));
    // The name is gone at once, whatever the host does.
    assert_eq!(world.client.delete("/v1/snapshots/doomed").await.status, 204);
    assert_eq!(names(&world).await, [""; 0]);
    assert_eq!(snapshot(&world, &id, "doomed").await.status, 201);
    assert_eq!(world.agent.snapshots().len(), 2);
    world.kill_and_start().await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(world.agent.snapshots().len(), 2);
    world.agent.faults(|faults| faults.delete_snapshot = None);
    eventually("it is deleted", async || world.agent.snapshots().len() == 1).await;
    assert_eq!(names(&world).await, ["doomed"]);

    // One whose maker dies in the middle goes too, and its sandbox goes on.
    world.agent.faults(|faults| faults.hold_snapshots = true);
    let client = world.client.clone();
    let body = json!({"sandbox_id": id, "name": "half"}).to_string();
    let making = tokio::spawn(async move {
        let request = client.request(http::Method::POST, "/v1/snapshots");
        client.try_send(request.body(super::support::client::full(body)).unwrap()).await.map(|_| ())
    });
    let state = async || world.agent.state(&id);
    eventually("it has begun", async || state().await == Some(Host::SANDBOX_STATE_SNAPSHOTTING)).await;
    world.kill_and_start().await;
    making.abort();
    world.agent.release();
    let status = async || world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"].clone();
    eventually("the sandbox runs", async || status().await == "running").await;
    eventually("the half is gone", async || {
        world.agent.snapshots().len() == 1 && count(&world, "SELECT count(*) FROM snapshots").await == 1
    })
    .await;
    assert_eq!(names(&world).await, ["doomed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_snapshot_is_taken() {
    let bounds =
        wrenn_control_plane::Bounds { lifecycle_answer: Duration::from_millis(300), ..short_bounds() };
    let world = World::with(bounds, Cluster::shared().database().await).await;
    let id = world.sandbox().await;
    world.agent.faults(|faults| faults.hold_snapshots = true);
    let answer = snapshot(&world, &id, "slow").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (202, &json!("snapshotting")));
    assert_eq!(names(&world).await, [""; 0]);
    // It can be used meanwhile, and not paused.
    assert_eq!(world.client.shell(&id, "echo on").await.json()["stdout"], "on\n");
    let pause = world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await;
    assert_refused(&pause, 409, "invalid_state", "snapshotting");
    // A second waits for the first.
    assert_eq!(snapshot(&world, &id, "next").await.status, 202);
    world.agent.release();
    eventually("both are there", async || names(&world).await == ["next", "slow"]).await;
    let status = async || world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"].clone();
    eventually("it runs", async || status().await == "running").await;

    // A delete overtakes it, and the snapshot is as good.
    world.agent.faults(|faults| faults.hold_snapshots = true);
    assert_eq!(snapshot(&world, &id, "last").await.status, 202);
    let deleted = world.client.delete(&format!("/v1/sandboxes/{id}")).await;
    assert!([202, 204].contains(&deleted.status.as_u16()), "{}", deleted.text());
    world.agent.release();
    eventually("it is stopped", async || status().await == "stopped").await;
    tokio::time::sleep(QUIET).await;
    assert!(world.agent.sandboxes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_is_all_or_nothing() {
    let world = World::new().await;
    let body = json!({
        "metadata": {"role": "parent"}, "timeout_sec": 600, "on_timeout": "kill",
        "network": {"allow_domains": ["example.com"]},
    });
    let parent = world.client.post("/v1/sandboxes", body).await.json();
    let id = parent["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{id}/fork");

    let one = world.client.post_bytes(&path, "").await;
    assert_eq!(one.status, 201, "{}", one.text());
    let one = one.json();
    assert_eq!(one.as_array().unwrap().len(), 1);
    for field in ["template", "vcpus", "memory_mb", "metadata", "timeout_sec", "on_timeout"] {
        assert_eq!(one[0][field], parent[field], "{field}");
    }
    let child = one[0]["id"].as_str().unwrap();
    assert_ne!(child, id);
    let network = world.client.get(&format!("/v1/sandboxes/{child}/network")).await.json();
    assert_eq!(network["allow_domains"], json!(["example.com"]));
    let creates = world.agent.creates();
    assert_ne!(creates[0].access_token, creates[1].access_token, "an identity of its own");

    let body =
        json!({"count": 7, "metadata": {"role": "child"}, "timeout_sec": 0, "envs": {"COLOUR": "red"}});
    let seven = world.client.post(&path, body).await;
    assert_eq!(seven.status, 201, "{}", seven.text());
    let seven = seven.json();
    assert_eq!(seven.as_array().unwrap().len(), 7);
    for child in seven.as_array().unwrap() {
        assert_eq!((&child["metadata"]["role"], &child["timeout_sec"]), (&json!("child"), &json!(0)));
        let colour = world.client.shell(child["id"].as_str().unwrap(), "echo $COLOUR").await.json();
        assert_eq!(colour["stdout"], "red\n");
    }
    // What stood between them is gone, and was never seen.
    eventually("no snapshot is left", async || {
        world.agent.snapshots().is_empty() && count(&world, "SELECT count(*) FROM snapshots").await == 0
    })
    .await;
    assert_eq!(world.agent.sandboxes().len(), 9);

    world.agent.faults(|faults| {
        faults.creates_until = Some(3);
        faults.create = Some(ConnectError::resource_exhausted("there is no room"));
    });
    let failed = world.client.post(&path, json!({"count": 6})).await;
    assert_refused(&failed, 503, "host_unavailable", "there is no room");
    assert!(failed.text().contains("none of the children"), "{}", failed.text());
    eventually("none of them is left", async || world.agent.sandboxes().len() == 9).await;
    assert_eq!(world.client.get("/v1/sandboxes").await.json().as_array().unwrap().len(), 9);
    eventually("no snapshot is left", async || world.agent.snapshots().is_empty()).await;
    assert_eq!(world.client.shell(id, "echo still").await.json()["stdout"], "still\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_takes_long_and_one_whose_maker_dies() {
    let bounds = wrenn_control_plane::Bounds {
        lifecycle_answer: Duration::from_millis(300),
        host_work: Some(Duration::from_secs(3)),
        ..short_bounds()
    };
    let mut world = World::with(bounds, Cluster::shared().database().await).await;
    let id = world.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/fork");
    world.agent.faults(|faults| faults.hold_creates = true);
    let answer = world.client.post(&path, json!({"count": 2})).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    let begun = answer.json();
    assert!(begun.as_array().unwrap().iter().all(|child| child["status"] == "starting"), "{begun}");
    world.agent.release();
    let running = async || {
        let listed = world.client.get("/v1/sandboxes?status=running").await.json();
        listed.as_array().unwrap().len()
    };
    eventually("both run", async || running().await == 3).await;

    world.agent.faults(|faults| faults.hold_creates = true);
    assert_eq!(world.client.post(&path, json!({"count": 2})).await.status, 202);
    eventually("the creates have reached the host", async || world.agent.creates().len() == 5).await;
    world.kill_and_start().await;
    world.agent.release();
    // What the host has made is what there is; what stood between is gone.
    eventually("all that is on the host runs", async || {
        let listed = world.client.get("/v1/sandboxes").await.json();
        let listed = listed.as_array().unwrap();
        listed.len() == world.agent.sandboxes().len() && listed.iter().all(|one| one["status"] == "running")
    })
    .await;
    eventually("no snapshot is left", async || {
        world.agent.snapshots().is_empty() && count(&world, "SELECT count(*) FROM snapshots").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_put_back() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let made = snapshot(&world, &id, "before").await.json();
    let number = made["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{id}/rollback");
    for (name, state) in [("before", "running"), (number, "paused")] {
        if state == "paused" {
            assert_eq!(world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await.status, 200);
        } else {
            let body = json!({"cmd": "sleep", "args": ["86502"], "background": true});
            assert_eq!(world.client.post(&format!("/v1/sandboxes/{id}/exec"), body).await.status, 202);
        }
        let answer = world.client.post(&path, json!({"snapshot": name})).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (200, &json!("running")));
        assert_eq!(answer.json()["id"], id.as_str());
        let processes = world.client.get(&format!("/v1/sandboxes/{id}/processes")).await.json();
        assert_eq!(processes["processes"], json!([]), "what ran is gone");
    }
    let missing = world.client.post(&path, json!({"snapshot": "nothing"})).await;
    assert_refused(&missing, 404, "not_found", "nothing");
    let other = world.client.post("/v1/sandboxes", json!({"vcpus": 2})).await.json();
    let misfit = format!("/v1/sandboxes/{}/rollback", other["id"].as_str().unwrap());
    let misfit = world.client.post(&misfit, json!({"snapshot": "before"})).await;
    assert_refused(&misfit, 400, "invalid_request", "vcpus");

    world.agent.faults(|faults| faults.rollback = Some(ConnectError::internal("pages: too short")));
    let failed = world.client.post(&path, json!({"snapshot": "before"})).await;
    assert_refused(&failed, 502, "agent_error", "too short");
    assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "running");
    assert_eq!(world.client.shell(&id, "echo here").await.json()["stdout"], "here\n");
}
