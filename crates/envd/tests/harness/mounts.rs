//! File systems that a test mounts, which nobody else sees.

use std::{ffi::CString, fs, path::Path};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Gives this thread, and what it starts from now on, mounts of its own.
pub(crate) fn separate() {
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("these tests run as root");
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
}

/// Mounts a file system in memory; the directory is made where it is missing. Only for who has mounts of its own.
pub(crate) fn memory(path: impl AsRef<Path>, options: &str) {
    let path = path.as_ref();
    fs::create_dir_all(path).unwrap();
    let options = CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", path, "tmpfs", flags, Some(options.as_c_str())).unwrap();
}

/// Shows a directory at another place too.
pub(crate) fn bind(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    fs::create_dir_all(to.as_ref()).unwrap();
    rustix::mount::mount_bind(from.as_ref(), to.as_ref()).unwrap();
}
