//! WebSockets against a stack.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use crate::Client;

/// How long a test waits for one message.
const BOUND: Duration = Duration::from_secs(60);
/// How long it may take to send one: the other side reads no faster than a program in a guest.
const SEND_BOUND: Duration = Duration::from_secs(180);

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A JSON text frame.
    Json(Value),
    /// A binary frame.
    Binary(Vec<u8>),
    /// The other side closed, properly.
    Closed,
}

/// One WebSocket.
#[derive(Debug)]
pub struct Socket {
    stream: WebSocketStream<TcpStream>,
}

impl Socket {
    /// Opens `path` as this client.
    pub async fn open(client: &Client, path: &str) -> Result<Self> {
        let mut request = format!("ws://{}{path}", client.authority()).into_client_request()?;
        request.headers_mut().insert("x-api-key", client.key().parse()?);
        let stream = TcpStream::connect(client.authority()).await?;
        let (stream, _) = timeout(BOUND, tokio_tungstenite::client_async(request, stream)).await??;
        Ok(Self { stream })
    }

    /// Sends a JSON text frame.
    pub async fn send(&mut self, message: &Value) -> Result<()> {
        self.send_message(Message::text(message.to_string())).await
    }

    /// Sends a binary frame.
    pub async fn send_binary(&mut self, bytes: &[u8]) -> Result<()> {
        self.send_message(Message::binary(bytes.to_vec())).await
    }

    async fn send_message(&mut self, message: Message) -> Result<()> {
        Ok(timeout(SEND_BOUND, self.stream.send(message)).await.context("it was not taken in time")??)
    }

    /// The next frame that means something.
    pub async fn next(&mut self) -> Result<Frame> {
        loop {
            match timeout(BOUND, self.stream.next()).await.context("no frame in time")? {
                None => bail!("the connection ended without a close frame"),
                Some(message) => match message? {
                    Message::Text(text) => return Ok(Frame::Json(serde_json::from_str(&text)?)),
                    Message::Binary(bytes) => return Ok(Frame::Binary(bytes.to_vec())),
                    Message::Close(_) => return Ok(Frame::Closed),
                    Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                },
            }
        }
    }

    /// The next JSON frame of this `type`; other frames before it are passed over.
    pub async fn until(&mut self, kind: &str) -> Result<Value> {
        loop {
            match self.next().await? {
                Frame::Json(value) if value["type"] == kind => return Ok(value),
                Frame::Closed => bail!("closed before a {kind} frame"),
                Frame::Json(_) | Frame::Binary(_) => {}
            }
        }
    }
}
