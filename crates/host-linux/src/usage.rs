//! What a process has used of its host, and what has gone through the links of a network namespace, as the kernel
//! counts it. Each look is a read of one small file of `/proc` or two: cheap enough for every process, twice a second.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _},
};

use rustix::param::{clock_ticks_per_second, page_size};

use crate::netns::NetworkNamespace;

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// When it was started, in ticks since the start of the host: with its number it names a process for good.
    pub started: u64,
    /// Microseconds that its threads had a CPU, in steps of a tick (mostly 10 ms).
    pub cpu_micros: u64,
    /// Memory that no file stands behind, and so is in no other process: of a machine that maps its memory
    /// privately, the pages that it has written, and what the VMM needs itself. Swapped pages are not in it.
    pub private_bytes: u64,
}

/// What a process has used until now.
///
/// # Errors
/// It has ended, or the kernel says something else than it should.
pub fn of_process(pid: u32) -> io::Result<Usage> {
    let mut text = String::with_capacity(512);
    File::open(format!("/proc/{pid}/stat"))?.read_to_string(&mut text)?;
    let (started, ticks) = parse_stat(&text).ok_or_else(|| malformed("stat"))?;
    text.clear();
    File::open(format!("/proc/{pid}/statm"))?.read_to_string(&mut text)?;
    let pages = parse_statm(&text).ok_or_else(|| malformed("statm"))?;
    let micros_per_tick = 1_000_000 / clock_ticks_per_second().max(1);
    Ok(Usage {
        started,
        cpu_micros: ticks.saturating_mul(micros_per_tick),
        private_bytes: pages.saturating_mul(page_size() as u64),
    })
}

fn malformed(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's {file} of a process cannot be read"))
}

/// The start time, and the ticks in user and kernel mode. The name may hold anything, parentheses too, so what counts
/// is the last one.
fn parse_stat(text: &str) -> Option<(u64, u64)> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    let started = fields.nth(6)?.parse().ok()?;
    Some((started, user.checked_add(kernel)?))
}

/// Resident pages that are no file's.
fn parse_statm(text: &str) -> Option<u64> {
    let mut fields = text.split_ascii_whitespace();
    let resident: u64 = fields.nth(1)?.parse().ok()?;
    let of_files = fields.next()?.parse().ok()?;
    Some(resident.saturating_sub(of_files))
}

/// What has gone through a link, as its own side counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkBytes {
    /// Bytes that came in.
    pub received: u64,
    /// Bytes that went out.
    pub sent: u64,
}

/// The counters of all links of one namespace, in one read.
#[derive(Debug)]
pub struct Links {
    /// Opened by a thread in the namespace: it is of that namespace for good.
    file: File,
}

impl Links {
    /// The links of a namespace.
    ///
    /// # Errors
    /// `/proc` is not there, or the namespace could not be entered.
    pub async fn of(namespace: &NetworkNamespace) -> io::Result<Self> {
        let opened = namespace.run(|| File::open("/proc/thread-self/net/dev")).await?;
        Ok(Self { file: opened? })
    }

    /// The links whose names begin with `prefix`, by what follows it. One that appears or goes meanwhile may be
    /// missing.
    ///
    /// # Errors
    /// The kernel's list could not be read.
    pub fn bytes(&mut self, prefix: &str) -> io::Result<HashMap<String, LinkBytes>> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(parse_links(&text, prefix))
    }
}

fn parse_links(text: &str, prefix: &str) -> HashMap<String, LinkBytes> {
    let link = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let rest = name.trim().strip_prefix(prefix)?.to_owned();
        let mut counters = counters.split_ascii_whitespace();
        let received = counters.next()?.parse().ok()?;
        let sent = counters.nth(7)?.parse().ok()?;
        Some((rest, LinkBytes { received, sent }))
    };
    text.lines().filter_map(link).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_move_the_fields() {
        let text = "77 (a) b (c)) S 1 77 77 0 -1 4194560 100 0 0 0 12 30 0 0 20 0 3 0 98765 100 200 1";
        assert_eq!(parse_stat(text), Some((98_765, 42)));
        for bad in
            ["", "77 (a", "77 (a) S 1 2", "77 (a) S 1 77 77 0 -1 4194560 100 0 0 0 x 30 0 0 20 0 3 0 9 1"]
        {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn memory_of_files_is_nobodys_own() {
        assert_eq!(parse_statm("1000 300 120 5 0 200 0\n"), Some(180));
        assert_eq!(parse_statm("1000 300 400 5 0 200 0\n"), Some(0));
        assert_eq!(parse_statm("1000 300"), None);
    }

    #[test]
    fn links_of_others_are_left_out() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n    \
             lo:  500 1 0 0 0 0 0 0 500 1 0 0 0 0 0 0\n\
             wrenn-v-7: 1500 10 0 0 0 0 0 0 2500 9 0 0 0 0 0 0\n\
             wrenn-v-8:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\nwrenn-v-9: x\n";
        let found = parse_links(text, "wrenn-v-");
        let expected = [("7", 1500, 2500), ("8", 1, 9)];
        let expected = expected.map(|(name, received, sent)| (name.to_owned(), LinkBytes { received, sent }));
        assert_eq!(found, HashMap::from(expected));
    }

    #[test]
    fn this_process_uses_more_and_more() {
        let before = of_process(std::process::id()).unwrap();
        let filled = std::hint::black_box(vec![1_u8; 32 << 20]);
        let mut after = of_process(std::process::id()).unwrap();
        assert!(after.private_bytes >= 32 << 20, "{after:?}, {} bytes filled", filled.len());
        assert_eq!(after.started, before.started);
        // A tick passes at the latest when the processor was ours for one.
        while after.cpu_micros == before.cpu_micros {
            std::hint::black_box((0..1_000_000_u64).sum::<u64>());
            after = of_process(std::process::id()).unwrap();
        }
        assert!(after.cpu_micros > before.cpu_micros);
    }

    #[test]
    fn a_process_that_is_not_there_has_no_usage() {
        // Above the largest number that the kernel gives.
        assert_eq!(of_process(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn the_links_of_a_namespace_are_read_again_and_again() {
        let mut links = Links::of(&NetworkNamespace::current().unwrap()).await.unwrap();
        for _ in 0..3 {
            assert!(links.bytes("").unwrap().contains_key("lo"));
        }
    }
}
