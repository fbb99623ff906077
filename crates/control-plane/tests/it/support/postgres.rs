//! A PostgreSQL of the tests' own, on a Unix socket: one for the whole binary, and one more for each test
//! that takes it away.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection as _, PgConnection};

use super::guardian::Guardian;

/// PostgreSQL does not run as root; nobody's business needs no account of its own.
const NOBODY: u32 = 65_534;

pub(crate) struct Cluster {
    directory: PathBuf,
    guardian: Mutex<Guardian>,
    databases: AtomicU32,
}

fn programs() -> PathBuf {
    let versions =
        fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed (apt install postgresql)");
    let newest = versions.flatten().map(|entry| entry.path()).max().expect("a version of PostgreSQL");
    newest.join("bin")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

impl Cluster {
    /// The cluster of the binary. It ends with the process.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    pub(crate) fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("wrenn-pg-").tempdir().unwrap().keep();
        let user = is_root().then_some(NOBODY);
        if let Some(user) = user {
            chown(&directory, Some(user), Some(user)).unwrap();
        }
        let data = directory.join("data");
        let mut initdb = Command::new(programs().join("initdb"));
        initdb
            .args(["--auth=trust", "--username=wrenn", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .current_dir("/")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(user) = user {
            std::os::unix::process::CommandExt::uid(&mut initdb, user);
            std::os::unix::process::CommandExt::gid(&mut initdb, user);
        }
        assert!(initdb.status().unwrap().success(), "initdb failed");
        let postgres = programs().join("postgres");
        let arguments = [
            "-D",
            data.to_str().unwrap(),
            "-k",
            directory.to_str().unwrap(),
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
            "-c",
            "max_connections=400",
            "-c",
            "shared_buffers=16MB",
        ];
        let guardian =
            Guardian::start(postgres.to_str().unwrap(), &arguments, "INT", user, directory.to_str().unwrap());
        Self { directory, guardian: Mutex::new(guardian), databases: AtomicU32::new(0) }
    }

    fn url(&self, database: &str) -> String {
        url(&self.directory, database)
    }

    async fn connect(&self) -> PgConnection {
        for _ in 0..400 {
            if let Ok(connection) = PgConnection::connect(&self.url("postgres")).await {
                return connection;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("PostgreSQL does not answer");
    }

    /// The URL of a new, empty database.
    pub(crate) async fn database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut connection = self.connect().await;
        let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        sqlx::raw_sql(create).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        self.url(&name)
    }

    /// Takes the server away, as its operator would.
    pub(crate) fn stop(&self) {
        self.guardian.lock().unwrap().say("stop");
    }

    /// Brings it back.
    pub(crate) fn bring_back(&self) {
        self.guardian.lock().unwrap().say("start");
    }
}

fn url(directory: &Path, database: &str) -> String {
    format!("postgres:///{database}?host={}&user=wrenn", directory.display())
}
