//! From a request to a process that runs: user, directory, environment, pipes or terminal.
//!
//! The environment is made of layers, each over the one before: what the agent gives (`PATH`, `HOME`, `USER`,
//! `LOGNAME`), the guest's own variables from `/init`, defaults for a terminal, and the request's.

use std::{
    collections::BTreeMap,
    ffi::{CString, NulError},
    fs, io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::io::Errno;
use tokio::io::Interest;
use wrenn_guest_linux::{
    spawn::{self, Program, SpawnError, Spawned, Step},
    terminal::{self, Size},
};
use wrenn_proto::process::ProcessConfig;

use super::{
    channel::{Channel, input_pipe, output_pipe},
    running::{Input, Origin, Started},
};
use crate::agent::{
    identity::is_variable,
    paths::{self, PathError},
    state::Identity,
    users::{Accounts, User, UserError},
};

/// Where programs are looked for if nobody says otherwise.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much readier than the agent a process is to be killed when memory is short.
const OOM_SCORE: i16 = 100;

/// What standard input, output and error are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standard {
    /// Pipes for output; a pipe for input too, or nothing.
    Pipes { input: bool },
    /// One terminal.
    Terminal(Size),
}

/// What to start.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) config: ProcessConfig,
    pub(crate) standard: Standard,
    /// The user that the request names, if it names one.
    pub(crate) user: Option<String>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) cgroup: Option<Arc<OwnedFd>>,
}

/// Why a process was not started. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("command is empty")]
    NoCommand,
    #[error("the command, an argument or a variable contains a zero byte")]
    ZeroByte(#[from] NulError),
    #[error("invalid environment variable name '{0}'")]
    Variable(String),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("cwd: {0}")]
    Path(PathError),
    #[error("cwd '{0}' does not exist")]
    NoDirectory(String),
    #[error("cwd '{0}' is not a directory")]
    NotADirectory(String),
    #[error("cwd '{path}' cannot be entered: {reason}")]
    Directory { path: String, reason: Errno },
    #[error("exec: \"{0}\": executable file not found in $PATH")]
    NotFound(String),
    #[error("fork/exec {command}: {reason}")]
    Execute { command: String, reason: Errno },
    #[error("cannot prepare standard input and output")]
    Standard(#[source] io::Error),
    #[error(transparent)]
    Spawn(SpawnError),
}

/// A process that runs, with our ends of its input and output.
#[derive(Debug)]
pub(crate) struct Launched {
    spawned: Spawned,
    input: Option<OwnedFd>,
    outputs: Outputs,
}

#[derive(Debug)]
enum Outputs {
    Pipes { stdout: OwnedFd, stderr: OwnedFd },
    Terminal(OwnedFd),
}

/// Starts a process. It may block, so it runs on a thread for that.
pub(crate) fn launch(order: &Order) -> Result<Launched, LaunchError> {
    let config = &order.config;
    if config.cmd.is_empty() {
        return Err(LaunchError::NoCommand);
    }
    let (accounts, user) = Accounts::load_with_user(order.user.as_deref(), &order.identity.default_user)?;
    let directory = working_directory(config.cwd.as_deref(), &user, &order.identity)?;
    let variables = environment(order, &user)?;
    let candidates = candidates(&config.cmd, variables.get("PATH").map(String::as_str));

    let identity = accounts.identity(&user);
    let environment = variables.iter().map(|(name, value)| CString::new(format!("{name}={value}")));
    let arguments = [&config.cmd].into_iter().chain(&config.args).map(|text| CString::new(text.as_str()));
    let (theirs, input, outputs) = match order.standard {
        Standard::Pipes { input } => pipes(input)?,
        Standard::Terminal(size) => open_terminal(size, &user, &accounts)?,
    };
    let program = Program {
        candidates: &candidates.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?,
        arguments: &arguments.collect::<Result<Vec<_>, _>>()?,
        environment: &environment.collect::<Result<Vec<_>, _>>()?,
        directory: &CString::new(directory.as_str())?,
        identity: (!already_is(&identity)).then_some(&identity),
        stdio: [theirs[0].as_fd(), theirs[1].as_fd(), theirs[2].as_fd()],
        terminal: matches!(order.standard, Standard::Terminal(_)),
        oom_score: Some(OOM_SCORE),
        cgroup: order.cgroup.as_ref().map(|cgroup| cgroup.as_fd()),
    };
    let spawned = spawn::spawn(&program).map_err(|error| explain(error, &config.cmd, directory))?;
    Ok(Launched { spawned, input, outputs })
}

impl Launched {
    /// Makes our ends usable by the runtime; to be called on one of its threads.
    pub(crate) fn into_started(self) -> io::Result<Started> {
        let (terminal, outputs) = match self.outputs {
            Outputs::Pipes { stdout, stderr } => {
                let stdout = Arc::new(Channel::new(stdout, Interest::READABLE)?);
                let stderr = Arc::new(Channel::new(stderr, Interest::READABLE)?);
                (None, vec![(Origin::Stdout, stdout), (Origin::Stderr, stderr)])
            }
            Outputs::Terminal(controller) => {
                let channel = Arc::new(Channel::new(controller, Interest::READABLE | Interest::WRITABLE)?);
                (Some(Arc::clone(&channel)), vec![(Origin::Terminal, channel)])
            }
        };
        let input = match (&terminal, self.input) {
            (Some(terminal), _) => Input::Terminal(Arc::clone(terminal)),
            (None, Some(pipe)) => Input::Pipe(Channel::new(pipe, Interest::WRITABLE)?),
            (None, None) => Input::Closed,
        };
        let Spawned { pid, pidfd } = self.spawned;
        Ok(Started { pid, pidfd, input, terminal, outputs })
    }
}

/// Whether the agent itself is this user and may not become another: so it is for a developer who is not root.
fn already_is(identity: &spawn::Identity) -> bool {
    let own = rustix::process::geteuid();
    !own.is_root() && own.as_raw() == identity.uid
}

/// Where to run: what the request says, else the guest's default, else home; a home that is not there is no reason
/// to refuse a program that did not ask for it.
fn working_directory(given: Option<&str>, user: &User, identity: &Identity) -> Result<String, LaunchError> {
    let given = given.filter(|path| !path.is_empty());
    let path = paths::resolve(given.unwrap_or_default(), user, identity.default_directory.as_deref())
        .map_err(LaunchError::Path)?;
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        _ if given.is_none() => Ok("/".to_owned()),
        Ok(_) => Err(LaunchError::NotADirectory(path)),
        Err(_) => Err(LaunchError::NoDirectory(path)),
    }
}

fn environment(order: &Order, user: &User) -> Result<BTreeMap<String, String>, LaunchError> {
    let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let mut variables = BTreeMap::from([
        own("PATH", &std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned())),
        own("HOME", &user.home),
        own("USER", &user.name),
        own("LOGNAME", &user.name),
        own("SHELL", &user.shell),
    ]);
    variables.extend(order.identity.environment.clone());
    if matches!(order.standard, Standard::Terminal(_)) {
        variables.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    }
    for (name, value) in &order.config.envs {
        if !is_variable(name, value) {
            return Err(LaunchError::Variable(name.clone()));
        }
        variables.insert(name.clone(), value.clone());
    }
    Ok(variables)
}

/// The files that a command may mean: itself if it has a slash, else one in each directory of the search path.
fn candidates(command: &str, path: Option<&str>) -> Vec<String> {
    if command.contains('/') {
        return vec![command.to_owned()];
    }
    let directories = path.unwrap_or(DEFAULT_PATH).split(':').filter(|directory| !directory.is_empty());
    directories.map(|directory| format!("{directory}/{command}")).collect()
}

type Prepared = ([OwnedFd; 3], Option<OwnedFd>, Outputs);

fn pipes(input: bool) -> Result<Prepared, LaunchError> {
    let prepare = || -> io::Result<Prepared> {
        let (ours, stdin) = if input {
            let (ours, theirs) = input_pipe()?;
            (Some(ours), theirs)
        } else {
            (None, fs::File::open("/dev/null")?.into())
        };
        let (stdout, theirs_out) = output_pipe()?;
        let (stderr, theirs_err) = output_pipe()?;
        Ok(([stdin, theirs_out, theirs_err], ours, Outputs::Pipes { stdout, stderr }))
    };
    prepare().map_err(LaunchError::Standard)
}

fn open_terminal(size: Size, user: &User, accounts: &Accounts) -> Result<Prepared, LaunchError> {
    let prepare = || -> io::Result<Prepared> {
        let group = accounts.group("tty").unwrap_or(user.gid);
        let pair = terminal::open(size, user.uid, group)?;
        let theirs = [pair.terminal.try_clone()?, pair.terminal.try_clone()?, pair.terminal];
        Ok((theirs, None, Outputs::Terminal(pair.controller)))
    };
    prepare().map_err(LaunchError::Standard)
}

fn explain(error: SpawnError, command: &str, directory: String) -> LaunchError {
    match (error.step, error.errno) {
        (Step::Directory, Errno::NOENT) => LaunchError::NoDirectory(directory),
        (Step::Directory, reason) => LaunchError::Directory { path: directory, reason },
        (Step::Execute, Errno::NOENT) if !command.contains('/') => LaunchError::NotFound(command.to_owned()),
        (Step::Execute, reason) => LaunchError::Execute { command: command.to_owned(), reason },
        _ => LaunchError::Spawn(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_a_slash_is_searched_for() {
        assert_eq!(candidates("/bin/ls", Some("/a")), ["/bin/ls"]);
        assert_eq!(candidates("./ls", Some("/a")), ["./ls"]);
        assert_eq!(candidates("ls", Some("/a:/b::")), ["/a/ls", "/b/ls"]);
        assert!(candidates("ls", None).contains(&"/usr/bin/ls".to_owned()));
    }
}
