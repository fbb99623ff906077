//! The host agent, over its Unix socket: commands by Connect RPC, bytes to and from guests by tunnel.
//!
//! There is no trait here: the boundary is the protocol. The tests speak it with an agent of their own that
//! serves the same RPC and the same tunnels in front of a real `envd`.

mod persist;
mod tunnel;

use std::{collections::BTreeMap, error::Error as StdError, path::PathBuf, sync::Arc, time::Duration};

use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, ClientConfig, ServerStream, ServiceTransport},
};
use http::Uri;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use wrenn_proto::hostagent::v1 as proto;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, HostId, MemoryMib, ParseIdError, SandboxId, SandboxState, SnapshotId,
    TemplateName, Vcpus,
};

pub(crate) use persist::{Captured, Deadline, Settings};
pub(crate) use tunnel::{History, Tunnel, TunnelConnector, TunnelError};

/// Why a host agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// Nothing answers on the socket, or the connection broke.
    #[error("the host agent cannot be reached")]
    Unreachable(#[source] ConnectError),
    /// It did not answer in time.
    #[error("the host agent did not answer in time")]
    TimedOut(#[source] ConnectError),
    /// It refused, and nothing of what was asked has happened.
    #[error("{message}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// Its sentence.
        message: String,
    },
    /// It tried and failed.
    #[error("{message}")]
    Failed {
        /// Its sentence.
        message: String,
    },
    /// It said something that this version does not understand.
    #[error("the host agent sent an answer that cannot be understood: {what}")]
    Malformed {
        /// What is wrong with it.
        what: &'static str,
    },
    /// It named something by what is no id.
    #[error("the host agent sent what is no id")]
    MalformedId(#[source] ParseIdError),
}

/// Why an agent refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no such template or sandbox.
    NotFound,
    /// The request cannot be carried out by anybody.
    Invalid,
    /// A newer generation is known, or the sandbox is in another state.
    State,
    /// There is no room.
    Full,
}

impl From<ConnectError> for HostError {
    fn from(error: ConnectError) -> Self {
        let message = error.message.clone().unwrap_or_else(|| error.code.as_str().to_owned());
        let refused = |refusal| Self::Refused { refusal, message: message.clone() };
        match error.code {
            ErrorCode::NotFound => refused(Refusal::NotFound),
            ErrorCode::InvalidArgument | ErrorCode::OutOfRange => refused(Refusal::Invalid),
            ErrorCode::FailedPrecondition | ErrorCode::AlreadyExists | ErrorCode::Aborted => {
                refused(Refusal::State)
            }
            ErrorCode::ResourceExhausted => refused(Refusal::Full),
            ErrorCode::DeadlineExceeded => Self::TimedOut(error),
            // An `unavailable` that came over the wire has no source: the agent itself cannot do it now.
            ErrorCode::Unavailable if error.source().is_none() => refused(Refusal::Full),
            ErrorCode::Unavailable => Self::Unreachable(error),
            _ => Self::Failed { message },
        }
    }
}

/// What a sandbox is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Template(TemplateName),
    Snapshot(SnapshotId),
}

/// What an agent is told about a new sandbox.
#[derive(Debug, Clone)]
pub(crate) struct CreateCommand {
    pub(crate) id: SandboxId,
    pub(crate) generation: i64,
    pub(crate) source: Source,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MemoryMib,
    pub(crate) disk: Option<DiskMib>,
    pub(crate) access_token: AccessToken,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) settings: Settings,
}

/// One timed step of a create.
#[derive(Debug, Clone)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) duration: Duration,
}

/// The stage that an agent says a sandbox is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Starting,
    Running,
    Pausing,
    Paused,
    Resuming,
    Snapshotting,
    Stopping,
    Stopped,
    /// There is something of it, and its host cannot say what.
    Unreadable,
}

impl Stage {
    /// The state that says the same, or as little.
    pub(crate) fn state(self) -> SandboxState {
        match self {
            Self::Starting => SandboxState::Starting,
            Self::Running => SandboxState::Running,
            Self::Pausing => SandboxState::Pausing,
            Self::Paused => SandboxState::Paused,
            Self::Resuming => SandboxState::Resuming,
            Self::Snapshotting => SandboxState::Snapshotting,
            Self::Stopping => SandboxState::Stopping,
            Self::Stopped => SandboxState::Stopped,
            Self::Unreadable => SandboxState::Missing,
        }
    }
}

/// What an agent says of a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Observed {
    pub(crate) id: SandboxId,
    pub(crate) generation: i64,
    pub(crate) stage: Stage,
    pub(crate) disk_mib: u32,
    pub(crate) timeout_seconds: u32,
    pub(crate) started_at: Timestamp,
    pub(crate) last_active_at: Option<Timestamp>,
    pub(crate) paused_at: Option<Timestamp>,
    pub(crate) paused_bytes: Option<u64>,
    pub(crate) last_failure: String,
    /// The last deadline at which it was paused: it is over.
    pub(crate) deadline_met: Option<Timestamp>,
    pub(crate) end_reason: EndReason,
    pub(crate) end_message: String,
    pub(crate) disk_used_bytes: Option<u64>,
}

/// What an agent says of itself.
#[derive(Debug, Clone)]
pub(crate) struct HostFacts {
    pub(crate) id: HostId,
    pub(crate) version: String,
    pub(crate) vmm: String,
    pub(crate) vmm_version: String,
    pub(crate) accelerator: String,
    /// What limits its machines, in words, and what does not, by the names of the controllers.
    pub(crate) limits: String,
    pub(crate) unlimited: Vec<String>,
}

/// What happens on a host.
#[derive(Debug)]
pub(crate) enum HostEvent {
    Sandbox(Observed),
    InSync,
    Loss(Loss),
}

/// What a host did while no control plane was there.
#[derive(Debug, Clone)]
pub(crate) struct Loss {
    pub(crate) away_since: Timestamp,
    pub(crate) lost_at: Timestamp,
    /// Whether what ran was to be paused; else it was to go on.
    pub(crate) pause: bool,
    pub(crate) running: u32,
    pub(crate) paused: Vec<String>,
    /// Those that go on because their pause failed, and why it did.
    pub(crate) failed: Vec<(String, String)>,
}

impl Loss {
    fn parse(loss: proto::ControlPlaneLoss) -> Result<Self, HostError> {
        let instant = |ms| {
            Timestamp::from_millisecond(ms)
                .map_err(|_| HostError::Malformed { what: "the time of a loss of the control plane" })
        };
        Ok(Self {
            away_since: instant(loss.away_since_ms)?,
            lost_at: instant(loss.lost_at_ms)?,
            pause: loss.pause,
            running: loss.running,
            paused: loss.paused,
            failed: loss.failed.into_iter().map(|failed| (failed.sandbox_id, failed.message)).collect(),
        })
    }
}

#[derive(Debug, Clone)]
struct UnixConnector {
    socket: Arc<PathBuf>,
}

impl tower::Service<Uri> for UnixConnector {
    type Response = Tunnel<TokioIo<UnixStream>>;
    type Error = std::io::Error;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let socket = Arc::clone(&self.socket);
        Box::pin(async move { Ok(Tunnel::new(TokioIo::new(UnixStream::connect(&*socket).await?))) })
    }
}

type Transport = ServiceTransport<Client<UnixConnector, connectrpc::client::ClientBody>>;

/// A handle to one host agent.
#[derive(Clone)]
pub(crate) struct HostClient {
    rpc: proto::HostAgentServiceClient<Transport>,
    question: Duration,
}

impl std::fmt::Debug for HostClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostClient").finish_non_exhaustive()
    }
}

impl HostClient {
    /// A client that connects when it is first used, and again whenever it must.
    pub(crate) fn new(socket: PathBuf, question: Duration) -> Self {
        let connector = UnixConnector { socket: Arc::new(socket) };
        let http = Client::builder(TokioExecutor::new()).build(connector);
        // The name is never resolved: the connector knows only the socket.
        let config = ClientConfig::new(Uri::from_static("http://host-agent")).proto();
        Self { rpc: proto::HostAgentServiceClient::new(ServiceTransport::new(http), config), question }
    }

    fn question(&self) -> CallOptions {
        CallOptions::default().with_timeout(self.question)
    }

    /// Brings a sandbox up, and says how long each step took.
    pub(crate) async fn create(
        &self,
        command: CreateCommand,
        bound: Duration,
    ) -> Result<(Observed, Vec<Phase>), HostError> {
        let (template, snapshot_id) = match command.source {
            Source::Template(name) => (name.to_string(), None),
            Source::Snapshot(id) => (String::new(), Some(id.to_string())),
        };
        let request = proto::CreateSandboxRequest {
            sandbox_id: command.id.into(),
            generation: wire_generation(command.generation),
            template,
            snapshot_id,
            vcpus: command.vcpus.get(),
            memory_mib: command.memory.get(),
            disk_mib: command.disk.map(DiskMib::get),
            timeout_seconds: command.settings.timeout.get(),
            access_token: command.access_token.expose().to_owned(),
            environment: command.environment.into_iter().collect(),
            network: persist::network(&command.settings.network).into(),
            on_timeout: persist::action(command.settings.on_timeout).into(),
            deadline: persist::deadline(command.settings.deadline).into(),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        let answer = self.rpc.create_sandbox_with_options(request, options).await?.into_owned();
        let sandbox = answer.sandbox.into_option().ok_or(HostError::Malformed { what: "no sandbox" })?;
        Ok((observed(sandbox)?, timed(answer.phases)))
    }

    /// Destroys a sandbox, or finds it gone.
    pub(crate) async fn destroy(
        &self,
        id: &SandboxId,
        generation: i64,
        bound: Duration,
    ) -> Result<(), HostError> {
        let request = proto::DestroySandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        match self.rpc.destroy_sandbox_with_options(request, options).await {
            Ok(_) => Ok(()),
            Err(error) if error.code == ErrorCode::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// One sandbox, with what its disk takes.
    pub(crate) async fn sandbox(&self, id: &SandboxId) -> Result<Option<Observed>, HostError> {
        let request = proto::GetSandboxRequest { sandbox_id: id.to_string(), ..Default::default() };
        match self.rpc.get_sandbox_with_options(request, self.question()).await {
            Ok(answer) => answer.into_owned().sandbox.into_option().map(observed).transpose(),
            Err(error) if error.code == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Every sandbox of the host.
    pub(crate) async fn sandboxes(&self) -> Result<Vec<Observed>, HostError> {
        let request = proto::ListSandboxesRequest::default();
        let answer = self.rpc.list_sandboxes_with_options(request, self.question()).await?.into_owned();
        answer.sandboxes.into_iter().map(observed).collect()
    }

    /// Moves the inactivity clock of a sandbox to now.
    pub(crate) async fn ping(&self, id: &SandboxId) -> Result<(), HostError> {
        let request = proto::PingSandboxRequest { sandbox_id: id.to_string(), ..Default::default() };
        self.rpc.ping_sandbox_with_options(request, self.question()).await?;
        Ok(())
    }

    /// What a sandbox has used, over time.
    pub(crate) async fn metrics(
        &self,
        id: &SandboxId,
        range_seconds: u32,
    ) -> Result<Vec<proto::MetricsPoint>, HostError> {
        let sandbox_id = id.to_string();
        let request = proto::GetSandboxMetricsRequest { sandbox_id, range_seconds, ..Default::default() };
        let answer = self.rpc.get_sandbox_metrics_with_options(request, self.question()).await?;
        Ok(answer.into_owned().points)
    }

    /// What sandboxes can be made from.
    pub(crate) async fn templates(&self) -> Result<Vec<proto::Template>, HostError> {
        let request = proto::ListTemplatesRequest::default();
        let answer = self.rpc.list_templates_with_options(request, self.question()).await?;
        Ok(answer.into_owned().templates)
    }

    /// What the host is.
    pub(crate) async fn facts(&self) -> Result<HostFacts, HostError> {
        let request = proto::GetHostRequest::default();
        let answer = self.rpc.get_host_with_options(request, self.question()).await?.into_owned();
        Ok(HostFacts {
            id: answer.host_id.parse().map_err(HostError::MalformedId)?,
            version: answer.version,
            vmm: answer.vmm,
            vmm_version: answer.vmm_version,
            accelerator: answer.accelerator,
            limits: answer.limits,
            unlimited: answer.unlimited,
        })
    }

    /// What is on the host, and then what changes.
    pub(crate) async fn watch(&self) -> Result<HostWatch, HostError> {
        let request = proto::WatchSandboxesRequest::default();
        let opening = self.rpc.watch_sandboxes(request);
        // Only the opening is bounded: the stream itself stays as long as both sides do.
        let stream = tokio::time::timeout(self.question, opening).await.map_err(|_| {
            HostError::TimedOut(ConnectError::deadline_exceeded("the watch was not opened in time"))
        })??;
        Ok(HostWatch { stream })
    }
}

/// The events of a host.
#[derive(Debug)]
pub(crate) struct HostWatch {
    stream: ServerStream<Incoming, proto::__buffa::view::WatchSandboxesResponseView<'static>>,
}

impl HostWatch {
    /// The next event, or none when the agent has ended the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<HostEvent>, HostError> {
        use proto::__buffa::oneof::watch_sandboxes_response::Event;
        loop {
            let Some(message) = self.stream.message().await? else { return Ok(None) };
            match message.to_owned_message().event {
                Some(Event::Sandbox(sandbox)) => {
                    return Ok(Some(HostEvent::Sandbox(observed(*sandbox)?)));
                }
                Some(Event::InSync(_)) => return Ok(Some(HostEvent::InSync)),
                Some(Event::Loss(loss)) => return Ok(Some(HostEvent::Loss(Loss::parse(*loss)?))),
                // An event of a newer agent.
                None => {}
            }
        }
    }

    /// The next event, unless it is time to stop.
    pub(crate) async fn next_or(&mut self, stop: &CancellationToken) -> Result<Option<HostEvent>, HostError> {
        stop.run_until_cancelled(self.next()).await.unwrap_or(Ok(None))
    }
}

fn timed(phases: Vec<proto::Phase>) -> Vec<Phase> {
    let phase = |phase: proto::Phase| Phase {
        name: phase.name,
        duration: Duration::from_micros(phase.duration_micros),
    };
    phases.into_iter().map(phase).collect()
}

fn wire_generation(generation: i64) -> u64 {
    u64::try_from(generation).unwrap_or(0)
}

fn observed(sandbox: proto::Sandbox) -> Result<Observed, HostError> {
    use proto::{EndReason as Wire, SandboxState as State};
    let stage = match sandbox.state.as_known() {
        Some(State::SANDBOX_STATE_STARTING) => Stage::Starting,
        Some(State::SANDBOX_STATE_RUNNING) => Stage::Running,
        Some(State::SANDBOX_STATE_STOPPING) => Stage::Stopping,
        Some(State::SANDBOX_STATE_STOPPED) => Stage::Stopped,
        Some(State::SANDBOX_STATE_PAUSING) => Stage::Pausing,
        Some(State::SANDBOX_STATE_PAUSED) => Stage::Paused,
        Some(State::SANDBOX_STATE_RESUMING) => Stage::Resuming,
        Some(State::SANDBOX_STATE_SNAPSHOTTING) => Stage::Snapshotting,
        Some(State::SANDBOX_STATE_UNREADABLE) => Stage::Unreadable,
        Some(State::SANDBOX_STATE_UNSPECIFIED) | None => {
            return Err(HostError::Malformed { what: "the state of a sandbox" });
        }
    };
    let end_reason = match sandbox.end_reason.as_known() {
        Some(Wire::END_REASON_REQUESTED) => EndReason::Requested,
        Some(Wire::END_REASON_INACTIVITY) => EndReason::Inactivity,
        Some(Wire::END_REASON_DEADLINE) => EndReason::Deadline,
        Some(Wire::END_REASON_GUEST_SHUTDOWN) => EndReason::GuestShutdown,
        Some(Wire::END_REASON_GUEST_PANIC) => EndReason::GuestPanic,
        Some(Wire::END_REASON_OOM) => EndReason::Oom,
        Some(Wire::END_REASON_START_FAILED) => EndReason::StartFailed,
        Some(Wire::END_REASON_AGENT_STOPPED) => EndReason::AgentStopped,
        Some(Wire::END_REASON_VMM_CRASH | Wire::END_REASON_UNSPECIFIED) | None => EndReason::VmmCrash,
    };
    let instant = |ms: i64| Timestamp::from_millisecond(ms).ok().filter(|at| at.as_millisecond() > 0);
    Ok(Observed {
        id: sandbox.sandbox_id.parse().map_err(HostError::MalformedId)?,
        generation: i64::try_from(sandbox.generation)
            .map_err(|_| HostError::Malformed { what: "the generation of a sandbox" })?,
        stage,
        disk_mib: sandbox.disk_mib,
        timeout_seconds: sandbox.timeout_seconds,
        paused_at: sandbox.paused_at_ms.and_then(instant),
        paused_bytes: sandbox.paused_bytes,
        last_failure: sandbox.last_failure,
        deadline_met: sandbox.deadline_met_ms.and_then(instant),
        started_at: instant(sandbox.started_at_ms).unwrap_or_else(Timestamp::now),
        last_active_at: instant(sandbox.last_active_at_ms),
        end_reason,
        end_message: sandbox.end_message,
        disk_used_bytes: sandbox.disk_used_bytes,
    })
}
