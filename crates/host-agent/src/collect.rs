//! What an agent that was killed left behind, ended by the next one: machines first, then what they used.
//!
//! Only what is this instance's own is touched. A machine is known by the mark in its command line, a
//! namespace by the owner in its slot's file, a directory by being in this instance's.

use std::{io, time::Duration};

use camino::Utf8Path;
use tokio::time::timeout;
use wrenn_host_linux::process::find_by_argument;
use wrenn_types::{InstanceId, SandboxId};

use crate::{
    network::{self, SlotError, Uplink},
    sandbox::{
        bring_up::Host,
        record::{self, RecordError},
    },
};

/// How long a killed process may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// Something that was left could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The machines could not be found or ended.
    #[error("could not end the machines that were left")]
    Machines(#[source] io::Error),
    /// The namespaces could not be removed.
    #[error("could not remove the network slots that were left")]
    Network(#[source] SlotError),
    /// The records could not be read or removed.
    #[error("could not remove what was left of a sandbox")]
    Record(#[source] RecordError),
    /// The sockets could not be removed.
    #[error("could not clear the machines' directory")]
    RunDir(#[source] io::Error),
}

/// What was collected.
#[derive(Debug, Default)]
pub struct Collected {
    /// Processes that were ended.
    pub machines: usize,
    /// Sandboxes whose directory was removed.
    pub sandboxes: Vec<SandboxId>,
}

/// Ends and removes what an earlier agent of this instance left.
///
/// # Errors
/// The first thing that could not be removed: an agent must not start then, because it could give away
/// what is still in use.
pub async fn collect(
    instance: &InstanceId,
    sandboxes_dir: &Utf8Path,
    machines_dir: &Utf8Path,
    uplink: &Uplink,
) -> Result<Collected, CollectError> {
    let machines = end_machines(instance).await.map_err(CollectError::Machines)?;
    network::collect(instance, uplink).await.map_err(CollectError::Network)?;
    let mut collected = Collected { machines, ..Collected::default() };
    for left in record::left_behind(sandboxes_dir).map_err(CollectError::Record)? {
        let name = left.dir.path().file_name().and_then(|name| name.parse().ok());
        left.dir.remove().map_err(CollectError::Record)?;
        collected.sandboxes.extend(name);
    }
    for entry in machines_dir.read_dir_utf8().map_err(CollectError::RunDir)? {
        let entry = entry.map_err(CollectError::RunDir)?;
        std::fs::remove_dir_all(entry.path()).map_err(CollectError::RunDir)?;
    }
    Ok(collected)
}

/// Kills the machines of this instance and waits until each is gone.
async fn end_machines(instance: &InstanceId) -> io::Result<usize> {
    let found = find_by_argument(&format!("guest={}", Host::machine_mark(instance)))?;
    for machine in &found {
        timeout(KILL_BOUND, machine.process.kill_and_wait()).await??;
    }
    Ok(found.len())
}
