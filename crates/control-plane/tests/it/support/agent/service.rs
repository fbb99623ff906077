//! What the tests' agent answers to each command.

use std::sync::{Arc, atomic::Ordering};

use connectrpc::{
    ConnectError, RequestContext, Response as RpcResponse, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt as _, stream};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use wrenn_proto::hostagent::v1 as wire;

use super::Service;

/// Waits until a sandbox is said to have ended.
async fn stopped(events: &mut broadcast::Receiver<wire::Sandbox>, id: &str) {
    loop {
        match events.recv().await {
            Ok(sandbox)
                if sandbox.sandbox_id == id && sandbox.state == wire::SandboxState::SANDBOX_STATE_STOPPED =>
            {
                return;
            }
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

impl wire::HostAgentService for Service {
    async fn create_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::CreateSandboxRequest>,
    ) -> ServiceResult<wire::CreateSandboxResponse> {
        let mut request = request.to_owned_message();
        self.0.creates.lock().unwrap().push(request.clone());
        self.0.fill_in(&mut request)?;
        if !["base", "minimal"].contains(&request.template.as_str()) {
            return Err(ConnectError::not_found(format!("there is no template {}", request.template)));
        }
        // As in the real agent, what has begun goes on when the caller has gone.
        let inner = Arc::clone(&self.0);
        let sandbox = tokio::spawn(async move {
            let id = request.sandbox_id.clone();
            let starting = wire::Sandbox {
                sandbox_id: id.clone(),
                generation: request.generation,
                state: wire::SandboxState::SANDBOX_STATE_STARTING.into(),
                ..Default::default()
            };
            let mut events = inner.events.subscribe();
            inner.starting.lock().unwrap().insert(id.clone(), starting);
            // A destroy breaks it off wherever it is.
            let destroyed = || ConnectError::aborted("the sandbox was destroyed while it was being made");
            tokio::select! {
                () = inner.held(|faults| faults.hold_creates) => {}
                () = stopped(&mut events, &id) => return Err(destroyed()),
            }
            let fault = inner.faults.lock().unwrap().next_create();
            if let Some(error) = fault {
                inner.starting.lock().unwrap().remove(&id);
                return Err(error);
            }
            let guest = inner.make(request).await;
            let mut starting = inner.starting.lock().unwrap();
            starting.remove(&id).map(|_| inner.enter(guest)).ok_or_else(destroyed)
        });
        let sandbox = sandbox.await.unwrap()?;
        let phase = |name: &str, start_micros, duration_micros| wire::Phase {
            name: name.to_owned(),
            start_micros,
            duration_micros,
            ..Default::default()
        };
        RpcResponse::ok(wire::CreateSandboxResponse {
            sandbox: Some(sandbox).into(),
            phases: vec![phase("disk", 0, 1500), phase("restore", 1500, 36_000)],
            ..Default::default()
        })
    }

    async fn destroy_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::DestroySandboxRequest>,
    ) -> ServiceResult<wire::DestroySandboxResponse> {
        let request = request.to_owned_message();
        self.0.held(|faults| faults.hold_destroys).await;
        self.0.destroyed.lock().unwrap().push((request.sandbox_id.clone(), request.generation));
        let starting = self.0.starting.lock().unwrap().remove(&request.sandbox_id);
        if let Some(mut sandbox) = starting {
            sandbox.state = wire::SandboxState::SANDBOX_STATE_STOPPED.into();
            sandbox.end_reason = wire::EndReason::END_REASON_REQUESTED.into();
            let _ = self.0.events.send(sandbox);
        }
        let gone = self.0.guests.lock().unwrap().remove(&request.sandbox_id);
        if let Some(guest) = gone {
            let mut sandbox = guest.sandbox.clone();
            tokio::task::spawn_blocking(move || drop(guest)).await.unwrap();
            sandbox.state = wire::SandboxState::SANDBOX_STATE_STOPPED.into();
            sandbox.end_reason = wire::EndReason::END_REASON_REQUESTED.into();
            let _ = self.0.events.send(sandbox);
        }
        RpcResponse::ok(wire::DestroySandboxResponse::default())
    }

    async fn get_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::GetSandboxRequest>,
    ) -> ServiceResult<wire::GetSandboxResponse> {
        let here = self.0.guests.lock().unwrap().get(request.sandbox_id).map(|guest| guest.sandbox.clone());
        let found = here.or_else(|| self.0.ended.lock().unwrap().get(request.sandbox_id).cloned());
        let mut sandbox = found.ok_or_else(|| ConnectError::not_found("not here"))?;
        sandbox.disk_used_bytes = Some(5 << 20);
        RpcResponse::ok(wire::GetSandboxResponse { sandbox: Some(sandbox).into(), ..Default::default() })
    }

    async fn list_sandboxes(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::ListSandboxesRequest>,
    ) -> ServiceResult<wire::ListSandboxesResponse> {
        let sandboxes = self.0.all();
        RpcResponse::ok(wire::ListSandboxesResponse { sandboxes, ..Default::default() })
    }

    async fn watch_sandboxes(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::WatchSandboxesRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchSandboxesResponse>> {
        let changes = BroadcastStream::new(self.0.events.subscribe());
        let now = self.0.all();
        let message = |event| wire::WatchSandboxesResponse { event: Some(event), ..Default::default() };
        let in_sync = message(wire::watch_sandboxes_response::InSync::default().into());
        let inner = Arc::clone(&self.0);
        let begun = stream::once(async move {
            inner.watchers.fetch_add(1, Ordering::SeqCst);
            in_sync
        });
        let sandboxes = stream::iter(now).map(move |sandbox| message(sandbox.into()));
        let changes = changes.map(move |change| message(change.unwrap().into()));
        RpcResponse::ok(Box::pin(sandboxes.chain(begun).chain(changes).map(Ok)))
    }

    async fn pause_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::PauseSandboxRequest>,
    ) -> ServiceResult<wire::PauseSandboxResponse> {
        let sandbox = self.0.pause(request.to_owned_message()).await?;
        RpcResponse::ok(wire::PauseSandboxResponse { sandbox: Some(sandbox).into(), ..Default::default() })
    }

    async fn resume_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::ResumeSandboxRequest>,
    ) -> ServiceResult<wire::ResumeSandboxResponse> {
        let sandbox = self.0.resume(request.to_owned_message()).await?;
        let phase = wire::Phase { name: "load".to_owned(), duration_micros: 2500, ..Default::default() };
        RpcResponse::ok(wire::ResumeSandboxResponse {
            sandbox: Some(sandbox).into(),
            phases: vec![phase],
            ..Default::default()
        })
    }

    async fn snapshot_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::SnapshotSandboxRequest>,
    ) -> ServiceResult<wire::SnapshotSandboxResponse> {
        let snapshot = self.0.snapshot(request.to_owned_message()).await?;
        RpcResponse::ok(wire::SnapshotSandboxResponse {
            snapshot: Some(snapshot).into(),
            ..Default::default()
        })
    }

    async fn rollback_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::RollbackSandboxRequest>,
    ) -> ServiceResult<wire::RollbackSandboxResponse> {
        let sandbox = self.0.rollback(request.to_owned_message()).await?;
        RpcResponse::ok(wire::RollbackSandboxResponse { sandbox: Some(sandbox).into(), ..Default::default() })
    }

    async fn update_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::UpdateSandboxRequest>,
    ) -> ServiceResult<wire::UpdateSandboxResponse> {
        let sandbox = self.0.update(request.to_owned_message())?;
        RpcResponse::ok(wire::UpdateSandboxResponse { sandbox: Some(sandbox).into(), ..Default::default() })
    }

    async fn list_snapshots(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::ListSnapshotsRequest>,
    ) -> ServiceResult<wire::ListSnapshotsResponse> {
        let snapshots = self.0.snapshots.lock().unwrap().values().cloned().collect();
        RpcResponse::ok(wire::ListSnapshotsResponse { snapshots, ..Default::default() })
    }

    async fn delete_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::DeleteSnapshotRequest>,
    ) -> ServiceResult<wire::DeleteSnapshotResponse> {
        self.0.delete_snapshot(request.snapshot_id)?;
        RpcResponse::ok(wire::DeleteSnapshotResponse::default())
    }

    async fn ping_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::PingSandboxRequest>,
    ) -> ServiceResult<wire::PingSandboxResponse> {
        let state = self.0.guests.lock().unwrap().get(request.sandbox_id).map(|guest| guest.sandbox.state);
        match state {
            None => return Err(ConnectError::not_found("not here")),
            Some(state) if state != wire::SandboxState::SANDBOX_STATE_RUNNING => {
                return Err(ConnectError::failed_precondition("it does not run"));
            }
            Some(_) => {}
        }
        self.0.pings.fetch_add(1, Ordering::SeqCst);
        RpcResponse::ok(wire::PingSandboxResponse::default())
    }

    async fn get_sandbox_metrics(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::GetSandboxMetricsRequest>,
    ) -> ServiceResult<wire::GetSandboxMetricsResponse> {
        let request = request.to_owned_message();
        if !self.0.guests.lock().unwrap().contains_key(&request.sandbox_id) {
            return Err(ConnectError::not_found("not here"));
        }
        // Two that are in one second, and as far back as was asked for.
        let point = |at_ms| wire::MetricsPoint {
            at_ms,
            cpu_percent: 12.345,
            memory_bytes: 40 << 20,
            disk_bytes: 3 << 20,
            sent_bytes_per_second: u64::from(request.range_seconds),
            received_bytes_per_second: 7,
            ..Default::default()
        };
        let points = vec![point(1_800_000_000_100), point(1_800_000_000_600)];
        RpcResponse::ok(wire::GetSandboxMetricsResponse { points, ..Default::default() })
    }

    async fn list_templates(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::ListTemplatesRequest>,
    ) -> ServiceResult<wire::ListTemplatesResponse> {
        let base = wire::Template {
            name: "base".to_owned(),
            aliases: vec!["minimal".to_owned()],
            default_user: "user".to_owned(),
            default_workdir: "/home/user".to_owned(),
            size_bytes: 300 << 20,
            minimum_disk_mib: 1024,
            ..Default::default()
        };
        RpcResponse::ok(wire::ListTemplatesResponse { templates: vec![base], ..Default::default() })
    }

    async fn prepare_template(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::PrepareTemplateRequest>,
    ) -> ServiceResult<wire::PrepareTemplateResponse> {
        Err::<RpcResponse<wire::PrepareTemplateResponse>, _>(ConnectError::unimplemented("no templates here"))
    }

    async fn get_host(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::GetHostRequest>,
    ) -> ServiceResult<wire::GetHostResponse> {
        RpcResponse::ok(wire::GetHostResponse {
            host_id: self.0.host_id.to_string(),
            version: "0.0.0".to_owned(),
            vmm: "processes".to_owned(),
            vmm_version: "0".to_owned(),
            accelerator: "none".to_owned(),
            limits: "nothing limits what is no machine".to_owned(),
            unlimited: ["cpu", "memory", "pids", "io"].map(str::to_owned).into(),
            ..Default::default()
        })
    }
}
