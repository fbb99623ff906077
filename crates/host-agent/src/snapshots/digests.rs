//! Digests of the layers of disks.
//!
//! The top layer of a pause is final only when its VMM is gone, and a layer may take minutes to read. So its digest
//! is no part of a manifest: it lies in a file of its own, `digests/LAYER`, which is made later.
//!
//! ```text
//!  written by its machine ─► frozen, without a digest ─► read (Sealing) ─► digest written, synced, renamed ─► sealed
//!                                │        ▲                  │ written to, or gone meanwhile
//!                                │        └──────────────────┘
//!                                └─ used as it is: nothing waits for a digest
//! ```
//!
//! A layer that has a digest is verified before it reaches a guest, once per boot of the host: what was found is
//! remembered in `digests/LAYER.verified`. Both files go when there is no such layer any more.

use std::{collections::BTreeSet, fs, io, os::unix::fs::MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};
use wrenn_types::LayerId;

use super::{MAKING, Snapshots, SnapshotsResult, Step, entries, remove_any, sealed};
use crate::snapshot_store::{
    FileRecord, SnapshotStoreError,
    digest::{Hashing, Piece},
    files::{rename, sync, write_durably},
    manifest,
    verified::{self, Content, Form},
};

/// The end of the name of what is remembered of a layer.
const VERIFIED: &str = ".verified";

/// The content of `digests/LAYER`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerDigest {
    layer: LayerId,
    /// Size and digest of its file, in the form of large files.
    file: FileRecord,
}

/// A file as it is: what changes when it is replaced or written to, and not with its mode or its names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl State {
    /// None when there is no such file.
    fn of(path: &Utf8Path) -> SnapshotsResult<Option<Self>> {
        match fs::metadata(path) {
            Ok(it) => Ok(Some(Self {
                device: it.dev(),
                inode: it.ino(),
                bytes: it.len(),
                modified: (it.mtime(), it.mtime_nsec()),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SnapshotStoreError::file("examine", path, source)),
        }
    }
}

/// A frozen layer whose digest is being taken, a piece at a time. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct Sealing {
    layer: LayerId,
    before: State,
    hashing: Hashing,
}

/// How far the taking of a digest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealProgress {
    /// So many bytes were read, and there is more.
    More(u64),
    /// So many bytes were read, and the layer has a digest now.
    Sealed(u64),
    /// The layer is gone, or is not as it was when this was begun: it has no digest.
    Changed,
}

impl Snapshots {
    /// Begins to take the digest of a layer that nobody writes to any more: who calls this knows it. None when it has
    /// one, or when there is no such layer.
    ///
    /// # Errors
    /// The layer cannot be read.
    pub fn begin_seal(&self, layer: &LayerId) -> SnapshotsResult<Option<Sealing>> {
        let path = self.layer_path(layer);
        if self.has_digest(layer)? {
            return Ok(None);
        }
        let Some(before) = State::of(&path)? else { return Ok(None) };
        match Hashing::open(&path, Form::Blocks) {
            Ok(hashing) => Ok(Some(Sealing { layer: layer.clone(), before, hashing })),
            Err(SnapshotStoreError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads about so many bytes more of a layer. With the last ones the digest is there, durably.
    ///
    /// # Errors
    /// The layer could not be read, or the digest not written: it has none then, and may get one later.
    pub fn seal(&self, sealing: &mut Sealing, at_most: u64) -> SnapshotsResult<SealProgress> {
        let path = self.layer_path(&sealing.layer);
        let (read, digest) = match sealing.hashing.read(at_most)? {
            // Nobody needs the digest of a layer that was merged into another one, or deleted.
            Piece::More(_) if !sealing.still_holds(&path)? => return Ok(SealProgress::Changed),
            Piece::More(read) => return Ok(SealProgress::More(read)),
            Piece::Last(read, digest) => (read, digest),
        };
        let file = FileRecord { bytes: sealing.before.bytes, digest };
        let is_there = self.put_digest(sealing, &LayerDigest { layer: sealing.layer.clone(), file })?;
        Ok(if is_there { SealProgress::Sealed(read) } else { SealProgress::Changed })
    }

    /// Whether the digest of a layer is there.
    pub(super) fn has_digest(&self, layer: &LayerId) -> SnapshotsResult<bool> {
        let path = self.digest_path(layer);
        path.try_exists().map_err(|source| SnapshotStoreError::file("examine", &path, source))
    }

    /// Reads a layer against its digest, unless it has none or that was done since the host booted.
    pub(super) fn verify_layer(&self, layer: &LayerId) -> SnapshotsResult<()> {
        let Some(recorded) = self.layer_digest(layer)? else { return Ok(()) };
        let path = self.layer_path(layer);
        let content = Content { path: &path, recorded: &recorded, form: Form::Blocks };
        verified::verify_once(&self.verified_path(layer), &self.inner.verifying, &[content]).map(drop)
    }

    /// Refuses a layer of which it is known that it is damaged. Nothing is read.
    pub(super) fn refuse_damaged_layer(&self, layer: &LayerId) -> SnapshotsResult<()> {
        let Some(recorded) = self.layer_digest(layer)? else { return Ok(()) };
        let path = self.layer_path(layer);
        let content = Content { path: &path, recorded: &recorded, form: Form::Blocks };
        let known = verified::look(&self.verified_path(layer), &[content])?;
        known.is_whole(|_| path.as_path()).map(drop)
    }

    /// Begins to read a layer against its digest, whatever is remembered of it; none when it has no digest.
    pub(super) fn begin_verify_layer(&self, layer: &LayerId) -> SnapshotsResult<Option<verified::Verifying>> {
        let Some(recorded) = self.layer_digest(layer)? else { return Ok(None) };
        let path = self.layer_path(layer);
        let content = Content { path: &path, recorded: &recorded, form: Form::Blocks };
        verified::Verifying::begin(&self.verified_path(layer), &[content]).map(Some)
    }

    /// The layers that have a digest.
    pub(super) fn layers_with_digest(&self) -> SnapshotsResult<Vec<LayerId>> {
        let entries = entries(&self.inner.digests)?;
        Ok(entries.iter().filter_map(|entry| entry.file_name().parse().ok()).collect())
    }

    /// Removes what is known of layers that are neither there nor `reached`. Called while nothing comes or goes.
    pub(super) fn sweep_digests(&self, reached: &BTreeSet<LayerId>) -> SnapshotsResult<()> {
        for entry in entries(&self.inner.digests)? {
            let name = entry.file_name();
            // One in the making is its maker's, who finds that the layer is gone; at the next start it is nobody's.
            if name.starts_with(MAKING) {
                continue;
            }
            let layer: Option<LayerId> = name.strip_suffix(VERIFIED).unwrap_or(name).parse().ok();
            let is_needed = match layer {
                Some(layer) => reached.contains(&layer) || State::of(&self.layer_path(&layer))?.is_some(),
                None => false,
            };
            if !is_needed {
                remove_any(entry.path())?;
                self.inner.steps.done(Step::DigestIsRemoved)?;
            }
        }
        Ok(())
    }

    /// Gives a digest its name, durably, if the layer is still as it was read; whether it is.
    fn put_digest(&self, sealing: &Sealing, digest: &LayerDigest) -> SnapshotsResult<bool> {
        let layer = &sealing.layer;
        let (path, place) = (self.layer_path(layer), self.digest_path(layer));
        let half = self.inner.digests.join(format!("{MAKING}{layer}"));
        let written = || -> SnapshotsResult<bool> {
            write_durably(&half, &sealed::to_text(digest, &place)?, 0o600)?;
            self.inner.steps.done(Step::DigestIsWritten)?;
            // No layer goes between the look at it and the name of its digest.
            let _reach = self.lock_reach();
            if !sealing.still_holds(&path)? {
                return Ok(false);
            }
            rename(&half, &place, RenameFlags::empty())
                .map_err(|error| SnapshotStoreError::file("put in place", &place, error.into()))?;
            Ok(true)
        };
        let written = written();
        if !matches!(written, Ok(true)) {
            remove_any(&half)?;
            return written;
        }
        self.inner.steps.done(Step::DigestHasItsName)?;
        sync(&self.inner.digests)?;
        self.inner.steps.done(Step::DigestIsDurable)?;
        // It was read just now.
        let content = Content { path: &path, recorded: &digest.file, form: Form::Blocks };
        match verified::remember(&self.verified_path(layer), &[content]) {
            // The layer has gone meanwhile.
            Err(SnapshotStoreError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        Ok(true)
    }

    /// What is recorded of a layer's file, if anything is.
    fn layer_digest(&self, layer: &LayerId) -> SnapshotsResult<Option<FileRecord>> {
        let path = self.digest_path(layer);
        let Some(recorded) = sealed::read::<LayerDigest>(&path)? else { return Ok(None) };
        manifest::refuse_difference(&path, [("layer", recorded.layer.to_string(), layer.to_string())])?;
        Ok(Some(recorded.file))
    }

    /// Where the digest of a layer is, or is to be.
    pub(super) fn digest_path(&self, layer: &LayerId) -> Utf8PathBuf {
        self.inner.digests.join(layer.as_str())
    }

    fn verified_path(&self, layer: &LayerId) -> Utf8PathBuf {
        self.inner.digests.join(format!("{layer}{VERIFIED}"))
    }
}

impl Sealing {
    fn still_holds(&self, path: &Utf8Path) -> SnapshotsResult<bool> {
        Ok(State::of(path)?.as_ref() == Some(&self.before))
    }
}
