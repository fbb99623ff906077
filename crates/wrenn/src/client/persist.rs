//! What keeps sandboxes: pause, resume, fork, rollback, snapshots; and what they may reach, and when their time is
//! over. What the server answers with 202 is waited for here.

use std::time::Duration;

use http::{Method, StatusCode};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use wrenn_api::{
    ForkRequest, Network, PauseRequest, ResumeRequest, RollbackRequest, Sandbox, SandboxStatus,
    SnapshotRequest, Template, TemplateKind, TimeoutRequest,
};
use wrenn_types::SandboxId;

use super::{
    Client, ClientError, POLL_EVERY,
    http::{Call, escape, refusal_of_frame},
    path_of,
};

/// How long a person waits for one of these. The server goes on with it, for as long as a large sandbox needs.
const BOUND: Duration = Duration::from_secs(600);

impl Client {
    /// Pauses a sandbox and waits until it is paused.
    ///
    /// # Errors
    /// It cannot be paused, and runs on.
    pub async fn pause(&self, id: &SandboxId, request: &PauseRequest) -> Result<Sandbox, ClientError> {
        self.change(id, "pause", request, SandboxStatus::Pausing, SandboxStatus::Paused).await
    }

    /// Resumes a sandbox and waits until it runs.
    ///
    /// # Errors
    /// It cannot be resumed, and stays paused.
    pub async fn resume(&self, id: &SandboxId, request: &ResumeRequest) -> Result<Sandbox, ClientError> {
        self.change(id, "resume", request, SandboxStatus::Resuming, SandboxStatus::Running).await
    }

    /// Puts a sandbox back to a snapshot and waits until it runs.
    ///
    /// # Errors
    /// There is no such snapshot, or the sandbox cannot be put back to it.
    pub async fn rollback(&self, id: &SandboxId, snapshot: &str) -> Result<Sandbox, ClientError> {
        let request = RollbackRequest { snapshot: snapshot.to_owned() };
        self.change(id, "rollback", &request, SandboxStatus::Resuming, SandboxStatus::Running).await
    }

    async fn change(
        &self,
        id: &SandboxId,
        verb: &str,
        request: &impl Serialize,
        through: SandboxStatus,
        goal: SandboxStatus,
    ) -> Result<Sandbox, ClientError> {
        let call = Call::new(Method::POST, path_of(id, &format!("/{verb}"))).json(request)?;
        let sandbox = self.transport.ask::<Sandbox>(call).await?.value;
        let sandbox = self.outlast(sandbox, through).await?;
        if sandbox.status == goal { Ok(sandbox) } else { Err(failed(&sandbox, verb)) }
    }

    /// Waits while a sandbox is in a state in between.
    async fn outlast(&self, mut sandbox: Sandbox, through: SandboxStatus) -> Result<Sandbox, ClientError> {
        let started = Instant::now();
        while sandbox.status == through {
            if started.elapsed() > BOUND {
                let call = format!("the end of {} of {}", through.as_str(), sandbox.id);
                return Err(ClientError::Timeout { call, bound: BOUND });
            }
            sleep(POLL_EVERY).await;
            sandbox = self.get(&sandbox.id).await?;
        }
        Ok(sandbox)
    }

    /// Makes copies of a sandbox and waits until all of them run.
    ///
    /// # Errors
    /// One of them does not come up.
    pub async fn fork(&self, id: &SandboxId, request: &ForkRequest) -> Result<Vec<Sandbox>, ClientError> {
        let call = Call::new(Method::POST, path_of(id, "/fork")).json(request)?;
        let answer = self.transport.ask::<Vec<Sandbox>>(call).await?;
        let wanted = usize::try_from(request.count.unwrap_or(1)).unwrap_or(usize::MAX);
        if answer.status == StatusCode::ACCEPTED && answer.value.len() < wanted {
            // Those that were not there yet have no names to be asked for by.
            let message = format!(
                "{} of {wanted} copies of {id} were begun when the server stopped waiting: `wrenn sandbox list` shows \
                 what becomes of them",
                answer.value.len()
            );
            return Err(refusal_of_frame(message, None));
        }
        let mut children = Vec::new();
        for child in answer.value {
            let child = self.outlast(child, SandboxStatus::Starting).await?;
            if child.status != SandboxStatus::Running {
                return Err(failed(&child, "fork"));
            }
            children.push(child);
        }
        Ok(children)
    }

    /// What a sandbox may reach.
    ///
    /// # Errors
    /// It is not known.
    pub async fn network(&self, id: &SandboxId) -> Result<Network, ClientError> {
        Ok(self.transport.ask(Call::new(Method::GET, path_of(id, "/network"))).await?.value)
    }

    /// Changes what a sandbox may reach; what is left out gets its default.
    ///
    /// # Errors
    /// It is neither running nor paused, or the server refuses.
    pub async fn set_network(&self, id: &SandboxId, network: &Network) -> Result<Network, ClientError> {
        let call = Call::new(Method::PUT, path_of(id, "/network")).json(network)?;
        Ok(self.transport.ask(call).await?.value)
    }

    /// Changes when the time of a sandbox is over; what is left out stays.
    ///
    /// # Errors
    /// It is neither running nor paused, or the server refuses.
    pub async fn set_timeout(
        &self,
        id: &SandboxId,
        request: &TimeoutRequest,
    ) -> Result<Sandbox, ClientError> {
        let call = Call::new(Method::PATCH, path_of(id, "/timeout")).json(request)?;
        Ok(self.transport.ask(call).await?.value)
    }

    /// Makes a snapshot of a sandbox and waits until it is there.
    ///
    /// # Errors
    /// The name is taken, or the snapshot cannot be made; the sandbox goes on as it was.
    pub async fn snapshot(
        &self,
        id: &SandboxId,
        name: Option<String>,
        overwrite: bool,
    ) -> Result<Template, ClientError> {
        let request = SnapshotRequest::of(id, name.clone());
        // What the name means before is what it must not mean afterwards.
        let before = match &name {
            Some(name) if overwrite => self.find_template(name).await?.and_then(|template| template.id),
            _ => None,
        };
        let query = if overwrite { "?overwrite=true" } else { "" };
        let call = Call::new(Method::POST, format!("/v1/snapshots{query}")).json(&request)?;
        let answer = self.transport.ask::<serde_json::Value>(call).await?;
        let unexpected = |error: serde_json::Error| ClientError::Unexpected {
            call: "POST /v1/snapshots".to_owned(),
            status: answer.status.as_u16(),
            source: Some(error.into()),
        };
        if answer.status != StatusCode::ACCEPTED {
            return serde_json::from_value(answer.value).map_err(unexpected);
        }
        let sandbox: Sandbox = serde_json::from_value(answer.value).map_err(unexpected)?;
        let since = sandbox.last_updated;
        let sandbox = self.outlast(sandbox, SandboxStatus::Snapshotting).await?;
        // It gets its name a moment after its sandbox goes on.
        for _ in 0..20 {
            let found = self.templates(Some(TemplateKind::Snapshot)).await?.into_iter().find(|template| {
                template.sandbox_id.as_ref() == Some(id)
                    && template.id != before
                    && match &name {
                        Some(name) => template.name == *name,
                        None => template.created_at.is_some_and(|at| at >= since),
                    }
            });
            if let Some(template) = found {
                return Ok(template);
            }
            sleep(POLL_EVERY).await;
        }
        Err(failed(&sandbox, "snapshot"))
    }

    async fn find_template(&self, name: &str) -> Result<Option<Template>, ClientError> {
        let call = Call::new(Method::GET, format!("/v1/snapshots/{}", escape(name)));
        match self.transport.ask(call).await {
            Ok(answer) => Ok(Some(answer.value)),
            Err(ClientError::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What sandboxes can start from.
    ///
    /// # Errors
    /// The server refuses.
    pub async fn templates(&self, kind: Option<TemplateKind>) -> Result<Vec<Template>, ClientError> {
        let query = match kind {
            None => "",
            Some(TemplateKind::Base) => "?type=base",
            Some(TemplateKind::Snapshot) => "?type=snapshot",
        };
        Ok(self.transport.ask(Call::new(Method::GET, format!("/v1/snapshots{query}"))).await?.value)
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// There is none of that name, or it is a template of the platform.
    pub async fn delete_snapshot(&self, name: &str) -> Result<(), ClientError> {
        let call = Call::new(Method::DELETE, format!("/v1/snapshots/{}", escape(name)));
        self.transport.send(call).await.map(drop)
    }
}

fn failed(sandbox: &Sandbox, verb: &str) -> ClientError {
    let why = sandbox.last_failure.as_ref().or(sandbox.end_message.as_ref());
    let why = why.map_or_else(String::new, |why| format!(": {why}"));
    let message =
        format!("the {verb} of {} did not succeed: it is {}{why}", sandbox.id, sandbox.status.as_str());
    refusal_of_frame(message, None)
}
