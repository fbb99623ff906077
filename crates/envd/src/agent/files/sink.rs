//! A file that is being written, and what becomes of half a file.
//!
//! The bytes go straight to the file that was named, in the order create, chown, write: whoever watches the directory
//! sees those three and nothing else, so there is no temporary file and no rename, and a small body is one write.
//!
//! What is promised: a file that is there when its upload was answered with 200 is whole. One whose body broke off or
//! did not fit on the disk is removed, the old content of an overwritten file having gone when the new began to come.
//! Until then a file that was there is not ours to remove: a body that says how long it is, and is plainly too long for
//! what is free, leaves it as it was, and so does a file system that does not let it be given to the user.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::Path,
};

use serde::Serialize;

use super::{FilesError, medium::Medium, paths};
use crate::{
    agent::{
        metadata::{self, Metadata},
        users::User,
    },
    tree,
};

/// How much is gathered before it is written.
const GATHERED: usize = 256 * 1024;
/// A piece of this size is not copied to be gathered with others.
const WORTH_A_WRITE: usize = 64 * 1024;
/// Of a body that is longer, it is asked beforehand whether it fits.
const ASK_FOR: u64 = 1 << 20;

/// What a client is told of each file that it sent.
#[derive(Debug, Serialize)]
pub(super) struct Written {
    pub(super) path: String,
    pub(super) name: String,
    pub(super) r#type: &'static str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    pub(super) metadata: Metadata,
}

impl Written {
    pub(super) fn new(path: String, metadata: Metadata) -> Self {
        Self { name: paths::name(&path).to_owned(), path, r#type: "file", metadata }
    }
}

/// A file that is being written. Unless it is finished, what was made or changed of it is removed, also when the request
/// is given up in the middle.
#[derive(Debug)]
pub(super) struct Sink {
    file: File,
    medium: Medium,
    gathered: Vec<u8>,
    partial: Partial,
}

impl Sink {
    /// Makes or empties a file and gives it to the user. `expected` is how much is to come, if that is known.
    pub(super) fn create(path: String, user: &User, expected: Option<u64>) -> Result<Self, FilesError> {
        let failed = |error| FilesError::from_io("write", &path, error);
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let open = |create| {
            File::options()
                .write(true)
                .create(create)
                .truncate(false)
                .mode(0o666)
                .custom_flags(flags)
                .open(&path)
        };
        let parent = || {
            let parent = Path::new(&path).parent().unwrap_or_else(|| Path::new("/"));
            tree::make_directories(parent, user.uid, user.gid)
        };
        // What is no file is not even opened: with some devices that does something.
        let there = fs::metadata(&path);
        let file = match &there {
            Ok(there) if !there.is_file() && !there.is_dir() => return Err(FilesError::NotRegular(path)),
            Ok(_) => open(false).map_err(failed)?,
            Err(_) => match open(true) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    parent().map_err(failed)?;
                    open(true).map_err(failed)?
                }
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Err(FilesError::NoInodes),
                other => other.map_err(failed)?,
            },
        };
        let metadata = file.metadata().map_err(failed)?;
        let partial = Partial {
            device: metadata.dev(),
            inode: metadata.ino(),
            // What holds something was not made just now: somebody else was quicker.
            kept: there.is_ok() || metadata.len() > 0,
            path: path.clone(),
        };
        let mut sink = Self { medium: Medium::of(&file), file, gathered: Vec::new(), partial };
        if let Some(expected) = expected.filter(|expected| *expected > ASK_FOR) {
            // An error here says nothing; the write itself will tell.
            let free = rustix::fs::fstatfs(&sink.file)
                .map_or(u64::MAX, |disk| disk.f_bfree.saturating_mul(disk.f_bsize.unsigned_abs()));
            let own = metadata.blocks().saturating_mul(512);
            if expected > free.saturating_add(own) {
                return Err(FilesError::NoSpace(Some(expected)));
            }
        }
        fchown(&sink.file, Some(user.uid), Some(user.gid)).map_err(failed)?;
        if metadata.len() > 0 {
            sink.file.set_len(0).map_err(failed)?;
            sink.partial.kept = false;
        }
        Ok(sink)
    }

    /// Whether writing is copying.
    pub(super) fn is_in_memory(&self) -> bool {
        self.medium == Medium::Memory
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), FilesError> {
        if self.gathered.len() + bytes.len() > GATHERED {
            self.flush()?;
        }
        if self.gathered.is_empty() && bytes.len() >= WORTH_A_WRITE {
            self.partial.kept = false;
            return self.file.write_all(bytes).map_err(|error| self.failed(error));
        }
        if self.gathered.capacity() - self.gathered.len() < bytes.len() && !self.gathered.is_empty() {
            // All of it at once: growing step by step would leave all the steps behind.
            self.gathered.reserve_exact(GATHERED - self.gathered.len());
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), FilesError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        self.partial.kept = false;
        let written = self.file.write_all(&self.gathered).map_err(|error| self.failed(error));
        self.gathered.clear();
        written
    }

    /// Writes what is left, and the metadata: all of it is there now.
    pub(super) fn finish(mut self, metadata: &Metadata) -> Result<Written, FilesError> {
        self.flush()?;
        metadata::replace(&self.file, metadata).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FilesError::NoSpaceForMetadata,
            _ => self.failed(error),
        })?;
        // A file system that has no attributes keeps none: what is told is what is there.
        let kept = if metadata.is_empty() { Metadata::new() } else { metadata::read_open(&self.file) };
        self.partial.kept = true;
        Ok(Written::new(std::mem::take(&mut self.partial.path), kept))
    }

    fn failed(&self, error: io::Error) -> FilesError {
        FilesError::from_io("write", &self.partial.path, error)
    }
}

/// Removes the file unless it is kept.
#[derive(Debug)]
struct Partial {
    path: String,
    device: u64,
    inode: u64,
    /// Whether the file is whole, or still what it was before.
    kept: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Behind a link it is the file itself that must go; and only it, should somebody have put another in its place.
        let Ok(path) = fs::canonicalize(&self.path) else { return };
        let same = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode);
        if fs::metadata(&path).is_ok_and(same) {
            // There is nobody left to tell; the file system may have become read-only.
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "me".to_owned(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        }
    }

    fn create(path: &Path) -> Result<Sink, FilesError> {
        Sink::create(path.to_str().unwrap().to_owned(), &user(), None)
    }

    #[test]
    fn half_a_file_goes_and_a_whole_one_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let mut sink = create(&path).unwrap();
        sink.write(&[1; WORTH_A_WRITE]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), WORTH_A_WRITE as u64);
        drop(sink);
        assert!(!path.exists());
        assert!(path.parent().unwrap().exists());
        let mut sink = create(&path).unwrap();
        sink.write(b"wh").unwrap();
        sink.write(b"ole").unwrap();
        let written = sink.finish(&Metadata::new()).unwrap();
        assert_eq!((written.path.as_str(), written.name.as_str()), (path.to_str().unwrap(), "b"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
        create(&path).unwrap().finish(&Metadata::new()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn what_took_its_place_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let sink = create(&path).unwrap();
        fs::rename(&path, directory.path().join("elsewhere")).unwrap();
        fs::write(&path, "another").unwrap();
        drop(sink);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
    }

    #[test]
    fn what_is_plainly_too_large_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let create = || Sink::create(path.to_str().unwrap().to_owned(), &user(), Some(u64::MAX));
        assert!(matches!(create(), Err(FilesError::NoSpace(Some(u64::MAX)))));
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        assert!(matches!(create(), Err(FilesError::NoSpace(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    }

    #[test]
    fn a_link_to_nothing_makes_what_it_names() {
        let directory = tempfile::tempdir().unwrap();
        let (link, target) = (directory.path().join("link"), directory.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        create(&link).unwrap().finish(&Metadata::new()).unwrap();
        assert!(target.is_file() && link.is_symlink());
        fs::remove_file(&target).unwrap();
        // Over another link, which is relative.
        let first = directory.path().join("first");
        std::os::unix::fs::symlink("link", &first).unwrap();
        let sink = create(&first).unwrap();
        assert!(target.is_file());
        drop(sink);
        assert!(!target.exists() && link.is_symlink() && first.is_symlink());
    }

    /// As on a file system that knows no owners, or that belongs to somebody else.
    #[test]
    fn what_cannot_be_given_to_the_user_stays_what_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let other = User { uid: 65_534, gid: 65_534, ..user() };
        let create = || Sink::create(path.to_str().unwrap().to_owned(), &other, None);
        // Only this thread loses the right.
        let mut rights = rustix::thread::capabilities(None).unwrap();
        rights.effective.remove(rustix::thread::CapabilitySet::CHOWN);
        rustix::thread::set_capabilities(None, rights).unwrap();
        for content in ["old", ""] {
            fs::write(&path, content).unwrap();
            assert!(matches!(create(), Err(FilesError::Io { operation: "write", .. })));
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        fs::remove_file(&path).unwrap();
        assert!(create().is_err());
        assert!(!path.exists(), "what was made for it goes");
    }

    #[test]
    fn an_empty_file_stays_until_something_is_written_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        let too_much = Sink::create(path.to_str().unwrap().to_owned(), &user(), Some(u64::MAX));
        assert!(matches!(too_much, Err(FilesError::NoSpace(_))));
        let mut sink = create(&path).unwrap();
        sink.write(b"gathered").unwrap();
        drop(sink);
        assert!(path.exists());
        let mut sink = create(&path).unwrap();
        sink.write(&[1; WORTH_A_WRITE]).unwrap();
        drop(sink);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_file_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(create(directory.path()), Err(FilesError::Directory(_))));
        assert!(matches!(create(Path::new("/dev/null")), Err(FilesError::NotRegular(_))));
        assert!(matches!(create(Path::new("/dev/null/x")), Err(FilesError::Request(_))));
    }
}
