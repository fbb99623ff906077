//! What sandboxes have used.

use serde_json::{Value, json};

use super::support::World;

#[tokio::test(flavor = "multi_thread")]
async fn points_are_those_of_the_host_for_running_and_paused_ones() {
    let world = World::new().await;
    let id = world.client.post("/v1/sandboxes", json!({})).await.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}/metrics");
    let answer = world.client.get(&path).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let point = |ms: i64| {
        json!({
            "timestamp_unix": 1_800_000_000, "timestamp_unix_ms": ms, "cpu_pct": 12.35, "mem_bytes": 40 << 20,
            "disk_bytes": 3 << 20, "net_sent_bytes_per_sec": 600, "net_received_bytes_per_sec": 7,
        })
    };
    let expected = json!({
        "sandbox_id": id, "range": "10m", "points": [point(1_800_000_000_100), point(1_800_000_000_600)],
    });
    assert_eq!(answer.json(), expected);

    let paused = world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await;
    assert_eq!(paused.json()["status"], "paused");
    for (range, seconds) in [
        ("5m", 300),
        ("10m", 600),
        ("1h", 3600),
        ("2h", 7200),
        ("6h", 21_600),
        ("12h", 43_200),
        ("24h", 86_400),
    ] {
        // The other name and the prefix lead to the same.
        let answer = world.client.get(&format!("/api/v1/capsules/{id}/metrics?range={range}")).await.json();
        assert_eq!(answer["range"], range);
        assert_eq!(answer["points"][0]["net_sent_bytes_per_sec"], seconds);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_none_and_a_sandbox_that_is_gone_are_refused() {
    let mut world = World::new().await;
    let id = world.client.post("/v1/sandboxes", json!({})).await.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}/metrics");
    for wrong in ["", "3h", "600", "10M", "24h%20", "%00"] {
        let answer = world.client.get(&format!("{path}?range={wrong}")).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "invalid_request"), "{wrong:?}");
        assert!(answer.text().contains("range"), "{}", answer.text());
    }
    assert_eq!(world.client.with_key("").get(&path).await.status, 401);
    assert_eq!(world.client.get("/v1/sandboxes/sb-ffffffff/metrics").await.status, 404);
    assert_eq!(world.client.get("/v1/sandboxes/..%2f/metrics").await.status, 404);

    world.agent.go_away().await;
    let away = world.client.get(&path).await;
    assert_eq!((away.status.as_u16(), away.code().as_str()), (503, "host_unavailable"), "{}", away.text());
    world.agent.serve();
    world.agent.wait_for_watcher().await;

    assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    let gone = world.client.get(&path).await;
    assert_eq!((gone.status.as_u16(), gone.code().as_str()), (404, "not_found"), "{}", gone.text());
    assert_eq!(gone.json()["error"]["message"].as_str().map(|text| text.contains("stopped")), Some(true));
    assert_ne!(gone.json()["points"], Value::Array(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_says_what_does_not_limit_machines_there() {
    let mut world = World::new().await;
    let expected = json!([{
        "status": "online", "version": "0.0.0", "vmm": "processes", "vmm_version": "0",
        "accelerator": "none", "limits": "nothing limits what is no machine",
        "unlimited": ["cpu", "memory", "pids", "io"],
    }]);
    for path in ["/v1/hosts", "/api/v1/hosts"] {
        let mut hosts = world.client.get(path).await.json();
        let id = hosts[0].as_object_mut().unwrap().remove("id").unwrap();
        assert!(id.as_str().unwrap().parse::<wrenn_types::HostId>().is_ok(), "{id}");
        assert_eq!(hosts, expected);
    }
    world.agent.go_away().await;
    let answer = world.client.get("/v1/hosts").await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "host_unavailable"));
}
