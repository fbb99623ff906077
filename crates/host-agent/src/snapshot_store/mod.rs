//! Warm template snapshots: what every create maps instead of booting.
//!
//! ```text
//! DIR/KEY/manifest.json   what it is for, and the size and digest of each file; written last
//!        /memory          the guest's memory, mapped privately by every clone
//!        /state           the devices
//!        /disk            the template machine's disk, whole and frozen: the base of every clone's disk
//! DIR/.lock-KEY           locked by who makes KEY
//! DIR/.building-KEY       a snapshot in the making, or an old one on its way out
//! ```
//!
//! The key is a hash over everything that the snapshot depends on ([`Subject`]), so another kernel, image
//! or VMM never finds it. The directory may be shared by several stacks of one machine, and the files in
//! it never change once they have their name.
//!
//! ```text
//!            open: is there one? ──yes──► WarmSnapshot
//!                    │ no, or one that cannot be used
//!                    ▼
//!  begin: lock KEY (bounded) ── someone made it meanwhile ──► Begin::Ready
//!                    │ still none
//!                    ▼
//!        Begin::Building: the caller boots, saves and freezes into .building-KEY
//!                    │ commit                          │ dropped, or killed
//!                    ▼                                 ▼
//!  sync files ► write manifest ► sync ► rename      removed, by the drop or by the next one
//!  it ► sync ► put the directory in its place       who gets the lock
//! ```
//!
//! What is verified when: the manifest and the device state at every [`SnapshotStore::open`]; memory and
//! disk, which are large, once per boot of the host by [`SnapshotStore::verify_contents_once`]. So a
//! flipped bit does not reach a guest, and a warm restore does not read what it does not need.
//!
//! A snapshot that cannot be used is replaced, never repaired. Machines that run on the old one keep its
//! files open and do not notice; a disk that is to be opened anew later must not name a base by a path
//! that was replaced since, so whatever keeps a disk for longer than its machine (a pause) has to hold on
//! to the layer as well: [`crate::snapshots::Snapshots::hold`].

mod building;
pub(crate) mod digest;
mod error;
pub(crate) mod files;
mod lock;
pub(crate) mod manifest;
mod sparse;
mod unused;
pub(crate) mod verified;

#[cfg(test)]
mod tests;

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    sync::Arc,
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_vmm::{DiskSpec, SnapshotFiles};

pub use building::{Begin, Building};
pub use digest::{Digest, ParseDigestError};
pub use error::{Damage, SnapshotStoreError};
pub use manifest::{FileRecord, Manifest, SnapshotKey, Subject};
pub use verified::Verification;
use verified::{Content, Form, Readers};

/// A shorthand for this module.
pub type SnapshotStoreResult<T> = Result<T, SnapshotStoreError>;

/// No device state is larger: what is larger is not one.
pub(crate) const LARGEST_STATE: u64 = 64 << 20;

/// The warm snapshots of a host. Clones are the same store.
#[derive(Debug, Clone)]
pub struct SnapshotStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: Utf8PathBuf,
    /// Where it is remembered which contents were verified since the host booted.
    verified: Utf8PathBuf,
    /// One verification of each snapshot at a time: the second finds what the first remembers.
    verifying: Readers,
}

/// A snapshot that can be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmSnapshot {
    /// The directory that holds all of it.
    pub dir: Utf8PathBuf,
    /// Memory and devices, as a VMM driver takes them.
    pub files: SnapshotFiles,
    /// The base of the disks of its clones.
    pub disk: DiskSpec,
    /// What is recorded of it.
    pub manifest: Manifest,
}

impl SnapshotStore {
    /// A store in `directory`, which is made if it is not there; what a killed builder left in it is
    /// removed, and what was not used for a month. `run_directory` is one that is empty after a boot, like `/run`.
    ///
    /// # Errors
    /// One of the directories cannot be made or read.
    pub fn new(directory: &Utf8Path, run_directory: &Utf8Path) -> SnapshotStoreResult<Self> {
        let verified = run_directory.join("verified-snapshots");
        for path in [directory, &verified] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|source| SnapshotStoreError::file("make", path, source))?;
        }
        // Disks name their base by its path, so it must not depend on a link that is turned later.
        let directory = directory
            .canonicalize_utf8()
            .map_err(|source| SnapshotStoreError::file("find", directory, source))?;
        let store = Self { inner: Arc::new(Inner { directory, verified, verifying: Readers::default() }) };
        store.collect()?;
        store.forget_unused()?;
        Ok(store)
    }

    /// The snapshot for `subject`, if there is one. Cheap enough for every create: it reads the manifest
    /// and the device state.
    ///
    /// # Errors
    /// One that [is to be made anew](SnapshotStoreError::is_unusable), or an error of the filesystem.
    pub fn open(&self, subject: &Subject) -> SnapshotStoreResult<Option<WarmSnapshot>> {
        let dir = self.inner.directory.join(subject.key().as_str());
        let path = dir.join(manifest::FILE_NAME);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SnapshotStoreError::file("read", &path, source)),
        };
        let text = unused::mark_used(&file).and_then(|()| io::read_to_string(&file));
        let text = text.map_err(|source| SnapshotStoreError::file("read", &path, source))?;
        let manifest = Manifest::parse(&text, &path)?;
        manifest.check(subject, &path)?;

        let at = Layout::of(&dir);
        check_size(&at.memory, manifest.memory.bytes)?;
        check_size(&at.disk, manifest.disk.bytes)?;
        check_size(&at.state, manifest.state.bytes)?;
        let state = digest::of_small_file(&at.state, LARGEST_STATE)?;
        check_digest(&at.state, &manifest.state.digest, &state)?;
        Ok(Some(WarmSnapshot {
            files: SnapshotFiles { memory: at.memory, state: at.state, pages: None },
            disk: DiskSpec { path: at.disk, format: subject.disk_format },
            dir,
            manifest,
        }))
    }

    /// Reads memory and disk against their digests, unless that was done since the host booted and the
    /// files are the same ones since. Blocks for as long as the reading takes.
    ///
    /// A snapshot that fails loses its manifest, and so is none from then on: the next [`Self::begin`]
    /// makes it anew.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`] names the file.
    pub fn verify_contents_once(&self, snapshot: &WarmSnapshot) -> SnapshotStoreResult<Verification> {
        let verified = verified::verify_once(
            &self.verified_record(snapshot),
            &self.inner.verifying,
            &contents_of(snapshot),
        );
        if matches!(verified, Err(SnapshotStoreError::Damaged { .. })) {
            self.condemn(snapshot);
        }
        verified
    }

    /// Has the contents of a snapshot read again when it is used next: there is doubt that they are still whole.
    pub fn forget_verified(&self, key: &SnapshotKey) {
        let record = self.inner.verified.join(key.as_str());
        match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %record, %error, "it is still remembered that a snapshot was verified");
            }
            _ => {}
        }
    }

    /// Remembers a snapshot whose digests were just taken from its files.
    fn remember_contents(&self, snapshot: &WarmSnapshot) -> SnapshotStoreResult<()> {
        verified::remember(&self.verified_record(snapshot), &contents_of(snapshot))
    }

    fn verified_record(&self, snapshot: &WarmSnapshot) -> Utf8PathBuf {
        self.inner.verified.join(snapshot.manifest.key.as_str())
    }

    /// Takes the manifest away, so that the snapshot is made anew. The files stay for the machines that run on them.
    pub(crate) fn condemn(&self, snapshot: &WarmSnapshot) {
        let manifest = snapshot.dir.join(manifest::FILE_NAME);
        if let Err(error) = fs::rename(&manifest, snapshot.dir.join("manifest.damaged.json")) {
            tracing::error!(path = %manifest, %error, "a damaged snapshot could not be set aside");
        }
    }
}

/// The large files, which are read once per boot.
fn contents_of(snapshot: &WarmSnapshot) -> [Content<'_>; 2] {
    let WarmSnapshot { files, disk, manifest, .. } = snapshot;
    [
        Content { path: &files.memory, recorded: &manifest.memory, form: Form::Blocks },
        Content { path: &disk.path, recorded: &manifest.disk, form: Form::Blocks },
    ]
}

/// Where the files of a snapshot are.
#[derive(Debug)]
struct Layout {
    memory: Utf8PathBuf,
    state: Utf8PathBuf,
    disk: Utf8PathBuf,
}

impl Layout {
    fn of(dir: &Utf8Path) -> Self {
        Self { memory: dir.join("memory"), state: dir.join("state"), disk: dir.join("disk") }
    }
}

pub(crate) fn check_size(path: &Utf8Path, recorded: u64) -> SnapshotStoreResult<()> {
    let damage = match fs::metadata(path) {
        Ok(metadata) if metadata.len() == recorded => return Ok(()),
        Ok(metadata) => Damage::Size { recorded, found: metadata.len() },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Damage::Missing,
        Err(source) => return Err(SnapshotStoreError::file("examine", path, source)),
    };
    Err(SnapshotStoreError::Damaged { path: path.to_owned(), damage })
}

pub(crate) fn check_digest(path: &Utf8Path, recorded: &Digest, found: &Digest) -> SnapshotStoreResult<()> {
    if recorded == found {
        Ok(())
    } else {
        Err(SnapshotStoreError::Damaged { path: path.to_owned(), damage: Damage::Content })
    }
}
