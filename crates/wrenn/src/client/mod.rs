//! The Rust client of the public API.
//!
//! ```text
//!   Client ── create, list, get, delete, ping, exec, stat,
//!      │      pause, resume, fork, rollback, snapshot … ─────► JSON over a pool of connections
//!      ├───── exec_stream ──► ExecStream   start ─► (stdout | stderr)* ─► exit       one WebSocket
//!      ├───── terminal ─────► Terminal     started ─► bytes both ways ─► exit        one WebSocket
//!      └───── download, upload ──► the bytes of a file, never held as a whole
//! ```
//!
//! Every wait is bounded: a connection, an answer, and how long a stream may stand still.
//! It speaks plain HTTP/1.1; an `https://` address is refused with words ([`EndpointError::NeedsTls`]).

mod endpoint;
mod error;
mod exec;
mod files;
mod http;
mod persist;
mod socket;
mod terminal;
mod timing;

use std::{num::NonZeroU16, time::Duration};

use ::http::{Method, StatusCode};
use wrenn_api::{
    BackgroundProcess, CreateSandbox, ExecRequest, ExecResponse, Health, Metrics, MetricsRange, Sandbox,
    SandboxStatus,
};
use wrenn_types::SandboxId;

use self::http::{Call, Transport, escape};
pub use self::{
    endpoint::{BaseUrl, Endpoint, EndpointError},
    error::{ClientError, Source},
    exec::{ExecEvent, ExecInput, ExecStream},
    files::Download,
    terminal::{Terminal, TerminalEvent, TerminalInput},
    timing::Phase,
};

/// How long a sandbox may take to come up. The first of its shape boots instead of being restored.
const CREATE_BOUND: Duration = Duration::from_secs(300);
/// How long destroying one may take.
const DELETE_BOUND: Duration = Duration::from_secs(60);
/// How often a sandbox that is still on its way is asked about.
const POLL_EVERY: Duration = Duration::from_millis(250);
/// The time of a command on the server when the request names none.
const DEFAULT_EXEC_SECONDS: i64 = 30;

/// A client of one API with one key. Clones share their connections.
#[derive(Debug, Clone)]
pub struct Client {
    transport: Transport,
}

/// Which sandboxes a list shows.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// Only those in this state.
    pub status: Option<String>,
    /// Only those with all of these names and values.
    pub metadata: Vec<(String, String)>,
}

/// A new sandbox and how long its making took.
#[derive(Debug, Clone)]
pub struct Created {
    /// The sandbox, running.
    pub sandbox: Sandbox,
    /// The phases that the server tells.
    pub phases: Vec<Phase>,
}

impl Client {
    /// A client of this endpoint. Nothing is connected yet.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self { transport: Transport::new(endpoint) }
    }

    /// The address of a port of a sandbox. Whether something answers there is not looked at.
    #[must_use]
    pub fn port_url(&self, id: &SandboxId, port: NonZeroU16) -> String {
        format!("http://{port}-{id}.{}", self.transport.endpoint.proxy)
    }

    /// Whether the server answers, and its version.
    ///
    /// # Errors
    /// It does not.
    pub async fn health(&self) -> Result<Health, ClientError> {
        Ok(self.transport.ask(Call::new(Method::GET, "/health")).await?.value)
    }

    /// Creates a sandbox and waits until it runs.
    ///
    /// # Errors
    /// The server refuses, or the sandbox does not come up.
    pub async fn create(&self, request: &CreateSandbox) -> Result<Created, ClientError> {
        let started = tokio::time::Instant::now();
        let call = Call::new(Method::POST, "/v1/sandboxes").json(request)?.within(CREATE_BOUND);
        let answer = self.transport.ask::<Sandbox>(call).await?;
        let phases = timing::phases(&answer.headers);
        let mut sandbox = answer.value;
        // 202: the server's own bound has passed and the sandbox is still on its way.
        while answer.status == StatusCode::ACCEPTED
            && matches!(sandbox.status, SandboxStatus::Pending | SandboxStatus::Starting)
        {
            if started.elapsed() > CREATE_BOUND {
                let call = format!("create of {}", sandbox.id);
                return Err(ClientError::Timeout { call, bound: CREATE_BOUND });
            }
            tokio::time::sleep(POLL_EVERY).await;
            sandbox = self.get(&sandbox.id).await?;
        }
        if sandbox.status == SandboxStatus::Running {
            Ok(Created { sandbox, phases })
        } else {
            let why = sandbox.end_message.unwrap_or_else(|| format!("it is {}", sandbox.status.as_str()));
            Err(http::refusal_of_frame(format!("the sandbox {} did not come up: {why}", sandbox.id), None))
        }
    }

    /// The sandboxes that are there, the newest first.
    ///
    /// # Errors
    /// The server refuses.
    pub async fn list(&self, filter: &ListFilter) -> Result<Vec<Sandbox>, ClientError> {
        let mut query = Vec::new();
        query.extend(filter.status.as_deref().map(|status| format!("status={}", escape(status))));
        for (name, value) in &filter.metadata {
            query.push(format!("metadata.{}={}", escape(name), escape(value)));
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let path = format!("/v1/sandboxes{mark}{}", query.join("&"));
        Ok(self.transport.ask(Call::new(Method::GET, path)).await?.value)
    }

    /// One sandbox.
    ///
    /// # Errors
    /// It is not known.
    pub async fn get(&self, id: &SandboxId) -> Result<Sandbox, ClientError> {
        Ok(self.transport.ask(Call::new(Method::GET, path_of(id, ""))).await?.value)
    }

    /// What a sandbox has used.
    ///
    /// # Errors
    /// It has not run yet, or is gone.
    pub async fn metrics(&self, id: &SandboxId, range: MetricsRange) -> Result<Metrics, ClientError> {
        let path = path_of(id, &format!("/metrics?range={}", range.as_str()));
        Ok(self.transport.ask(Call::new(Method::GET, path)).await?.value)
    }

    /// Destroys a sandbox; one that is gone already stays so.
    ///
    /// # Errors
    /// It was never known.
    pub async fn delete(&self, id: &SandboxId) -> Result<(), ClientError> {
        let call = Call::new(Method::DELETE, path_of(id, "")).within(DELETE_BOUND);
        self.transport.send(call).await.map(drop)
    }

    /// Counts as activity of a sandbox.
    ///
    /// # Errors
    /// It does not run.
    pub async fn ping(&self, id: &SandboxId) -> Result<(), ClientError> {
        self.transport.send(Call::new(Method::POST, path_of(id, "/ping"))).await.map(drop)
    }

    /// Runs a command to its end and returns all of its output.
    ///
    /// # Errors
    /// It could not be run, or took too long.
    pub async fn exec(&self, id: &SandboxId, request: &ExecRequest) -> Result<ExecResponse, ClientError> {
        let seconds = request.timeout_sec.unwrap_or(DEFAULT_EXEC_SECONDS);
        let bound = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) + Duration::from_secs(15);
        let call = Call::new(Method::POST, path_of(id, "/exec")).json(request)?.within(bound);
        Ok(self.transport.ask(call).await?.value)
    }

    /// Starts a command and lets it run on.
    ///
    /// # Errors
    /// It could not be started.
    pub async fn exec_background(
        &self,
        id: &SandboxId,
        request: &ExecRequest,
    ) -> Result<BackgroundProcess, ClientError> {
        let request = ExecRequest { background: Some(true), ..request.clone() };
        let call = Call::new(Method::POST, path_of(id, "/exec")).json(&request)?;
        Ok(self.transport.ask(call).await?.value)
    }
}

/// A route of a sandbox.
fn path_of(id: &SandboxId, rest: &str) -> String {
    format!("/v1/sandboxes/{id}{rest}")
}
