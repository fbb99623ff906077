//! What no caller should send, and what each of it gets: one table.

use std::sync::Arc;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::context::{Case, Context, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("bad_input::creates_out_of_bounds_name_the_field", creates),
        case("bad_input::ids_that_are_none", ids),
        case("bad_input::bodies_that_are_none", bodies),
        case("bad_input::keys_that_are_none", keys),
    ]
}

async fn creates(context: Arc<Context>) -> Result<()> {
    let mut client = context.client();
    let before = client.get("/v1/sandboxes").await?.json().as_array().unwrap().len();
    let many: serde_json::Map<String, Value> = (0..21).map(|n| (format!("k{n}"), json!("v"))).collect();
    for (body, status, word) in [
        (json!({ "template": "no-such-template" }), 404, "no-such-template"),
        (json!({ "template": "../../etc" }), 400, "template"),
        (json!({ "vcpus": 0 }), 400, "vcpus"),
        (json!({ "vcpus": 100_000 }), 400, "vcpus"),
        (json!({ "memory_mb": 0 }), 400, "memory_mb"),
        (json!({ "memory_mb": 1_000_000_000_000_u64 }), 400, "memory_mb"),
        (json!({ "disk_size_mb": 0 }), 400, "disk_size_mb"),
        (json!({ "disk_size_mb": 1_000_000_000_u64 }), 400, "disk_size_mb"),
        (json!({ "timeout_sec": -1 }), 400, "timeout_sec"),
        (json!({ "timeout_sec": 1_000_000_000_u64 }), 400, "timeout_sec"),
        (json!({ "vcpus": "two" }), 400, "vcpus"),
        (json!({ "metadata": many }), 400, "metadata"),
        (json!({ "metadata": { "a/b": "c" } }), 400, "metadata"),
        (json!([]), 400, ""),
    ] {
        let answer = client.post("/v1/sandboxes", &body).await?;
        ensure!(answer.status.as_u16() == status, "{body}: {} {}", answer.status, answer.text());
        ensure!(!answer.error_code().is_empty() && answer.text().contains(word), "{body}: {}", answer.text());
    }
    let after = client.get("/v1/sandboxes").await?.json().as_array().unwrap().len();
    ensure!(after <= before + 16, "no refused create stays: {before} before, {after} after");
    Ok(())
}

async fn ids(context: Arc<Context>) -> Result<()> {
    let mut client = context.client();
    let long = "a".repeat(10_240);
    for id in ["..%2F..", "%2e%2e%2f%2e%2e", "sb-", "sb-0123456G", "sb-00000000", &long] {
        for (method, rest) in
            [("GET", ""), ("DELETE", ""), ("POST", "/ping"), ("POST", "/exec"), ("GET", "/files?path=/x")]
        {
            let path = format!("/v1/sandboxes/{id}{rest}");
            let body = if rest == "/exec" { r#"{"cmd":"true"}"# } else { "" };
            let headers = [("content-type", "application/json")];
            let answer = client.send(method.parse()?, &path, &headers, body).await?;
            let status = answer.status.as_u16();
            ensure!(status == 404 || status == 400 || status == 414, "{method} {rest} of {id:.20}: {status}");
            ensure!(!answer.error_code().is_empty(), "{method} {rest} of {id:.20}: {}", answer.text());
        }
    }
    Ok(())
}

async fn bodies(context: Arc<Context>) -> Result<()> {
    let mut client = context.client();
    let large = format!("{{\"template\":\"{}\"}}", "a".repeat(3 << 20));
    for (body, status) in [("{", 400), ("", 400), ("null", 400), ("\u{0}", 400), (large.as_str(), 413)] {
        let headers = [("content-type", "application/json")];
        let answer = client.send(http::Method::POST, "/v1/sandboxes", &headers, body.to_owned()).await?;
        ensure!(answer.status.as_u16() == status, "{body:.20}: {} {}", answer.status, answer.text());
        ensure!(!answer.error_code().is_empty(), "{body:.20}: {}", answer.text());
        // A server that does not read a body that is too large closes the connection.
        client = context.client();
    }
    Ok(())
}

async fn keys(context: Arc<Context>) -> Result<()> {
    let authority = context.client().authority().to_owned();
    let other = "wrn_00000000000000000000000000000000";
    for key in ["", "x", "wrn_", other, "e2b_0123"] {
        let mut client = wrenn_testkit::Client::new(&authority, key);
        let answer = client.get("/v1/sandboxes").await?.expect(401)?;
        ensure!(answer.error_code() == "unauthorized", "{key}: {}", answer.text());
    }
    let mut client = wrenn_testkit::Client::new(&authority, "");
    client.get("/health").await?.expect(200)?;
    let description = client.get("/openapi.yaml").await?.expect(200)?.text();
    ensure!(description.contains("3.1.0"), "{description:.100}");
    Ok(())
}
