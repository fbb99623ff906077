//! Commands and processes over a WebSocket, with JSON text frames (see [`wrenn_api::stream`]).
//!
//! Two halves run side by side: one passes what the process writes to the client, the other what the client
//! says to the process. When the first ends, the command has ended; when the second ends, the client has
//! gone, or what it said could not be passed on, and a command that was started here is killed.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::{
    extract::{
        State,
        ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use wrenn_api::{
    Encoding,
    stream::{ExecClientFrame, ExecServerFrame},
};

use super::{
    error::{ApiError, Errors},
    extract::{Id, Process, parse_json},
    socket::{Broken, MESSAGE, Receiver, Said, Sender, both, close, is_lost, split, told},
    text::Utf8Pieces,
};
use crate::{
    core::{Caller, Control, Core, CoreError, Session, spec},
    guest::{Input, ProcessEvent, Signal},
};

/// How long a command has between SIGTERM and SIGKILL.
const POLITE: Duration = Duration::from_secs(3);
/// How long a command may take to read what it is sent. Until then the client is not read from.
const INPUT: Duration = Duration::from_secs(600);

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

/// Runs a command over a WebSocket.
///
/// The client's first text frame is `{"type":"start","cmd",…}` (see `ExecClientFrame`); the server's frames
/// are those of `ExecServerFrame`. An unknown sandbox and the like is told by an `error` frame.
#[utoipa::path(
    get, path = "/{id}/exec/stream", tag = "commands", operation_id = "exec_stream",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 101, description = "A WebSocket"), Errors)
)]
pub(super) async fn exec_stream(
    State(core): State<Arc<Core>>,
    caller: Caller,
    id: Result<Id, ApiError>,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    Ok(upgrade?.max_message_size(MESSAGE).on_upgrade(move |socket| async move {
        let tasks = core.tasks().clone();
        tasks.track_future(Box::pin(run_command(core, caller, id, socket))).await;
    }))
}

/// Follows a process over a WebSocket: the output from now on, and its end.
#[utoipa::path(
    get, path = "/{id}/processes/{selector}/stream", tag = "commands", operation_id = "process_stream",
    params(
        ("id" = String, Path, description = "The sandbox"),
        ("selector" = String, Path, description = "The process id, or the tag")
    ),
    responses((status = 101, description = "A WebSocket"), Errors)
)]
pub(super) async fn process_stream(
    State(core): State<Arc<Core>>,
    caller: Caller,
    id: Result<Id, ApiError>,
    Process(selector): Process,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    Ok(upgrade?.max_message_size(MESSAGE).on_upgrade(move |socket| async move {
        let tasks = core.tasks().clone();
        let follow = async {
            let (mut sender, mut receiver) = split(socket);
            let joined = async { Ok(core.join(&caller, &id?.0, &selector).await?) };
            match joined.await {
                Ok(session) => {
                    converse(&core, session, &mut sender, &mut receiver, Encoding::Utf8, None, false).await;
                }
                Err(error) => refuse(&mut sender, error).await,
            }
            close(&core, sender, receiver).await;
        };
        tasks.track_future(follow).await;
    }))
}

async fn run_command(core: Arc<Core>, caller: Caller, id: Result<Id, ApiError>, socket: WebSocket) {
    let (mut sender, mut receiver) = split(socket);
    let started = async {
        let Id(id) = id?;
        let first = receiver.first().await;
        let frame = match &first {
            Some(Said::Text(text)) => parse_json(text.as_bytes())?,
            _ => ExecClientFrame::Unknown,
        };
        let ExecClientFrame::Start(asked) = frame else {
            return Err(CoreError::Invalid("the first frame must be of type start".to_owned()).into());
        };
        let (launch, timeout, encoding) = spec::check_stream(asked)?;
        let session = core.start(&caller, &id, "exec_stream", launch, true).await?;
        Ok::<_, ApiError>((session, timeout, encoding))
    };
    match started.await {
        Ok((session, timeout, encoding)) => {
            converse(&core, session, &mut sender, &mut receiver, encoding, timeout, true).await;
        }
        Err(error) => refuse(&mut sender, error).await,
    }
    close(&core, sender, receiver).await;
}

async fn refuse(sender: &mut Sender, error: ApiError) {
    let parts = told(error);
    let _ = sender.json(&ExecServerFrame::Error { data: parts.message, code: Some(parts.code) }).await;
}

/// Both halves, until one of them ends.
async fn converse(
    core: &Core,
    mut session: Session,
    sender: &mut Sender,
    receiver: &mut Receiver,
    encoding: Encoding,
    timeout: Option<Duration>,
    owned: bool,
) {
    let control = session.control();
    let mut output = Written {
        encoding,
        stdout: Utf8Pieces::default(),
        stderr: Utf8Pieces::default(),
        ping: core.bounds.ping,
    };
    let show = async {
        let timeout = timeout.unwrap_or(Duration::MAX);
        let shown = tokio::time::timeout(timeout, output.show(&mut session, sender)).await;
        shown.unwrap_or_else(|_| Err(CoreError::CommandTimedOut(timeout).into()))
    };
    let broken = both(core, pin!(show), pin!(listen(control, receiver, owned))).await;
    if let Some(error) = broken {
        refuse(sender, error.into()).await;
    }
}

/// What the process writes, on its way to the client.
struct Written {
    encoding: Encoding,
    stdout: Utf8Pieces,
    stderr: Utf8Pieces,
    /// How often the client is told that the connection still lives.
    ping: Duration,
}

impl Written {
    async fn show(&mut self, session: &mut Session, sender: &mut Sender) -> Result<(), Broken> {
        sender.json(&ExecServerFrame::Start { pid: session.pid() }).await?;
        let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + self.ping, self.ping);
        loop {
            let event = tokio::select! {
                event = session.next() => event?,
                _ = ping.tick() => {
                    sender.send(Message::Ping(bytes::Bytes::new())).await?;
                    continue;
                }
            };
            match event {
                ProcessEvent::Stdout(piece) | ProcessEvent::Terminal(piece) => {
                    if let Some(data) = text(self.encoding, &mut self.stdout, &piece) {
                        sender.json(&ExecServerFrame::Stdout { data }).await?;
                    }
                }
                ProcessEvent::Stderr(piece) => {
                    if let Some(data) = text(self.encoding, &mut self.stderr, &piece) {
                        sender.json(&ExecServerFrame::Stderr { data }).await?;
                    }
                }
                ProcessEvent::Ended(end) => {
                    if let Some(data) = self.stdout.finish() {
                        sender.json(&ExecServerFrame::Stdout { data }).await?;
                    }
                    if let Some(data) = self.stderr.finish() {
                        sender.json(&ExecServerFrame::Stderr { data }).await?;
                    }
                    let (exit_code, status) = (end.exit_code, end.status);
                    sender.json(&ExecServerFrame::Exit { exit_code, status }).await?;
                    return Ok(());
                }
                ProcessEvent::Started { .. } => {}
            }
        }
    }
}

fn text(encoding: Encoding, pieces: &mut Utf8Pieces, piece: &[u8]) -> Option<String> {
    let text = match encoding {
        Encoding::Utf8 => pieces.push(piece),
        Encoding::Base64 => encoding.encode(piece),
    };
    (!text.is_empty()).then_some(text)
}

/// What the client says, until it has gone.
///
/// # Errors
/// Some of the input may be lost: nothing after it may be read as if it were not.
async fn listen(control: Control, receiver: &mut Receiver, owned: bool) -> Result<(), CoreError> {
    while let Some(said) = receiver.next().await {
        // Who only watches a process has no say in it.
        let Said::Text(said) = said else { continue };
        let Ok(frame) = parse_json::<ExecClientFrame>(said.as_bytes()) else { continue };
        match frame {
            ExecClientFrame::Stdin { data, encoding } if owned => {
                let bytes = encoding
                    .unwrap_or_default()
                    .decode(&data)
                    .map_err(|error| CoreError::Invalid(format!("input: {error}")))?;
                taken(control.send(Input::Stdin(bytes), INPUT).await)?;
            }
            ExecClientFrame::StdinClose if owned => taken(control.close_stdin().await)?,
            // What fails here, fails because the process has ended; its end is on its way to the client.
            ExecClientFrame::Stop if owned => {
                let _ = control.signal(Signal::Terminate).await;
                // Until then the process has ended, and this future with it, or it does not want to.
                tokio::time::sleep(POLITE).await;
                let _ = control.signal(Signal::Kill).await;
            }
            _ => {}
        }
    }
    Ok(())
}

/// What became of input. That a process takes none, because it has ended or has closed it, is no error.
fn taken(outcome: Result<(), CoreError>) -> Result<(), CoreError> {
    match outcome {
        Err(error) if is_lost(&error) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GuestError, Refusal};

    #[test]
    fn input_that_may_be_lost_ends_the_session_and_input_that_nobody_reads_does_not() {
        let refused = GuestError::Refused { refusal: Refusal::Failed, message: "closed".to_owned() };
        assert!(taken(Err(refused.into())).is_ok());
        assert!(taken(Err(GuestError::TimedOut.into())).is_err());
        assert!(taken(Err(GuestError::Lost("cut".into()).into())).is_err());
    }
}
