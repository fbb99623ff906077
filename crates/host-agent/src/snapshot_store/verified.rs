//! Which contents were read and found whole since the host booted.
//!
//! Remembered in one small file per snapshot, by what a file cannot keep when it is changed: inode, size
//! and time of change. A boot of the host makes all of it void, whatever became of the file.

use std::{fs, io, os::unix::fs::MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::{SnapshotStoreError, SnapshotStoreResult, WarmSnapshot, check_digest, check_size, digest};

/// Whether the contents had to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// They were, now.
    Read,
    /// They were since the host booted, and the files are the same.
    Remembered,
}

/// What is remembered of one snapshot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    boot: String,
    memory: FileMark,
    disk: FileMark,
}

/// A file as it was when it was read, and the digest that it had.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileMark {
    device: u64,
    inode: u64,
    bytes: u64,
    changed_seconds: i64,
    changed_nanoseconds: i64,
    digest: digest::Digest,
}

impl FileMark {
    fn of(path: &Utf8Path, digest: &digest::Digest) -> SnapshotStoreResult<Self> {
        let metadata =
            fs::metadata(path).map_err(|source| SnapshotStoreError::file("examine", path, source))?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed_seconds: metadata.ctime(),
            changed_nanoseconds: metadata.ctime_nsec(),
            digest: digest.clone(),
        })
    }
}

impl Record {
    /// What would be remembered of the files as they are now.
    fn now(snapshot: &WarmSnapshot) -> SnapshotStoreResult<Self> {
        let boot_id = Utf8Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_id)
            .map_err(|source| SnapshotStoreError::file("read", boot_id, source))?;
        Ok(Self {
            boot: boot.trim().to_owned(),
            memory: FileMark::of(&snapshot.files.memory, &snapshot.manifest.memory.digest)?,
            disk: FileMark::of(&snapshot.disk.path, &snapshot.manifest.disk.digest)?,
        })
    }
}

fn record_path(directory: &Utf8Path, snapshot: &WarmSnapshot) -> Utf8PathBuf {
    directory.join(snapshot.manifest.key.as_str())
}

/// See [`super::SnapshotStore::verify_contents_once`].
pub(super) fn verify_once(
    directory: &Utf8Path,
    snapshot: &WarmSnapshot,
) -> SnapshotStoreResult<Verification> {
    let path = record_path(directory, snapshot);
    let contents =
        [(&snapshot.files.memory, &snapshot.manifest.memory), (&snapshot.disk.path, &snapshot.manifest.disk)];
    for (file, recorded) in contents {
        check_size(file, recorded.bytes)?;
    }
    // Taken before the files are read, so that a change while they are read is not taken for verified.
    let now = Record::now(snapshot)?;
    if remembered(&path).is_some_and(|record| record == now) {
        return Ok(Verification::Remembered);
    }
    for (file, recorded) in contents {
        check_digest(file, &recorded.digest, &digest::of_large_file(file)?)?;
    }
    write(&path, &now)?;
    Ok(Verification::Read)
}

/// Remembers a snapshot whose digests were just taken from its files.
pub(super) fn remember(directory: &Utf8Path, snapshot: &WarmSnapshot) -> SnapshotStoreResult<()> {
    write(&record_path(directory, snapshot), &Record::now(snapshot)?)
}

/// What is remembered; a record that cannot be read remembers nothing.
fn remembered(path: &Utf8Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Not made durable: it says nothing after a boot.
fn write(path: &Utf8Path, record: &Record) -> SnapshotStoreResult<()> {
    // Several stacks may share the directory.
    let half = path.with_extension(format!("new-{}", std::process::id()));
    let text = serde_json::to_vec(record).expect("plain data is always JSON");
    let written: io::Result<()> = fs::write(&half, text).and_then(|()| fs::rename(&half, path));
    written.map_err(|source| SnapshotStoreError::file("write", path, source))
}
