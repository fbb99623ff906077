//! Bases: memory and disk of warm snapshots, kept for as long as something stands on them, whatever becomes
//! of the cache that they come from.
//!
//! A machine that boots from the layers of a sandbox has no such memory. Its base is one *of zeros*: a memory that is a
//! single hole, and the disk of the base that the layers name by its path, which stays where it is for that.

use std::{
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    str::FromStr,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};
use wrenn_types::{DiskMib, Shape};
use wrenn_vmm::{DiskSpec, VmmIdentity};

use super::{
    Extent, MAKING, Snapshots, SnapshotsResult, Step, VERIFIED, begin_grace, make_directory, sealed,
};
use crate::{
    rootfs::copy_content,
    snapshot_store::{
        Damage, Digest, FileRecord, Manifest as WarmManifest, SnapshotKey, SnapshotStoreError, Subject,
        WarmSnapshot, check_size, digest,
        files::{make_durable, remove_directory, rename, sync, write_durably},
        manifest,
        verified::{self, Content, Form, Known},
    },
};

/// How many digits of the digest of a warm snapshot's manifest are in a key: 64 bits tell the few snapshots
/// of one key apart that a host has in its life.
const DIGEST_DIGITS: usize = 16;
/// In the directory of a base: whether its disk was verified since the host booted, where only that is used.
const VERIFIED_DISK: &str = "verified-disk.json";
/// The number of the disk among the contents of a base.
const DISK: usize = 1;
/// The end of the key of a base of zeros.
const ZEROS: &str = ".zeros";

/// What a base is: the key of a warm snapshot, and the digest of the manifest that it had. Two warm snapshots
/// for the same things have the same key and another memory. Written `KEY.DIGEST`, in lower-case hexadecimal
/// digits, or `KEY.DIGEST.zeros` for a base with the same disk and a memory of zeros: safe as a part of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BaseKey(String);

/// The text is not the key of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the key of a base is 32 lower-case hexadecimal digits, a dot, 16 more, and for one of zeros the word .zeros"
)]
pub struct ParseBaseKeyError;

impl BaseKey {
    /// The base that a warm snapshot is, or would be.
    #[must_use]
    pub fn of(warm: &WarmManifest) -> Self {
        let digest = Digest::of_bytes(&warm.to_json());
        Self(format!("{}.{}", warm.key, &digest.as_str()[..DIGEST_DIGITS]))
    }

    /// The base of zeros with the same disk; of one of zeros it is that itself.
    #[must_use]
    pub fn zeros(&self) -> Self {
        Self(format!("{}{ZEROS}", self.of_disk()))
    }

    /// The base that holds the disk of this one: it is that itself, unless it is one of zeros.
    #[must_use]
    pub fn of_disk(&self) -> Self {
        Self(self.0.strip_suffix(ZEROS).unwrap_or(&self.0).to_owned())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of the warm snapshot, without the digest. None is never answered for a key that was parsed.
    pub(crate) fn warm(&self) -> Option<SnapshotKey> {
        self.0.split_once('.').and_then(|(key, _)| SnapshotKey::from_name(key))
    }
}

impl FromStr for BaseKey {
    type Err = ParseBaseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseBaseKeyError> {
        let is_digits = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match text.strip_suffix(ZEROS).unwrap_or(text).split_once('.') {
            Some((key, digest))
                if SnapshotKey::from_name(key).is_some()
                    && digest.len() == DIGEST_DIGITS
                    && is_digits(digest) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(ParseBaseKeyError),
        }
    }
}

impl TryFrom<String> for BaseKey {
    type Error = ParseBaseKeyError;

    fn try_from(text: String) -> Result<Self, ParseBaseKeyError> {
        text.parse()
    }
}

impl From<BaseKey> for String {
    fn from(key: BaseKey) -> Self {
        key.0
    }
}

impl fmt::Display for BaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Memory and disk that sandboxes stand on. Neither ever changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its name.
    pub key: BaseKey,
    /// The directory that holds all of it.
    pub dir: Utf8PathBuf,
    /// The guest's memory, of the size that `shape` says. To be mapped privately.
    pub memory: Utf8PathBuf,
    /// What is below the lowest layer.
    pub disk: DiskSpec,
    /// Size of that disk as the guest sees it.
    pub disk_size: DiskMib,
    /// CPUs and memory.
    pub shape: Shape,
    /// The program that saved it.
    pub vmm: VmmIdentity,
    /// Id of the bundle of kernel and initramfs.
    pub guest: String,
    /// Id of the template's image.
    pub image: String,
}

/// The manifest of a base. It does not depend on the format of the manifests of warm snapshots: what stands
/// on a base outlives that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BaseManifest {
    key: BaseKey,
    subject: Subject,
    memory: FileRecord,
    disk: FileRecord,
}

impl BaseManifest {
    pub(super) fn contents<'a>(&'a self, base: &'a Base) -> [Content<'a>; 2] {
        [
            Content { path: &base.memory, recorded: &self.memory, form: Form::Blocks },
            Content { path: &base.disk.path, recorded: &self.disk, form: Form::Blocks },
        ]
    }

    /// The base in `dir`, which is or is to be in the folder `bases`.
    fn at(&self, dir: Utf8PathBuf, bases: &Utf8Path) -> Base {
        let Subject { guest, image, vmm, shape, disk, disk_format } = self.subject.clone();
        let of_disk = self.key.of_disk();
        let path =
            if of_disk == self.key { dir.join("disk") } else { bases.join(of_disk.as_str()).join("disk") };
        Base {
            key: self.key.clone(),
            memory: dir.join("memory"),
            disk: DiskSpec { path, format: disk_format },
            dir,
            disk_size: disk,
            shape,
            vmm,
            guest,
            image,
        }
    }
}

/// How a file got a name of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// It is the same file.
    Linked,
    /// It is another one: the filesystems differ, or this one has no hard links.
    Copied,
}

/// A directory in the making: removed again unless it is kept.
#[derive(Debug)]
struct Unfinished {
    dir: Utf8PathBuf,
    is_kept: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = remove_directory(&self.dir)
        {
            // The next start tries again.
            tracing::warn!(error = &error as &dyn std::error::Error, "a half-made base stays for now");
        }
    }
}

impl Snapshots {
    /// Keeps a warm snapshot's memory and disk under names of our own, once per content: as hard links, or as
    /// copies where the filesystems differ. Cheap when they are here already. The cache may forget the
    /// snapshot then. The grace of the base begins anew.
    ///
    /// Of `warm`, the contents were verified by its store. A copy is read against the digests once; a link is
    /// the same file.
    ///
    /// # Errors
    /// A base of this name that is damaged is refused with the name of the file. After any other error there
    /// is none, or a whole one.
    pub fn hold(&self, warm: &WarmSnapshot) -> SnapshotsResult<Base> {
        let key = BaseKey::of(&warm.manifest);
        if let Some(base) = self.held(&key, warm)? {
            return Ok(base);
        }
        // It guards no data: what a panic left is removed below.
        let _one = self.inner.holding.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match self.held(&key, warm)? {
            Some(base) => Ok(base),
            None => self.make_base(key, warm),
        }
    }

    /// A base that something stands on already, with files of the right sizes; their contents are not read, whatever
    /// is known of them. The grace of the base begins anew. None when there is no such base.
    ///
    /// # Errors
    /// One that is not whole is refused with the name of the file.
    pub fn find_base(&self, key: &BaseKey) -> SnapshotsResult<Option<Base>> {
        Ok(self.base_in_use(key)?.map(|(_, base)| base))
    }

    /// A base whose contents were verified since the host booted: now, if not before. The grace of the base
    /// begins anew. None when there is no such base.
    ///
    /// # Errors
    /// One that is damaged is refused with the name of the file.
    pub fn base(&self, key: &BaseKey) -> SnapshotsResult<Option<Base>> {
        self.base_for(key, Extent::Machine)
    }

    /// The same, for what uses only so much of it: whatever becomes of a memory that nobody maps is no matter.
    pub(super) fn base_for(&self, key: &BaseKey, extent: Extent) -> SnapshotsResult<Option<Base>> {
        let Some((manifest, base)) = self.base_in_use(key)? else { return Ok(None) };
        match extent {
            Extent::Machine => self.verify_base(&manifest, &base)?,
            Extent::Disk => self.verify_disk(&manifest, &base)?,
        }
        Ok(Some(base))
    }

    /// The base of zeros beside a base: for a machine that boots, on a disk whose layers stand on `key`. Cheap when
    /// it is here already. The grace of both begins anew.
    ///
    /// # Errors
    /// As [`Self::base`]; there is none without the base that holds the disk.
    pub fn hold_zeros(&self, key: &BaseKey) -> SnapshotsResult<Base> {
        let zeros = key.zeros();
        if let Some(base) = self.base(&zeros)? {
            return Ok(base);
        }
        // As for a hold.
        let _one = self.inner.holding.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match self.base(&zeros)? {
            Some(base) => Ok(base),
            None => self.make_zeros(zeros),
        }
    }

    pub(super) fn base_dir(&self, key: &BaseKey) -> Utf8PathBuf {
        self.inner.bases.join(key.as_str())
    }

    /// A base that is there with files of the right sizes; their contents are not read. Without a directory
    /// there is none; a directory without a manifest is damage, since bases come and go as a whole.
    pub(super) fn read_base(&self, key: &BaseKey) -> SnapshotsResult<Option<(BaseManifest, Base)>> {
        let dir = self.base_dir(key);
        let path = dir.join(manifest::FILE_NAME);
        let Some(recorded) = sealed::read::<BaseManifest>(&path)? else {
            let there =
                dir.try_exists().map_err(|source| SnapshotStoreError::file("examine", &dir, source))?;
            return if there {
                Err(SnapshotStoreError::Damaged { path, damage: Damage::Missing })
            } else {
                Ok(None)
            };
        };
        manifest::refuse_difference(&path, [("key", recorded.key.to_string(), key.to_string())])?;
        let base = recorded.at(dir, &self.inner.bases);
        check_size(&base.memory, recorded.memory.bytes)?;
        check_size(&base.disk.path, recorded.disk.bytes)?;
        Ok(Some((recorded, base)))
    }

    fn base_in_use(&self, key: &BaseKey) -> SnapshotsResult<Option<(BaseManifest, Base)>> {
        let _reach = self.lock_reach();
        self.begin_grace_of_base(key)?;
        self.read_base(key)
    }

    /// Notes that a base is used now, and the one that holds its disk.
    pub(super) fn begin_grace_of_base(&self, key: &BaseKey) -> SnapshotsResult<()> {
        begin_grace(&self.base_dir(&key.of_disk()))?;
        begin_grace(&self.base_dir(key))
    }

    /// The base that `warm` is, if it was held before.
    fn held(&self, key: &BaseKey, warm: &WarmSnapshot) -> SnapshotsResult<Option<Base>> {
        let Some((manifest, base)) = self.base_in_use(key)? else { return Ok(None) };
        if is_same_file(&base.memory, &warm.files.memory)? && is_same_file(&base.disk.path, &warm.disk.path)?
        {
            verified::remember(&base.dir.join(VERIFIED), &manifest.contents(&base))?;
        } else {
            self.verify_base(&manifest, &base)?;
        }
        Ok(Some(base))
    }

    /// Refuses a base of which it is known that what is used of it is damaged. Nothing is read.
    pub(super) fn refuse_damaged_base(
        &self,
        manifest: &BaseManifest,
        base: &Base,
        extent: Extent,
    ) -> SnapshotsResult<()> {
        let contents = manifest.contents(base);
        let known = match (extent, verified::look(&base.dir.join(VERIFIED), &contents)?) {
            (Extent::Machine, known) | (Extent::Disk, known @ Known::Damaged(DISK, _)) => known,
            (Extent::Disk, _) => {
                let known = verified::look(&base.dir.join(VERIFIED_DISK), &contents[DISK..])?;
                return known.is_whole(|_| contents[DISK].path).map(drop);
            }
        };
        known.is_whole(|at| contents[at].path).map(drop)
    }

    /// As [`Self::verify_base`], of the disk alone. Where all of the base was read, that counts.
    fn verify_disk(&self, manifest: &BaseManifest, base: &Base) -> SnapshotsResult<()> {
        let contents = manifest.contents(base);
        match verified::look(&base.dir.join(VERIFIED), &contents)? {
            known @ (Known::Whole | Known::Damaged(DISK, _)) => {
                known.is_whole(|at| contents[at].path).map(drop)
            }
            Known::Nothing | Known::Damaged(..) => {
                let record = base.dir.join(VERIFIED_DISK);
                verified::verify_once(&record, &self.inner.verifying, &contents[DISK..]).map(drop)
            }
        }
    }

    fn verify_base(&self, manifest: &BaseManifest, base: &Base) -> SnapshotsResult<()> {
        let record = base.dir.join(VERIFIED);
        verified::verify_once(&record, &self.inner.verifying, &manifest.contents(base)).map(drop)
    }

    fn make_base(&self, key: BaseKey, warm: &WarmSnapshot) -> SnapshotsResult<Base> {
        let steps = &self.inner.steps;
        let unfinished = self.begin_base(&key)?;
        let manifest = BaseManifest {
            key,
            subject: warm.manifest.subject.clone(),
            memory: warm.manifest.memory.clone(),
            disk: warm.manifest.disk.clone(),
        };
        let made = manifest.at(unfinished.dir.clone(), &self.inner.bases);
        let memory = give_name(&warm.files.memory, &made.memory)?;
        steps.done(Step::MemoryHasOurName)?;
        let disk = give_name(&warm.disk.path, &made.disk.path)?;
        steps.done(Step::DiskHasOurName)?;
        if memory == Named::Copied || disk == Named::Copied {
            self.verify_base(&manifest, &made)?;
        } else {
            verified::remember(&made.dir.join(VERIFIED), &manifest.contents(&made))?;
        }
        self.put_base_in_place(unfinished, &manifest)
    }

    fn make_zeros(&self, key: BaseKey) -> SnapshotsResult<Base> {
        let of_disk = key.of_disk();
        let (with_disk, base) = self.base_in_use(&of_disk)?.ok_or_else(|| self.no_base(&of_disk))?;
        self.verify_disk(&with_disk, &base)?;
        let unfinished = self.begin_base(&key)?;
        let memory = unfinished.dir.join("memory");
        let bytes = with_disk.memory.bytes;
        let make = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(&memory)?;
            file.set_len(bytes)?;
            make_durable(&file)
        };
        make().map_err(|source| SnapshotStoreError::file("make", &memory, source))?;
        let digest = digest::of_large_file(&memory)?;
        let manifest = BaseManifest { key, memory: FileRecord { bytes, digest }, ..with_disk };
        self.inner.steps.done(Step::MemoryHasOurName)?;
        let made = manifest.at(unfinished.dir.clone(), &self.inner.bases);
        verified::remember(&made.dir.join(VERIFIED), &manifest.contents(&made))?;
        self.put_base_in_place(unfinished, &manifest)
    }

    fn begin_base(&self, key: &BaseKey) -> SnapshotsResult<Unfinished> {
        let dir = self.inner.bases.join(format!("{MAKING}{key}"));
        // Who holds the lock is the only one who may have such a directory.
        remove_directory(&dir)?;
        make_directory(&dir)?;
        let unfinished = Unfinished { dir, is_kept: false };
        self.inner.steps.done(Step::BaseIsBegun)?;
        Ok(unfinished)
    }

    /// Writes the manifest of a base whose files are there, and gives it its name.
    fn put_base_in_place(
        &self,
        mut unfinished: Unfinished,
        manifest: &BaseManifest,
    ) -> SnapshotsResult<Base> {
        let steps = &self.inner.steps;
        let path = unfinished.dir.join(manifest::FILE_NAME);
        write_durably(&path, &sealed::to_text(manifest, &path)?, 0o600)?;
        steps.done(Step::BaseManifestIsWritten)?;
        sync(&unfinished.dir)?;
        steps.done(Step::BaseIsDurable)?;

        let place = self.base_dir(&manifest.key);
        {
            let _reach = self.lock_reach();
            rename(&unfinished.dir, &place, RenameFlags::NOREPLACE)
                .map_err(|error| SnapshotStoreError::file("put in place", &place, error.into()))?;
        }
        // From now on somebody may name it: what fails below leaves it there, whole, for the next one.
        unfinished.is_kept = true;
        steps.done(Step::BaseIsInPlace)?;
        sync(&self.inner.bases)?;
        steps.done(Step::BasePlaceIsDurable)?;
        Ok(manifest.at(place, &self.inner.bases))
    }
}

fn is_same_file(one: &Utf8Path, other: &Utf8Path) -> SnapshotsResult<bool> {
    let identity = |path: &Utf8Path| match fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        // The cache may have forgotten it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SnapshotStoreError::file("examine", path, source)),
    };
    Ok(identity(one)?.is_some_and(|it| identity(other).is_ok_and(|other| other == Some(it))))
}

/// Gives a file a second name, or its content a second file, which is durable then.
fn give_name(from: &Utf8Path, to: &Utf8Path) -> SnapshotsResult<Named> {
    match fs::hard_link(from, to) {
        Ok(()) => return Ok(Named::Linked),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::CrossesDevices
                    | io::ErrorKind::TooManyLinks
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::Unsupported
            ) => {}
        Err(source) => return Err(SnapshotStoreError::file("link", from, source)),
    }
    let copy = || {
        let source = File::open(from)?;
        let target = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to)?;
        copy_content(&source, &target)?;
        target.set_permissions(Permissions::from_mode(0o400))?;
        make_durable(&target)
    };
    copy().map_err(|source| SnapshotStoreError::file("copy to", to, source))?;
    Ok(Named::Copied)
}
