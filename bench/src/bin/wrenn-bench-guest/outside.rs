//! The agent as an ordinary process, beside a peer that does the same: what the virtual machine has no part in.
//!
//! ```text
//!  a network and a /run of its own ─ agent ◄── 50 programs, a file, … ──┐
//!  a network and a /run of its own ─ peer  ◄── the same, in turns ──────┴─ this program
//! ```
//!
//! An agent for guests may believe that the machine is its own. So neither may set the clock: the capability is
//! taken from them, and they are never told what time it is.

use std::{
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::runtime::Handle;
use wrenn_bench::{memory::Memory, statistics::Samples};
use wrenn_host_linux::netns::NetworkNamespace;

use crate::{
    report::{Measure, Outside, Series, Weight},
    wire::Connection,
    workload::{self, Content, Encoding, Program},
};

/// How many programs run before it is the other's turn.
const TURN: usize = 50;
/// After how many of them memory is looked at again.
const USED: usize = 100;
/// How many small files are sent in one request where there are several.
const TOGETHER: usize = 100;
const PORT: u16 = 49983;
const START_BOUND: Duration = Duration::from_secs(20);
/// Both run in it; what is behind it is the agent's command line.
const ENTER: &str = "ip link set lo up && mount -t tmpfs tmpfs /run && echo entered && \
    exec setpriv --pdeathsig KILL --bounding-set=-sys_time --inh-caps=-sys_time \"$@\" >/dev/null 2>&1";

/// What is measured.
#[derive(Debug, clap::Args)]
#[group(id = "outside")]
pub(crate) struct Options {
    /// Our agent, built for guests.
    #[arg(long, env = "WRENN_ENVD")]
    pub(crate) envd: Option<PathBuf>,
    /// The program of a peer: E2B's envd.
    #[arg(long, env = "WRENN_PEER_ENVD")]
    pub(crate) peer: Option<PathBuf>,
    /// How the peer is told to run outside of a virtual machine, on the port 49983.
    #[arg(long, default_value = "-isnotfc -no-cgroups -port 49983", allow_hyphen_values = true)]
    pub(crate) peer_arguments: String,
    /// How many programs.
    #[arg(long, default_value_t = 1000)]
    pub(crate) programs: usize,
    /// How many times everything larger is done.
    #[arg(long, default_value_t = 7)]
    pub(crate) rounds: usize,
    /// Size of a file in MiB.
    #[arg(long, default_value_t = 256)]
    pub(crate) outside_file_mib: u64,
    /// How much a process writes in MiB.
    #[arg(long, default_value_t = 64)]
    pub(crate) outside_output_mib: u64,
    /// A directory in memory.
    #[arg(long, default_value = "/dev/shm")]
    pub(crate) memory_directory: PathBuf,
    /// A directory on a disk.
    #[arg(long, default_value = "/var/tmp")]
    pub(crate) disk_directory: PathBuf,
}

/// An agent that runs. It ends with this.
struct Agent {
    child: Child,
    namespace: NetworkNamespace,
    connection: Connection,
    started: Memory,
    used: Option<Memory>,
    binary: u64,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start(handle: &Handle, program: &Path, arguments: &[&str]) -> Result<Self> {
        let program = program.canonicalize().with_context(|| format!("find {}", program.display()))?;
        let mut child = Command::new("unshare")
            .args(["--net", "--mount", "--", "sh", "-c", ENTER, "sh"])
            .arg(&program)
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start unshare")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("wait for the namespace")?;
        if line.trim() != "entered" {
            let _ = child.kill();
            bail!("{} could not be started in a namespace: {:?}", program.display(), child.wait());
        }
        let namespace = NetworkNamespace::open(Path::new(&format!("/proc/{}/ns/net", child.id())))?;
        let connection = match healthy(handle, &namespace) {
            Ok(connection) => connection,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.context(format!("{} does not answer", program.display())));
            }
        };
        let started = Memory::of_process(child.id())?;
        let binary = program.metadata()?.len();
        Ok(Self { child, namespace, connection, started, used: None, binary })
    }

    fn weight(&self) -> Result<Weight> {
        let last = Memory::of_process(self.child.id())?;
        Ok(Weight { binary: self.binary, started: self.started, used: self.used.unwrap_or(last), last })
    }

    /// Does one thing. A connection on which something went wrong is not used again.
    fn attempt(
        &mut self,
        handle: &Handle,
        samples: &mut Samples,
        work: impl FnOnce(&mut Connection) -> Result<Duration>,
    ) -> Result<()> {
        let outcome = work(&mut self.connection);
        let failed = outcome.is_err();
        samples.add(outcome.map_err(|error| format!("{error:#}")));
        if failed {
            self.connection = healthy(handle, &self.namespace)?;
        }
        Ok(())
    }
}

/// A connection on which `GET /health` has been answered.
fn healthy(handle: &Handle, namespace: &NetworkNamespace) -> Result<Connection> {
    let end = Instant::now() + START_BOUND;
    loop {
        match handle.block_on(namespace.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))))? {
            Ok(stream) => {
                let mut connection = Connection::new(stream)?;
                connection.send(b"GET /health HTTP/1.1\r\nHost: guest\r\n\r\n")?;
                connection.answer(204, |_| Ok(()))?;
                return Ok(connection);
            }
            Err(error) => ensure!(Instant::now() < end, "connect: {error}"),
        }
        // Refused: nothing listens yet, and nothing tells when it does.
        handle.block_on(tokio::time::sleep(Duration::from_millis(5)));
    }
}

/// The agents that take turns: ours first.
struct Turns<'a> {
    handle: &'a Handle,
    agents: Vec<Agent>,
}

impl Turns<'_> {
    fn series(&self, what: impl Into<String>, measure: Measure) -> Series {
        if self.agents.len() > 1 {
            Series::beside(&["peer"], what, measure)
        } else {
            Series::alone(what, measure)
        }
    }

    /// Each does the same; who is first alternates.
    fn each(
        &mut self,
        round: usize,
        series: &mut Series,
        mut work: impl FnMut(&mut Agent, &Handle, &mut Samples, usize) -> Result<()>,
    ) -> Result<()> {
        let count = self.agents.len();
        for step in 0..count {
            let index = (round + step) % count;
            let samples = match (series.others.first_mut(), index) {
                (Some(other), 1) => &mut other.samples,
                _ => &mut series.ours,
            };
            work(&mut self.agents[index], self.handle, samples, index)?;
        }
        Ok(())
    }

    fn programs(&mut self, count: usize) -> Result<Series> {
        let mut series = self.series("exec of `/bin/true`", Measure::Time);
        let program = Program::new("/bin/true", &[]);
        for (round, first) in (0..count).step_by(TURN).enumerate() {
            let turn = TURN.min(count - first);
            self.each(round, &mut series, |agent, handle, samples, _| {
                for _ in 0..turn {
                    agent.attempt(handle, samples, |connection| Ok(program.run(connection)?.0))?;
                }
                if first + turn >= USED && agent.used.is_none() {
                    agent.used = Some(Memory::of_process(agent.child.id())?);
                }
                Ok(())
            })?;
        }
        Ok(series)
    }

    fn output(&mut self, rounds: usize, mib: u64) -> Result<Series> {
        let bytes = mib << 20;
        let mut series = self.series(format!("stdout of a process, {mib} MiB"), Measure::Bytes(bytes));
        for round in 0..rounds {
            self.each(round, &mut series, |agent, handle, samples, _| {
                agent.attempt(handle, samples, |connection| workload::output(connection, bytes))
            })?;
        }
        Ok(series)
    }

    /// Up, down, and down compressed.
    fn files(&mut self, rounds: usize, mib: u64, directory: &Path, place: &str) -> Result<[Series; 3]> {
        let directory = tempfile::Builder::new().prefix("wrenn-bench-").tempdir_in(directory)?;
        let directory = directory.path().to_str().context("the directory is text")?;
        let bytes = mib << 20;
        let measure = Measure::Bytes(bytes);
        let content = Content::new();
        let mut up = self.series(format!("file of {mib} MiB up, {place}"), measure);
        let mut down = self.series(format!("file of {mib} MiB down, {place}"), measure);
        let mut compressed = self.series(format!("file of {mib} MiB down with gzip, {place}"), measure);
        let path = |index: usize| format!("{directory}/file-{index}");
        for round in 0..rounds {
            self.each(round, &mut up, |agent, handle, samples, index| {
                let path = path(index);
                // Every time a new file, and no more of them in memory than there must be.
                let _ = std::fs::remove_file(&path);
                agent.attempt(handle, samples, |connection| {
                    workload::upload(connection, &path, &content, bytes)
                })
            })?;
            self.each(round, &mut down, |agent, handle, samples, index| {
                agent.attempt(handle, samples, |connection| {
                    workload::download(connection, &path(index), &content, bytes, Encoding::Identity)
                })
            })?;
        }
        // It takes so long that fewer say enough.
        for round in 0..rounds.div_ceil(3) {
            self.each(round, &mut compressed, |agent, handle, samples, index| {
                agent.attempt(handle, samples, |connection| {
                    workload::download(connection, &path(index), &content, bytes, Encoding::Gzip)
                })
            })?;
        }
        Ok([up, down, compressed])
    }

    fn small_files(&mut self, rounds: usize, together: usize, parent: &Path) -> Result<Series> {
        const FILES: usize = 1000;
        let what = match together {
            1 => format!("{FILES} small files up, one a request, in memory"),
            _ => format!("{FILES} small files up, {together} a request, in memory"),
        };
        let mut series = self.series(what, Measure::Files(FILES));
        // They stay until the end: whoever comes after a removal would pay for it.
        let mut directories = Vec::new();
        for round in 0..rounds {
            self.each(round, &mut series, |agent, handle, samples, _| {
                let directory = tempfile::Builder::new().prefix("wrenn-bench-").tempdir_in(parent)?;
                let path = directory.path().to_str().context("the directory is text")?;
                let outcome = agent.attempt(handle, samples, |connection| {
                    workload::small_files(connection, path, 0..FILES, together)
                });
                directories.push(directory);
                outcome
            })?;
        }
        Ok(series)
    }
}

/// Measures. It blocks.
///
/// # Errors
/// An agent cannot be started, or ends. What it does wrong is a sample that failed.
pub(crate) fn measure(handle: &Handle, options: &Options) -> Result<Outside> {
    let envd = options.envd.as_deref().context("--envd says where our agent is")?;
    let mut agents = vec![Agent::start(handle, envd, &["agent", "--port", "49983"])?];
    if let Some(peer) = &options.peer {
        let arguments: Vec<&str> = options.peer_arguments.split_whitespace().collect();
        agents.push(Agent::start(handle, peer, &arguments)?);
    }
    let mut turns = Turns { handle, agents };
    let say = |what: &str| eprintln!("outside: {what}");
    say("programs");
    let mut series = vec![turns.programs(options.programs)?];
    say("output");
    series.push(turns.output(options.rounds, options.outside_output_mib)?);
    for (directory, place) in [(&options.memory_directory, "in memory"), (&options.disk_directory, "on disk")]
    {
        say(&format!("files {place}"));
        series.extend(turns.files(options.rounds, options.outside_file_mib, directory, place)?);
    }
    say("small files");
    for together in [1, TOGETHER] {
        series.push(turns.small_files(options.rounds, together, &options.memory_directory)?);
    }
    let ours = turns.agents[0].weight()?;
    let peer = turns.agents.get(1).map(Agent::weight).transpose()?;
    Ok(Outside { series, ours, peer })
}
