//! Who may call.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::json;

use super::support::World;

#[tokio::test(flavor = "multi_thread")]
async fn the_first_key_is_made_once_and_kept_private() {
    let mut world = World::new().await;
    let key = world.client.key.clone();
    assert!(key.starts_with("wrn_") && key.len() == 36);
    let mode = std::fs::metadata(world.key_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Another start over the same database makes no other key, and leaves the file alone.
    world.restart().await;
    assert_eq!(std::fs::read_to_string(world.key_file()).unwrap().trim(), key);
    assert_eq!(world.client.get("/v1/sandboxes").await.status, 200);

    let database = world.database().await;
    let keys: i64 = sqlx::query_scalar("SELECT count(*) FROM api_keys").fetch_one(&database).await.unwrap();
    assert_eq!(keys, 1);
    let row: String =
        sqlx::query_scalar("SELECT api_keys::text FROM api_keys").fetch_one(&database).await.unwrap();
    assert!(!row.contains(&key[10..]), "the database has the key itself: {row}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_known_key_nothing_is_answered_but_that() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let long = format!("wrn_{}", "a".repeat(10_000));
    for key in ["", "wrn_", "wrn_00000000000000000000000000000000", "x", &long] {
        let client = world.client.with_key(key);
        for path in ["/v1/sandboxes", "/v1/capsules", "/api/v1/sandboxes", "/v1/templates", "/v1/hosts"] {
            let answer = client.get(path).await;
            assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "unauthorized"), "{path}");
        }
        // Before the body is looked at, and before the sandbox is.
        let answer = client.post_bytes(&format!("/v1/sandboxes/{id}/exec"), "not json").await;
        assert_eq!(answer.status, 401);
        assert_eq!(client.delete("/v1/sandboxes/../..").await.status.as_u16() / 100, 4);
        let path = format!("/v1/sandboxes/{id}/terminal");
        assert!(super::support::socket::Socket::open(&client, &path).await.is_err());
    }
    assert_eq!(world.client.with_key("").get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_sees_nothing_of_another() {
    let world = World::new().await;
    let id = world.sandbox().await;
    // The tunnel of the owner is open and its route known, before the other asks.
    assert_eq!(world.client.shell(&id, "true").await.status, 200);

    let other = world.other_team().await;
    assert_eq!(other.get("/v1/sandboxes").await.json(), json!([]));
    let base = format!("/v1/sandboxes/{id}");
    for answer in [
        other.get(&base).await,
        other.delete(&base).await,
        other.shell(&id, "true").await,
        other.post(&format!("{base}/ping"), json!({})).await,
        other.get(&format!("{base}/files?path=/etc/hostname")).await,
        other.get(&format!("{base}/processes")).await,
    ] {
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (404, "not_found"));
    }
    assert_eq!(world.client.get(&base).await.json()["status"], "running");
}
