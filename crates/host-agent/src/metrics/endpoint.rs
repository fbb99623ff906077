//! `GET /metrics` on a socket of its own, so that who reads measurements can do nothing else: a Unix socket that only
//! its owner can use, or an address of the loopback interface.

use std::{io, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
use camino::Utf8PathBuf;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Mutex,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::exposition::{self, View};
use crate::{agent::HostFacts, registry::Registry, sandbox::Stage, warm::blocking};

/// For how long what the snapshots take is not asked for again: that is a look at every one of their files.
const SNAPSHOTS_OLD: Duration = Duration::from_secs(60);

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
) -> io::Result<()> {
    let endpoint = Arc::new(Endpoint { registry, facts, snapshots: Mutex::default() });
    let router = Router::new().route("/metrics", get(metrics)).with_state(endpoint);
    let serving = async {
        match listener {
            Listener::Unix(listener) => axum::serve(listener, router).await,
            Listener::Tcp(listener) => axum::serve(listener, router).await,
        }
    };
    tokio::select! {
        outcome = serving => outcome,
        () = stop.cancelled() => Ok(()),
    }
}

async fn metrics(State(endpoint): State<Arc<Endpoint>>) -> impl IntoResponse {
    let view = endpoint.view().await;
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], exposition::text(&view))
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
    use super::*;

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
