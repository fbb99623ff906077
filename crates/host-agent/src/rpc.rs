//! The RPC surface: it parses what comes from the wire into types, asks the registry, and translates the
//! answer. It decides nothing.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use wrenn_proto::hostagent::v1 as wire;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, InactivityTimeout, MemoryMib, SandboxId, Shape, SnapshotId,
    TemplateName, Vcpus,
};

use crate::{
    agent::HostFacts,
    control_plane_loss::Sessions,
    registry::{CreateError, Registry},
    sandbox::{
        End, Handle, Outcome, RequestError, SandboxSpec, Settings, Stage, Status, bounds,
        bring_up::BringUpError,
        driver::{OperationError, chain},
        queue::{Denied, Verb},
        source::SourceError,
        within::{Overdue, within},
    },
    snapshots::{Extent, Kept},
    warm::WarmRequest,
};

mod metrics;
mod policy;
mod watch;

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    registry: Arc<Registry>,
    facts: Arc<HostFacts>,
    sessions: Sessions,
}

impl Service {
    /// The service of this registry. Who watches it has a session.
    #[must_use]
    pub fn new(registry: Arc<Registry>, facts: Arc<HostFacts>, sessions: Sessions) -> Self {
        Self { registry, facts, sessions }
    }
}

fn invalid(error: impl std::fmt::Display) -> ConnectError {
    ConnectError::invalid_argument(error.to_string())
}

fn parse_id(text: &str) -> Result<SandboxId, ConnectError> {
    text.parse().map_err(invalid)
}

fn parse_shape(vcpus: u32, memory_mib: u32) -> Result<Shape, ConnectError> {
    Ok(Shape {
        vcpus: Vcpus::new(vcpus.into()).map_err(invalid)?,
        memory: MemoryMib::new(memory_mib.into()).map_err(invalid)?,
    })
}

fn parse_disk(given: Option<u32>, default: DiskMib) -> Result<DiskMib, ConnectError> {
    given.map_or(Ok(default), |mib| DiskMib::new(mib.into()).map_err(invalid))
}

fn parse_snapshot(text: &str) -> Result<SnapshotId, ConnectError> {
    text.parse().map_err(invalid)
}

/// A create, with what only the snapshot knows that it begins from.
fn parse_create(
    request: wire::CreateSandboxRequest,
    from: Option<&Kept>,
    default_disk: DiskMib,
) -> Result<SandboxSpec, ConnectError> {
    let network = request.network.into_option().ok_or_else(|| invalid("a create says what it may reach"))?;
    let (template, shape, disk) = match from {
        Some(Kept { about, .. }) => {
            let disk = parse_disk(request.disk_mib, about.disk)?;
            if disk < about.disk {
                return Err(invalid(format!(
                    "the disk of the snapshot has {} MiB and does not shrink",
                    about.disk.get()
                )));
            }
            (about.template.clone(), about.shape, disk)
        }
        None => (
            request.template.parse::<TemplateName>().map_err(invalid)?,
            parse_shape(request.vcpus, request.memory_mib)?,
            parse_disk(request.disk_mib, default_disk)?,
        ),
    };
    Ok(SandboxSpec {
        id: parse_id(&request.sandbox_id)?,
        generation: request.generation,
        template,
        shape,
        disk,
        access_token: AccessToken::from_stored(request.access_token),
        environment: request.environment.into_iter().collect::<BTreeMap<_, _>>(),
        default_user: request.default_user,
        default_workdir: request.default_workdir,
        snapshot: from.map(|kept| kept.id.clone()),
        settings: Settings {
            timeout: InactivityTimeout::new(request.timeout_seconds.into()).map_err(invalid)?,
            on_timeout: policy::action(request.on_timeout.as_known()).unwrap_or_default(),
            deadline: request
                .deadline
                .into_option()
                .map(|deadline| policy::deadline(&deadline))
                .transpose()?
                .flatten(),
            network: policy::network(network)?,
        },
    })
}

fn cannot_be_read(id: &SandboxId, why: &str) -> ConnectError {
    ConnectError::failed_precondition(format!("the record of {id} on this host cannot be read: {why}"))
}

fn denied(error: Denied) -> ConnectError {
    match error {
        Denied::Busy => ConnectError::resource_exhausted(error.to_string()),
        Denied::Stale { .. } | Denied::Ended => ConnectError::failed_precondition(error.to_string()),
    }
}

/// The code by which a caller can tell what to do about an operation that was not done.
fn not_done(error: RequestError) -> ConnectError {
    let error = match error {
        RequestError::Denied(error) => return denied(error),
        RequestError::Failed(error) => error,
    };
    let message = chain(error.as_ref());
    match error.as_ref() {
        error if error.is_no_space() => {
            ConnectError::resource_exhausted(format!("the host's disk is full: {message}"))
        }
        error if error.is_end() => ConnectError::failed_precondition(message),
        OperationError::NoSuchSnapshot(_) => ConnectError::not_found(message),
        OperationError::NotItsOwn(_) | OperationError::Policy(_) => ConnectError::invalid_argument(message),
        OperationError::BringUp(BringUpError::Source(SourceError::NoSuchSnapshot(_))) => {
            ConnectError::not_found(message)
        }
        OperationError::DiskOnly
        | OperationError::BringUp(BringUpError::Source(
            SourceError::Unprepared(_) | SourceError::DiskOnly(_) | SourceError::Snapshot(_),
        )) => ConnectError::failed_precondition(message),
        OperationError::Timeout { .. } | OperationError::BringUp(BringUpError::Timeout { .. }) => {
            ConnectError::deadline_exceeded(message)
        }
        _ => ConnectError::unavailable(message),
    }
}

/// Of a step that was waited for no longer.
fn overdue(step: &str, Overdue(bound): Overdue) -> ConnectError {
    ConnectError::deadline_exceeded(format!("{step} took longer than {bound:?}"))
}

/// The code by which a caller can tell what to do about a failed bring-up.
fn bring_up_failed(end: &End) -> ConnectError {
    let message = end.message.clone();
    match end.error.as_deref() {
        Some(error) if error.is_no_space() => {
            ConnectError::resource_exhausted(format!("the host's disk is full: {message}"))
        }
        Some(BringUpError::Source(SourceError::Template(error))) if error.is_unknown_template() => {
            ConnectError::not_found(message)
        }
        Some(BringUpError::Source(SourceError::NoSuchSnapshot(_))) => ConnectError::not_found(message),
        Some(BringUpError::Source(SourceError::DiskTooSmall(_)) | BringUpError::PolicyRefused(_)) => {
            ConnectError::invalid_argument(message)
        }
        Some(BringUpError::Source(
            SourceError::Snapshot(_) | SourceError::Unprepared(_) | SourceError::DiskOnly(_),
        )) => ConnectError::failed_precondition(message),
        Some(BringUpError::Timeout { .. }) => ConnectError::deadline_exceeded(message),
        Some(_) => ConnectError::unavailable(message),
        None => ConnectError::aborted(message),
    }
}

fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn state(stage: Stage) -> wire::SandboxState {
    match stage {
        Stage::Starting => wire::SandboxState::SANDBOX_STATE_STARTING,
        Stage::Running => wire::SandboxState::SANDBOX_STATE_RUNNING,
        Stage::Pausing => wire::SandboxState::SANDBOX_STATE_PAUSING,
        Stage::Paused => wire::SandboxState::SANDBOX_STATE_PAUSED,
        Stage::Resuming => wire::SandboxState::SANDBOX_STATE_RESUMING,
        Stage::Snapshotting => wire::SandboxState::SANDBOX_STATE_SNAPSHOTTING,
        Stage::Stopping => wire::SandboxState::SANDBOX_STATE_STOPPING,
        Stage::Stopped => wire::SandboxState::SANDBOX_STATE_STOPPED,
    }
}

fn reason(reason: EndReason) -> wire::EndReason {
    match reason {
        EndReason::Requested => wire::EndReason::END_REASON_REQUESTED,
        EndReason::Inactivity => wire::EndReason::END_REASON_INACTIVITY,
        EndReason::Deadline => wire::EndReason::END_REASON_DEADLINE,
        EndReason::GuestShutdown => wire::EndReason::END_REASON_GUEST_SHUTDOWN,
        EndReason::GuestPanic => wire::EndReason::END_REASON_GUEST_PANIC,
        EndReason::VmmCrash => wire::EndReason::END_REASON_VMM_CRASH,
        EndReason::Oom => wire::EndReason::END_REASON_OOM,
        EndReason::StartFailed => wire::EndReason::END_REASON_START_FAILED,
        EndReason::AgentStopped => wire::EndReason::END_REASON_AGENT_STOPPED,
    }
}

fn sandbox(handle: &Handle, status: &Status) -> wire::Sandbox {
    let spec = handle.spec();
    let mut message = wire::Sandbox {
        sandbox_id: spec.id.to_string(),
        generation: status.generation,
        state: state(status.stage).into(),
        template: spec.template.to_string(),
        vcpus: spec.shape.vcpus.get(),
        memory_mib: spec.shape.memory.get(),
        disk_mib: spec.disk.get(),
        timeout_seconds: status.settings.timeout.get(),
        started_at_ms: status.started_at.map_or(0, millis),
        last_active_at_ms: millis(handle.activity().last_wall()),
        paused_at_ms: status.paused.as_ref().map(|paused| millis(paused.at)),
        paused_bytes: status.paused.as_ref().map(|paused| paused.bytes),
        last_failure: status.last_failure.clone().unwrap_or_default(),
        deadline_met_ms: status.deadline_met.map(jiff::Timestamp::as_millisecond),
        ..Default::default()
    };
    if let Some(end) = &status.end {
        message.end_reason = reason(end.reason).into();
        message.end_message.clone_from(&end.message);
    }
    message
}

/// What is told of a sandbox whose record cannot be read.
fn unreadable(id: &SandboxId, why: &str) -> wire::Sandbox {
    wire::Sandbox {
        sandbox_id: id.to_string(),
        state: wire::SandboxState::SANDBOX_STATE_UNREADABLE.into(),
        last_failure: why.to_owned(),
        ..Default::default()
    }
}

fn phases(status: &Status) -> Vec<wire::Phase> {
    let phases = status.phases.iter().map(|phase| wire::Phase {
        name: phase.name.to_owned(),
        start_micros: phase.start_micros,
        duration_micros: phase.duration_micros,
        ..Default::default()
    });
    phases.collect()
}

impl wire::HostAgentService for Service {
    async fn create_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::CreateSandboxRequest>,
    ) -> ServiceResult<wire::CreateSandboxResponse> {
        let request = request.to_owned_message();
        let from = match &request.snapshot_id {
            Some(id) => Some(self.find_snapshot(parse_snapshot(id)?).await?),
            None => None,
        };
        let spec = parse_create(request, from.as_ref(), self.registry.host().default_disk)?;
        let handle = self.registry.create(spec).map_err(|error| match error {
            CreateError::Denied(error) => denied(error),
            CreateError::Closed => ConnectError::unavailable(error.to_string()),
        })?;
        let status = handle.settled().await;
        if let (Stage::Stopped, Some(end)) = (status.stage, &status.end) {
            return Err(bring_up_failed(end));
        }
        Response::ok(wire::CreateSandboxResponse {
            phases: phases(&status),
            sandbox: sandbox(&handle, &status).into(),
            ..Default::default()
        })
    }

    async fn destroy_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::DestroySandboxRequest>,
    ) -> ServiceResult<wire::DestroySandboxResponse> {
        let id = parse_id(request.sandbox_id)?;
        if let Some(why) = self.registry.unreadable().get(&id) {
            // It is here, and nobody knows what there is to be removed.
            return Err(cannot_be_read(&id, why));
        }
        self.registry.destroy(&id, Some(request.generation)).await.map_err(denied)?;
        Response::ok(wire::DestroySandboxResponse::default())
    }

    async fn get_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::GetSandboxRequest>,
    ) -> ServiceResult<wire::GetSandboxResponse> {
        let id = parse_id(request.sandbox_id)?;
        if let Some(why) = self.registry.unreadable().get(&id) {
            let sandbox = unreadable(&id, why).into();
            return Response::ok(wire::GetSandboxResponse { sandbox, ..Default::default() });
        }
        let handle = self.find(request.sandbox_id)?;
        let status = handle.status();
        let mut message = sandbox(&handle, &status);
        if status.stage.has_guest() {
            let (host, id) = (Arc::clone(self.registry.host()), handle.spec().id.clone());
            // A layer may go between the look at the record and this one: then nothing is said of it.
            message.disk_used_bytes =
                within(bounds::LOOK, move || host.disk_used_bytes(&id)).await.unwrap_or_default();
        }
        Response::ok(wire::GetSandboxResponse { sandbox: message.into(), ..Default::default() })
    }

    async fn list_sandboxes(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::ListSandboxesRequest>,
    ) -> ServiceResult<wire::ListSandboxesResponse> {
        let known = self.registry.all();
        let known = known.iter().map(|handle| sandbox(handle, &handle.status()));
        let left = self.registry.unreadable();
        let sandboxes = known.chain(left.iter().map(|(id, why)| unreadable(id, why))).collect();
        Response::ok(wire::ListSandboxesResponse { sandboxes, ..Default::default() })
    }

    async fn watch_sandboxes(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::WatchSandboxesRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchSandboxesResponse>> {
        Response::stream_ok(watch::events(Arc::clone(&self.registry), &self.sessions))
    }

    async fn pause_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::PauseSandboxRequest>,
    ) -> ServiceResult<wire::PauseSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let extent = if request.disk_only { Extent::Disk } else { Extent::Machine };
        handle.request(Verb::Pause(extent), Some(request.generation)).await.map_err(not_done)?;
        let sandbox = sandbox(&handle, &handle.status()).into();
        Response::ok(wire::PauseSandboxResponse { sandbox, ..Default::default() })
    }

    async fn resume_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::ResumeSandboxRequest>,
    ) -> ServiceResult<wire::ResumeSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let timeout = request.timeout_seconds.map(|seconds| InactivityTimeout::new(seconds.into()));
        let verb = Verb::Resume { timeout: timeout.transpose().map_err(invalid)? };
        handle.request(verb, Some(request.generation)).await.map_err(not_done)?;
        let status = handle.status();
        Response::ok(wire::ResumeSandboxResponse {
            sandbox: sandbox(&handle, &status).into(),
            phases: phases(&status),
            ..Default::default()
        })
    }

    async fn snapshot_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::SnapshotSandboxRequest>,
    ) -> ServiceResult<wire::SnapshotSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let into = parse_snapshot(request.snapshot_id)?;
        // A caller that did not hear the answer asks again.
        let present = self.find_snapshot(into.clone()).await.ok();
        let (kept, stopped) = match present.filter(|kept| kept.about.sandbox == handle.spec().id) {
            Some(kept) => (kept, std::time::Duration::ZERO),
            None => match handle.request(Verb::Snapshot { into }, Some(request.generation)).await {
                Ok(Outcome::Saved { snapshot, stopped }) => (*snapshot, stopped),
                Ok(Outcome::Done) => return Err(ConnectError::internal("a snapshot has no outcome")),
                Err(error) => return Err(not_done(error)),
            },
        };
        Response::ok(wire::SnapshotSandboxResponse {
            snapshot: self.snapshot(&kept).await.into(),
            stopped_micros: u64::try_from(stopped.as_micros()).unwrap_or(u64::MAX),
            ..Default::default()
        })
    }

    async fn rollback_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::RollbackSandboxRequest>,
    ) -> ServiceResult<wire::RollbackSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let verb = Verb::Rollback { to: parse_snapshot(request.snapshot_id)? };
        handle.request(verb, Some(request.generation)).await.map_err(not_done)?;
        let status = handle.status();
        Response::ok(wire::RollbackSandboxResponse {
            sandbox: sandbox(&handle, &status).into(),
            phases: phases(&status),
            ..Default::default()
        })
    }

    async fn update_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::UpdateSandboxRequest>,
    ) -> ServiceResult<wire::UpdateSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let request = request.to_owned_message();
        let generation = request.generation;
        let verb = Verb::Update(Box::new(policy::update(request)?));
        handle.request(verb, Some(generation)).await.map_err(not_done)?;
        let sandbox = sandbox(&handle, &handle.status()).into();
        Response::ok(wire::UpdateSandboxResponse { sandbox, ..Default::default() })
    }

    async fn list_snapshots(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::ListSnapshotsRequest>,
    ) -> ServiceResult<wire::ListSnapshotsResponse> {
        let snapshots = self.registry.host().snapshots.clone();
        let all = within(bounds::LOOK, move || snapshots.all()).await;
        let all = all.map_err(|late| overdue("looking at the snapshots", late))?;
        let all = all.map_err(|error| ConnectError::unavailable(chain(&error)))?;
        let mut listed = Vec::with_capacity(all.len());
        for (id, kept) in all {
            match kept {
                Ok(kept) => listed.push(self.snapshot(&kept).await),
                // One that cannot be read is not one that can be started from.
                Err(error) => {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "a snapshot cannot be used");
                }
            }
        }
        Response::ok(wire::ListSnapshotsResponse { snapshots: listed, ..Default::default() })
    }

    async fn delete_snapshot(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::DeleteSnapshotRequest>,
    ) -> ServiceResult<wire::DeleteSnapshotResponse> {
        let id = parse_snapshot(request.snapshot_id)?;
        let host = Arc::clone(self.registry.host());
        // What a paused sandbox is saved as is none that was given a name.
        let is_pause = |handle: &Handle| handle.status().paused.is_some_and(|paused| paused.snapshot == id);
        if self.registry.all().iter().any(is_pause) {
            return Err(ConnectError::failed_precondition("it is what a paused sandbox is saved as"));
        }
        // Whoever asked for it may have stopped waiting; to answer that there is none would be to leave it for ever.
        if self.registry.all().iter().any(|handle| handle.makes(&id)) {
            return Err(ConnectError::failed_precondition("it is being made"));
        }
        let snapshots = host.snapshots.clone();
        // Repeated, it goes on where it was.
        let deleted = within(bounds::REMOVE, move || snapshots.delete(&id)).await;
        let deleted = deleted.map_err(|late| overdue("deleting the snapshot", late))?;
        deleted.map_err(|error| ConnectError::unavailable(chain(&error)))?;
        host.collect_soon();
        Response::ok(wire::DeleteSnapshotResponse::default())
    }

    async fn ping_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::PingSandboxRequest>,
    ) -> ServiceResult<wire::PingSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        match handle.stage() {
            Stage::Starting | Stage::Running | Stage::Snapshotting | Stage::Resuming => {
                handle.activity().touch();
                Response::ok(wire::PingSandboxResponse::default())
            }
            stage @ (Stage::Pausing | Stage::Paused | Stage::Stopping | Stage::Stopped) => {
                let message = format!("sandbox {} is {}", handle.spec().id, stage.word());
                Err(ConnectError::failed_precondition(message))
            }
        }
    }

    async fn get_sandbox_metrics(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::GetSandboxMetricsRequest>,
    ) -> ServiceResult<wire::GetSandboxMetricsResponse> {
        let handle = self.find(request.sandbox_id)?;
        let host = self.registry.host();
        let points = host.metrics.points(&handle.spec().id, i64::from(request.range_seconds) * 1000);
        let points = points.iter().map(metrics::point).collect();
        Response::ok(wire::GetSandboxMetricsResponse { points, ..Default::default() })
    }

    async fn list_templates(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::ListTemplatesRequest>,
    ) -> ServiceResult<wire::ListTemplatesResponse> {
        let templates = self.registry.host().images.templates().map(|template| wire::Template {
            name: template.name.to_string(),
            aliases: template.aliases.iter().map(|alias| alias.name.to_string()).collect(),
            default_user: template.default_user.as_str().to_owned(),
            default_workdir: template.default_workdir.as_str().to_owned(),
            size_bytes: template.size_bytes,
            minimum_disk_mib: template.minimum_disk.get(),
            ..Default::default()
        });
        Response::ok(wire::ListTemplatesResponse { templates: templates.collect(), ..Default::default() })
    }

    async fn prepare_template(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::PrepareTemplateRequest>,
    ) -> ServiceResult<wire::PrepareTemplateResponse> {
        let host = Arc::clone(self.registry.host());
        let name = request.template.parse::<TemplateName>().map_err(invalid)?;
        let shape = parse_shape(request.vcpus, request.memory_mib)?;
        let disk = parse_disk(request.disk_mib, host.default_disk)?;
        let template = host.images.resolve(&name).map_err(|error| {
            let message = chain(&error);
            if error.is_unknown_template() {
                ConnectError::not_found(message)
            } else {
                ConnectError::unavailable(message)
            }
        })?;
        let wanted = WarmRequest::for_disk(&template, shape, disk, host.default_disk).map_err(invalid)?;
        let was_there = host.warm.is_there(&wanted);
        let snapshot =
            host.warm.get(&wanted).await.map_err(|error| ConnectError::unavailable(chain(&error)))?;
        Response::ok(wire::PrepareTemplateResponse {
            snapshot_dir: snapshot.dir.to_string(),
            was_there,
            ..Default::default()
        })
    }

    async fn get_host(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::GetHostRequest>,
    ) -> ServiceResult<wire::GetHostResponse> {
        let host = self.registry.host();
        let running = self.registry.all().iter().filter(|handle| handle.stage().has_guest()).count();
        let identity = host.vmm.identity();
        Response::ok(wire::GetHostResponse {
            host_id: self.facts.host_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: identity.name.clone(),
            vmm_version: identity.version.clone(),
            accelerator: identity.accelerator.word().to_owned(),
            accelerator_reason: self.facts.accelerator_reason.clone(),
            running: u32::try_from(running).unwrap_or(u32::MAX),
            default_disk_mib: host.default_disk.get().into(),
            limits: host.limits.to_string(),
            unlimited: host.limits.absent().map(|controller| controller.name().to_owned()).collect(),
            ..Default::default()
        })
    }
}

impl Service {
    fn find(&self, id: &str) -> Result<Handle, ConnectError> {
        let id = parse_id(id)?;
        if let Some(why) = self.registry.unreadable().get(&id) {
            return Err(cannot_be_read(&id, why));
        }
        self.registry
            .get(&id)
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id} here")))
    }

    async fn find_snapshot(&self, id: SnapshotId) -> Result<Kept, ConnectError> {
        let store = &self.registry.host().snapshots;
        let (snapshots, wanted) = (store.clone(), id.clone());
        let found = within(bounds::LOOK, move || snapshots.find(&wanted)).await;
        let found = found.map_err(|late| overdue("finding the snapshot", late))?;
        // How long its contents may take is known from its manifest.
        let read = match found {
            Ok(Some(kept)) => {
                let (snapshots, wanted) = (store.clone(), id.clone());
                let bound = bounds::find(kept.about.shape.memory);
                let read = within(bound, move || snapshots.get(&wanted)).await;
                read.map_err(|late| overdue("reading the snapshot", late))?
            }
            found => found,
        };
        match read {
            Ok(Some(kept)) => Ok(kept),
            Ok(None) => Err(ConnectError::not_found(format!("there is no snapshot {id} here"))),
            Err(error) => Err(ConnectError::failed_precondition(chain(&error))),
        }
    }

    async fn snapshot(&self, kept: &Kept) -> wire::Snapshot {
        let about = &kept.about;
        wire::Snapshot {
            snapshot_id: kept.id.to_string(),
            sandbox_id: about.sandbox.to_string(),
            template: about.template.to_string(),
            vcpus: about.shape.vcpus.get(),
            memory_mib: about.shape.memory.get(),
            disk_mib: about.disk.get(),
            size_bytes: self.registry.host().snapshot_bytes(kept).await,
            created_at_ms: about.created_at.as_millisecond(),
            has_memory: about.extent == Extent::Machine,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_word_on_the_wire() {
        let table = [
            (EndReason::Requested, "REQUESTED"),
            (EndReason::Inactivity, "INACTIVITY"),
            (EndReason::Deadline, "DEADLINE"),
            (EndReason::GuestShutdown, "GUEST_SHUTDOWN"),
            (EndReason::GuestPanic, "GUEST_PANIC"),
            (EndReason::VmmCrash, "VMM_CRASH"),
            (EndReason::Oom, "OOM"),
            (EndReason::StartFailed, "START_FAILED"),
            (EndReason::AgentStopped, "AGENT_STOPPED"),
        ];
        for (ours, word) in table {
            let told = reason(ours);
            assert_eq!(format!("{told:?}"), format!("END_REASON_{word}"));
            // Our own word is the same one.
            let own = serde_json::to_value(ours).unwrap();
            assert_eq!(own, word.to_lowercase());
        }
    }
}
