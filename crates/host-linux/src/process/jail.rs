//! A root of its own for a process: nothing of the host's file system is in it but what is named.
//!
//! ```text
//!  parent   Jail: what is shown, as whom it runs ─► Layout: system calls to be made, with their texts
//!  child    new mount namespace ─► tmpfs ─► directories, links, nodes, read-only mounts ─► read-only ─► it is the root
//!           ─► no capabilities ─► user and group ─► no new privileges ─► program
//! ```
//!
//! The mounts are the child's alone and end with it: nothing is left to be removed. What is shown lies at the same path as
//! on the host, so that a name means the same to both.
//!
//! A program that makes a jail itself, as Firecracker's does, is given a [`Stage`]: the same without the last two lines, in a
//! directory of the host's file system as it sees it.

use std::{
    collections::BTreeSet,
    ffi::{CString, OsStr, c_int},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::FileTypeExt, fs::MetadataExt},
    path::{Component, Path, PathBuf},
    ptr,
};

use nix::libc;

/// What a process is confined to.
#[derive(Debug)]
pub struct Jail {
    user: u32,
    view: View,
}

/// A file system of its own for a process that stays what it is: mounted over a directory, with files of the host in it.
#[derive(Debug)]
pub struct Stage(View);

/// What is seen in a new file system.
#[derive(Debug)]
struct View {
    place: PathBuf,
    options: String,
    is_root: bool,
    shown: Vec<Shown>,
}

#[derive(Debug)]
struct Shown {
    from: PathBuf,
    at: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A file or directory, or a link.
    Same { is_written: bool },
    /// A node of the same device, of this user.
    Node(u32),
    /// An empty file.
    Empty,
}

impl Jail {
    /// A jail without anything in it, for a process with this user and group. Its root is mounted over `place`, a directory that is there,
    /// where only the process sees it.
    #[must_use]
    pub fn new(place: impl Into<PathBuf>, user: u32) -> Self {
        // Room for names alone.
        let options = "mode=0755,size=256k,nr_inodes=1024".to_owned();
        Self { user, view: View { place: place.into(), options, is_root: true, shown: Vec::new() } }
    }

    /// Shows a file or directory of the host, at its own path and not to be changed. A symbolic link is shown as one. Of
    /// what is mounted below a directory nothing is shown.
    #[must_use]
    pub fn show(mut self, path: impl Into<PathBuf>) -> Self {
        let from = path.into();
        let at = from.clone();
        self.view.shown.push(Shown { from, at, kind: Kind::Same { is_written: false } });
        self
    }

    /// Makes a node of a device of the host at its own path, for this process alone.
    #[must_use]
    pub fn device(mut self, path: impl Into<PathBuf>) -> Self {
        let from = path.into();
        let (at, kind) = (from.clone(), Kind::Node(self.user));
        self.view.shown.push(Shown { from, at, kind });
        self
    }

    /// The user and group.
    pub(super) fn user(&self) -> u32 {
        self.user
    }

    pub(super) fn layout(&self) -> Result<Layout, (PathBuf, io::Error)> {
        self.view.layout()
    }
}

impl Stage {
    /// A stage over `place`, a directory that is there, with room for so many bytes of its own.
    #[must_use]
    pub fn new(place: impl Into<PathBuf>, bytes: u64) -> Self {
        let options = format!("mode=0700,size={bytes}");
        Self(View { place: place.into(), options, is_root: false, shown: Vec::new() })
    }

    /// Shows a file or directory of the host at `at`, an absolute path as if the stage were a root.
    #[must_use]
    pub fn show(mut self, from: impl Into<PathBuf>, at: impl Into<PathBuf>, is_written: bool) -> Self {
        self.0.shown.push(Shown { from: from.into(), at: at.into(), kind: Kind::Same { is_written } });
        self
    }

    /// Makes a node at `at` of a device of the host, for this user.
    #[must_use]
    pub fn device(mut self, from: impl Into<PathBuf>, at: impl Into<PathBuf>, user: u32) -> Self {
        self.0.shown.push(Shown { from: from.into(), at: at.into(), kind: Kind::Node(user) });
        self
    }

    /// Makes an empty file on which something can be mounted later.
    #[must_use]
    pub fn place(mut self, at: impl Into<PathBuf>) -> Self {
        let at = at.into();
        self.0.shown.push(Shown { from: at.clone(), at, kind: Kind::Empty });
        self
    }

    pub(super) fn layout(&self) -> Result<Layout, (PathBuf, io::Error)> {
        self.0.layout()
    }
}

impl View {
    /// Looks at what is shown, and prepares the calls that make it.
    fn layout(&self) -> Result<Layout, (PathBuf, io::Error)> {
        let options =
            CString::new(self.options.as_str()).map_err(|error| (self.place.clone(), error.into()))?;
        let mut layout =
            Layout { place: text(&self.place)?, options, is_root: self.is_root, makes: Vec::new() };
        let mut made = BTreeSet::new();
        let mut whole: Vec<&Path> = Vec::new();
        for Shown { from, at, kind } in &self.shown {
            if whole.iter().any(|directory| at.starts_with(directory)) {
                continue;
            }
            let failed = |error| (from.clone(), error);
            let is_written = match *kind {
                Kind::Same { is_written } => is_written,
                Kind::Empty => {
                    let at = layout.within(at, &mut made)?;
                    layout.makes.push(Make::File(at));
                    continue;
                }
                Kind::Node(user) => {
                    let device = fs::metadata(from).map_err(failed)?;
                    let kind = match device.file_type() {
                        kind if kind.is_char_device() => libc::S_IFCHR,
                        kind if kind.is_block_device() => libc::S_IFBLK,
                        _ => return Err(failed(io::Error::other("it is no device"))),
                    };
                    let at = layout.within(at, &mut made)?;
                    layout.makes.push(Make::Node { at, mode: kind | 0o600, device: device.rdev(), user });
                    continue;
                }
            };
            let kind = fs::symlink_metadata(from).map_err(failed)?.file_type();
            let within = layout.within(at, &mut made)?;
            if kind.is_symlink() {
                let to = text(&fs::read_link(from).map_err(failed)?)?;
                layout.makes.push(Make::Link { to, at: within });
                continue;
            }
            match kind.is_dir() {
                true => layout.makes.push(Make::Directory(within.clone())),
                false => layout.makes.push(Make::File(within.clone())),
            }
            layout.makes.push(Make::Mount { from: text(from)?, at: within, is_written });
            if kind.is_dir() {
                whole.push(at);
            }
        }
        Ok(layout)
    }
}

fn text(path: &Path) -> Result<CString, (PathBuf, io::Error)> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| (path.to_owned(), error.into()))
}

/// What is made in the new root. Paths are relative to it.
enum Make {
    Directory(CString),
    File(CString),
    Link { to: CString, at: CString },
    Node { at: CString, mode: libc::mode_t, device: libc::dev_t, user: u32 },
    Mount { from: CString, at: CString, is_written: bool },
}

/// All that the child needs to build its root.
pub(super) struct Layout {
    place: CString,
    options: CString,
    is_root: bool,
    makes: Vec<Make>,
}

impl Layout {
    /// The place of a path in the new root, whose parents are made before it.
    fn within(&mut self, path: &Path, made: &mut BTreeSet<PathBuf>) -> Result<CString, (PathBuf, io::Error)> {
        let names: Option<PathBuf> = path
            .components()
            .filter(|part| *part != Component::RootDir)
            .map(|part| matches!(part, Component::Normal(_)).then(|| Path::new(part.as_os_str())))
            .collect();
        let within = names.filter(|names| path.is_absolute() && *names != Path::new(""));
        let within = within.ok_or_else(|| (path.to_owned(), io::ErrorKind::InvalidInput.into()))?;
        let mut parents: Vec<&Path> = within.ancestors().skip(1).filter(|at| *at != Path::new("")).collect();
        parents.reverse();
        for parent in parents {
            if made.insert(parent.to_owned()) {
                self.makes.push(Make::Directory(text(parent)?));
            }
        }
        text(&within)
    }

    /// Makes the file system, and makes it the root of this process if it is to be.
    ///
    /// # Errors
    /// -1, with the reason in `errno`.
    ///
    /// # Safety
    /// Only in a fresh child: see [`super::spawn`]. It allocates nothing.
    #[allow(unsafe_code)]
    pub(super) unsafe fn enter(&self) -> c_int {
        const NOTHING: *const libc::c_void = ptr::null();
        const MOUNTED: libc::c_ulong = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_NOSUID;
        // SAFETY: only system call wrappers that are async-signal-safe are called, with texts that `self` holds or that are
        // constant. What they change (namespace, root, working directory, mask of modes) is the child's own: it shares none
        // of `CLONE_FS` and `CLONE_NEWNS` with its parent.
        unsafe {
            macro_rules! must {
                ($call:expr) => {
                    if $call < 0 {
                        return -1;
                    }
                };
            }
            must!(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS));
            // The program of a stage is executed from there.
            let own = if self.is_root { libc::MS_NOSUID | libc::MS_NOEXEC } else { libc::MS_NOSUID };
            let none = c"none".as_ptr();
            must!(libc::mount(none, c"/".as_ptr(), ptr::null(), libc::MS_REC | libc::MS_PRIVATE, NOTHING));
            let tmpfs = c"tmpfs".as_ptr();
            must!(libc::mount(tmpfs, self.place.as_ptr(), tmpfs, own, self.options.as_ptr().cast()));
            must!(libc::chdir(self.place.as_ptr()));
            libc::umask(0o022);
            for make in &self.makes {
                match make {
                    Make::Directory(at) => {
                        if libc::mkdir(at.as_ptr(), 0o755) < 0 && *libc::__errno_location() != libc::EEXIST {
                            return -1;
                        }
                    }
                    Make::File(at) => must!(libc::mknod(at.as_ptr(), libc::S_IFREG | 0o644, 0)),
                    Make::Link { to, at } => must!(libc::symlink(to.as_ptr(), at.as_ptr())),
                    Make::Node { at, mode, device, user } => {
                        must!(libc::mknod(at.as_ptr(), *mode, *device));
                        must!(libc::chown(at.as_ptr(), *user, *user));
                    }
                    Make::Mount { from, at, is_written } => {
                        must!(libc::mount(from.as_ptr(), at.as_ptr(), ptr::null(), libc::MS_BIND, NOTHING));
                        let reads = if *is_written { 0 } else { libc::MS_RDONLY };
                        let again = MOUNTED | reads | libc::MS_NODEV;
                        must!(libc::mount(none, at.as_ptr(), ptr::null(), again, NOTHING));
                    }
                }
            }
            if !self.is_root {
                libc::umask(0o077);
                return libc::chdir(c"/".as_ptr());
            }
            // Nodes are used through it, so that it is not mounted without them.
            let again = MOUNTED | libc::MS_RDONLY | libc::MS_NOEXEC;
            must!(libc::mount(none, c".".as_ptr(), ptr::null(), again, NOTHING));
            // The former root lies over the new one for a moment, and is taken away.
            must!(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()));
            must!(libc::umount2(c".".as_ptr(), libc::MNT_DETACH));
            libc::chdir(c"/".as_ptr())
        }
    }
}

/// Gives up every capability that a program could still be given.
///
/// # Safety
/// Only in a fresh child: see [`super::spawn`].
#[allow(unsafe_code)]
pub(super) unsafe fn drop_bounding_set() -> c_int {
    /// More than there are.
    const CAPABILITIES: libc::c_ulong = 64;
    for capability in 0..CAPABILITIES {
        // SAFETY: no pointers; the set is the child's own.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0_u64, 0_u64, 0_u64) };
        // SAFETY: the location is this thread's.
        if dropped < 0 && unsafe { *libc::__errno_location() } != libc::EINVAL {
            return -1;
        }
    }
    0
}

/// Makes sure that no program that is executed from here on has more rights.
///
/// # Safety
/// As [`drop_bounding_set`].
#[allow(unsafe_code)]
pub(super) unsafe fn no_new_privileges() -> c_int {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) }
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layout({:?})", OsStr::from_bytes(self.place.as_bytes()))
    }
}

#[cfg(test)]
#[path = "jail_tests.rs"]
mod tests;
