//! A host agent whose sandboxes are `envd` processes on loopback: the same RPC, the same tunnels, the real
//! guest contract, and no virtual machine. What a real agent can do wrong, this one does when it is told to.

mod persist;
mod service;

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::{Path as UrlPath, Request, State},
    response::{IntoResponse as _, Response},
};
use connectrpc::{ConnectError, Router as RpcRouter};
use http::{StatusCode, header};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::{
    net::{TcpStream, UnixListener},
    sync::{Notify, broadcast, watch},
    task::JoinHandle,
};
use wrenn_proto::hostagent::v1 as wire;
use wrenn_types::{HostId, guest::AGENT_PORT};

use super::{eventually, guardian::Guardian};

/// What a test has this agent do wrong.
#[derive(Default)]
pub(crate) struct Faults {
    /// What creates answer from now on.
    pub(crate) create: Option<ConnectError>,
    /// Whether creates wait for [`FakeAgent::release`].
    pub(crate) hold_creates: bool,
    /// Whether destroys wait for it.
    pub(crate) hold_destroys: bool,
    /// Whether pauses, resumes and rollbacks, and snapshots wait for it, after they have begun.
    pub(crate) hold_pauses: bool,
    pub(crate) hold_resumes: bool,
    pub(crate) hold_snapshots: bool,
    /// How many creates succeed until they answer `create`; all when absent.
    pub(crate) creates_until: Option<usize>,
    /// What these answer from now on; what was there before stays.
    pub(crate) pause: Option<ConnectError>,
    pub(crate) resume: Option<ConnectError>,
    pub(crate) snapshot: Option<ConnectError>,
    pub(crate) rollback: Option<ConnectError>,
    pub(crate) update: Option<ConnectError>,
    pub(crate) delete_snapshot: Option<ConnectError>,
}

impl Faults {
    fn next_create(&mut self) -> Option<ConnectError> {
        match &mut self.creates_until {
            Some(0) | None => self.create.clone(),
            Some(left) => {
                *left -= 1;
                None
            }
        }
    }
}

struct Guest {
    sandbox: wire::Sandbox,
    created: wire::CreateSandboxRequest,
    address: std::net::SocketAddr,
    /// Its fall cuts the tunnels.
    alive: watch::Sender<bool>,
    _envd: Guardian,
}

struct Inner {
    host_id: HostId,
    guests: Mutex<HashMap<String, Guest>>,
    /// What has ended by itself: as the real agent, this one still says so when it is asked.
    ended: Mutex<HashMap<String, wire::Sandbox>>,
    /// What is being brought up.
    starting: Mutex<HashMap<String, wire::Sandbox>>,
    faults: Mutex<Faults>,
    released: Notify,
    /// Its fall cuts all tunnels, as the death of a real agent does.
    serving: watch::Sender<bool>,
    events: broadcast::Sender<wire::Sandbox>,
    creates: Mutex<Vec<wire::CreateSandboxRequest>>,
    destroyed: Mutex<Vec<(String, u64)>>,
    commands: Mutex<Vec<persist::Commanded>>,
    updates: Mutex<Vec<wire::UpdateSandboxRequest>>,
    snapshots: Mutex<BTreeMap<String, wire::Snapshot>>,
    pings: AtomicUsize,
    watchers: AtomicUsize,
    tunnels: AtomicUsize,
    /// Where what listens on other ports than that of `envd` is.
    programs: Mutex<HashMap<(String, u16), std::net::SocketAddr>>,
}

pub(crate) struct FakeAgent {
    socket: PathBuf,
    inner: Arc<Inner>,
    server: Option<JoinHandle<()>>,
}

/// Builds `envd` once and says where it is.
pub(crate) fn envd() -> &'static Path {
    static ENVD: OnceLock<PathBuf> = OnceLock::new();
    ENVD.get_or_init(|| {
        if let Some(given) = std::env::var_os("WRENN_ENVD") {
            return given.into();
        }
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--package", "envd"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .status();
        assert!(built.unwrap().success(), "envd cannot be built");
        // This test is target/PROFILE/deps/it-HASH.
        let own = std::env::current_exe().unwrap();
        let target = own.ancestors().nth(3).unwrap();
        let envd = target.join("debug/envd");
        assert!(envd.exists(), "{} is not there", envd.display());
        envd
    })
}

impl FakeAgent {
    pub(crate) fn start(socket: PathBuf) -> Self {
        let inner = Inner {
            host_id: HostId::random(),
            guests: Mutex::default(),
            ended: Mutex::default(),
            starting: Mutex::default(),
            faults: Mutex::default(),
            released: Notify::new(),
            serving: watch::Sender::new(true),
            events: broadcast::Sender::new(1024),
            creates: Mutex::default(),
            destroyed: Mutex::default(),
            commands: Mutex::default(),
            updates: Mutex::default(),
            snapshots: Mutex::default(),
            pings: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            programs: Mutex::default(),
        };
        let mut agent = Self { socket, inner: Arc::new(inner), server: None };
        agent.serve();
        agent
    }

    /// Listens, with whatever sandboxes there are.
    pub(crate) fn serve(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        self.inner.serving.send_replace(true);
        let listener = UnixListener::bind(&self.socket).unwrap();
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o600)).unwrap();
        let rpc = RpcRouter::new().add_service(Arc::new(Service(Arc::clone(&self.inner))));
        let app = axum::Router::new()
            .route("/tunnel/{id}/{port}", axum::routing::get(tunnel))
            .with_state(Arc::clone(&self.inner))
            .fallback_service(rpc.into_axum_service());
        self.server = Some(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = hyper::service::service_fn({
                    let app = app.clone();
                    move |request: hyper::Request<hyper::body::Incoming>| {
                        tower::ServiceExt::oneshot(app.clone(), request.map(axum::body::Body::new))
                    }
                });
                connections.spawn(async move {
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        }));
    }

    /// The process is gone, and its connections with it. Its sandboxes live on, as they would.
    pub(crate) async fn go_away(&mut self) {
        self.inner.serving.send_replace(false);
        let server = self.server.take().unwrap();
        server.abort();
        let _ = server.await;
        std::fs::remove_file(&self.socket).unwrap();
        self.inner.watchers.store(0, Ordering::SeqCst);
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) async fn wait_for_watcher(&self) {
        eventually("the agent is watched", async || self.inner.watchers.load(Ordering::SeqCst) > 0).await;
    }

    pub(crate) fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.inner.faults.lock().unwrap());
    }

    /// Lets everything go on that was held.
    pub(crate) fn release(&self) {
        self.faults(|faults| {
            faults.hold_creates = false;
            faults.hold_destroys = false;
            faults.hold_pauses = false;
            faults.hold_resumes = false;
            faults.hold_snapshots = false;
        });
        self.inner.released.notify_waiters();
    }

    pub(crate) fn sandboxes(&self) -> Vec<String> {
        self.inner.guests.lock().unwrap().keys().cloned().collect()
    }

    pub(crate) fn creates(&self) -> Vec<wire::CreateSandboxRequest> {
        self.inner.creates.lock().unwrap().clone()
    }

    pub(crate) fn destroyed(&self) -> Vec<(String, u64)> {
        self.inner.destroyed.lock().unwrap().clone()
    }

    pub(crate) fn pings(&self) -> usize {
        self.inner.pings.load(Ordering::SeqCst)
    }

    /// How many tunnels were opened so far.
    pub(crate) fn tunnels(&self) -> usize {
        self.inner.tunnels.load(Ordering::SeqCst)
    }

    /// A sandbox ends by itself.
    pub(crate) fn crash(&self, id: &str) {
        let mut sandbox = self.inner.guests.lock().unwrap()[id].sandbox.clone();
        sandbox.state = wire::SandboxState::SANDBOX_STATE_STOPPED.into();
        sandbox.end_reason = wire::EndReason::END_REASON_VMM_CRASH.into();
        sandbox.end_message = "the virtual machine monitor was killed by signal 9".to_owned();
        self.inner.ended.lock().unwrap().insert(id.to_owned(), sandbox.clone());
        drop(self.inner.guests.lock().unwrap().remove(id));
        let _ = self.inner.events.send(sandbox);
    }

    /// A sandbox ends while nobody looks.
    pub(crate) fn lose(&self, id: &str) {
        self.inner.guests.lock().unwrap().remove(id).unwrap();
    }

    /// Another guest answers in a sandbox from now on.
    pub(crate) fn put_guest(&self, id: &str, address: std::net::SocketAddr) {
        let mut guests = self.inner.guests.lock().unwrap();
        guests.get_mut(id).unwrap().address = address;
    }

    /// A program listens on a port of a sandbox from now on.
    pub(crate) fn put_program(&self, id: &str, port: u16, address: std::net::SocketAddr) {
        self.inner.programs.lock().unwrap().insert((id.to_owned(), port), address);
    }

    /// What the agent says of a sandbox from now on, when it is asked.
    pub(crate) fn tell(&self, id: &str, state: wire::SandboxState) {
        let mut guests = self.inner.guests.lock().unwrap();
        guests.get_mut(id).unwrap().sandbox.state = state.into();
    }

    /// A sandbox that no control plane has asked for.
    pub(crate) async fn make_unknown(&self, id: &str) {
        let request = wire::CreateSandboxRequest {
            sandbox_id: id.to_owned(),
            generation: 1,
            access_token: "unknown".to_owned(),
            ..Default::default()
        };
        self.inner.bring_up(request).await;
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
        }
    }
}

impl Inner {
    /// All there is, in whatever stage.
    fn all(&self) -> Vec<wire::Sandbox> {
        let mut all: HashMap<String, wire::Sandbox> = self.starting.lock().unwrap().clone();
        all.extend(self.ended.lock().unwrap().clone());
        let guests = self.guests.lock().unwrap();
        all.extend(guests.iter().map(|(id, guest)| (id.clone(), guest.sandbox.clone())));
        all.into_values().collect()
    }

    async fn held(&self, which: impl Fn(&Faults) -> bool) {
        loop {
            let released = self.released.notified();
            if !which(&self.faults.lock().unwrap()) {
                return;
            }
            released.await;
        }
    }

    async fn bring_up(&self, request: wire::CreateSandboxRequest) -> wire::Sandbox {
        let guest = self.make(request).await;
        self.enter(guest)
    }

    /// A guest of which nobody knows yet.
    async fn make(&self, request: wire::CreateSandboxRequest) -> Guest {
        let (envd, address) = tokio::task::spawn_blocking(|| {
            let program = envd().to_str().unwrap();
            let mut envd = Guardian::start(program, &["agent", "--listen", "127.0.0.1:0"], "KILL", None, "");
            let line: serde_json::Value = serde_json::from_str(&envd.line()).unwrap();
            (envd, line["address"].as_str().unwrap().parse().unwrap())
        })
        .await
        .unwrap();
        initialise(address, &request).await;
        let created = request.clone();
        let now = Timestamp::now().as_millisecond();
        let sandbox = wire::Sandbox {
            sandbox_id: request.sandbox_id.clone(),
            generation: request.generation,
            state: wire::SandboxState::SANDBOX_STATE_RUNNING.into(),
            template: request.template,
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            disk_mib: request.disk_mib.unwrap_or(20_480),
            timeout_seconds: request.timeout_seconds,
            started_at_ms: now,
            last_active_at_ms: now,
            ..Default::default()
        };
        Guest { sandbox, created, address, alive: watch::Sender::new(true), _envd: envd }
    }

    fn enter(&self, guest: Guest) -> wire::Sandbox {
        let sandbox = guest.sandbox.clone();
        self.guests.lock().unwrap().insert(sandbox.sandbox_id.clone(), guest);
        let _ = self.events.send(sandbox.clone());
        sandbox
    }
}

async fn initialise(address: std::net::SocketAddr, request: &wire::CreateSandboxRequest) {
    let body = serde_json::json!({
        "accessToken": request.access_token,
        "envVars": request.environment.iter().collect::<HashMap<_, _>>(),
    });
    let client = super::client::Client::new(address, String::new());
    let answer = client.post("/init", body).await;
    assert_eq!(answer.status, 204, "{}", answer.text());
}

struct Service(Arc<Inner>);

async fn tunnel(
    State(inner): State<Arc<Inner>>,
    UrlPath((id, port)): UrlPath<(String, u16)>,
    mut request: Request,
) -> Response {
    assert_eq!(request.headers()[header::UPGRADE], "wrenn-tunnel");
    let found = {
        let guests = inner.guests.lock().unwrap();
        guests.get(&id).map(|guest| (guest.address, guest.alive.subscribe()))
    };
    let Some((address, mut alive)) = found else {
        let body = r#"{"code":"not_found","message":"there is no such sandbox here"}"#;
        return (StatusCode::NOT_FOUND, body).into_response();
    };
    if !*alive.borrow() {
        let body = r#"{"code":"failed_precondition","message":"the sandbox does not run"}"#;
        return (StatusCode::CONFLICT, body).into_response();
    }
    let program = inner.programs.lock().unwrap().get(&(id, port)).copied();
    let Some(address) = program.or_else(|| (port == AGENT_PORT).then_some(address)) else {
        let body = r#"{"code":"unavailable","message":"nothing listens on this port"}"#;
        return (StatusCode::BAD_GATEWAY, body).into_response();
    };
    inner.tunnels.fetch_add(1, Ordering::SeqCst);
    let mut serving = inner.serving.subscribe();
    let mut guest = TcpStream::connect(address).await.unwrap();
    guest.set_nodelay(true).unwrap();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(caller) = upgrade.await else { return };
        let mut caller = TokioIo::new(caller);
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut caller, &mut guest) => {}
            // The sender falls with the sandbox.
            _ = alive.wait_for(|alive| !alive) => {}
            _ = serving.wait_for(|serving| !serving) => {}
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "wrenn-tunnel")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Long enough for anything that must not happen to have happened.
pub(crate) const QUIET: Duration = Duration::from_millis(700);
