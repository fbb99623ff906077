//! Process 1 at rest: the agent as a child, zombies, and the end.
//!
//! ```text
//!            exits                        more often than Restarts allows
//!  agent ───────────► reaped, restarted ─────────────────────────────────► power off
//!  SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGPWR ────────────────────────────► power off
//! ```
//!
//! An agent that was restarted is who the one before was (`agent/handover.rs`), and knows none of its processes. They go
//! on, as children of process 1, without their pipes; those that were frozen for a snapshot stay frozen, because
//! the kernel remembers that and not the agent.
//!
//! `envd supervise PROGRAM…` does the same around any program, without being process 1 and without powering off.

use std::{
    collections::VecDeque,
    fs, io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal, kill},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    mount::{MountFlags, mount_remount},
    process::{Pid, WaitOptions, wait},
    system::{RebootCommand, reboot},
};

use crate::console::say;

/// How often the agent may die within [`RESTART_WINDOW`].
const RESTARTS: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(60);
/// How long processes may take to end after being asked, and after being killed.
const TERMINATE_LIMIT: Duration = Duration::from_secs(2);
const KILL_LIMIT: Duration = Duration::from_secs(1);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The kernel shall not kill the agent when the programs of users use up the memory.
const OOM_SCORE: &str = "-1000";

/// Signals that mean: power off.
const POWER_OFF: [Signal; 5] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGPWR];

/// Runs the agent until the guest shall power off.
pub(super) fn run() {
    // Without it the agent after the first is closed until the host calls `/init` again.
    let handover = memfd_create(c"envd", MemfdFlags::CLOEXEC);
    if let Err(error) = &handover {
        say(format_args!("no file to hand over in: {error}"));
    }
    keep_running(|| start_agent(handover.as_ref().ok()));
}

/// Runs this program as process 1 runs the agent, and takes in its orphans.
pub(crate) fn run_other(program: &[String]) -> ExitCode {
    let Some((name, arguments)) = program.split_first() else { return ExitCode::from(2) };
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        say(format_args!("cannot take in orphans: {error}"));
        return ExitCode::FAILURE;
    }
    keep_running(|| spawn(Command::new(name).args(arguments)));
    ExitCode::SUCCESS
}

/// Starts the agent again and again, until it dies too often or a signal ends it all.
fn keep_running(start: impl Fn() -> io::Result<Pid>) {
    // Best effort: a kernel that was built without it has nothing to protect from.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    // Ctrl-Alt-Del becomes a signal instead of a reset.
    let _ = reboot(RebootCommand::CadOff);
    let signals = match block_signals() {
        Ok(signals) => signals,
        Err(error) => return say(format_args!("cannot wait for signals: {error}")),
    };
    let mut restarts = Restarts::default();
    let mut agent = start();
    loop {
        if agent.as_ref().err().is_some() {
            if !restarts.allow(Instant::now()) {
                return say(format_args!("the agent dies again and again: powering off"));
            }
            agent = start();
            continue;
        }
        match signals.read_signal() {
            Ok(Some(info)) if is_power_off(info.ssi_signo) => return,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return say(format_args!("cannot read signals: {error}")),
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if agent.as_ref().is_ok_and(|agent| *agent == pid) {
                match (status.exit_status(), status.terminating_signal()) {
                    (_, Some(signal)) => say(format_args!("the agent was ended by signal {signal}")),
                    (code, None) => say(format_args!("the agent exited with code {}", code.unwrap_or(-1))),
                }
                agent = Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }
}

/// Ends every process and the machine. It returns only if the kernel refuses.
pub(super) fn power_off() -> ExitCode {
    let everybody = nix::unistd::Pid::from_raw(-1);
    for (signal, limit) in [(Signal::SIGTERM, TERMINATE_LIMIT), (Signal::SIGKILL, KILL_LIMIT)] {
        if kill(everybody, signal).is_err() || wait_for_all(limit) {
            break;
        }
    }
    rustix::fs::sync();
    // A clean file system needs no recovery at the next boot; a busy one is recovered from its journal.
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        say(format_args!("cannot power off: {error}"));
    }
    ExitCode::FAILURE
}

/// Starts this program in the agent role. Its file in the initramfs is gone by now, but not what it was opened as.
fn start_agent(handover: Option<&OwnedFd>) -> io::Result<Pid> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("envd").args(["agent", "--guest"]).env_clear().env("PATH", PATH).current_dir("/");
    if let Some(handover) = handover {
        command.arg("--handover").stdin(handover.try_clone()?);
    }
    spawn(&mut command)
}

fn spawn(command: &mut Command) -> io::Result<Pid> {
    let child = command.spawn();
    if let Err(error) = &child {
        say(format_args!("cannot start the agent: {error}"));
    }
    child.map(|child| Pid::from_child(&child))
}

fn block_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    for signal in POWER_OFF {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)
}

fn is_power_off(number: u32) -> bool {
    POWER_OFF.iter().any(|signal| u32::try_from(*signal as i32) == Ok(number))
}

/// Reaps until no child is left; false means that the limit passed.
fn wait_for_all(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    // Without it the wait is as long as its limit, and not longer.
    let signals = set.thread_block().and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC));
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => continue,
            Err(Errno::CHILD) => return true,
            Ok(None) | Err(_) => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(left) = Timespec::try_from(left) else { return false };
        let polled = match &signals {
            Ok(signals) => poll(&mut [PollFd::new(signals, PollFlags::IN)], Some(&left)),
            Err(_) => poll(&mut [], Some(&left)),
        };
        if polled == Ok(0) {
            return false;
        }
        if let Ok(signals) = &signals {
            let _ = signals.read_signal();
        }
    }
}

/// How often the agent died lately.
#[derive(Debug, Default)]
struct Restarts {
    deaths: VecDeque<Instant>,
}

impl Restarts {
    /// Counts a death; whether the agent may start again.
    fn allow(&mut self, now: Instant) -> bool {
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|first| now.saturating_duration_since(*first) > RESTART_WINDOW)
        {
            self.deaths.pop_front();
        }
        self.deaths.len() <= RESTARTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_may_die_now_and_then_but_not_all_the_time() {
        let start = Instant::now();
        let mut restarts = Restarts::default();
        assert!((0..100).all(|turn| restarts.allow(start + turn * Duration::from_secs(15))));
        let mut restarts = Restarts::default();
        let allowed =
            (0..100).take_while(|turn| restarts.allow(start + *turn * Duration::from_secs(1))).count();
        assert_eq!(allowed, RESTARTS);
    }

    #[test]
    fn signals_that_end_the_guest() {
        assert!(is_power_off(15));
        assert!(!is_power_off(17));
    }
}
