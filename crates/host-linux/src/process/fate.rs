//! A process that must not go on without this one.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::libc;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    pipe::{PipeFlags, pipe_with},
};

use super::{Process, Signal};

/// `F_SETSIG` (`asm-generic/fcntl.h`).
const SET_SIGNAL: libc::c_int = 10;

/// Sends a process signals when this process ends, however it does, or when this is dropped.
///
/// The kernel does it: both ends of a pipe are here, each with the order to tell that process, by a signal, when
/// something happens to the pipe. Nothing does but that one end is closed before the other.
#[derive(Debug)]
pub struct SharedFate {
    _ends: Vec<[OwnedFd; 2]>,
}

impl SharedFate {
    /// Makes sure that `process` gets each of these signals. A caller that gives up its privileges afterwards loses
    /// nothing: what counts is who it is now.
    ///
    /// # Errors
    /// It has ended, or no pipe can be had. It may have been sent the signals then, unless it has ended.
    pub fn with(process: &Process, signals: &[Signal]) -> io::Result<Self> {
        let ends = signals.iter().map(|signal| pipe_that_tells(process, *signal));
        let fate = Self { _ends: ends.collect::<io::Result<_>>()? };
        // One that lives now has had its number all the time.
        if process.is_alive()? { Ok(fate) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

fn pipe_that_tells(process: &Process, signal: Signal) -> io::Result<[OwnedFd; 2]> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    let ends = [read, write];
    let pid = libc::c_int::try_from(process.pid()).map_err(|_| io::ErrorKind::InvalidInput)?;
    for end in &ends {
        // Whoever has become another process's since is found out by the caller, before anything is told.
        set(end, SET_SIGNAL, signal.as_raw())?;
        set(end, libc::F_SETOWN, pid)?;
        fcntl_setfl(end, fcntl_getfl(end)? | OFlags::from_bits_retain(libc::O_ASYNC.cast_unsigned()))?;
    }
    Ok(ends)
}

fn set(end: &OwnedFd, command: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open, and both commands take a number and no pointer.
    #[allow(unsafe_code)]
    let outcome = unsafe { libc::fcntl(end.as_raw_fd(), command, value) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::process::{Exit, Spawn};

    const BOUND: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn what_shares_a_fate_ends_with_it() {
        let mut child = Spawn::new("sleep").arg("1000").start().unwrap();
        let fate = SharedFate::with(child.process(), &[Signal::KILL]).unwrap();
        assert!(child.process().is_alive().unwrap());
        drop(fate);
        let exit = tokio::time::timeout(BOUND, child.wait()).await.unwrap().unwrap();
        assert_eq!(exit, Exit::Signal(9));
        assert!(SharedFate::with(child.process(), &[Signal::KILL]).is_err());
    }

    #[tokio::test]
    async fn also_when_that_is_killed() {
        // The ends are inherited by a process that keeps them open, and are nobody else's then.
        let mut victim = Spawn::new("sleep").arg("1000").start().unwrap();
        let mut keeper = Spawn::new("sleep").arg("1000");
        for ends in SharedFate::with(victim.process(), &[Signal::HUP]).unwrap()._ends {
            for end in ends {
                keeper = keeper.keep_open(end);
            }
        }
        let mut keeper = keeper.start().unwrap();
        assert!(victim.process().is_alive().unwrap());
        keeper.kill().unwrap();
        assert_eq!(keeper.wait().await.unwrap(), Exit::Signal(9));
        let exit = tokio::time::timeout(BOUND, victim.wait()).await.unwrap().unwrap();
        assert_eq!(exit, Exit::Signal(1));
    }
}
