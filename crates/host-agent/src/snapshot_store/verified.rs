//! Which contents were read since the host booted, and found whole or damaged.
//!
//! Remembered in one small file for each set of files, by what a file cannot keep when it is changed: inode,
//! size, and time of change. A boot of the host makes all of it void, whatever became of the file.
//!
//! ```text
//!  nothing is known ──read──► whole     used without reading
//!     ▲                 └───► damaged   refused without reading
//!     └── a file is another one, or was written to; a boot of the host
//! ```
//!
//! Who uses the files reads them at once ([`verify_once`]); who looks after them reads a piece at a time, and holds
//! nobody up ([`Verifying`]).
//!
//! A name that is given to a file, or taken from it, moves its time of change and leaves its bytes alone. So
//! where the number of names is another one, the time of the last write decides.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub(crate) use super::digest::Form;
use super::{
    Damage, FileRecord, SnapshotStoreError, SnapshotStoreResult, check_size,
    digest::{self, Hashing, Piece},
};

/// Whether the contents had to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// They were, now.
    Read,
    /// They were since the host booted, and the files are the same.
    Remembered,
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

/// What a disk cannot read is not there any more, as little as what has changed. Any other error tells of the moment.
fn is_unreadable(error: &SnapshotStoreError) -> bool {
    matches!(error, SnapshotStoreError::File { source, .. } if Errno::from_io_error(source) == Some(Errno::IO))
}

/// What is remembered of one set of files.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    boot: String,
    files: Vec<FileMark>,
    /// The number of the file that is not as it was recorded, if one is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    damaged: Option<usize>,
    /// Whether that is because it cannot be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_unreadable: bool,
}

/// What is known of files without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Nothing,
    Whole,
    /// The one with this number is damaged in this way.
    Damaged(usize, Damage),
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
    /// The same, with what is damaged of it.
    fn with_damage(self, at: usize, damage: Damage) -> Self {
        Self { damaged: Some(at), is_unreadable: damage == Damage::Unreadable, ..self }
    }

    /// What would be remembered of the files as they are now.
    fn now(contents: &[Content<'_>]) -> SnapshotStoreResult<Self> {
        let boot_id = Utf8Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_id)
            .map_err(|source| SnapshotStoreError::file("read", boot_id, source))?;
        let files = contents.iter().map(FileMark::of).collect::<SnapshotStoreResult<_>>()?;
        Ok(Self { boot: boot.trim().to_owned(), files, damaged: None, is_unreadable: false })
    }

    fn still_holds(&self, now: &Self) -> bool {
        self.boot == now.boot
            && self.files.len() == now.files.len()
            && self.files.iter().zip(&now.files).all(|(then, now)| then.still_holds(now))
    }
}

/// Who reads which set of files now: one at a time reads each, and nobody waits for the reading of another one.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    /// By the path of what is remembered of them; those that nobody reads go when the next one is read.
    of: Mutex<BTreeMap<Utf8PathBuf, Weak<Mutex<()>>>>,
}

impl Readers {
    fn of(&self, record: &Utf8Path) -> Arc<Mutex<()>> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        of.retain(|_, reader| reader.strong_count() > 0);
        if let Some(reader) = of.get(record).and_then(Weak::upgrade) {
            return reader;
        }
        let reader = Arc::default();
        of.insert(record.to_owned(), Arc::downgrade(&reader));
        reader
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
    readers: &Readers,
    contents: &[Content<'_>],
) -> SnapshotStoreResult<Verification> {
    if Verifying::begin(record, contents)?.is_remembered {
        return Ok(Verification::Remembered);
    }
    // A panic while it was held left nothing half done: the record is written last.
    let reader = readers.of(record);
    let _one = reader.lock().unwrap_or_else(PoisonError::into_inner);
    let mut verifying = Verifying::begin(record, contents)?;
    if verifying.is_remembered {
        return Ok(Verification::Remembered);
    }
    loop {
        match verifying.next(u64::MAX)? {
            Next::More(_) => {}
            Next::Whole(_) => {
                verifying.remember(None);
                return Ok(Verification::Read);
            }
            // It is refused also where it is another one by now: it was read for somebody who is to use it.
            Next::Damaged(path, damage) => {
                verifying.remember(Some(damage));
                return Err(SnapshotStoreError::Damaged { path, damage });
            }
        }
    }
}

/// Remembers files whose digests were just taken, or which are the same files as others that were verified.
///
/// # Errors
/// [`SnapshotStoreError::Damaged`] names a file that is known to be damaged: that stays so.
pub(crate) fn remember(record: &Utf8Path, contents: &[Content<'_>]) -> SnapshotStoreResult<()> {
    let now = Record::now(contents)?;
    if !known(record, &now).is_whole(|at| contents[at].path)? {
        write(record, &now);
    }
    Ok(())
}

/// What is known of files without reading them.
///
/// # Errors
/// One of them cannot be examined.
pub(crate) fn look(record: &Utf8Path, contents: &[Content<'_>]) -> SnapshotStoreResult<Known> {
    Ok(known(record, &Record::now(contents)?))
}

/// What is known of the files as they are; a record that cannot be read knows nothing.
fn known(path: &Utf8Path, now: &Record) -> Known {
    let Some(record) = fs::read(path).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok())
    else {
        return Known::Nothing;
    };
    if !record.still_holds(now) {
        return Known::Nothing;
    }
    if record.files != now.files {
        // The names have changed: from now on it is this number of them that counts.
        write(path, &Record { boot: now.boot.clone(), files: now.files.clone(), ..record });
    }
    let damage = if record.is_unreadable { Damage::Unreadable } else { Damage::Content };
    let damaged = record.damaged.filter(|at| *at < now.files.len());
    damaged.map_or(Known::Whole, |at| Known::Damaged(at, damage))
}

impl Known {
    /// Whether they are whole; not when nothing is known.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`] names the one that is damaged.
    pub(crate) fn is_whole<'a>(self, path: impl FnOnce(usize) -> &'a Utf8Path) -> SnapshotStoreResult<bool> {
        match self {
            Self::Nothing => Ok(false),
            Self::Whole => Ok(true),
            Self::Damaged(at, damage) => {
                Err(SnapshotStoreError::Damaged { path: path(at).to_owned(), damage })
            }
        }
    }
}

/// Contents that are read a piece at a time, whatever is remembered of them; what comes of it is remembered.
#[derive(Debug)]
pub(crate) struct Verifying {
    record: Utf8PathBuf,
    contents: Vec<(Utf8PathBuf, FileRecord, Form)>,
    /// The files as they were before the first byte was read, so that a change while they are read is not taken for
    /// verified.
    now: Record,
    /// Whether they were read before, and found whole.
    is_remembered: bool,
    /// The number of the file that is being read.
    at: usize,
    hashing: Option<Hashing>,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes were read, and there is more.
    More(u64),
    /// So many bytes were read, and all is as it was recorded.
    Whole(u64),
    /// The files are others than those that were begun with: nothing is known of them.
    Changed,
}

/// What came of reading a piece of the contents.
enum Next {
    /// So many bytes were read, and there is more.
    More(u64),
    /// So many bytes were read, and they were the last.
    Whole(u64),
    /// The file that is being read, which is here, is damaged.
    Damaged(Utf8PathBuf, Damage),
}

impl Verifying {
    /// Begins to read `contents`, of which `record` remembers.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`] names a file of another size, or one that is known to be damaged.
    pub(crate) fn begin(record: &Utf8Path, contents: &[Content<'_>]) -> SnapshotStoreResult<Self> {
        for content in contents {
            check_size(content.path, content.recorded.bytes)?;
        }
        let now = Record::now(contents)?;
        let is_remembered = known(record, &now).is_whole(|at| contents[at].path)?;
        let owned = |content: &Content<'_>| (content.path.to_owned(), content.recorded.clone(), content.form);
        let contents = contents.iter().map(owned).collect();
        Ok(Self { record: record.to_owned(), contents, now, is_remembered, at: 0, hashing: None })
    }

    /// Reads about so many bytes more.
    ///
    /// # Errors
    /// [`SnapshotStoreError::Damaged`] names the file; whoever uses it is told so without reading from now on.
    pub(crate) fn read(&mut self, at_most: u64) -> SnapshotStoreResult<Progress> {
        match self.next(at_most)? {
            Next::More(read) => Ok(Progress::More(read)),
            Next::Whole(read) if self.remember(None) => Ok(Progress::Whole(read)),
            Next::Damaged(path, damage) if self.remember(Some(damage)) => {
                Err(SnapshotStoreError::Damaged { path, damage })
            }
            Next::Whole(_) | Next::Damaged(..) => Ok(Progress::Changed),
        }
    }

    /// Reads about so many bytes more, and remembers nothing.
    fn next(&mut self, at_most: u64) -> SnapshotStoreResult<Next> {
        let Some((path, recorded, form)) = self.contents.get(self.at) else { return Ok(Next::Whole(0)) };
        let piece = match &mut self.hashing {
            Some(hashing) => hashing.read(at_most),
            none => Hashing::open(path, *form).and_then(|hashing| none.insert(hashing).read(at_most)),
        };
        match piece {
            Ok(Piece::More(read)) => Ok(Next::More(read)),
            Ok(Piece::Last(_, digest)) if digest != recorded.digest => {
                Ok(Next::Damaged(path.clone(), Damage::Content))
            }
            Ok(Piece::Last(read, _)) => {
                self.hashing = None;
                self.at += 1;
                let is_more = self.at < self.contents.len();
                Ok(if is_more { Next::More(read) } else { Next::Whole(read) })
            }
            Err(error) if is_unreadable(&error) => Ok(Next::Damaged(path.clone(), Damage::Unreadable)),
            Err(error) => Err(error),
        }
    }

    /// Remembers that all is whole, or what is wrong with the file that is being read, if the files are still those;
    /// whether they are.
    fn remember(&self, damage: Option<Damage>) -> bool {
        let contents =
            self.contents.iter().map(|(path, recorded, form)| Content { path, recorded, form: *form });
        match Record::now(&contents.collect::<Vec<_>>()) {
            Ok(now) if self.now.still_holds(&now) => {
                let record = match damage {
                    Some(damage) => now.with_damage(self.at, damage),
                    None => now,
                };
                write(&self.record, &record);
                true
            }
            _ => false,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_the_reading_of_something_else() {
        let readers = Readers::default();
        let (one, other) = (readers.of("one".into()), readers.of("other".into()));
        let _reading = one.lock().unwrap();
        assert!(other.try_lock().is_ok());
        assert!(readers.of("one".into()).try_lock().is_err(), "the same is read once");
        drop(other);
        readers.of("a third".into());
        assert_eq!(readers.of.lock().unwrap().len(), 2, "what nobody reads is forgotten");
    }

    /// An error of the disk was taken for one of the moment, and tried again for ever.
    #[test]
    fn what_the_disk_cannot_read_is_damaged_and_stays_so() {
        // Nothing is there at its beginning, which the kernel calls an error of input. Held open, it is one file.
        let path = Utf8Path::new("/proc/self/mem");
        let _held = fs::File::open(path).unwrap();
        let guard = tempfile::tempdir().unwrap();
        let recorded = FileRecord { bytes: 0, digest: digest::Digest::of_bytes(b"") };
        let contents = [Content { path, recorded: &recorded, form: Form::Plain }];
        for by_pieces in [false, true] {
            let record = Utf8Path::from_path(guard.path()).unwrap().join(by_pieces.to_string());
            for is_known in [false, true] {
                let failed = match by_pieces {
                    false => verify_once(&record, &Readers::default(), &contents).map(drop),
                    true => Verifying::begin(&record, &contents)
                        .and_then(|mut reading| reading.read(u64::MAX))
                        .map(drop),
                };
                let Err(SnapshotStoreError::Damaged { damage: Damage::Unreadable, path: named }) = failed
                else {
                    panic!("{failed:?}")
                };
                assert_eq!(named, path);
                let known = look(&record, &contents).unwrap();
                assert_eq!(known, Known::Damaged(0, Damage::Unreadable), "{is_known}");
            }
        }
    }
}
