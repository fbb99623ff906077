//! The verbs through the public API, as a client sees them, each timed from before its request.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use wrenn_testkit::{Answer, Client};
use wrenn_types::SnapshotId;

/// 2^20.
pub(crate) const MEBIBYTE: u64 = 1 << 20;
/// How long a verb may take that is answered before it is done.
const BOUND: Duration = Duration::from_secs(300);
/// How often one that goes on is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Fills memory with what is not zero, says so, and keeps it.
const HOLDER: &str = "
import mmap, os, signal, sys
block = os.urandom(1 << 20)
memory = mmap.mmap(-1, int(sys.argv[1]))
for _ in range(len(memory) >> 20):
    memory.write(block)
memory.write(block[:len(memory) - memory.tell()])
open('/tmp/held', 'w').write('yes')
signal.pause()
";

/// A caller.
#[derive(Debug)]
pub(crate) struct Api {
    client: Client,
}

/// A snapshot of a sandbox that runs.
#[derive(Debug)]
pub(crate) struct Snapshotted {
    pub(crate) id: SnapshotId,
    /// Until it was there.
    pub(crate) took: Duration,
    /// How long no process of the guest ran, as the server says.
    pub(crate) stopped: Duration,
}

impl Api {
    /// Uses this client.
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// A sandbox that runs, with so much memory.
    pub(crate) async fn create(&mut self, memory_mib: u64) -> Result<String> {
        let body = json!({ "template": "base", "memory_mb": memory_mib });
        let answer = self.client.post("/v1/sandboxes", &body).await?;
        ensure!(matches!(answer.status.as_u16(), 201 | 202), "{} {}", answer.status, answer.text());
        let id = answer.json()["id"].as_str().context("a sandbox has an id")?.to_owned();
        self.until(&id, "running").await?;
        self.run(&id, &["true"]).await?;
        Ok(id)
    }

    /// Has a program in the sandbox write so many bytes of its memory and hold them.
    pub(crate) async fn dirty(&mut self, id: &str, bytes: u64) -> Result<()> {
        let path = format!("/v1/sandboxes/{id}/exec");
        let body = json!({ "cmd": "python3", "args": ["-c", HOLDER, bytes.to_string()], "background": true });
        self.client.post(&path, &body).await?.expect(202)?;
        let wait = "for i in $(seq 2400); do [ -s /tmp/held ] && exit 0; sleep 0.05; done; exit 1";
        self.run(id, &["/bin/bash", "-c", wait]).await.context("the memory was not written in time")
    }

    /// Pauses it.
    pub(crate) async fn pause(&mut self, id: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.verb(id, "pause", &json!({}), "paused").await?;
        Ok(begin.elapsed())
    }

    /// Resumes it and runs a command.
    pub(crate) async fn resume_and_run(&mut self, id: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.verb(id, "resume", &json!({}), "running").await?;
        self.run(id, &["true"]).await?;
        Ok(begin.elapsed())
    }

    /// Makes a snapshot of it while it runs.
    pub(crate) async fn snapshot(&mut self, id: &str, name: &str) -> Result<Snapshotted> {
        let begin = Instant::now();
        let body = json!({ "sandbox_id": id, "name": name });
        let answer = self.client.post("/v1/snapshots", &body).await?.expect(201)?;
        let took = begin.elapsed();
        let id = answer.json()["id"].as_str().context("a snapshot has an id")?.parse()?;
        Ok(Snapshotted { id, took, stopped: stopped(&answer)? })
    }

    /// Puts it back to a snapshot and runs a command.
    pub(crate) async fn rollback_and_run(&mut self, id: &str, name: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.verb(id, "rollback", &json!({ "snapshot": name }), "running").await?;
        self.run(id, &["true"]).await?;
        Ok(begin.elapsed())
    }

    /// Deletes a snapshot.
    pub(crate) async fn forget_snapshot(&mut self, name: &str) -> Result<()> {
        self.client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
        Ok(())
    }

    /// Forks it: until all children run and the last of them has run a command. They are deleted afterwards.
    pub(crate) async fn fork(&mut self, id: &str, count: u32) -> Result<Duration> {
        let begin = Instant::now();
        let answer =
            self.client.post(&format!("/v1/sandboxes/{id}/fork"), &json!({ "count": count })).await?;
        ensure!(matches!(answer.status.as_u16(), 201 | 202), "{} {}", answer.status, answer.text());
        let children: Vec<String> = answer
            .json()
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|child| child["id"].as_str().map(str::to_owned))
            .collect();
        let ran = self.all_run(&children, count).await;
        let took = begin.elapsed();
        for child in &children {
            self.delete(child).await?;
        }
        ran.map(|()| took)
    }

    async fn all_run(&mut self, children: &[String], count: u32) -> Result<()> {
        ensure!(children.len() == count as usize, "{} of {count} children were told of", children.len());
        for child in children {
            self.until(child, "running").await?;
        }
        let last = children.last().context("there are children")?;
        self.run(last, &["true"]).await
    }

    /// Destroys it.
    pub(crate) async fn delete(&mut self, id: &str) -> Result<()> {
        self.client.delete(&format!("/v1/sandboxes/{id}")).await?.expect(204)?;
        Ok(())
    }

    async fn verb(&mut self, id: &str, verb: &str, body: &Value, then: &str) -> Result<()> {
        let answer = self.client.post(&format!("/v1/sandboxes/{id}/{verb}"), body).await?;
        match answer.status.as_u16() {
            200 => Ok(()),
            202 => self.until(id, then).await,
            status => anyhow::bail!("{verb}: {status} {}", answer.text()),
        }
    }

    async fn until(&mut self, id: &str, status: &str) -> Result<()> {
        let end = Instant::now() + BOUND;
        loop {
            let seen = self.client.get(&format!("/v1/sandboxes/{id}")).await?.expect(200)?.json();
            if seen["status"] == status {
                return Ok(());
            }
            ensure!(seen["status"] != "error" && Instant::now() < end, "it is not {status}: {seen}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn run(&mut self, id: &str, command: &[&str]) -> Result<()> {
        let [program, arguments @ ..] = command else { return Ok(()) };
        let body = json!({ "cmd": program, "args": arguments });
        let answer = self.client.post(&format!("/v1/sandboxes/{id}/exec"), &body).await?.expect(200)?;
        ensure!(answer.json()["exit_code"] == 0, "{program} ended otherwise: {}", answer.text());
        Ok(())
    }
}

/// The server's own measurement: `stopped;dur=MILLISECONDS`.
fn stopped(answer: &Answer) -> Result<Duration> {
    let timing = answer.headers.get("server-timing").and_then(|value| value.to_str().ok());
    let duration = timing.and_then(|timing| timing.strip_prefix("stopped;dur=")?.parse::<f64>().ok());
    let milliseconds = duration.context("the server does not say how long the sandbox stood still")?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).context("no duration")
}
