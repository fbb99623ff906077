//! `GET /processes`: every process of the guest, and what it uses.
//!
//! Not only those that clients started: this is for a person who wants to know what fills a sandbox. Threads of the
//! kernel are left out. It reads `/proc`, so it may block.

use std::{
    collections::HashMap,
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
};

use serde::Serialize;

use super::users::Accounts;

/// How many threads list them. What `/proc` says of a program whose memory is busy may have to be waited for.
pub(crate) const THREADS: usize = 1;
/// The most processes that are listed: those with the lowest numbers.
pub(crate) const MAXIMUM: usize = 4096;
/// How much of a command line is shown.
const MAXIMUM_COMMAND: usize = 512;
/// The most that is read of `/proc/PID/stat`.
const MAXIMUM_STAT: u64 = 2048;
/// The flag of a thread of the kernel.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// The answer.
#[derive(Debug, Serialize)]
pub(crate) struct Tasks {
    processes: Vec<Task>,
    /// Whether there are more than are listed.
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct Task {
    pid: u32,
    ppid: u32,
    user: String,
    /// The kernel's letter: `R` runs, `S` sleeps, `D` waits for a device, `T` is stopped, `Z` has ended.
    state: char,
    /// Time on processors, in milliseconds, in the program and in the kernel.
    cpu_ms: u64,
    rss: u64,
    threads: u32,
    /// When it started, in milliseconds since boot.
    started_ms: u64,
    /// The command line, its beginning; the program's name in brackets if there is none.
    command: String,
}

/// Lists the processes.
pub(crate) fn list() -> io::Result<Tasks> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let accounts = Accounts::load()?;
    let mut names: HashMap<u32, String> = HashMap::new();
    let mut tasks = Tasks { processes: Vec::new(), truncated: false };
    // One that ends meanwhile is left out.
    for (pid, stat) in pids.into_iter().filter_map(|pid| Some((pid, stat(pid)?))) {
        if stat.is_of_kernel() {
            continue;
        }
        if tasks.processes.len() == MAXIMUM {
            tasks.truncated = true;
            break;
        }
        let Ok(uid) = fs::metadata(format!("/proc/{pid}")).map(|metadata| metadata.uid()) else { continue };
        let user = names.entry(uid).or_insert_with(|| accounts.user_name(uid)).clone();
        tasks.processes.push(Task {
            pid,
            ppid: stat.ppid,
            user,
            state: stat.state,
            cpu_ms: milliseconds(stat.ticks),
            rss: stat.pages.saturating_mul(page_size()),
            threads: stat.threads,
            started_ms: milliseconds(stat.started),
            command: command(pid).unwrap_or_else(|| format!("[{}]", stat.name)),
        });
    }
    Ok(tasks)
}

/// Whether this is a thread of the kernel. One that is not there is nobody's.
pub(crate) fn is_of_kernel(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| stat.is_of_kernel())
}

fn milliseconds(ticks: u64) -> u64 {
    ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1)
}

fn page_size() -> u64 {
    u64::try_from(rustix::param::page_size()).unwrap_or(4096)
}

fn stat(pid: u32) -> Option<Stat> {
    Stat::parse(&read(&format!("/proc/{pid}/stat"), MAXIMUM_STAT)?)
}

/// The command line, made fit to be read.
fn command(pid: u32) -> Option<String> {
    let limit = u64::try_from(MAXIMUM_COMMAND).ok()?;
    let bytes = read(&format!("/proc/{pid}/cmdline"), limit)?;
    let text = readable(&bytes);
    (!text.is_empty()).then_some(text)
}

/// Arguments end with a zero byte each; whatever else is no text becomes a space too.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let plain: String = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    plain.trim().to_owned()
}

fn read(path: &str, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// What `/proc/PID/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    ppid: u32,
    flags: u32,
    ticks: u64,
    threads: u32,
    started: u64,
    pages: u64,
}

impl Stat {
    /// Reads `pid (name) state ppid …`. The name may hold anything, parentheses and line ends included, so it ends at
    /// the last parenthesis.
    fn parse(text: &[u8]) -> Option<Self> {
        let open = text.iter().position(|byte| *byte == b'(')?;
        let close = text.iter().rposition(|byte| *byte == b')')?;
        let name = readable(text.get(open + 1..close)?);
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        // The numbers of the fields are those of proc(5), which counts from 1; the state is the third.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied();
        let number = |index: usize| field(index)?.parse::<u64>().ok();
        Some(Self {
            name,
            state: field(3)?.chars().next()?,
            ppid: field(4)?.parse().ok()?,
            flags: field(9)?.parse().ok()?,
            ticks: number(14)?.saturating_add(number(15)?),
            threads: field(20)?.parse().ok()?,
            started: number(22)?,
            // It is signed, and the kernel never shows less than nothing.
            pages: number(24)?,
        })
    }

    fn is_of_kernel(&self) -> bool {
        self.flags & KERNEL_THREAD != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAT: &str = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 7 5 0 0 20 0 3 0 1234 1000000 250 18446744073709551615 1 1";

    #[test]
    fn a_name_may_hold_anything() {
        let stat = Stat::parse(STAT.as_bytes()).unwrap();
        assert_eq!((stat.name.as_str(), stat.state, stat.ppid), ("a) b (c", 'S', 1));
        assert_eq!((stat.ticks, stat.threads, stat.started, stat.pages), (12, 3, 1234, 250));
        assert!(!stat.is_of_kernel());
        assert_eq!(readable(b"/bin/sh\0-c\0a\nb\0"), "/bin/sh -c a b");
    }

    #[test]
    fn this_process_is_listed() {
        let tasks = list().unwrap();
        let own = tasks.processes.iter().find(|task| task.pid == std::process::id()).unwrap();
        assert!(own.rss > 0 && own.threads > 0 && own.command.contains("envd"), "{own:?}");
        assert!(!is_of_kernel(std::process::id()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            Stat::parse(&bytes);
            prop_assert!(!readable(&bytes).contains(char::is_control));
        }

        #[test]
        fn damage_is_noticed_or_harmless(cut in 0..STAT.len(), byte in any::<u8>()) {
            let mut text = STAT.as_bytes().to_vec();
            text[cut] = byte;
            Stat::parse(&text);
            let needed = STAT.find(" 250").unwrap() + 2;
            prop_assert_eq!(Stat::parse(&STAT.as_bytes()[..cut]).is_some(), cut >= needed);
        }
    }
}
