//! The directory of a stack, and the claim on it.
//!
//! ```text
//!   DIR/                          (0700)
//!     lock          flock held by the supervisor; its content names the holder
//!     instance      the 8 digits that mark everything of this stack on the machine
//!     env           export lines for a shell (0600)          ready.json   the ready line, while it is ready (0600)
//!     first-key     the first API key (0600)                 children.json  the processes it started
//!     pg/           the private PostgreSQL's data            agent/       the host agent's state
//!     logs/         wrenn.log, agent.log, control-plane.log, postgres.log
//!   /run/wrenn/INSTANCE/          short, because the path of a Unix socket ends at 107 bytes
//!     lock          flock: a copied DIR has the same instance, and must not run beside the first
//!     agent.sock    pg/ (its sockets)    pgdata/ (where its data is bound)    vm/ (the host agent's)
//! ```
//!
//! Two claims make a stack: the lock of its directory, and the lock of its instance.
//! Both are released by the kernel when the supervisor ends, however it ends.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FlockOperation, flock};
use wrenn_types::InstanceId;

use super::{
    Role,
    files::{self, PRIVATE},
    identity::ProcessIdentity,
};

/// Where the run directories of all stacks of a machine are.
pub const RUN_ROOT: &str = "/run/wrenn";

/// The paths in the directory of a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    root: Utf8PathBuf,
}

/// Why a directory could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// It could not be made or opened.
    #[error("cannot use the directory {path}")]
    Directory {
        /// The directory or the file in it.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A running stack holds it.
    #[error(
        "a stack already runs in {directory} (process {holder}); stop it with `wrenn down --dir {directory}` or choose another --dir"
    )]
    Held {
        /// The directory.
        directory: Utf8PathBuf,
        /// The holder's process id, or a word that says it is unknown.
        holder: String,
    },
    /// A running stack in another directory has the same instance id.
    #[error(
        "a running stack has the instance id {instance} of {directory}, so this directory is a copy of its own: \
         remove {directory}/instance, pg and agent here to make it a stack by itself"
    )]
    SameInstance {
        /// The id.
        instance: InstanceId,
        /// The directory that could not be claimed.
        directory: Utf8PathBuf,
    },
    /// The instance file holds something else.
    #[error("{path} does not hold an instance id; remove the file if no stack of this directory runs")]
    Instance {
        /// The file.
        path: Utf8PathBuf,
        /// Why it is none.
        #[source]
        source: wrenn_types::ParseIdError,
    },
}

impl Directory {
    /// The directory of this path, made if it is not there.
    ///
    /// # Errors
    /// [`ClaimError::Directory`].
    pub fn create(path: &Utf8Path) -> Result<Self, ClaimError> {
        let failed = |source| ClaimError::Directory { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        Self::existing(path).map_err(failed)
    }

    /// The directory of this path, which must be there.
    ///
    /// # Errors
    /// Whatever the file system answers.
    pub fn existing(path: &Utf8Path) -> io::Result<Self> {
        Ok(Self { root: path.canonicalize_utf8()? })
    }

    /// The directory itself, absolute.
    #[must_use]
    pub fn root(&self) -> &Utf8Path {
        &self.root
    }

    /// The lines for a shell.
    #[must_use]
    pub fn env(&self) -> Utf8PathBuf {
        self.root.join("env")
    }

    /// The first API key.
    #[must_use]
    pub fn first_key(&self) -> Utf8PathBuf {
        self.root.join("first-key")
    }

    /// The ready line of the running stack.
    #[must_use]
    pub fn ready(&self) -> Utf8PathBuf {
        self.root.join("ready.json")
    }

    /// Where all logs are.
    #[must_use]
    pub fn logs(&self) -> Utf8PathBuf {
        self.root.join("logs")
    }

    /// The log of the supervisor when it is detached.
    #[must_use]
    pub fn own_log(&self) -> Utf8PathBuf {
        self.logs().join("wrenn.log")
    }

    pub(super) fn log(&self, role: Role) -> Utf8PathBuf {
        self.logs().join(role.log_name())
    }

    pub(super) fn children(&self) -> Utf8PathBuf {
        self.root.join("children.json")
    }

    pub(super) fn postgres(&self) -> Utf8PathBuf {
        self.root.join("pg")
    }

    /// Whether the last stack of this directory ended without stopping its processes: one that stops in order
    /// removes its record of them.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        self.children().exists()
    }

    fn lock(&self) -> Utf8PathBuf {
        self.root.join("lock")
    }

    fn instance(&self) -> Utf8PathBuf {
        self.root.join("instance")
    }

    /// The supervisor that holds this directory now, if one does.
    ///
    /// # Errors
    /// Whatever the file system answers.
    pub fn holder(&self) -> io::Result<Option<ProcessIdentity>> {
        let mut file = match File::open(self.lock()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // A shared lock that is given up at once: two who look do not see each other,
        // and a claim made in that moment tries again.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text.parse::<ProcessIdentity>().ok().filter(|holder| holder.is_alive()))
    }
}

/// A directory that is this process's, and the run directory of its instance.
#[derive(Debug)]
pub struct Claim {
    /// The paths.
    pub directory: Directory,
    /// What marks everything of this stack on the machine.
    pub instance: InstanceId,
    /// The run directory.
    pub run: Utf8PathBuf,
    // Dropped with the claim, and with them the locks.
    _directory_lock: File,
    _instance_lock: File,
}

impl Claim {
    /// Claims a directory, making what is missing in it.
    ///
    /// # Errors
    /// [`ClaimError`] says who holds it, or what could not be made.
    pub async fn take(path: &Utf8Path, run_root: &Utf8Path) -> Result<Self, ClaimError> {
        let directory = Directory::create(path)?;
        let Some(mut lock) = lock(&directory.lock()).await? else {
            let holder = directory.holder().ok().flatten();
            let holder = holder.map_or_else(|| "unknown".to_owned(), |holder| holder.pid.to_string());
            return Err(ClaimError::Held { directory: directory.root, holder });
        };
        let failed = |path: &Utf8Path| {
            let path = path.to_owned();
            move |source| ClaimError::Directory { path, source }
        };
        // The same inode for ever, rewritten in place: a lock on a replaced file would lock nothing.
        let write_holder = |file: &mut File| {
            let own = ProcessIdentity::own().ok_or_else(|| io::Error::other("/proc is not mounted"))?;
            file.set_len(0)?;
            file.write_all(format!("{own}\n").as_bytes())
        };
        write_holder(&mut lock).map_err(failed(&directory.lock()))?;

        let instance = instance(&directory)?;
        make_directory(run_root, 0o755).map_err(failed(run_root))?;
        let run = run_root.join(instance.as_str());
        // The unprivileged user of the database has to get through, and sees no names.
        make_directory(&run, 0o711).map_err(failed(&run))?;
        let Some(instance_lock) = self::lock(&run.join("lock")).await? else {
            return Err(ClaimError::SameInstance { instance, directory: directory.root });
        };

        let logs = directory.logs();
        make_directory(&logs, 0o700).map_err(failed(&logs))?;
        // Of an earlier run: nothing is ready yet.
        files::remove_if_there(&directory.ready()).map_err(failed(&directory.ready()))?;
        Ok(Self { directory, instance, run, _directory_lock: lock, _instance_lock: instance_lock })
    }

    /// The socket of the host agent.
    #[must_use]
    pub fn agent_socket(&self) -> Utf8PathBuf {
        self.run.join("agent.sock")
    }

    /// Where PostgreSQL has its socket.
    pub(super) fn postgres_sockets(&self) -> Utf8PathBuf {
        self.run.join("pg")
    }

    /// Where PostgreSQL sees its data.
    pub(super) fn postgres_mount(&self) -> Utf8PathBuf {
        self.run.join("pgdata")
    }

    /// Removes what the supervisor itself made in the run directory, when all of its processes have ended.
    /// What belongs to the host agent stays for the host agent.
    pub(super) fn clear_run_directory(&self) -> io::Result<()> {
        files::remove_if_there(&self.agent_socket())?;
        match fs::remove_dir_all(self.postgres_sockets()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match fs::remove_dir(self.postgres_mount()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Gives the claim back, and leaves no trace of a stack that ended well in the run directory.
    pub(super) fn release(self) -> io::Result<()> {
        files::remove_if_there(&self.directory.ready())?;
        files::remove_if_there(&self.directory.children())?;
        self.clear_run_directory()?;
        // The lock goes last and only from an otherwise empty directory:
        // whoever locks the removed file finds that the path does not lead to it, and tries again.
        let only_lock =
            fs::read_dir(&self.run)?.all(|entry| entry.is_ok_and(|entry| entry.file_name() == "lock"));
        if only_lock {
            files::remove_if_there(&self.run.join("lock"))?;
            match fs::remove_dir(&self.run) {
                Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// An exclusive lock, or none if another process holds it.
///
/// A look at the holder takes a shared lock for a moment, so a lock that is not free at once is tried for
/// half a second before it counts as held.
async fn lock(path: &Utf8Path) -> Result<Option<File>, ClaimError> {
    const TRIES: u32 = 10;
    let failed = |source| ClaimError::Directory { path: path.to_owned(), source };
    for _ in 0..TRIES {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(PRIVATE)
            .open(path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if leads_to(path, &file).map_err(failed)? => return Ok(Some(file)),
            Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(None)
}

/// Whether the path still leads to this open file.
fn leads_to(path: &Utf8Path, file: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let opened = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The instance id of the directory, made at the first claim.
fn instance(directory: &Directory) -> Result<InstanceId, ClaimError> {
    let path = directory.instance();
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|source| ClaimError::Instance { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let instance = InstanceId::random();
            let text = format!("{instance}\n");
            files::write_atomically(&path, 0o644, text.as_bytes())
                .map_err(|source| ClaimError::Directory { path, source })?;
            Ok(instance)
        }
        Err(source) => Err(ClaimError::Directory { path, source }),
    }
}

/// A directory with this mode, whatever the umask is and whether or not it was there.
pub(super) fn make_directory(path: &Utf8Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths() -> (tempfile::TempDir, Utf8PathBuf, Utf8PathBuf) {
        let guard = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(guard.path().to_owned()).unwrap();
        (guard, root.join("a b/.wrenn"), root.join("run"))
    }

    #[tokio::test]
    async fn one_directory_has_one_holder() {
        let (_guard, path, run) = paths();
        let claim = Claim::take(&path, &run).await.unwrap();
        assert_eq!(claim.directory.holder().unwrap(), ProcessIdentity::own());
        let error = Claim::take(&path, &run).await.unwrap_err();
        assert!(matches!(error, ClaimError::Held { .. }), "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");

        let instance = claim.instance.clone();
        claim.release().unwrap();
        assert!(!run.join(instance.as_str()).exists());
        let again = Claim::take(&path, &run).await.unwrap();
        assert_eq!(again.instance, instance);
        assert_eq!(Directory::existing(&path).unwrap().holder().unwrap(), ProcessIdentity::own());
    }

    #[tokio::test]
    async fn a_free_directory_has_no_holder() {
        let (_guard, path, run) = paths();
        let directory = Directory::create(&path).unwrap();
        assert_eq!(directory.holder().unwrap(), None);
        drop(Claim::take(&path, &run).await.unwrap());
        // As after a kill: the content still names a process, the lock is free.
        assert_eq!(directory.holder().unwrap(), None);
    }

    #[tokio::test]
    async fn a_copied_directory_does_not_run_beside_the_first() {
        let (_guard, path, run) = paths();
        let claim = Claim::take(&path, &run).await.unwrap();
        let copy = path.with_file_name("copy");
        fs::create_dir(&copy).unwrap();
        fs::copy(path.join("instance"), copy.join("instance")).unwrap();
        let error = Claim::take(&copy, &run).await.unwrap_err();
        assert!(
            matches!(&error, ClaimError::SameInstance { instance, .. } if *instance == claim.instance),
            "{error}"
        );

        fs::remove_file(copy.join("instance")).unwrap();
        let other = Claim::take(&copy, &run).await.unwrap();
        assert_ne!(other.instance, claim.instance);
    }

    #[tokio::test]
    async fn what_the_agent_left_stays() {
        let (_guard, path, run) = paths();
        let claim = Claim::take(&path, &run).await.unwrap();
        let left = claim.run.join("vm/sb-00000000");
        fs::create_dir_all(&left).unwrap();
        fs::create_dir_all(claim.postgres_sockets()).unwrap();
        let sockets = claim.postgres_sockets();
        claim.release().unwrap();
        assert!(left.exists());
        assert!(!sockets.exists());
    }

    #[tokio::test]
    async fn a_spoiled_instance_file_is_named() {
        let (_guard, path, run) = paths();
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("instance"), "../../etc").unwrap();
        let error = Claim::take(&path, &run).await.unwrap_err();
        assert!(matches!(error, ClaimError::Instance { .. }), "{error}");
    }
}
