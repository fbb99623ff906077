//! What a test sees of processes and of the agent from outside, and how long it goes on.

use std::{fs, time::Duration};

use super::PATIENCE;

/// How often to look for what nothing announces.
const LOOK: Duration = Duration::from_millis(5);

/// The full count of a long test, or its sample.
pub(crate) fn rounds(sample: usize, full: usize) -> usize {
    if std::env::var_os("WRENN_SOAK").is_some() { full } else { sample }
}

/// Says that a long test did its full count.
#[allow(clippy::print_stdout, reason = "that is how a long test reports")]
pub(crate) fn soaked(what: &str, count: usize, outcome: &str) {
    if std::env::var_os("WRENN_SOAK").is_some() {
        println!("soak: {what}, {count}, no seed, {outcome}");
    }
}

/// How many ended children of `parent` nobody has waited for.
pub(crate) fn zombies(parent: u32) -> usize {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    children.split_whitespace().filter(|pid| is_state(pid, 'Z')).count()
}

pub(crate) fn is_state(pid: &str, state: char) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(state))
}

pub(crate) fn runs(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap() && !is_state(&pid.to_string(), 'Z')
}

/// Waits until something is so.
pub(crate) async fn eventually(mut so: impl FnMut() -> bool) {
    let wait = async {
        let mut look = tokio::time::interval(LOOK);
        while !so() {
            look.tick().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it became so in time");
}

/// Waits until a process that is no child of ours is gone.
pub(crate) async fn gone(pid: u32) {
    eventually(|| !runs(pid)).await;
}

/// A number of a file of /proc whose lines are `name: number`.
fn number(pid: u32, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The most memory that a process has had, in bytes.
pub(crate) fn peak_memory(pid: u32) -> u64 {
    number(pid, "status", "VmHWM") * 1024
}

/// How many bytes a process has written.
pub(crate) fn written(pid: u32) -> u64 {
    number(pid, "io", "wchar")
}

/// Whether a process waits for room in a pipe.
pub(crate) fn waits_for_room(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place.contains("pipe_write"))
}

/// How many sockets a process has.
pub(crate) fn sockets(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}
