//! The RPC surface: it parses what comes from the wire into types, asks the registry, and translates the
//! answer. It decides nothing.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;
use wrenn_proto::hostagent::v1 as wire;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, InactivityTimeout, MemoryMib, SandboxId, Shape, TemplateName, Vcpus,
};

use crate::{
    agent::HostFacts,
    registry::{CreateError, Registry},
    sandbox::{
        End, Handle, SandboxSpec, Stage, Status, bring_up::BringUpError, driver::chain, queue::Denied,
    },
    warm::WarmRequest,
};

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    registry: Arc<Registry>,
    facts: Arc<HostFacts>,
}

impl Service {
    /// The service of this registry.
    #[must_use]
    pub fn new(registry: Arc<Registry>, facts: Arc<HostFacts>) -> Self {
        Self { registry, facts }
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

fn parse_create(
    request: wire::CreateSandboxRequest,
    default_disk: DiskMib,
) -> Result<SandboxSpec, ConnectError> {
    Ok(SandboxSpec {
        id: parse_id(&request.sandbox_id)?,
        generation: request.generation,
        template: request.template.parse::<TemplateName>().map_err(invalid)?,
        shape: parse_shape(request.vcpus, request.memory_mib)?,
        disk: parse_disk(request.disk_mib, default_disk)?,
        timeout: InactivityTimeout::new(request.timeout_seconds.into()).map_err(invalid)?,
        access_token: AccessToken::from_stored(request.access_token),
        environment: request.environment.into_iter().collect::<BTreeMap<_, _>>(),
        allow_internet_access: request.allow_internet_access,
        default_user: request.default_user,
        default_workdir: request.default_workdir,
    })
}

fn denied(error: Denied) -> ConnectError {
    ConnectError::failed_precondition(error.to_string())
}

/// The code by which a caller can tell what to do about a failed bring-up.
fn bring_up_failed(end: &End) -> ConnectError {
    let message = end.message.clone();
    match end.error.as_deref() {
        Some(error) if error.is_no_space() => {
            ConnectError::resource_exhausted(format!("the host's disk is full: {message}"))
        }
        Some(BringUpError::Template(error)) if error.is_unknown_template() => {
            ConnectError::not_found(message)
        }
        Some(BringUpError::DiskTooSmall(_)) => ConnectError::invalid_argument(message),
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
        Stage::Stopping => wire::SandboxState::SANDBOX_STATE_STOPPING,
        Stage::Stopped => wire::SandboxState::SANDBOX_STATE_STOPPED,
    }
}

fn reason(reason: EndReason) -> wire::EndReason {
    match reason {
        EndReason::Requested => wire::EndReason::END_REASON_REQUESTED,
        EndReason::Inactivity => wire::EndReason::END_REASON_INACTIVITY,
        EndReason::GuestShutdown => wire::EndReason::END_REASON_GUEST_SHUTDOWN,
        EndReason::GuestPanic => wire::EndReason::END_REASON_GUEST_PANIC,
        EndReason::VmmCrash => wire::EndReason::END_REASON_VMM_CRASH,
        EndReason::StartFailed => wire::EndReason::END_REASON_START_FAILED,
        EndReason::AgentStopped => wire::EndReason::END_REASON_AGENT_STOPPED,
    }
}

fn sandbox(handle: &Handle, status: &Status) -> wire::Sandbox {
    let spec = handle.spec();
    let mut message = wire::Sandbox {
        sandbox_id: spec.id.to_string(),
        generation: spec.generation,
        state: state(status.stage).into(),
        template: spec.template.to_string(),
        vcpus: spec.shape.vcpus.get(),
        memory_mib: spec.shape.memory.get(),
        disk_mib: spec.disk.get(),
        timeout_seconds: spec.timeout.get(),
        started_at_ms: status.started_at.map_or(0, millis),
        last_active_at_ms: millis(handle.activity().last_wall()),
        ..Default::default()
    };
    if let Some(end) = &status.end {
        message.end_reason = reason(end.reason).into();
        message.end_message.clone_from(&end.message);
    }
    message
}

fn event(handle: &Handle) -> wire::WatchSandboxesResponse {
    let sandbox = sandbox(handle, &handle.status());
    wire::WatchSandboxesResponse { event: Some(sandbox.into()), ..Default::default() }
}

impl wire::HostAgentService for Service {
    async fn create_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::CreateSandboxRequest>,
    ) -> ServiceResult<wire::CreateSandboxResponse> {
        let spec = parse_create(request.to_owned_message(), self.registry.host().default_disk)?;
        let handle = self.registry.create(spec).map_err(|error| match error {
            CreateError::Denied(error) => denied(error),
            CreateError::Closed => ConnectError::unavailable(error.to_string()),
        })?;
        let status = handle.settled().await;
        if let (Stage::Stopped, Some(end)) = (status.stage, &status.end) {
            return Err(bring_up_failed(end));
        }
        let phases = status.phases.iter().map(|phase| wire::Phase {
            name: phase.name.to_owned(),
            start_micros: phase.start_micros,
            duration_micros: phase.duration_micros,
            ..Default::default()
        });
        Response::ok(wire::CreateSandboxResponse {
            phases: phases.collect(),
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
        self.registry.destroy(&id, Some(request.generation)).await.map_err(denied)?;
        Response::ok(wire::DestroySandboxResponse::default())
    }

    async fn get_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::GetSandboxRequest>,
    ) -> ServiceResult<wire::GetSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        let status = handle.status();
        let mut message = sandbox(&handle, &status);
        if status.stage == Stage::Running {
            let host = self.registry.host();
            let disk = host.sandboxes_dir.join(handle.spec().id.as_str()).join("disk");
            // The disk may go between the look at the status and this one: then nothing is said of it.
            message.disk_used_bytes = host.disks.used_bytes(&disk).ok();
        }
        Response::ok(wire::GetSandboxResponse { sandbox: message.into(), ..Default::default() })
    }

    async fn list_sandboxes(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::ListSandboxesRequest>,
    ) -> ServiceResult<wire::ListSandboxesResponse> {
        let sandboxes = self.registry.all().iter().map(|handle| sandbox(handle, &handle.status())).collect();
        Response::ok(wire::ListSandboxesResponse { sandboxes, ..Default::default() })
    }

    async fn watch_sandboxes(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::WatchSandboxesRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchSandboxesResponse>> {
        // Subscribed before the first look, so that nothing falls between the two.
        let events = self.registry.events();
        let known = self.registry.all();
        let in_sync = wire::WatchSandboxesResponse {
            event: Some(wire::watch_sandboxes_response::InSync::default().into()),
            ..Default::default()
        };
        let first = futures::stream::iter(known).map(|handle| Ok(event(&handle)));
        let first = first.chain(futures::stream::iter([Ok(in_sync)]));
        let registry = Arc::clone(&self.registry);
        let changes = futures::stream::unfold(Some((events, registry)), |open| async {
            let (mut events, registry) = open?;
            loop {
                match events.recv().await {
                    Ok(id) => {
                        // One that is not known any more has been forgotten since; its end was told before.
                        if let Some(handle) = registry.get(&id) {
                            return Some((Ok(event(&handle)), Some((events, registry))));
                        }
                    }
                    Err(RecvError::Closed) => return None,
                    Err(RecvError::Lagged(missed)) => {
                        let message = format!("{missed} events were missed; watch again");
                        return Some((Err(ConnectError::aborted(message)), None));
                    }
                }
            }
        });
        Response::stream_ok(first.chain(changes))
    }

    async fn ping_sandbox(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::PingSandboxRequest>,
    ) -> ServiceResult<wire::PingSandboxResponse> {
        let handle = self.find(request.sandbox_id)?;
        match handle.status().stage {
            Stage::Starting | Stage::Running => {
                handle.activity().touch();
                Response::ok(wire::PingSandboxResponse::default())
            }
            Stage::Stopping | Stage::Stopped => {
                Err(ConnectError::failed_precondition(format!("sandbox {} has ended", handle.spec().id)))
            }
        }
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
        let running =
            self.registry.all().iter().filter(|handle| handle.status().stage == Stage::Running).count();
        let identity = host.vmm.identity();
        Response::ok(wire::GetHostResponse {
            host_id: self.facts.host_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: identity.name.clone(),
            vmm_version: identity.version.clone(),
            accelerator: format!("{:?}", identity.accelerator).to_lowercase(),
            accelerator_reason: self.facts.accelerator_reason.clone(),
            running: u32::try_from(running).unwrap_or(u32::MAX),
            default_disk_mib: host.default_disk.get().into(),
            ..Default::default()
        })
    }
}

impl Service {
    fn find(&self, id: &str) -> Result<Handle, ConnectError> {
        let id = parse_id(id)?;
        self.registry
            .get(&id)
            .ok_or_else(|| ConnectError::not_found(format!("there is no sandbox {id} here")))
    }
}
