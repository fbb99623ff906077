//! Commands and processes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::time::timeout;
use wrenn_api::{BackgroundProcess, ProcessInfo};
use wrenn_types::SandboxId;

use super::{Caller, Core, CoreError, spec::Command};
use crate::guest::{self, End, Guest, Input, Launch, ProcessEvent, ProcessStream, Selector, Signal};

/// What is kept of each of the two outputs of a command whose end is waited for.
pub(crate) const OUTPUT_KEPT: usize = 16 << 20;
/// How much longer than we do the guest waits until it kills a command by itself, should we be gone.
const BACKSTOP: Duration = Duration::from_secs(5);
/// What the audit log keeps of a command line.
const LINE_KEPT: usize = 1024;

/// The first bytes of an output, and whether there were more.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) bytes: Vec<u8>,
    pub(crate) truncated: bool,
}

impl Output {
    fn keep(&mut self, piece: &[u8]) {
        let room = OUTPUT_KEPT - self.bytes.len();
        self.truncated |= piece.len() > room;
        self.bytes.extend_from_slice(&piece[..piece.len().min(room)]);
    }
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
    pub(crate) end: End,
    pub(crate) duration: Duration,
}

/// A process and the stream of what happens to it.
#[derive(Debug)]
pub(crate) struct Session {
    core: Arc<Core>,
    caller: Caller,
    id: SandboxId,
    guest: Guest,
    stream: ProcessStream,
    pid: u32,
    ended: bool,
    kill_when_dropped: bool,
}

impl Session {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The next thing that happens, up to its end. May be dropped between polls.
    ///
    /// # Errors
    /// What the guest says, or that it says nothing more.
    pub(crate) async fn next(&mut self) -> Result<ProcessEvent, CoreError> {
        match self.stream.next().await {
            Ok(Some(event)) => {
                self.ended |= matches!(event, ProcessEvent::Ended(_));
                Ok(event)
            }
            Ok(None) => {
                let lost = "the stream of a process ended before it did".into();
                Err(guest::GuestError::Lost(lost).into())
            }
            Err(error) => Err(self.core.explain(&self.caller, &self.id, error).await),
        }
    }

    /// What can be said to the process while its events are waited for.
    pub(crate) fn control(&self) -> Control {
        Control { guest: self.guest.clone(), selector: Selector::Pid(self.pid) }
    }

    /// From now on the process dies with the session.
    fn kill_when_dropped(&mut self) {
        self.kill_when_dropped = true;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.kill_when_dropped && !self.ended {
            let control = self.control();
            // The bound of the question bounds the task.
            self.core.tasks.spawn(async move { control.signal(Signal::Kill).await });
        }
    }
}

/// What can be said to a process.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    guest: Guest,
    selector: Selector,
}

impl Control {
    pub(crate) async fn send(&self, input: Input, bound: Duration) -> Result<(), CoreError> {
        Ok(self.guest.send(&self.selector, input, bound).await?)
    }

    pub(crate) async fn close_stdin(&self) -> Result<(), CoreError> {
        Ok(self.guest.close_stdin(&self.selector).await?)
    }

    pub(crate) async fn resize(&self, cols: u32, rows: u32) -> Result<(), CoreError> {
        Ok(self.guest.resize(&self.selector, cols, rows).await?)
    }

    pub(crate) async fn signal(&self, signal: Signal) -> Result<(), CoreError> {
        Ok(self.guest.signal(&self.selector, signal).await?)
    }
}

/// A command line as the audit log has it: without its environment and input, which hold secrets.
fn line(launch: &Launch) -> Value {
    let mut room = LINE_KEPT;
    let mut kept = Vec::new();
    for word in std::iter::once(&launch.cmd).chain(&launch.args) {
        let mut end = word.len().min(room);
        while !word.is_char_boundary(end) {
            end -= 1;
        }
        kept.push(&word[..end]);
        room -= end;
        if room == 0 {
            break;
        }
    }
    json!({ "command": kept, "user": launch.user, "cwd": launch.cwd })
}

impl Core {
    /// Starts a process, or joins one, and waits until its process id is known.
    async fn session<F>(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        open: impl Fn(Guest) -> F,
    ) -> Result<Session, CoreError>
    where
        F: Future<Output = Result<ProcessStream, guest::GuestError>>,
    {
        let (guest, mut stream) = Box::pin(self.ask_guest(caller, id, open)).await?;
        let first = match timeout(self.bounds.guest, stream.next()).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => return Err(self.explain(caller, id, error).await),
            Err(_) => return Err(guest::GuestError::TimedOut.into()),
        };
        let Some(ProcessEvent::Started { pid }) = first else {
            return Err(
                guest::GuestError::Lost("the first event of a process was not its start".into()).into()
            );
        };
        self.recorder.sandbox_used(id, jiff::Timestamp::now());
        Ok(Session {
            core: Arc::clone(self),
            caller: caller.clone(),
            id: id.clone(),
            guest,
            stream,
            pid,
            ended: false,
            kill_when_dropped: false,
        })
    }

    async fn started(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        launch: Launch,
    ) -> Result<Session, CoreError> {
        let silence = self.bounds.guest_silence;
        let start = |guest: Guest| {
            let launch = launch.clone();
            async move { guest.start(launch, silence).await }
        };
        self.session(caller, id, start).await
    }

    /// Starts a process whose events are followed. With `foreground` it dies with the session.
    pub(crate) async fn start(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        action: &'static str,
        launch: Launch,
        foreground: bool,
    ) -> Result<Session, CoreError> {
        let metadata = line(&launch);
        let start = self.started(caller, id, launch);
        let mut session = self.audited(caller, id, action, metadata, start).await?;
        if foreground {
            session.kill_when_dropped();
        }
        Ok(session)
    }

    /// Follows a process that runs already.
    pub(crate) async fn join(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        selector: &Selector,
    ) -> Result<Session, CoreError> {
        let silence = self.bounds.guest_silence;
        self.session(caller, id, |guest| async move { guest.join(selector, silence).await }).await
    }

    /// Runs a command to its end.
    pub(crate) async fn run(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        command: Command,
    ) -> Result<Finished, CoreError> {
        let metadata = line(&command.launch);
        // Boxed: the buffers of two RPC streams make it large.
        let run = Box::pin(self.run_unrecorded(caller, id, command));
        self.audited(caller, id, "exec", metadata, run).await
    }

    async fn run_unrecorded(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        command: Command,
    ) -> Result<Finished, CoreError> {
        let begin = Instant::now();
        let Command { mut launch, stdin, timeout: bound, .. } = command;
        launch.killed_after = Some(bound + BACKSTOP);
        let mut session = self.started(caller, id, launch).await?;
        session.kill_when_dropped();
        let control = session.control();

        let mut stdout = Output::default();
        let mut stderr = Output::default();
        let follow = async {
            loop {
                match session.next().await? {
                    ProcessEvent::Stdout(piece) => stdout.keep(&piece),
                    ProcessEvent::Stderr(piece) | ProcessEvent::Terminal(piece) => stderr.keep(&piece),
                    ProcessEvent::Ended(end) => return Ok::<_, CoreError>(end),
                    ProcessEvent::Started { .. } => {}
                }
            }
        };
        // The input is fed while the output is read: a command may write before it has read everything. One
        // that ends without reading it is no error.
        let feed = async {
            if let Some(stdin) = stdin {
                if !stdin.is_empty() {
                    control.send(Input::Stdin(stdin), bound).await?;
                }
                control.close_stdin().await?;
            }
            Ok::<(), CoreError>(())
        };
        let both = async {
            tokio::pin!(follow, feed);
            tokio::select! {
                end = &mut follow => end,
                _ = &mut feed => follow.await,
            }
        };
        match timeout(bound, Box::pin(both)).await {
            Ok(end) => {
                let end = end?;
                Ok(Finished { stdout, stderr, end, duration: begin.elapsed() })
            }
            Err(_) => {
                // Answered once the guest has taken the signal: a caller may look for the process at once.
                if control.signal(Signal::Kill).await.is_ok() {
                    session.ended = true;
                }
                Err(CoreError::CommandTimedOut(bound))
            }
        }
    }

    /// Starts a command that runs on.
    pub(crate) async fn run_background(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        command: Command,
    ) -> Result<BackgroundProcess, CoreError> {
        let mut launch = command.launch;
        let tag = launch.tag.get_or_insert_with(|| random_tag("proc")).clone();
        let cmd = launch.cmd.clone();
        let session = self.start(caller, id, "exec_background", launch, false).await?;
        Ok(BackgroundProcess { sandbox_id: id.clone(), cmd, pid: session.pid(), tag })
    }

    /// The processes that were started through the API and run.
    pub(crate) async fn processes(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
    ) -> Result<Vec<ProcessInfo>, CoreError> {
        let (_, processes) = self.ask_guest(caller, id, |guest| async move { guest.list().await }).await?;
        Ok(processes)
    }

    /// Ends a process.
    pub(crate) async fn signal(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        selector: &Selector,
        signal: Signal,
    ) -> Result<(), CoreError> {
        let send = async {
            let ask = |guest: Guest| async move { guest.signal(selector, signal).await };
            self.ask_guest(caller, id, ask).await.map(drop)
        };
        let metadata = json!({ "process": format!("{selector:?}"), "signal": format!("{signal:?}") });
        self.audited(caller, id, "signal", metadata, send).await
    }
}

/// A name for a process, of the form that published clients expect.
pub(crate) fn random_tag(prefix: &str) -> String {
    let id = SandboxId::random();
    let digits = id.as_str().trim_start_matches("sb-");
    format!("{prefix}-{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_its_bound() {
        let mut output = Output::default();
        output.keep(&vec![1; OUTPUT_KEPT - 1]);
        output.keep(&[2]);
        assert!(!output.truncated);
        output.keep(&[]);
        assert!(!output.truncated);
        output.keep(&[3]);
        assert!(output.truncated);
        assert_eq!((output.bytes.len(), output.bytes.last()), (OUTPUT_KEPT, Some(&2)));
    }

    #[test]
    fn the_audit_log_keeps_the_beginning_of_a_line() {
        let launch = Launch {
            cmd: "sh".to_owned(),
            args: vec!["-c".to_owned(), "ä".repeat(LINE_KEPT)],
            ..Launch::default()
        };
        let kept = line(&launch);
        let words = kept["command"].as_array().unwrap();
        assert_eq!(words.len(), 3);
        assert!(words[2].as_str().unwrap().len() <= LINE_KEPT);
    }
}
