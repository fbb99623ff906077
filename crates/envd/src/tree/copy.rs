//! Copying a tree with all that belongs to its files: owner, mode, times, extended attributes, holes, and which names
//! are those of one file ([`super::links`]).
//!
//! A tree with something mounted in it is not copied: what is mounted would not move along.

use std::{
    ffi::{CStr, CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RawMode, SeekFrom, Stat, Timespec, Timestamps, Uid,
        XattrFlags, chownat, fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat, ftruncate, futimens,
        mkdirat, mknodat, openat, readlinkat, seek, statat, symlinkat, utimensat,
    },
    io::{Errno, fcntl_dupfd_cloexec},
};

use super::{
    found::Found,
    links::{Links, link},
};

/// How deep a tree may be that is copied: each level is two open directories.
const MAXIMUM_DEPTH: usize = 1024;
/// The most that the kernel lists of attributes, and the longest value of one.
const MAXIMUM_ATTRIBUTE: usize = 64 * 1024;

/// A directory whose content is being copied.
struct Level {
    source: OwnedFd,
    target: OwnedFd,
    entries: Dir,
    stat: Stat,
}

/// Copies `source` to `target`, which must not be there. What was made when this fails is for the caller to remove.
pub(super) fn copy(source: &Path, target: &Path) -> io::Result<()> {
    let (source, target) =
        (CString::new(source.as_os_str().as_bytes())?, CString::new(target.as_os_str().as_bytes())?);
    Ok(copy_tree(&source, &target)?)
}

fn copy_tree(source: &CStr, target: &CStr) -> Result<(), Errno> {
    let top = Found::at(CWD, source)?.as_top()?;
    let Some(level) = enter(&top, CWD, source, CWD, target)? else { return Ok(()) };
    let root = fcntl_dupfd_cloexec(&level.target, 0)?;
    let mut levels = vec![level];
    // Where the last level is, below the top.
    let mut path = PathBuf::new();
    let mut links = Links::default();
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.entries.next() else {
            // Now that nothing more is made in it, its times stay.
            attributes(&level.source, &level.target, &level.stat)?;
            levels.pop();
            path.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let found = Found::at(&level.source, name)?;
        found.check_part_of(&top)?;
        let has_other_names = found.links > 1 && !found.kind.is_dir();
        let first = if has_other_names { links.first(&found) } else { None };
        // Where it cannot be one file, for whatever reason, it can still be two.
        if first.is_some_and(|first| link(&root, &first, &level.target, name).is_ok()) {
            continue;
        }
        path.push(OsStr::from_bytes(name.to_bytes()));
        if let Some(next) = enter(&top, level.source.as_fd(), name, level.target.as_fd(), name)? {
            if levels.len() == MAXIMUM_DEPTH {
                return Err(Errno::NAMETOOLONG);
            }
            levels.push(next);
            continue;
        }
        if has_other_names {
            links.remember(&found, &path);
        }
        path.pop();
    }
    Ok(())
}

/// Copies one file of the tree of `top`. Of a directory only itself: it is answered, to be gone through.
fn enter(
    top: &Found,
    source: BorrowedFd<'_>,
    name: &CStr,
    target: BorrowedFd<'_>,
    new: &CStr,
) -> Result<Option<Level>, Errno> {
    let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let opened = openat(source, name, flags | OFlags::DIRECTORY, Mode::empty())?;
            // Of what was opened, should it be another by now than what was looked at.
            Found::open(&opened)?.check_part_of(top)?;
            let stat = fstat(&opened)?;
            mkdirat(target, new, Mode::RWXU)?;
            let made = openat(target, new, flags | OFlags::DIRECTORY, Mode::empty())?;
            let entries = Dir::read_from(&opened)?;
            return Ok(Some(Level { source: opened, target: made, entries, stat }));
        }
        FileType::RegularFile => {
            let opened = openat(source, name, flags, Mode::empty())?;
            let stat = fstat(&opened)?;
            if !FileType::from_raw_mode(stat.st_mode).is_file() {
                return Err(Errno::AGAIN);
            }
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(target, new, flags, Mode::RUSR | Mode::WUSR)?;
            let (opened, made) = (File::from(opened), File::from(made));
            content(&opened, &made, &stat)?;
            attributes(&opened, &made, &stat)?;
        }
        FileType::Symlink => {
            let link = readlinkat(source, name, Vec::new())?;
            symlinkat(&link, target, new)?;
            alone(target, new, &stat)?;
        }
        kind => {
            mknodat(target, new, kind, mode(&stat), stat.st_rdev)?;
            alone(target, new, &stat)?;
            // The mask of this process was taken from it, and a new owner takes more.
            rustix::fs::chmodat(target, new, mode(&stat), AtFlags::empty())?;
        }
    }
    Ok(None)
}

/// Copies what is written in a file, and leaves out its holes.
fn content(source: &File, target: &File, stat: &Stat) -> Result<(), Errno> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let mut position = 0;
    while position < size {
        let start = match seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that knows of no holes has none.
            Err(Errno::INVAL) => position,
            Err(error) => return Err(error),
        };
        let end = seek(source, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        seek(source, SeekFrom::Start(start))?;
        seek(target, SeekFrom::Start(start))?;
        let copied = io::copy(&mut io::Read::take(source, end.saturating_sub(start)), &mut &*target);
        copied.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        if end <= position {
            break;
        }
        position = end;
    }
    ftruncate(target, size)
}

/// Gives a file what belongs to another. In this order: a new owner takes away modes and attributes, and all of it is
/// written down in the times.
fn attributes(source: impl AsFd, target: impl AsFd, stat: &Stat) -> Result<(), Errno> {
    let (source, target) = (source.as_fd(), target.as_fd());
    fchown(target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(target, mode(stat))?;
    extended(source, target)?;
    futimens(target, &times(stat))
}

/// Copies extended attributes. Where the other file system has none, or none of a kind, they are left behind.
fn extended(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut names = vec![0_u8; MAXIMUM_ATTRIBUTE];
    let length = match flistxattr(source, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    };
    let names = names.get(..length).unwrap_or_default();
    let mut value = Vec::new();
    for name in names.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        value.resize(MAXIMUM_ATTRIBUTE, 0);
        let length = match fgetxattr(source, name, &mut value[..]) {
            Ok(length) => length,
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            Err(error) => return Err(error),
        };
        match fsetxattr(target, name, value.get(..length).unwrap_or_default(), XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Owner and times of what cannot be opened.
fn alone(directory: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(directory, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(directory, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

fn mode(stat: &Stat) -> Mode {
    const PERMISSIONS: RawMode = 0o7777;
    Mode::from_raw_mode(stat.st_mode & PERMISSIONS)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}
