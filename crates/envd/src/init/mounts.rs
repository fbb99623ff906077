//! The file systems that the kernel itself provides, and the console.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::layout::{CGROUPS, USER_CGROUP};

/// Which mount failed, and why.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    #[error("cannot make {path}")]
    Directory {
        path: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot mount {kind} on {path}")]
    Mount {
        kind: &'static str,
        path: &'static str,
        #[source]
        source: Errno,
    },
    #[error("cannot use the console")]
    Console(#[source] Errno),
}

struct Mount {
    kind: &'static str,
    path: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
}

const STRICT: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const MEMORY: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// In this order: each may lie in the one before. Group 5 is `tty`. There is no `/tmp`: it lies on the root disk,
/// because a guest has more disk than memory.
const MOUNTS: [Mount; 6] = [
    Mount { kind: "devtmpfs", path: "/dev", flags: MountFlags::NOSUID, options: c"mode=755" },
    Mount { kind: "proc", path: "/proc", flags: STRICT, options: c"" },
    Mount { kind: "sysfs", path: "/sys", flags: STRICT, options: c"" },
    Mount {
        kind: "devpts",
        path: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"gid=5,mode=620,ptmxmode=666",
    },
    Mount { kind: "tmpfs", path: "/dev/shm", flags: MEMORY, options: c"mode=1777" },
    Mount { kind: "tmpfs", path: "/run", flags: MEMORY, options: c"mode=755" },
];

/// Names in `/dev` that programs expect and the kernel does not make.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts everything. The first failure is returned, after the rest was tried.
pub(super) fn mount_all() -> Result<(), MountError> {
    let mut answer = Ok(());
    for (index, entry) in MOUNTS.iter().enumerate() {
        let mut mounted = entry.mount();
        if index == 0 {
            mounted = mounted.and_then(|()| use_console());
        }
        answer = answer.and(mounted);
    }
    for (target, link) in LINKS {
        // A name that is there already serves as well.
        let _ = symlink(target, link);
    }
    answer
}

/// Mounts the unified hierarchy and makes the cgroup in which the processes of users are born.
pub(super) fn mount_cgroups() -> Result<(), MountError> {
    Mount { kind: "cgroup2", path: CGROUPS, flags: STRICT, options: c"nsdelegate" }.mount()?;
    fs::create_dir(USER_CGROUP).map_err(|source| MountError::Directory { path: USER_CGROUP, source })
}

impl Mount {
    fn mount(&self) -> Result<(), MountError> {
        let Self { kind, path, flags, options } = *self;
        if !Path::new(path).is_dir() {
            fs::create_dir_all(path).map_err(|source| MountError::Directory { path, source })?;
        }
        mount(kind, path, kind, flags, options).map_err(|source| MountError::Mount { kind, path, source })
    }
}

/// Makes the console standard input, output and error. What the kernel opened was in the initramfs, if anything was.
fn use_console() -> Result<(), MountError> {
    let use_it = || {
        let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
        rustix::stdio::dup2_stdin(&console)?;
        rustix::stdio::dup2_stdout(&console)?;
        rustix::stdio::dup2_stderr(&console)
    };
    use_it().map_err(MountError::Console)
}
