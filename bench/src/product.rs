//! The same through the public API, as a client sees it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use wrenn_testkit::Client;

/// One create that was measured.
#[derive(Debug)]
pub(crate) struct Created {
    /// The sandbox; it still runs.
    pub(crate) id: String,
    /// From before the request to create it until the first command's result was there.
    pub(crate) to_first_result: Duration,
    /// What the server says of where the time went, in milliseconds, in its order.
    pub(crate) phases: Vec<(String, f64)>,
}

/// Creates a sandbox and runs `true` in it. A sandbox whose command fails is deleted again.
///
/// # Errors
/// Anything but a 201 and an exit code of 0.
pub(crate) async fn create_and_run(client: &mut Client) -> Result<Created> {
    let begin = Instant::now();
    let answer = client.post("/v1/sandboxes", &json!({ "template": "base" })).await?.expect(201)?;
    let id = answer.json()["id"].as_str().context("a sandbox has an id")?.to_owned();
    if let Err(error) = run_true(client, &id).await {
        delete(client, &id).await?;
        return Err(error);
    }
    let to_first_result = begin.elapsed();
    let timing =
        answer.headers.get("server-timing").and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(Created { id, to_first_result, phases: phases(timing) })
}

/// One command, there and back.
///
/// # Errors
/// Anything but an exit code of 0.
pub(crate) async fn run_true(client: &mut Client, id: &str) -> Result<Duration> {
    let begin = Instant::now();
    let answer =
        client.post(&format!("/v1/sandboxes/{id}/exec"), &json!({ "cmd": "true" })).await?.expect(200)?;
    ensure!(answer.json()["exit_code"] == 0, "`true` ended otherwise: {}", answer.text());
    Ok(begin.elapsed())
}

/// Deletes a sandbox.
///
/// # Errors
/// Anything but a 204.
pub(crate) async fn delete(client: &mut Client, id: &str) -> Result<()> {
    client.delete(&format!("/v1/sandboxes/{id}")).await?.expect(204)?;
    Ok(())
}

/// Writes a file of the guest.
///
/// # Errors
/// A status other than it should be.
pub(crate) async fn send_file(client: &mut Client, id: &str, bytes: &Bytes) -> Result<Duration> {
    let begin = Instant::now();
    let answer = client.put(&file(id), bytes.clone()).await?;
    let took = begin.elapsed();
    ensure!(answer.status.is_success(), "the upload was answered with {}: {}", answer.status, answer.text());
    Ok(took)
}

/// Reads that file, in which these bytes are.
///
/// # Errors
/// A status other than it should be, or other bytes.
pub(crate) async fn fetch_file(client: &mut Client, id: &str, bytes: &Bytes) -> Result<Duration> {
    let begin = Instant::now();
    let answer = client.get(&file(id)).await?.expect(200)?;
    let took = begin.elapsed();
    ensure!(Sha256::digest(&answer.body) == Sha256::digest(bytes), "other bytes came back");
    Ok(took)
}

fn file(id: &str) -> String {
    format!("/v1/sandboxes/{id}/files?path=/tmp/bench")
}

/// Bytes that no layer on the way can make fewer of: a counter, hashed.
#[must_use]
pub(crate) fn incompressible(length: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(length);
    let mut counter = 0_u64;
    while bytes.len() < length {
        bytes.extend_from_slice(&Sha256::digest(counter.to_le_bytes()));
        counter += 1;
    }
    bytes.truncate(length);
    bytes.into()
}

/// The durations in a `Server-Timing` header: `name;dur=1.5, name;desc="…";dur=2`.
fn phases(header: &str) -> Vec<(String, f64)> {
    let phase = |text: &str| {
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next()?.to_owned();
        let milliseconds = parts.find_map(|part| part.strip_prefix("dur=")?.parse().ok())?;
        Some((name, milliseconds))
    };
    header.split(',').filter_map(phase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_read_in_their_order() {
        let read = phases("slot;dur=1, restore;desc=\"map\";dur=40.5, odd, worse;dur=x");
        assert_eq!(read, [("slot".to_owned(), 1.0), ("restore".to_owned(), 40.5)]);
        assert_eq!(phases(""), []);
    }

    #[test]
    fn bytes_are_as_many_as_asked_for_and_not_alike() {
        let bytes = incompressible(1000);
        assert_eq!(bytes.len(), 1000);
        assert_ne!(bytes[..32], bytes[32..64]);
    }
}
