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

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test that cannot run says so")]
mod tests {
    use std::{
        io::{Seek, SeekFrom, Write},
        os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
    };

    use rustix::fs::{CWD, FileType, XattrFlags};

    use super::{
        super::tests::{bind, with_mounts_of_its_own},
        *,
    };

    /// Directories on two file systems.
    fn two() -> Option<(tempfile::TempDir, tempfile::TempDir)> {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let device = |directory: &tempfile::TempDir| fs::metadata(directory.path()).unwrap().dev();
        if device(&here) == device(&there) {
            println!("skipped: /tmp and /dev/shm are one file system");
            return None;
        }
        Some((here, there))
    }

    fn names(directory: &Path) -> Vec<String> {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_tree_is_the_same_on_the_other_side() {
        let Some((here, there)) = two() else { return };
        let (source, target) = (here.path().join("tree"), there.path().join("moved"));
        fs::create_dir_all(source.join("a/b")).unwrap();
        fs::write(source.join("a/file"), "content").unwrap();
        fs::write(source.join("a/b/empty"), "").unwrap();
        symlink("../nowhere", source.join("a/link")).unwrap();
        rustix::fs::mknodat(CWD, source.join("pipe"), FileType::Fifo, 0o600.into(), 0).unwrap();
        chown(source.join("a/file"), Some(1234), Some(1235)).unwrap();
        fs::set_permissions(source.join("a/file"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(source.join("pipe"), fs::Permissions::from_mode(0o622)).unwrap();
        fs::set_permissions(source.join("a/b"), fs::Permissions::from_mode(0o1500)).unwrap();
        std::os::unix::fs::lchown(source.join("a/link"), Some(1), Some(2)).unwrap();
        let mut sparse = fs::File::create(source.join("sparse")).unwrap();
        sparse.write_all(b"begin").unwrap();
        sparse.seek(SeekFrom::Start(64 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        sparse.set_len(128 << 20).unwrap();
        let attribute = rustix::fs::setxattr(source.join("a/file"), "user.e2b.k", b"v", XattrFlags::empty());
        let facts = |top: &Path| {
            ["", "a", "a/b", "a/b/empty", "a/file", "a/link", "pipe", "sparse"].map(|name| {
                let metadata = fs::symlink_metadata(top.join(name)).unwrap();
                let size = if metadata.is_dir() { 0 } else { metadata.len() };
                (
                    metadata.mode(),
                    metadata.uid(),
                    metadata.gid(),
                    size,
                    metadata.mtime(),
                    metadata.mtime_nsec(),
                )
            })
        };
        let before = facts(&source);
        move_to(&source, &target).unwrap();
        assert_eq!(facts(&target), before);
        assert_eq!(fs::read(target.join("a/file")).unwrap(), b"content");
        assert_eq!(fs::read_link(target.join("a/link")).unwrap(), Path::new("../nowhere"));
        assert!(fs::metadata(target.join("pipe")).unwrap().file_type().is_fifo());
        assert!(fs::metadata(target.join("sparse")).unwrap().blocks() < 2048, "the holes are holes");
        assert!(fs::read(target.join("sparse")).unwrap()[64 << 20..].starts_with(b"end\0"));
        let mut value = [0; 8];
        // Not every kernel's memory file system has such attributes.
        if attribute.is_ok()
            && rustix::fs::getxattr(&target, "user.x", &mut value) != Err(rustix::io::Errno::OPNOTSUPP)
        {
            assert_eq!(rustix::fs::getxattr(target.join("a/file"), "user.e2b.k", &mut value), Ok(1));
        }
        assert_eq!((names(here.path()), names(there.path())), (vec![], vec!["moved".to_owned()]));
    }

    #[test]
    fn the_names_of_one_file_stay_names_of_one_file() {
        let Some((here, there)) = two() else { return };
        let (source, target) = (here.path().join("tree"), there.path().join("moved"));
        fs::create_dir_all(source.join("a/b")).unwrap();
        fs::write(source.join("first"), "shared").unwrap();
        for name in ["a/second", "a/b/third"] {
            fs::hard_link(source.join("first"), source.join(name)).unwrap();
        }
        // One whose other name does not move, a link and a pipe with two names, and one that is alone.
        fs::write(source.join("a/half"), "half").unwrap();
        fs::hard_link(source.join("a/half"), here.path().join("other half")).unwrap();
        symlink("first", source.join("link")).unwrap();
        fs::hard_link(source.join("link"), source.join("a/link")).unwrap();
        rustix::fs::mknodat(CWD, source.join("pipe"), FileType::Fifo, 0o600.into(), 0).unwrap();
        fs::hard_link(source.join("pipe"), source.join("a/b/pipe")).unwrap();
        fs::write(source.join("alone"), "shared").unwrap();

        move_to(&source, &target).unwrap();
        let file = |name: &str| {
            let metadata = fs::symlink_metadata(target.join(name)).unwrap();
            (metadata.ino(), metadata.nlink())
        };
        for names in
            [["first", "a/second", "a/b/third"].as_slice(), &["link", "a/link"], &["pipe", "a/b/pipe"]]
        {
            for name in names {
                assert_eq!(file(name), (file(names[0]).0, names.len() as u64), "{name}");
            }
        }
        assert_eq!((file("a/half").1, file("alone").1), (1, 1));
        assert_eq!(fs::read(target.join("a/half")).unwrap(), b"half");
        assert_eq!(fs::read_link(target.join("a/link")).unwrap(), Path::new("first"));
        fs::write(target.join("a/b/third"), "changed").unwrap();
        assert_eq!(fs::read(target.join("first")).unwrap(), b"changed");
        assert_eq!(fs::metadata(here.path().join("other half")).unwrap().nlink(), 1);
        assert_eq!(names(here.path()), ["other half"]);
    }

    #[test]
    fn what_is_mounted_does_not_move_and_is_not_lost() {
        let Some((here, there)) = two() else { return };
        let (source, target) = (here.path().join("tree"), there.path().join("moved"));
        let outside = here.path().join("outside");
        for directory in [&outside, &source.join("a")] {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("file"), "content").unwrap();
        }
        let refused = |source: &Path| match move_to(source, &target).unwrap_err() {
            MoveError::Move(error) => assert_eq!(error.kind(), io::ErrorKind::ResourceBusy),
            other => panic!("{other}"),
        };
        // A directory, and a file.
        for (from, to) in [(&outside, source.join("a")), (&outside.join("file"), source.join("a/file"))] {
            with_mounts_of_its_own(|| {
                bind(from, &to);
                refused(&source);
                refused(&to);
            });
            assert_eq!(
                (names(here.path()), names(there.path())),
                (vec!["outside".into(), "tree".into()], vec![])
            );
            assert_eq!(fs::read(outside.join("file")).unwrap(), b"content");
        }
        move_to(&source, &target).unwrap();
        assert_eq!(fs::read(target.join("a/file")).unwrap(), b"content");
    }

    #[test]
    fn a_file_replaces_a_file_and_nothing_else() {
        let Some((here, there)) = two() else { return };
        let (file, directory) = (here.path().join("file"), here.path().join("directory"));
        fs::write(&file, "new").unwrap();
        fs::create_dir(&directory).unwrap();
        let (old, full, empty) =
            (there.path().join("old"), there.path().join("full"), there.path().join("empty"));
        fs::write(&old, "old").unwrap();
        fs::create_dir_all(full.join("x")).unwrap();
        fs::create_dir(&empty).unwrap();
        let refused = |source: &Path, target: &Path| match move_to(source, target).unwrap_err() {
            MoveError::Move(error) => error.kind(),
            other => panic!("{other}"),
        };
        assert_eq!(refused(&file, &full), io::ErrorKind::IsADirectory);
        assert_eq!(refused(&directory, &old), io::ErrorKind::NotADirectory);
        assert_eq!(refused(&directory, &full), io::ErrorKind::DirectoryNotEmpty);
        assert_eq!(names(here.path()), ["directory", "file"]);
        assert_eq!(names(there.path()), ["empty", "full", "old"]);
        move_to(&file, &old).unwrap();
        move_to(&directory, &empty).unwrap();
        assert_eq!(fs::read(&old).unwrap(), b"new");
        assert!(names(here.path()).is_empty());
    }

    #[test]
    fn nothing_is_half_moved() {
        let Some((here, there)) = two() else { return };
        // Deeper than is copied: it fails in the middle.
        let source = here.path().join("deep");
        let mut deep = source.clone();
        for _ in 0..1100 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(source.join("file"), "content").unwrap();
        assert!(matches!(move_to(&source, &there.path().join("deep")), Err(MoveError::Move(_))));
        assert!(names(there.path()).is_empty());
        assert_eq!(names(here.path()), ["deep"]);
        assert_eq!(names(&source), ["d", "file"]);
    }

    #[test]
    fn a_directory_does_not_go_into_itself() {
        let here = tempfile::tempdir().unwrap();
        fs::create_dir_all(here.path().join("a/b")).unwrap();
        let into = |target: &str| move_to(&here.path().join("a"), &here.path().join(target));
        assert!(matches!(into("a/b/c"), Err(MoveError::IntoItself)));
        assert!(matches!(into("a/b"), Err(MoveError::IntoItself)));
        assert!(into("a").is_ok());
        assert!(into("ab").is_ok());
    }
}
