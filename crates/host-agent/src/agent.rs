//! The life of an agent: take over what an earlier one left, serve, and on the stop leave or end the sandboxes.
//!
//! ```text
//!  instance id, directories ─► take stock, find the VMM ─► start the slot pool ─► take over ─► serve ─► ready
//!                                                                                                 │ stop
//!                         remove the ready slots ◄─ leave or destroy every sandbox ◄─ close the socket
//! ```
//!
//! Network slots that an earlier agent left free are removed before the pool starts, unless there are machines to go
//! on with: then that is done beside the serving, because somebody may wait for them.

mod disks;

use std::{
    fs::{self, DirBuilder},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    sync::Arc,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use wrenn_proto::hostagent::v1::HostAgentServiceExt as _;
use wrenn_types::{DiskMib, HostId, InstanceId, NetworkPolicy, ResourceError};
use wrenn_vmm::{
    Accelerator, Vmm, VmmError,
    firecracker::{Firecracker, FirecrackerOptions, MemoryBackend},
    pager::PagerProgram,
    qemu::{AcceleratorChoice, Qemu, QemuOptions},
};

use crate::{
    adopt::{self, CollectError},
    config::{AcceleratorFlag, Config, MemoryBackendFlag, OnStop, VmmDriver},
    control_plane_loss::{Sessions, watch_over},
    doctor::{self, NotFit},
    images::{Images, ImagesError},
    limits::Limits,
    metrics::{
        Metrics,
        endpoint::{self, Listener, MetricsAddress},
        operations::Operations,
        sampler::Sampler,
    },
    network::{self, Policy, PoolConfig, SlotError, SlotPool, Uplink},
    registry::Registry,
    rootfs::RootfsError,
    rpc::Service,
    sandbox::{host::Host, record},
    scrub::{self, Scrub, Scrubber},
    snapshot_store::{SnapshotStore, SnapshotStoreError, SnapshotStoreResult},
    snapshots::{Roots, Snapshots},
    tunnel,
    users::{Users, UsersError},
    warm::{Warm, blocking},
};

/// What is true until the machine is started anew; the stacks of a machine share it.
pub(crate) const RUN_DIR: &str = "/run/wrenn";
/// How long open calls may take to end once the agent is to stop.
const DRAIN_BOUND: Duration = Duration::from_secs(5);
/// How often layers that nothing stands on are looked for when nobody says that there are any.
const COLLECT_EVERY: Duration = Duration::from_secs(600);
/// How long a layer may be in no record yet: it is made first.
const COLLECT_GRACE: Duration = Duration::from_secs(180);
/// How long the bring-downs may take.
const CLOSE_BOUND: Duration = Duration::from_secs(60);

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file or directory of the stack cannot be used.
    #[error("could not {operation} {path}")]
    File {
        /// What was to be done.
        operation: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file holds an id that is none.
    #[error("{path} does not hold {what}; remove it, and a new one is made")]
    Id {
        /// The file.
        path: Utf8PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// The default size of disks is out of bounds.
    #[error("the default disk size cannot be used")]
    DefaultDisk(#[source] ResourceError),
    /// The virtual machine monitor takes no such disks.
    #[error(
        "leave out --disks, or choose `file`: `qcow2` is for QEMU alone, and `dm-snapshot` for Firecracker"
    )]
    Disks,
    /// The host cannot keep such disks.
    #[error("root disks cannot be kept as was asked for (--disks)")]
    DiskDriver(#[source] RootfsError),
    /// There are disks of another driver.
    #[error(
        "there are root disks that were made as {kept}, and cannot be used as {wanted}: choose that (--disks), or delete the sandboxes and snapshots first"
    )]
    OtherDisks {
        /// How the disks that there are were made.
        kept: String,
        /// How new ones are to be made.
        wanted: String,
    },
    /// The memory of such machines cannot be served.
    #[error(
        "QEMU maps memory and has it served by nobody: leave out --memory-backend, or choose `file`, or --vmm firecracker"
    )]
    MemoryBackend,
    /// Production was asked for on a host that does not have what it needs.
    #[error("this host is not fit")]
    NotFit(#[source] NotFit),
    /// The images are not there.
    #[error("the guest images cannot be used")]
    Images(#[source] ImagesError),
    /// The VMM is not there.
    #[error("no virtual machine monitor can be used")]
    Vmm(#[source] VmmError),
    /// What was left behind could not be removed.
    #[error("what an earlier agent left could not be collected")]
    Collect(#[source] CollectError),
    /// The directory of snapshots cannot be used.
    #[error("the template snapshots cannot be used")]
    Snapshots(#[source] SnapshotStoreError),
    /// The directory of the sandboxes' own snapshots cannot be used.
    #[error("the snapshots of sandboxes cannot be used")]
    Kept(#[source] SnapshotStoreError),
    /// The measurements cannot be kept, or what they are taken of is not there.
    #[error("the measurements of sandboxes could not be begun")]
    Sampler(#[source] io::Error),
    /// Nobody can listen there.
    #[error("could not listen on {address} for measurements")]
    Metrics {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Machines cannot have users of their own.
    #[error("machines cannot be confined")]
    Users(#[source] UsersError),
    /// The network is not there.
    #[error("the network slots could not be prepared")]
    Network(#[source] SlotError),
}

/// What is told of a host beside its sandboxes.
#[derive(Debug)]
pub struct HostFacts {
    /// Its id, kept in the stack's directory.
    pub host_id: HostId,
    /// Why guests run on what they run on.
    pub accelerator_reason: String,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    socket: Utf8PathBuf,
    machines_dir: MachinesDir,
    registry: Arc<Registry>,
    slots: SlotPool,
    on_stop: OnStop,
    stopping: CancellationToken,
    collector: tokio::task::JoinHandle<()>,
    scrubber: tokio::task::JoinHandle<()>,
    /// Removes what an earlier agent left of its free slots, where that was put off.
    slot_collector: Option<tokio::task::JoinHandle<()>>,
    /// Measures until the second of the two is cancelled, after the sandboxes have ended or were left.
    sampler: (tokio::task::JoinHandle<()>, CancellationToken),
    metrics_socket: Option<Utf8PathBuf>,
    watcher: tokio::task::JoinHandle<()>,
    sessions: Sessions,
    server: tokio::task::JoinHandle<io::Result<()>>,
}

fn failed(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::File { operation, path, source }
}

fn private_dir(path: &Utf8Path) -> Result<(), StartError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))
}

/// The directory of the machines' short-pathed files. It goes with the agent, and the run directory around
/// it too, when they are empty: else a machine did not end, and the next start needs what is in them.
#[derive(Debug)]
struct MachinesDir(Utf8PathBuf);

impl MachinesDir {
    fn create(path: &Utf8Path) -> Result<Self, StartError> {
        private_dir(path)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for MachinesDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
        if let Some(run_dir) = self.0.parent() {
            let _ = fs::remove_dir(run_dir);
        }
    }
}

/// Reads an id from its file, or makes the file with a new one.
fn kept_id<T>(path: &Utf8Path, what: &'static str, new: impl FnOnce() -> T) -> Result<T, StartError>
where
    T: std::str::FromStr + std::fmt::Display,
{
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map_err(|_| StartError::Id { path: path.to_owned(), what }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = new();
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(failed("make", path))?;
            writeln!(file, "{id}").map_err(failed("write", path))?;
            file.sync_all().map_err(failed("sync", path))?;
            Ok(id)
        }
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// The directory of the short-pathed files of an instance.
#[must_use]
pub fn run_dir(instance: &InstanceId) -> Utf8PathBuf {
    Utf8Path::new(RUN_DIR).join(instance.as_str())
}

impl Agent {
    /// Starts an agent and serves its socket.
    ///
    /// # Errors
    /// What is missing, and nothing is left running.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        if config.production {
            // Before anything is made or taken over: what runs goes on until the host was put right.
            let fit = doctor::require(&doctor::Tree::host(), &doctor::Target::of(&config)).await;
            fit.map_err(StartError::NotFit)?;
        }
        fs::create_dir_all(&config.dir).map_err(failed("make", &config.dir))?;
        let dir = config.dir.canonicalize_utf8().map_err(failed("find", &config.dir))?;
        let instance: InstanceId = kept_id(&dir.join("instance"), "an instance id", InstanceId::random)?;
        let run_dir = run_dir(&instance);
        let sandboxes_dir = dir.join("agent/sandboxes");
        let machines_dir = run_dir.join("vm");
        private_dir(&sandboxes_dir)?;
        // The stack's other parts have sockets in the run directory too, and PostgreSQL another user.
        fs::create_dir_all(&run_dir).map_err(failed("make", &run_dir))?;
        let machines = MachinesDir::create(&machines_dir)?;
        let host_id = kept_id(&dir.join("agent/host"), "a host id", HostId::random)?;
        let default_disk = DiskMib::new(config.default_disk_mib.into()).map_err(StartError::DefaultDisk)?;

        let users = Users::of(&config, rustix::process::geteuid().is_root()).map_err(StartError::Users)?;
        if users == Users::TheAgents {
            tracing::warn!(
                "machines run as the agent's user, and see the host's files: --uids confines them"
            );
        }
        if config.memory_backend == MemoryBackendFlag::Uffd && config.vmm == VmmDriver::Qemu {
            return Err(StartError::MemoryBackend);
        }
        let driver = config.disk_driver().ok_or(StartError::Disks)?;
        let disks = disks::open(driver, &instance, &dir.join("agent")).await?;
        let images = Images::load(&config.images).and_then(|images| match config.vmm {
            VmmDriver::Qemu => Ok(images),
            VmmDriver::Firecracker => images.with_uncompressed_kernel(),
        });
        let images = images.map_err(StartError::Images)?;
        let uplink = config.uplink_netns.clone().map_or(Uplink::Host, Uplink::Named);
        let snapshots = Snapshots::open(&dir.join("agent")).map_err(StartError::Kept)?;
        let limits = Limits::open(&instance, &sandboxes_dir, config.machine_io());
        tracing::info!("{limits}");
        let begin = std::time::Instant::now();
        let (stock, found) = tokio::join!(
            adopt::take_stock(&instance, &snapshots, &sandboxes_dir, &machines_dir, &limits),
            find_vmm(&config, users, &images),
        );
        let stock = stock.map_err(StartError::Collect)?;
        if stock.ended > 0 {
            tracing::warn!(machines = stock.ended, "ended machines that an earlier agent left half-made");
        }
        let left = Arc::clone(&disks);
        let closed = blocking(move || left.collect()).await;
        let closed = closed.map_err(|error| StartError::Collect(CollectError::Disks(error)))?;
        if closed > 0 {
            tracing::info!(disks = closed, "closed disks that an earlier agent left open");
        }
        let store =
            SnapshotStore::new(&config.snapshots, Utf8Path::new(RUN_DIR)).map_err(StartError::Snapshots)?;
        let (vmm, accelerator_reason) = found.map_err(StartError::Vmm)?;
        tracing::info!(vmm = ?vmm.identity(), reason = accelerator_reason, "virtual machine monitor found");

        let policy = Policy::resolve(&NetworkPolicy::simple(true), &config.dns_servers)
            .map_err(|error| StartError::Network(SlotError::Policy(error)))?;
        let outside = uplink.namespace().map_err(StartError::Sampler)?;
        let has_machines = stock.has_machines();
        if !has_machines {
            let collected = network::collect(&instance, &uplink).await;
            collected.map_err(|error| StartError::Collect(CollectError::Network(error)))?;
        }
        let pool = PoolConfig {
            instance: instance.clone(),
            uplink: uplink.clone(),
            ready: config.ready_slots,
            policy,
        };
        let slots = SlotPool::start(pool).await.map_err(StartError::Network)?;
        let warm = Warm::new(crate::warm::Parts {
            instance: instance.clone(),
            vmm: Arc::clone(&vmm),
            guest: images.guest().bundle.clone(),
            disks: Arc::clone(&disks),
            slots: slots.clone(),
            store: store.clone(),
            machines_dir: machines_dir.clone(),
            users,
        });
        let scrub = Arc::new(Scrub::default());
        let scrubber = Scrubber::new(scrub::Parts {
            snapshots: snapshots.clone(),
            disks: Arc::clone(&disks),
            store,
            sandboxes_dir: sandboxes_dir.clone(),
            mark: format!("guest={}", Host::machine_mark(&instance)),
            looks: dir.join("agent/scrub.json"),
            every: (config.scrub_interval > 0).then(|| Duration::from_secs(config.scrub_interval.into())),
            scrub: Arc::clone(&scrub),
        });
        let host = Arc::new(Host {
            instance,
            vmm,
            images,
            disks,
            slots: slots.clone(),
            warm,
            snapshots,
            sandboxes_dir,
            machines_dir,
            dns_servers: config.dns_servers,
            default_disk,
            now: jiff::Timestamp::now,
            unreachable: Arc::default(),
            operations: Operations::default(),
            metrics: Metrics::default(),
            limits,
            users,
            scrub,
        });
        let registry = Arc::new(Registry::new(Arc::clone(&host)));
        // Before any machine is held: what fails from there on would end it.
        let sampler = Sampler::new(Arc::clone(&registry), &dir.join("agent/series"), &outside).await;
        let sampler = sampler.map_err(StartError::Sampler)?;
        let socket = config.socket.unwrap_or_else(|| run_dir.join("agent.sock"));
        let commands = Aside::bind(&socket)?;
        let beside = || MetricsAddress::Unix(socket.with_file_name("metrics.sock"));
        let (listener, metrics_socket) = listen(config.metrics.unwrap_or_else(beside)).await?;
        let taken = adopt::take_over(&host, &registry, stock).await.map_err(StartError::Collect)?;
        if !(taken.adopted.is_empty() && taken.paused.is_empty() && taken.removed.is_empty()) {
            tracing::info!(adopted = ?taken.adopted, paused = ?taken.paused, removed = ?taken.removed, after = ?begin.elapsed(), "took over");
        }
        let sampler = sampler.go_on().await;
        let measuring = CancellationToken::new();
        let sampler = (tokio::spawn(sampler.run(measuring.clone())), measuring);
        let facts = Arc::new(HostFacts { host_id, accelerator_reason });
        let stopping = CancellationToken::new();
        if let Some(listener) = listener {
            let serving =
                endpoint::serve(listener, Arc::clone(&registry), Arc::clone(&facts), stopping.clone());
            tokio::spawn(serving);
        }
        let sessions = Sessions::default();
        let (on_loss, bound) = (config.on_control_plane_loss, config.control_plane_loss_after);
        let bound = Duration::from_secs(bound.into());
        let watcher = tokio::spawn(watch_over(Arc::clone(&registry), sessions.clone(), on_loss, bound));
        let server = serve(commands, Arc::clone(&registry), facts, sessions.clone(), stopping.clone())?;
        // Last, so that nobody's request waits for them.
        let collector = tokio::spawn(collect(Arc::clone(&host)));
        let scrubber = tokio::spawn(scrubber.run());
        let slot_collector = has_machines.then(|| {
            let instance = host.instance.clone();
            tokio::spawn(async move { collect_slots(&instance, &uplink).await })
        });
        let on_stop = config.on_stop;
        Ok(Self {
            socket,
            machines_dir: machines,
            registry,
            slots,
            on_stop,
            stopping,
            collector,
            scrubber,
            slot_collector,
            sampler,
            metrics_socket,
            watcher,
            sessions,
            server,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Utf8Path {
        &self.socket
    }

    /// The sandboxes.
    #[must_use]
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// The sessions of control planes, and what was done without any.
    #[must_use]
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Leaves or ends every sandbox, then ends the agent. Bounded.
    pub async fn stop(self) {
        self.stopping.cancel();
        self.watcher.abort();
        if tokio::time::timeout(CLOSE_BOUND, self.registry.close(self.on_stop)).await.is_err() {
            tracing::error!(
                "some sandboxes did not end within {CLOSE_BOUND:?}; the next start collects them"
            );
        }
        // Open streams end with their sandboxes; what is left is watchers.
        self.server.abort();
        let _ = self.server.await;
        self.collector.abort();
        self.scrubber.abort();
        if let Some(collecting) = self.slot_collector {
            // Not broken off: half a slot would stay for the next start. Each of its steps is bounded.
            let _ = collecting.await;
        }
        let (sampler, measuring) = self.sampler;
        measuring.cancel();
        if tokio::time::timeout(DRAIN_BOUND, sampler).await.is_err() {
            tracing::warn!("the newest measurements could not be kept within {DRAIN_BOUND:?}");
        }
        for socket in [Some(self.socket), self.metrics_socket].into_iter().flatten() {
            let _ = fs::remove_file(socket);
        }
        self.slots.shutdown().await;
        self.registry.host().limits.close();
        drop(self.machines_dir);
    }
}

/// Removes the slots that an earlier agent left and that nobody holds.
async fn collect_slots(instance: &InstanceId, uplink: &Uplink) {
    match network::collect_slots(instance, uplink).await {
        Ok(collected) => tracing::debug!(?collected, "looked for network slots that were left"),
        // Whoever uses one of the numbers next clears it.
        Err(error) => tracing::warn!(
            error = &error as &dyn std::error::Error,
            "network slots that were left could not be removed"
        ),
    }
}

/// Removes layers and bases that nothing stands on any more: when somebody says that there may be some, and now
/// and then.
async fn collect(host: Arc<Host>) {
    loop {
        let (snapshots, sandboxes) = (host.snapshots.clone(), host.sandboxes_dir.clone());
        let swept = blocking(move || snapshots.collect(|| roots(&sandboxes), COLLECT_GRACE));
        let swept = swept.await;
        // What is too young now is not when its grace is over.
        let again = match &swept {
            Ok(swept) if swept.young > 0 => COLLECT_GRACE,
            _ => COLLECT_EVERY,
        };
        match swept {
            Ok(swept) if swept.layers.is_empty() && swept.bases.is_empty() => {}
            Ok(swept) => {
                tracing::info!(layers = ?swept.layers, bases = ?swept.bases, freed_bytes = swept.freed_bytes, "removed what nothing stands on")
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "what nothing stands on could not be removed"
                );
            }
        }
        let _ = tokio::time::timeout(again, host.unreachable.notified()).await;
    }
}

/// What the records of sandboxes stand on. Without the record of one nobody can say that: then it is an error,
/// and nothing is removed.
pub(crate) fn roots(sandboxes: &Utf8Path) -> SnapshotStoreResult<Roots> {
    let unknown = |source: io::Error| SnapshotStoreError::file("read the records in", sandboxes, source);
    let mut roots = Roots::default();
    for left in record::left_behind(sandboxes).map_err(|error| unknown(io::Error::other(error)))? {
        let record = left.record.map_err(|error| unknown(io::Error::other(error)))?;
        let record =
            record.ok_or_else(|| unknown(io::Error::other(format!("{} has no record", left.dir.path()))))?;
        roots.layers.extend(record.layers_in_use().cloned());
        roots.bases.extend(record.bases_in_use().cloned());
    }
    Ok(roots)
}

/// Listens for those who want measurements, and says which file is to be removed afterwards.
async fn listen(address: MetricsAddress) -> Result<(Option<Listener>, Option<Utf8PathBuf>), StartError> {
    match address {
        MetricsAddress::Off => Ok((None, None)),
        MetricsAddress::Unix(path) => {
            let listener = Aside::bind(&path)?.into_place()?;
            Ok((Some(Listener::Unix(listener)), Some(path)))
        }
        MetricsAddress::Loopback(address) => {
            let listener = tokio::net::TcpListener::bind(address).await;
            let listener = listener.map_err(|source| StartError::Metrics { address, source })?;
            Ok((Some(Listener::Tcp(listener)), None))
        }
    }
}

/// A socket under another name: nobody connects to it before it is put into its place. That is one step, also where
/// the socket of an agent that was killed lies there.
struct Aside<'a> {
    listener: UnixListener,
    fresh: Utf8PathBuf,
    socket: &'a Utf8Path,
}

impl<'a> Aside<'a> {
    /// Makes a socket that is usable by its owner only from the first moment on.
    fn bind(socket: &'a Utf8Path) -> Result<Self, StartError> {
        let fresh = Utf8PathBuf::from(format!("{socket}.new"));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &fresh)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&fresh).map_err(failed("listen on", &fresh))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).map_err(failed("narrow", &fresh))?;
        Ok(Self { listener, fresh, socket })
    }

    fn into_place(self) -> Result<UnixListener, StartError> {
        fs::rename(&self.fresh, self.socket).map_err(failed("put into place", self.socket))?;
        Ok(self.listener)
    }
}

/// Serves the commands.
fn serve(
    socket: Aside<'_>,
    registry: Arc<Registry>,
    facts: Arc<HostFacts>,
    sessions: Sessions,
    stopping: CancellationToken,
) -> Result<tokio::task::JoinHandle<io::Result<()>>, StartError> {
    let listener = socket.into_place()?;
    let service = Arc::new(Service::new(Arc::clone(&registry), facts, sessions));
    let connect = service.register(connectrpc::Router::new());
    let router =
        axum::Router::new().merge(tunnel::routes(registry)).fallback_service(connect.into_axum_service());
    Ok(tokio::spawn(async move {
        let serving =
            axum::serve(listener, router).with_graceful_shutdown(stopping.clone().cancelled_owned());
        tokio::select! {
            outcome = serving.into_future() => outcome,
            () = async { stopping.cancelled().await; tokio::time::sleep(DRAIN_BOUND).await } => Ok(()),
        }
    }))
}

/// Finds the VMM, and says why it runs guests as it does.
async fn find_vmm(
    config: &Config,
    users: Users,
    images: &Images,
) -> Result<(Arc<dyn Vmm>, String), VmmError> {
    match config.vmm {
        VmmDriver::Qemu => find_qemu(config, images).await,
        VmmDriver::Firecracker => {
            let options = FirecrackerOptions {
                program: config.firecracker.clone(),
                memory: match config.memory_backend {
                    MemoryBackendFlag::File => MemoryBackend::File,
                    MemoryBackendFlag::Uffd => MemoryBackend::Uffd(PagerProgram::this()),
                },
                is_jailed: users != Users::TheAgents,
                jailer: config.jailer.clone(),
            };
            let firecracker = Firecracker::detect(options).await?;
            Ok((Arc::new(firecracker), "Firecracker runs guests under KVM alone".to_owned()))
        }
    }
}

async fn find_qemu(config: &Config, images: &Images) -> Result<(Arc<dyn Vmm>, String), VmmError> {
    let accelerator = match config.accelerator {
        AcceleratorFlag::Auto => AcceleratorChoice::Auto,
        AcceleratorFlag::Kvm => AcceleratorChoice::Always(Accelerator::Kvm),
        AcceleratorFlag::Tcg => AcceleratorChoice::Always(Accelerator::Tcg),
    };
    let qemu = Qemu::detect(QemuOptions {
        program: config.qemu.clone(),
        accelerator,
        guest: Some(images.guest().bundle.clone()),
        // Beside the snapshots, because it is the same for every stack that shares them.
        cache_file: Some(config.snapshots.join("accelerator.json")),
        ..QemuOptions::default()
    })
    .await?;
    let reason = qemu.accelerator_reason().to_owned();
    Ok((Arc::new(qemu), reason))
}
