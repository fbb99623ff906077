//! What there is to look after: every snapshot, every base, and every layer that has a digest or may get one.

use std::{collections::BTreeSet, fmt};

use wrenn_types::{LayerId, SnapshotId};

use super::{BaseKey, Snapshots, SnapshotsResult, VERIFIED, entries};
use crate::snapshot_store::{
    Damage, SnapshotStoreError, manifest,
    verified::{Content, Form, Verifying},
};

pub use crate::snapshot_store::verified::Progress;

/// Something whose files can be read against what is recorded of them. Its text is a name of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Manifest, state and pages of a snapshot.
    Snapshot(SnapshotId),
    /// Manifest, memory and disk of a base.
    Base(BaseKey),
    /// A layer that has a digest.
    Layer(LayerId),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(id) => id.fmt(f),
            Self::Base(key) => key.fmt(f),
            Self::Layer(layer) => layer.fmt(f),
        }
    }
}

/// What is to be read of a part.
#[derive(Debug)]
pub enum Look {
    /// It is not there any more.
    Nothing,
    /// It is as it was made, and has no large files.
    Small,
    /// Its large files, which were not read yet.
    Contents(Box<Reading>),
}

/// Large files that are read a piece at a time, against what is recorded of them.
#[derive(Debug)]
pub struct Reading(Verifying);

impl Reading {
    /// Reads about so many bytes more. Blocks on the disk for as long as that takes.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`] names the file; whoever uses it is told so without reading from now on.
    pub fn read(&mut self, at_most: u64) -> SnapshotsResult<Progress> {
        self.0.read(at_most)
    }
}

impl Snapshots {
    /// Everything that has digests, and that is in nobody's making.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn parts(&self) -> SnapshotsResult<Vec<Part>> {
        let mut parts: Vec<Part> = self.ids()?.into_iter().map(Part::Snapshot).collect();
        let bases = entries(&self.inner.bases)?;
        parts.extend(bases.iter().filter_map(|entry| entry.file_name().parse().ok()).map(Part::Base));
        parts.extend(self.layers_with_digest()?.into_iter().map(Part::Layer));
        Ok(parts)
    }

    /// The layers that manifests or `others` name and that have no digest. Those of a manifest that cannot be read are
    /// not among them.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn layers_without_digest(&self, others: BTreeSet<LayerId>) -> SnapshotsResult<BTreeSet<LayerId>> {
        let mut layers = others;
        for id in self.ids()? {
            // One that is damaged is told of where it is looked at.
            if let Ok(Some(manifest)) = self.manifest(&id) {
                layers.extend(manifest.about.layers);
            }
        }
        let mut without = BTreeSet::new();
        for layer in layers {
            if !self.has_digest(&layer)? && self.layer_path(&layer).exists() {
                without.insert(layer);
            }
        }
        Ok(without)
    }

    /// Looks at a part: at its small files now, at its large ones by and by. This is no use of it.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`], [`SnapshotStoreError::Manifest`], [`SnapshotStoreError::Format`] and
    /// [`SnapshotStoreError::Mismatch`] name the file that is not what it was, also where that is known already.
    pub fn look(&self, part: &Part) -> SnapshotsResult<Look> {
        let looked = match part {
            Part::Snapshot(id) => self.look_at_snapshot(id),
            Part::Base(key) => self.look_at_base(key),
            Part::Layer(layer) => self.begin_verify_layer(layer),
        };
        match looked {
            // What was deleted in the middle of the look is not damaged.
            Err(error) if is_missing(&error) && !self.is_there(part) => Ok(Look::Nothing),
            Err(error) => Err(error),
            Ok(None) if self.is_there(part) => Ok(Look::Small),
            Ok(None) => Ok(Look::Nothing),
            Ok(Some(verifying)) => Ok(Look::Contents(Box::new(Reading(verifying)))),
        }
    }

    fn look_at_snapshot(&self, id: &SnapshotId) -> SnapshotsResult<Option<Verifying>> {
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let kept = self.check_kept(id, &manifest)?;
        let Some(memory) = &manifest.memory else { return Ok(None) };
        let pages = Content { path: &kept.pages, recorded: &memory.pages, form: Form::Plain };
        Verifying::begin(&kept.dir.join(VERIFIED), &[pages]).map(Some)
    }

    fn look_at_base(&self, key: &BaseKey) -> SnapshotsResult<Option<Verifying>> {
        let Some((manifest, base)) = self.read_base(key)? else { return Ok(None) };
        Verifying::begin(&base.dir.join(VERIFIED), &manifest.contents(&base)).map(Some)
    }

    fn is_there(&self, part: &Part) -> bool {
        match part {
            Part::Snapshot(id) => self.inner.snapshots.join(id.as_str()).join(manifest::FILE_NAME).exists(),
            Part::Base(key) => self.base_dir(key).exists(),
            // A layer that is missing is damage to the snapshots that name it.
            Part::Layer(layer) => self.layer_path(layer).exists(),
        }
    }
}

fn is_missing(error: &SnapshotStoreError) -> bool {
    match error {
        SnapshotStoreError::Damaged { damage: Damage::Missing, .. } => true,
        SnapshotStoreError::File { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}
