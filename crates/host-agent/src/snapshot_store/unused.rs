//! What nobody restores any more: a snapshot of an earlier kernel, image or program is never found again, and
//! the directory would only grow.
//!
//! A snapshot's manifest carries the time of its last use, to the day. When a store is opened, snapshots that
//! were not used for [`KEPT_FOR`] are removed; what runs on one keeps its files open and does not notice.

use std::{
    fs::File,
    io,
    time::{Duration, SystemTime},
};

use camino::Utf8Path;

use super::{SnapshotKey, SnapshotStore, SnapshotStoreError, SnapshotStoreResult, files, lock, manifest};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a snapshot is kept after its last use.
const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How long ago `time` is; nothing for a time that is still to come.
fn age(time: SystemTime) -> Duration {
    SystemTime::now().duration_since(time).unwrap_or_default()
}

/// Notes that a snapshot is used, in the time of its opened manifest. At most one write a day.
pub(super) fn mark_used(manifest: &File) -> io::Result<()> {
    if age(manifest.metadata()?.modified()?) > DAY {
        manifest.set_modified(SystemTime::now())?;
    }
    Ok(())
}

impl SnapshotStore {
    /// Removes what was not used for a month.
    pub(super) fn forget_unused(&self) -> SnapshotStoreResult<()> {
        let directory = &self.inner.directory;
        let failed = |source| SnapshotStoreError::file("list", directory, source);
        for entry in directory.read_dir_utf8().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(key) = SnapshotKey::from_name(entry.file_name()) else { continue };
            if !is_unused(entry.path()) {
                continue;
            }
            let path = self.lock_path(&key);
            let lock = lock::try_exclusive(&path)
                .map_err(|source| SnapshotStoreError::file("lock", &path, source))?;
            // Looked at again under the lock: somebody may have made it anew since.
            if lock.is_some() && is_unused(entry.path()) {
                files::remove_directory(entry.path())?;
                tracing::info!(path = %entry.path(), "removed a snapshot that was not used for a month");
            }
        }
        Ok(())
    }
}

/// Whether the last use of a snapshot is too long ago. One without a manifest was set aside; its directory's
/// own time says since when.
fn is_unused(directory: &Utf8Path) -> bool {
    let manifest = directory.join(manifest::FILE_NAME);
    let metadata = manifest.metadata().or_else(|_| directory.metadata());
    metadata.and_then(|it| it.modified()).is_ok_and(|time| age(time) > KEPT_FOR)
}
