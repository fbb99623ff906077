//! `wrenn dev`, `wrenn up`, `wrenn down`: a whole stack on this machine.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use camino::{Utf8Path, Utf8PathBuf};
use clap::ValueEnum as _;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};
use wrenn_control_plane::ProxyDomain;
use wrenn_host_agent::config::{OnControlPlaneLoss, OnStop};

use super::{
    DEFAULT_DIRECTORY, DIRECTORY_VARIABLE, failure::Failure, interrupts::Interrupts, output::Output,
};
use crate::supervisor::{
    self, Config, Directory, Event, Found, ProcessIdentity, RUN_ROOT, StackReady, Stopped,
};

/// How long a stack may take to come up: the sum of what its parts may take, and a little more.
const UP_BOUND: Duration = Duration::from_secs(540);
/// How long it may take to stop: the sum of what its parts may take.
const DOWN_BOUND: Duration = Duration::from_secs(180);

/// Flags of `wrenn dev` and `wrenn up`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DevArguments {
    /// Address of the public API; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Domain of the host names by which ports of sandboxes are reached, PORT-SANDBOX.DOMAIN
    #[arg(long, env = "WRENN_PROXY_DOMAIN", value_name = "DOMAIN", default_value = "localhost")]
    proxy_domain: ProxyDomain,
    /// Directory of the stack: its data, logs, and the file env
    #[arg(long, env = DIRECTORY_VARIABLE, default_value = DEFAULT_DIRECTORY)]
    dir: Utf8PathBuf,
    /// Directory with the guest bundle and the templates
    #[arg(long, env = "WRENN_IMAGES", default_value = "target/images")]
    images: Utf8PathBuf,
    /// Directory of the warm snapshots, in the user's cache directory when not given
    #[arg(long, env = "WRENN_SNAPSHOTS")]
    snapshots: Option<Utf8PathBuf>,
    /// Network slots to keep ready
    #[arg(long)]
    ready_slots: Option<u32>,
    /// Network namespace that is the way out of the sandboxes, instead of the root namespace
    #[arg(long, value_name = "NAME")]
    uplink_netns: Option<String>,
    /// What becomes of running sandboxes when the stack is stopped: left ones go on, and the next start of the stack
    /// takes them over, be it of another version
    #[arg(long, env = "WRENN_ON_STOP", value_enum, value_name = "ACTION", default_value_t = OnStop::Destroy)]
    on_stop: OnStop,
    /// What becomes of running sandboxes when the control plane is away for a while
    #[arg(long, env = "WRENN_ON_CONTROL_PLANE_LOSS", value_enum, value_name = "ACTION")]
    on_control_plane_loss: Option<OnControlPlaneLoss>,
    /// How long that while is; 90 when not given
    #[arg(
        long,
        env = "WRENN_CONTROL_PLANE_LOSS_AFTER",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    control_plane_loss_after: Option<u32>,
    /// A database to use instead of a private one
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Program to start as agent and as control plane
    #[arg(long, hide = true)]
    executable: Option<Utf8PathBuf>,
    /// Leave the session of the terminal
    #[arg(long, hide = true)]
    detached: bool,
}

/// Flags of `wrenn down`.
#[derive(Debug, clap::Args)]
pub(super) struct DownArguments {
    /// Directory of the stack
    #[arg(long, env = DIRECTORY_VARIABLE, default_value = DEFAULT_DIRECTORY)]
    dir: Utf8PathBuf,
}

impl DevArguments {
    /// `wrenn dev`.
    pub(super) async fn dev(self) -> Result<u8, Failure> {
        if self.detached {
            // A session of its own: the terminal it was started from may go.
            rustix::process::setsid().context("cannot leave the session").map_err(Failure::from)?;
        }
        check_machine()?;
        let detached = self.detached;
        let config = self.config()?;
        let output = Output::new(super::output::Format::Json);
        let observer: supervisor::Observer = Arc::new(move |event| match event {
            Event::StackReady(ready) => {
                output.note(&summary(&ready, detached));
                // The line is for whoever started this and may be gone by now.
                let _ = output.json(&ready);
            }
            event => output.note(&format!("{event}")),
        });
        match supervisor::run(config, observer).await {
            Ok(()) => Ok(0),
            Err(error) => Err(Failure::new(1, error)),
        }
    }

    /// `wrenn up`.
    pub(super) async fn up(self, output: Output) -> Result<u8, Failure> {
        let mut interrupts = Interrupts::new()?;
        let directory = Directory::create(&self.dir).map_err(|error| Failure::new(1, error))?;
        let tell = |ready: &StackReady| -> Result<u8, Failure> {
            output.note(&summary(ready, true));
            output.json(ready)?;
            Ok(0)
        };
        match supervisor::find(&directory, UP_BOUND).await? {
            Found::Ready(ready) => return tell(&ready),
            Found::NotReady(holder) => return Err(not_ready(&directory, holder).into()),
            Found::Nothing => {}
        }
        check_machine()?;

        let log = directory.own_log();
        fs::create_dir_all(directory.logs())?;
        let log_file = fs::OpenOptions::new().append(true).create(true).open(&log)?;
        let mut progress = Progress { log: log.clone(), seen: log_file.metadata()?.len(), output };
        let mut child = Command::new("/proc/self/exe")
            .arg0("wrenn")
            .args(self.command_line(&directory))
            .envs(self.database_url.iter().map(|url| ("DATABASE_URL", url)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .spawn()
            .context("cannot start the stack")?;
        let identity = child.id().and_then(|pid| ProcessIdentity::of(i32::try_from(pid).ok()?));
        let stdout = child.stdout.take().context("the stack has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        let deadline = tokio::time::sleep(UP_BOUND);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                line = lines.next_line() => match line? {
                    Some(line) => {
                        if let Ok(ready) = serde_json::from_str::<StackReady>(&line) {
                            progress.show();
                            return tell(&ready);
                        }
                    }
                    // Its output ends with it.
                    None => break,
                },
                // A log is a file of another process: there is no event for a new line.
                _ = ticks.tick() => progress.show(),
                why = interrupts.next() => {
                    output.note("stopping what was started");
                    supervisor::stop(&directory, DOWN_BOUND).await?;
                    return Ok(why.exit_code());
                }
                () = &mut deadline => {
                    return Err(match identity {
                        Some(identity) => not_ready(&directory, identity).into(),
                        None => anyhow::anyhow!("the stack did not come up; its log is {log}").into(),
                    });
                }
            }
        }
        // Another `up` may have been a little faster: then its stack is the one.
        if let Found::Ready(ready) = supervisor::find(&directory, UP_BOUND).await? {
            return tell(&ready);
        }
        progress.show();
        Err(anyhow::anyhow!("the stack did not come up; the whole log is {log}").into())
    }

    fn config(self) -> anyhow::Result<Config> {
        let snapshots = match self.snapshots {
            Some(snapshots) => snapshots,
            None => cache_directory()?.join("wrenn/snapshots"),
        };
        Ok(Config {
            directory: absolute(&self.dir)?,
            run_root: RUN_ROOT.into(),
            listen: self.listen,
            proxy_domain: self.proxy_domain,
            images: absolute(&self.images)?,
            snapshots: absolute(&snapshots)?,
            ready_slots: self.ready_slots,
            uplink_netns: self.uplink_netns,
            on_control_plane_loss: self.on_control_plane_loss,
            on_stop: self.on_stop,
            control_plane_loss_after: self.control_plane_loss_after,
            database_url: self.database_url,
            executable: self.executable,
        })
    }

    /// The command line of the stack that `up` starts. A database address may hold a password and goes by the
    /// environment instead.
    fn command_line(&self, directory: &Directory) -> Vec<String> {
        let mut line = vec!["dev".to_owned(), "--detached".to_owned()];
        let mut flag = |name: &str, value: Option<String>| {
            line.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
        };
        flag("--listen", Some(self.listen.to_string()));
        flag("--proxy-domain", Some(self.proxy_domain.to_string()));
        flag("--dir", Some(directory.root().to_string()));
        flag("--images", Some(self.images.to_string()));
        flag("--snapshots", self.snapshots.as_ref().map(Utf8PathBuf::to_string));
        flag("--ready-slots", self.ready_slots.as_ref().map(u32::to_string));
        flag("--uplink-netns", self.uplink_netns.clone());
        let policy = self.on_control_plane_loss.and_then(|policy| policy.to_possible_value());
        flag("--on-control-plane-loss", policy.map(|policy| policy.get_name().to_owned()));
        flag("--on-stop", self.on_stop.to_possible_value().map(|action| action.get_name().to_owned()));
        flag("--control-plane-loss-after", self.control_plane_loss_after.as_ref().map(u32::to_string));
        flag("--executable", self.executable.as_ref().map(Utf8PathBuf::to_string));
        line
    }
}

impl DownArguments {
    pub(super) async fn execute(self, output: Output) -> Result<u8, Failure> {
        let (stopped, was_killed) = match Directory::existing(&self.dir) {
            Ok(directory) => (supervisor::stop(&directory, DOWN_BOUND).await?, directory.was_killed()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (Stopped::Nothing, false),
            Err(error) => return Err(error.into()),
        };
        let (was_running, words) = match stopped {
            Stopped::Ended => (true, "stopped"),
            Stopped::Nothing if was_killed => {
                (false, "nothing runs there; it was killed, and the next start collects what it left")
            }
            Stopped::Nothing => (false, "nothing runs there"),
            Stopped::StillRuns(holder) => {
                return Err(anyhow::anyhow!("process {} was told to stop and still runs", holder.pid).into());
            }
        };
        if output.is_json() {
            output.json(&serde_json::json!({ "stopped": was_running, "dir": self.dir }))?;
        } else {
            output.note(&format!("{}: {words}", self.dir));
        }
        Ok(0)
    }
}

/// New lines of the log of a stack, shown while it comes up.
struct Progress {
    log: Utf8PathBuf,
    seen: u64,
    output: Output,
}

impl Progress {
    fn show(&mut self) {
        let mut text = String::new();
        let mut read = || -> std::io::Result<()> {
            let mut file = fs::File::open(&self.log)?;
            file.seek(SeekFrom::Start(self.seen))?;
            file.read_to_string(&mut text).map(drop)
        };
        // It is only for people who watch; what matters comes over the pipe.
        if read().is_ok()
            && let Some(end) = text.rfind('\n')
        {
            self.seen += end as u64 + 1;
            // The summary follows from here, too.
            for line in text[..end].lines().filter(|line| !line.is_empty() && !line.starts_with(SUMMARY_MARK))
            {
                self.output.note(line);
            }
        }
    }
}

/// How lines of the summary begin, which `up` prints by itself.
const SUMMARY_MARK: &str = "  | ";

/// What a person needs to know about a stack that is ready.
fn summary(ready: &StackReady, detached: bool) -> String {
    let dir = &ready.dir;
    let stop = if detached { format!("wrenn down --dir {dir}") } else { "Ctrl-C".to_owned() };
    let key = match &ready.api_key {
        Some(_) => format!(". {dir}/env    (sets WRENN_BASE_URL, WRENN_API_KEY and WRENN_PROXY_DOMAIN)"),
        None => "the one you have: this database had a first key before".to_owned(),
    };
    [
        "Wrenn is ready.".to_owned(),
        format!("API      {}    (Swagger UI at {}/docs)", ready.base_url, ready.base_url),
        format!("Ports    http://PORT-SANDBOX.{}    (with the key)", ready.proxy_domain),
        format!("Key      {key}"),
        "Try      wrenn run -- python3 -c 'print(6 * 7)'".to_owned(),
        format!("Logs     {dir}/logs"),
        format!("Stop     {stop}"),
    ]
    .map(|line| format!("{SUMMARY_MARK}{line}"))
    .join("\n")
}

fn not_ready(directory: &Directory, holder: ProcessIdentity) -> anyhow::Error {
    let (pid, log) = (holder.pid, directory.own_log());
    anyhow::anyhow!(
        "the stack (process {pid}) runs but is not ready after {} s; its log is {log}",
        UP_BOUND.as_secs()
    )
}

/// What no part of a stack can do without, said in one place before anything is started.
fn check_machine() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "a stack makes network namespaces and needs root: run it as root, for example with `sudo -E`, \
             or use a stack of another machine with WRENN_BASE_URL and WRENN_API_KEY"
        );
    }
    if !Path::new("/dev/net/tun").exists() {
        bail!(
            "/dev/net/tun is missing, without which a sandbox has no network: `modprobe tun` makes it, \
             in a container it is passed in with `--device /dev/net/tun`"
        );
    }
    Ok(())
}

fn absolute(path: &Utf8Path) -> anyhow::Result<Utf8PathBuf> {
    let absolute = std::path::absolute(path).with_context(|| format!("cannot resolve {path}"))?;
    Utf8PathBuf::from_path_buf(absolute).map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

/// The user's cache directory.
fn cache_directory() -> anyhow::Result<Utf8PathBuf> {
    let set = |name| std::env::var(name).ok().filter(|value| value.starts_with('/'));
    if let Some(cache) = set("XDG_CACHE_HOME") {
        return Ok(cache.into());
    }
    match set("HOME") {
        Some(home) => Ok(Utf8PathBuf::from(home).join(".cache")),
        None => bail!("neither XDG_CACHE_HOME nor HOME is set; name a directory with --snapshots"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: DevArguments,
    }

    #[test]
    fn up_starts_what_it_was_asked_for() {
        let guard = tempfile::tempdir().unwrap();
        let dir = Utf8PathBuf::from_path_buf(guard.path().canonicalize().unwrap()).unwrap();
        let directory = Directory::create(&dir).unwrap();
        let given = [
            "wrenn",
            "--listen",
            "127.0.0.1:0",
            "--proxy-domain",
            "s.example.com",
            "--dir",
            dir.as_str(),
            "--images",
            "i",
            "--ready-slots",
            "3",
            "--on-control-plane-loss",
            "pause",
            "--control-plane-loss-after",
            "7",
            "--on-stop",
            "leave",
        ];
        let arguments = Line::try_parse_from(given).unwrap().arguments;
        let mut line = arguments.command_line(&directory);
        assert_eq!(line[..2], ["dev", "--detached"]);
        line.remove(1);
        let again = Line::try_parse_from(line).unwrap().arguments;
        assert_eq!((again.listen, again.dir, again.ready_slots), (arguments.listen, dir, Some(3)));
        assert_eq!(again.proxy_domain.as_str(), "s.example.com");
        let loss = (again.on_control_plane_loss, again.control_plane_loss_after);
        assert_eq!(loss, (Some(OnControlPlaneLoss::Pause), Some(7)));
        assert_eq!(again.on_stop, OnStop::Leave);
    }

    #[test]
    fn the_summary_names_the_file_to_source() {
        let ready = StackReady {
            ready: true,
            base_url: "http://127.0.0.1:8000".to_owned(),
            proxy_domain: "localhost:8000".to_owned(),
            api_key: Some("wrn_0".to_owned()),
            dir: "/x/.wrenn".into(),
        };
        let text = summary(&ready, false);
        assert!(
            text.contains(". /x/.wrenn/env") && text.contains("Ctrl-C") && !text.contains("wrn_0"),
            "{text}"
        );
    }
}
