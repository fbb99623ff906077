//! Following a command in a sandbox: its output comes out here, our input goes in there, and its exit code
//! becomes ours.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Read as _},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc;
use wrenn_api::{Encoding, ExecRequest, ExecResponse, stream::StartExec};
use wrenn_types::SandboxId;

use super::{
    failure::{Failure, OF_COMMAND},
    interrupts::{Interrupted, Interrupts},
    output::Output,
};
use crate::client::{Client, ClientError, ExecEvent, ExecInput};

/// How long a command may take to end after Ctrl-C. The server kills it after three seconds.
const STOP_BOUND: Duration = Duration::from_secs(6);
/// How often a sandbox hears that somebody still waits for it, so that a silent command is no inactivity.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// What is kept of each stream when the result is one JSON value; as much as the API keeps.
const LARGEST_OUTPUT: usize = 16 << 20;

/// A variable of the command's environment: `NAME=VALUE`, or `NAME` to pass on our own value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    name: String,
    value: String,
}

impl Variable {
    /// Name and value.
    pub(super) fn pair(&self) -> (String, String) {
        (self.name.clone(), self.value.clone())
    }
}

/// A command and how it is run.
#[derive(Debug, clap::Args)]
pub(super) struct CommandArguments {
    /// User to run as
    #[arg(long, short)]
    pub(super) user: Option<String>,
    /// Directory to start in
    #[arg(long, short = 'w')]
    pub(super) cwd: Option<String>,
    /// Variable of its environment: NAME=VALUE, or NAME to pass on the value it has here
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub(super) env: Vec<Variable>,
    /// Seconds after which it is killed
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(1..=86_400))]
    pub(super) timeout: Option<i64>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    Exited {
        code: i32,
        status: Option<String>,
    },
    /// A signal to this program came first, or nobody reads its output any more.
    Interrupted(u8),
}

/// Where the output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// To our own streams, as it comes.
    Pass,
    /// Into memory, for one JSON value.
    Collect(Collected),
}

/// Output in memory.
#[derive(Debug, Default)]
pub(super) struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

impl Sink {
    pub(super) fn new(output: Output) -> Self {
        if output.is_json() { Self::Collect(Collected::default()) } else { Self::Pass }
    }

    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pass => write_through(io::stdout().lock(), bytes),
            Self::Collect(collected) => collected.keep(bytes, |collected| &mut collected.stdout),
        }
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pass => write_through(io::stderr().lock(), bytes),
            Self::Collect(collected) => collected.keep(bytes, |collected| &mut collected.stderr),
        }
    }
}

impl Collected {
    fn keep(&mut self, bytes: &[u8], stream: impl Fn(&mut Self) -> &mut Vec<u8>) -> io::Result<()> {
        let room = LARGEST_OUTPUT - stream(self).len();
        stream(self).extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
        Ok(())
    }
}

/// Output appears when it comes, not when a buffer is full.
fn write_through(mut stream: impl io::Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

impl CommandArguments {
    /// The environment as the API takes it.
    pub(super) fn envs(&self) -> Option<BTreeMap<String, String>> {
        Some(self.env.iter().map(Variable::pair).collect()).filter(|envs: &BTreeMap<_, _>| !envs.is_empty())
    }

    /// The request for a command whose output streams.
    pub(super) fn stream(&self, command: &[String], stdin: bool) -> StartExec {
        let (cmd, args) = split(command);
        StartExec {
            cmd,
            args: Some(args),
            cwd: self.cwd.clone(),
            envs: self.envs(),
            user: self.user.clone(),
            timeout_sec: self.timeout,
            stdin: Some(stdin),
            encoding: None,
        }
    }

    /// The request for a command that runs on.
    pub(super) fn background(&self, command: &[String], tag: Option<String>) -> ExecRequest {
        let (cmd, args) = split(command);
        ExecRequest {
            cmd,
            args: Some(args),
            cwd: self.cwd.clone(),
            envs: self.envs(),
            user: self.user.clone(),
            background: Some(true),
            tag,
            ..ExecRequest::default()
        }
    }
}

fn split(command: &[String]) -> (String, Vec<String>) {
    match command.split_first() {
        Some((program, arguments)) => (program.clone(), arguments.to_vec()),
        None => (String::new(), Vec::new()),
    }
}

/// Whether our standard input is the command's: a pipe or a file is, a terminal is not.
pub(super) fn passes_stdin() -> bool {
    !io::stdin().is_terminal()
}

/// Runs a command and follows it to its end.
pub(super) async fn follow(
    client: &Client,
    id: &SandboxId,
    start: StartExec,
    sink: &mut Sink,
    interrupts: &mut Interrupts,
) -> Result<Ended, Failure> {
    let with_stdin = start.stdin == Some(true);
    let mut stream = client.exec_stream(id, start).await.map_err(Failure::of_command)?;
    let input = stream.input();
    let mut pump = std::pin::pin!(async {
        if with_stdin {
            pump_stdin(&input).await;
        }
        std::future::pending::<()>().await;
    });
    let mut keep_alive = std::pin::pin!(async {
        loop {
            tokio::time::sleep(KEEP_ALIVE).await;
            // What it answers does not matter: it was heard.
            let _ = client.ping(id).await;
        }
    });
    // Set by the first signal: the time until which its end is waited for.
    let mut stopping: Option<(Interrupted, tokio::time::Instant)> = None;
    loop {
        let patience = async {
            match stopping {
                Some((why, until)) => {
                    tokio::time::sleep_until(until).await;
                    why
                }
                None => std::future::pending().await,
            }
        };
        let written = tokio::select! {
            event = stream.next() => match event {
                Ok(ExecEvent::Started(_)) => Ok(()),
                Ok(ExecEvent::Stdout(bytes)) => sink.stdout(&bytes),
                Ok(ExecEvent::Stderr(bytes)) => sink.stderr(&bytes),
                Ok(ExecEvent::Exited { code, status }) => {
                    return Ok(match stopping {
                        Some((why, _)) => Ended::Interrupted(why.exit_code()),
                        None => Ended::Exited { code, status },
                    });
                }
                Err(_) if let Some((why, _)) = stopping => return Ok(Ended::Interrupted(why.exit_code())),
                Err(error) => return Err(Failure::of_command(error)),
            },
            why = interrupts.next() => match stopping {
                None => {
                    // If the connection is gone, the next event says so.
                    let _ = input.stop().await;
                    stopping = Some((why, tokio::time::Instant::now() + STOP_BOUND));
                    Ok(())
                }
                Some(_) => return Ok(Ended::Interrupted(why.exit_code())),
            },
            why = patience => return Ok(Ended::Interrupted(why.exit_code())),
            () = &mut pump => Ok(()),
            () = &mut keep_alive => Ok(()),
        };
        match written {
            Ok(()) => {}
            // As the shell's own pipes do it: the reader has seen enough, and SIGPIPE is signal 13.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(Ended::Interrupted(128 + 13));
            }
            Err(error) => return Err(Failure::new(OF_COMMAND, error)),
        }
    }
}

/// Passes our standard input on, until it or the command ends.
async fn pump_stdin(input: &ExecInput) {
    let mut pieces = read_stdin();
    while let Some(piece) = pieces.recv().await {
        if input.write(&piece).await.is_err() {
            return;
        }
    }
    // A command that has ended needs no end of its input.
    let _ = input.close().await;
}

/// Our standard input, read by a thread of its own: a read cannot be called off, and the thread ends with the
/// process.
pub(super) fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; 32 * 1024];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// The result for programs, and the exit code for the shell.
pub(super) fn conclude(
    output: Output,
    id: &SandboxId,
    cmd: &str,
    started: Instant,
    sink: Sink,
    ended: &Ended,
) -> Result<u8, Failure> {
    let (code, status) = match ended {
        Ended::Exited { code, status } => (*code, status.clone()),
        Ended::Interrupted(code) => return Ok(*code),
    };
    if let Sink::Collect(collected) = sink {
        let encoding = Encoding::for_all(&[&collected.stdout, &collected.stderr]);
        let response = ExecResponse {
            sandbox_id: id.clone(),
            cmd: cmd.to_owned(),
            stdout: encoding.encode(&collected.stdout),
            stderr: encoding.encode(&collected.stderr),
            exit_code: code,
            status: status.clone(),
            duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            encoding,
            truncated: collected.truncated,
        };
        output.json(&response)?;
    }
    Ok(exit_code(code, status.as_deref()))
}

/// The exit code of a shell for the end of a command: its own, or 128 + n if signal n ended it.
pub(super) fn exit_code(code: i32, status: Option<&str>) -> u8 {
    if let Ok(code) = u8::try_from(code) {
        return code;
    }
    // The guest tells a signal by its name, in the words of the C library or of signal.h.
    let names = [
        (1, "hangup", "HUP"),
        (2, "interrupt", "INT"),
        (3, "quit", "QUIT"),
        (4, "illegal instruction", "ILL"),
        (5, "trace", "TRAP"),
        (6, "abort", "ABRT"),
        (7, "bus error", "BUS"),
        (8, "floating point", "FPE"),
        (9, "killed", "KILL"),
        (11, "segmentation fault", "SEGV"),
        (13, "broken pipe", "PIPE"),
        (14, "alarm", "ALRM"),
        (15, "terminated", "TERM"),
    ];
    let status = status.unwrap_or_default();
    let found = names.iter().find(|(_, words, name)| status.contains(words) || status.contains(name));
    found.map_or(255, |(number, ..)| 128 + number)
}

/// Reads `NAME=VALUE`, or `NAME` with the value it has here.
pub(super) fn variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => {
            (text, std::env::var(text).map_err(|_| format!("{text} is not set here; write {text}=VALUE"))?)
        }
    };
    if name.is_empty() || name.contains('\0') {
        return Err("a variable has a name, as in NAME=VALUE".to_owned());
    }
    Ok(Variable { name: name.to_owned(), value })
}

/// Whether a call was refused because what it names is not there.
pub(super) fn is_not_found(error: &ClientError) -> bool {
    error.code() == Some(wrenn_api::ErrorCode::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_as_a_shell_has_them() {
        assert_eq!(exit_code(0, None), 0);
        assert_eq!(exit_code(255, Some("exit status 255")), 255);
        assert_eq!(exit_code(-1, Some("signal: killed")), 137);
        assert_eq!(exit_code(-1, Some("signal: SIGSEGV")), 139);
        assert_eq!(exit_code(-1, Some("signal: terminated")), 143);
        assert_eq!(exit_code(-1, None), 255);
    }

    #[test]
    fn variables() {
        let parsed = |text| variable(text).map(|variable| (variable.name, variable.value));
        assert_eq!(parsed("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(parsed("A="), Ok(("A".to_owned(), String::new())));
        assert_eq!(parsed("PATH").unwrap().1, std::env::var("PATH").unwrap());
        assert!(parsed("=b").is_err());
        assert!(parsed("WRENN_SURELY_NOT_SET").is_err());
    }

    #[test]
    fn collected_output_is_bounded() {
        let mut collected = Collected::default();
        let piece = vec![b'x'; LARGEST_OUTPUT - 1];
        collected.keep(&piece, |collected| &mut collected.stdout).unwrap();
        assert!(!collected.truncated);
        collected.keep(b"yz", |collected| &mut collected.stdout).unwrap();
        assert!(collected.truncated);
        assert_eq!((collected.stdout.len(), collected.stdout.last()), (LARGEST_OUTPUT, Some(&b'y')));
    }
}
