//! Terminals over a WebSocket. `terminal` and `pty` are this one handler.
//!
//! ```text
//! client                        server
//!   start{cmd,cols,rows,…} ───►          or connect{tag}
//!                          ◄─── started{tag,pid}
//!   typed bytes            ───►          binary; or input{data: base64}
//!                          ◄─── shown bytes, binary; or output{data: base64} on the legacy base path
//!   resize{cols,rows}, kill ──►
//!                          ◄─── ping every 30 s
//!   pong                   ───►
//!                          ◄─── exit{exit_code}, Close
//! ```
//!
//! A published client of the one dialect loses or refuses the frames of the other, and nothing in the
//! handshake tells them apart. So the newer, binary one is the default, and the older one is chosen by base
//! path: `/api/legacy`. What is typed is understood in both on both.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{
        State,
        ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use wrenn_api::{
    Encoding, ErrorCode,
    stream::{TerminalClientFrame, TerminalServerFrame},
};

use super::{
    error::{ApiError, Errors},
    extract::{Id, parse_json},
    socket::{Broken, MESSAGE, Receiver, Said, Sender, both, close, is_lost, split, told},
};
use crate::{
    core::{Caller, Control, Core, CoreError, Session, random_tag, spec},
    guest::{Input, ProcessEvent, Selector, Signal},
};

/// How long a program may take to read what was typed.
const INPUT: Duration = Duration::from_secs(60);

/// How the bytes of a terminal are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Binary,
    Json,
}

/// Opens a terminal, or comes back to one.
///
/// A WebSocket: the client's first text frame is `start` or `connect` of `TerminalClientFrame`; the
/// server's text frames are those of `TerminalServerFrame`. What is typed and shown are binary frames. Under
/// the base path `/api/legacy/v1` what is shown are `output` text frames with base64.
#[utoipa::path(
    get, path = "/{id}/terminal", tag = "commands", operation_id = "terminal",
    params(("id" = String, Path, description = "The sandbox")),
    responses((status = 101, description = "A WebSocket"), Errors)
)]
pub(super) async fn terminal(
    State(core): State<Arc<Core>>,
    Extension(dialect): Extension<Dialect>,
    caller: Caller,
    id: Result<Id, ApiError>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    Ok(upgrade?.max_message_size(MESSAGE).on_upgrade(move |socket| async move {
        let tasks = core.tasks().clone();
        tasks.track_future(Box::pin(serve(core, caller, id, socket, dialect))).await;
    }))
}

async fn serve(
    core: Arc<Core>,
    caller: Caller,
    id: Result<Id, ApiError>,
    socket: WebSocket,
    dialect: Dialect,
) {
    let (mut sender, mut receiver) = split(socket);
    let opened = async {
        let Id(id) = id?;
        let frame = match receiver.first().await {
            Some(Said::Text(text)) => parse_json(text.as_bytes())?,
            _ => TerminalClientFrame::Unknown,
        };
        match frame {
            TerminalClientFrame::Start(asked) => {
                let mut launch = spec::check_terminal(asked)?;
                let tag = random_tag("pty");
                launch.tag = Some(tag.clone());
                let session = core.start(&caller, &id, "terminal", launch, false).await?;
                Ok((session, tag))
            }
            TerminalClientFrame::Connect { tag } => {
                spec::check_tag(&tag)?;
                let session = core.join(&caller, &id, &Selector::Tag(tag.clone())).await?;
                Ok((session, tag))
            }
            _ => {
                let message = "the first frame must be of type start or connect".to_owned();
                Err(ApiError::from(CoreError::Invalid(message)))
            }
        }
    };
    match opened.await {
        Ok((session, tag)) => converse(&core, session, tag, &mut sender, &mut receiver, dialect).await,
        Err(error) => refuse(&mut sender, error).await,
    }
    close(&core, sender, receiver).await;
}

async fn refuse(sender: &mut Sender, error: ApiError) {
    let parts = told(error);
    let frame = TerminalServerFrame::Error { data: parts.message, fatal: true, code: Some(parts.code) };
    let _ = sender.json(&frame).await;
}

async fn converse(
    core: &Core,
    mut session: Session,
    tag: String,
    sender: &mut Sender,
    receiver: &mut Receiver,
    dialect: Dialect,
) {
    let control = session.control();
    // What the listening half has to say goes over the one sender.
    let (notes, heard) = tokio::sync::mpsc::channel(4);
    let show = show(&mut session, tag, sender, heard, dialect, core.bounds.ping);
    // When the client has gone, the process stays, to be connected to again.
    let broken = both(core, pin!(show), pin!(listen(control, receiver, notes))).await;
    if let Some(error) = broken {
        refuse(sender, error.into()).await;
    }
}

async fn show(
    session: &mut Session,
    tag: String,
    sender: &mut Sender,
    mut heard: tokio::sync::mpsc::Receiver<TerminalServerFrame>,
    dialect: Dialect,
    every: Duration,
) -> Result<(), Broken> {
    sender.json(&TerminalServerFrame::Started { tag, pid: session.pid() }).await?;
    let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    loop {
        let event = tokio::select! {
            event = session.next() => event?,
            Some(note) = heard.recv() => {
                sender.json(&note).await?;
                continue;
            }
            _ = ping.tick() => {
                sender.json(&TerminalServerFrame::Ping).await?;
                continue;
            }
        };
        match event {
            ProcessEvent::Terminal(bytes) | ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes) => {
                match dialect {
                    Dialect::Binary => sender.send(Message::Binary(bytes)).await?,
                    Dialect::Json => {
                        let data = Encoding::Base64.encode(&bytes);
                        sender.json(&TerminalServerFrame::Output { data }).await?;
                    }
                }
            }
            ProcessEvent::Ended(end) => {
                sender.json(&TerminalServerFrame::Exit { exit_code: end.exit_code }).await?;
                return Ok(());
            }
            ProcessEvent::Started { .. } => {}
        }
    }
}

/// What the client says, in its order: while a program does not read, what comes after waits with it, and
/// the client is not read from. Nothing is dropped in silence.
///
/// # Errors
/// Some of the input may be lost: nothing after it may be read as if it were not.
async fn listen(
    control: Control,
    receiver: &mut Receiver,
    notes: tokio::sync::mpsc::Sender<TerminalServerFrame>,
) -> Result<(), CoreError> {
    while let Some(said) = receiver.next().await {
        let done = match said {
            Said::Binary(bytes) => control.send(Input::Terminal(bytes.to_vec()), INPUT).await,
            Said::Text(text) => match parse_json(text.as_bytes()) {
                Ok(frame) => obey(&control, frame).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = done {
            if is_lost(&error) {
                return Err(error);
            }
            let parts = ApiError::from(error).parts();
            // A process that has ended takes nothing more, and its `exit` is on its way.
            if parts.code != ErrorCode::NotFound {
                let (data, code) = (parts.message, Some(parts.code));
                let note = TerminalServerFrame::Error { data, fatal: false, code };
                if notes.send(note).await.is_err() {
                    break;
                }
            }
        }
    }
    Ok(())
}

async fn obey(control: &Control, frame: TerminalClientFrame) -> Result<(), CoreError> {
    match frame {
        TerminalClientFrame::Input { data } => {
            let bytes = Encoding::Base64
                .decode(&data)
                .map_err(|error| CoreError::Invalid(format!("input: {error}")))?;
            control.send(Input::Terminal(bytes), INPUT).await
        }
        TerminalClientFrame::Resize { cols, rows } => {
            let (cols, rows) = spec::check_cells(cols.into(), rows.into())?;
            control.resize(cols, rows).await
        }
        TerminalClientFrame::Kill => control.signal(Signal::Kill).await,
        TerminalClientFrame::Start(_)
        | TerminalClientFrame::Connect { .. }
        | TerminalClientFrame::Pong
        | TerminalClientFrame::Unknown => Ok(()),
    }
}
