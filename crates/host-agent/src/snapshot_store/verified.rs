//! Which contents were read and found whole since the host booted.
//!
//! Remembered in one small file for each set of files, by what a file cannot keep when it is changed: inode,
//! size, and time of change. A boot of the host makes all of it void, whatever became of the file.
//!
//! A name that is given to a file, or taken from it, moves its time of change and leaves its bytes alone. So
//! where the number of names is another one, the time of the last write decides.

use std::{fs, io, os::unix::fs::MetadataExt, sync::Mutex};

use camino::Utf8Path;
use serde::{Deserialize, Serialize};

use super::{FileRecord, SnapshotStoreError, SnapshotStoreResult, check_digest, check_size, digest};

/// Whether the contents had to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// They were, now.
    Read,
    /// They were since the host booted, and the files are the same.
    Remembered,
}

/// How the digest of a file is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Of all bytes: [`digest::of_file`].
    Plain,
    /// Of the blocks that are not zero: [`digest::of_large_file`].
    Blocks,
}

/// A file, and what it must be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content<'a> {
    /// Where it is.
    pub(crate) path: &'a Utf8Path,
    /// What its manifest says of it.
    pub(crate) recorded: &'a FileRecord,
    /// In which form the digest is.
    pub(crate) form: Form,
}

impl Content<'_> {
    fn check(&self) -> SnapshotStoreResult<()> {
        let found = match self.form {
            Form::Plain => digest::of_file(self.path)?,
            Form::Blocks => digest::of_large_file(self.path)?,
        };
        check_digest(self.path, &self.recorded.digest, &found)
    }
}

/// What is remembered of one set of files.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    boot: String,
    files: Vec<FileMark>,
}

/// A file as it was when it was read, and the digest that it had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileMark {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    digest: digest::Digest,
    changed: (i64, i64),
    names: u64,
}

impl FileMark {
    fn of(content: &Content<'_>) -> SnapshotStoreResult<Self> {
        let metadata = fs::metadata(content.path)
            .map_err(|source| SnapshotStoreError::file("examine", content.path, source))?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            digest: content.recorded.digest.clone(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            names: metadata.nlink(),
        })
    }

    /// Whether the bytes are still those that this mark was made of.
    fn still_holds(&self, now: &Self) -> bool {
        let renamed = Self { changed: now.changed, names: now.names, ..self.clone() };
        self == now || (self.names != now.names && renamed == *now)
    }
}

impl Record {
    /// What would be remembered of the files as they are now.
    fn now(contents: &[Content<'_>]) -> SnapshotStoreResult<Self> {
        let boot_id = Utf8Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_id)
            .map_err(|source| SnapshotStoreError::file("read", boot_id, source))?;
        let files = contents.iter().map(FileMark::of).collect::<SnapshotStoreResult<_>>()?;
        Ok(Self { boot: boot.trim().to_owned(), files })
    }

    fn still_holds(&self, now: &Self) -> bool {
        self.boot == now.boot
            && self.files.len() == now.files.len()
            && self.files.iter().zip(&now.files).all(|(then, now)| then.still_holds(now))
    }
}

/// Reads `contents` against what is recorded of them, unless `record` says that it was done since the host
/// booted and the files are the same since. Of those that have to read, one at a time does: the second finds
/// what the first remembers.
///
/// # Errors
/// [`SnapshotStoreError::Damaged`] names the file.
pub(crate) fn verify_once(
    record: &Utf8Path,
    one_at_a_time: &Mutex<()>,
    contents: &[Content<'_>],
) -> SnapshotStoreResult<Verification> {
    for content in contents {
        check_size(content.path, content.recorded.bytes)?;
    }
    if is_remembered(record, &Record::now(contents)?) {
        return Ok(Verification::Remembered);
    }
    // A panic while it was held left nothing half done: the record is written last.
    let _one = one_at_a_time.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Taken before the files are read, so that a change while they are read is not taken for verified.
    let now = Record::now(contents)?;
    if is_remembered(record, &now) {
        return Ok(Verification::Remembered);
    }
    contents.iter().try_for_each(Content::check)?;
    write(record, &now);
    Ok(Verification::Read)
}

/// Remembers files whose digests were just taken, or which are the same files as others that were verified.
pub(crate) fn remember(record: &Utf8Path, contents: &[Content<'_>]) -> SnapshotStoreResult<()> {
    let now = Record::now(contents)?;
    if !is_remembered(record, &now) {
        write(record, &now);
    }
    Ok(())
}

/// Whether the files were verified as they are; a record that cannot be read remembers nothing.
fn is_remembered(path: &Utf8Path, now: &Record) -> bool {
    let Some(record) = fs::read(path).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok())
    else {
        return false;
    };
    let holds = record.still_holds(now);
    if holds && record != *now {
        // The names have changed: from now on it is this number of them that counts.
        write(path, now);
    }
    holds
}

/// Not made durable: it says nothing after a boot. What cannot be remembered, on a disk that is full, is
/// read again the next time.
fn write(path: &Utf8Path, record: &Record) {
    // Several stacks may share the directory.
    let half = path.with_extension(format!("new-{}", std::process::id()));
    let written: io::Result<()> = serde_json::to_vec(record)
        .map_err(io::Error::other)
        .and_then(|text| fs::write(&half, text))
        .and_then(|()| fs::rename(&half, path));
    if let Err(error) = written {
        tracing::warn!(%path, %error, "could not remember what was verified");
        let _ = fs::remove_file(&half);
    }
}
