//! Moving from the initramfs to the root disk.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use rustix::{
    io::Errno,
    mount::{mount, mount_move},
    process::{chdir, chroot},
};
use wrenn_guest_linux::{
    block::{MOUNT_FLAGS, MOUNT_OPTIONS},
    uevent::Uevents,
};

use crate::{
    console::{chain, say},
    disk::{self, DiskError, ROOT_DISK},
    names, tree,
};

/// How long the disk may take to appear, if the machine has a device for it.
const DISK_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for a disk of which there is no sign.
const NO_SIGN_LIMIT: Duration = Duration::from_millis(500);
const NEW_ROOT: &str = "/newroot";
/// What is mounted already and moves along.
const MOVED: [&str; 4] = ["dev", "proc", "sys", "run"];
/// The virtio bus, and what a disk calls itself there.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
const VIRTIO_DISK: &str = "0x0002";

/// Which step of the move failed, and why.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    #[error("cannot make {path}")]
    Directory {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot mount {ROOT_DISK}")]
    Mount(#[source] Errno),
    #[error("cannot move {0}")]
    Move(String, #[source] Errno),
    #[error("cannot change the root")]
    Change(#[source] Errno),
}

/// Moves to the root disk, or stays where it is if there is none.
pub(super) fn enter(events: Option<&Uevents>) -> Result<(), RootError> {
    if !wait_for_disk(events) {
        say(format_args!("there is no {ROOT_DISK}: staying on the initramfs"));
        make_temporary("/tmp");
        return Ok(());
    }
    make_directory(NEW_ROOT)?;
    mount(ROOT_DISK, NEW_ROOT, "ext4", MOUNT_FLAGS, MOUNT_OPTIONS).map_err(RootError::Mount)?;
    for name in MOVED {
        let (from, to) = (format!("/{name}"), format!("{NEW_ROOT}/{name}"));
        make_directory(&to)?;
        mount_move(&from, &to).map_err(|source| RootError::Move(from, source))?;
    }
    free_initramfs();
    chdir(NEW_ROOT).map_err(RootError::Change)?;
    mount_move(".", "/").map_err(|source| RootError::Move(NEW_ROOT.to_owned(), source))?;
    chroot(".").map_err(RootError::Change)?;
    chdir("/").map_err(RootError::Change)?;
    make_temporary("/tmp");
    if let Err(error) = names::move_to_memory(Path::new("/")) {
        // They are written where they are, then: slower, and no less right.
        say(format_args!("cannot keep the machine's names in memory: {error}"));
    }
    if let Err(error) = grow() {
        say(format_args!("{}", chain(&error)));
    }
    Ok(())
}

/// Lets the file system fill its disk. Done at boot, it is in the snapshot that a boot is made for, and costs the
/// sandboxes that start from it nothing.
fn grow() -> Result<(), DiskError> {
    disk::bytes().map_or(Ok(()), disk::grow_root)
}

fn wait_for_disk(events: Option<&Uevents>) -> bool {
    let there = || Path::new(ROOT_DISK).exists();
    let limit = if expects_disk() { DISK_LIMIT } else { NO_SIGN_LIMIT };
    match events {
        Some(events) => events.wait_until(limit, there).unwrap_or_else(|_| there()),
        None => there(),
    }
}

/// Whether the machine has a device that will be a disk once its driver is done with it.
fn expects_disk() -> bool {
    let devices = fs::read_dir(VIRTIO_DEVICES).into_iter().flatten().flatten();
    devices
        .map(|device| device.path().join("device"))
        .any(|kind| fs::read_to_string(kind).is_ok_and(|kind| kind.trim() == VIRTIO_DISK))
}

fn make_directory(path: &str) -> Result<(), RootError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(RootError::Directory { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// A directory where everybody may write. An image without one still gets it.
fn make_temporary(path: &str) {
    if fs::create_dir(path).is_ok() {
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o1777));
    }
}

/// Removes what the initramfs holds: it is memory. The program that runs stays, as long as it runs.
fn free_initramfs() {
    let Ok(device) = fs::metadata("/").map(|root| root.dev()) else { return };
    for entry in fs::read_dir("/").into_iter().flatten().flatten() {
        let path = entry.path();
        let here = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.dev() == device);
        if let (true, Some(path)) = (here, path.to_str()) {
            // What cannot be removed costs a little memory.
            let _ = tree::remove(path);
        }
    }
}
