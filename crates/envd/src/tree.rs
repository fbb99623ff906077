//! Making, listing, moving and removing trees, however deep they are.
//!
//! A tree in a guest is whatever its user made, also one deeper than any stack or path name allows. So nothing here
//! calls itself, and removal works from open directories instead of path names.

mod copy;
mod found;
mod links;
mod relocate;

use std::{
    ffi::{CStr, CString, OsString},
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::chown},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, renameat, unlinkat},
    io::Errno,
};

use self::found::Found;
pub(crate) use self::relocate::{MoveError, move_to};

/// How many directories are open at once while a tree is removed.
const OPEN_AT_ONCE: usize = 64;

/// Makes a directory and what is missing above it. What is made belongs to this user and group.
pub(crate) fn make_directories(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let mut missing: Vec<PathBuf> = Vec::new();
    for ancestor in path.ancestors() {
        match fs::metadata(ancestor) {
            Ok(metadata) if metadata.is_dir() => break,
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(ancestor.to_owned()),
            Err(error) => return Err(error),
        }
    }
    for directory in missing.iter().rev() {
        match fs::create_dir(directory) {
            Ok(()) => chown(directory, Some(uid), Some(gid))?,
            // Somebody else made it at the same moment.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The paths below `root`, parents before what they hold, in the order of their names, `depth` levels deep. At most
/// `limit` of them; `None` means that there are more. Links are not followed, but for `root` itself.
pub(crate) fn list(root: &Path, depth: u32, limit: usize) -> io::Result<Option<Vec<PathBuf>>> {
    let mut found = Vec::new();
    let Some(top) = children(root, limit)? else { return Ok(None) };
    let mut waiting: Vec<(PathBuf, u32)> = top.map(|path| (path, 1)).collect();
    while let Some((path, level)) = waiting.pop() {
        if found.len() == limit {
            return Ok(None);
        }
        let descend = level < depth && fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        // A directory that goes away or may not be read is listed, without what it holds.
        if descend && let Ok(held) = children(&path, limit) {
            let Some(held) = held else { return Ok(None) };
            waiting.extend(held.map(|path| (path, level + 1)));
        }
        found.push(path);
        if waiting.len() > limit {
            return Ok(None);
        }
    }
    Ok(Some(found))
}

/// The paths in a directory, last name first; none if there are more than `limit`.
fn children(directory: &Path, limit: usize) -> io::Result<Option<impl Iterator<Item = PathBuf> + use<>>> {
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(directory)? {
        if names.len() == limit {
            return Ok(None);
        }
        names.push(entry?.file_name());
    }
    names.sort_unstable_by(|one, other| other.cmp(one));
    let directory = directory.to_owned();
    Ok(Some(names.into_iter().map(move |name| directory.join(name))))
}

/// Removes a file, a link, or a directory with all that it holds. What is not there is removed already. What is mounted
/// in a directory is not touched: the removal ends there, as busy.
pub(crate) fn remove(path: impl AsRef<Path>) -> io::Result<()> {
    let name = CString::new(path.as_ref().as_os_str().as_bytes())?;
    let removed = match Found::at(CWD, &name) {
        Ok(found) if found.kind.is_dir() => {
            empty_directory(&name).and_then(|()| unlinkat(CWD, &name, AtFlags::REMOVEDIR))
        }
        Ok(_) => unlinkat(CWD, &name, AtFlags::empty()),
        Err(Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether nothing has this path: a part of it is missing, or is a file.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Removes all that a directory holds.
///
/// It keeps the way down as open directories. Where that gets too long, the directory it stands in is moved to the
/// top and dealt with from there.
fn empty_directory(path: &CStr) -> Result<(), Errno> {
    let top = open_directory(CWD, path)?;
    let found = Found::open(&top)?.as_top()?;
    let mut way: Vec<(OwnedFd, CString)> = Vec::new();
    let mut moved = 0_u64;
    loop {
        let here = way.last().map_or_else(|| top.as_fd(), |(directory, _)| directory.as_fd());
        let Some(name) = remove_files(here)? else {
            // Nothing is left here: step up and remove it.
            let Some((_, name)) = way.pop() else { return Ok(()) };
            let above = way.last().map_or_else(|| top.as_fd(), |(directory, _)| directory.as_fd());
            unlink(above, &name, AtFlags::REMOVEDIR)?;
            continue;
        };
        let child = match open_directory(here, &name) {
            Ok(child) => child,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        Found::open(&child)?.check_part_of(&found)?;
        if way.len() < OPEN_AT_ONCE {
            way.push((child, name));
            continue;
        }
        moved += 1;
        let aside = CString::new(format!(".removing-{moved}")).map_err(|_| Errno::INVAL)?;
        match renameat(here, &name, &top, &aside) {
            Ok(()) => {}
            // The name is taken by something that is removed in its turn; the next number will do.
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::ISDIR | Errno::NOTDIR) => continue,
            Err(error) => return Err(error),
        }
    }
}

/// Removes everything in a directory that is no directory, and names one that is.
fn remove_files(directory: impl AsFd) -> Result<Option<CString>, Errno> {
    let directory = directory.as_fd();
    let mut found = None;
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if entry.file_type().is_dir() {
            found.get_or_insert_with(|| name.to_owned());
        } else {
            match unlink(directory, name, AtFlags::empty()) {
                // The file system does not tell types in its listing.
                Err(Errno::ISDIR) => {
                    found.get_or_insert_with(|| name.to_owned());
                }
                other => other?,
            }
        }
    }
    Ok(found)
}

fn unlink(directory: impl AsFd, name: &CStr, flags: AtFlags) -> Result<(), Errno> {
    match unlinkat(directory, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

fn open_directory(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    /// Does something in a thread whose mounts nobody else sees.
    pub(super) fn with_mounts_of_its_own(work: impl FnOnce() + Send) {
        use nix::{
            mount::{MsFlags, mount},
            sched::{CloneFlags, unshare},
        };
        let nothing = None::<&str>;
        let own = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("these tests run as root");
            mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
            work();
        };
        std::thread::scope(|scope| scope.spawn(own).join().unwrap());
    }

    /// Shows a file or directory at another place too.
    pub(super) fn bind(from: &Path, to: &Path) {
        rustix::mount::mount_bind(from, to).unwrap();
    }

    fn busy(result: io::Result<()>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }

    #[test]
    fn what_is_mounted_in_a_tree_outlives_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["outside/below", "tree/a/here", "tree/b"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        for name in ["outside/file", "outside/below/file", "one", "tree/one", "tree/a/gone"] {
            fs::write(path(name), name).unwrap();
        }
        let outside_is_whole = || {
            assert_eq!(fs::read_to_string(path("outside/file")).unwrap(), "outside/file");
            assert_eq!(fs::read_to_string(path("outside/below/file")).unwrap(), "outside/below/file");
        };
        with_mounts_of_its_own(|| {
            // Of the same file system, so that no device tells it apart.
            bind(&path("outside"), &path("tree/a/here"));
            assert_eq!(
                fs::metadata(path("tree/a/here")).unwrap().dev(),
                fs::metadata(path("tree")).unwrap().dev()
            );
            busy(remove(path("tree")));
            outside_is_whole();
            // The place itself: nothing of it goes before it is known that it cannot go.
            busy(remove(path("tree/a/here")));
            outside_is_whole();
            // Below the place it is a tree like any other.
            remove(path("tree/a/here/below")).unwrap();
            assert!(!path("outside/below").exists() && path("outside/file").exists());
            // Of a single file.
            fs::create_dir_all(path("single")).unwrap();
            fs::write(path("single/place"), "").unwrap();
            bind(&path("one"), &path("single/place"));
            busy(remove(path("single")));
            assert_eq!(fs::read_to_string(path("one")).unwrap(), "one");
        });
        // Where nothing is mounted, all of it goes.
        remove(path("tree")).unwrap();
        remove(path("single")).unwrap();
        assert!(!path("tree").exists() && !path("single").exists() && path("outside/file").exists());
    }

    #[test]
    fn a_list_is_in_order_and_as_deep_as_asked() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_str().unwrap();
        fs::create_dir_all(format!("{root}/b/d/e")).unwrap();
        for name in ["a", "c", "b/z", "b/d/x"] {
            fs::write(format!("{root}/{name}"), "").unwrap();
        }
        symlink("b", format!("{root}/link")).unwrap();
        let names = |depth, limit| {
            let list = list(Path::new(root), depth, limit).unwrap()?;
            let below = |path: &PathBuf| path.to_str().unwrap().strip_prefix(root).unwrap().to_owned();
            Some(list.iter().map(below).collect::<Vec<_>>())
        };
        assert_eq!(names(1, 100).unwrap(), ["/a", "/b", "/c", "/link"]);
        assert_eq!(names(2, 100).unwrap(), ["/a", "/b", "/b/d", "/b/z", "/c", "/link"]);
        assert_eq!(names(u32::MAX, 100).unwrap().len(), 8);
        assert_eq!(names(1, 3), None);
        assert_eq!(names(1, 4).unwrap().len(), 4);
        assert!(list(Path::new(&format!("{root}/a")), 1, 9).is_err());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("deep");
        fs::create_dir(&root).unwrap();
        let mut here = open_directory(CWD, &CString::new(root.to_str().unwrap()).unwrap()).unwrap();
        for level in 0..3000 {
            rustix::fs::mkdirat(&here, c"directory", Mode::RWXU).unwrap();
            openat(&here, c"file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            if level % 7 == 0 {
                rustix::fs::mkdirat(&here, c".removing-3", Mode::RWXU).unwrap();
                rustix::fs::symlinkat("/etc", &here, c"link").unwrap();
            }
            here = open_directory(&here, c"directory").unwrap();
        }
        remove(root.to_str().unwrap()).unwrap();
        assert!(!root.exists());
        remove(root.to_str().unwrap()).unwrap();
        assert!(Path::new("/etc/passwd").exists());
    }

    #[test]
    fn directories_above_are_made_for_the_user() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c");
        make_directories(&path, 1234, 1235).unwrap();
        make_directories(&path, 1234, 1235).unwrap();
        for made in ["a", "a/b", "a/b/c"] {
            let metadata = fs::metadata(directory.path().join(made)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (1234, 1235));
        }
        assert_eq!(fs::metadata(directory.path()).unwrap().uid(), rustix::process::geteuid().as_raw());
        fs::write(directory.path().join("file"), "").unwrap();
        let error = make_directories(&directory.path().join("file/x"), 1234, 1235).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
