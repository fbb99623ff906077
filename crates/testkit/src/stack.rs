//! A whole stack, started as a person starts one: `wrenn dev` on a free port, with its own directory and
//! its own private PostgreSQL, the outside a namespace of the test.

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{Client, uplink::Uplink};

/// How long a stack may take to be ready, its first template snapshot not included.
const START_BOUND: Duration = Duration::from_secs(120);
/// How long it may take to end.
const STOP_BOUND: Duration = Duration::from_secs(90);

/// What makes a stack one on Firecracker, as it is in production: each machine in a jail, its memory served, its disk one of
/// the device mapper. What is set outside holds instead.
const FIRECRACKER: [(&str, &str); 4] =
    [("WRENN_VMM", "firecracker"), ("WRENN_DISKS", "dm-snapshot"), ("WRENN_MEMORY_BACKEND", "uffd"), USERS];
const USERS: (&str, &str) = ("WRENN_UIDS", "2000000-2032767");

/// How a stack differs from the usual one.
#[derive(Debug, Default)]
pub struct StackOptions {
    /// Its directory; a temporary one when none is given.
    pub dir: Option<PathBuf>,
    /// What stands for the outside; a namespace of the stack's own when none is given.
    pub uplink: Option<Uplink>,
    /// Environment to add.
    pub environment: Vec<(String, String)>,
}

/// A running stack. It is stopped by [`Stack::stop`]; dropping it kills its supervisor, and the kernel tells the rest to stop.
#[derive(Debug)]
pub struct Stack {
    child: Child,
    dir: PathBuf,
    _temporary: Option<tempfile::TempDir>,
    uplink: Option<Uplink>,
    ready: Value,
}

/// Not by way of the directory of this crate, which is not there in the lab.
fn repository() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
    crates.ancestors().nth(2).unwrap_or(crates).to_owned()
}

/// The `wrenn` binary under test: `WRENN_BIN`, else the release build.
pub fn binary() -> Result<PathBuf> {
    let path =
        env::var_os("WRENN_BIN").map_or_else(|| repository().join("target/release/wrenn"), PathBuf::from);
    ensure!(path.is_file(), "{} is not there: `make test` builds it", path.display());
    Ok(path.canonicalize()?)
}

/// The images: `WRENN_IMAGES`, else what `make images` built.
pub fn images() -> Result<PathBuf> {
    let path = env::var_os("WRENN_IMAGES").map_or_else(|| repository().join("target/images"), PathBuf::from);
    ensure!(path.is_dir(), "{} is not there: `make images` builds it", path.display());
    Ok(path.canonicalize()?)
}

/// The warm snapshots: `WRENN_SNAPSHOTS`, else those in the user's cache, which every stack of the user shares.
pub fn snapshots() -> Result<PathBuf> {
    if let Some(path) = env::var_os("WRENN_SNAPSHOTS") {
        return Ok(path.into());
    }
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::home_dir().map(|home| home.join(".cache")));
    Ok(cache.context("neither HOME nor XDG_CACHE_HOME is set")?.join("wrenn/snapshots"))
}

/// Why tests with real machines cannot run here, if they cannot, as such a test says it: `skipped: why`.
#[must_use]
pub fn cannot_run() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("skipped: network namespaces need root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("skipped: there is no /dev/net/tun".to_owned());
    }
    None
}

/// Whether this is the lab, a machine of the tests' own, where stacks run their guests under Firecracker.
#[must_use]
pub fn is_lab() -> bool {
    is_set("WRENN_LAB")
}

fn is_set(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// What a stack gets in the lab, where nothing else is said. Without a jailer there are no jails.
fn firecracker() -> impl Iterator<Item = (&'static str, &'static str)> {
    let can_be = |pair: &(&str, &str)| *pair != USERS || is_set("WRENN_JAILER");
    FIRECRACKER.into_iter().filter(|(variable, _)| !is_set(variable)).filter(can_be)
}

/// Why tests with real machines under Firecracker cannot run here, if they cannot: there are hosts whose KVM opens and runs
/// no guest, and it is the lab of which the opposite is known.
#[must_use]
pub fn cannot_run_firecracker() -> Option<String> {
    if !is_lab() {
        return Some("skipped: it is the lab in which Firecracker is known to run guests".to_owned());
    }
    if !is_set("WRENN_FIRECRACKER") {
        let remedy = "name one with WRENN_FIRECRACKER, or let `make setup ARGS=--firecracker` download one";
        return Some(format!("skipped: there is no Firecracker: {remedy}"));
    }
    cannot_run()
}

impl Stack {
    /// Starts a stack and waits until it is ready.
    pub async fn start(options: StackOptions) -> Result<Self> {
        let (dir, temporary) = match options.dir {
            Some(dir) => (dir, None),
            None => {
                let temporary = tempfile::Builder::new().prefix("wrenn-test-").tempdir()?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let uplink = match options.uplink {
            Some(uplink) => uplink,
            None => Uplink::create().await?,
        };
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("stack.log"))?;
        let mut child = Command::new(binary()?)
            .args(["dev", "--listen", "127.0.0.1:0", "--dir"])
            .arg(&dir)
            .arg("--images")
            .arg(images()?)
            .args(["--uplink-netns", uplink.name()])
            .env_remove("DATABASE_URL")
            .env_remove("WRENN_BASE_URL")
            .env_remove("WRENN_API_KEY")
            .env_remove("WRENN_PROXY_DOMAIN")
            .envs(is_lab().then(firecracker).into_iter().flatten())
            .envs(options.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("start wrenn dev")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let line = timeout(START_BOUND, async {
            let mut lines = BufReader::new(stdout).lines();
            while let Some(line) = lines.next_line().await? {
                if let Ok(value) = serde_json::from_str::<Value>(&line)
                    && value["ready"] == true
                {
                    return Ok(value);
                }
            }
            bail!("wrenn dev ended before it was ready")
        });
        let ready = line.await.context("wrenn dev was not ready in time").flatten();
        let mut stack = Self { child, dir, _temporary: temporary, uplink: Some(uplink), ready: Value::Null };
        match ready {
            Ok(ready) => {
                stack.ready = ready;
                Ok(stack)
            }
            Err(error) => Err(error.context(stack.log())),
        }
    }

    /// A caller with the first API key.
    #[must_use]
    pub fn client(&self) -> Client {
        let base = self.ready["base_url"].as_str().unwrap_or_default();
        Client::new(base.trim_start_matches("http://"), self.key())
    }

    /// A caller of a port of a sandbox, by its host name and with the first API key.
    #[must_use]
    pub fn port(&self, id: &str, port: u16) -> Client {
        let domain = self.ready["proxy_domain"].as_str().unwrap_or_default();
        self.client().calling(format!("{port}-{id}.{domain}"))
    }

    /// The first API key.
    #[must_use]
    pub fn key(&self) -> &str {
        self.ready["api_key"].as_str().unwrap_or_default()
    }

    /// Where the API is.
    #[must_use]
    pub fn base_url(&self) -> &str {
        self.ready["base_url"].as_str().unwrap_or_default()
    }

    /// The stack's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace that stands for the outside.
    #[must_use]
    pub fn uplink(&self) -> &Uplink {
        self.uplink.as_ref().expect("it is there until the stack is stopped")
    }

    /// The instance id.
    pub fn instance(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.dir.join("instance"))?.trim().to_owned())
    }

    /// The supervisor's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// All that was logged.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = std::fs::read_to_string(self.dir.join("stack.log")).unwrap_or_default();
        for entry in std::fs::read_dir(self.dir.join("logs")).into_iter().flatten().flatten() {
            text.push_str(&format!("\n--- {}\n", entry.file_name().to_string_lossy()));
            text.push_str(&std::fs::read_to_string(entry.path()).unwrap_or_default());
        }
        text
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.child.id().context("it has ended")?;
        Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
    }

    /// Stops it as Ctrl-C does, and waits until it has ended well.
    pub async fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGINT)?;
        let status = timeout(STOP_BOUND, self.child.wait()).await.context("wrenn dev did not end")??;
        ensure!(status.success(), "wrenn dev ended with {status}: {}", self.log());
        if let Some(uplink) = self.uplink.take() {
            uplink.remove().await?;
        }
        Ok(())
    }

    /// Waits until the supervisor has ended, however it did, and gives the outside back.
    pub async fn ended(mut self) -> Result<Uplink> {
        timeout(STOP_BOUND, self.child.wait()).await.context("wrenn dev did not end")??;
        self.uplink.take().context("the outside is there")
    }
}
