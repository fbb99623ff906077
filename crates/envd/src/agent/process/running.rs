//! A process that was started: its output, its input, its end.
//!
//! ```text
//!  stdout ──► pump ──┐                       ┌──► subscriber (bounded queue) ──► stream of one client
//!                    ├──► every subscriber ──┤
//!  stderr ──► pump ──┘                       └──► subscriber …
//!                ▲ "it exited"
//!  pidfd ──► supervisor: waits, kills at the deadline, reaps, waits for the pumps, publishes the end
//! ```
//!
//! - **Nothing is lost.** The first subscriber is there before the program is. A subscriber's queue is bounded, and
//!   a pump waits for room in it: a slow client slows the program, as a full pipe would. One that takes nothing for
//!   [`TURN_LIMIT`] while there are others is cut off, with an error: it may be gone without a word.
//! - **Nobody listens.** Then output is read and dropped, so that a program never stops for want of a reader.
//! - **One end, after all output.** The end is not sent; the queues are closed, and whoever finds its queue closed
//!   reads the end from [`Process::end`], which was set before.
//! - **A grandchild keeps the output open.** What was in the pipe when the program exited is always delivered.
//!   What comes later is delivered for [`GRACE`] at most, then the end is published, and what a grandchild writes
//!   after that is read and dropped, so that a server left in the background does not die of a broken pipe. A
//!   terminal is given up instead, which hangs up whoever is left on it.
//! - **Signals and time limits reach the group.** What left it (`setsid`, as a daemon does) is no longer part of the
//!   process and goes on. All processes of users share one cgroup, which is for freezing them together; one for each
//!   would reach daemons too, but cost every command the making and removing of a directory, and end what was meant
//!   to stay.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{
        mpsc::{self, error::SendTimeoutError},
        watch,
    },
    task::JoinSet,
    time::{Instant, timeout_at},
};
use wrenn_guest_linux::{
    readiness::register,
    terminal::{self, Size},
};
use wrenn_proto::process::{ProcessConfig, ProcessInfo};

use super::{
    channel::Channel,
    end::{End, Outcome},
    memory::{self, Shortage},
    registry::Registry,
};

/// How long after the program's exit the output of what it left behind still counts as its own.
pub(crate) const GRACE: Duration = Duration::from_millis(100);
/// How long one subscriber may take nothing at all while others wait for their output.
pub(crate) const TURN_LIMIT: Duration = Duration::from_secs(60);
/// How many pieces of output wait for a slow subscriber before the program is made to wait.
const QUEUE: usize = 8;
/// The most that one piece of output holds.
const PIPE_PIECE: usize = 32 * 1024;
const TERMINAL_PIECE: usize = 16 * 1024;

/// Where a piece of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Stdout,
    Stderr,
    Terminal,
}

/// A piece of output.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    pub(crate) origin: Origin,
    pub(crate) bytes: Bytes,
}

/// One client's queue of output. When it is closed, the process has ended.
pub(crate) type Subscription = mpsc::Receiver<Output>;

/// The input of a process.
#[derive(Debug)]
pub(crate) enum Input {
    Pipe(Channel),
    Terminal(Arc<Channel>),
    Closed,
}

/// Why input could not be given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("stdin not enabled or closed")]
    Closed,
    #[error("the process has a terminal: send its input as pty")]
    WantsTerminal,
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("cannot write to the process: {0}")]
    Write(io::Error),
}

/// What kind of input a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputKind {
    Stdin,
    Terminal,
}

/// What is known of a process before it has a number.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) config: ProcessConfig,
    pub(crate) tag: Option<String>,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    description: Description,
    pid: Pid,
    started: Instant,
    /// The same by the clock of the kernel's log.
    started_at: Duration,
    /// The agent's side of the terminal; given up at the end, which hangs up whoever still has the other side.
    terminal: Mutex<Option<Arc<Channel>>>,
    input: tokio::sync::Mutex<Input>,
    exited: watch::Sender<bool>,
    /// Guards the process number: a signal is sent, and the process is reaped, only under this lock. So a signal
    /// never reaches a process that got the number of one that is gone.
    life: Mutex<Life>,
    listeners: Mutex<Listeners>,
}

/// How far a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Running,
    /// It was sent SIGKILL by us.
    Killed,
    /// It was reaped: its number is no longer ours.
    Gone,
}

#[derive(Debug, Default)]
struct Listeners {
    queues: Vec<mpsc::Sender<Output>>,
    end: Option<End>,
}

impl Listeners {
    /// Whether somebody else listens, also who came later.
    fn others_than(&self, queue: &mpsc::Sender<Output>) -> bool {
        self.queues.iter().any(|other| !other.same_channel(queue) && !other.is_closed())
    }
}

/// Gives a subscriber a piece of output, once it has room. False means that it gets no more: it is gone, or it takes
/// nothing and others wait.
async fn give(
    queue: &mpsc::Sender<Output>,
    output: &Output,
    limit: Duration,
    others: impl Fn() -> bool,
) -> bool {
    loop {
        match queue.send_timeout(output.clone(), limit).await {
            Ok(()) => return true,
            Err(SendTimeoutError::Timeout(_)) if !others() => {}
            Err(SendTimeoutError::Timeout(_) | SendTimeoutError::Closed(_)) => return false,
        }
    }
}

/// What a start leaves to be looked after.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) input: Input,
    pub(crate) terminal: Option<Arc<Channel>>,
    pub(crate) outputs: Vec<(Origin, Arc<Channel>)>,
}

impl Process {
    /// Takes over a process that was started and looks after it until its end.
    ///
    /// The queue of the first subscriber is made here, before anything is read.
    pub(crate) fn adopt(
        registry: &Arc<Registry>,
        description: Description,
        started: Started,
        deadline: Option<Instant>,
    ) -> io::Result<(Arc<Self>, Subscription)> {
        let (sender, subscription) = mpsc::channel(QUEUE);
        let pidfd = register(started.pidfd, Interest::READABLE)?;
        let process = Arc::new(Self {
            description,
            pid: started.pid,
            started: Instant::now(),
            started_at: memory::clock(),
            terminal: Mutex::new(started.terminal),
            exited: watch::Sender::new(false),
            input: tokio::sync::Mutex::new(started.input),
            life: Mutex::new(Life::Running),
            listeners: Mutex::new(Listeners { queues: vec![sender], end: None }),
        });
        registry.add(&process);
        let supervisor =
            supervise(Arc::clone(registry), Arc::clone(&process), pidfd, started.outputs, deadline);
        tokio::spawn(supervisor);
        Ok((process, subscription))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    pub(crate) fn tag(&self) -> Option<&String> {
        self.description.tag.as_ref()
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// How it ended, once its output is complete.
    pub(crate) fn end(&self) -> Option<End> {
        self.listeners().end
    }

    pub(crate) fn info(&self) -> ProcessInfo {
        ProcessInfo {
            config: self.description.config.clone().into(),
            pid: self.pid(),
            tag: self.description.tag.clone(),
            ..ProcessInfo::default()
        }
    }

    /// Adds a subscriber, which gets the output from now on.
    pub(crate) fn subscribe(&self) -> Subscription {
        let (sender, subscription) = mpsc::channel(QUEUE);
        let mut listeners = self.listeners();
        if listeners.end.is_none() {
            listeners.queues.push(sender);
        }
        subscription
    }

    /// Signals the process and everything in its group. False means that it is gone.
    pub(crate) fn signal(&self, signal: Signal) -> Result<bool, Errno> {
        let mut life = self.life();
        if *life == Life::Gone {
            return Ok(false);
        }
        match kill_process_group(self.pid, signal) {
            Ok(()) => {
                if signal == Signal::KILL {
                    *life = Life::Killed;
                }
                Ok(true)
            }
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until it was reaped.
    pub(crate) async fn exit(&self) {
        exit_of(&mut self.exited.subscribe()).await;
    }

    /// Gives the process input, in the order of the calls. Waits while the process does not read.
    pub(crate) async fn write(&self, kind: InputKind, bytes: &[u8]) -> Result<(), InputError> {
        let mut exited = self.exited.subscribe();
        let input = self.input.lock().await;
        let channel = match (&*input, kind) {
            (Input::Pipe(channel), InputKind::Stdin) => channel,
            (Input::Terminal(channel), InputKind::Terminal) => channel.as_ref(),
            (Input::Terminal(_), InputKind::Stdin) => return Err(InputError::WantsTerminal),
            (Input::Closed, InputKind::Stdin) => return Err(InputError::Closed),
            (Input::Pipe(_) | Input::Closed, InputKind::Terminal) => return Err(InputError::NoTerminal),
        };
        tokio::select! {
            biased;
            written = channel.write_all(bytes) => written.map_err(InputError::Write),
            // A grandchild may hold the other end open without ever reading.
            () = exit_of(&mut exited) => Err(InputError::Closed),
        }
    }

    /// Closes standard input, after what was written before.
    pub(crate) async fn close_input(&self) -> Result<(), InputError> {
        let mut input = self.input.lock().await;
        match &*input {
            Input::Terminal(_) => Err(InputError::WantsTerminal),
            Input::Pipe(_) | Input::Closed => {
                *input = Input::Closed;
                Ok(())
            }
        }
    }

    /// Changes the size of the terminal.
    pub(crate) fn resize(&self, size: Size) -> Result<(), InputError> {
        let terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let terminal = terminal.ok_or(InputError::NoTerminal)?;
        terminal::resize(terminal.descriptor(), size).map_err(|error| InputError::Write(error.into()))
    }

    /// Hands a piece of output to every subscriber, and waits for the slowest.
    async fn publish(&self, output: Output) {
        let queues = self.listeners().queues.clone();
        for queue in &queues {
            if !give(queue, &output, TURN_LIMIT, || self.listeners().others_than(queue)).await {
                self.listeners().queues.retain(|other| !other.same_channel(queue));
            }
        }
    }

    /// Sets the end, closes every queue, and then the input, once whoever is writing has noticed.
    async fn finish(&self, end: End) {
        self.publish_end(end);
        *self.input.lock().await = Input::Closed;
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn publish_end(&self, end: End) {
        let mut listeners = self.listeners();
        listeners.end = Some(end);
        listeners.queues.clear();
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the exit status if there is one, and says how far the process was.
    fn reap(&self, pidfd: &OwnedFd) -> Option<(Outcome, Life)> {
        let mut life = self.life();
        let outcome =
            match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(None) | Err(Errno::INTR) => return None,
                Ok(Some(status)) => Outcome::from_status(&status),
                Err(_) => Outcome::Lost,
            };
        Some((outcome, std::mem::replace(&mut *life, Life::Gone)))
    }
}

/// Looks after a process from its start to its end.
async fn supervise(
    registry: Arc<Registry>,
    process: Arc<Process>,
    pidfd: AsyncFd<OwnedFd>,
    outputs: Vec<(Origin, Arc<Channel>)>,
    deadline: Option<Instant>,
) {
    let mut pumps = JoinSet::new();
    for (origin, channel) in outputs {
        pumps.spawn(pump(Arc::clone(&process), origin, channel));
    }
    let mut timed_out = false;
    let wait = wait_for_exit(&process, &pidfd);
    tokio::pin!(wait);
    let (outcome, life) = match deadline {
        None => wait.await,
        Some(deadline) => match timeout_at(deadline, &mut wait).await {
            Ok(outcome) => outcome,
            Err(_) => {
                timed_out = true;
                // An error would mean that it is gone, which is what is wanted.
                let _ = process.signal(Signal::KILL);
                wait.await
            }
        },
    };
    registry.end(&process);
    process.exited.send_replace(true);
    while pumps.join_next().await.is_some() {}
    let shortage = match life {
        Life::Running => shortage(&registry, &process, outcome).await,
        Life::Killed | Life::Gone => Shortage::No,
    };
    process.finish(End { outcome, timed_out, shortage }).await;
}

async fn wait_for_exit(process: &Process, pidfd: &AsyncFd<OwnedFd>) -> (Outcome, Life) {
    loop {
        if let Some(end) = process.reap(pidfd.get_ref()) {
            return end;
        }
        match pidfd.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return (Outcome::Lost, Life::Gone),
        }
    }
}

/// Asks the kernel whether memory was short, if it may have been.
async fn shortage(registry: &Arc<Registry>, process: &Process, outcome: Outcome) -> Shortage {
    if !memory::may_be_shortage(outcome) {
        return Shortage::No;
    }
    let (registry, pid, started) = (Arc::clone(registry), process.pid, process.started_at);
    let look = move || registry.kills.explain(outcome, pid, started);
    tokio::task::spawn_blocking(look).await.unwrap_or(Shortage::No)
}

/// Waits until the process has exited.
async fn exit_of(exited: &mut watch::Receiver<bool>) {
    // The sender lives in the process, which its pumps and writers hold.
    let _ = exited.wait_for(|exited| *exited).await;
}

/// Reads one output until its end, or until the process has exited and what counts as its own was read.
async fn pump(process: Arc<Process>, origin: Origin, channel: Arc<Channel>) {
    let piece = if origin == Origin::Terminal { TERMINAL_PIECE } else { PIPE_PIECE };
    let mut buffer = Vec::with_capacity(piece);
    let mut exited = process.exited.subscribe();
    while !*exited.borrow() {
        buffer.clear();
        tokio::select! {
            biased;
            read = channel.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => process.publish(Output { origin, bytes: take(&mut buffer) }).await,
            },
            () = exit_of(&mut exited) => {}
        }
    }
    // What is in the pipe now holds all that was written before the exit.
    let mut owed = channel.available();
    let grace = Instant::now() + GRACE;
    while owed > 0 || Instant::now() < grace {
        buffer.clear();
        match timeout_at(grace, channel.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(read)) => {
                owed = owed.saturating_sub(read);
                process.publish(Output { origin, bytes: take(&mut buffer) }).await;
            }
            Err(_) => {
                // The runtime may let the timer win although there is something to read: look again.
                owed = owed.min(channel.available());
                tokio::task::yield_now().await;
            }
        }
    }
    if origin != Origin::Terminal {
        tokio::spawn(discard(channel));
    }
}

/// What was read: a copy if it is little, so that waiting pieces do not hold much more memory than they need.
fn take(buffer: &mut Vec<u8>) -> Bytes {
    let piece = buffer.capacity();
    if buffer.len() < piece / 4 {
        Bytes::copy_from_slice(buffer)
    } else {
        std::mem::replace(buffer, Vec::with_capacity(piece)).into()
    }
}

/// Reads and drops what a grandchild still writes.
async fn discard(channel: Arc<Channel>) {
    let mut buffer = Vec::with_capacity(PIPE_PIECE);
    while let Ok(1..) = channel.read(&mut buffer).await {
        buffer.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[tokio::test]
    async fn who_takes_nothing_is_waited_for_while_nobody_else_listens() {
        let limit = Duration::from_millis(1);
        let output = Output { origin: Origin::Stdout, bytes: Bytes::from_static(b"x") };
        let (queue, subscription) = mpsc::channel(1);
        let subscription = RefCell::new(subscription);
        assert!(give(&queue, &output, limit, || true).await, "there is room");
        let asked = Cell::new(0);
        let turn = || asked.replace(asked.get() + 1);
        // One that is only slow gets everything, and it is nobody's matter how long it takes.
        let reads_at_last = || turn() == 3 && subscription.borrow_mut().try_recv().is_err();
        assert!(give(&queue, &output, limit, reads_at_last).await);
        assert_eq!(asked.get(), 4);
        // Until somebody comes who waits for more.
        assert!(!give(&queue, &output, limit, || turn() == 7).await);
        assert_eq!(asked.get(), 8);
        drop(subscription);
        assert!(!give(&queue, &output, limit, || false).await, "it is gone");
    }

    #[test]
    fn who_is_gone_is_no_other() {
        let (one, _one) = mpsc::channel(1);
        let (two, subscription) = mpsc::channel(1);
        let listeners = Listeners { queues: vec![one.clone(), two], end: None };
        assert!(listeners.others_than(&one));
        drop(subscription);
        assert!(!listeners.others_than(&one));
    }
}
