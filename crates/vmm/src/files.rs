//! The files that drivers make beside a machine, and what is said when one of them cannot be had.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::task::JoinError;

use crate::{VmmError, VmmResult};

/// An error about a file.
pub(crate) fn cannot(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> VmmError {
    let path: Utf8PathBuf = path.to_owned();
    move |source| VmmError::File { operation, path, source }
}

/// Fails where a VMM would, with the name of the file.
pub(crate) fn readable(path: &Utf8Path) -> VmmResult<()> {
    File::open(path).map(drop).map_err(cannot("open", path))
}

/// The bit of a file's mode by which every user may read it.
pub(crate) const OTHERS_MAY_READ: u32 = 0o004;

/// A file that a process with a user of its own can read.
pub(crate) fn public<'a>(field: &'static str, path: &'a Utf8Path) -> VmmResult<&'a Utf8Path> {
    let mode = fs::metadata(path).map_err(cannot("open", path))?.permissions().mode();
    if mode & OTHERS_MAY_READ == 0 {
        let problem = format!("machines have users of their own, who may not read {path}");
        return Err(VmmError::Spec { field, problem });
    }
    Ok(path)
}

/// A thread that was to do something for `operation` and did not come to its end.
pub(crate) fn failed_thread(operation: &'static str, error: JoinError) -> VmmError {
    VmmError::Connection { command: operation.to_owned(), source: io::Error::other(error) }
}

/// Removes what an earlier life left in a directory that is this machine's alone.
pub(crate) fn remove_stale(path: &Utf8Path) -> VmmResult<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The same of a file that only a driver makes there: one of another kind is somebody's, and stays.
pub(crate) fn remove_stale_of_kind(path: &Utf8Path, is_ours: fn(&fs::FileType) -> bool) -> VmmResult<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if is_ours(&found.file_type()) => remove_stale(path),
        Ok(_) => Err(cannot("replace", path)(io::ErrorKind::AlreadyExists.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(cannot("examine", path)(error)),
    }
}

/// A file of which only this user knows the content: made, or emptied. A VMM that opens it again keeps its mode.
pub(crate) fn create_private(path: &Utf8Path) -> VmmResult<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).map_err(cannot("create", path))
}

/// How long the state of a machine's devices may be; it has some hundreds of KiB.
const STATE_LIMIT: u64 = 64 << 20;
/// How much of it is copied at once.
const PIECE: usize = 64 << 10;

/// Keeps the state that a monitor has written as a file that the monitor never had: one that was broken into could write what
/// it has open for as long as it lives.
pub(crate) fn keep_state(written: &File, into: &Utf8Path) -> VmmResult<()> {
    let copy = |kept: &File| {
        let (mut piece, mut at) = (vec![0; PIECE], 0);
        loop {
            // Where it stands is the monitor's, too.
            let count = written.read_at(&mut piece, at)?;
            if count == 0 {
                return Ok(());
            }
            kept.write_all_at(&piece[..count], at)?;
            at += count as u64;
            if at > STATE_LIMIT {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
    };
    copy(&create_private(into)?).map_err(cannot("write", into))
}

/// The socket's name in the file system; removed with the machine.
#[derive(Debug)]
pub(crate) struct SocketFile(Utf8PathBuf);

impl SocketFile {
    /// One that is there already.
    pub(crate) fn at(path: Utf8PathBuf) -> Self {
        Self(path)
    }

    /// Leaves it where it is.
    pub(crate) fn leave(mut self) {
        self.0 = Utf8PathBuf::new();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.0.as_str().is_empty() {
            // The owner of the directory may have been faster.
            drop(fs::remove_file(&self.0));
        }
    }
}

/// A file that becomes a guest's memory. It is removed again unless it is kept.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    path: Utf8PathBuf,
    kept: bool,
}

impl MemoryFile {
    pub(crate) fn create(path: &Utf8Path, bytes: u64) -> VmmResult<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(cannot("create", path))?;
        let made = Self { path: path.to_owned(), kept: false };
        file.set_len(bytes).map_err(cannot("size", path))?;
        Ok(made)
    }

    pub(crate) fn keep(mut self) -> Utf8PathBuf {
        self.kept = true;
        std::mem::take(&mut self.path)
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if !self.kept {
            drop(fs::remove_file(&self.path));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_was_written_is_kept_as_another_file_and_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| Utf8PathBuf::from_path_buf(directory.path().join(name)).unwrap();
        let content = vec![7; PIECE + 5];
        fs::write(path("written"), &content).unwrap();
        let (state, written) = (path("state"), File::open(path("written")).unwrap());
        keep_state(&written, &state).unwrap();
        let held = File::options().write(true).open(path("written")).unwrap();
        held.write_all_at(b"changed", 0).unwrap();
        assert!(fs::read(&state).unwrap() == content);
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o600);
        held.set_len(STATE_LIMIT + 1).unwrap();
        let refused = keep_state(&written, &state);
        assert!(matches!(refused, Err(VmmError::File { operation: "write", .. })), "{refused:?}");
    }
}
