//! A WebSocket of the API.
//!
//! Writing has a task of its own: if reading waited for writing, a server that waits until its output is read
//! and a client that waits until its input is taken would wait for each other for ever.
//! The task also sends a ping now and then, and a connection from which nothing at all comes is given up.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _, stream::SplitStream};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};
use wrenn_api::API_KEY_HEADER;

use super::{
    endpoint::Endpoint,
    error::ClientError,
    http::{CALL_BOUND, CONNECT_BOUND, refusal},
};

/// How often a ping is sent.
const PING_EVERY: Duration = Duration::from_secs(20);
/// A connection from which nothing came for this long is dead: three pings were not answered.
const SILENCE: Duration = Duration::from_secs(65);
/// Messages that wait to be written; whoever sends more waits with them.
const QUEUE: usize = 16;

/// What came in.
#[derive(Debug)]
pub(super) enum Received<T> {
    /// A text frame.
    Frame(T),
    /// A binary frame.
    Bytes(bytes::Bytes),
}

/// An open WebSocket. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Socket {
    incoming: SplitStream<WebSocketStream<TcpStream>>,
    outgoing: Outgoing,
    writer: JoinHandle<()>,
}

/// The writing side; clones write to the same socket.
#[derive(Debug, Clone)]
pub(super) struct Outgoing(mpsc::Sender<Message>);

impl Outgoing {
    /// Sends a text frame.
    pub(super) async fn frame(&self, frame: &impl Serialize) -> Result<(), ClientError> {
        let text = serde_json::to_string(frame).map_err(|error| ClientError::Request(error.into()))?;
        self.0.send(Message::text(text)).await.map_err(|_| ClientError::Closed)
    }

    /// Sends a binary frame.
    pub(super) async fn bytes(&self, bytes: Vec<u8>) -> Result<(), ClientError> {
        self.0.send(Message::binary(bytes)).await.map_err(|_| ClientError::Closed)
    }
}

impl Socket {
    /// Opens a WebSocket at a path.
    pub(super) async fn open(endpoint: &Endpoint, path: &str) -> Result<Self, ClientError> {
        let base = &endpoint.base;
        let name = format!("GET {path}");
        let connect = TcpStream::connect((base.host.as_str(), base.port));
        let connected = tokio::time::timeout(CONNECT_BOUND, connect).await;
        let stream = connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        let stream = stream
            .map_err(|source| ClientError::Connect { base_url: base.to_string(), source: source.into() })?;
        // Keys that are typed should not wait for more of them. If the option is refused, they wait.
        let _ = stream.set_nodelay(true);

        let request = format!("ws://{}{}{path}", base.authority, base.prefix).into_client_request();
        let mut request = request.map_err(|error| ClientError::Request(error.into()))?;
        let key = endpoint
            .key
            .expose()
            .parse()
            .map_err(|error: http::header::InvalidHeaderValue| ClientError::Request(error.into()))?;
        request.headers_mut().insert(API_KEY_HEADER, key);
        let opened = tokio::time::timeout(CALL_BOUND, client_async(request, stream)).await;
        let (socket, _) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(tungstenite::Error::Http(answer))) => {
                let body = answer.body().as_deref().unwrap_or_default();
                return Err(refusal(&name, answer.status(), body));
            }
            Ok(Err(error)) => return Err(ClientError::Broken { call: name, source: error.into() }),
            Err(_) => return Err(ClientError::Timeout { call: name, bound: CALL_BOUND }),
        };

        let (mut sink, incoming) = socket.split();
        let (outgoing, mut queue) = mpsc::channel::<Message>(QUEUE);
        let writer = tokio::spawn(async move {
            let mut pings = tokio::time::interval(PING_EVERY);
            pings.tick().await;
            loop {
                let message = tokio::select! {
                    message = queue.recv() => message,
                    _ = pings.tick() => Some(Message::Ping(bytes::Bytes::new())),
                };
                let Some(message) = message else { break };
                // The reader learns of a broken connection, too, and says so.
                if sink.send(message).await.is_err() {
                    break;
                }
            }
        });
        Ok(Self { incoming, outgoing: Outgoing(outgoing), writer })
    }

    /// The writing side.
    pub(super) fn outgoing(&self) -> Outgoing {
        self.outgoing.clone()
    }

    /// The next frame; none if the other side closed the connection in order.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<Received<T>>, ClientError> {
        let call = || "the stream of a command".to_owned();
        loop {
            let message = match tokio::time::timeout(SILENCE, self.incoming.next()).await {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(tungstenite::Error::ConnectionClosed)) | None) => return Ok(None),
                Ok(Some(Err(error))) => {
                    return Err(ClientError::Broken { call: call(), source: error.into() });
                }
                Err(_) => return Err(ClientError::Silent(SILENCE)),
            };
            match message {
                Message::Text(text) => {
                    let frame = serde_json::from_str(&text).map_err(|error| ClientError::Unexpected {
                        call: call(),
                        status: 101,
                        source: Some(error.into()),
                    })?;
                    return Ok(Some(Received::Frame(frame)));
                }
                Message::Binary(bytes) => return Ok(Some(Received::Bytes(bytes))),
                Message::Close(_) => return Ok(None),
                // A ping is answered by the library, a pong shows that the other side lives.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.writer.abort();
    }
}
