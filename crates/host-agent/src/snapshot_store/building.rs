//! A snapshot in the making, and how it becomes one: wholly or not at all.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{fs::RenameFlags, io::Errno};
use wrenn_vmm::SnapshotFiles;

use super::{
    Damage, FileRecord, Layout, Manifest, SnapshotKey, SnapshotStore, SnapshotStoreError,
    SnapshotStoreResult, Subject, WarmSnapshot, digest,
    files::{length, remove_directory, rename, sync, write_durably},
    lock::{self, Lock},
    manifest, sparse,
};

const BUILDING: &str = ".building-";
const LOCK: &str = ".lock-";

/// What came of the wish to make a snapshot.
#[derive(Debug)]
pub enum Begin {
    /// Someone else made it meanwhile.
    Ready(Box<WarmSnapshot>),
    /// It is ours to make.
    Building(Building),
}

/// A snapshot in the making. Nobody else makes the same one while it lives; dropped before
/// [`Building::commit`] it leaves nothing.
#[derive(Debug)]
pub struct Building {
    store: SnapshotStore,
    subject: Subject,
    dir: Utf8PathBuf,
    /// Released last: whoever gets it finds the directory gone or in its place.
    _lock: Lock,
}

/// A step of [`Building::commit`] that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    FilesAreDurable,
    ManifestIsWritten,
    ManifestHasItsName,
    DirectoryIsDurable,
    OldIsAside,
    IsInPlace,
    PlaceIsDurable,
    OldIsRemoved,
}

impl SnapshotStore {
    /// Begins to make the snapshot for `subject`, unless someone else makes it: then this waits, and
    /// answers with what they made. One that is there and cannot be used is replaced when the new one is
    /// committed.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Busy`] when the other does not finish within `bound`, and
    /// [`SnapshotStoreError::NoSpace`] when there is not enough room for what the guest will write.
    pub async fn begin(&self, subject: &Subject, bound: Duration) -> SnapshotStoreResult<Begin> {
        let key = subject.key();
        let path = self.lock_path(&key);
        let lock = lock::exclusive(&path, bound)
            .await
            .map_err(|source| SnapshotStoreError::file("lock", &path, source))?
            .ok_or_else(|| SnapshotStoreError::Busy { key: key.clone(), bound })?;
        match self.open(subject) {
            Ok(None) => {}
            Ok(Some(snapshot)) => return Ok(Begin::Ready(Box::new(snapshot))),
            Err(error) if error.is_unusable() => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a warm snapshot is made anew");
            }
            Err(error) => return Err(error),
        }
        let dir = self.building_path(&key);
        // Who holds the lock is the only one who may have such a directory: this one's owner is dead.
        remove_directory(&dir)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(|source| SnapshotStoreError::file("make", &dir, source))?;
        let building = Building { store: self.clone(), subject: subject.clone(), dir, _lock: lock };
        // Until its zeros are given back: a kernel that boots clears all of its memory.
        self.check_room(&building.dir, subject.shape.memory.bytes())?;
        Ok(Begin::Building(building))
    }

    /// Removes what dead builders left, and nothing of one that lives.
    pub(super) fn collect(&self) -> SnapshotStoreResult<()> {
        let directory = &self.inner.directory;
        let failed = |source| SnapshotStoreError::file("list", directory, source);
        for entry in directory.read_dir_utf8().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let key = entry.file_name().strip_prefix(BUILDING).and_then(SnapshotKey::from_name);
            let Some(key) = key else { continue };
            let path = self.lock_path(&key);
            let lock = lock::try_exclusive(&path)
                .map_err(|source| SnapshotStoreError::file("lock", &path, source))?;
            if lock.is_some() {
                remove_directory(entry.path())?;
                tracing::info!(path = %entry.path(), "removed what a dead builder left");
            }
        }
        Ok(())
    }

    /// A guest whose memory is a file on a full filesystem is killed where it writes, without a word.
    fn check_room(&self, dir: &Utf8Path, wanted: u64) -> SnapshotStoreResult<()> {
        let room = rustix::fs::statvfs(dir.as_str()).map_err(io::Error::from);
        let room = room.map(|it| it.f_bavail.saturating_mul(it.f_frsize));
        match room {
            Ok(room) if room >= wanted => Ok(()),
            Ok(_) => {
                Err(SnapshotStoreError::file("make a snapshot in", dir, io::ErrorKind::StorageFull.into()))
            }
            Err(source) => Err(SnapshotStoreError::file("examine", dir, source)),
        }
    }

    pub(super) fn lock_path(&self, key: &SnapshotKey) -> Utf8PathBuf {
        self.inner.directory.join(format!("{LOCK}{key}"))
    }

    fn building_path(&self, key: &SnapshotKey) -> Utf8PathBuf {
        self.inner.directory.join(format!("{BUILDING}{key}"))
    }
}

impl Building {
    /// Where memory and devices are to be written.
    #[must_use]
    pub fn files(&self) -> SnapshotFiles {
        let Layout { memory, state, .. } = Layout::of(&self.dir);
        SnapshotFiles { memory, state, pages: None }
    }

    /// Where the frozen disk is to be put.
    #[must_use]
    pub fn disk(&self) -> Utf8PathBuf {
        Layout::of(&self.dir).disk
    }

    /// Makes a snapshot of the three files, which are whole and are not changed any more: the machine
    /// that wrote them is gone. Blocks until it is durable.
    ///
    /// # Errors
    /// Nothing is left, and what was there before is still there.
    pub fn commit(self) -> SnapshotStoreResult<WarmSnapshot> {
        self.commit_observed(&mut |_| {})
    }

    pub(super) fn commit_observed(self, done: &mut dyn FnMut(Step)) -> SnapshotStoreResult<WarmSnapshot> {
        let manifest = self.record_files()?;
        done(Step::FilesAreDurable);

        let half = self.dir.join("manifest.json.new");
        write_durably(&half, &manifest.to_json(), 0o644)?;
        done(Step::ManifestIsWritten);
        fs::rename(&half, self.dir.join(manifest::FILE_NAME))
            .map_err(|source| SnapshotStoreError::file("rename", &half, source))?;
        done(Step::ManifestHasItsName);
        sync(&self.dir)?;
        done(Step::DirectoryIsDurable);

        let place = self.store.inner.directory.join(self.subject.key().as_str());
        self.put_in_place(&place, done)?;
        done(Step::IsInPlace);
        sync(&self.store.inner.directory)?;
        done(Step::PlaceIsDurable);
        remove_directory(&self.dir)?;
        done(Step::OldIsRemoved);

        let snapshot = self.store.open(&self.subject)?.ok_or_else(|| SnapshotStoreError::Damaged {
            path: place.join(manifest::FILE_NAME),
            damage: Damage::Missing,
        })?;
        self.store.remember_contents(&snapshot)?;
        Ok(snapshot)
    }

    /// Makes the files small and durable, and takes their digests.
    fn record_files(&self) -> SnapshotStoreResult<Manifest> {
        let at = Layout::of(&self.dir);
        sparse::punch_zeros(&at.memory)?;
        for path in [&at.memory, &at.state, &at.disk] {
            sync(path)?;
        }
        let memory = record_large(&at.memory)?;
        let wanted = self.subject.shape.memory.bytes();
        if memory.bytes != wanted {
            let problem = format!("it has {} bytes, and the machine has {wanted}", memory.bytes);
            return Err(SnapshotStoreError::Incomplete { path: at.memory, problem });
        }
        let state = FileRecord {
            bytes: length(&at.state)?,
            digest: digest::of_small_file(&at.state, super::LARGEST_STATE)?,
        };
        if state.bytes == 0 || state.bytes > super::LARGEST_STATE {
            let problem = format!("it has {} bytes", state.bytes);
            return Err(SnapshotStoreError::Incomplete { path: at.state, problem });
        }
        Ok(Manifest::new(self.subject.clone(), memory, state, record_large(&at.disk)?))
    }

    /// Gives the directory its name. What has that name cannot be used, and then has ours.
    fn put_in_place(&self, place: &Utf8Path, done: &mut dyn FnMut(Step)) -> SnapshotStoreResult<()> {
        let failed = |error: Errno| SnapshotStoreError::file("put in place", place, error.into());
        match rename(&self.dir, place, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(error)),
        }
        match rename(&self.dir, place, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            // A filesystem that cannot exchange. The old one was of no use: a moment without any is no loss.
            Err(Errno::INVAL) => {
                remove_directory(place)?;
                done(Step::OldIsAside);
                rename(&self.dir, place, RenameFlags::NOREPLACE).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        if let Err(error) = remove_directory(&self.dir) {
            // The next one who gets the lock tries again.
            tracing::warn!(error = &error as &dyn std::error::Error, "a half-made snapshot stays for now");
        }
    }
}

fn record_large(path: &Utf8Path) -> SnapshotStoreResult<FileRecord> {
    Ok(FileRecord { bytes: length(path)?, digest: digest::of_large_file(path)? })
}
