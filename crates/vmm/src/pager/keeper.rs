//! The driver's side: starts a pager, finds one that is there, and knows why one ended.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};
use wrenn_host_linux::process::Process;

use super::{
    process::{DONE, Order, WORD},
    state::{NAME, StateReader},
};
use crate::{
    ExitReason, MachineSpec, SnapshotFiles, VmmError, VmmResult,
    files::{SocketFile, cannot, create_private, remove_stale},
    launch::{self, beside_agent, not_started},
    process::{Leash, find},
};

/// What a pager says before it ends.
const LOG: &str = "pager.log";
/// Where Firecracker finds it, from its own directory.
pub(crate) const SOCKET: &str = "memory.sock";
/// How long a pager may take for a step, on a machine that is busy with many others.
const BOUND: Duration = Duration::from_secs(20);
/// How long a pager may take to be gone whose VMM is.
const END_BOUND: Duration = Duration::from_secs(2);
/// How much of what it said is told.
const SAID: u64 = 4096;

/// The program that becomes a pager.
#[derive(Debug, Clone)]
pub struct PagerProgram {
    /// Its path.
    pub program: Utf8PathBuf,
    /// What makes a pager of it.
    pub arguments: Vec<OsString>,
    /// Its environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl PagerProgram {
    /// This program, whatever has become of its file, where its first word makes it a pager ([`super::WORD`]).
    #[must_use]
    pub fn this() -> Self {
        Self { program: "/proc/self/exe".into(), arguments: vec![WORD.into()], environment: Vec::new() }
    }
}

/// What a pager is wanted for.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The machine's name and directory.
    pub(crate) name: String,
    pub(crate) run_dir: Utf8PathBuf,
    /// Whom it runs as, where that is a user of its own.
    pub(crate) user: Option<u32>,
    /// Its memory: the base, what was saved over it, and how long it is.
    pub(crate) base: Utf8PathBuf,
    pub(crate) pages: Option<Utf8PathBuf>,
    pub(crate) bytes: u64,
    /// Where the order of its first pages is kept.
    pub(crate) working_set: Utf8PathBuf,
    /// That of the machine.
    pub(crate) control_group: Option<OwnedFd>,
}

/// A pager, which ends when this is dropped, and with it its VMM, unless it was let go.
#[derive(Debug)]
pub(crate) struct Pager {
    leash: Leash,
    run_dir: Utf8PathBuf,
    control: Option<UnixStream>,
    /// Where it listens, until its VMM has connected.
    socket: Option<SocketFile>,
}

impl Wanted {
    /// To serve a machine that is restored from this. The working set is kept beside the state of the devices.
    pub(crate) fn for_restore(spec: &MachineSpec, from: &SnapshotFiles) -> VmmResult<Self> {
        let group = spec.control_group.as_ref().map(OwnedFd::try_clone).transpose();
        let name = format!("{}.working-set", from.state.file_name().unwrap_or_default());
        Ok(Self {
            name: spec.name.clone(),
            run_dir: spec.run_dir.clone(),
            user: spec.user,
            base: from.memory.clone(),
            pages: from.pages.clone(),
            bytes: spec.shape.memory.bytes(),
            working_set: from.state.with_file_name(name),
            control_group: group.map_err(cannot("keep the control group of", &spec.run_dir))?,
        })
    }
}

impl Pager {
    /// Starts one; that it is ready is waited for later.
    pub(crate) async fn begin(program: &PagerProgram, wanted: Wanted) -> VmmResult<Self> {
        let Wanted { name, run_dir, user, base, pages, bytes, working_set, control_group } = wanted;
        let failed = not_started(&program.program);
        forget(&run_dir)?;
        let log = create_private(&run_dir.join(LOG))?;
        let (ours, theirs) = StdUnixStream::pair().map_err(&failed)?;
        ours.set_nonblocking(true).map_err(&failed)?;
        let mut control = UnixStream::from_std(ours).map_err(&failed)?;
        let mut spawn = beside_agent(&program.program)
            .args(program.arguments.iter().cloned())
            .arg(mark(&name))
            .current_dir(run_dir.as_std_path())
            .stdin(theirs)
            .stderr(log);
        for (variable, value) in &program.environment {
            spawn = spawn.env(variable, value);
        }
        if let Some(group) = control_group {
            spawn = spawn.control_group(group);
        }
        // Reaped for as long as we live, let go or not.
        let leash = launch::start(&program.program, spawn, |mut child, held| async move {
            drop(child.wait().await);
            drop(held);
        });
        let leash = leash.await?;
        let order = Order {
            socket: run_dir.join(SOCKET),
            socket_owner: user,
            base,
            pages,
            bytes,
            state: run_dir.join(NAME),
            working_set: Some(working_set),
        };
        let socket = Some(SocketFile::at(order.socket.clone()));
        tell(&mut control, &order).await.map_err(&failed)?;
        Ok(Self { leash, run_dir, control: Some(control), socket })
    }

    /// Waits until it listens, and binds it and its VMM to each other: from then on neither goes on without the other.
    pub(crate) async fn bind(&mut self, program: &PagerProgram, vmm: &Process) -> VmmResult<()> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let steps = async {
            done(control).await?;
            tell(control, &vmm.pid()).await?;
            done(control).await
        };
        let source = match timeout(BOUND, steps).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => return Err(VmmError::Timeout { operation: "start", bound: BOUND }),
        };
        // It has said why, if it has ended.
        drop(timeout(END_BOUND, self.process().ended()).await);
        let said = said(&self.run_dir);
        let source = if said.is_empty() { source } else { io::Error::other(said) };
        Err(not_started(&program.program)(source))
    }

    /// Its VMM has connected, and nobody else is to.
    pub(crate) fn is_connected(&mut self) {
        (self.control, self.socket) = (None, None);
    }

    /// The pager of a machine that runs without an owner.
    pub(crate) fn find(name: &str, run_dir: &Utf8Path) -> io::Result<Option<Self>> {
        let found = find(&mark(name), None)?;
        let run_dir = run_dir.to_owned();
        Ok(found.map(|process| Self { leash: Leash::new(process).0, run_dir, control: None, socket: None }))
    }

    pub(crate) fn process(&self) -> &Process {
        self.leash.process()
    }

    /// What tells its end.
    pub(crate) fn watch(&self) -> PagerWatch {
        PagerWatch { process: self.process().clone(), run_dir: self.run_dir.clone() }
    }

    /// Waits until it is gone, whose VMM is; one that does not end is killed.
    pub(crate) async fn end(&self) {
        if timeout(END_BOUND, self.watch().ended()).await.is_err()
            && let Err(error) = self.process().kill_and_wait().await
        {
            tracing::error!(pid = self.process().pid(), %error, "a pager cannot be ended");
        }
    }

    pub(crate) fn let_go(&mut self) {
        self.leash.let_go();
    }
}

/// Whether a pager ended, and why.
#[derive(Debug, Clone)]
pub(crate) struct PagerWatch {
    process: Process,
    run_dir: Utf8PathBuf,
}

impl PagerWatch {
    /// Waits for its end.
    pub(crate) async fn ended(&self) {
        // That it cannot be watched is no reason to take it for ended.
        if self.process.ended().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Of a VMM that is gone: whether that was because of its pager.
    pub(crate) async fn verdict(&self) -> Option<ExitReason> {
        timeout(END_BOUND, self.process.ended()).await.ok()?.ok()?;
        let is_done = StateReader::open(&self.run_dir).and_then(|state| state.is_done());
        // It saw the VMM's end, and ended for that.
        (!is_done.unwrap_or_default()).then(|| reason(&self.run_dir))
    }
}

/// Whether a machine in this directory has a pager, or had one.
pub(crate) fn is_wanted(run_dir: &Utf8Path) -> VmmResult<bool> {
    let path = run_dir.join(NAME);
    path.try_exists().map_err(cannot("examine", &path))
}

/// Removes what the pager of an earlier machine left.
pub(crate) fn forget(run_dir: &Utf8Path) -> VmmResult<()> {
    [NAME, LOG, SOCKET].iter().try_for_each(|name| remove_stale(&run_dir.join(name)))
}

/// Why a machine ended whose pager had ended.
pub(crate) fn reason(run_dir: &Utf8Path) -> ExitReason {
    ExitReason::Pager { said: said(run_dir) }
}

fn said(run_dir: &Utf8Path) -> String {
    let read = File::open(run_dir.join(LOG)).and_then(|mut log| {
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(SAID)))?;
        let mut said = Vec::new();
        log.take(SAID).read_to_end(&mut said)?;
        Ok(String::from_utf8_lossy(&said).trim().to_owned())
    });
    // A directory that its owner has removed.
    read.unwrap_or_default()
}

/// The argument by which the pager of a machine of this name is known; of the beginning of a name, its beginning.
pub(crate) fn mark(name: &str) -> String {
    format!("pager-of={name}")
}

async fn tell(control: &mut UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    control.write_all(&line).await
}

async fn done(control: &mut UnixStream) -> io::Result<()> {
    let mut answer = [0; DONE.len()];
    control.read_exact(&mut answer).await?;
    if answer == DONE.as_bytes() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
