//! Firecracker in its jailer: what it sees, and what is shown to it later.
//!
//! ```text
//!  the host                        the stage, a tmpfs that only this process sees; DIR/jail is where it is mounted
//!  DIR/api        ─► written        firecracker/NAME/root/api/control.sock    made by Firecracker
//!  DIR/*.fifo     ─► written                              console.fifo, guest=NAME
//!  disk           ─► written, or a node                   disk.link
//!  base           ─► read                                 memory              only of a clone, or instead of it
//!  memory.sock    ─► written        later                  memory.sock         where its memory is served by a pager
//!  kernel, …      ─► read                                 kernel, initramfs   only where it boots
//!  snapshot files ─► written        later, for as long    saved-state, saved-memory
//! ```
//!
//! The jailer makes `root` the root of the process, and copies Firecracker there. The root belongs to the machine's user, as
//! the jailer has it: who breaks out of the guest can change every name in it. So nothing is looked up there from outside. The socket is
//! linked to the machine's directory before a guest runs, and what is shown later is put over a name within the root of the
//! process, wherever that leads there.
//!
//! It writes files no longer than its disk and its memory are, and makes none: the directory in which it makes its socket is
//! taken from it with that.
//!
//! The files on the host stay where they are. What Firecracker writes belongs to the machine's user as long as it does; the base
//! is one file for many users, who may all read it: it has to lie below a directory that is closed to them.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown, fchown},
    sync::atomic::AtomicBool,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, Resource, Rlimit, prlimit},
};
use wrenn_host_linux::{
    mounts::{hide_in, show_in},
    netns::NetworkNamespace,
    process::{Process, Spawn, Stage},
    tap,
};

use super::launch::{CONSOLE, DISK_LINK};
use crate::{
    MachineSpec, NetworkSpec, VmmError, VmmResult,
    files::{OTHERS_MAY_READ, cannot, public, remove_stale},
    launch::{self, CONTROL_SOCKET},
    pager,
    process::on_thread,
};

/// Where the stage is mounted, and the directory of the socket.
const STAGE: &str = "jail";
const API: &str = "api";
/// Who the machine's user is.
const USER: &str = "user.mark";
/// The names in the root of what a machine begins with.
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRAMFS: &str = "initramfs";
pub(super) const STATE: &str = "state";
pub(crate) const MEMORY: &str = "memory";
/// The names in the root of what is saved.
pub(super) const SAVED_STATE: &str = "saved-state";
pub(super) const SAVED_MEMORY: &str = "saved-memory";
/// A state is small; it is copied for its machine.
const STATE_COPY: &str = "state.copy";
/// Room on the stage for what is no copy of Firecracker.
const ROOM: u64 = 1 << 20;
const OTHERS_MAY_ENTER: u32 = 0o001;
/// What a file may be longer than the disk and the memory: that of a state is none of these, and is small.
const LONGER: u64 = 64 << 20;

/// What a machine begins with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Begin<'a> {
    Boot {
        kernel: &'a Utf8Path,
        initramfs: &'a Utf8Path,
    },
    /// Without a memory it is served by a pager, which listens later.
    Load {
        state: &'a Utf8Path,
        memory: Option<&'a Utf8Path>,
    },
}

/// The name of a file, to Firecracker: where it is jailed, the one that it has there.
pub(super) fn name<'a>(user: Option<u32>, path: &'a Utf8Path, jailed: &'static str) -> &'a Utf8Path {
    if user.is_some() { jailed.into() } else { path }
}

/// The path of the socket, as Firecracker is told it and as it is on the host.
pub(super) fn socket(run_dir: &Utf8Path) -> (Utf8PathBuf, Utf8PathBuf) {
    let socket = Utf8Path::new(API).join(CONTROL_SOCKET);
    let path = run_dir.join(&socket);
    (socket, path)
}

/// A process that becomes Firecracker in its jail, with these arguments.
pub(super) async fn spawn(
    program: &Utf8Path,
    jailer: &Utf8Path,
    user: u32,
    spec: &mut MachineSpec,
    begin: Begin<'_>,
    mark: &str,
    arguments: &[&str],
) -> VmmResult<Spawn> {
    let run_dir = spec.run_dir.clone();
    let mut kept = std::mem::take(&mut spec.keep_open).into_iter();
    let (first, None) = (kept.next(), kept.next()) else {
        let problem = "the jailer closes all open files but one";
        return Err(VmmError::Unsupported { operation: "to keep several files open", problem });
    };
    let file = program.file_name().unwrap_or("firecracker");
    let root = Utf8Path::new("/").join(file).join(&spec.name).join("root");
    let copied = fs::metadata(program).map_err(cannot("examine", program))?.len();
    for directory in [STAGE, API] {
        fresh_directory(&run_dir.join(directory))?;
    }
    let own = |path: &Utf8Path| chown(path, Some(user), Some(user)).map_err(cannot("give away", path));
    let mut stage = Stage::new(run_dir.join(STAGE), copied + ROOM);
    for name in [API, CONSOLE, mark] {
        own(&run_dir.join(name))?;
        stage = stage.show(run_dir.join(name), root.join(name), true);
    }
    if let Some(disk) = &spec.disk {
        let kind = fs::metadata(&disk.path).map_err(cannot("examine", &disk.path))?.file_type();
        stage = if kind.is_block_device() {
            stage.device(&disk.path, root.join(DISK_LINK), user)
        } else {
            own(&disk.path)?;
            stage.show(&disk.path, root.join(DISK_LINK), true)
        };
    }
    match begin {
        Begin::Boot { kernel, initramfs } => {
            for (name, path) in [(KERNEL, kernel), (INITRAMFS, initramfs)] {
                let path = public(name, path)?.canonicalize_utf8().map_err(cannot("find", path))?;
                stage = stage.show(path, root.join(name), false);
            }
        }
        Begin::Load { state, memory } => {
            let copy = run_dir.join(STATE_COPY);
            remove_stale(&copy)?;
            fs::copy(state, &copy).map_err(cannot("copy", state))?;
            own(&copy)?;
            stage = stage.show(copy, root.join(STATE), false);
            stage = match memory {
                Some(memory) => {
                    let memory = memory.canonicalize_utf8().map_err(cannot("find", memory))?;
                    show_to_all(&memory)?;
                    stage.show(memory, root.join(MEMORY), false)
                }
                None => stage.place(root.join(pager::SOCKET)),
            };
        }
    }
    for name in [SAVED_STATE, SAVED_MEMORY] {
        stage = stage.place(root.join(name));
    }
    if let Some(network) = &spec.network {
        give_tap(network, user).await?;
    }
    let note = run_dir.join(USER);
    fs::write(&note, user.to_string()).map_err(cannot("write", &note))?;
    let user = user.to_string();
    let base = run_dir.join(STAGE);
    let disk = spec.disk.as_ref().map_or(Ok(0), |disk| length(&disk.path))?;
    let longest = format!("fsize={}", disk.max(spec.shape.memory.bytes()) + LONGER);
    let words = [
        "--id",
        &spec.name,
        "--exec-file",
        program.as_str(),
        "--uid",
        &user,
        "--gid",
        &user,
        "--chroot-base-dir",
        base.as_str(),
        "--resource-limit",
        &longest,
        "--",
    ];
    let words = words.map(str::to_owned);
    let spawn = launch::spawn(jailer, spec).args(words).args(arguments).stage(stage).new_process_namespace();
    Ok(match first {
        Some(kept) => spawn.stdin(kept),
        None => spawn,
    })
}

/// The user and the group of the agent, whose that is which was taken back.
fn ours() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// How long a file or a block device is.
fn length(path: &Utf8Path) -> VmmResult<u64> {
    let end = File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    end.map_err(cannot("examine", path))
}

/// Lets it write files as long as its disk is from now on.
pub(super) fn lengthen_files(process: &Process, disk: u64) -> VmmResult<()> {
    let longest = disk + LONGER;
    let pid = i32::try_from(process.pid()).ok().and_then(Pid::from_raw);
    let set = |limit| prlimit(pid, Resource::Fsize, limit);
    let raised = set(Rlimit { current: Some(longest), maximum: Some(longest) });
    let raised = raised.and_then(|former| match former.current {
        Some(bytes) if bytes <= longest => Ok(former),
        // Its memory is longer.
        _ => set(former),
    });
    let at = Utf8Path::new("/proc").join(process.pid().to_string());
    raised.map(drop).map_err(|error| cannot("change the limits of", &at)(error.into()))
}

/// What is there from an earlier life belonged to somebody else.
fn fresh_directory(path: &Utf8Path) -> VmmResult<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(cannot("remove", path)(error));
        }
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(path).map_err(cannot("create", path))
}

/// Lets every user read a file that lies where none of them can come by itself.
fn show_to_all(path: &Utf8Path) -> VmmResult<()> {
    let file = File::open(path).map_err(cannot("open", path))?;
    let mode = file.metadata().map_err(cannot("examine", path))?.permissions().mode();
    if mode & OTHERS_MAY_READ != 0 {
        return Ok(());
    }
    let is_closed = |directory: &Utf8Path| {
        fs::metadata(directory).is_ok_and(|found| found.mode() & OTHERS_MAY_ENTER == 0)
    };
    if !path.ancestors().skip(1).any(is_closed) {
        let problem = format!("everybody could read {path} if the users of machines could");
        return Err(VmmError::Spec { field: "memory", problem });
    }
    let mode = fs::Permissions::from_mode(mode | OTHERS_MAY_READ);
    file.set_permissions(mode).map_err(cannot("let others read", path))
}

async fn give_tap(network: &NetworkSpec, user: u32) -> VmmResult<()> {
    let tap = network.tap.clone();
    let failed = || cannot("give away the TAP device in", &network.namespace);
    let namespace = NetworkNamespace::open(network.namespace.as_std_path()).map_err(failed())?;
    let given = namespace.run(move || tap::give(&tap, user)).await;
    given.and_then(|given| given).map_err(failed())
}

/// Puts the socket that Firecracker has made where the agent alone makes names, and takes away the directory in which it makes
/// names. Nothing has run in it yet.
pub(super) fn take_socket(run_dir: &Utf8Path) -> VmmResult<()> {
    let (_, made) = socket(run_dir);
    let path = run_dir.join(CONTROL_SOCKET);
    fs::hard_link(&made, &path).map_err(cannot("link", &made))?;
    remove_stale(&made)?;
    // A link is never followed by that, and what it is does not change any more.
    let kind = fs::symlink_metadata(&path).map_err(cannot("examine", &path))?.file_type();
    if !kind.is_socket() {
        remove_stale(&path)?;
        return Err(cannot("take", &path)(std::io::ErrorKind::InvalidData.into()));
    }
    let directory = run_dir.join(API);
    let (user, group) = ours();
    chown(&directory, Some(user), Some(group)).map_err(cannot("take back", &directory))
}

/// Lets it connect to the pager that serves its memory, and that listens by now.
pub(super) async fn show_pager(process: &Process, run_dir: &Utf8Path) -> VmmResult<()> {
    let path = run_dir.join(pager::SOCKET);
    // It can be shown without being connected to.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path.as_std_path(), flags, Mode::empty());
    let socket = socket.map_err(|error| cannot("open", &path)(error.into()))?;
    let (process, at) = (process.clone(), Utf8Path::new("/").join(pager::SOCKET));
    let show =
        move |_: &AtomicBool| show_in(&process, &socket, at.as_std_path()).map_err(cannot("show", &path));
    on_thread("restore", show).await
}

/// The user of a machine that somebody else started; none where it is not jailed.
pub(super) fn user_in(run_dir: &Utf8Path) -> VmmResult<Option<u32>> {
    let path = run_dir.join(USER);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let user =
                text.parse().map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error));
            user.map(Some).map_err(cannot("understand", &path))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot("read", &path)(error)),
    }
}

/// Forgets who the user of an earlier life was.
pub(super) fn forget_user(run_dir: &Utf8Path) -> VmmResult<()> {
    remove_stale(&run_dir.join(USER))
}

/// Files that a jailed process is given to write, until they are taken back.
#[derive(Debug)]
pub(super) struct Lent {
    process: Process,
    files: Vec<(Utf8PathBuf, File, &'static str)>,
}

impl Lent {
    /// Shows files under these names. Blocks.
    pub(super) fn lend(
        process: &Process,
        user: u32,
        files: Vec<(Utf8PathBuf, File, &'static str)>,
    ) -> VmmResult<Self> {
        let lent = Self { process: process.clone(), files };
        for (path, file, name) in &lent.files {
            let at = Utf8Path::new("/").join(name);
            // Somebody who did not wait for the end may have lent another one.
            while hide_in(process, at.as_std_path()).is_ok() {}
            fchown(file, Some(user), Some(user)).map_err(cannot("give away", path))?;
            show_in(process, file, at.as_std_path()).map_err(cannot("show", path))?;
        }
        Ok(lent)
    }

    /// Takes them back: they are the agent's again. Blocks.
    pub(super) fn take_back(self) -> VmmResult<()> {
        let (user, group) = ours();
        for (path, file, name) in &self.files {
            let at = Utf8Path::new("/").join(name);
            let hidden = hide_in(&self.process, at.as_std_path());
            fchown(file, Some(user), Some(group)).map_err(cannot("take back", path))?;
            // There is nobody to hide it from when the process is gone.
            if let Err(error) = hidden
                && self.process.is_alive().unwrap_or(false)
            {
                return Err(cannot("hide", path)(error));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_shown_where_it_is_hidden() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().join("base");
        fs::write(&path, "").unwrap();
        let set =
            |path: &Utf8Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        set(&path, 0o600);
        set(path.parent().unwrap(), 0o700);
        show_to_all(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o604);
        set(&path, 0o600);
        set(path.parent().unwrap(), 0o755);
        let is_open = directory.path().ancestors().all(|at| fs::metadata(at).unwrap().mode() & 1 != 0);
        assert_eq!(show_to_all(&path).is_err(), is_open);
    }

    #[test]
    fn what_is_no_socket_is_not_taken_for_one() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = Utf8Path::from_path(directory.path()).unwrap();
        fs::create_dir(run_dir.join(API)).unwrap();
        let (_, made) = socket(run_dir);
        std::os::unix::fs::symlink("/etc/passwd", &made).unwrap();
        assert!(take_socket(run_dir).is_err());
        assert!(run_dir.join(CONTROL_SOCKET).symlink_metadata().is_err());
        let _listener = std::os::unix::net::UnixListener::bind(&made).unwrap();
        take_socket(run_dir).unwrap();
        std::os::unix::net::UnixStream::connect(run_dir.join(CONTROL_SOCKET)).unwrap();
        assert!(!made.exists());
    }
}
