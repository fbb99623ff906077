//! The process of a machine: what holds it, what waits for its end, and how one that runs without an owner is found.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::oneshot;
use wrenn_host_linux::process::{Child, Exit, Process, argument_of, find_by_argument};

/// Kills the process when it is dropped, unless it was let go; what a machine holds.
#[derive(Debug)]
pub(crate) struct Leash {
    pub(crate) process: Process,
    ending: Ending,
    /// Tells the monitor that the process was let go; none once that was told.
    release: Option<oneshot::Sender<()>>,
}

/// Whether the end of the process is our own wish.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending(Arc<AtomicBool>);

impl Ending {
    pub(crate) fn wish(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_wished(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl Leash {
    /// A leash, and what its monitor waits for.
    pub(crate) fn new(process: Process) -> (Self, oneshot::Receiver<()>) {
        let (release, released) = oneshot::channel();
        (Self { process, ending: Ending::default(), release: Some(release) }, released)
    }

    pub(crate) fn let_go(&mut self) {
        if let Some(release) = self.release.take() {
            // The monitor is gone when the process is.
            let _ = release.send(());
        }
    }

    pub(crate) fn ending(&self) -> Ending {
        self.ending.clone()
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if self.release.is_none() {
            return;
        }
        self.ending.wish();
        if let Err(error) = self.process.kill() {
            tracing::error!(pid = self.process.pid(), %error, "a VMM cannot be killed");
        }
    }
}

/// The process of which the end is waited for.
#[derive(Debug)]
pub(crate) enum Watched {
    Child(Child),
    /// Somebody else's child: that it ends is told, and not how.
    Adopted(Process),
}

impl Watched {
    pub(crate) async fn wait(&mut self) -> io::Result<Option<Exit>> {
        match self {
            Self::Child(child) => child.wait().await.map(Some),
            Self::Adopted(process) => process.ended().await.map(|()| None),
        }
    }

    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::Child(child) => child.process(),
            Self::Adopted(process) => process,
        }
    }
}

/// The argument by which the process of a machine of this name is known in the process table, whatever VMM it is; of the
/// beginning of a name, the beginning of the argument.
pub(crate) fn mark(name: &str) -> String {
    format!("guest={name}")
}

/// The process with this argument.
pub(crate) fn find(mark: &str, hint: Option<u32>) -> io::Result<Option<Process>> {
    if let Some(pid) = hint
        && let Some(found) = argument_of(pid, mark)?
        && found.argument == mark
    {
        return Ok(Some(found.process));
    }
    let mut found = find_by_argument(mark)?.into_iter().filter(|found| found.argument == mark);
    let first = found.next().map(|found| found.process);
    if found.next().is_some() {
        return Err(io::Error::other("several processes have its name"));
    }
    Ok(first)
}
