//! What sandboxes use is measured: a busy one shows it, and a paused one still tells.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::context::{Case, Context, Sandbox, case};

/// How long a machine that has other things to do may take until something is measured.
const BOUND: Duration = Duration::from_secs(60);
/// Measurements are half a second apart.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![case("metrics::a_busy_sandbox_shows_it_and_a_paused_one_still_tells", busy_then_paused)]
}

async fn points(sandbox: &mut Sandbox, range: &str) -> Result<Vec<Value>> {
    let path = sandbox.path(&format!("/metrics?range={range}"));
    let answer = sandbox.client.get(&path).await?.expect(200)?.json();
    ensure!(answer["sandbox_id"] == sandbox.id.as_str() && answer["range"] == range, "{answer}");
    answer["points"].as_array().cloned().context("there are points")
}

fn cpu(point: &Value) -> f64 {
    point["cpu_pct"].as_f64().unwrap_or_default()
}

async fn busy_then_paused(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/metrics?range=3h");
    let refused = sandbox.client.get(&path).await?;
    ensure!(refused.status == 400 && refused.error_code() == "invalid_request", "{}", refused.text());

    let body = json!({ "cmd": "/bin/sh", "args": ["-c", "while :; do :; done"], "background": true });
    let path = sandbox.path("/exec");
    sandbox.client.post(&path, &body).await?.expect(202)?;
    // How much of a processor it gets is the machine's affair; that it wants one shows all the same.
    let end = Instant::now() + BOUND;
    let seen = loop {
        let seen = points(&mut sandbox, "5m").await?;
        if seen.iter().filter(|point| cpu(point) > 15.0).count() >= 3 {
            break seen;
        }
        if Instant::now() > end {
            bail!("a busy sandbox does not show it: {seen:?}");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    let last = seen.last().context("there is one")?;
    let memory = last["mem_bytes"].as_u64().unwrap_or_default();
    ensure!((1 << 20..1 << 30).contains(&memory), "{last}");
    ensure!(last["disk_bytes"].as_u64().unwrap_or_default() > 0, "{last}");
    let times: Vec<_> = seen.iter().filter_map(|point| point["timestamp_unix_ms"].as_i64()).collect();
    ensure!(times.len() == seen.len() && times.is_sorted_by(|one, other| one < other), "{times:?}");

    let path = sandbox.path("/pause");
    sandbox.client.post(&path, &json!({})).await?;
    let id = sandbox.id.clone();
    crate::lifecycle::wait_for_status(&mut sandbox.client, &id, "paused", BOUND).await?;
    let paused = points(&mut sandbox, "10m").await?;
    ensure!(paused.len() >= seen.len(), "{} points became {}", seen.len(), paused.len());
    for range in ["1h", "24h"] {
        let means = points(&mut sandbox, range).await?;
        ensure!(means.iter().any(|point| cpu(point) > 1.0), "{range}: {means:?}");
    }
    // Nothing is measured of what does not run, however long one waits: the last point is of before the pause.
    tokio::time::sleep(8 * LOOK_AGAIN).await;
    let path = sandbox.path("");
    let paused_at = sandbox.client.get(&path).await?.expect(200)?.json()["paused_at"].clone();
    let paused_at: jiff::Timestamp = paused_at.as_str().context("it is paused")?.parse()?;
    let later = points(&mut sandbox, "10m").await?;
    let last = later.last().and_then(|point| point["timestamp_unix_ms"].as_i64()).context("there is one")?;
    ensure!(last < paused_at.as_millisecond() + 1_000, "{last} is after {paused_at}");

    sandbox.client.delete(&path).await?.expect(204)?;
    let path = sandbox.path("/metrics");
    ensure!(sandbox.client.get(&path).await?.status == 404, "what is gone tells nothing");
    Ok(())
}
