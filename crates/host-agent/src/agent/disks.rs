//! Which driver keeps the root disks of a stack.
//!
//! The layers that there are say nothing certain of what they are: a guest writes the first bytes of a plain file, and could
//! write there what a dm-snapshot begins with, whose first block names a file of the host. So the stack's directory says
//! which driver made them, and while there are any, a stack does not change between dm-snapshots and others.

use std::{
    fs,
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use camino::Utf8Path;
use clap::ValueEnum as _;
use tokio::time::{Instant, sleep};
use wrenn_types::InstanceId;

use super::{StartError, failed};
use crate::{
    config::DiskDriver,
    rootfs::{DmSnapshotStore, FileStore, Qcow2Store, RootfsError, RootfsResult, RootfsStore},
    warm::blocking,
};

/// How long an earlier agent may take to end after it was told so.
const END: Duration = Duration::from_secs(10);
/// How long to wait before it is looked again whether it has ended: a lock tells nothing.
const END_PAUSE: Duration = Duration::from_millis(20);
/// The file of a stack's agent that says it.
const KEPT: &str = "disk-driver";

/// The word for a driver, as `--disks` takes it.
fn word(driver: DiskDriver) -> String {
    driver.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The store of the disks of the agent in `dir`.
///
/// # Errors
/// The host cannot have such disks, or there are others.
pub(super) async fn open(
    driver: DiskDriver,
    instance: &InstanceId,
    dir: &Utf8Path,
) -> Result<Arc<dyn RootfsStore>, StartError> {
    keep(driver, dir)?;
    let begin = Instant::now();
    loop {
        let of = instance.clone();
        match blocking(move || make(driver, &of)).await {
            Err(RootfsError::InUse { .. }) if begin.elapsed() < END => sleep(END_PAUSE).await,
            made => return made.map_err(StartError::DiskDriver),
        }
    }
}

fn make(driver: DiskDriver, instance: &InstanceId) -> RootfsResult<Arc<dyn RootfsStore>> {
    Ok(match driver {
        DiskDriver::Qcow2 => Arc::new(Qcow2Store),
        DiskDriver::File => Arc::new(FileStore),
        DiskDriver::DmSnapshot => Arc::new(DmSnapshotStore::new(instance)?),
    })
}

/// Notes which driver it is, unless there are disks of one that it does not go with.
fn keep(driver: DiskDriver, dir: &Utf8Path) -> Result<(), StartError> {
    let (path, wanted) = (dir.join(KEPT), word(driver));
    let kept = match fs::read_to_string(&path) {
        Ok(kept) => Some(kept.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed("read", &path)(error)),
    };
    if kept.as_ref() == Some(&wanted) {
        return Ok(());
    }
    // Of a stack of an earlier version nothing is noted. It had no dm-snapshots.
    let ours = word(DiskDriver::DmSnapshot);
    let is_other = (wanted == ours) != (kept.as_ref() == Some(&ours));
    if is_other && has_layers(&dir.join("disks"))? {
        return Err(StartError::OtherDisks {
            kept: kept.unwrap_or_else(|| "file or qcow2".to_owned()),
            wanted,
        });
    }
    let write = || {
        let mut file = fs::File::create(&path)?;
        writeln!(file, "{wanted}")?;
        file.sync_all()
    };
    write().map_err(failed("write", &path))
}

fn has_layers(disks: &Utf8Path) -> Result<bool, StartError> {
    match disks.read_dir_utf8() {
        Ok(mut layers) => Ok(layers.next().is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("list", disks)(error)),
    }
}

#[cfg(test)]
mod tests {
    use camino::Utf8PathBuf;

    use super::*;

    #[test]
    fn a_stack_with_disks_does_not_change_to_or_from_snapshots() {
        let place = tempfile::tempdir().unwrap();
        let dir = Utf8PathBuf::from_path_buf(place.path().to_owned()).unwrap();
        let refused = |driver| match keep(driver, &dir) {
            Err(StartError::OtherDisks { kept, wanted }) => Some((kept, wanted)),
            other => other.map(|()| None).unwrap(),
        };
        // Nothing is noted, and there is nothing.
        assert_eq!(refused(DiskDriver::DmSnapshot), None);
        assert_eq!(fs::read_to_string(dir.join(KEPT)).unwrap(), "dm-snapshot\n");
        assert_eq!(refused(DiskDriver::File), None);
        fs::create_dir(dir.join("disks")).unwrap();
        assert_eq!(refused(DiskDriver::DmSnapshot), None);
        let layer = dir.join("disks/ly-00000000");
        fs::write(&layer, "").unwrap();
        let pair = |kept: &str, wanted: &str| Some((kept.to_owned(), wanted.to_owned()));
        for driver in [DiskDriver::File, DiskDriver::Qcow2] {
            assert_eq!(refused(driver), pair("dm-snapshot", &word(driver)));
        }
        assert_eq!(refused(DiskDriver::DmSnapshot), None);
        fs::remove_file(&layer).unwrap();
        assert_eq!(refused(DiskDriver::Qcow2), None);
        fs::write(&layer, "").unwrap();
        // These two have always gone together.
        assert_eq!(refused(DiskDriver::File), None);
        assert_eq!(refused(DiskDriver::DmSnapshot), pair("file", "dm-snapshot"));
        fs::remove_file(dir.join(KEPT)).unwrap();
        assert_eq!(refused(DiskDriver::DmSnapshot), pair("file or qcow2", "dm-snapshot"));
        assert_eq!(refused(DiskDriver::File), None);
    }
}
