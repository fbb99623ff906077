//! Snapshots of sandboxes: what a pause, a snapshot and a fork keep on disk, and what may go again.
//!
//! ```text
//!  DIRECTORY/
//!    bases/KEY.DIGEST/     memory and disk of a warm snapshot, under names of our own
//!    bases/KEY.DIGEST.zeros/   a memory of zeros, for machines that boot on the disk of KEY.DIGEST
//!    disks/LAYER           overlays: the top one is written by its machine, all below it never again
//!    digests/LAYER         size and digest of one that is not written to any more
//!    snapshots/SNAPSHOT/   manifest.json, state (devices), pages (what differs from the base's memory);
//!                          of a disk alone only the first
//! ```
//!
//! The life of a snapshot:
//!
//! ```text
//!  begin: snapshots/.making-ID ── dropped, failed ──► removed        killed ──► removed by the next open
//!    │ the caller writes state and pages
//!    ▼ commit
//!  layers synced and read-only ► files synced, digests ► manifest synced ► directory synced
//!    │                                        until here there is no snapshot
//!    ▼ rename
//!  snapshots/ID ► parent synced               from here on there is one, whole
//!    │
//!    │ get: manifest, state, sizes of all it stands on; pages, base, layers with a digest once per boot
//!    ▼ delete
//!  manifest removed, directory synced         from here on there is none
//!    ▼
//!  files removed ► parent synced              killed before ──► removed by the next open
//! ```
//!
//! The life of a base and of a layer:
//!
//! ```text
//!  hold ──► base ──┐                          ┌─ named by a record or by a manifest: stays
//!                  ├─ collect: is it reached? ┤  not, but used or made within the grace: stays for now
//!  caller ► layer ─┘                          └─ else: renamed aside, then removed
//! ```
//!
//! References are derived by [`Snapshots::collect`] from the manifests and from what the caller says of its
//! records; nothing counts them. Between the moment at which a caller learns of a base or a layer
//! ([`Snapshots::hold`], [`Snapshots::hold_zeros`], [`Snapshots::base`], [`Snapshots::get`]) and the one at which its record names it,
//! only the grace keeps it: each of these calls begins it anew. That of a layer is kept in memory, since what is
//! frozen is not touched; a process that ends has nothing that is still to be named.
//!
//! No file is moved or replaced once something can name it. Overlays name what is below them by its absolute
//! path, so [`Snapshots::open`] follows every symbolic link to its directory once, and the directory must
//! stay where it is for as long as there is a layer in it.
//!
//! What is verified when: manifest and device state at every use; pages, layers, and the base's memory and disk,
//! once per boot of the host. The digest of a layer is made after it was frozen (see `digests`); until it is there, a
//! layer is only held against the size that it had. What fails is refused with the name of the file. Nothing is
//! repaired. What a scrub reads, and when, is decided elsewhere ([`crate::scrub`]); here is what there is to read.
//!
//! One process at a time uses a directory: the lock of its stack sees to that. Calls block on the disk and on
//! nothing else; make them on a thread that may block.

mod base;
mod digests;
mod kept;
mod making;
mod parts;
mod sealed;
mod steps;
mod sweep;

#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::BTreeMap,
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use camino::{Utf8DirEntry, Utf8Path, Utf8PathBuf};
use wrenn_types::{LayerId, SnapshotId};

pub use base::{Base, BaseKey, ParseBaseKeyError};
pub use digests::{SealProgress, Sealing};
pub use kept::{About, Extent, Kept, KeptMemory};
pub use making::Making;
pub use parts::{Look, Part, Progress, Reading};
use steps::{Step, Steps};
pub use sweep::{Roots, Swept};

use crate::snapshot_store::{
    Damage, SnapshotStoreError, check_size,
    files::{remove_directory, sync},
    manifest,
    verified::{self, Content, Form, Readers},
};

/// The result of an operation on a snapshot of a sandbox. The errors are those of the warm snapshots' store.
pub type SnapshotsResult<T> = Result<T, SnapshotStoreError>;

/// In the name of what is being made. No id and no key begins so.
const MAKING: &str = ".making-";
/// In the name of what is being removed.
const GONE: &str = ".gone-";
/// In the directory of a snapshot or a base: which of its contents were verified since the host booted.
const VERIFIED: &str = "verified.json";

/// The snapshots of the sandboxes of one host, and what they stand on. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bases: Utf8PathBuf,
    disks: Utf8PathBuf,
    digests: Utf8PathBuf,
    snapshots: Utf8PathBuf,
    steps: Steps,
    /// When a layer was last used, for its grace.
    uses: Mutex<BTreeMap<LayerId, Instant>>,
    /// Held by whatever makes something reachable or unreachable, or begins its grace anew, and by a collect:
    /// so what is reached does not change while it is looked for. Never while a large file is read or removed.
    reach: Mutex<()>,
    /// One base is made at a time: the second finds what the first made.
    holding: Mutex<()>,
    /// One verification of each set of files at a time: the second finds what the first remembers.
    verifying: Readers,
    /// One collect at a time: what is aside is removed by one.
    collecting: Mutex<()>,
}

impl Snapshots {
    /// The store in `directory`, whose folders are made if they are not there, for their owner only. What was
    /// half made or half removed when an earlier process ended is removed; a folder of a snapshot without a
    /// manifest is that too.
    ///
    /// Every symbolic link on the way to `directory` is followed once, now: all paths that this store gives
    /// are absolute, and an overlay may name them.
    ///
    /// # Errors
    /// One of the folders cannot be made or read.
    pub fn open(directory: &Utf8Path) -> SnapshotsResult<Self> {
        Self::open_observed(directory, Steps::default())
    }

    fn open_observed(directory: &Utf8Path, steps: Steps) -> SnapshotsResult<Self> {
        make_directory(directory)?;
        let directory = directory
            .canonicalize_utf8()
            .map_err(|source| SnapshotStoreError::file("find", directory, source))?;
        let inner = Inner {
            bases: directory.join("bases"),
            disks: directory.join("disks"),
            digests: directory.join("digests"),
            snapshots: directory.join("snapshots"),
            steps,
            uses: Mutex::default(),
            reach: Mutex::new(()),
            holding: Mutex::new(()),
            verifying: Readers::default(),
            collecting: Mutex::new(()),
        };
        for path in [&inner.bases, &inner.disks, &inner.digests, &inner.snapshots] {
            make_directory(path)?;
        }
        // Their names are as durable as what will be in them.
        sync(&directory)?;
        let store = Self { inner: Arc::new(inner) };
        store.remove_leftovers()?;
        Ok(store)
    }

    /// Where a layer is, or is to be made: the same path for as long as there is one of that name.
    #[must_use]
    pub fn layer_path(&self, layer: &LayerId) -> Utf8PathBuf {
        self.inner.disks.join(layer.as_str())
    }

    /// A snapshot, verified so that a machine can be made of it: manifest and state now, and pages, layers and the
    /// contents of its base (of a disk alone, the base's disk) unless that was done since the host booted. Of a layer that has no digest yet, that it
    /// is there and was not cut. The grace of its layers and its base begins anew.
    ///
    /// None when there is no such snapshot.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`], [`SnapshotStoreError::Manifest`], [`SnapshotStoreError::Format`] and
    /// [`SnapshotStoreError::Mismatch`] name the file that is not what it was; it stays as it is.
    pub fn get(&self, id: &SnapshotId) -> SnapshotsResult<Option<Kept>> {
        let Some(manifest) = self.manifest_in_use(id)? else { return Ok(None) };
        let kept = self.check_kept(id, &manifest)?;
        if let Some(memory) = &manifest.memory {
            let pages = Content { path: &kept.pages, recorded: &memory.pages, form: Form::Plain };
            verified::verify_once(&kept.dir.join(VERIFIED), &self.inner.verifying, &[pages])?;
        }
        for layer in &kept.about.layers {
            self.verify_layer(layer)?;
        }
        match self.base_for(&kept.about.base, kept.about.extent)? {
            Some(_) => Ok(Some(kept)),
            None => Err(self.no_base(&kept.about.base)),
        }
    }

    /// A snapshot that is not used yet: as [`Self::get`], but the contents of large files are not read.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn find(&self, id: &SnapshotId) -> SnapshotsResult<Option<Kept>> {
        let Some(manifest) = self.manifest_in_use(id)? else { return Ok(None) };
        self.check_kept(id, &manifest).map(Some)
    }

    /// All snapshots, by id, with what is wrong with those that cannot be used. As [`Self::get`], but the
    /// contents of large files are not read: this is not a use.
    ///
    /// # Errors
    /// The folder of the snapshots cannot be read.
    pub fn all(&self) -> SnapshotsResult<Vec<(SnapshotId, SnapshotsResult<Kept>)>> {
        let mut all = BTreeMap::new();
        for id in self.ids()? {
            let kept = self
                .manifest(&id)
                .and_then(|manifest| manifest.map(|manifest| self.check_kept(&id, &manifest)).transpose());
            // One that is being deleted has no manifest any more.
            if let Some(kept) = kept.transpose() {
                all.insert(id, kept);
            }
        }
        Ok(all.into_iter().collect())
    }

    /// Deletes a snapshot, damaged or not, durably; whether there was one. Its manifest goes first, so from
    /// the first step on there is none. Layers and base stay for [`Self::collect`].
    ///
    /// # Errors
    /// Repeat it: it goes on where it failed.
    pub fn delete(&self, id: &SnapshotId) -> SnapshotsResult<bool> {
        let dir = self.inner.snapshots.join(id.as_str());
        let was_there = self.remove_manifest(&dir)?;
        self.inner.steps.done(Step::ManifestIsGone)?;
        if dir.exists() {
            sync(&dir)?;
            self.inner.steps.done(Step::ThatIsDurable)?;
            remove_directory(&dir)?;
            self.inner.steps.done(Step::FilesAreGone)?;
        }
        // Even where nothing was there: an earlier call may have failed at this step.
        sync(&self.inner.snapshots)?;
        self.inner.steps.done(Step::AllIsDurable)?;
        Ok(was_there)
    }

    /// What a snapshot takes of the host's disk, in bytes of blocks in use: state, pages and all its layers,
    /// also those that it shares with others; nothing of its base.
    ///
    /// # Errors
    /// A file cannot be examined.
    pub fn own_bytes(&self, kept: &Kept) -> SnapshotsResult<u64> {
        let mut bytes = 0;
        if kept.about.extent == Extent::Machine {
            bytes += used_bytes(&kept.state)? + used_bytes(&kept.pages)?;
        }
        for layer in &kept.about.layers {
            bytes += used_bytes(&self.layer_path(layer))?;
        }
        Ok(bytes)
    }

    /// What all snapshots take of the host's disk together, in bytes of blocks in use; nothing of their bases. What
    /// goes meanwhile, or cannot be read, is left out.
    #[must_use]
    pub fn bytes_of_all(&self) -> u64 {
        let all: Vec<Kept> =
            self.all().unwrap_or_default().into_iter().filter_map(|(_, kept)| kept.ok()).collect();
        let memories = all.iter().filter(|kept| kept.about.extent == Extent::Machine);
        let memories = memories.flat_map(|kept| [kept.state.clone(), kept.pages.clone()]);
        // Several may stand on a layer, which is there once.
        let layers: BTreeSet<&LayerId> = all.iter().flat_map(|kept| &kept.about.layers).collect();
        let layers = layers.into_iter().map(|layer| self.layer_path(layer));
        memories.chain(layers).filter_map(|path| used_bytes(&path).ok()).sum()
    }

    /// The ids of all folders of snapshots. A name that is no id is none of ours and is left alone.
    fn ids(&self) -> SnapshotsResult<Vec<SnapshotId>> {
        let entries = entries(&self.inner.snapshots)?;
        Ok(entries.iter().filter_map(|entry| entry.file_name().parse().ok()).collect())
    }

    /// What is recorded of a snapshot. None without a manifest: then there is no snapshot.
    fn manifest(&self, id: &SnapshotId) -> SnapshotsResult<Option<kept::Manifest>> {
        let path = self.inner.snapshots.join(id.as_str()).join(manifest::FILE_NAME);
        let Some(recorded) = sealed::read::<kept::Manifest>(&path)? else { return Ok(None) };
        recorded.check_id(id, &path)?;
        Ok(Some(recorded))
    }

    /// What is recorded of a snapshot that is about to be used: the grace of what it stands on begins anew.
    fn manifest_in_use(&self, id: &SnapshotId) -> SnapshotsResult<Option<kept::Manifest>> {
        let _reach = self.lock_reach();
        let manifest = self.manifest(id)?;
        if let Some(manifest) = &manifest {
            for layer in &manifest.about.layers {
                self.uses().insert(layer.clone(), Instant::now());
            }
            self.begin_grace_of_base(&manifest.about.base)?;
        }
        Ok(manifest)
    }

    /// Holds the files of a snapshot against its manifest, but for the contents of large ones.
    fn check_kept(&self, id: &SnapshotId, manifest: &kept::Manifest) -> SnapshotsResult<Kept> {
        let dir = self.inner.snapshots.join(id.as_str());
        let kept = Kept::new(id.clone(), dir, manifest);
        if let Some(memory) = &manifest.memory {
            kept::check_state(&kept.state, &memory.state)?;
            check_size(&kept.pages, memory.pages.bytes)?;
        }
        for (layer, recorded) in manifest.about.layers.iter().zip(&manifest.layer_bytes) {
            kept::check_not_cut(&self.layer_path(layer), *recorded)?;
        }
        match self.read_base(&kept.about.base)? {
            Some(_) => Ok(kept),
            None => Err(self.no_base(&kept.about.base)),
        }
    }

    /// Removes the manifest of a snapshot; whether there was one.
    fn remove_manifest(&self, dir: &Utf8Path) -> SnapshotsResult<bool> {
        let _reach = self.lock_reach();
        remove_manifest(dir)
    }

    fn remove_leftovers(&self) -> SnapshotsResult<()> {
        let Inner { bases, disks, digests, snapshots, .. } = &*self.inner;
        for folder in [bases, disks, digests, snapshots] {
            for entry in entries(folder)? {
                let (name, path) = (entry.file_name(), entry.path());
                let no_snapshot = folder == snapshots
                    && name.parse::<SnapshotId>().is_ok()
                    && is_missing(&path.join(manifest::FILE_NAME))?;
                if name.starts_with(MAKING) || name.starts_with(GONE) || no_snapshot {
                    remove_any(path)?;
                    tracing::info!(%path, "removed what was half made or half removed");
                }
            }
        }
        Ok(())
    }

    fn lock_reach(&self) -> MutexGuard<'_, ()> {
        // It guards no data: a panic while it was held left at most what a crash leaves.
        self.inner.reach.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn uses(&self) -> MutexGuard<'_, BTreeMap<LayerId, Instant>> {
        self.inner.uses.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// For how long a layer was not used by this process, if it ever was.
    fn last_use(&self, layer: &LayerId) -> Option<Duration> {
        self.uses().get(layer).map(Instant::elapsed)
    }

    /// Forgets uses that are over for longer than the grace.
    fn forget_uses(&self, grace: Duration) {
        self.uses().retain(|_, used| used.elapsed() < grace);
    }

    fn no_base(&self, key: &BaseKey) -> SnapshotStoreError {
        SnapshotStoreError::Damaged { path: self.base_dir(key), damage: Damage::Missing }
    }
}

fn make_directory(path: &Utf8Path) -> SnapshotsResult<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| SnapshotStoreError::file("make", path, source))
}

fn entries(folder: &Utf8Path) -> SnapshotsResult<Vec<Utf8DirEntry>> {
    let listed = folder.read_dir_utf8().and_then(Iterator::collect);
    listed.map_err(|source| SnapshotStoreError::file("list", folder, source))
}

fn is_missing(path: &Utf8Path) -> SnapshotsResult<bool> {
    let exists = path.try_exists().map_err(|source| SnapshotStoreError::file("examine", path, source))?;
    Ok(!exists)
}

/// Removes the manifest in the directory of a snapshot; whether there was one. Idempotent.
fn remove_manifest(dir: &Utf8Path) -> SnapshotsResult<bool> {
    let path = dir.join(manifest::FILE_NAME);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(SnapshotStoreError::file("remove", &path, source)),
    }
}

/// Removes a file or a directory. Idempotent.
fn remove_any(path: &Utf8Path) -> SnapshotsResult<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => remove_directory(path),
        Ok(_) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(SnapshotStoreError::file("remove", path, error))
            }
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SnapshotStoreError::file("examine", path, source)),
    }
}

/// Bytes of the blocks in use.
fn used_bytes(path: &Utf8Path) -> SnapshotsResult<u64> {
    // The unit of `st_blocks` is 512 bytes on every filesystem.
    fs::metadata(path)
        .map(|it| it.blocks() * 512)
        .map_err(|source| SnapshotStoreError::file("examine", path, source))
}

/// Notes in the time of the directory of a base that it is used now. One that is missing is named by what uses it.
fn begin_grace(path: &Utf8Path) -> SnapshotsResult<()> {
    match File::open(path).and_then(|file| file.set_modified(SystemTime::now())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SnapshotStoreError::file("mark the use of", path, error))
        }
        _ => Ok(()),
    }
}
