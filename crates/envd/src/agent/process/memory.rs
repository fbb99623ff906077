//! Whether the kernel ended a process because memory was short.
//!
//! A SIGKILL looks the same whoever sent it. The kernel says twice what it did: it counts its kills, before it
//! sends the signal, and it names each victim in its log, just after. So the log decides where it can be read, and
//! the count tells of kills that the log does not (or not yet, or no longer) show. Both are looked at only after an
//! end that might be such a kill, so that they cost an ordinary program nothing.
//!
//! | the end | what the kernel says | what the client is told |
//! |---|---|---|
//! | killed, and we sent no SIGKILL | its log names the process | `signal: killed (out of memory)` |
//! | the same | a kill was counted that its log gives to nobody | `signal: killed (possibly out of memory)` |
//! | exit code 137, a shell's word for a killed child | any kill since the start | `exit status 137 (possibly out of memory)` |
//! | anything else | | nothing |
//!
//! This is said in `error`; `status` stays what clients know.
//!
//! The count is the machine's, and not that of a cgroup (`memory.events`), although the latter could be had in a guest:
//! the kernel counts both at the same place, all processes of users share one cgroup, and of what else there is (process 1
//! and the agent) nothing may be killed. The two would always be the same number, and the memory controller that keeps
//! the second one is paid for with every page that any program takes. Only a cgroup for each process would say more, and
//! [`super::running`] says why there is none.

use std::{
    fs::{self, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    fs::OFlags,
    process::Pid,
    time::{ClockId, clock_gettime},
};

use super::end::Outcome;

const LOG: &str = "/dev/kmsg";
const COUNTERS: &str = "/proc/vmstat";
const COUNTER: &str = "oom_kill";
/// The longest record that the kernel's log has.
const MAXIMUM_RECORD: usize = 8192;
/// How many records are looked at: more than the largest ring buffer in use holds of the shortest ones.
const MAXIMUM_RECORDS: usize = 1 << 17;
/// The log's clock and ours differ by this much at most. Numbers are not used again so soon.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5);
/// What a shell exits with when a child of it was killed.
const KILLED_CHILD: i32 = 128 + 9;

/// What memory had to do with an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shortage {
    No,
    /// The kernel killed something meanwhile, and it may have been this.
    Possibly,
    /// The kernel says that it killed this process.
    Certainly,
}

/// What the kernel's log says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Log {
    /// It names the process.
    named: bool,
    /// How many it names since the process started.
    since_start: u64,
    /// How many it names since somebody last looked.
    since_look: u64,
}

/// How often the kernel had killed when somebody last looked. One exists, in the registry.
#[derive(Debug)]
pub(crate) struct Kills {
    last: Mutex<Look>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Duration,
    count: u64,
}

impl Look {
    fn now() -> Self {
        // In this order: what happens in between is then in the next look's log, whose count lacks it, and not the
        // other way round, which would look like a kill that nobody is named for.
        let at = clock();
        Self { at, count: count() }
    }
}

impl Default for Kills {
    fn default() -> Self {
        Self { last: Mutex::new(Look::now()) }
    }
}

impl Kills {
    /// What memory had to do with the end of `pid`, which started at `started` of the monotonic clock and to which
    /// we sent no SIGKILL.
    pub(crate) fn explain(&self, outcome: Outcome, pid: Pid, started: Duration) -> Shortage {
        let now = Look::now();
        let last = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *last, now)
        };
        let log = read_log(pid, started, last.at);
        decide(outcome, log.unwrap_or_default(), now.count.saturating_sub(last.count))
    }
}

/// The time that [`Kills::explain`] wants as the start.
pub(crate) fn clock() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

/// Whether it is worth asking.
pub(crate) fn may_be_shortage(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Signalled { signal: 9, .. } | Outcome::Exited(KILLED_CHILD))
}

/// A log that cannot be read names nobody. `counted` is how many kills there were since the last look.
fn decide(outcome: Outcome, log: Log, counted: u64) -> Shortage {
    let unnamed = counted > log.since_look;
    match outcome {
        Outcome::Signalled { signal: 9, .. } if log.named => Shortage::Certainly,
        Outcome::Signalled { signal: 9, .. } if unnamed => Shortage::Possibly,
        Outcome::Exited(KILLED_CHILD) if log.since_start > 0 || unnamed => Shortage::Possibly,
        _ => Shortage::No,
    }
}

/// How often the kernel has killed since it runs.
fn count() -> u64 {
    fs::read_to_string(COUNTERS).ok().and_then(|text| counter(&text)).unwrap_or(0)
}

fn counter(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(COUNTER)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// Looks for kills in what the log holds; `None` if it cannot be read.
fn read_log(pid: Pid, started: Duration, last_look: Duration) -> Option<Log> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(LOG).ok()?;
    let mut log = Log::default();
    let mut record = [0; MAXIMUM_RECORD];
    for _ in 0..MAXIMUM_RECORDS {
        match file.read(&mut record) {
            Ok(length) => {
                let Some((at, victim)) = victim(&String::from_utf8_lossy(&record[..length])) else {
                    continue;
                };
                if at + CLOCKS_DIFFER >= started {
                    log.since_start += 1;
                    log.named |= victim == pid.as_raw_nonzero().get();
                }
                log.since_look += u64::from(at >= last_look);
            }
            // A record that was overwritten while we read.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(log),
            Err(_) => return None,
        }
    }
    Some(log)
}

/// Whom a record of the log says to have been killed, and when: `3,881,94821003,-;Out of memory: Killed process 417 (python3) …`.
/// Programs may write to the log too, but not in the kernel's name.
fn victim(record: &str) -> Option<(Duration, i32)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let (priority, _, microseconds) = (fields.next()?, fields.next()?, fields.next()?);
    let from_kernel = priority.parse::<u32>().ok()? < 8;
    let (reason, rest) = text.split_once(": Killed process ")?;
    if !from_kernel || !matches!(reason, "Out of memory" | "Memory cgroup out of memory") {
        return None;
    }
    let at = Duration::from_micros(microseconds.parse().ok()?);
    Some((at, rest.split_once(' ')?.0.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KILLED: Outcome = Outcome::Signalled { signal: 9, core_dumped: false };

    #[test]
    fn what_is_said_is_what_is_known() {
        let log = |named, since_start, since_look| Log { named, since_start, since_look };
        let unreadable = Log::default();
        let table = [
            (KILLED, log(true, 1, 1), 1, Shortage::Certainly),
            // Somebody else's end was looked at in between.
            (KILLED, log(true, 1, 0), 0, Shortage::Certainly),
            (KILLED, log(false, 0, 0), 0, Shortage::No),
            // The one that was counted is the one that the log gives to somebody else.
            (KILLED, log(false, 1, 1), 1, Shortage::No),
            // The same, long before this one started.
            (KILLED, log(false, 0, 1), 1, Shortage::No),
            (KILLED, log(false, 0, 0), 1, Shortage::Possibly),
            (KILLED, unreadable, 1, Shortage::Possibly),
            (KILLED, unreadable, 0, Shortage::No),
            (Outcome::Exited(137), log(false, 1, 0), 0, Shortage::Possibly),
            (Outcome::Exited(137), unreadable, 1, Shortage::Possibly),
            (Outcome::Exited(137), log(false, 0, 1), 1, Shortage::No),
            (Outcome::Exited(1), log(true, 1, 1), 1, Shortage::No),
            (Outcome::Signalled { signal: 15, core_dumped: false }, log(true, 1, 1), 1, Shortage::No),
        ];
        for (outcome, log, counted, expected) in table {
            assert_eq!(decide(outcome, log, counted), expected, "{outcome:?} {log:?} {counted}");
        }
    }

    #[test]
    fn only_the_kernel_names_victims() {
        let killed = Some((Duration::from_micros(200), 417));
        let table = [
            ("3,881,200,-;Out of memory: Killed process 417 (python3) total-vm:1kB, anon-rss:2kB\n", killed),
            ("3,881,200,-;Memory cgroup out of memory: Killed process 417 (a b) total-vm\n", killed),
            ("11,881,200,-;Out of memory: Killed process 417 (python3)\n", None),
            ("3,881,200,-;x Out of memory: Killed process 417 (python3)\n", None),
            ("3,881,200,-;Out of memory: Killed process many\n", None),
            ("3,881,200,-;oom_reaper: reaped process 417 (python3)\n", None),
            ("", None),
        ];
        for (record, expected) in table {
            assert_eq!(victim(record), expected, "{record}");
        }
    }

    #[test]
    fn the_kernel_counts() {
        assert_eq!(counter("nr_free 1\noom_killed 9\noom_kill 7\nlast 3\n"), Some(7));
        assert_eq!(counter("oom_kill seven\n"), None);
        assert_eq!(counter(""), None);
    }

    #[test]
    fn a_kill_by_somebody_else_is_not_blamed_on_memory() {
        let kills = Kills::default();
        let mut child = std::process::Command::new("/bin/sleep").arg("300").spawn().unwrap();
        let (pid, started) = (Pid::from_child(&child), clock());
        child.kill().unwrap();
        child.wait().unwrap();
        // Another test may bring the kernel to kill meanwhile, hence not `No`.
        assert_ne!(kills.explain(KILLED, pid, started), Shortage::Certainly);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in ".{0,200}", near in "[0-9,;-]{0,30}Out of memory: Killed process [0-9 ]{0,20}") {
            for record in [&text, &near] {
                if let Some((_, pid)) = victim(record) {
                    prop_assert!(record.contains(&pid.unsigned_abs().to_string()));
                }
                counter(record);
            }
        }

        #[test]
        fn nothing_is_certain_but_what_the_log_names(
            signal in 1..32_i32, code in 0..256_i32, exited: bool, named: bool, since_start in 0..5_u64,
            since_look in 0..5_u64, counted in 0..5_u64,
        ) {
            let outcome =
                if exited { Outcome::Exited(code) } else { Outcome::Signalled { signal, core_dumped: false } };
            let said = decide(outcome, Log { named, since_start, since_look }, counted);
            prop_assert_eq!(said == Shortage::Certainly, !exited && signal == 9 && named);
            if said != Shortage::No {
                prop_assert!(may_be_shortage(outcome));
                prop_assert!(named || since_start > 0 || counted > 0);
            }
        }
    }
}
