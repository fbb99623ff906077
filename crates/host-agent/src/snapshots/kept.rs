//! What is recorded of a snapshot, and a snapshot that can be used.

use std::{collections::BTreeMap, fs, io};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wrenn_types::{AccessToken, DiskMib, LayerId, NetworkPolicy, SandboxId, Shape, SnapshotId, TemplateName};
use wrenn_vmm::{DiskFormat, VmmIdentity};

use super::{BaseKey, SnapshotsResult};
use crate::snapshot_store::{
    Damage, FileRecord, LARGEST_STATE, SnapshotStoreError, check_digest, check_size, digest, manifest,
};

/// How much of a sandbox is saved. A manifest says whether there is memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub enum Extent {
    /// Memory, devices and disk: the guest goes on where it was, with the VMM and the bundle that saved it.
    Machine,
    /// The disk: the guest boots, with whatever VMM and bundle the host has then.
    Disk,
}

impl From<bool> for Extent {
    fn from(has_memory: bool) -> Self {
        if has_memory { Self::Machine } else { Self::Disk }
    }
}

impl From<Extent> for bool {
    fn from(extent: Extent) -> Self {
        extent == Extent::Machine
    }
}

/// What a snapshot is of. All of it is in the manifest, which only its owner may read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The sandbox that was saved.
    pub sandbox: SandboxId,
    /// The template that it was created from.
    pub template: TemplateName,
    /// What its memory differs from, and what is below its lowest layer.
    pub base: BaseKey,
    /// The chain of its disks, the top one first, each once. Empty where the base's disk is the whole disk.
    pub layers: Vec<LayerId>,
    /// Format of those.
    pub disk_format: DiskFormat,
    /// Size of the disk as the guest sees it.
    pub disk: DiskMib,
    /// CPUs and memory.
    pub shape: Shape,
    /// The program that saved it.
    pub vmm: VmmIdentity,
    /// Id of the bundle of kernel and initramfs.
    pub guest: String,
    /// How much of it is saved.
    #[serde(rename = "has_memory")]
    pub extent: Extent,
    /// Whether the guest stood still when it was saved. Else it may be resumed, and not forked or kept.
    pub prepared: bool,
    /// What the guest asks of every caller.
    #[serde(with = "wrenn_types::secret::stored")]
    pub access_token: AccessToken,
    /// The user of its processes.
    pub default_user: String,
    /// The directory of its processes.
    pub default_workdir: String,
    /// The environment of its processes.
    pub environment: BTreeMap<String, String>,
    /// What it may reach.
    pub network: NetworkPolicy,
    /// When it was saved.
    pub created_at: Timestamp,
}

/// A snapshot whose manifest and device state are what they were when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its id.
    pub id: SnapshotId,
    /// What it is of.
    pub about: About,
    /// The directory that holds all of it but layers and base.
    pub dir: Utf8PathBuf,
    /// The devices. There is no such file where there is no memory.
    pub(super) state: Utf8PathBuf,
    /// What differs from the base's memory. There is no such file where there is no memory.
    pub(super) pages: Utf8PathBuf,
    /// Size of `state` in bytes; 0 where there is none.
    pub state_bytes: u64,
    /// Size of `pages` in bytes; 0 where there is none.
    pub pages_bytes: u64,
}

/// The files of a snapshot that has memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptMemory<'a> {
    /// The devices.
    pub state: &'a Utf8Path,
    /// What differs from the base's memory.
    pub pages: &'a Utf8Path,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) id: SnapshotId,
    pub(super) about: About,
    /// Apparent sizes of the layers, in their order.
    pub(super) layer_bytes: Vec<u64>,
    /// There unless it is of the disk only.
    pub(super) memory: Option<MemoryRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemoryRecord {
    /// The devices; a plain SHA-256.
    pub(super) state: FileRecord,
    /// The pages; a plain SHA-256.
    pub(super) pages: FileRecord,
}

impl Manifest {
    /// Refuses a manifest that lies in the directory of another snapshot.
    pub(super) fn check_id(&self, id: &SnapshotId, path: &Utf8Path) -> SnapshotsResult<()> {
        manifest::refuse_difference(
            path,
            [
                ("id", self.id.to_string(), id.to_string()),
                ("number of layers", self.layer_bytes.len().to_string(), self.about.layers.len().to_string()),
                ("kind", self.memory.is_some().to_string(), bool::from(self.about.extent).to_string()),
            ],
        )
    }
}

impl Kept {
    /// The snapshot in `dir`, as it is recorded.
    pub(super) fn new(id: SnapshotId, dir: Utf8PathBuf, manifest: &Manifest) -> Self {
        let memory = manifest.memory.as_ref();
        Self {
            id,
            about: manifest.about.clone(),
            state: state_path(&dir),
            pages: pages_path(&dir),
            dir,
            state_bytes: memory.map_or(0, |it| it.state.bytes),
            pages_bytes: memory.map_or(0, |it| it.pages.bytes),
        }
    }

    /// Memory and devices, if they were saved.
    #[must_use]
    pub fn memory(&self) -> Option<KeptMemory<'_>> {
        match self.about.extent {
            Extent::Machine => Some(KeptMemory { state: &self.state, pages: &self.pages }),
            Extent::Disk => None,
        }
    }

    /// Refuses a snapshot that another program saved than the one that would restore it. A disk is what any
    /// program can boot from.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Mismatch`] names the first that differs: guest bundle, VMM, its version, machine,
    /// CPU model or accelerator.
    pub fn check(&self, vmm: &VmmIdentity, guest: &str) -> SnapshotsResult<()> {
        if self.about.extent == Extent::Disk {
            return Ok(());
        }
        let path = self.dir.join(manifest::FILE_NAME);
        manifest::refuse_other_program((&self.about.vmm, &self.about.guest), (vmm, guest), &path)
    }
}

pub(super) fn state_path(dir: &Utf8Path) -> Utf8PathBuf {
    dir.join("state")
}

pub(super) fn pages_path(dir: &Utf8Path) -> Utf8PathBuf {
    dir.join("pages")
}

/// Reads the device state against what is recorded of it.
pub(super) fn check_state(path: &Utf8Path, recorded: &FileRecord) -> SnapshotsResult<()> {
    check_size(path, recorded.bytes)?;
    check_digest(path, &recorded.digest, &digest::of_small_file(path, LARGEST_STATE)?)
}

/// Refuses a layer that is not there or has lost its end. A VMM may add to a file when it closes it, after
/// the snapshot of it was made.
pub(super) fn check_not_cut(path: &Utf8Path, recorded: u64) -> SnapshotsResult<()> {
    let damage = match fs::metadata(path) {
        Ok(metadata) if metadata.len() >= recorded => return Ok(()),
        Ok(metadata) => Damage::Size { recorded, found: metadata.len() },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Damage::Missing,
        Err(source) => return Err(SnapshotStoreError::file("examine", path, source)),
    };
    Err(SnapshotStoreError::Damaged { path: path.to_owned(), damage })
}
