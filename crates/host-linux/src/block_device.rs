//! Block devices by their numbers: what the kernel calls them, and names for them that are ours.
//!
//! Nothing here expects that something else (udev, devtmpfs) has made a name for a device: in a container or a
//! jail nothing does. A name is made where devices may be opened, which a mount of `/run` often forbids (`nodev`).

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

/// The number by which the kernel knows a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Of its driver.
    pub major: u32,
    /// Among those of its driver.
    pub minor: u32,
}

/// As the kernel writes and takes it: `7:0`.
impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl DeviceNumber {
    /// From the 64 bits in which the kernel hands it over in structures: the lowest 8 bits of the minor number, 12 of
    /// the major one, and the rest of the former.
    pub(crate) fn from_huge(number: u64) -> Self {
        let [low, high] = [number & 0xff, (number >> 12) & 0xf_ff00];
        let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
        Self { major: half((number >> 8) & 0xfff), minor: half(low | high) }
    }

    /// Makes a name for it that only its owner can open. One that is there already is replaced.
    ///
    /// # Errors
    /// There may be none of this name then.
    pub fn make_node(self, path: &Path) -> io::Result<()> {
        remove_node(path)?;
        let device = makedev(self.major, self.minor);
        Ok(mknodat(CWD, path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, device)?)
    }

    /// Opens it, for writing too if `writable`, by a name in `directory` that is gone again when this returns.
    ///
    /// # Errors
    /// As for every open; `ENXIO` where there is no such device.
    pub fn open(self, directory: &Path, writable: bool) -> io::Result<File> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique = format!(".open-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path: PathBuf = directory.join(unique);
        self.make_node(&path)?;
        let opened = OpenOptions::new().read(true).write(writable).open(&path);
        remove_node(&path)?;
        opened
    }
}

/// Removes the name of a device. Idempotent.
///
/// # Errors
/// As for every removal.
pub fn remove_node(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_apart_as_the_kernel_puts_them_together() {
        for (number, major, minor) in
            [(0x0700, 7, 0), (0xfd05, 253, 5), (0x7ff, 7, 255), (0x10_0700, 7, 256), (0x1f0_0701, 7, 0x1f01)]
        {
            assert_eq!(DeviceNumber::from_huge(number), DeviceNumber { major, minor }, "{number:x}");
        }
        assert_eq!(DeviceNumber { major: 253, minor: 12 }.to_string(), "253:12");
    }
}
