//! Processes that outlive their parent: started in a session, a network namespace and a user of their own,
//! and watched through a pidfd.
//!
//! ```text
//!  Spawn ── start() ──► Child ── wait()/terminate() ──► Exit
//!                         │
//!                         └─ process() ──► Process: signal, gone()        (also of what is not our child)
//!  find_by_argument() ────────────────────►┘
//! ```
//!
//! - [`Spawn`] describes a process, [`Spawn::start`] makes it. It does what `std::process::Command` cannot
//!   do without a slow fork of the whole parent: the child shares the parent's memory until it executes its
//!   program (as `posix_spawn` does), so that a start costs the same however large the parent is.
//! - [`Child`] is a process that we started and therefore reap. Waiting is a poll of its pidfd: no signal
//!   handler, no table of children, no race between an exit and a reused number. **Dropping a `Child` does
//!   not end it**; who drops it without having waited leaves a zombie for as long as this process lives.
//! - [`Process`] is any process of this machine, held by its pidfd, so that a signal can never reach another
//!   one that has inherited the number.
//! - [`SharedFate`] has the kernel end a process when this one ends, however it does.
//! - [`Jail`] is a root of its own for a process, and [`Opens`] are files that somebody else opens for it.
//! - [`find_by_argument`] finds processes by a mark in their command line: how strays of an earlier life
//!   are found. [`argument_of`] does so with one whose number is known.

mod fate;
mod find;
mod jail;
mod opens;
mod spawn;
mod step;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

pub use rustix::process::Signal;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};
use tokio::io::{Interest, unix::AsyncFd};

pub use self::{
    fate::SharedFate,
    find::{Found, argument_of, find_by_argument},
    jail::{Jail, Stage},
    opens::{Open, Opens},
    spawn::{Spawn, find_program},
    step::{SpawnError, Step},
};

/// How long a process may take to vanish once it was killed: longer than any that is not stuck in the kernel.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It ended by itself, with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl Exit {
    /// Whether it ended by itself with code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// A process of this machine, whoever started it. Clones are handles of the same process.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none, or the kernel knows no pidfd.
    pub fn open(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd: Arc::new(pidfd) })
    }

    /// Its pidfd, which can be read from once it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    fn from_pidfd(pid: u32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd: Arc::new(pidfd) }
    }

    /// Its number, for people and for `/proc`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The descriptor by which it is held.
    pub(crate) fn as_pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Sends a signal. A process that has ended already is no error: the wish is fulfilled.
    ///
    /// # Errors
    /// Not permitted.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&*self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills it.
    ///
    /// # Errors
    /// As [`Process::signal`].
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Whether it has not ended yet.
    ///
    /// # Errors
    /// The poll failed.
    pub fn is_alive(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&*self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(poll(&mut fds, Some(&now))? == 0)
    }

    /// Waits until it has ended. Cancel-safe, and may be waited for by several at once.
    ///
    /// # Errors
    /// The pidfd cannot be watched.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub async fn ended(&self) -> io::Result<()> {
        // A descriptor of its own for each wait: one cannot be registered twice.
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: `OwnedFd` answers the same open descriptor for as long as it lives, and the `AsyncFd`
        // owns it from here on.
        #[allow(unsafe_code)]
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        pidfd.map_err(io::Error::from)?.readable().await?.retain_ready();
        Ok(())
    }

    /// Lets the kernel forget it, if it has ended and is a child of ours that nobody has reaped. That it is none is no
    /// error.
    ///
    /// # Errors
    /// The kernel says so.
    pub fn reap_if_ours(&self) -> io::Result<()> {
        match reap(self, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::CHILD) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Kills it and waits until it has ended.
    ///
    /// # Errors
    /// Not permitted, or it did not end within a bound: it is stuck in the kernel.
    pub async fn kill_and_wait(&self) -> io::Result<()> {
        self.kill()?;
        bounded(KILL_BOUND, self.ended()).await
    }
}

/// A process that we started and that we reap.
#[derive(Debug)]
pub struct Child {
    process: Process,
    exit: Option<Exit>,
    opens: Option<Opens>,
}

impl Child {
    fn new(pid: u32, pidfd: OwnedFd) -> Self {
        Self { process: Process::from_pidfd(pid, pidfd), exit: None, opens: None }
    }

    /// The files that it is about to open ([`Spawn::hold_opens`]); none if it opens them itself, or if they were taken.
    pub fn take_opens(&mut self) -> Option<Opens> {
        self.opens.take()
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A handle by which others may signal it or wait for its end; reaping stays here.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// How it ended, if it has. Reaps it.
    ///
    /// # Errors
    /// Somebody else has reaped it.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            self.exit = reap(&self.process, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
        }
        Ok(self.exit)
    }

    /// Waits until it ends. Reaps it. Cancel-safe, and may be called again.
    ///
    /// # Errors
    /// As [`Process::ended`]; or somebody else has reaped it.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.try_wait()? {
                return Ok(exit);
            }
            self.process.ended().await?;
        }
    }

    /// Sends a signal. That it has ended already is no error.
    ///
    /// # Errors
    /// Not permitted.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // A pidfd of a reaped process names no other one, so this is right in every state.
        self.process.signal(signal)
    }

    /// Kills it; [`Child::wait`] then tells when it is gone.
    ///
    /// # Errors
    /// As [`Child::signal`].
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Asks it to end (`SIGTERM`), kills it when it has not after `grace`, and waits until it is gone.
    ///
    /// # Errors
    /// It did not even end within a bound after it was killed: it is stuck in the kernel.
    pub async fn terminate(&mut self, grace: Duration) -> io::Result<Exit> {
        self.signal(Signal::TERM)?;
        match bounded(grace, self.wait()).await {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                self.kill()?;
                bounded(KILL_BOUND, self.wait()).await
            }
            waited => waited,
        }
    }
}

/// Asks the kernel how a child ended, and lets it forget the child.
fn reap(process: &Process, options: WaitIdOptions) -> io::Result<Option<Exit>> {
    let status = loop {
        match waitid(WaitId::PidFd(process.pidfd.as_fd()), options) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    Ok(status.map(|status| match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(-1),
    }))
}

async fn bounded<T>(bound: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(bound, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests;
