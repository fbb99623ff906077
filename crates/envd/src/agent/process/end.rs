//! How a process ended, and how that is said.

use rustix::process::WaitIdStatus;
use wrenn_proto::process::process_event::EndEvent;

use super::memory::Shortage;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It exited by itself, with this code.
    Exited(i32),
    /// A signal ended it.
    Signalled { signal: i32, core_dumped: bool },
    /// The kernel no longer knew it; this does not happen while nobody else waits for our children.
    Lost,
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) outcome: Outcome,
    /// Whether its time limit ended it.
    pub(crate) timed_out: bool,
    /// What memory had to do with it.
    pub(crate) shortage: Shortage,
}

impl Outcome {
    pub(crate) fn from_status(status: &WaitIdStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signalled { signal, core_dumped: status.dumped() },
            (None, None) => Self::Lost,
        }
    }

    /// The text that clients know: `exit status 1`, `signal: killed`.
    fn status(self) -> String {
        match self {
            Self::Exited(code) => format!("exit status {code}"),
            Self::Signalled { signal, core_dumped } => {
                let core = if core_dumped { " (core dumped)" } else { "" };
                match signal_name(signal) {
                    Some(name) => format!("signal: {name}{core}"),
                    None => format!("signal: signal {signal}{core}"),
                }
            }
            Self::Lost => "exit status unknown".to_owned(),
        }
    }
}

impl From<End> for EndEvent {
    fn from(end: End) -> Self {
        let status = end.outcome.status();
        let (exit_code, exited) = match end.outcome {
            Outcome::Exited(code) => (code, true),
            Outcome::Signalled { .. } | Outcome::Lost => (-1, false),
        };
        let reason = match end.shortage {
            Shortage::No => "",
            Shortage::Possibly => " (possibly out of memory)",
            Shortage::Certainly => " (out of memory)",
        };
        let error = (end.outcome != Outcome::Exited(0)).then(|| format!("{status}{reason}"));
        Self { exit_code, exited, status, error, ..Self::default() }
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        16 => "stack fault",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        26 => "virtual timer expired",
        27 => "profiling timer expired",
        29 => "I/O possible",
        30 => "power failure",
        31 => "bad system call",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_code_and_text() {
        let killed = Outcome::Signalled { signal: 9, core_dumped: false };
        let crashed = Outcome::Signalled { signal: 11, core_dumped: true };
        let odd = Outcome::Signalled { signal: 40, core_dumped: false };
        let table = [
            (Outcome::Exited(0), 0, true, "exit status 0", None),
            (Outcome::Exited(7), 7, true, "exit status 7", Some("exit status 7")),
            (killed, -1, false, "signal: killed", Some("signal: killed")),
            (
                crashed,
                -1,
                false,
                "signal: segmentation fault (core dumped)",
                Some("signal: segmentation fault (core dumped)"),
            ),
            (odd, -1, false, "signal: signal 40", Some("signal: signal 40")),
        ];
        for (outcome, code, exited, status, error) in table {
            let event = EndEvent::from(End { outcome, timed_out: false, shortage: Shortage::No });
            assert_eq!((event.exit_code, event.exited, event.status.as_str()), (code, exited, status));
            assert_eq!(event.error.as_deref(), error);
        }
    }

    #[test]
    fn a_shortage_of_memory_is_said_beside_the_status() {
        let killed = Outcome::Signalled { signal: 9, core_dumped: false };
        let table = [
            (killed, Shortage::Certainly, "signal: killed", "signal: killed (out of memory)"),
            (killed, Shortage::Possibly, "signal: killed", "signal: killed (possibly out of memory)"),
            (
                Outcome::Exited(137),
                Shortage::Possibly,
                "exit status 137",
                "exit status 137 (possibly out of memory)",
            ),
        ];
        for (outcome, shortage, status, error) in table {
            let event = EndEvent::from(End { outcome, timed_out: false, shortage });
            assert_eq!((event.status.as_str(), event.error.as_deref()), (status, Some(error)));
        }
    }
}
