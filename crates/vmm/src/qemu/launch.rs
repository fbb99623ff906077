//! From a description to a process that is about to answer.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;
use wrenn_host_linux::{netns::NetworkNamespace, tap};

use super::{
    arguments::{Console, Launch, Memory, Start, Tap, arguments},
    disk_files::DiskFiles,
    jail::{OpenedMemory, jail},
    machine::Machine,
    monitor::{ConsoleTail, Monitor},
    qmp::Qmp,
};
use crate::{
    Accelerator, MachineSpec, NetworkSpec, VmmResult,
    files::{SocketFile, cannot, remove_stale},
    launch::{self, CONTROL_SOCKET, not_started},
    process::{Held, Watched},
};

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
    mut spec: MachineSpec,
    memory: Memory<'_>,
    from: Start<'_>,
) -> VmmResult<Machine> {
    launch::inputs(&spec)?;
    let control = ControlSocket::bind(&spec.run_dir.join(CONTROL_SOCKET))?;
    let failed = not_started(&engine.program);
    let (errors, stderr) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let errors = pipe::Receiver::from_owned_fd(errors).map_err(&failed)?;
    let disk = match (&spec.disk, spec.user) {
        (None, _) => None,
        (Some(disk), None) => Some(DiskFiles::by_path(disk)),
        (Some(disk), Some(_)) => Some(DiskFiles::handed(disk, &spec.disk_bases)?),
    };
    let tap = match (&spec.network, spec.user) {
        (Some(network), Some(_)) => Some(attach(network).await?),
        _ => None,
    };
    let words = arguments(&Launch {
        accelerator: engine.accelerator,
        name: &spec.name,
        shape: spec.shape,
        memory,
        start: from,
        disk: disk.as_ref(),
        tap: match &tap {
            Some(open) => Some(Tap::Descriptor(open.as_raw_fd())),
            None => spec.network.as_ref().map(|network| Tap::Name(&network.tap)),
        },
        control: Some(control.listener.as_raw_fd()),
        console: Console::Ring,
    })?;
    let mut spawn = launch::spawn(&engine.program, &mut spec)
        .args(words)
        // It looks for its firmware in the working directory first.
        .current_dir("/")
        .stderr(stderr)
        .keep_open(control.listener);
    for handed in disk.into_iter().flat_map(DiskFiles::into_handed).chain(tap) {
        spawn = spawn.keep_open(handed);
    }
    let mut opened = None;
    if let Some(user) = spec.user {
        spawn = spawn.jail(jail(engine, &spec.run_dir, user, from)?);
        opened = OpenedMemory::open(memory)?;
        if opened.is_some() {
            spawn = spawn.hold_opens();
        }
    }

    let qmp = Arc::new(Qmp::over(control.stream).map_err(&failed)?);
    let console = Arc::new(ConsoleTail::new(Arc::clone(&qmp), spec.run_dir));
    let monitor = Monitor {
        qmp: Arc::clone(&qmp),
        console: Arc::clone(&console),
        errors: Some(errors),
        socket: control.file,
    };
    let begun = move |mut child: Watched, held: Held| {
        if let (Some(memory), Some(opens)) = (opened, child.take_opens()) {
            memory.give(opens);
        }
        monitor.run(child, held)
    };
    let leash = launch::start(&engine.program, spawn, begun).await?;
    Ok(Machine::new(leash, qmp, console, spec.disk.is_some()))
}

/// Opens a TAP device for somebody who may not.
async fn attach(network: &NetworkSpec) -> VmmResult<OwnedFd> {
    let (namespace, tap) = (network.namespace.clone(), network.tap.clone());
    let failed = || cannot("open the TAP device in", &network.namespace);
    let namespace = NetworkNamespace::open(namespace.as_std_path()).map_err(failed())?;
    let attached = namespace.run(move || tap::attach_for_vmm(&tap)).await;
    attached.and_then(|attached| attached).map_err(failed())
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
