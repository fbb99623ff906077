//! The root disk: how large it is, and growing its file system.
//!
//! The host makes the disk of a sandbox as large as was asked for. At boot the file system grows to the disk. After a
//! restore the disk may be larger than it was when the snapshot was taken, and `/init` says how large; then it grows
//! again, while it is in use.

use std::{fs, path::Path, time::Duration};

use rustix::io::Errno;
use wrenn_guest_linux::{
    block::{ResizeError, grow_ext4},
    uevent::Uevents,
};

/// The root disk.
pub(crate) const ROOT_DISK: &str = "/dev/vda";
/// Its size, in sectors of 512 bytes.
const SECTORS: &str = "/sys/class/block/vda/size";
/// How long the disk may take to show the size that the host gave it.
const LIMIT: Duration = Duration::from_secs(5);

/// Why the root file system did not grow.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot listen for changes of the disk")]
    Uevents(#[source] Errno),
    #[error("the disk did not show {wanted} bytes within {LIMIT:?}")]
    Size { wanted: u64 },
    #[error("cannot grow the root file system")]
    Resize(#[source] ResizeError),
}

/// The size of the root disk.
pub(crate) fn bytes() -> Option<u64> {
    fs::read_to_string(SECTORS).ok()?.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Waits until the root disk shows `wanted` bytes, then grows its file system to them.
pub(crate) fn grow_root(wanted: u64) -> Result<(), DiskError> {
    let shows_it = || bytes().is_some_and(|size| size >= wanted);
    if !shows_it() {
        let events = Uevents::open().map_err(DiskError::Uevents)?;
        if !events.wait_until(LIMIT, shows_it).map_err(DiskError::Uevents)? {
            return Err(DiskError::Size { wanted });
        }
    }
    grow_ext4(Path::new(ROOT_DISK), Path::new("/"), wanted).map_err(DiskError::Resize)
}
