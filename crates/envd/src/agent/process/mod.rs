//! The process service: start programs, follow them, give them input, signal them.
//!
//! | module | what it is |
//! |---|---|
//! | [`starts`] | which threads a start may use |
//! | [`mod@launch`] | from a request to a process that runs |
//! | [`running`] | a process: its output to every subscriber, its input, its end |
//! | [`registry`] | all processes, by number and tag |
//! | [`mod@events`] | what one client sees of a process |
//! | [`message`] | how that is written |
//! | [`end`] | how a process ended, in the words of the contract |
//! | [`memory`] | whether an end was for want of memory |
//! | [`channel`] | pipes and terminals that do not block |
//!
//! A client that goes away does not end its process. The time limit of a `Start` does, with its whole group.

mod channel;
mod end;
mod events;
mod launch;
mod memory;
mod message;
mod registry;
mod running;
mod starts;

use std::sync::Arc;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::StreamExt;
use http::HeaderMap;
use rustix::process::Signal;
use tokio::time::{Instant, timeout};
use wrenn_guest_linux::terminal::Size;
use wrenn_proto::process as wire;

pub(crate) use self::{
    events::keepalive,
    registry::Registry,
    starts::{Starts, THREADS},
};
use self::{
    events::{KILL_LIMIT, Limit, events},
    launch::{LaunchError, Order, Standard, launch},
    message::Event,
    registry::Selector,
    running::{Description, InputError, InputKind, Process, Subscription},
};
use super::{auth::basic_user, state::Agent, threads::RunError, users::UserError};
use crate::console::chain;

const LIMIT_HEADER: &str = "connect-timeout-ms";
/// The longest tag.
const MAXIMUM_TAG: usize = 256;

/// The service.
#[derive(Debug)]
pub(crate) struct ProcessService {
    agent: Arc<Agent>,
}

impl ProcessService {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn running(&self, selector: Option<Selector>) -> Result<Arc<Process>, ConnectError> {
        let selector = selector.ok_or_else(no_selector)?;
        self.agent.processes.running(&selector).ok_or_else(|| not_found(&selector))
    }
}

/// Starts a process and looks after it. It runs as a task of its own, so that a client that goes away in the middle
/// leaves no process that nobody looks after.
async fn start(
    agent: Arc<Agent>,
    order: Order,
    tag: Option<String>,
    deadline: Option<Instant>,
) -> Result<(Arc<Process>, Subscription), ConnectError> {
    if !agent.processes.has_room() {
        return Err(ConnectError::resource_exhausted("too many processes are running"));
    }
    let work = async move {
        let threads = agent.starts.of(&order.config);
        let job = threads.run(move || {
            let launched = launch(&order);
            (order, launched)
        });
        let (order, launched) = job.await.map_err(|error| match error {
            RunError::Busy => {
                ConnectError::resource_exhausted("too many starts wait for their directories or programs")
            }
            RunError::Interrupted => ConnectError::internal("the start was interrupted"),
        })?;
        let started = launched?.into_started().map_err(|error| internal(&error))?;
        let description = Description { config: order.config, tag };
        Process::adopt(&agent.processes, description, started, deadline).map_err(|error| internal(&error))
    };
    tokio::spawn(work).await.map_err(|_| ConnectError::internal("the start was interrupted"))?
}

impl wire::Process for ProcessService {
    async fn list(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<wire::ListResponse> {
        let processes = self.agent.processes.list().iter().map(|process| process.info()).collect();
        Response::ok(wire::ListResponse { processes, ..Default::default() })
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<Event>> {
        let request = request.to_owned_message();
        let config =
            request.process.into_option().ok_or_else(|| ConnectError::invalid_argument("no process"))?;
        let standard = match request.pty.into_option() {
            None => Standard::Pipes { input: request.stdin.unwrap_or(true) },
            Some(pty) => Standard::Terminal(size(pty.size.into_option().unwrap_or_default())?),
        };
        let tag = request.tag.filter(|tag| !tag.is_empty());
        if tag.as_ref().is_some_and(|tag| tag.len() > MAXIMUM_TAG) {
            return Err(ConnectError::invalid_argument(format!("tag is longer than {MAXIMUM_TAG} bytes")));
        }
        let order = Order {
            config,
            standard,
            user: basic_user(context.headers()),
            identity: self.agent.identity(),
            cgroup: self.agent.cgroup.clone(),
        };
        check_limit(context.headers())?;
        let deadline = context.deadline().map(Instant::from_std);
        let (process, subscription) = start(Arc::clone(&self.agent), order, tag, deadline).await?;
        let events = events(process, subscription, keepalive(context.headers()), deadline, Limit::Process);
        // Compressing them would hold them back.
        Ok(Response::stream(events).compress(false))
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<Event>> {
        let selector = selector(request.to_owned_message().process.into_option()).ok_or_else(no_selector)?;
        let process = self.agent.processes.any(&selector).ok_or_else(|| not_found(&selector))?;
        let subscription = process.subscribe();
        let deadline = context.deadline().map(Instant::from_std);
        let events = events(process, subscription, keepalive(context.headers()), deadline, Limit::Stream);
        Ok(Response::stream(events).compress(false))
    }

    async fn update(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<wire::UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.running(selector(request.process.into_option()))?;
        if let Some(wanted) = request.pty.into_option().and_then(|pty| pty.size.into_option()) {
            process.resize(size(wanted)?).map_err(input_error)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _context: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<wire::StreamInputResponse> {
        use wire::__buffa::oneof::stream_input_request::Event;
        let mut process = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(Event::Start(start)) => {
                    process = Some(self.running(selector(start.process.into_option()))?)
                }
                Some(Event::Data(data)) => {
                    let process = process.as_ref().ok_or_else(|| {
                        ConnectError::invalid_argument("the first message must name a process")
                    })?;
                    give_input(process, data.input.into_option()).await?;
                }
                Some(Event::Keepalive(_)) | None => {}
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<wire::SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.running(selector(request.process.into_option()))?;
        give_input(&process, request.input.into_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<wire::SendSignalResponse> {
        let request = request.to_owned_message();
        let selector = selector(request.process.into_option()).ok_or_else(no_selector)?;
        let process = self.running(Some(selector.clone()))?;
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGKILL) => Signal::KILL,
            Some(wire::Signal::SIGNAL_SIGTERM) => Signal::TERM,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::unimplemented(format!(
                    "invalid signal: {}",
                    request.signal.to_i32()
                )));
            }
        };
        match process.signal(signal) {
            Ok(true) => {
                if signal == Signal::KILL {
                    // Who asked may look next whether it is there. Only the kernel can delay this, and not for ever.
                    let _ = timeout(KILL_LIMIT, process.exit()).await;
                }
                Response::ok(wire::SendSignalResponse::default())
            }
            Ok(false) => Err(not_found(&selector)),
            Err(error) => Err(internal(&error)),
        }
    }

    async fn close_stdin(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<wire::CloseStdinResponse> {
        let process = self.running(selector(request.to_owned_message().process.into_option()))?;
        process.close_input().await.map_err(input_error)?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

async fn give_input(process: &Process, input: Option<wire::ProcessInput>) -> Result<(), ConnectError> {
    use wire::__buffa::oneof::process_input::Input;
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => process.write(InputKind::Stdin, &bytes).await.map_err(input_error),
        Some(Input::Pty(bytes)) => process.write(InputKind::Terminal, &bytes).await.map_err(input_error),
        None => Err(ConnectError::invalid_argument("no input")),
    }
}

/// A command whose time limit cannot be read would run without one.
fn check_limit(headers: &HeaderMap) -> Result<(), ConnectError> {
    match headers
        .get(LIMIT_HEADER)
        .map(|value| (value, value.to_str().ok().and_then(|text| text.parse().ok())))
    {
        None | Some((_, Some(0_u64..))) => Ok(()),
        Some((value, None)) => {
            Err(ConnectError::invalid_argument(format!("{LIMIT_HEADER}: {value:?} is no number")))
        }
    }
}

fn selector(selector: Option<wire::ProcessSelector>) -> Option<Selector> {
    use wire::__buffa::oneof::process_selector::Selector as Wire;
    match selector?.selector? {
        Wire::Pid(pid) => Some(Selector::Pid(pid)),
        Wire::Tag(tag) => Some(Selector::Tag(tag)),
    }
}

fn size(size: wire::pty::Size) -> Result<Size, ConnectError> {
    let dimension = |value: u32, default: u16| match value {
        0 => Ok(default),
        value => {
            u16::try_from(value).map_err(|_| ConnectError::invalid_argument("terminal size is too large"))
        }
    };
    Ok(Size { columns: dimension(size.cols, 80)?, rows: dimension(size.rows, 24)? })
}

fn no_selector() -> ConnectError {
    ConnectError::invalid_argument("no process is named")
}

fn not_found(selector: &Selector) -> ConnectError {
    ConnectError::not_found(format!("{selector} not found"))
}

fn internal(error: &dyn std::error::Error) -> ConnectError {
    ConnectError::internal(chain(error))
}

fn input_error(error: InputError) -> ConnectError {
    match error {
        InputError::Closed | InputError::Write(_) => ConnectError::internal(error.to_string()),
        InputError::WantsTerminal | InputError::NoTerminal => {
            ConnectError::invalid_argument(error.to_string())
        }
    }
}

impl From<LaunchError> for ConnectError {
    fn from(error: LaunchError) -> Self {
        let message = chain(&error);
        match error {
            LaunchError::User(UserError::Unknown(_)) => Self::unauthenticated(message),
            LaunchError::User(UserError::Accounts(_)) | LaunchError::Standard(_) => Self::internal(message),
            LaunchError::NoCommand
            | LaunchError::ZeroByte(_)
            | LaunchError::Variable(_)
            | LaunchError::Path(_)
            | LaunchError::NoDirectory(_)
            | LaunchError::NotADirectory(_)
            | LaunchError::Directory { .. }
            | LaunchError::NotFound(_)
            | LaunchError::Execute { .. }
            | LaunchError::Spawn(_) => Self::invalid_argument(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use connectrpc::ErrorCode;
    use rustix::io::Errno;

    use super::{super::state::Place, *};

    #[tokio::test]
    async fn one_process_too_many_is_refused() {
        let address = "127.0.0.1:0".parse().unwrap();
        let agent = Arc::new(Agent::new(Place::Outside, address, "root".to_owned(), None, None));
        let run = async |command: &[&str]| {
            let config = wire::ProcessConfig {
                cmd: command[0].to_owned(),
                args: command[1..].iter().map(|word| (*word).to_owned()).collect(),
                ..Default::default()
            };
            let order = Order {
                config,
                standard: Standard::Pipes { input: false },
                user: None,
                identity: agent.identity(),
                cgroup: None,
            };
            start(Arc::clone(&agent), order, None, None).await
        };
        let (process, _output) = run(&["sleep", "300"]).await.unwrap();
        agent.processes.fill(&process);
        let error = run(&["true"]).await.unwrap_err();
        let message = "too many processes are running";
        assert_eq!((error.code, error.message.as_deref()), (ErrorCode::ResourceExhausted, Some(message)));
        assert_eq!(process.signal(Signal::KILL), Ok(true));
        process.exit().await;
    }

    /// Those that no test brings about from outside.
    #[test]
    fn faults_of_the_machine_are_internal() {
        let table = [
            (
                LaunchError::Standard(Errno::MFILE.into()),
                "cannot prepare standard input and output: Too many open files (os error 24)",
            ),
            (
                UserError::Accounts(Errno::ISDIR.into()).into(),
                "cannot read the user database: Is a directory (os error 21)",
            ),
        ];
        for (error, message) in table {
            let error = ConnectError::from(error);
            assert_eq!((error.code, error.message.as_deref()), (ErrorCode::Internal, Some(message)));
        }
    }
}
