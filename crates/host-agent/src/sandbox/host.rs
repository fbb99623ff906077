//! What every sandbox on this host is made with.

use std::{net::Ipv4Addr, sync::Arc};

use camino::Utf8PathBuf;
use jiff::Timestamp;
use tokio::sync::Notify;
use wrenn_types::{DiskMib, InstanceId, LayerId, SandboxId};
use wrenn_vmm::{DiskFormat, DiskSpec, Vmm};

use super::{
    bounds,
    machine::Maker,
    record,
    within::{Overdue, within},
};
use crate::{
    images::Images,
    limits::Limits,
    metrics::{Metrics, operations::Operations},
    network::SlotPool,
    rootfs::{RootfsResult, RootfsStore},
    scrub::Scrub,
    snapshots::{Kept, Snapshots},
    users::Users,
    warm::{Warm, blocking},
};

/// What every sandbox on this host is made with. Shared; what is in it does not change
/// after the start, but what is counted.
#[derive(Debug)]
pub struct Host {
    /// Whose processes, namespaces and files these are.
    pub instance: InstanceId,
    /// The driver.
    pub vmm: Arc<dyn Vmm>,
    /// Guest bundle and templates.
    pub images: Images,
    /// Root disks.
    pub disks: Arc<dyn RootfsStore>,
    /// Network slots.
    pub slots: SlotPool,
    /// Template snapshots.
    pub warm: Warm,
    /// Snapshots of sandboxes, and the layers of all disks.
    pub snapshots: Snapshots,
    /// The parent of the sandboxes' directories.
    pub sandboxes_dir: Utf8PathBuf,
    /// The parent of the machines' short-pathed directories.
    pub machines_dir: Utf8PathBuf,
    /// The name servers of guests.
    pub dns_servers: Vec<Ipv4Addr>,
    /// The size of a root disk when nobody says.
    pub default_disk: DiskMib,
    /// Which time it is, by the clock that deadlines are told by.
    pub now: fn() -> Timestamp,
    /// Told when something may have become unreachable.
    pub unreachable: Arc<Notify>,
    /// How many creates, pauses, … there were.
    pub operations: Operations,
    /// What sandboxes use.
    pub metrics: Metrics,
    /// What each machine may have of the host.
    pub limits: Limits,
    /// Whose rights each machine has.
    pub users: Users,
    /// Has the digests of layers made, and counts what is found damaged.
    pub scrub: Arc<Scrub>,
}

impl Host {
    /// The mark in the command line of every VMM of this instance.
    #[must_use]
    pub fn machine_mark(instance: &InstanceId) -> String {
        format!("wrenn-{instance}-")
    }

    /// The name of a sandbox's machine in the command line of its VMM.
    #[must_use]
    pub fn machine_name(instance: &InstanceId, id: &SandboxId, name: &LayerId) -> String {
        format!("{}{id}-{name}", Self::machine_mark(instance))
    }

    /// With what a machine is made that is made now.
    #[must_use]
    pub fn maker(&self) -> Maker {
        Maker { vmm: self.vmm.identity().clone(), guest: self.images.guest().bundle.id.clone() }
    }

    /// The short-pathed directory of a machine.
    #[must_use]
    pub fn run_dir(&self, name: &LayerId) -> Utf8PathBuf {
        self.machines_dir.join(name.as_str())
    }

    /// Whether a disk stands on the layer that it was cloned from. Else it is a copy of that, and whole beside the base.
    #[must_use]
    pub fn has_layers(&self) -> bool {
        match self.disks.format() {
            DiskFormat::Qcow2 => true,
            DiskFormat::Raw | DiskFormat::DmSnapshot => false,
        }
    }

    /// How many bytes are copied for a clone of a disk; nothing where the clone stands on it. Asks the disk.
    pub(super) fn copied_by_clone(&self, disk: &DiskSpec) -> u64 {
        // One that is not there is no long copy.
        if self.has_layers() { 0 } else { self.disks.used_bytes(&disk.path).unwrap_or_default() }
    }

    /// What the layers of a sandbox's disk take of the host's, if it is there.
    #[must_use]
    pub fn disk_used_bytes(&self, id: &SandboxId) -> Option<u64> {
        self.bytes_of_layers(&record::read(&self.sandboxes_dir, id)?.layers)
    }

    /// What layers take of the host's disk, if they are all there.
    #[must_use]
    pub fn bytes_of_layers(&self, layers: &[LayerId]) -> Option<u64> {
        let sizes = layers.iter().map(|layer| self.disks.used_bytes(&self.snapshots.layer_path(layer)));
        sizes.sum::<Result<u64, _>>().ok()
    }

    /// What a snapshot takes of the host's disk; nothing where that cannot be had.
    pub async fn snapshot_bytes(&self, kept: &Kept) -> u64 {
        let (snapshots, kept) = (self.snapshots.clone(), kept.clone());
        let bytes = within(bounds::LOOK, move || snapshots.own_bytes(&kept)).await;
        bytes.map(Result::unwrap_or_default).unwrap_or_default()
    }

    /// Makes the open disk of a machine larger, before the machine is told.
    pub(super) async fn grow_disk(&self, layer: &LayerId, size: DiskMib) -> RootfsResult<()> {
        let (disks, disk) = (Arc::clone(&self.disks), self.layer(layer));
        blocking(move || disks.grow(&disk, size)).await
    }

    /// Has all that a machine that stands still has written to its disk written to its top layer.
    pub(super) async fn settle_disk(&self, layer: &LayerId) -> RootfsResult<()> {
        let (disks, disk) = (Arc::clone(&self.disks), self.layer(layer));
        blocking(move || disks.settle(&disk)).await
    }

    /// Closes the disk of a machine that is gone. One that cannot be closed is closed by the next agent.
    pub(super) async fn close_disk(&self, layer: &LayerId) {
        let (disks, path) = (Arc::clone(&self.disks), self.snapshots.layer_path(layer));
        match within(bounds::REMOVE, move || disks.close(&path)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%layer, error = &error as &dyn std::error::Error, "a disk stays open until the next start");
            }
            Err(Overdue(bound)) => {
                tracing::warn!(%layer, ?bound, "a disk is open for now: to close it takes long")
            }
        }
    }

    /// Has layers and bases that nothing stands on collected in a moment.
    pub fn collect_soon(&self) {
        self.unreachable.notify_one();
    }

    /// Removes a layer that nothing stands on and no machine writes to. One that cannot be removed is found by the next
    /// collection, and one that takes long goes a moment later.
    pub(super) async fn remove_layer(&self, layer: &LayerId) {
        let (disks, path) = (Arc::clone(&self.disks), self.snapshots.layer_path(layer));
        match within(bounds::REMOVE, move || disks.remove(&path)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%layer, error = &error as &dyn std::error::Error, "a layer stays until the next collection");
            }
            Err(Overdue(bound)) => {
                tracing::warn!(%layer, ?bound, "a layer stays for now: its removal takes long");
            }
        }
    }

    /// A layer, as a disk of this host's format.
    #[must_use]
    pub fn layer(&self, layer: &LayerId) -> DiskSpec {
        DiskSpec { path: self.snapshots.layer_path(layer), format: self.disks.format() }
    }
}
