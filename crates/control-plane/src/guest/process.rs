//! Processes of a guest.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use connectrpc::client::{CallOptions, ServerStream};
use wrenn_api::ProcessInfo;
use wrenn_proto::process::{self as proto, __buffa as generated};
use wrenn_types::InactivityTimeout;

use super::{Guest, GuestError, Transport};
use crate::lingering::Lingering;

/// How often a guest is asked to say that a silent process is still there, in seconds.
///
/// What it says is a byte in the tunnel, and bytes in the tunnel are what the host's inactivity clock goes
/// by: so a command that somebody waits for is activity, as long as it says so more often than the clock
/// runs out.
fn keepalive_seconds(timeout: InactivityTimeout) -> u32 {
    const USUAL: u32 = 30;
    match timeout.get() {
        0 => USUAL,
        seconds => (seconds / 3).clamp(1, USUAL),
    }
}

/// A process to start.
#[derive(Debug, Clone, Default)]
pub(crate) struct Launch {
    pub(crate) cmd: String,
    pub(crate) args: Vec<String>,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) tag: Option<String>,
    /// Whether its standard input is a pipe; else it is empty.
    pub(crate) stdin: bool,
    /// Columns and rows, for a process with a terminal.
    pub(crate) terminal: Option<(u32, u32)>,
    /// When the guest itself kills it, should nobody else.
    pub(crate) killed_after: Option<Duration>,
}

/// Which process is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selector {
    Pid(u32),
    Tag(String),
}

impl Selector {
    /// A number is a process id; everything else is a tag.
    pub(crate) fn parse(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Tag(text.to_owned()), Self::Pid)
    }

    fn to_proto(&self) -> proto::ProcessSelector {
        use generated::oneof::process_selector::Selector as Wire;
        let selector = match self {
            Self::Pid(pid) => Wire::Pid(*pid),
            Self::Tag(tag) => Wire::Tag(tag.clone()),
        };
        proto::ProcessSelector { selector: Some(selector), ..Default::default() }
    }
}

/// What a process is sent.
#[derive(Debug)]
pub(crate) enum Input {
    Stdin(Vec<u8>),
    Terminal(Vec<u8>),
}

/// How a process is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Terminate,
    Kill,
}

/// How a process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) exit_code: i32,
    /// In words; absent for exit code 0.
    pub(crate) status: Option<String>,
}

/// What happens to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ProcessEvent {
    Started { pid: u32 },
    Stdout(Bytes),
    Stderr(Bytes),
    Terminal(Bytes),
    Ended(End),
}

/// The events of a process, from its start or from the moment of joining it.
#[derive(Debug)]
pub(crate) struct ProcessStream {
    events: Events,
    silence: Duration,
}

#[derive(Debug)]
enum Events {
    Started(ServerStream<Lingering, generated::view::StartResponseView<'static>>),
    Joined(ServerStream<Lingering, generated::view::ConnectResponseView<'static>>),
}

impl ProcessStream {
    /// The next event, or none after the last. May be dropped between polls without losing an event.
    pub(crate) async fn next(&mut self) -> Result<Option<ProcessEvent>, GuestError> {
        loop {
            let event = tokio::time::timeout(self.silence, async {
                Ok::<_, GuestError>(match &mut self.events {
                    Events::Started(stream) => {
                        stream.message().await?.map(|message| message.to_owned_message().event)
                    }
                    Events::Joined(stream) => {
                        stream.message().await?.map(|message| message.to_owned_message().event)
                    }
                })
            })
            .await
            .map_err(|_| GuestError::TimedOut)??;
            let Some(event) = event else { return Ok(None) };
            if let Some(event) = event.into_option().and_then(translate) {
                return Ok(Some(event));
            }
        }
    }
}

/// None for keepalives, and for events of a newer guest.
fn translate(event: proto::ProcessEvent) -> Option<ProcessEvent> {
    use generated::oneof::process_event::{Event, data_event::Output};
    match event.event? {
        Event::Start(start) => Some(ProcessEvent::Started { pid: start.pid }),
        Event::Data(data) => match data.output? {
            Output::Stdout(bytes) => Some(ProcessEvent::Stdout(bytes.into())),
            Output::Stderr(bytes) => Some(ProcessEvent::Stderr(bytes.into())),
            Output::Pty(bytes) => Some(ProcessEvent::Terminal(bytes.into())),
        },
        Event::End(end) => {
            let proto::process_event::EndEvent { exited, exit_code, status, error, .. } = *end;
            let clean = exited && exit_code == 0;
            let status = Some(error.unwrap_or(status)).filter(|words| !clean && !words.is_empty());
            // What a signal ended has no exit code, and must not look as if it had succeeded.
            let exit_code = if exited { exit_code } else { -1 };
            Some(ProcessEvent::Ended(End { exit_code, status }))
        }
        Event::Keepalive(_) => None,
    }
}

impl Guest {
    fn processes(&self, user: Option<&str>) -> Result<proto::ProcessClient<Transport>, GuestError> {
        let (transport, config) = self.transport(user)?;
        Ok(proto::ProcessClient::new(transport, config))
    }

    fn streaming(&self) -> CallOptions {
        CallOptions::default()
            .with_header("keepalive-ping-interval", keepalive_seconds(self.timeout).to_string())
    }

    /// Starts a process. The first event says its process id.
    pub(crate) async fn start(&self, launch: Launch, silence: Duration) -> Result<ProcessStream, GuestError> {
        let pty = launch.terminal.map(|(cols, rows)| terminal_size(cols, rows));
        let request = proto::StartRequest {
            process: Some(proto::ProcessConfig {
                cmd: launch.cmd,
                args: launch.args,
                envs: launch.envs.into_iter().collect(),
                cwd: launch.cwd,
                ..Default::default()
            })
            .into(),
            pty: pty.into(),
            tag: launch.tag,
            stdin: Some(launch.stdin),
            ..Default::default()
        };
        let mut options = self.streaming();
        if let Some(killed_after) = launch.killed_after {
            options = options.with_timeout(killed_after);
        }
        let client = self.processes(launch.user.as_deref())?;
        let opening = client.start_with_options(request, options);
        let stream =
            tokio::time::timeout(self.question, opening).await.map_err(|_| GuestError::TimedOut)??;
        Ok(ProcessStream { events: Events::Started(stream), silence })
    }

    /// Joins a process that runs. The first event says its process id.
    pub(crate) async fn join(
        &self,
        selector: &Selector,
        silence: Duration,
    ) -> Result<ProcessStream, GuestError> {
        let request =
            proto::ConnectRequest { process: Some(selector.to_proto()).into(), ..Default::default() };
        let client = self.processes(None)?;
        let opening = client.connect_with_options(request, self.streaming());
        let stream =
            tokio::time::timeout(self.question, opening).await.map_err(|_| GuestError::TimedOut)??;
        Ok(ProcessStream { events: Events::Joined(stream), silence })
    }

    /// What runs and was started through this agent.
    pub(crate) async fn list(&self) -> Result<Vec<ProcessInfo>, GuestError> {
        let request = proto::ListRequest::default();
        let answer = self.processes(None)?.list_with_options(request, self.question()).await?;
        let processes = answer.into_owned().processes.into_iter().map(|process| {
            let config = process.config.into_option().unwrap_or_default();
            ProcessInfo { pid: process.pid, tag: process.tag, cmd: config.cmd, args: config.args }
        });
        Ok(processes.collect())
    }

    /// Ends a process and what it started in its group.
    pub(crate) async fn signal(&self, selector: &Selector, signal: Signal) -> Result<(), GuestError> {
        let signal = match signal {
            Signal::Terminate => proto::Signal::SIGNAL_SIGTERM,
            Signal::Kill => proto::Signal::SIGNAL_SIGKILL,
        };
        let request = proto::SendSignalRequest {
            process: Some(selector.to_proto()).into(),
            signal: signal.into(),
            ..Default::default()
        };
        self.processes(None)?.send_signal_with_options(request, self.question()).await?;
        Ok(())
    }

    /// Writes to a process; answers when the guest has taken all of it.
    pub(crate) async fn send(
        &self,
        selector: &Selector,
        input: Input,
        bound: Duration,
    ) -> Result<(), GuestError> {
        use generated::oneof::process_input::Input as Wire;
        let input = match input {
            Input::Stdin(bytes) => Wire::Stdin(bytes),
            Input::Terminal(bytes) => Wire::Pty(bytes),
        };
        let request = proto::SendInputRequest {
            process: Some(selector.to_proto()).into(),
            input: Some(proto::ProcessInput { input: Some(input), ..Default::default() }).into(),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        self.processes(None)?.send_input_with_options(request, options).await?;
        Ok(())
    }

    /// Ends the standard input of a process.
    pub(crate) async fn close_stdin(&self, selector: &Selector) -> Result<(), GuestError> {
        let request =
            proto::CloseStdinRequest { process: Some(selector.to_proto()).into(), ..Default::default() };
        self.processes(None)?.close_stdin_with_options(request, self.question()).await?;
        Ok(())
    }

    /// Gives the terminal of a process a new size.
    pub(crate) async fn resize(&self, selector: &Selector, cols: u32, rows: u32) -> Result<(), GuestError> {
        let request = proto::UpdateRequest {
            process: Some(selector.to_proto()).into(),
            pty: Some(terminal_size(cols, rows)).into(),
            ..Default::default()
        };
        self.processes(None)?.update_with_options(request, self.question()).await?;
        Ok(())
    }
}

fn terminal_size(cols: u32, rows: u32) -> proto::PTY {
    proto::PTY {
        size: Some(proto::pty::Size { cols, rows, ..Default::default() }).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the clock, a silent process is heard of twice before it runs out, also where once comes late.
        #[test]
        fn who_is_waited_for_is_heard_of_in_time(seconds in prop_oneof![0_i64..200, 0_i64..=2_592_000]) {
            let timeout = InactivityTimeout::new(seconds).unwrap();
            let every = Duration::from_secs(keepalive_seconds(timeout).into());
            prop_assert!(every >= Duration::from_secs(1));
            prop_assert!(every <= Duration::from_secs(30), "a connection that died is noticed");
            if let Some(clock) = timeout.duration() {
                prop_assert!(every * 2 <= clock, "{every:?} of {clock:?}");
            }
        }
    }
}
