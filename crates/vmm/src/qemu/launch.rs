//! From a description to a process that is about to answer.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{net::unix::pipe, runtime::Handle, sync::watch, task::spawn_blocking};
use wrenn_host_linux::process::{Spawn, SpawnError};

use super::{
    arguments::{Console, Launch, Memory, Start, arguments},
    machine::Machine,
    monitor::{ConsoleTail, Monitor},
    qmp::Qmp,
};
use crate::{
    Accelerator, MachineSpec, VmmError, VmmResult,
    files::{SocketFile, cannot, readable, remove_stale},
    process::{Leash, Watched},
};

/// The control socket in the machine's directory. Its path is short: see `validate`.
pub(super) const CONTROL_SOCKET: &str = "control.sock";
/// When the host's memory is short, a guest goes before the agent does.
const OOM_SCORE: i16 = 500;

/// What all machines of a driver have in common.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) program: Utf8PathBuf,
    pub(super) accelerator: Accelerator,
    /// The rate of the host's time stamp counter; none under KVM, where the guest asks the processor.
    pub(super) tsc_khz: Option<u32>,
}

/// Starts a QEMU. On return it exists, and has been told nothing yet.
///
/// The machine that is returned kills the process when it is dropped, and so does this future.
pub(super) async fn start(
    engine: &Engine,
    spec: MachineSpec,
    memory: Memory<'_>,
    from: Start<'_>,
) -> VmmResult<Machine> {
    for file in spec.disk.iter().map(|disk| &disk.path).chain(spec.network.iter().map(|n| &n.namespace)) {
        readable(file)?;
    }
    let control = ControlSocket::bind(&spec.run_dir.join(CONTROL_SOCKET))?;
    let failed = |source: io::Error| VmmError::Spawn { program: engine.program.clone(), source };
    let (errors, stderr) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let errors = pipe::Receiver::from_owned_fd(errors).map_err(failed)?;
    let words = arguments(&Launch {
        accelerator: engine.accelerator,
        name: &spec.name,
        shape: spec.shape,
        memory,
        start: from,
        disk: spec.disk.as_ref(),
        tap: spec.network.as_ref().map(|network| network.tap.as_str()),
        control: Some(control.listener.as_raw_fd()),
        console: Console::Ring,
    })?;
    let mut spawn = Spawn::new(engine.program.as_std_path())
        .args(words)
        // It looks for its firmware in the working directory first.
        .current_dir("/")
        .new_session()
        .oom_score_adj(OOM_SCORE)
        .no_core_dump()
        .stderr(stderr)
        .keep_open(control.listener);
    if let Some(network) = &spec.network {
        spawn = spawn.network_namespace(network.namespace.as_std_path());
    }
    if let Some(group) = spec.control_group {
        spawn = spawn.control_group(group);
    }
    for descriptor in spec.keep_open {
        spawn = spawn.keep_open(descriptor);
    }

    let qmp = Arc::new(Qmp::over(control.stream).map_err(failed)?);
    let console = Arc::new(ConsoleTail::new(Arc::clone(&qmp), spec.run_dir));
    let (exit, exited) = watch::channel(None);
    let monitor = Monitor {
        qmp: Arc::clone(&qmp),
        console: Arc::clone(&console),
        errors: Some(errors),
        exit,
        socket: control.file,
    };
    let runtime = Handle::current();
    let begin = move || -> Result<Leash, SpawnError> {
        let child = spawn.start()?;
        let (leash, released) = Leash::new(child.process().clone());
        // Here, and not after the wait below: if nobody waits any more, the leash is dropped and kills, and
        // the monitor is there to reap.
        runtime.spawn(monitor.run(Watched::Child(child), leash.ending(), released));
        Ok(leash)
    };
    let leash = match spawn_blocking(begin).await {
        Ok(started) => started.map_err(|error| failed(io::Error::other(error)))?,
        Err(error) => return Err(failed(io::Error::other(error))),
    };
    Ok(Machine::new(leash, qmp, console, exited, spec.disk.is_some()))
}

/// A socket that QEMU will listen on and that we are connected to already: nobody has to wait until it is
/// there. Whoever comes after us connects to its path.
#[derive(Debug)]
struct ControlSocket {
    listener: OwnedFd,
    stream: UnixStream,
    file: SocketFile,
}

impl ControlSocket {
    fn bind(path: &Utf8Path) -> VmmResult<Self> {
        // The directory is this machine's alone: what is there is from an earlier life.
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(cannot("listen on", path))?;
        let file = SocketFile::at(path.to_owned());
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(path, mode).map_err(cannot("protect", path))?;
        let stream = UnixStream::connect(path).map_err(cannot("connect to", path))?;
        Ok(Self { listener: listener.into(), stream, file })
    }
}
