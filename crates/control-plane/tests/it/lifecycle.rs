//! Create, list, get, delete, ping.

use serde_json::{Value, json};

use super::support::{World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_from_create_to_delete() {
    let world = World::new().await;
    let answer = world
        .client
        .post(
            "/v1/sandboxes",
            json!({
                "template": "minimal", "vcpus": 2, "memory_mb": 256, "disk_size_mb": 2048, "timeout_sec": 600,
                "metadata": {"purpose": "test"}, "envs": {"COLOUR": "green"}, "allow_internet_access": false,
                "some_newer_field": [1, 2],
            }),
        )
        .await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let timing = answer.headers["server-timing"].to_str().unwrap();
    assert!(timing.starts_with("disk;dur=1.500, restore;dur=36.000, database;dur="), "{timing}");
    let created = answer.json();
    let id = created["id"].as_str().unwrap();
    for (field, value) in [
        ("status", json!("running")),
        ("template", json!("minimal")),
        ("vcpus", json!(2)),
        ("memory_mb", json!(256)),
        ("disk_size_mb", json!(2048)),
        ("timeout_sec", json!(600)),
        ("metadata", json!({"purpose": "test"})),
        ("allow_internet_access", json!(false)),
    ] {
        assert_eq!(created[field], value, "{field}");
    }
    for field in ["created_at", "started_at", "last_active_at", "last_updated"] {
        assert!(created[field].as_str().unwrap().ends_with('Z'), "{field} has no offset: {created}");
    }
    assert!(!answer.text().contains("token"), "the access token is nobody's business");

    let asked = world.agent.creates().pop().unwrap();
    assert_eq!((asked.vcpus, asked.memory_mib, asked.disk_mib), (2, 256, Some(2048)));
    let internet = asked.network.as_option().unwrap().internet;
    assert_eq!((asked.timeout_seconds, asked.generation, internet), (600, 1, false));
    assert_eq!(asked.access_token.len(), 64);
    let green = world.client.shell(id, "echo $COLOUR").await.json();
    assert_eq!(green["stdout"], "green\n");

    // What only the host knows comes with the one, and not with the list.
    let one = world.client.get(&format!("/v1/sandboxes/{id}")).await.json();
    assert_eq!((&one["status"], &one["disk_used_mb"]), (&json!("running"), &json!(5)));
    let list = world.client.get("/v1/sandboxes").await.json();
    assert_eq!((list.as_array().unwrap().len(), &list[0]["id"]), (1, &json!(id)));

    assert_eq!(world.client.post(&format!("/v1/sandboxes/{id}/ping"), json!({})).await.status, 204);
    assert_eq!(world.agent.pings(), 1);

    for _ in 0..3 {
        let answer = world.client.delete(&format!("/v1/sandboxes/{id}")).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
    }
    assert_eq!(world.agent.sandboxes(), [""; 0]);
    assert_eq!(world.agent.destroyed(), [(id.to_owned(), 2)], "one destroy, of a newer generation");
    let one = world.client.get(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(one.status, 200);
    let one = one.json();
    assert_eq!((&one["status"], &one["end_reason"]), (&json!("stopped"), &json!("requested")));
    assert_eq!(world.client.get("/v1/sandboxes").await.json(), json!([]));
    let stopped = world.client.get("/v1/sandboxes?status=stopped").await.json();
    assert_eq!(stopped[0]["id"], id);
    for answer in [
        world.client.shell(id, "true").await,
        world.client.post(&format!("/v1/sandboxes/{id}/ping"), json!({})).await,
        world.client.get(&format!("/v1/sandboxes/{id}/files?path=/etc/hostname")).await,
    ] {
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (409, "invalid_state"));
    }
    assert_eq!(world.client.delete("/v1/sandboxes/sb-00000000").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_paths_lead_to_the_same_sandboxes() {
    let world = World::new().await;
    for base in
        ["/v1/sandboxes", "/v1/capsules", "/api/v1/sandboxes", "/api/v1/capsules", "/api/legacy/v1/capsules"]
    {
        let created = world.client.post(base, json!({})).await;
        assert_eq!(created.status, 201, "{base}: {}", created.text());
        let id = created.json()["id"].as_str().unwrap().to_owned();
        assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.status, 200);
        assert_eq!(world.client.delete(&format!("{base}/{id}")).await.status, 204, "{base}");
    }
    for path in ["/v1/templates", "/v1/snapshots", "/api/v1/snapshots?type=base"] {
        let names = world.client.get(path).await.json();
        let names: Vec<&Value> = names.as_array().unwrap().iter().map(|template| &template["name"]).collect();
        assert_eq!(names, ["base", "minimal"], "{path}");
    }
    assert_eq!(world.client.get("/v1/snapshots?type=snapshot").await.json(), json!([]));
    assert_eq!(world.client.get("/v1/snapshots?type=other").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_in_pages_and_filtered() {
    let world = World::new().await;
    let mut ids = Vec::new();
    for number in 0..7 {
        let parity = if number % 2 == 0 { "even" } else { "odd" };
        let body = json!({"metadata": {"parity": parity, "number": number.to_string()}});
        let answer = world.client.post("/v1/sandboxes", body).await;
        ids.push(answer.json()["id"].as_str().unwrap().to_owned());
    }
    ids.reverse();
    let listed = async |query: &str| {
        let answer = world.client.get(&format!("/v1/sandboxes{query}")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let list = answer.json();
        let ids = list.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned());
        let next = answer.headers.get("x-next-token").map(|token| token.to_str().unwrap().to_owned());
        (ids.collect::<Vec<_>>(), next)
    };

    assert_eq!(listed("").await, (ids.clone(), None));
    assert_eq!(listed("?limit=7").await, (ids.clone(), None));
    let (mut all, mut query) = (Vec::new(), "?limit=3".to_owned());
    for expected in [3, 3, 1] {
        let (page, next) = listed(&query).await;
        assert_eq!(page.len(), expected);
        all.extend(page);
        query = format!("?limit=3&cursor={}", next.unwrap_or_default());
    }
    assert_eq!(all, ids);

    let (even, _) = listed("?metadata.parity=even").await;
    assert_eq!(even, [0, 2, 4, 6].map(|index: usize| ids[index].clone()));
    assert_eq!(listed("?metadata.parity=even&metadata.number=2").await.0, ids[4..5]);
    assert!(listed("?metadata.parity=even&metadata.number=3").await.0.is_empty());
    world.client.delete(&format!("/v1/sandboxes/{}", ids[0])).await;
    assert_eq!(listed("").await.0, ids[1..]);
    assert_eq!(listed("?status=stopped&metadata.parity=even").await.0, ids[..1]);
    assert_eq!(listed("?status=running,stopped").await.0, ids);
    assert!(listed("?status=paused").await.0.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deletes_and_a_delete_of_what_is_starting() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let path = format!("/v1/sandboxes/{id}");
    let (one, other) = tokio::join!(world.client.delete(&path), world.client.delete(&path));
    assert_eq!((one.status.as_u16(), other.status.as_u16()), (204, 204));

    world.agent.faults(|faults| faults.hold_creates = true);
    let client = world.client.clone();
    let creating = tokio::spawn(async move { client.post("/v1/sandboxes", json!({})).await });
    eventually("the create has reached the host", async || world.agent.creates().len() == 2).await;
    let starting = world.client.get("/v1/sandboxes").await.json();
    assert_eq!(starting[0]["status"], "starting");
    let id = starting[0]["id"].as_str().unwrap().to_owned();
    let refused = world.client.shell(&id, "true").await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (409, "invalid_state"));
    assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    // Whether or not anything is let go.
    let answer = creating.await.unwrap();
    world.agent.release();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (409, "conflict"));
    eventually("nothing is left of it", async || world.agent.sandboxes().is_empty()).await;
    assert_eq!(world.client.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_is_answered_with_its_state() {
    let bounds = wrenn_control_plane::Bounds {
        lifecycle_answer: std::time::Duration::from_millis(300),
        ..super::support::short_bounds()
    };
    let url = super::support::postgres::Cluster::shared().database().await;
    let world = World::with(bounds, url).await;
    world.agent.faults(|faults| faults.hold_creates = true);
    let answer = world.client.post("/v1/sandboxes", json!({})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (202, &json!("starting")));
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}");
    world.agent.release();
    eventually("it runs", async || world.client.get(&path).await.json()["status"] == "running").await;

    world.agent.faults(|faults| faults.hold_destroys = true);
    assert_eq!(world.client.delete(&path).await.status, 202);
    assert_eq!(world.client.get(&path).await.json()["status"], "stopping");
    world.agent.release();
    eventually("it has stopped", async || world.client.get(&path).await.json()["status"] == "stopped").await;

    // A caller that was told an id finds out under it how the story ended.
    world.agent.faults(|faults| {
        faults.hold_creates = true;
        faults.create = Some(connectrpc::ConnectError::unavailable("the kernel did not come up"));
    });
    let answer = world.client.post("/v1/sandboxes", json!({})).await;
    assert_eq!(answer.status, 202);
    let path = format!("/v1/sandboxes/{}", answer.json()["id"].as_str().unwrap());
    world.agent.release();
    eventually("it is in error", async || world.client.get(&path).await.json()["status"] == "error").await;
    let failed = world.client.get(&path).await.json();
    assert_eq!(failed["end_reason"], "start_failed");
    assert_eq!(failed["end_message"], "the kernel did not come up");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_in_the_audit_log() {
    let mut world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    world.client.shell(&id, "echo secret-of-$$").await;
    world.client.post(&format!("{base}/files/mkdir"), json!({"path": "/nonexistent/../proc/x"})).await;
    world.client.get(&format!("{base}/files?path=/etc/hostname")).await;
    world.client.delete(&base).await;
    // What was still in the queue is written at the stop.
    world.stop().await;

    let database = world.database().await;
    let rows: Vec<(String, String, String, Value)> =
        sqlx::query_as("SELECT action, status, resource_id, metadata FROM audit_log ORDER BY created_at, id")
            .fetch_all(&database)
            .await
            .unwrap();
    let actions: Vec<&str> = rows.iter().map(|row| row.0.as_str()).collect();
    assert_eq!(actions, ["create", "exec", "file_mkdir", "file_read", "delete"]);
    assert!(rows.iter().all(|row| row.2 == id));
    assert_eq!(rows[1].3["command"], json!(["/bin/sh", "-c", "echo secret-of-$$"]));
    assert_ne!(rows[2].1, "success");
    assert_eq!(rows[3].3["path"], "/etc/hostname");
    let (used, active): (Option<String>, Option<String>) = sqlx::query_as(
        "SELECT (SELECT last_used::text FROM api_keys), (SELECT last_active_at::text FROM sandboxes)",
    )
    .fetch_one(&database)
    .await
    .unwrap();
    assert!(used.is_some() && active.is_some());
}
