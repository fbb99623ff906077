//! Which disk of the host a file is on, as the kernel numbers them.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// A whole disk: never a partition of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    major: u32,
    minor: u32,
}

/// As control groups name it.
impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Disk {
    /// The disk that a file or directory is on. None where its filesystem has no disk of its own: it is in memory,
    /// on the network, or on several disks.
    ///
    /// # Errors
    /// The file is not there, or the kernel does not say.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let device = rustix::fs::stat(path)?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        // Those without a device have the number 0.
        if major == 0 {
            return Ok(None);
        }
        Self::whole(Path::new("/sys/dev/block"), Self { major, minor })
    }

    /// The disk that this is a partition of, or itself.
    fn whole(devices: &Path, device: Self) -> io::Result<Option<Self>> {
        // The link is resolved, so that the parent is that of the device.
        let found: PathBuf = match fs::canonicalize(devices.join(device.to_string())) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !found.join("partition").try_exists()? {
            return Ok(Some(device));
        }
        let Some(parent) = found.parent() else { return Ok(None) };
        Ok(Self::parse(&fs::read_to_string(parent.join("dev"))?))
    }

    /// Reads what the kernel writes: two numbers with a colon between them.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_its_disk() {
        let place = tempfile::tempdir().unwrap();
        let disk = place.path().join("block/sda");
        fs::create_dir_all(disk.join("sda2")).unwrap();
        fs::write(disk.join("dev"), "8:0\n").unwrap();
        fs::write(disk.join("sda2/partition"), "2\n").unwrap();
        let devices = place.path().join("dev");
        fs::create_dir(&devices).unwrap();
        for (number, target) in [("8:0", "../block/sda"), ("8:2", "../block/sda/sda2")] {
            std::os::unix::fs::symlink(target, devices.join(number)).unwrap();
        }
        let whole = |minor| Disk::whole(&devices, Disk { major: 8, minor }).unwrap();
        assert_eq!(whole(2).unwrap().to_string(), "8:0");
        assert_eq!(whole(0).unwrap().to_string(), "8:0");
        assert_eq!(whole(3), None, "there is none of that number");
    }

    #[test]
    fn what_is_in_memory_is_on_no_disk() {
        assert_eq!(Disk::of(Path::new("/proc")).unwrap(), None);
        assert_eq!(Disk::of(Path::new("/nowhere")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
