//! Which HTTP a connection speaks: 1.1, or 2 without TLS by prior knowledge.
//!
//! ```text
//!  TCP ──► the first bytes ──┬─ the preface of HTTP/2 ──► many streams on one connection, each limited
//!                            └─ anything else ──────────► HTTP/1.1, one request after the other
//! ```
//!
//! The bytes that were read to find out are handed on with the rest. Both have the same limit on how long a client
//! may say nothing, so that neither is a way around it.

use std::{convert::Infallible, future::Future, io, time::Duration};

use http::{HeaderMap, Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};

use super::{callers::Seat, connection::Connection, reply::Body};

/// How long a client may take to send the head of a request, and to begin the next one: longer than those who keep
/// connections open for later keep them, so that it is never us who closes one that is about to be used.
const HEAD_LIMIT: Duration = Duration::from_secs(620);
const TIMEOUT: &str = "connect-timeout-ms";
/// What a client of HTTP/2 says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How much is read at once to find out.
const FIRST: usize = 4096;
/// How much of a connection is read, or waits to be written, at a time. Each piece of a body that is kept keeps a
/// buffer of this size.
const BUFFER: usize = 128 * 1024;
/// How many requests may run at once on one connection of HTTP/2; more are refused, and clients try those again.
const STREAMS: u32 = 256;
/// The most that the fields of one request's head may hold.
const HEAD: u32 = 64 * 1024;
/// How much of an answer waits in memory for one slow stream.
const SEND_BUFFER: usize = 128 * 1024;
/// How much a client may send ahead on one stream, and on all together.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// How often a connection of HTTP/2 is asked whether anybody is there, and how long the answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_LIMIT: Duration = Duration::from_secs(60);

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// Decides by the first bytes, once there are enough of them.
    fn of(bytes: &[u8]) -> Option<Self> {
        let common = bytes.iter().zip(PREFACE).take_while(|(said, preface)| said == preface).count();
        if common == PREFACE.len() {
            Some(Self::Http2)
        } else if common < bytes.len() {
            Some(Self::Http1)
        } else {
            None
        }
    }
}

/// Serves one connection until its end.
pub(super) async fn serve<F>(mut stream: TcpStream, seat: Seat, answer: impl Fn(Request<Incoming>) -> F)
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let Ok(Ok((protocol, first))) = timeout(HEAD_LIMIT, recognise(&mut stream)).await else { return };
    let connection = Connection::new(first, stream, seat);
    // Streams that share a connection are cut into frames, which takes the bytes.
    let outlet = (protocol == Protocol::Http1).then(|| connection.outlet());
    let service = service_fn(|mut request: Request<Incoming>| {
        forget_no_limit(request.headers_mut());
        if let Some(outlet) = &outlet {
            request.extensions_mut().insert(outlet.clone());
        }
        let answer = answer(request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let stream = TokioIo::new(connection);
    // A connection that breaks is the client's business; whoever serves it notices by itself.
    let _ = match protocol {
        Protocol::Http1 => {
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_LIMIT)
                .max_buf_size(BUFFER)
                // What is to be written must reach the connection as it is.
                .writev(true)
                .serve_connection(stream, service)
                .with_upgrades()
                .await
        }
        Protocol::Http2 => {
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS)
                .max_header_list_size(HEAD)
                .max_send_buf_size(SEND_BUFFER)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_LIMIT)
                .serve_connection(stream, service)
                .await
        }
    };
}

/// A time limit of nothing means that there is none, as published clients have it. The library would take it for a
/// limit that has passed.
fn forget_no_limit(headers: &mut HeaderMap) {
    let limit = headers.get(TIMEOUT).and_then(|value| value.to_str().ok()?.parse::<i64>().ok());
    if limit.is_some_and(|milliseconds| milliseconds <= 0) {
        headers.remove(TIMEOUT);
    }
}

/// Reads until it is clear what the client speaks, and answers with what was read. Usually that is a whole request,
/// which is then read in one go as it would be without this.
async fn recognise(reader: &mut (impl AsyncReadExt + Unpin)) -> io::Result<(Protocol, Vec<u8>)> {
    let mut first = Vec::with_capacity(FIRST);
    loop {
        let read = reader.read_buf(&mut first).await?;
        match Protocol::of(&first) {
            Some(protocol) => return Ok((protocol, first)),
            None if read == 0 => return Ok((Protocol::Http1, first)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_difference_decides() {
        assert_eq!(Protocol::of(b""), None);
        assert_eq!(Protocol::of(b"P"), None);
        assert_eq!(Protocol::of(b"POST / HTTP/1.1\r\n"), Some(Protocol::Http1));
        assert_eq!(Protocol::of(b"GET"), Some(Protocol::Http1));
        assert_eq!(Protocol::of(&PREFACE[..23]), None);
        assert_eq!(Protocol::of(PREFACE), Some(Protocol::Http2));
    }

    #[test]
    fn a_limit_of_nothing_is_none() {
        for (given, kept) in
            [("0", false), ("-1", false), ("1", true), ("5000", true), ("abc", true), ("", true)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT, http::HeaderValue::from_static(given));
            forget_no_limit(&mut headers);
            assert_eq!(headers.contains_key(TIMEOUT), kept, "{given}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_recognised(
            mut bytes in proptest::collection::vec(any::<u8>(), 24), kept in 0..=24_usize, piece in 1..24_usize,
        ) {
            bytes[..kept].copy_from_slice(&PREFACE[..kept]);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let pieces: Vec<_> = bytes.chunks(piece).collect();
            let mut reader = pieces.iter().fold(
                Box::new(tokio::io::empty()) as Box<dyn tokio::io::AsyncRead + Unpin>,
                |before, piece| Box::new(before.chain(*piece)),
            );
            let (protocol, first) = runtime.block_on(recognise(&mut reader)).unwrap();
            prop_assert_eq!(protocol == Protocol::Http2, bytes == PREFACE);
            prop_assert_eq!(&first[..], &bytes[..first.len()]);
        }
    }
}
