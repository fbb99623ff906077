//! The document that clients are made from.

use super::support::World;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/wrenn.json");

#[test]
fn the_committed_document_is_the_one_of_the_code() {
    let mut current = wrenn_control_plane::openapi().to_pretty_json().unwrap();
    current.push('\n');
    if std::env::var_os("WRENN_WRITE_OPENAPI").is_some() {
        std::fs::write(FILE, &current).unwrap();
    }
    let committed = std::fs::read_to_string(FILE).unwrap_or_default();
    assert!(
        committed == current,
        "openapi/wrenn.json is not what the code says; run the test with WRENN_WRITE_OPENAPI=1 and review the diff"
    );
}

#[test]
fn every_route_says_how_it_fails_and_has_a_name() {
    let document = serde_json::to_value(wrenn_control_plane::openapi()).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let mut names = std::collections::HashSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let name =
                operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no name"));
            assert!(names.insert(name.to_owned()), "{name} twice");
            if path != "/health" {
                assert!(operation["responses"]["401"].is_object(), "{method} {path}");
            }
        }
    }
    assert!(names.len() >= 20, "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_served_and_shown() {
    let world = World::new().await;
    let client = world.client.with_key("");
    let health = client.get("/health").await;
    assert_eq!((health.status.as_u16(), health.json()["status"].as_str()), (200, Some("ok")));
    let yaml = client.get("/openapi.yaml").await;
    assert_eq!(yaml.status, 200);
    assert!(yaml.text().contains("openapi: 3.1.0") && yaml.text().contains("/v1/sandboxes/{id}/exec"));
    assert_eq!(client.get("/openapi.json").await.json()["openapi"], "3.1.0");
    let docs = client.get("/docs/").await;
    assert_eq!(docs.status, 200);
    assert!(docs.text().contains("swagger-ui"));
    assert!(!docs.text().contains("https://"), "nothing is fetched from elsewhere: {}", docs.text());
    assert_eq!(client.get("/docs/swagger-ui-bundle.js").await.status, 200);
    let redirect = client.get("/docs").await;
    assert!(redirect.status.is_redirection(), "{}", redirect.status);
}
