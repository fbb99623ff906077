//! The limits of control groups, as they are written for machines: processes, time of the processors, writes to disks.
//! That of memory has its test beside the code.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use wrenn_host_linux::{
    cgroup::{Controller, Group, Hierarchy},
    disk::Disk,
    process::{Exit, Spawn},
};

use crate::{in_lab, unique};

/// How long anything may take before a test gives up.
const BOUND: Duration = Duration::from_secs(120);

/// An owner with one group.
struct Limited {
    hierarchy: Hierarchy,
    group: Group,
    directory: PathBuf,
}

impl Limited {
    fn new(name: &str, limits: &[(Controller, &str, String)]) -> Self {
        let owner = unique(name);
        let hierarchy = Hierarchy::open(&owner).unwrap();
        let group = hierarchy.create("one", limits).unwrap();
        Self { hierarchy, group, directory: format!("/sys/fs/cgroup/wrenn/{owner}/one").into() }
    }

    /// Starts a shell in it.
    fn shell(&self, script: &str) -> wrenn_host_linux::process::Child {
        let spawn = Spawn::new("sh").args(["-c", script]);
        spawn.control_group(self.group.entrance().unwrap()).start().unwrap()
    }

    /// A number of one of its files, by the word before it.
    fn number(&self, file: &str, word: &str) -> u64 {
        let text = fs::read_to_string(self.directory.join(file)).unwrap();
        let value = text.split_whitespace().skip_while(|found| *found != word).nth(1);
        value.unwrap_or_else(|| panic!("no {word} in {text}")).parse().unwrap()
    }

    fn end(self) {
        self.group.remove().unwrap();
        self.hierarchy.close();
    }
}

#[test]
fn every_controller_can_be_had() {
    if !in_lab() {
        return;
    }
    let owner = unique("all");
    let hierarchy = Hierarchy::open(&owner).unwrap();
    assert!(hierarchy.controllers().iter().eq(Controller::ALL.iter()), "{:?}", hierarchy.controllers());
    hierarchy.close();
}

#[tokio::test]
async fn there_are_no_more_processes_than_may_be() {
    if !in_lab() {
        return;
    }
    let limited = Limited::new("pids", &[(Controller::Pids, "pids.max", "3".to_owned())]);
    // The shell itself is one.
    let mut child = limited.shell("sleep 0.1 & sleep 0.1 & sleep 0.1 & wait");
    assert_ne!(child.wait().await.unwrap(), Exit::Code(0));
    assert!(limited.number("pids.events", "max") >= 1);
    // Those that were started are none of ours, and end by themselves.
    let end = Instant::now() + BOUND;
    while !limited.group.processes().unwrap().is_empty() {
        assert!(Instant::now() < end, "somebody stays in it");
        tokio::task::yield_now().await;
    }
    limited.end();
}

#[tokio::test]
async fn what_is_still_in_a_group_ends_with_it() {
    if !in_lab() {
        return;
    }
    let limited = Limited::new("end", &[]);
    let mut child = limited.shell("sleep 1000 & wait");
    assert!(limited.group.remove().is_err(), "somebody is in it");
    limited.group.end(BOUND).unwrap();
    assert!(!limited.directory.exists());
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    limited.group.end(BOUND).unwrap();
    limited.end();
}

#[tokio::test]
async fn nobody_has_more_time_of_the_processors_than_it_may() {
    if !in_lab() {
        return;
    }
    let limited = Limited::new("cpu", &[(Controller::Cpu, "cpu.max", "10000 100000".to_owned())]);
    let begin = Instant::now();
    let mut child = limited.shell("while :; do :; done");
    let end = begin + BOUND;
    while limited.number("cpu.stat", "nr_throttled") < 10 {
        assert!(Instant::now() < end, "nothing holds it back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let used = Duration::from_micros(limited.number("cpu.stat", "usage_usec"));
    // A tenth, and a generous piece more for the periods that are not whole.
    assert!(used < begin.elapsed() / 5, "{used:?} of {:?}", begin.elapsed());
    child.kill().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    limited.end();
}

#[tokio::test]
async fn nobody_writes_faster_than_it_may() {
    if !in_lab() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::of(directory.path()).unwrap().unwrap();
    let bound = format!("{disk} wbps=1048576");
    let limited = Limited::new("io", &[(Controller::Io, "io.max", bound)]);
    let file = directory.path().join("file");
    let begin = Instant::now();
    let mut child =
        limited.shell(&format!("dd if=/dev/zero of={} bs=512k count=8 oflag=direct 2>&1", file.display()));
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    // Four MiB, of which the kernel lets the first pass ahead of its time.
    assert!(begin.elapsed() > Duration::from_secs(2), "{:?}", begin.elapsed());
    let counted = fs::read_to_string(limited.directory.join("io.stat")).unwrap();
    let line = counted.lines().find(|line| line.starts_with(&format!("{disk} "))).unwrap();
    let written = line.split(' ').find_map(|word| word.strip_prefix("wbytes=")).unwrap();
    assert!(written.parse::<u64>().unwrap() >= 4 << 20, "{counted}");
    limited.end();
}
