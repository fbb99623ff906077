//! What the start of a machine has in common, whatever VMM it is.

use std::io;

use camino::Utf8Path;
use tokio::{runtime::Handle, task::spawn_blocking};
use wrenn_host_linux::process::{Spawn, SpawnError};

use crate::{
    MachineSpec, SnapshotFiles, Vm, VmmError, VmmResult,
    files::{failed_thread, readable},
    pages::SavedPages,
    process::{Held, Leash, Watched},
};

/// The control socket in the machine's directory. Its path is short: see `validate`.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";
/// The MAC that every guest has: the namespace makes it unique.
pub(crate) const GUEST_MAC: &str = "02:fc:00:00:00:05";
/// When the host's memory is short, a guest goes before the agent does.
const OOM_SCORE: i16 = 500;

/// Fails where a VMM would not find what its machine is made of, with the name of the file.
pub(crate) fn inputs(spec: &MachineSpec) -> VmmResult<()> {
    let disk = spec.disk.iter().map(|disk| &disk.path);
    let namespace = spec.network.iter().map(|network| &network.namespace);
    disk.chain(namespace).try_for_each(|file| readable(file))
}

/// The pages of a snapshot, if it has some, checked. They are of a machine with so much memory.
pub(crate) async fn saved_pages(from: &SnapshotFiles, bytes: u64) -> VmmResult<Option<SavedPages>> {
    let Some(pages) = from.pages.clone() else { return Ok(None) };
    let opened = spawn_blocking(move || SavedPages::open(&pages, bytes)).await;
    opened.map_err(|error| failed_thread("restore", error))?.map(Some)
}

/// A process that outlives the agent, and goes before it where memory is short.
pub(crate) fn beside_agent(program: &Utf8Path) -> Spawn {
    Spawn::new(program.as_std_path()).new_session().oom_score_adj(OOM_SCORE).no_core_dump()
}

/// A process of a machine: what it is in and what it keeps are taken out of the description.
pub(crate) fn spawn(program: &Utf8Path, spec: &mut MachineSpec) -> Spawn {
    let mut spawn = beside_agent(program);
    if let Some(network) = &spec.network {
        spawn = spawn.network_namespace(network.namespace.as_std_path());
    }
    if let Some(group) = spec.control_group.take() {
        spawn = spawn.control_group(group);
    }
    for descriptor in spec.keep_open.drain(..) {
        spawn = spawn.keep_open(descriptor);
    }
    spawn
}

/// Starts a process, and its monitor with it. When this future is dropped, the process is killed.
pub(crate) async fn start<M>(
    program: &Utf8Path,
    spawn: Spawn,
    monitor: impl FnOnce(Watched, Held) -> M + Send + 'static,
) -> VmmResult<Leash>
where
    M: Future<Output = ()> + Send + 'static,
{
    let runtime = Handle::current();
    let begin = move || -> Result<Leash, SpawnError> {
        let child = spawn.start()?;
        let (leash, held) = Leash::new(child.process().clone());
        // Here, and not after the wait below: if nobody waits any more, the leash is dropped and kills, and
        // the monitor is there to reap.
        runtime.spawn(monitor(Watched::Child(child), held));
        Ok(leash)
    };
    let started = spawn_blocking(begin).await.map_err(io::Error::other);
    started.and_then(|started| started.map_err(io::Error::other)).map_err(not_started(program))
}

/// That a program could not be started.
pub(crate) fn not_started(program: &Utf8Path) -> impl Fn(io::Error) -> VmmError {
    move |source| VmmError::Spawn { program: program.to_owned(), source }
}

/// Waits until a machine that failed is gone, so that nothing of it is left when its error is told.
pub(crate) async fn ended(mut machine: impl Vm, error: VmmError) -> VmmError {
    if let Err(stuck) = machine.stop().await {
        tracing::error!(pid = machine.pid(), error = %stuck, "a VMM that failed cannot be ended");
    }
    error
}
