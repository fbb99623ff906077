//! Moving, also to another file system.
//!
//! The kernel moves within a file system alone, and in one step. To another one a copy has to be made, and there are
//! moments in between. They are arranged so that there is always a whole one, and so that what can fail fails early:
//!
//! ```text
//!  1  destination/.moving-X   is made, a copy of the source          fails: it is removed
//!  2  source  ──►  .moved-X   beside it: it can be taken away        fails: the copy is removed
//!  3  .moving-X  ──►  destination                                    fails: the source gets its name back
//!  4  .moved-X is removed                                            fails: it is left behind, and that is said
//! ```

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::copy::copy;

/// Why something was not moved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error("a directory cannot be moved into itself")]
    IntoItself,
    #[error("it was not moved")]
    Move(#[source] io::Error),
    #[error("it was copied, but the original could not be removed and is now {}", place.display())]
    Leftover {
        place: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Moves a file, a link, or a directory with all that it holds. What is at the destination is replaced where the kernel's own
/// move would replace it.
pub(crate) fn move_to(source: &Path, destination: &Path) -> Result<(), MoveError> {
    match fs::rename(source, destination) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => copy_over(source, destination),
        Err(error) => Err(error_of(error, source, destination)),
    }
}

/// The kernel has one word for several faults; a directory that is to be moved into itself is the usual one.
fn error_of(error: io::Error, source: &Path, destination: &Path) -> MoveError {
    if error.kind() == io::ErrorKind::InvalidInput && is_inside(source, destination) {
        MoveError::IntoItself
    } else {
        MoveError::Move(error)
    }
}

fn is_inside(source: &Path, destination: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).ok();
    let inside = || Some(real(destination.parent()?)?.starts_with(real(source)?));
    fs::symlink_metadata(source).is_ok_and(|metadata| metadata.is_dir()) && inside().unwrap_or(false)
}

fn copy_over(source: &Path, destination: &Path) -> Result<(), MoveError> {
    if is_inside(source, destination) {
        return Err(MoveError::IntoItself);
    }
    may_replace(source, destination).map_err(MoveError::Move)?;
    let (fresh, aside) = (sibling(destination, ".moving"), sibling(source, ".moved"));
    let steps = || {
        copy(source, &fresh)?;
        fs::rename(source, &aside)?;
        fs::rename(&fresh, destination).inspect_err(|_| {
            // Nothing can be done for it if this fails too; it is all there, under the other name.
            let _ = fs::rename(&aside, source);
        })
    };
    if let Err(error) = steps() {
        let _ = super::remove(&fresh);
        return Err(MoveError::Move(error));
    }
    super::remove(&aside).map_err(|source| MoveError::Leftover { place: aside, source })
}

/// Asks before anything is copied what the kernel would say after it.
fn may_replace(source: &Path, destination: &Path) -> io::Result<()> {
    let from = fs::symlink_metadata(source)?;
    let Ok(to) = fs::symlink_metadata(destination) else { return Ok(()) };
    match (from.is_dir(), to.is_dir()) {
        (true, false) => Err(io::ErrorKind::NotADirectory.into()),
        (false, true) => Err(io::ErrorKind::IsADirectory.into()),
        (false, false) => Ok(()),
        (true, true) => match fs::read_dir(destination)?.next() {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::DirectoryNotEmpty.into()),
        },
    }
}

/// A name beside `path` that nothing has: of this process, and used once.
fn sibling(path: &Path, what: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let sibling = path.with_file_name(OsString::from(format!("{what}-{process}-{count}")));
        if fs::symlink_metadata(&sibling).is_err() {
            return sibling;
        }
    }
}
