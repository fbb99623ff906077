//! From a description to a process that answers.
//!
//! ```text
//!  control.sock                Firecracker listens here
//!  console.fifo, guest=NAME    what its guest says, and what it says itself: see `spool`
//!  console.log                 what the last owner had read of the former
//!  disk.link                   leads to the root disk
//!  owner.lock                  locked by whoever owns the machine
//!  memory.sock, pager.*         of the process that serves its memory, if one does: see [`crate::pager`]
//!  user.mark                   the user of a machine that is jailed; it has more here: see `jail`
//!  making.mark, saved.mark     there while the machine is being made, and once its memory was given away
//! ```
//!
//! Firecracker works in this directory and is told names, not paths, of what is in it: those of disks become part of
//! every saved state, and a clone finds its own disk under the same name. That of the log is the mark by which the process is
//! known in the process table, as QEMU's is: its own name for itself (`--id`) can have no such form.

use std::{
    fs::{File, FileType, Permissions},
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt, symlink},
    sync::Arc,
    time::Duration,
};

use camino::Utf8Path;
use tokio::time::{Instant, sleep, timeout};
use wrenn_host_linux::appearance::Appearance;

use super::{
    Programs,
    api::Api,
    jail::{self, Begin},
    machine::Machine,
    monitor::Monitor,
    spool::Spool,
};
use crate::{
    ExitReason, MachineSpec, SnapshotFiles, VmmError, VmmResult,
    files::{SocketFile, cannot, remove_stale, remove_stale_of_kind},
    launch::{self, CONTROL_SOCKET, not_started},
    pager::{self, Pager, PagerProgram, Wanted},
    process,
};

pub(super) const CONSOLE: &str = "console.fifo";
pub(super) const DISK_LINK: &str = "disk.link";
const OWNER: &str = "owner.lock";
/// What of the console the last owner had read.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// How much of the console is kept.
pub(super) const CONSOLE_LIMIT: usize = 64 << 10;
/// How much of what Firecracker says itself is kept.
pub(super) const LOG_LIMIT: usize = 4096;
/// How long Firecracker may take until it listens, on a machine that is busy with many others.
const START_BOUND: Duration = Duration::from_secs(20);
/// How long a socket that is there may take until somebody listens at it.
const LISTEN_PAUSE: Duration = Duration::from_millis(1);

/// A mark in the machine's directory: what must not be taken over by somebody who does not know what was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// It is being started or restored.
    Making,
    /// Its memory is part of a snapshot, or was about to be.
    Saved,
}

impl Mark {
    pub(super) const ALL: [Self; 2] = [Self::Making, Self::Saved];

    fn name(self) -> &'static str {
        match self {
            Self::Making => "making.mark",
            Self::Saved => "saved.mark",
        }
    }

    /// The state that a machine with it is in.
    pub(super) fn state(self) -> &'static str {
        match self {
            Self::Making => "not restored",
            Self::Saved => "saved",
        }
    }

    pub(super) fn set(self, run_dir: &Utf8Path) -> VmmResult<()> {
        let path = run_dir.join(self.name());
        File::create(&path).map(drop).map_err(cannot("create", &path))
    }

    pub(super) fn clear(self, run_dir: &Utf8Path) -> VmmResult<()> {
        remove_stale(&run_dir.join(self.name()))
    }

    pub(super) fn is_set(self, run_dir: &Utf8Path) -> VmmResult<bool> {
        let path = run_dir.join(self.name());
        path.try_exists().map_err(cannot("examine", &path))
    }
}

/// Starts a Firecracker. On return it listens, has been told nothing yet, and is marked as [`Mark::Making`].
///
/// With `served`, its memory is to be served: there is a pager that waits for it, and whose fate it shares.
///
/// The machine that is returned kills the process when it is dropped, and so does this future.
pub(super) async fn start(
    programs: &Programs,
    mut spec: MachineSpec,
    begin: Begin<'_>,
    served: Option<(&PagerProgram, &SnapshotFiles)>,
) -> VmmResult<Machine> {
    let program = &programs.firecracker;
    launch::inputs(&spec)?;
    let owner = owner(&spec.run_dir)?;
    if owner.try_lock().is_err() {
        let problem = "somebody else has a machine in it".to_owned();
        return Err(VmmError::Spec { field: "run_dir", problem });
    }
    Mark::Making.set(&spec.run_dir)?;
    Mark::Saved.clear(&spec.run_dir)?;
    remove_stale(&spec.run_dir.join(CONSOLE_LOG))?;
    remove_stale_of_kind(&spec.run_dir.join(CONTROL_SOCKET), FileType::is_socket)?;
    // The machine's owner may have files of its own here.
    remove_stale_of_kind(&spec.run_dir.join(DISK_LINK), FileType::is_symlink)?;
    pager::forget(&spec.run_dir)?;
    jail::forget_user(&spec.run_dir)?;
    // It begins while Firecracker does.
    let mut pager = match served {
        Some((program, from)) => Some(Pager::begin(program, Wanted::for_restore(&spec, from)?).await?),
        None => None,
    };
    let disk = spec.disk.as_ref().map(|disk| disk.path.clone());
    if let Some(disk) = &disk {
        let link = spec.run_dir.join(DISK_LINK);
        symlink(disk, &link).map_err(cannot("create", &link))?;
    }
    let console = Arc::new(Spool::create(&spec.run_dir.join(CONSOLE), CONSOLE_LIMIT)?);
    let mark = process::mark(&spec.name);
    let log = Arc::new(Spool::create(&spec.run_dir.join(&mark), LOG_LIMIT)?);
    let failed = not_started(program);
    let socket = spec.run_dir.join(CONTROL_SOCKET);
    let user = spec.user;
    let (spawn, made) = match (user, &programs.jailer) {
        (None, _) => {
            let spawn = launch::spawn(program, &mut spec).args(["--id", &spec.name]);
            (
                spawn.args(arguments(CONTROL_SOCKET, &mark)).current_dir(spec.run_dir.as_std_path()),
                socket.clone(),
            )
        }
        (Some(user), Some(jailer)) => {
            let (named, made) = jail::socket(&spec.run_dir);
            let words = arguments(named.as_str(), &mark);
            (jail::spawn(program, jailer, user, &mut spec, begin, &mark, &words).await?, made)
        }
        (Some(_), None) => {
            let problem = "there is no jailer";
            return Err(VmmError::Unsupported { operation: "a user of its own", problem });
        }
    };
    let spawn = spawn.stdout(log.writer()?).stderr(log.writer()?);
    let appearance = Appearance::watch(made.parent().unwrap_or(&made).as_std_path()).map_err(&failed)?;
    let watch = pager.as_ref().map(Pager::watch);
    let monitor =
        Monitor { console: Arc::clone(&console), log, socket: SocketFile::at(socket.clone()), pager: watch };
    let leash = launch::start(program, spawn, |child, held| monitor.run(child, held)).await?;
    let mut exited = leash.exit();
    let api = Api::at(socket.clone());
    let vmm = leash.process().clone();
    let run_dir = spec.run_dir.clone();
    let mut machine = Machine::new(leash, api, console, spec.run_dir, owner, disk, user);
    let listens = async {
        let begins = async {
            appearance.until(made.as_std_path()).await.map_err(&failed)?;
            if made != socket {
                jail::take_socket(&run_dir)?;
            }
            until_listening(&socket, machine.api()).await.map_err(&failed)?;
            match (&mut pager, served) {
                (Some(pager), Some((program, _))) => pager.bind(program, &vmm).await?,
                _ => return Ok(()),
            }
            match user {
                Some(_) => jail::show_pager(&vmm, &run_dir).await,
                None => Ok(()),
            }
        };
        tokio::select! {
            begins = begins => begins,
            reason = exited.wait_for(Option::is_some) => {
                let reason = reason.ok().and_then(|reason| reason.clone());
                let reason = reason.unwrap_or_else(ExitReason::of_unknown_cause);
                Err(VmmError::Exited { operation: "start", reason })
            }
        }
    };
    match timeout(START_BOUND, listens).await {
        Ok(Ok(())) => {
            machine.set_pager(pager);
            Ok(machine)
        }
        Ok(Err(error)) => Err(launch::ended(machine, error).await),
        Err(_) => {
            let late = VmmError::Timeout { operation: "start", bound: START_BOUND };
            Err(launch::ended(machine, late).await)
        }
    }
}

/// The words after those that say whose process it is.
fn arguments<'a>(socket: &'a str, log: &'a str) -> [&'a str; 6] {
    ["--api-sock", socket, "--log-path", log, "--level", "Warn"]
}

/// The file whose lock belongs to the machine's owner.
pub(super) fn owner(run_dir: &Utf8Path) -> VmmResult<File> {
    let path = run_dir.join(OWNER);
    File::create(&path).map_err(cannot("create", &path))
}

/// Waits until somebody listens at a socket, and connects.
async fn until_listening(socket: &Utf8Path, api: &Api) -> io::Result<()> {
    // Others have no business there; it was in a directory that is the owner's alone until now.
    std::fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    let begin = Instant::now();
    loop {
        match api.connect().await {
            // It is bound, and not listened at for a moment: nobody tells when.
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && begin.elapsed() < START_BOUND =>
            {
                sleep(LISTEN_PAUSE).await;
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, camino::Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().to_owned();
        (directory, path)
    }

    #[test]
    fn the_mark_is_an_argument_of_its_own() {
        let words = arguments(CONTROL_SOCKET, "guest=wrenn-a");
        assert_eq!(words[..2], ["--api-sock", CONTROL_SOCKET]);
        assert!(words.contains(&"guest=wrenn-a"));
    }

    #[test]
    fn marks_are_set_once_and_cleared() {
        let (_directory, path) = directory();
        for mark in Mark::ALL {
            assert!(!mark.is_set(&path).unwrap());
            mark.clear(&path).unwrap();
            mark.set(&path).unwrap();
            mark.set(&path).unwrap();
            assert!(mark.is_set(&path).unwrap());
            mark.clear(&path).unwrap();
            assert!(!mark.is_set(&path).unwrap());
        }
        assert!(Mark::Saved.set(&path.join("missing")).is_err());
    }

    #[tokio::test]
    async fn a_socket_that_appears_is_connected_to() {
        let (_directory, path) = directory();
        let appearance = Appearance::watch(path.as_std_path()).unwrap();
        let socket = path.join("s");
        let api = Api::at(socket.clone());
        let waits = async {
            appearance.until(socket.as_std_path()).await?;
            until_listening(&socket, &api).await
        };
        let appears = async {
            std::fs::write(path.join("something-else"), "").unwrap();
            tokio::task::yield_now().await;
            tokio::net::UnixListener::bind(&socket).unwrap()
        };
        let (connected, listener) =
            timeout(Duration::from_secs(10), async { tokio::join!(waits, appears) }).await.unwrap();
        connected.unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        listener.accept().await.unwrap();
    }
}
