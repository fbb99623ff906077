//! The private PostgreSQL of a stack: the system's binaries, an unprivileged user, one Unix socket.
//!
//! ```text
//!   DIR/pg  ──bind, in a mount namespace of its own──►  /run/wrenn/INSTANCE/pgdata   (what PostgreSQL sees)
//!                                                       /run/wrenn/INSTANCE/pg/      (its socket, 0700)
//! ```
//!
//! - Nothing listens on the network, and only root may connect: the server asks the kernel who is at the other
//!   end of the socket (`peer`), and maps root to the one role `wrenn`.
//! - The cluster is made in `DIR/pg.new` and renamed when it is complete, so there is never half of one.
//! - A server of an earlier run that still uses the data is found by the data directory itself: the working
//!   directory of every PostgreSQL process is its data directory, compared by device and inode.
//!   Names and process ids alone decide nothing.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, chown},
    process::Stdio,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::process::Signal;
use tokio::process::Command;

use super::{
    Claim, Role, directory,
    files::{self, PRIVATE},
    identity::ProcessIdentity,
    unprivileged,
};

/// The role that owns everything in the database.
const DATABASE_ROLE: &str = "wrenn";
/// Names another directory with PostgreSQL's programs.
const BINARIES_VARIABLE: &str = "WRENN_POSTGRES_BIN";
/// Where Debian keeps PostgreSQL, one directory a major version.
const DEBIAN_ROOT: &str = "/usr/lib/postgresql";
/// Making a cluster takes two seconds on a slow disk; far beyond that something is wrong.
const INITDB_BOUND: Duration = Duration::from_secs(180);

/// Why there is no database.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// No installed version is found.
    #[error(
        "PostgreSQL is not installed (looked in {DEBIAN_ROOT} and the PATH); \
         install the package postgresql, or set DATABASE_URL, or {BINARIES_VARIABLE} to the directory of its programs"
    )]
    NotInstalled,
    /// The data was written by a version that is not installed.
    #[error(
        "the database in {data} was made by PostgreSQL {version}, which is not installed; install postgresql-{version}"
    )]
    OtherVersion {
        /// The data directory.
        data: Utf8PathBuf,
        /// Its major version.
        version: String,
    },
    /// There is no user to run it as.
    #[error("there is neither a user `postgres` nor a user `nobody` to run PostgreSQL as")]
    NoUser,
    /// The directory holds something that is no cluster.
    #[error("{0} is not a PostgreSQL data directory; move it away")]
    NotACluster(Utf8PathBuf),
    /// A file or directory could not be prepared.
    #[error("cannot prepare {path} for PostgreSQL")]
    Prepare {
        /// Which one.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `initdb` did not start.
    #[error("cannot run initdb")]
    RunInitdb(#[source] io::Error),
    /// `initdb` failed.
    #[error("initdb failed ({status}); the end of {log}:\n{}", .tail.join("\n"))]
    Initdb {
        /// Its exit status, or that it took too long.
        status: String,
        /// Its log.
        log: Utf8PathBuf,
        /// The end of the log.
        tail: Vec<String>,
    },
    /// A server of an earlier run does not end.
    #[error("a PostgreSQL server of an earlier run still uses {data} (process {pid}) and does not end")]
    StillRuns {
        /// The data directory.
        data: Utf8PathBuf,
        /// One of its processes.
        pid: i32,
    },
}

/// The unprivileged user of the server.
#[derive(Debug, Clone)]
pub(super) struct DatabaseUser {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The cluster of one stack.
#[derive(Debug)]
pub(super) struct Cluster {
    binaries: Utf8PathBuf,
    user: DatabaseUser,
    data: Utf8PathBuf,
    mount: Utf8PathBuf,
    sockets: Utf8PathBuf,
    log: Utf8PathBuf,
    cluster_name: String,
}

impl Cluster {
    /// The cluster of a claimed directory, with the programs of its version.
    pub(super) fn find(claim: &Claim) -> Result<Self, PostgresError> {
        let data = claim.directory.postgres();
        let version = match fs::read_to_string(data.join("PG_VERSION")) {
            Ok(version) => Some(version.trim().to_owned()),
            Err(_) if data.exists() => return Err(PostgresError::NotACluster(data)),
            Err(_) => None,
        };
        let binaries = match (binaries(version.as_deref()), version) {
            (Some(binaries), _) => binaries,
            (None, Some(version)) => return Err(PostgresError::OtherVersion { data, version }),
            (None, None) => return Err(PostgresError::NotInstalled),
        };
        Ok(Self {
            binaries,
            user: user()?,
            data,
            mount: claim.postgres_mount(),
            sockets: claim.postgres_sockets(),
            log: claim.directory.log(Role::Postgres),
            cluster_name: format!("wrenn-{}", claim.instance),
        })
    }

    /// Where the database is found.
    pub(super) fn url(&self) -> String {
        format!("postgres://{DATABASE_ROLE}@localhost/postgres?host={}", self.sockets)
    }

    /// Makes the directories that a server needs, and the cluster itself if there is none.
    pub(super) async fn prepare(&self) -> Result<(), PostgresError> {
        let failed = |path: &Utf8Path| {
            let path = path.to_owned();
            move |source| PostgresError::Prepare { path, source }
        };
        directory::make_directory(&self.mount, 0o755).map_err(failed(&self.mount))?;
        self.own_directory(&self.sockets).map_err(failed(&self.sockets))?;
        if self.data.exists() {
            return Ok(());
        }

        let new = self.data.with_file_name("pg.new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&new)(error)),
            _ => {}
        }
        self.own_directory(&new).map_err(failed(&new))?;
        self.initdb(&new).await?;
        let configure = || -> io::Result<()> {
            // Root of this machine is the role; nobody else is anyone.
            self.own_file(&new.join("pg_hba.conf"), "local all all peer map=wrenn\n")?;
            self.own_file(&new.join("pg_ident.conf"), &format!("wrenn root {DATABASE_ROLE}\n"))?;
            fs::rename(&new, &self.data)?;
            fs::File::open(self.data.parent().unwrap_or_else(|| Utf8Path::new("/")))?.sync_all()
        };
        configure().map_err(failed(&new))
    }

    async fn initdb(&self, data: &Utf8Path) -> Result<(), PostgresError> {
        let since = files::length(&self.log);
        let log = files::open_log(&self.log)
            .map_err(|source| PostgresError::Prepare { path: self.log.clone(), source })?;
        let initdb_failed = |status| PostgresError::Initdb {
            status,
            log: self.log.clone(),
            tail: files::tail_since(&self.log, since),
        };
        let arguments = [
            "--pgdata",
            self.mount.as_str(),
            "--username",
            DATABASE_ROLE,
            "--auth=peer",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
        ]
        .map(str::to_owned);
        let launch = unprivileged::Arguments::new(&self.user, data.to_owned(), self.mount.clone())
            .run(&self.binaries.join("initdb"), &arguments);
        let mut command = own_executable(&launch.command_line());
        let duplicate = log.try_clone().map_err(PostgresError::RunInitdb)?;
        command.stdout(log).stderr(duplicate).kill_on_drop(true);
        let mut child = command.spawn().map_err(PostgresError::RunInitdb)?;
        match tokio::time::timeout(INITDB_BOUND, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(initdb_failed(status.to_string())),
            Ok(Err(error)) => Err(PostgresError::RunInitdb(error)),
            Err(_) => Err(initdb_failed(format!("no end after {INITDB_BOUND:?}"))),
        }
    }

    /// The command line of the server, for [`own_executable`].
    pub(super) fn server(&self) -> Vec<String> {
        let mut arguments = vec!["-D".to_owned(), self.mount.to_string()];
        for (name, value) in self.settings() {
            arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
        unprivileged::Arguments::new(&self.user, self.data.clone(), self.mount.clone())
            .run(&self.binaries.join("postgres"), &arguments)
            .command_line()
    }

    /// A small database of one machine that may lose its power at any time.
    fn settings(&self) -> [(&'static str, &str); 15] {
        [
            ("listen_addresses", ""),
            ("unix_socket_directories", self.sockets.as_str()),
            ("unix_socket_permissions", "0700"),
            ("cluster_name", &self.cluster_name),
            ("log_destination", "stderr"),
            ("logging_collector", "off"),
            ("log_checkpoints", "off"),
            ("fsync", "on"),
            ("max_connections", "60"),
            ("shared_buffers", "32MB"),
            ("huge_pages", "off"),
            ("jit", "off"),
            // Nothing replicates from here.
            ("wal_level", "minimal"),
            ("max_wal_senders", "0"),
            ("max_wal_size", "256MB"),
        ]
    }

    /// Whether the server with this process id takes connections.
    ///
    /// The eighth line of its pid file says so; it is what `pg_ctl --wait` reads, too.
    pub(super) fn is_ready(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.data.join("postmaster.pid")) else { return false };
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        lines.first() == Some(&pid.to_string().as_str()) && lines.get(7) == Some(&"ready")
    }

    /// Ends whatever of an earlier run still uses the data.
    pub(super) async fn clear_the_way(&self) -> Result<(), PostgresError> {
        let Ok(data) = fs::metadata(&self.data) else { return Ok(()) };
        let users = || processes_in(&data);
        let pid_file = self.data.join("postmaster.pid");
        let recorded =
            || -> Option<i32> { fs::read_to_string(&pid_file).ok()?.lines().next()?.trim().parse().ok() };

        let postmaster = recorded().and_then(|pid| users().into_iter().find(|user| user.pid == pid));
        if let Some(postmaster) = postmaster {
            tracing::info!(pid = postmaster.pid, "stopping the PostgreSQL server of an earlier run");
            // Fast, then immediate: its own two ways to stop. Sessions of a dead server end by themselves.
            for signal in [Signal::INT, Signal::QUIT] {
                self.signal(postmaster, signal)?;
                if self.wait_gone(postmaster, Duration::from_secs(10)).await? {
                    break;
                }
            }
        }
        for user in users() {
            if !self.wait_gone(user, Duration::from_secs(3)).await? {
                self.signal(user, Signal::KILL)?;
                if !self.wait_gone(user, Duration::from_secs(5)).await? {
                    return Err(PostgresError::StillRuns { data: self.data.clone(), pid: user.pid });
                }
            }
        }
        // A server refuses to start while the kernel still knows the process of its pid file. Nobody uses the data
        // now, so that is either another program that got the same id, or a zombie that nobody has reaped.
        // Otherwise the file stays: it tells the next server which shared memory to free.
        if recorded().is_some_and(|pid| Utf8Path::new("/proc").join(pid.to_string()).exists()) {
            files::remove_if_there(&pid_file)
                .map_err(|source| PostgresError::Prepare { path: pid_file.clone(), source })?;
        }
        Ok(())
    }

    fn signal(&self, process: ProcessIdentity, signal: Signal) -> Result<(), PostgresError> {
        process.signal(signal).map_err(|source| PostgresError::Prepare { path: self.data.clone(), source })
    }

    async fn wait_gone(&self, process: ProcessIdentity, bound: Duration) -> Result<bool, PostgresError> {
        let gone = process.wait_gone(bound).await;
        gone.map_err(|source| PostgresError::Prepare { path: self.data.clone(), source })
    }

    fn own_directory(&self, path: &Utf8Path) -> io::Result<()> {
        directory::make_directory(path, 0o700)?;
        chown(path, Some(self.user.uid), Some(self.user.gid))
    }

    fn own_file(&self, path: &Utf8Path, content: &str) -> io::Result<()> {
        files::write_atomically(path, PRIVATE, content.as_bytes())?;
        chown(path, Some(self.user.uid), Some(self.user.gid))
    }
}

/// This executable once more, even if its file has been replaced since: the kernel resolves the link in the
/// child, which is still the same program.
pub(super) fn own_executable(arguments: &[String]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("wrenn").args(arguments).stdin(Stdio::null()).env_clear().env("LC_ALL", "C");
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // A group of its own: Ctrl-C in a terminal goes to the supervisor, which stops things in order.
    command.process_group(0);
    command
}

/// The PostgreSQL processes whose working directory is this one.
fn processes_in(directory: &fs::Metadata) -> Vec<ProcessIdentity> {
    let is_user = |pid: i32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let program = program.file_name()?.to_str()?;
        if program.trim_end_matches(" (deleted)") != "postgres" {
            return None;
        }
        // Follows the link into the mount namespace of the process.
        let working = fs::metadata(format!("/proc/{pid}/cwd")).ok()?;
        if (working.dev(), working.ino()) != (directory.dev(), directory.ino()) {
            return None;
        }
        ProcessIdentity::of(pid)
    };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| is_user(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn user() -> Result<DatabaseUser, PostgresError> {
    let found =
        ["postgres", "nobody"].into_iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten());
    let user = found.ok_or(PostgresError::NoUser)?;
    Ok(DatabaseUser { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
}

/// The directory of PostgreSQL's programs: of this major version if one is given, else of the newest.
fn binaries(version: Option<&str>) -> Option<Utf8PathBuf> {
    let complete = |path: &Utf8Path| path.join("postgres").is_file() && path.join("initdb").is_file();
    if let Ok(named) = std::env::var(BINARIES_VARIABLE) {
        return Some(Utf8PathBuf::from(named)).filter(|path| complete(path));
    }
    if let Some(version) = version.filter(|version| version.bytes().all(|b| b.is_ascii_digit())) {
        let path = Utf8Path::new(DEBIAN_ROOT).join(version).join("bin");
        return complete(&path).then_some(path);
    }
    let installed = Utf8Path::new(DEBIAN_ROOT).read_dir_utf8().into_iter().flatten().flatten();
    let newest = installed
        .filter_map(|entry| Some((entry.file_name().parse::<u32>().ok()?, entry.path().join("bin"))))
        .filter(|(_, path)| complete(path))
        .max_by_key(|(version, _)| *version)
        .map(|(_, path)| path);
    newest.or_else(|| {
        let path = std::env::var("PATH").ok()?;
        path.split(':').map(Utf8PathBuf::from).find(|path| complete(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ready_server_says_so_in_its_pid_file() {
        let guard = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(guard.path().to_owned()).unwrap();
        let claim = Claim::take(&root.join("stack"), &root.join("run")).await.unwrap();
        let Ok(cluster) = Cluster::find(&claim) else { return };
        fs::create_dir(&cluster.data).unwrap();
        let write = |state: &str| {
            let text = format!("41\n/run/x/pgdata\n1700000000\n5432\n/run/x/pg\n\n  1234  0\n{state}\n");
            fs::write(cluster.data.join("postmaster.pid"), text).unwrap();
        };
        assert!(!cluster.is_ready(41));
        write("starting");
        assert!(!cluster.is_ready(41));
        write("ready   ");
        assert!(cluster.is_ready(41));
        assert!(!cluster.is_ready(42));
        assert!(matches!(Cluster::find(&claim), Err(PostgresError::NotACluster(_))));
    }
}
