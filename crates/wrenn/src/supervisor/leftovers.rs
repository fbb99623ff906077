//! What an earlier run of the same directory left, and how it is collected.
//!
//! A supervisor that is killed cannot stop its children.
//! They ask the kernel for a signal at its end and stop by themselves, each in its own time;
//! the next supervisor finds them in `children.json`, waits for them, and in the end makes them stop.
//! An id in that file counts only together with its start time, so no other process is ever meant.

use std::{collections::BTreeMap, fs, io, time::Duration};

use camino::Utf8PathBuf;
use rustix::process::Signal;

use super::{
    Role,
    files::{self, PRIVATE},
    identity::ProcessIdentity,
};

/// How long children may take that were told to stop by the end of their supervisor.
/// The host agent destroys its sandboxes in this time.
const LEAVE_BOUND: Duration = Duration::from_secs(30);

/// The running children of a stack, in memory and on disk.
#[derive(Debug)]
pub(super) struct Children {
    path: Utf8PathBuf,
    running: BTreeMap<Role, ProcessIdentity>,
}

impl Children {
    pub(super) fn new(path: Utf8PathBuf) -> Self {
        Self { path, running: BTreeMap::new() }
    }

    /// Notes that a child runs, or that it does not any more.
    pub(super) fn record(&mut self, role: Role, process: Option<ProcessIdentity>) -> io::Result<()> {
        match process {
            Some(process) => self.running.insert(role, process),
            None => self.running.remove(&role),
        };
        let text = serde_json::to_vec(&self.running)?;
        files::write_atomically(&self.path, PRIVATE, &text)
    }

    /// Waits for the children of an earlier run, and makes them stop if they do not.
    pub(super) async fn collect(&self) -> io::Result<()> {
        let left: BTreeMap<Role, ProcessIdentity> = match fs::read(&self.path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let deadline = tokio::time::Instant::now() + LEAVE_BOUND;
        // The database goes last: the control plane may still be writing. Its cluster ends it with its own care.
        for (role, process) in left.into_iter().rev().filter(|(role, _)| *role != Role::Postgres) {
            if !process.is_alive() {
                continue;
            }
            tracing::info!(%role, pid = process.pid, "waiting for a process of an earlier run");
            process.signal(Signal::TERM)?;
            if process.wait_gone(deadline.saturating_duration_since(tokio::time::Instant::now())).await? {
                continue;
            }
            tracing::warn!(%role, pid = process.pid, "killing a process of an earlier run that does not stop");
            process.signal(Signal::KILL)?;
            if !process.wait_gone(Duration::from_secs(5)).await? {
                return Err(io::Error::other(format!(
                    "process {} of an earlier run does not end",
                    process.pid
                )));
            }
        }
        files::remove_if_there(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_left_child_is_stopped_and_a_stranger_is_not() {
        let guard = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(guard.path().join("children.json")).unwrap();
        let start = || tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
        let identity = |child: &tokio::process::Child| {
            ProcessIdentity::of(i32::try_from(child.id().unwrap()).unwrap()).unwrap()
        };
        let (mut left, mut stranger) = (start(), start());
        let mut children = Children::new(path.clone());
        children.record(Role::Agent, Some(identity(&left))).unwrap();
        let reused = identity(&stranger);
        let reused = ProcessIdentity { start_time: reused.start_time.wrapping_sub(1), ..reused };
        children.record(Role::ControlPlane, Some(reused)).unwrap();

        Children::new(path.clone()).collect().await.unwrap();
        left.wait().await.unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        assert!(!path.exists());
        Children::new(path).collect().await.unwrap();
    }
}
