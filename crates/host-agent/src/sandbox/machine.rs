//! A machine and what goes with it, and how it ends.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use wrenn_host_linux::process::find_by_argument;
use wrenn_types::{LayerId, SandboxId};
use wrenn_vmm::{ExitReason, Vm, VmmError, VmmIdentity};

use super::host::Host;
use crate::network::{GuestConnector, Slot};

/// What a snapshot of a machine can be restored with: what the machine was made with. The agent may have been
/// replaced since, and the VMM and the guest bundle with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maker {
    /// The program that runs it.
    pub vmm: VmmIdentity,
    /// Id of the bundle of kernel and initramfs that runs in it.
    pub guest: String,
}

/// A machine and what goes with it.
#[derive(Debug)]
pub struct Machine {
    /// Whose it is.
    pub id: SandboxId,
    /// The layer on which it was started.
    pub name: LayerId,
    /// The VMM.
    pub vm: Box<dyn Vm>,
    /// Its network.
    pub slot: Slot,
    /// The directory of its sockets.
    pub run_dir: Utf8PathBuf,
    /// What it was made with.
    pub maker: Maker,
    /// What its memory differs from.
    pub base_memory: Utf8PathBuf,
    /// What the layers of its disk stand on.
    pub base_disk: Utf8PathBuf,
}

/// Waits until a machine is gone, and answers why.
pub async fn gone(exit: &mut watch::Receiver<Option<ExitReason>>) -> ExitReason {
    match exit.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or(ExitReason::Stopped),
        // The driver dropped the channel with no reason: its process cannot be there any more.
        Err(_) => ExitReason::Stopped,
    }
}

impl Machine {
    /// How connections to the guest are made.
    #[must_use]
    pub fn connector(&self) -> GuestConnector {
        self.slot.connector()
    }

    /// Ends it and releases what only it used. Its layers stay.
    ///
    /// # Errors
    /// The process is stuck in the kernel: then everything that it may still use is left as it is, and collected
    /// at the next start.
    pub async fn end(mut self, host: &Host) -> Result<(), VmmError> {
        if let Err(error) = self.vm.stop().await {
            // Given back, the namespace would be dismantled under the process that is in it.
            self.slot.leave();
            // This one goes when the process does, which may be writing to it what its guest wrote last.
            host.close_disk(&self.name).await;
            return Err(error);
        }
        drop(self.vm);
        remove_run_dir(&self.run_dir);
        host.limits.end(&self.id, &self.name).await;
        host.close_disk(&self.name).await;
        host.slots.release(self.slot).await;
        Ok(())
    }

    /// Lets go of it as it is: it goes on, and the next agent adopts it.
    pub async fn release(self) {
        self.vm.release().await;
        self.slot.leave();
    }
}

/// Kills the machines whose names begin with `mark`, but those that `keeps` names, and waits until each is gone; how many
/// there were. Nobody controls them.
///
/// # Errors
/// Processes cannot be looked for, or one is stuck in the kernel: those after it may live.
pub(crate) async fn end_marked(mark: &str, mut keeps: impl FnMut(&str) -> bool) -> io::Result<usize> {
    let mut ended = 0;
    for machine in find_by_argument(&format!("guest={mark}"))? {
        let name = machine.argument.strip_prefix("guest=").unwrap_or(&machine.argument);
        let name = name.split(',').next().unwrap_or(name);
        if !keeps(name) {
            machine.process.kill_and_wait().await?;
            ended += 1;
        }
    }
    Ok(ended)
}

/// Removes the directory of a machine's sockets; what cannot be removed is collected at the next start.
pub(crate) fn remove_run_dir(path: &Utf8Path) {
    if let Err(error) = std::fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%path, error = &error as &dyn std::error::Error, "the machine's directory stays until the next start");
    }
}
