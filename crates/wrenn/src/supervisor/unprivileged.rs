//! Becoming another program as an unprivileged user: how PostgreSQL is started by root.
//!
//! PostgreSQL refuses to run as root, and its data may lie where its user cannot get to, as in a clone under
//! `/root`.
//! So the supervisor starts its own executable once more, as `wrenn unprivileged`, and that process
//!
//! 1. moves into a mount namespace of its own, whose mounts nobody else sees,
//! 2. binds the data directory to a short path that everyone can get to,
//! 3. drops to the user, its group and no other group,
//! 4. asks for a signal when its parent dies (after step 3, because changing the user forgets it),
//! 5. becomes the program.
//!
//! All of this happens in a process with one thread, so it needs neither `unsafe` nor a fork of its own.

use std::{io, os::unix::process::CommandExt as _, process::Command};

use camino::Utf8PathBuf;
use nix::{
    sched::{CloneFlags, unshare},
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};
use rustix::{
    mount::{MountPropagationFlags, mount_bind, mount_change},
    process::{Pid, Signal},
};

/// The first word of the command line that asks for this.
pub const WORD: &str = "unprivileged";

/// What to become, and as whom.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// User id to drop to
    #[arg(long)]
    uid: u32,
    /// Group id to drop to
    #[arg(long)]
    gid: u32,
    /// Directory to bind
    #[arg(long)]
    bind: Utf8PathBuf,
    /// Directory it is bound to
    #[arg(long)]
    to: Utf8PathBuf,
    /// Process id of the supervisor
    #[arg(long)]
    supervisor: i32,
    /// Program and arguments
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Why the program did not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct BecomeError {
    step: &'static str,
    #[source]
    source: io::Error,
}

impl Arguments {
    /// The command line of `wrenn` that asks for this.
    pub(super) fn command_line(&self) -> Vec<String> {
        let mut line = vec![WORD.to_owned()];
        for (flag, value) in [
            ("--uid", self.uid.to_string()),
            ("--gid", self.gid.to_string()),
            ("--bind", self.bind.to_string()),
            ("--to", self.to.to_string()),
            ("--supervisor", self.supervisor.to_string()),
        ] {
            line.extend([flag.to_owned(), value]);
        }
        line.push("--".to_owned());
        line.extend(self.command.iter().cloned());
        line
    }

    pub(super) fn new(user: &super::postgres::DatabaseUser, bind: Utf8PathBuf, to: Utf8PathBuf) -> Self {
        let supervisor = rustix::process::getpid().as_raw_nonzero().get();
        Self { uid: user.uid, gid: user.gid, bind, to, supervisor, command: Vec::new() }
    }

    pub(super) fn run(mut self, program: &camino::Utf8Path, arguments: &[String]) -> Self {
        self.command = std::iter::once(program.to_string()).chain(arguments.iter().cloned()).collect();
        self
    }

    /// Becomes the program; returns only if that failed. Call it before any thread is made.
    #[must_use]
    pub fn become_it(&self) -> BecomeError {
        match self.try_become() {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    fn try_become(&self) -> Result<std::convert::Infallible, BecomeError> {
        fn at<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, BecomeError> {
            result.map_err(|error| BecomeError { step, source: error.into() })
        }

        at("make a mount namespace", unshare(CloneFlags::CLONE_NEWNS))?;
        // Unmounting on the host still reaches this namespace; nothing goes the other way.
        let down = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        at("keep mounts private", mount_change("/", down))?;
        at("bind the data directory", mount_bind(self.bind.as_str(), self.to.as_str()))?;

        let (user, group) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        at("leave all groups", setgroups(&[group]))?;
        at("change the group", setgid(group))?;
        at("change the user", setuid(user))?;

        // SIGINT is PostgreSQL's fast shutdown: sessions are ended, nothing is lost.
        at("ask for a signal", die_with(self.supervisor, Signal::INT))?;
        at("enter the root directory", std::env::set_current_dir("/"))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        // `command` has at least one word: the parser asks for it.
        let (program, arguments) = self.command.split_first().ok_or_else(|| BecomeError {
            step: "start nothing",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        Err(BecomeError { step: "start the program", source: Command::new(program).args(arguments).exec() })
    }
}

/// Asks the kernel for a signal at the end of the parent, which must be the process with this id.
///
/// The kernel means the *thread* that started this process, so a supervisor starts its children from a thread
/// that ends only with it: it runs on a runtime with one thread.
/// A parent that ended before the request would never be noticed, hence the look at who the parent is now.
///
/// # Errors
/// If the parent is another process, or the kernel refuses.
pub fn die_with(parent: i32, signal: Signal) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(signal))?;
    if rustix::process::getppid() == Pid::from_raw(parent) {
        Ok(())
    } else {
        Err(io::Error::other("the supervisor that started this process is gone"))
    }
}
