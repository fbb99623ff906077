//! The steps after which the disk is in another state, by name, so that a test can look at each of them, or
//! let the next one fail.

use std::{fmt, io, sync::Arc};

use camino::Utf8Path;

use super::SnapshotsResult;
use crate::snapshot_store::SnapshotStoreError;

/// A step that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    // Of a hold.
    BaseIsBegun,
    MemoryHasOurName,
    DiskHasOurName,
    BaseManifestIsWritten,
    BaseIsDurable,
    BaseIsInPlace,
    BasePlaceIsDurable,
    // Of a begin.
    MakingIsBegun,
    // Of a commit.
    LayersAreDurable,
    FilesAreDurable,
    ManifestIsWritten,
    ManifestHasItsName,
    DirectoryIsDurable,
    IsInPlace,
    PlaceIsDurable,
    // Of a delete.
    ManifestIsGone,
    ThatIsDurable,
    FilesAreGone,
    AllIsDurable,
    // Of a collect.
    LayerIsAside,
    BaseIsAside,
    AsideIsDurable,
    AsideIsRemoved,
    DigestIsRemoved,
    // Of the digest of a layer.
    DigestIsWritten,
    DigestHasItsName,
    DigestIsDurable,
}

type Observer = dyn Fn(Step) -> io::Result<()> + Send + Sync;

/// Who is told of each step: nobody, but in tests.
#[derive(Clone, Default)]
pub(super) struct Steps(Option<Arc<Observer>>);

impl Steps {
    #[cfg(test)]
    pub(super) fn observed(observer: impl Fn(Step) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(observer)))
    }

    /// Tells that `step` is done.
    ///
    /// # Errors
    /// What comes next has failed, as the observer says.
    pub(super) fn done(&self, step: Step) -> SnapshotsResult<()> {
        let Some(observer) = &self.0 else { return Ok(()) };
        observer(step)
            .map_err(|source| SnapshotStoreError::file("go on with", Utf8Path::new("a snapshot"), source))
    }
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Steps(observed)" } else { "Steps" })
    }
}
