//! What nothing stands on any more, and its removal. What is reached is marked, all else is swept.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, SystemTime},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::RenameFlags;
use wrenn_types::{LayerId, SnapshotId};

use super::{BaseKey, GONE, MAKING, Snapshots, SnapshotsResult, Step, entries, remove_any};
use crate::snapshot_store::{
    SnapshotStoreError,
    files::{rename, sync},
};

/// What the records of sandboxes name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Every layer of every chain, also one that is about to be made.
    pub layers: BTreeSet<LayerId>,
    /// What they stand on.
    pub bases: BTreeSet<BaseKey>,
}

/// What came of a collect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Layers that are gone.
    pub layers: Vec<LayerId>,
    /// Bases that are gone.
    pub bases: Vec<BaseKey>,
    /// Other files that are gone: they had names that nothing could have named.
    pub others: Vec<String>,
    /// How many bytes of the host's disk are free again: blocks in use, and nothing of files that have
    /// another name elsewhere.
    pub freed_bytes: u64,
    /// How many files and bases nothing reaches that are within the grace.
    pub young: usize,
    /// Snapshots whose manifests cannot be read. What they name is not known, so nothing is removed while
    /// there is one: it has to be deleted, or mended, by whoever is told.
    pub unreadable: Vec<SnapshotId>,
}

/// Which of the two folders is swept.
#[derive(Debug, Clone, Copy)]
enum Folder {
    Disks,
    Bases,
}

impl Snapshots {
    /// Removes each layer and each base that neither a manifest nor `roots` names, and that was neither made
    /// nor used for `grace`: one that was just made is in no record yet. Other files in the two folders go
    /// too.
    ///
    /// `roots` is asked when the manifests were read, and no snapshot is committed or deleted until it has
    /// answered. So nothing is overlooked that passes from a record to a manifest or back, as long as a
    /// caller writes the one before it removes the other. `roots` must not call this store.
    ///
    /// # Errors
    /// When a folder cannot be read or `roots` fails, nothing is removed. When a removal fails, the rest is
    /// there for the next collect.
    pub fn collect(
        &self,
        roots: impl FnOnce() -> SnapshotsResult<Roots>,
        grace: Duration,
    ) -> SnapshotsResult<Swept> {
        let _one = self.inner.collecting.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut swept = Swept::default();
        self.remove_aside(&self.aside()?, &mut swept)?;
        let aside = {
            let _reach = self.lock_reach();
            let Some(reached) = self.mark(roots, &mut swept)? else { return Ok(swept) };
            let aside = self.set_aside(&reached, grace, &mut swept)?;
            self.sweep_digests(&reached.layers)?;
            aside
        };
        self.forget_uses(grace);
        if aside.is_empty() {
            return Ok(swept);
        }
        // Nothing can name it any more. Large files take their time.
        for folder in [&self.inner.disks, &self.inner.bases] {
            sync(folder)?;
        }
        self.inner.steps.done(Step::AsideIsDurable)?;
        self.remove_aside(&aside, &mut swept)?;
        Ok(swept)
    }

    /// What an earlier collect could not remove.
    fn aside(&self) -> SnapshotsResult<Vec<Utf8PathBuf>> {
        let mut aside = Vec::new();
        for folder in [&self.inner.disks, &self.inner.bases] {
            let entries = entries(folder)?;
            aside.extend(
                entries.into_iter().filter(|it| it.file_name().starts_with(GONE)).map(|it| it.into_path()),
            );
        }
        Ok(aside)
    }

    fn remove_aside(&self, aside: &[Utf8PathBuf], swept: &mut Swept) -> SnapshotsResult<()> {
        for path in aside {
            swept.freed_bytes += freed_by(path)?;
            remove_any(path)?;
            self.inner.steps.done(Step::AsideIsRemoved)?;
        }
        Ok(())
    }

    /// What is reached; nothing when that cannot be known.
    fn mark(
        &self,
        roots: impl FnOnce() -> SnapshotsResult<Roots>,
        swept: &mut Swept,
    ) -> SnapshotsResult<Option<Roots>> {
        let mut manifests = Vec::new();
        for id in self.ids()? {
            match self.manifest(&id) {
                Ok(manifest) => manifests.extend(manifest),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, snapshot = %id, "nothing is collected");
                    swept.unreadable.push(id);
                }
            }
        }
        if !swept.unreadable.is_empty() {
            return Ok(None);
        }
        let mut reached = roots()?;
        for manifest in manifests {
            reached.layers.extend(manifest.about.layers);
            reached.bases.insert(manifest.about.base);
        }
        let of_disks: Vec<_> = reached.bases.iter().map(BaseKey::of_disk).collect();
        reached.bases.extend(of_disks);
        Ok(Some(reached))
    }

    /// Takes the names of what is not reached away: one rename each, so that nothing is ever half there.
    fn set_aside(
        &self,
        reached: &Roots,
        grace: Duration,
        swept: &mut Swept,
    ) -> SnapshotsResult<Vec<Utf8PathBuf>> {
        let mut aside = Vec::new();
        for (folder, path) in [(Folder::Disks, &self.inner.disks), (Folder::Bases, &self.inner.bases)] {
            for entry in entries(path)? {
                let name = entry.file_name();
                // A base in the making is its maker's; at the next start it is nobody's.
                if name.starts_with(MAKING) {
                    continue;
                }
                let (layer, base) = match folder {
                    Folder::Disks => (name.parse::<LayerId>().ok(), None),
                    Folder::Bases => (None, name.parse::<BaseKey>().ok()),
                };
                if layer.as_ref().is_some_and(|it| reached.layers.contains(it))
                    || base.as_ref().is_some_and(|it| reached.bases.contains(it))
                {
                    continue;
                }
                let used = layer.as_ref().and_then(|layer| self.last_use(layer));
                if age(entry.path())? < grace || used.is_some_and(|used| used < grace) {
                    swept.young += 1;
                    continue;
                }
                let gone = path.join(format!("{GONE}{name}"));
                rename(entry.path(), &gone, RenameFlags::empty())
                    .map_err(|error| SnapshotStoreError::file("set aside", entry.path(), error.into()))?;
                aside.push(gone);
                match (layer, base) {
                    (Some(layer), _) => swept.layers.push(layer),
                    (_, Some(base)) => swept.bases.push(base),
                    _ => swept.others.push(name.to_owned()),
                }
                self.inner.steps.done(match folder {
                    Folder::Disks => Step::LayerIsAside,
                    Folder::Bases => Step::BaseIsAside,
                })?;
            }
        }
        Ok(aside)
    }
}

/// For how long it was neither made, written nor used; nothing for a time that is still to come.
fn age(path: &Utf8Path) -> SnapshotsResult<Duration> {
    let modified = fs::symlink_metadata(path).and_then(|it| it.modified());
    let modified = modified.map_err(|source| SnapshotStoreError::file("examine", path, source))?;
    Ok(SystemTime::now().duration_since(modified).unwrap_or_default())
}

/// What the removal of a file, or of a directory of files, gives back.
fn freed_by(path: &Utf8Path) -> SnapshotsResult<u64> {
    let metadata =
        fs::symlink_metadata(path).map_err(|source| SnapshotStoreError::file("examine", path, source))?;
    if metadata.is_dir() {
        entries(path)?.iter().map(|entry| freed_by(entry.path())).sum()
    } else if metadata.nlink() == 1 {
        // The unit of `st_blocks` is 512 bytes on every filesystem.
        Ok(metadata.blocks() * 512)
    } else {
        Ok(0)
    }
}
