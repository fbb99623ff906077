//! Which process a recorded process id means, now that ids are used again.
//!
//! A process id alone names whoever has it today.
//! Together with the start time that the kernel keeps it names one process for ever,
//! so everything that signals a process it did not start itself goes through [`ProcessIdentity`].

use std::{fmt, fs, io, str::FromStr, time::Duration};

use rustix::{io::Errno, process::Signal};
use wrenn_host_linux::process::Process;

/// One process of this boot, and no later one with the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: i32,
    /// Clock ticks from the boot to its start, as `/proc/PID/stat` tells.
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The process that has this id now, unless it is gone or only a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let start_time = start_time(&stat)?;
        Some(Self { pid, start_time })
    }

    /// This process.
    #[must_use]
    pub fn own() -> Option<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Whether it is still there.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, to this very process or to none.
    ///
    /// # Errors
    /// Whatever the kernel refuses; a process that is gone is no error.
    pub fn signal(self, signal: Signal) -> io::Result<()> {
        self.open()?.map_or(Ok(()), |process| process.signal(signal))
    }

    /// Waits until it is gone; false if it is still there after the bound.
    ///
    /// # Errors
    /// Whatever the kernel refuses.
    pub async fn wait_gone(self, bound: Duration) -> io::Result<bool> {
        let Some(process) = self.open()? else { return Ok(true) };
        match tokio::time::timeout(bound, process.ended()).await {
            Ok(ended) => ended.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// A handle of the process.
    /// The start time is compared after the handle is there: from then on the id cannot change hands.
    fn open(self) -> io::Result<Option<Process>> {
        let Ok(pid) = u32::try_from(self.pid) else { return Ok(None) };
        match Process::open(pid) {
            Ok(process) => Ok(self.is_alive().then_some(process)),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for ProcessIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.start_time)
    }
}

/// The text is not a process id and a start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a process is written as its id and its start time")]
pub struct ParseIdentityError;

impl FromStr for ProcessIdentity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, ParseIdentityError> {
        let (pid, start_time) = text.trim().split_once(' ').ok_or(ParseIdentityError)?;
        let pid = pid.parse().ok().filter(|pid| *pid > 0).ok_or(ParseIdentityError)?;
        Ok(Self { pid, start_time: start_time.parse().map_err(|_| ParseIdentityError)? })
    }
}

/// The start time in a line of `/proc/PID/stat`; none for a process that has ended.
fn start_time(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything; the numbers are what follows the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let line = |name: &str, state: &str| {
            format!("7 ({name}) {state} 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 10\n")
        };
        assert_eq!(start_time(&line("sh", "S")), Some(4242));
        assert_eq!(start_time(&line("a) Z 1 (b", "R")), Some(4242));
        assert_eq!(start_time(&line("sh", "Z")), None);
        assert_eq!(start_time("nonsense"), None);
    }

    #[test]
    fn an_identity_survives_being_written() {
        let own = ProcessIdentity::own().unwrap();
        assert_eq!(own.to_string().parse(), Ok(own));
        for bad in ["", "1", "0 5", "-1 5", "x 5", "1 x"] {
            assert_eq!(bad.parse::<ProcessIdentity>(), Err(ParseIdentityError), "{bad}");
        }
    }

    #[tokio::test]
    async fn only_the_very_process_is_meant() {
        let mut child = tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
        let identity = ProcessIdentity::of(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        assert!(identity.is_alive());

        let other = ProcessIdentity { start_time: identity.start_time + 1, ..identity };
        assert!(!other.is_alive());
        other.signal(Signal::KILL).unwrap();
        assert!(other.wait_gone(Duration::from_secs(1)).await.unwrap());
        assert!(!identity.wait_gone(Duration::from_millis(20)).await.unwrap());

        identity.signal(Signal::KILL).unwrap();
        assert!(identity.wait_gone(Duration::from_secs(10)).await.unwrap());
        child.wait().await.unwrap();
        assert!(!identity.is_alive());
    }
}
