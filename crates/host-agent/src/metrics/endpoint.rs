//! `GET /metrics` on a socket of its own, so that who reads measurements can do nothing else: a Unix socket that only
//! its owner can use, or an address of the loopback interface.
//!
//! Every user of the host reaches a loopback address, and the agent has other things to do: so only a few are served
//! at once, one request each, and who takes too long to ask or to read loses the connection.

use std::{convert::Infallible, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use bytes::Bytes;
use camino::Utf8PathBuf;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Mutex,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::exposition::{self, View};
use crate::{agent::HostFacts, registry::Registry, sandbox::Stage, warm::blocking};

/// For how long what the snapshots take is not asked for again: that is a look at every one of their files.
const SNAPSHOTS_OLD: Duration = Duration::from_secs(60);

/// What those who read measurements may take.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    /// How many are served at once. Others wait until one of them is done.
    connections: usize,
    /// How long one may take to ask.
    head: Duration,
    /// How long it may take in all, with what it takes to read the answer.
    whole: Duration,
}

const ALLOWANCE: Allowance =
    Allowance { connections: 16, head: Duration::from_secs(5), whole: Duration::from_secs(30) };
/// The pause after an accept that failed, as it does when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where measurements are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Nowhere.
    Off,
    /// A Unix socket, made so that only its owner can use it.
    Unix(Utf8PathBuf),
    /// An address of the loopback interface. Every user of the host can read there.
    Loopback(SocketAddr),
}

/// The text is no place to serve measurements at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "measurements are served on a loopback address such as 127.0.0.1:9464, on a socket (an absolute path), or off"
)]
pub struct NotAnAddress;

impl FromStr for MetricsAddress {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        if text == "off" {
            return Ok(Self::Off);
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        let address: SocketAddr = text.parse().map_err(|_| NotAnAddress)?;
        if address.ip().is_loopback() { Ok(Self::Loopback(address)) } else { Err(NotAnAddress) }
    }
}

/// A listener, not yet served.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

#[derive(Debug)]
struct Endpoint {
    registry: Arc<Registry>,
    facts: Arc<HostFacts>,
    /// What the snapshots take, and when that was looked at.
    snapshots: Mutex<Option<(Instant, u64)>>,
}

/// Serves until it is told to stop; an answer that is under way then is broken off.
pub(crate) async fn serve(
    listener: Listener,
    registry: Arc<Registry>,
    facts: Arc<HostFacts>,
    stop: CancellationToken,
) {
    let endpoint = Arc::new(Endpoint { registry, facts, snapshots: Mutex::default() });
    let text = move || {
        let endpoint = Arc::clone(&endpoint);
        async move { exposition::text(&endpoint.view().await) }
    };
    stop.run_until_cancelled(accept(listener, ALLOWANCE, text)).await;
}

/// Serves what `text` gives, for ever. Dropping it drops every connection.
async fn accept<F>(listener: Listener, allowance: Allowance, text: impl Fn() -> F + Clone + Send + 'static)
where
    F: Future<Output = String> + Send + 'static,
{
    let mut all = JoinSet::new();
    loop {
        while all.len() >= allowance.connections {
            all.join_next().await;
        }
        while all.try_join_next().is_some() {}
        let accepted = match &listener {
            Listener::Unix(listener) => {
                let accepted = listener.accept().await;
                accepted.map(|(stream, _)| drop(all.spawn(connect(stream, allowance, text.clone()))))
            }
            Listener::Tcp(listener) => {
                let accepted = listener.accept().await;
                accepted.map(|(stream, _)| drop(all.spawn(connect(stream, allowance, text.clone()))))
            }
        };
        if let Err(error) = accepted {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a reader of measurements was not accepted"
            );
            sleep(ACCEPT_PAUSE).await;
        }
    }
}

async fn connect<F>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    allowance: Allowance,
    text: impl Fn() -> F + Clone,
) where
    F: Future<Output = String>,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let text = text.clone();
        async move {
            let status = match (request.method(), request.uri().path()) {
                (&Method::GET | &Method::HEAD, "/metrics") => {
                    let mut answer = Response::new(Full::from(text().await));
                    let kind = header::HeaderValue::from_static(exposition::CONTENT_TYPE);
                    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                    return Ok::<_, Infallible>(answer);
                }
                (_, "/metrics") => StatusCode::METHOD_NOT_ALLOWED,
                _ => StatusCode::NOT_FOUND,
            };
            let mut answer = Response::new(Full::<Bytes>::default());
            *answer.status_mut() = status;
            Ok(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(allowance.head)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Who goes away or takes too long is not answered, and that is all.
    let _ = timeout(allowance.whole, connection).await;
}

impl Endpoint {
    async fn view(&self) -> View {
        let host = self.registry.host();
        let all = self.registry.all();
        let staged: Vec<_> = all.iter().map(|handle| (handle.stage(), handle.spec().shape)).collect();
        let count = |stage| staged.iter().filter(|(of, _)| *of == stage).count() as u64;
        let told = Stage::ALL.into_iter().filter(|stage| *stage != Stage::Stopped);
        // Also what has a machine in a moment: it is not to be promised again.
        let have = staged.iter().filter(|(stage, _)| !matches!(stage, Stage::Paused | Stage::Stopped));
        let slots = host.slots.counts().await.unwrap_or_default();
        let identity = host.vmm.identity();
        View {
            agent: vec![
                ("host", self.facts.host_id.to_string()),
                ("version", env!("CARGO_PKG_VERSION").to_owned()),
                ("vmm", identity.name.clone()),
                ("vmm_version", identity.version.clone()),
                ("accelerator", identity.accelerator.word().to_owned()),
            ],
            limits: host.limits.controllers().map(|(controller, is)| (controller.name(), is)).into(),
            sandboxes: told.map(|stage| (stage.word(), count(stage))).collect(),
            slots_used: slots.used as u64,
            slots_ready: slots.ready as u64,
            memory_promised_bytes: have.map(|(_, shape)| shape.memory.bytes()).sum(),
            snapshot_bytes: self.snapshot_bytes().await,
            operations: host.operations.counted(),
            scrubbed: host.scrub.counted(),
            each: host.metrics.totals(),
        }
    }

    async fn snapshot_bytes(&self) -> u64 {
        // Held over the look, so that many who ask at once look once.
        let mut known = self.snapshots.lock().await;
        if let Some((at, bytes)) = *known
            && at.elapsed() < SNAPSHOTS_OLD
        {
            return bytes;
        }
        let snapshots = self.registry.host().snapshots.clone();
        let bytes = blocking(move || snapshots.bytes_of_all()).await;
        *known = Some((Instant::now(), bytes));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    /// Sends this and reads until the other side ends.
    async fn exchange(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(30), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    async fn served(allowance: Allowance, text: &'static str) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(accept(Listener::Tcp(listener), allowance, move || async move { text.to_owned() }));
        (address, serving)
    }

    #[tokio::test]
    async fn only_measurements_are_served_one_request_for_each_connection() {
        let (address, _serving) = served(ALLOWANCE, "measured 1\n").await;
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        let answer = exchange(address, &get("/metrics").repeat(2)).await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 1, "{answer}");
        assert!(answer.contains("content-type: text/plain") && answer.ends_with("measured 1\n"), "{answer}");
        let answer = exchange(address, &get("/metrics/").replace("HTTP/1.1", "HTTP/1.0")).await;
        assert!(answer.starts_with("HTTP/1.0 404"), "{answer}");
        let answer =
            exchange(address, "POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    }

    #[tokio::test]
    async fn who_says_nothing_or_reads_nothing_keeps_others_waiting_and_no_more() {
        // The one that reads nothing comes first, so that it is over when there is a place for the third.
        let bound = Duration::from_millis(300);
        let allowance = Allowance { connections: 2, head: bound, whole: bound };
        let large: &'static str = "x".repeat(64 << 20).leak();
        let (address, _serving) = served(allowance, large).await;
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut silent = TcpStream::connect(address).await.unwrap();
        // Both places are taken: this one waits for one of them.
        let answer = exchange(address, "GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        for stream in [&mut silent, &mut slow] {
            let mut rest = Vec::new();
            let read = timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await;
            assert!(read.is_ok() && rest.len() < large.len(), "{} bytes", rest.len());
        }
    }

    #[test]
    fn nothing_is_served_to_other_hosts() {
        for refused in
            ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464", "192.168.1.1:1", "9464", "localhost", "", "x/y"]
        {
            assert_eq!(refused.parse::<MetricsAddress>(), Err(NotAnAddress), "{refused}");
        }
        for (text, address) in [
            ("off", MetricsAddress::Off),
            ("/run/x.sock", MetricsAddress::Unix("/run/x.sock".into())),
            ("127.0.0.1:9464", MetricsAddress::Loopback(([127, 0, 0, 1], 9464).into())),
            ("[::1]:0", MetricsAddress::Loopback("[::1]:0".parse().unwrap())),
        ] {
            assert_eq!(text.parse(), Ok(address));
        }
    }
}
