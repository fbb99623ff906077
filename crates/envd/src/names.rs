//! The small files in `/etc` that name a machine, and where they really are.
//!
//! Every create gives a clone new ones. On the root disk each of them would be a write to a file system
//! with a journal, which is the dearest thing that a create asks of a guest; in memory it is next to nothing.
//! So init moves them once, at boot, to a directory on the temporary file system under `/run`, and leaves
//! links in `/etc`. Whoever replaces a link by a file of their own has the file: only our own links are
//! followed when a name is written.
//!
//! The boot's own name, `boot_id`, is one of them: the kernel makes it once and cannot be told another, so a file of
//! ours lies over it. Only who mounts another `/proc`, as container engines do, still sees the kernel's.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Where the files are.
const DIRECTORY: &str = "/run/wrenn/names";
/// Their names in `/etc`.
const FILES: [&str; 4] = ["hostname", "hosts", "machine-id", "resolv.conf"];
/// The file that lies over the kernel's [`BOOT_ID`].
const OUR_BOOT_ID: &str = "boot_id";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Reading it makes a new name each time, from the kernel's generator.
const UUID: &str = "/proc/sys/kernel/random/uuid";

/// Where `/etc/NAME` is kept.
fn place_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Moves the files of the machine whose root is `root`. Those that are there keep their content; done
/// again, nothing happens.
pub(crate) fn move_to_memory(root: &Path) -> io::Result<()> {
    let directory = below(root, Path::new(DIRECTORY));
    fs::create_dir_all(&directory)?;
    fs::create_dir_all(root.join("etc"))?;
    for name in FILES {
        let (link, place) = (root.join("etc").join(name), directory.join(name));
        if fs::read_link(&link).is_ok_and(|target| target == place_of(name)) {
            // A boot from a disk on which this was done before: the memory is new, the link is not.
            if !place.exists() {
                fs::write(&place, "")?;
            }
            continue;
        }
        // A dangling link, or nothing, is an empty file.
        fs::write(&place, fs::read(&link).unwrap_or_default())?;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o644))?;
        let fresh = root.join("etc").join(format!(".{name}.wrenn"));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(place_of(name), &fresh)?;
        fs::rename(&fresh, &link)?;
    }
    Ok(())
}

/// Puts a file of ours over the kernel's name of this boot, with the same content.
pub(crate) fn cover_boot_id() -> io::Result<()> {
    let ours = place_of(OUR_BOOT_ID);
    fs::create_dir_all(DIRECTORY)?;
    fs::write(&ours, fs::read(BOOT_ID)?)?;
    fs::set_permissions(&ours, fs::Permissions::from_mode(0o444))?;
    Ok(rustix::mount::mount_bind(&ours, BOOT_ID)?)
}

/// Gives this boot another name, where ours lies over the kernel's.
pub(crate) fn renew_boot_id(root: &Path) -> io::Result<()> {
    let ours = below(root, &place_of(OUR_BOOT_ID));
    if !ours.exists() {
        return Ok(());
    }
    // The same file, because it is the file that is mounted.
    fs::write(&ours, fs::read(UUID)?)
}

/// Where to write `/etc/NAME` of this root, when it is one of our links.
pub(crate) fn in_memory(root: &Path, name: &str) -> Option<PathBuf> {
    let target = fs::read_link(root.join("etc").join(name)).ok()?;
    (target == place_of(name)).then(|| below(root, &target))
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_keep_their_content_and_become_links() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("hosts"), "127.0.0.1 localhost\n").unwrap();
        symlink("../run/not/there", etc.join("resolv.conf")).unwrap();
        for _ in 0..2 {
            move_to_memory(root.path()).unwrap();
            for name in FILES {
                assert_eq!(fs::read_link(etc.join(name)).unwrap(), place_of(name));
                assert!(in_memory(root.path(), name).unwrap().is_file());
            }
        }
        let hosts = in_memory(root.path(), "hosts").unwrap();
        assert_eq!(fs::read_to_string(hosts).unwrap(), "127.0.0.1 localhost\n");
    }

    #[test]
    fn a_boot_gets_another_name_in_the_same_file() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        renew_boot_id(root.path()).unwrap();
        let ours = below(root.path(), &place_of(OUR_BOOT_ID));
        assert!(!ours.exists(), "nothing lies over the kernel's");
        fs::create_dir_all(ours.parent().unwrap()).unwrap();
        fs::write(&ours, fs::read(BOOT_ID).unwrap()).unwrap();
        let file = fs::metadata(&ours).unwrap().ino();
        let mut seen = std::collections::HashSet::from([fs::read_to_string(&ours).unwrap()]);
        for _ in 0..2 {
            renew_boot_id(root.path()).unwrap();
            let name = fs::read_to_string(&ours).unwrap();
            assert_eq!((name.len(), name.matches('-').count()), (37, 4), "{name}");
            assert!(seen.insert(name));
        }
        assert_eq!(fs::metadata(&ours).unwrap().ino(), file);
    }

    #[test]
    fn a_file_of_somebody_elses_is_theirs() {
        let root = tempfile::tempdir().unwrap();
        move_to_memory(root.path()).unwrap();
        let hosts = root.path().join("etc/hosts");
        fs::remove_file(&hosts).unwrap();
        fs::write(&hosts, "mine").unwrap();
        assert_eq!(in_memory(root.path(), "hosts"), None);
    }
}
