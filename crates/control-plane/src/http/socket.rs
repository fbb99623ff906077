//! What the WebSockets share: sending within a bound, reading frames, the two halves of a conversation, and a proper end.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use futures::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use serde::Serialize;

use super::error::{ApiError, Parts, log};
use crate::{
    core::{Core, CoreError},
    guest::GuestError,
};

/// How long a client may take to read a frame. Output waits for the client until then, and the process
/// waits for its output to be taken: nothing is dropped.
const SEND: Duration = Duration::from_secs(60);
/// How long a client may take to say what it wants.
pub(super) const FIRST_FRAME: Duration = Duration::from_secs(30);
/// How long a client may take to hear that this is the end, and to say so too: a slow one still has output to read.
const FAREWELL: Duration = Duration::from_secs(30);
/// The same when the server is stopping.
const SHORT_FAREWELL: Duration = Duration::from_secs(2);
/// The largest message of a client.
pub(super) const MESSAGE: usize = 4 << 20;

/// The client has gone.
#[derive(Debug)]
pub(super) struct Gone;

/// Why what happens to a process is not shown any more, before its end was.
#[derive(Debug)]
pub(super) enum Broken {
    /// Nobody looks.
    Gone,
    /// It is to be told to the client.
    Failed(CoreError),
}

impl From<Gone> for Broken {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

impl From<CoreError> for Broken {
    fn from(error: CoreError) -> Self {
        Self::Failed(error)
    }
}

/// The sending half.
pub(super) struct Sender(SplitSink<WebSocket, Message>);

/// The receiving half.
pub(super) struct Receiver(SplitStream<WebSocket>);

/// What a client says.
pub(super) enum Said {
    Text(String),
    Binary(bytes::Bytes),
}

pub(super) fn split(socket: WebSocket) -> (Sender, Receiver) {
    let (sender, receiver) = socket.split();
    (Sender(sender), Receiver(receiver))
}

impl Sender {
    pub(super) async fn send(&mut self, message: Message) -> Result<(), Gone> {
        match tokio::time::timeout(SEND, self.0.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }

    pub(super) async fn json(&mut self, frame: &impl Serialize) -> Result<(), Gone> {
        let text = serde_json::to_string(frame).map_err(|_| Gone)?;
        self.send(Message::Text(text.into())).await
    }
}

impl Receiver {
    /// The next frame with something in it; none when the client has gone.
    pub(super) async fn next(&mut self) -> Option<Said> {
        loop {
            match self.0.next().await? {
                Ok(Message::Text(text)) => return Some(Said::Text(text.to_string())),
                Ok(Message::Binary(bytes)) => return Some(Said::Binary(bytes)),
                // Pings are answered by the library.
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Close(_)) | Err(_) => return None,
            }
        }
    }

    /// The first frame, which says what is wanted.
    pub(super) async fn first(&mut self) -> Option<Said> {
        tokio::time::timeout(FIRST_FRAME, self.next()).await.unwrap_or(None)
    }
}

/// A conversation about a process: `show` tells the client what happens to it, `listen` passes on what the client says.
/// The first of them that ends ends both. Answers what the client is to be told then.
pub(super) async fn both(
    core: &Core,
    show: impl Future<Output = Result<(), Broken>>,
    listen: impl Future<Output = Result<(), CoreError>>,
) -> Option<CoreError> {
    tokio::select! {
        shown = show => match shown {
            Err(Broken::Failed(error)) => Some(error),
            Ok(()) | Err(Broken::Gone) => None,
        },
        heard = listen => heard.err(),
        () = core.stopping() => Some(CoreError::TooMany("the server is stopping")),
    }
}

/// Whether a guest did not say what became of what it was sent: then nothing after it may be read as if it were there.
pub(super) fn is_lost(error: &CoreError) -> bool {
    matches!(error, CoreError::Guest(error) if !matches!(error, GuestError::Refused { .. }))
}

/// Says that this is the end, and waits until the client has heard it, which its own end of the conversation shows.
/// Older clients take an end without such a word for an error.
///
/// What it says until then is read and thrown away: a connection that is closed with unread bytes is reset, and a reset
/// takes with it what the client has not read yet, the exit of its command for one.
pub(super) async fn close(core: &Core, mut sender: Sender, mut receiver: Receiver) {
    let frame = CloseFrame { code: close_code::NORMAL, reason: "".into() };
    if sender.send(Message::Close(Some(frame))).await.is_err() {
        return;
    }
    let stopping = async {
        core.stopping().await;
        tokio::time::sleep(SHORT_FAREWELL).await;
    };
    tokio::select! {
        () = async { while receiver.next().await.is_some() {} } => {}
        () = tokio::time::sleep(FAREWELL) => {}
        () = stopping => {}
    }
}

/// The parts of an error that is told over the socket, logged as a REST answer would be.
pub(super) fn told(error: ApiError) -> Parts {
    let parts = error.parts();
    log(&error, &parts);
    parts
}
