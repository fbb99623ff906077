//! Changing a guest's root filesystem while it is a directory on the host.
//!
//! The tree holds symbolic links that only mean something inside of the guest, so nothing here follows a
//! link in the last component, and recipes name plain paths. Owners are numbers: names are the guest's.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, OpenOptions, Permissions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    cache,
    recipe::{Change, User},
};

/// A root filesystem.
#[derive(Debug)]
pub(crate) struct RootTree {
    root: PathBuf,
}

impl RootTree {
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Adds users with a group, a home from /etc/skel and, if so wished, the right to be root.
    pub(crate) fn add_users(&self, users: &[User]) -> Result<()> {
        let mut sudoers = String::new();
        for User { name, id, sudo } in users {
            // The password fields say that no password opens the account. Day 0 would mean "expired".
            self.append("etc/passwd", &format!("{name}:x:{id}:{id}:{name}:/home/{name}:/bin/bash\n"))?;
            self.append("etc/group", &format!("{name}:x:{id}:\n"))?;
            self.append("etc/shadow", &format!("{name}:*:19000:0:99999:7:::\n"))?;
            self.append("etc/gshadow", &format!("{name}:!::\n"))?;
            let home = self.root.join("home").join(name);
            copy_owned(&self.root.join("etc/skel"), &home, *id)?;
            if *sudo {
                sudoers.push_str(&format!("{name} ALL=(ALL:ALL) NOPASSWD: ALL\n"));
            }
        }
        if sudoers.is_empty() {
            return Ok(());
        }
        self.write("etc/sudoers.d/wrenn", 0o440, &sudoers)
    }

    /// Makes one change of a recipe.
    pub(crate) fn change(&self, change: &Change) -> Result<()> {
        match change {
            Change::Directory { path, mode } => {
                let path = self.root.join(path);
                fs::create_dir_all(&path)
                    .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(*mode)))
                    .with_context(|| format!("making {}", path.display()))
            }
            Change::Open { path } => open_directories(&self.root.join(path)),
            Change::File { path, mode, content } => self.write(path, *mode, content),
            Change::Remove { path } => cache::remove(&self.root.join(path)),
        }
    }

    /// Removes what the build itself left: device nodes, which the guest's kernel makes, and apt's state.
    pub(crate) fn remove_traces(&self) -> Result<()> {
        for entry in fs::read_dir(self.root.join("dev"))? {
            cache::remove(&entry?.path())?;
        }
        for path in [
            "etc/apt/apt.conf.d/99mmdebstrap",
            "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
            "etc/group-",
            "etc/gshadow-",
            "etc/passwd-",
            "etc/shadow-",
            "var/cache/ldconfig/aux-cache",
        ] {
            cache::remove(&self.root.join(path))?;
        }
        Ok(())
    }

    /// What the tree takes: bytes in whole blocks, and files of every kind.
    pub(crate) fn size(&self) -> Result<Size> {
        let mut size = Size::default();
        let mut linked = BTreeSet::new();
        let mut directories = vec![self.root.clone()];
        while let Some(directory) = directories.pop() {
            for entry in
                fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?
            {
                let entry = entry?;
                let metadata = entry.metadata()?;
                // A file with several names is there once.
                if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()) {
                    continue;
                }
                size.inodes += 1;
                // One block more for what the file's length does not tell: extents, attributes, names.
                size.blocks += metadata.size().div_ceil(BLOCK) + u64::from(metadata.is_dir());
                if metadata.is_dir() {
                    directories.push(entry.path());
                }
            }
        }
        Ok(size)
    }

    fn append(&self, path: &str, line: &str) -> Result<()> {
        let path = self.root.join(path);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .with_context(|| format!("adding to {}", path.display()))
    }

    fn write(&self, path: &str, mode: u32, content: &str) -> Result<()> {
        let path = self.root.join(path);
        // Never through a link, which would lead into the host.
        cache::remove(&path)?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// The block size of every image.
pub(crate) const BLOCK: u64 = 4096;

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) blocks: u64,
    pub(crate) inodes: u64,
}

/// Copies a directory and gives the copy to a user.
fn copy_owned(from: &Path, to: &Path, owner: u32) -> Result<()> {
    let mode = fs::metadata(from).with_context(|| format!("reading {}", from.display()))?.mode() & 0o7777;
    DirBuilder::new().mode(0o755).create(to).with_context(|| format!("making {}", to.display()))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_owned(&source, &target, owner)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            lchown(&target, Some(owner), Some(owner))?;
        } else {
            fs::copy(&source, &target).with_context(|| format!("copying {}", source.display()))?;
            chown(&target, Some(owner), Some(owner))?;
        }
    }
    fs::set_permissions(to, Permissions::from_mode(mode))?;
    chown(to, Some(owner), Some(owner)).with_context(|| format!("giving away {}", to.display()))
}

/// Lets everybody write in a directory and in all that are below it.
fn open_directories(directory: &Path) -> Result<()> {
    fs::set_permissions(directory, Permissions::from_mode(0o777))
        .with_context(|| format!("opening {}", directory.display()))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_directories(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_takes_the_place_of_a_link_and_not_of_what_it_points_at() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(host.path().join("host-file"), "host").unwrap();
        symlink(host.path().join("host-file"), root.join("etc/resolv.conf")).unwrap();
        let tree = RootTree::at(&root);
        let change =
            Change::File { path: "etc/resolv.conf".to_owned(), mode: 0o644, content: "guest".to_owned() };
        tree.change(&change).unwrap();
        assert_eq!(fs::read_to_string(host.path().join("host-file")).unwrap(), "host");
        assert!(fs::symlink_metadata(root.join("etc/resolv.conf")).unwrap().is_file());
    }

    #[test]
    fn users_get_a_home_of_their_own() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: giving files away needs root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for sub in ["etc/skel/.config", "etc/sudoers.d", "home"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        for file in ["passwd", "group", "shadow", "gshadow", "skel/.profile"] {
            fs::write(root.join("etc").join(file), "").unwrap();
        }
        let users = [User { name: "user".to_owned(), id: 1000, sudo: true }];
        RootTree::at(root).add_users(&users).unwrap();
        let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap();
        assert_eq!(passwd, "user:x:1000:1000:user:/home/user:/bin/bash\n");
        for path in ["home/user", "home/user/.config", "home/user/.profile"] {
            let metadata = fs::metadata(root.join(path)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000), "{path}");
        }
        assert_eq!(fs::metadata(root.join("etc/sudoers.d/wrenn")).unwrap().mode() & 0o777, 0o440);
    }
}
