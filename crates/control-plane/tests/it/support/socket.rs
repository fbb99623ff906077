//! WebSockets with an API key.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};

use super::client::Client;

pub(crate) struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

/// What the server says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Said {
    Text(Value),
    Binary(Vec<u8>),
    /// A proper end, with its code.
    Closed(u16),
    /// An end without a word.
    Broken,
}

impl Socket {
    pub(crate) async fn open(client: &Client, path: &str) -> Result<Self, tungstenite::Error> {
        Self::open_at(client, &client.address.to_string(), path).await
    }

    /// The same, by a host name of the client's choice.
    pub(crate) async fn open_at(client: &Client, host: &str, path: &str) -> Result<Self, tungstenite::Error> {
        let mut request = format!("ws://{}{path}", client.address).into_client_request().unwrap();
        request.headers_mut().insert("host", host.parse().unwrap());
        request.headers_mut().insert("x-api-key", client.key.parse().unwrap());
        Ok(Self(connect_async(request).await?.0))
    }

    pub(crate) async fn send(&mut self, frame: Value) {
        self.0.send(Message::Text(frame.to_string().into())).await.unwrap();
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.0.send(Message::Binary(bytes.to_vec().into())).await.unwrap();
    }

    /// Waits until the server has asked so many times whether the client still lives, and said nothing else.
    pub(crate) async fn pings(&mut self, count: usize) {
        let asked = async {
            for _ in 0..count {
                let message = self.0.next().await.unwrap().unwrap();
                assert!(matches!(message, Message::Ping(_)), "{message:?}");
            }
        };
        tokio::time::timeout(Duration::from_secs(30), asked).await.expect("pings within half a minute");
    }

    pub(crate) async fn next(&mut self) -> Said {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(30), self.0.next()).await;
            match message.expect("a frame within half a minute") {
                Some(Ok(Message::Text(text))) => return Said::Text(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Binary(bytes))) => return Said::Binary(bytes.to_vec()),
                Some(Ok(Message::Close(frame))) => {
                    return Said::Closed(frame.map_or(1005, |frame| frame.code.into()));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Said::Broken,
            }
        }
    }

    /// The next text frame; there must be no other before it.
    pub(crate) async fn json(&mut self) -> Value {
        match self.next().await {
            Said::Text(value) => value,
            other => panic!("not a text frame: {other:?}"),
        }
    }

    /// The next text frame, after whatever a terminal shows before it.
    pub(crate) async fn json_between(&mut self) -> Value {
        loop {
            match self.next().await {
                Said::Text(value) => return value,
                Said::Binary(_) => {}
                other => panic!("not a text frame: {other:?}"),
            }
        }
    }

    /// All frames up to the end.
    pub(crate) async fn rest(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            let next = self.next().await;
            let last = matches!(next, Said::Closed(_) | Said::Broken);
            said.push(next);
            if last {
                return said;
            }
        }
    }
}
