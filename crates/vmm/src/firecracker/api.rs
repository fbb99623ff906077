//! Firecracker's control protocol: HTTP/1.1 with JSON over a Unix socket, one request at a time.
//!
//! ```text
//!  send() ─► connection, if there is a good one, else a new one ─► request ─► reply ─► the connection is good
//!                          └─ an error, a bound that ran out, a caller that went away: the connection is gone
//! ```
//!
//! Firecracker serves one request after the other, whoever makes it, so a second connection would only wait for the first. A
//! connection of which a reply was not read whole is never used again: what comes next on it would be taken for the
//! reply to something else. What is true after a reply was lost is asked over a new one.
//!
//! What is read is taken as if a guest had taken Firecracker over: it is bounded, and what is no reply is an error.

use std::{io, time::Duration};

use camino::Utf8PathBuf;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Mutex,
    time::timeout,
};

use super::requests::{Fault, InstanceInfo, Request};
use crate::{VmmError, VmmResult};

/// The longest beginning of a reply, up to the empty line.
const HEAD_LIMIT: usize = 8 << 10;
/// The longest body. The largest that we ask for is a few hundred bytes.
const BODY_LIMIT: usize = 64 << 10;
/// How much of a reason is told.
const REASON_LIMIT: usize = 1024;

/// How long a request may take that changes a setting: it is answered at once, on a machine that is not very busy.
pub(super) const COMMAND_BOUND: Duration = Duration::from_secs(10);

/// The way to one Firecracker.
#[derive(Debug)]
pub(super) struct Api {
    socket: Utf8PathBuf,
    /// None while a request is under way, and after one that had no reply.
    connection: Mutex<Option<UnixStream>>,
}

impl Api {
    /// Over a socket at which somebody listens, or will.
    pub(super) fn at(socket: Utf8PathBuf) -> Self {
        Self { socket, connection: Mutex::new(None) }
    }

    /// Connects, unless that was done.
    pub(super) async fn connect(&self) -> io::Result<()> {
        let mut connection = self.connection.lock().await;
        if connection.is_none() {
            *connection = Some(UnixStream::connect(&self.socket).await?);
        }
        Ok(())
    }

    /// Makes a request, and waits until it is done.
    pub(super) async fn send<R: Request>(&self, request: &R, bound: Duration) -> VmmResult<()> {
        let body = serde_json::to_vec(request).map_err(|error| lost(R::LINE)(error.into()))?;
        self.exchange(R::LINE, &body, bound).await.map(drop)
    }

    /// Asks who it is and what it does.
    pub(super) async fn info(&self, bound: Duration) -> VmmResult<InstanceInfo> {
        self.ask(InstanceInfo::LINE, bound).await
    }

    async fn ask<T: DeserializeOwned>(&self, line: &'static str, bound: Duration) -> VmmResult<T> {
        let body = self.exchange(line, b"", bound).await?;
        serde_json::from_slice(&body).map_err(|error| lost(line)(error.into()))
    }

    async fn exchange(&self, line: &'static str, body: &[u8], bound: Duration) -> VmmResult<Vec<u8>> {
        let reply = match timeout(bound, self.exchange_unbounded(line, body)).await {
            Ok(reply) => reply.map_err(lost(line))?,
            Err(_) => return Err(VmmError::Timeout { operation: line, bound }),
        };
        match reply.status {
            200..=299 => Ok(reply.body),
            status => {
                Err(VmmError::Refused { command: line.to_owned(), message: reason(status, &reply.body) })
            }
        }
    }

    async fn exchange_unbounded(&self, line: &str, body: &[u8]) -> io::Result<Reply> {
        let mut slot = self.connection.lock().await;
        // It is taken out, so that it goes with this future if nobody waits any more.
        let mut stream = match slot.take() {
            Some(stream) => stream,
            None => UnixStream::connect(&self.socket).await?,
        };
        stream.write_all(&encode(line, body)).await?;
        let mut received = Vec::new();
        loop {
            if let Some(reply) = decode(&received)? {
                *slot = Some(stream);
                return Ok(reply);
            }
            if stream.read_buf(&mut received).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn lost(line: &str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Connection { command: line.to_owned(), source }
}

/// The bytes of a request.
fn encode(line: &str, body: &[u8]) -> Vec<u8> {
    let mut request =
        format!("{line} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n").into_bytes();
    if !body.is_empty() {
        let length = body.len();
        request.extend(format!("Content-Type: application/json\r\nContent-Length: {length}\r\n").bytes());
    }
    request.extend(b"\r\n");
    request.extend(body);
    request
}

/// What it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reply {
    status: u16,
    body: Vec<u8>,
}

/// The reply in what has been received so far; none while it is not whole.
fn decode(received: &[u8]) -> io::Result<Option<Reply>> {
    let wrong = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let Some(head) = received.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if received.len() > HEAD_LIMIT { Err(wrong("its reply has no end")) } else { Ok(None) };
    };
    let text = received.get(..head).and_then(|head| std::str::from_utf8(head).ok());
    let mut lines = text.ok_or_else(|| wrong("its reply is no text"))?.split("\r\n");
    let status = lines.next().and_then(status_of).ok_or_else(|| wrong("its reply is no HTTP"))?;
    let mut length = None;
    for line in lines {
        let (name, value) =
            line.split_once(':').ok_or_else(|| wrong("its reply has a header without a name"))?;
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(wrong("its reply has no length"));
        }
        if name.eq_ignore_ascii_case("content-length") {
            let value: usize =
                value.trim().parse().map_err(|_| wrong("the length of its reply is no number"))?;
            if length.replace(value).is_some() {
                return Err(wrong("its reply has two lengths"));
            }
        }
    }
    let length = length.unwrap_or_default();
    if length > BODY_LIMIT {
        return Err(wrong("its reply is too long"));
    }
    let body = received.get(head + 4..).unwrap_or_default();
    match body.len().cmp(&length) {
        std::cmp::Ordering::Less => Ok(None),
        std::cmp::Ordering::Equal => Ok(Some(Reply { status, body: body.to_vec() })),
        std::cmp::Ordering::Greater => Err(wrong("its reply is longer than it says")),
    }
}

/// `HTTP/1.1 204 No Content`. What is not final is none of its replies.
fn status_of(line: &str) -> Option<u16> {
    let (version, rest) = line.split_once(' ')?;
    let status = rest.split(' ').next().filter(|status| status.len() == 3)?.parse().ok()?;
    (matches!(version, "HTTP/1.1" | "HTTP/1.0") && (200..600).contains(&status)).then_some(status)
}

/// Why it refuses something, in its own words where it has any.
fn reason(status: u16, body: &[u8]) -> String {
    let Ok(Fault { fault_message }) = serde_json::from_slice(body) else {
        return format!("status {status}, without a reason");
    };
    fault_message.chars().filter(|c| !c.is_control()).take(REASON_LIMIT).collect()
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
