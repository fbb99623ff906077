//! What every test stands on.

pub(crate) mod agent;
pub(crate) mod client;
pub(crate) mod guardian;
pub(crate) mod postgres;
pub(crate) mod program;
pub(crate) mod socket;

use std::{path::PathBuf, time::Duration};

use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use wrenn_control_plane::{Bounds, Config, Running};
use wrenn_types::ApiKey;

use agent::FakeAgent;
use client::Client;
use postgres::Cluster;

/// A control plane, the agent it commands, and a client with its key.
pub(crate) struct World {
    pub(crate) agent: FakeAgent,
    pub(crate) client: Client,
    pub(crate) database_url: String,
    running: Option<Running>,
    /// What the control plane runs on, so that it can die without a word.
    runtime: Option<Runtime>,
    directory: tempfile::TempDir,
    bounds: Bounds,
}

/// Bounds that let a test see their end.
pub(crate) fn short_bounds() -> Bounds {
    Bounds {
        database: Duration::from_millis(1500),
        database_patient: Duration::from_millis(2500),
        host: Duration::from_secs(2),
        start_grace: Duration::from_millis(200),
        host_missing: Duration::from_millis(500),
        sweep: Duration::from_millis(300),
        drain: Duration::from_secs(3),
        ..Bounds::default()
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(short_bounds(), Cluster::shared().database().await).await
    }

    pub(crate) async fn with(bounds: Bounds, database_url: String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        tokio::task::spawn_blocking(agent::envd).await.unwrap();
        let agent = FakeAgent::start(directory.path().join("agent.sock"));
        let mut world = Self {
            agent,
            client: Client::new("127.0.0.1:1".parse().unwrap(), String::new()),
            database_url,
            running: None,
            runtime: None,
            directory,
            bounds,
        };
        world.start().await;
        let key = std::fs::read_to_string(world.key_file()).unwrap().trim().to_owned();
        world.client = Client::new(world.running.as_ref().unwrap().address(), key);
        world.wait_for_host().await;
        world
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.directory.path().join("key")
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            database_url: self.database_url.clone(),
            agent_socket: self.agent.socket().to_owned(),
            first_key_file: Some(self.key_file()),
            proxy_domain: Some("localhost".parse().unwrap()),
            bounds: self.bounds.clone(),
        }
    }

    async fn start(&mut self) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let running = runtime.spawn(wrenn_control_plane::start(self.config())).await.unwrap().unwrap();
        self.runtime = Some(runtime);
        self.client = self.client.at(running.address());
        self.running = Some(running);
    }

    /// Stops the control plane and starts another over the same database.
    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        self.start().await;
        self.wait_for_host().await;
    }

    /// The control plane dies as by `kill -9`, and another is started.
    pub(crate) async fn kill_and_start(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
        self.running = None;
        self.start().await;
        self.wait_for_host().await;
    }

    /// Stops the control plane.
    pub(crate) async fn stop(&mut self) {
        let (running, runtime) = (self.running.take().unwrap(), self.runtime.take().unwrap());
        runtime.spawn(running.stop()).await.unwrap();
        runtime.shutdown_background();
    }

    /// Until the host is known, creates are refused.
    pub(crate) async fn wait_for_host(&self) {
        self.agent.wait_for_watcher().await;
        eventually("the host is known", async || {
            // Only a host that is connected lists its templates.
            self.client.get("/v1/templates").await.status == 200
        })
        .await;
    }

    /// A running sandbox.
    pub(crate) async fn sandbox(&self) -> String {
        let answer = self.client.post("/v1/sandboxes", serde_json::json!({})).await;
        // Under short bounds a busy machine answers before it runs.
        assert!([201, 202].contains(&answer.status.as_u16()), "{}", answer.text());
        let id = answer.json()["id"].as_str().unwrap().to_owned();
        if answer.status == 202 {
            let path = format!("/v1/sandboxes/{id}");
            eventually("it runs", async || self.client.get(&path).await.json()["status"] == "running").await;
        }
        id
    }

    /// A caller of another team.
    pub(crate) async fn other_team(&self) -> Client {
        let database = self.database().await;
        let key = ApiKey::random();
        let hash: [u8; 32] = Sha256::digest(key.expose().as_bytes()).into();
        let team = uuid::Uuid::now_v7();
        sqlx::query("INSERT INTO teams (id, name) VALUES ($1, 'other')")
            .bind(team)
            .execute(&database)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO api_keys (id, team_id, name, key_hash, key_prefix) VALUES ($1, $1, 'k', $2, 'p')",
        )
        .bind(team)
        .bind(hash.as_slice())
        .execute(&database)
        .await
        .unwrap();
        self.client.with_key(key.expose())
    }

    /// The rows that a statement finds, as text.
    pub(crate) async fn database(&self) -> sqlx::PgPool {
        sqlx::PgPool::connect(&self.database_url).await.unwrap()
    }
}

/// Waits until something is so. The bound is for a machine that is busy with other things.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "never: {what}");
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
