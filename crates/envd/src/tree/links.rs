//! The files of a tree that have several names, while the tree is copied: the names of one file stay names of one file.
//!
//! Remembered is where the first name of a file was copied to, until the last of its names has come. Names may lie
//! outside of the tree, and then they never come. So what is remembered has a limit ([`MAXIMUM_BYTES`], some 50,000
//! names of a usual length); a file beyond it, or with a name that is too long, becomes a file of its own under each of
//! its names, as it does on a file system without hard links: nothing is lost but the room that it takes.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::CStr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, linkat, openat2},
    io::Errno,
};

use super::found::{File, Found};

/// How much is remembered at once.
const MAXIMUM_BYTES: usize = 8 << 20;
/// What a name takes beside its bytes, about.
const OVERHEAD: usize = 80;
/// The longest path that the kernel takes.
const MAXIMUM_PATH: usize = 4095;

/// The files whose names have not all come.
#[derive(Debug, Default)]
pub(super) struct Links {
    first: HashMap<File, First>,
    bytes: usize,
}

#[derive(Debug)]
struct First {
    path: PathBuf,
    /// How many names are still to come.
    left: u32,
}

impl First {
    fn bytes(&self) -> usize {
        self.path.as_os_str().len() + OVERHEAD
    }
}

impl Links {
    /// Where a file was copied to under another name, if it was and that is known.
    pub(super) fn first(&mut self, found: &Found) -> Option<PathBuf> {
        let Entry::Occupied(mut entry) = self.first.entry(found.file) else { return None };
        entry.get_mut().left -= 1;
        if entry.get().left > 0 {
            return Some(entry.get().path.clone());
        }
        let first = entry.remove();
        self.bytes -= first.bytes();
        Some(first.path)
    }

    /// Remembers where a file was copied to, below the top of the copy.
    pub(super) fn remember(&mut self, found: &Found, path: &Path) {
        let first = First { path: path.to_owned(), left: found.links.saturating_sub(1) };
        let bytes = self.bytes + first.bytes();
        if first.left == 0 || path.as_os_str().len() > MAXIMUM_PATH || bytes > MAXIMUM_BYTES {
            return;
        }
        self.bytes = bytes;
        if let Some(before) = self.first.insert(found.file, first) {
            self.bytes -= before.bytes();
        }
    }
}

/// Gives what is at `path` below `top` another name. No link is followed on the way: somebody may have put one there
/// meanwhile.
pub(super) fn link(top: &OwnedFd, path: &Path, directory: impl AsFd, name: &CStr) -> Result<(), Errno> {
    let last = path.file_name().ok_or(Errno::INVAL)?;
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let above = openat2(top, above, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
    linkat(above, last, directory, name, AtFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use rustix::fs::CWD;

    use super::*;

    /// Found: a file with this inode and so many names.
    fn found(inode: u64, links: u32) -> Found {
        let mut found = Found::at(CWD, c"/dev/null").unwrap();
        (found.file.1, found.links) = (inode, links);
        found
    }

    #[test]
    fn a_file_is_forgotten_when_all_its_names_have_come() {
        let mut links = Links::default();
        let file = found(1, 3);
        assert_eq!(links.first(&file), None);
        links.remember(&file, Path::new("a/one"));
        assert_eq!(links.first(&found(2, 3)), None);
        assert_eq!(links.first(&file).as_deref(), Some(Path::new("a/one")));
        assert_eq!(links.first(&file).as_deref(), Some(Path::new("a/one")));
        assert_eq!(links.first(&file), None);
        assert!(links.first.is_empty() && links.bytes == 0);
    }

    #[test]
    fn what_is_remembered_has_a_limit_and_room_again_below_it() {
        let mut links = Links::default();
        let path = PathBuf::from("d/".repeat(500));
        let mut inodes = 0..;
        while links.bytes + path.as_os_str().len() + OVERHEAD <= MAXIMUM_BYTES {
            links.remember(&found(inodes.next().unwrap(), 2), &path);
        }
        let one_more = found(inodes.next().unwrap(), 2);
        links.remember(&one_more, &path);
        assert_eq!(links.first(&one_more), None, "it is a file of its own");
        assert!(links.first(&found(0, 2)).is_some());
        links.remember(&one_more, &path);
        assert!(links.first(&one_more).is_some());
        links.remember(&one_more, Path::new(&"x".repeat(MAXIMUM_PATH + 1)));
        assert_eq!(links.first(&one_more), None);
    }

    proptest! {
        #[test]
        fn what_is_counted_is_what_is_remembered(
            steps in prop::collection::vec((any::<bool>(), 0..6_u64, 0..4_u32, "[a-z/]{0,9}"), 0..60),
        ) {
            let mut links = Links::default();
            let mut model: HashMap<u64, (String, u32)> = HashMap::new();
            for (ask, inode, names, path) in steps {
                let file = found(inode, names);
                if ask {
                    let known = model.get_mut(&inode).map(|(path, left)| { *left -= 1; path.clone() });
                    model.retain(|_, (_, left)| *left > 0);
                    prop_assert_eq!(links.first(&file), known.map(PathBuf::from));
                } else {
                    links.remember(&file, Path::new(&path));
                    if names > 1 {
                        model.insert(inode, (path, names - 1));
                    }
                }
                let bytes: usize = model.values().map(|(path, _)| path.len() + OVERHEAD).sum();
                prop_assert_eq!((links.first.len(), links.bytes), (model.len(), bytes));
            }
        }
    }
}
