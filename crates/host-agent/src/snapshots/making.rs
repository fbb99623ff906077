//! A snapshot in the making, and how it becomes one: wholly or not at all.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{fs::RenameFlags, io::Errno};
use wrenn_types::SnapshotId;

use super::{
    About, Extent, Kept, MAKING, Snapshots, SnapshotsResult, Step, VERIFIED, is_missing,
    kept::{Manifest, MemoryRecord, pages_path, state_path},
    remove_manifest, sealed,
};
use crate::snapshot_store::{
    Damage, FileRecord, LARGEST_STATE, SnapshotStoreError, check_digest, digest,
    files::{length, make_durable, remove_directory, rename, sync, write_durably},
    manifest,
    verified::{self, Content, Form},
};

/// The mode of files that are not written to any more.
const FROZEN: u32 = 0o400;

/// A snapshot in the making. Dropped before [`Making::commit`] it leaves nothing.
#[derive(Debug)]
pub struct Making {
    snapshots: Snapshots,
    id: SnapshotId,
    /// Where it is now: removed when this is dropped. None once it is a snapshot for good.
    dir: Option<Utf8PathBuf>,
    /// Where state and pages are written.
    half: Utf8PathBuf,
}

impl Snapshots {
    /// Begins to make a snapshot.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Exists`] when there is one of that id, or one in the making.
    pub fn begin(&self, id: SnapshotId) -> SnapshotsResult<Making> {
        let place = self.inner.snapshots.join(id.as_str());
        if is_missing(&place.join(manifest::FILE_NAME))? {
            // What a delete that failed left.
            remove_directory(&place)?;
        } else {
            return Err(SnapshotStoreError::Exists { path: place });
        }
        let dir = self.inner.snapshots.join(format!("{MAKING}{id}"));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SnapshotStoreError::Exists { path: dir });
            }
            Err(source) => return Err(SnapshotStoreError::file("make", &dir, source)),
        }
        let making = Making { snapshots: self.clone(), id, dir: Some(dir.clone()), half: dir };
        self.inner.steps.done(Step::MakingIsBegun)?;
        Ok(making)
    }
}

impl Making {
    /// Where the state of the devices is to be written.
    #[must_use]
    pub fn state(&self) -> Utf8PathBuf {
        state_path(&self.half)
    }

    /// Where what differs from the base's memory is to be written.
    #[must_use]
    pub fn pages(&self) -> Utf8PathBuf {
        pages_path(&self.half)
    }

    /// Makes a snapshot of what was written (nothing where only the disk is saved), and of the layers and the base that
    /// `about` names: they are there, and none of them is written to any more. Makes the layers durable and read-only. Returns when
    /// all of it is durable.
    ///
    /// # Errors
    /// There is no snapshot, and nothing of it is left; the layers are as they were, but may be read-only.
    /// [`SnapshotStoreError::Incomplete`] and [`SnapshotStoreError::Damaged`] name what is not as `about`
    /// says, or is known to be damaged.
    pub fn commit(self, about: About) -> SnapshotsResult<Kept> {
        self.commit_of(None, about)
    }

    /// As [`Self::commit`], where state and pages are the very files of another snapshot.
    ///
    /// # Errors
    /// As those. [`SnapshotStoreError::Damaged`] names a file that is not what the other snapshot says of it: a digest
    /// that is taken now would say that it is whole.
    pub fn commit_copy(self, of: &Kept, about: About) -> SnapshotsResult<Kept> {
        self.commit_of(Some(of), about)
    }

    fn commit_of(mut self, source: Option<&Kept>, about: About) -> SnapshotsResult<Kept> {
        let steps = &self.snapshots.inner.steps;
        let manifest = self.record(source, about)?;

        let path = self.half.join(manifest::FILE_NAME);
        let unnamed = self.half.join("manifest.json.new");
        write_durably(&unnamed, &sealed::to_text(&manifest, &path)?, 0o600)?;
        steps.done(Step::ManifestIsWritten)?;
        fs::rename(&unnamed, &path).map_err(|source| SnapshotStoreError::file("rename", &unnamed, source))?;
        steps.done(Step::ManifestHasItsName)?;
        sync(&self.half)?;
        steps.done(Step::DirectoryIsDurable)?;

        let place = self.put_in_place()?;
        self.dir = Some(place.clone());
        self.snapshots.inner.steps.done(Step::IsInPlace)?;
        sync(&self.snapshots.inner.snapshots)?;
        self.snapshots.inner.steps.done(Step::PlaceIsDurable)?;

        let kept = Kept::new(self.id.clone(), place, &manifest);
        if let Some(memory) = &manifest.memory {
            let pages = Content { path: &kept.pages, recorded: &memory.pages, form: Form::Plain };
            verified::remember(&kept.dir.join(VERIFIED), &[pages])?;
        }
        self.dir = None;
        Ok(kept)
    }

    /// Makes durable what the manifest will name, and says it.
    fn record(&self, source: Option<&Kept>, about: About) -> SnapshotsResult<Manifest> {
        let steps = &self.snapshots.inner.steps;
        let Some((base_manifest, base)) = self.snapshots.read_base(&about.base)? else {
            return Err(self.snapshots.no_base(&about.base));
        };
        // What cannot be restored is no snapshot. A machine that runs on it has its own view of it, and may go on.
        self.snapshots.refuse_damaged_base(&base_manifest, &base, about.extent)?;
        let layer_bytes = self.record_layers(&about)?;
        for layer in &about.layers {
            self.snapshots.refuse_damaged_layer(layer)?;
        }
        steps.done(Step::LayersAreDurable)?;
        let memory = match about.extent {
            Extent::Machine => {
                let memory = self.record_memory()?;
                if let Some(source) = source {
                    self.check_copy(source, &memory)?;
                }
                Some(memory)
            }
            Extent::Disk => {
                self.refuse_files()?;
                None
            }
        };
        steps.done(Step::FilesAreDurable)?;
        Ok(Manifest { id: self.id.clone(), about, layer_bytes, memory })
    }

    fn record_layers(&self, about: &About) -> SnapshotsResult<Vec<u64>> {
        let mut seen = BTreeSet::new();
        let mut bytes = Vec::new();
        for layer in &about.layers {
            let path = self.snapshots.layer_path(layer);
            if !seen.insert(layer) {
                return Err(incomplete(&path, "it is in the chain of layers twice"));
            }
            bytes.push(finish(&path)?);
        }
        sync(&self.snapshots.inner.disks)?;
        Ok(bytes)
    }

    fn record_memory(&self) -> SnapshotsResult<MemoryRecord> {
        let (state, pages) = (self.state(), self.pages());
        let (state_bytes, pages_bytes) = (finish(&state)?, finish(&pages)?);
        if state_bytes == 0 || state_bytes > LARGEST_STATE {
            return Err(incomplete(&state, &format!("it has {state_bytes} bytes")));
        }
        Ok(MemoryRecord {
            state: FileRecord { bytes: state_bytes, digest: digest::of_small_file(&state, LARGEST_STATE)? },
            pages: FileRecord { bytes: pages_bytes, digest: digest::of_file(&pages)? },
        })
    }

    /// Holds what was read against what is recorded of the snapshot that it is of.
    fn check_copy(&self, source: &Kept, found: &MemoryRecord) -> SnapshotsResult<()> {
        let recorded = self.snapshots.manifest(&source.id)?.and_then(|manifest| manifest.memory);
        let Some(recorded) = recorded else {
            let path = source.dir.join(manifest::FILE_NAME);
            return Err(SnapshotStoreError::Damaged { path, damage: Damage::Missing });
        };
        check_digest(&source.state, &recorded.state.digest, &found.state.digest)?;
        check_digest(&source.pages, &recorded.pages.digest, &found.pages.digest)
    }

    fn refuse_files(&self) -> SnapshotsResult<()> {
        for path in [self.state(), self.pages()] {
            if !is_missing(&path)? {
                return Err(incomplete(&path, "the snapshot is to have no memory"));
            }
        }
        Ok(())
    }

    /// Gives the directory its name, which is free.
    fn put_in_place(&self) -> SnapshotsResult<Utf8PathBuf> {
        let place = self.snapshots.inner.snapshots.join(self.id.as_str());
        let _reach = self.snapshots.lock_reach();
        match rename(&self.half, &place, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(place),
            Err(Errno::EXIST) => Err(SnapshotStoreError::Exists { path: place }),
            Err(error) => Err(SnapshotStoreError::file("put in place", &place, error.into())),
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        // The last steps of a commit may fail when it has its name already: as for a delete, the manifest
        // goes first.
        let removed = {
            let _reach = self.snapshots.lock_reach();
            remove_manifest(&dir)
        };
        // Durably: else a crash could bring back what its maker was told had failed.
        let removed =
            removed.and_then(|_| remove_directory(&dir)).and_then(|()| sync(&self.snapshots.inner.snapshots));
        if let Err(error) = removed {
            // The next start tries again.
            tracing::warn!(error = &error as &dyn std::error::Error, "a half-made snapshot stays for now");
        }
    }
}

/// Makes a file read-only and durable, and says its size. One that is not there is named.
fn finish(path: &Utf8Path) -> SnapshotsResult<u64> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SnapshotStoreError::Damaged { path: path.to_owned(), damage: Damage::Missing });
        }
        Err(source) => return Err(SnapshotStoreError::file("open", path, source)),
    };
    // One that is so already is left alone: what was verified is known by the time of its last change.
    let is_frozen = file.metadata().map(|it| it.permissions().mode() & 0o777 == FROZEN);
    is_frozen
        .and_then(
            |is_frozen| {
                if is_frozen { Ok(()) } else { file.set_permissions(Permissions::from_mode(FROZEN)) }
            },
        )
        .map_err(|source| SnapshotStoreError::file("make read-only", path, source))?;
    make_durable(&file).map_err(|source| SnapshotStoreError::file("write to disk", path, source))?;
    length(path)
}

fn incomplete(path: &Utf8Path, problem: &str) -> SnapshotStoreError {
    SnapshotStoreError::Incomplete { path: path.to_owned(), problem: problem.to_owned() }
}
