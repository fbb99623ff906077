//! QMP, QEMU's control protocol: a JSON object per line over a Unix socket.
//!
//! ```text
//!  execute() ─► writer task ─► socket ─► QEMU
//!      ▲                                   │
//!      └─ answer, by its id ◄─ reader task ┴─► events, folded into Facts ─► watch
//! ```
//!
//! Commands of several tasks may be under way at once: each carries an id, and its answer finds its way back
//! by it. A caller that stops waiting harms nobody, because what is written is written by a task of its own,
//! line by line. Everything QEMU says is taken as if a guest had taken it over: a line is bounded, and what
//! is no answer and no event is dropped.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net,
    },
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
    time::timeout,
};

use super::facts::Facts;
use crate::{VmmError, VmmResult};

/// The longest line that is taken. The largest answer that we ask for is a console of 64 KiB in base64.
const LINE_LIMIT: usize = 1 << 20;
/// How many commands may wait to be written.
const QUEUE: usize = 16;

/// How long an ordinary command may take: it answers at once, on a machine that is not very busy.
pub(super) const COMMAND_BOUND: Duration = Duration::from_secs(10);

type Answer = Result<Value, String>;

/// A connection to one QEMU. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Qmp {
    commands: mpsc::Sender<Outgoing>,
    pending: Arc<Pending>,
    facts: watch::Sender<Facts>,
    tasks: [AbortHandle; 2],
}

#[derive(Debug)]
struct Outgoing {
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

/// The commands that have no answer yet.
#[derive(Debug, Default)]
struct Pending {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    closed: bool,
}

impl Qmp {
    /// Speaks over a stream that is connected, or that QEMU is going to accept.
    pub(super) fn over(stream: net::UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = Arc::new(UnixStream::from_std(stream)?);
        let (commands, queue) = mpsc::channel(QUEUE);
        let pending = Arc::new(Pending::default());
        let (facts, _) = watch::channel(Facts::default());
        let reader = tokio::spawn(read_all(Arc::clone(&stream), Arc::clone(&pending), facts.clone()));
        let writer = tokio::spawn(write_all(stream, queue));
        Ok(Self { commands, pending, facts, tasks: [reader.abort_handle(), writer.abort_handle()] })
    }

    /// What the events have told, from now on.
    pub(super) fn facts(&self) -> watch::Receiver<Facts> {
        self.facts.subscribe()
    }

    /// Forgets how an earlier migration went, before a new one is begun.
    pub(super) fn forget_migration(&self) {
        self.tell(|facts| facts.migration = None);
    }

    /// Changes what is known by other means than an event.
    pub(super) fn tell(&self, change: impl FnOnce(&mut Facts)) {
        self.facts.send_modify(change);
    }

    /// Ends the connection, whoever else holds it.
    pub(super) fn close(&self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }

    /// Executes a command and waits for its answer.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        arguments: Value,
        bound: Duration,
    ) -> VmmResult<Value> {
        self.send(command, arguments, None, bound).await
    }

    /// Executes a command and passes an open file with it.
    pub(super) async fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: OwnedFd,
        bound: Duration,
    ) -> VmmResult<Value> {
        self.send(command, arguments, Some(descriptor), bound).await
    }

    async fn send(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
        bound: Duration,
    ) -> VmmResult<Value> {
        let lost =
            |kind: io::ErrorKind| VmmError::Connection { command: command.to_owned(), source: kind.into() };
        let (id, answer) = self.pending.enter().ok_or_else(|| lost(io::ErrorKind::ConnectionAborted))?;
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        let exchange = async {
            if self.commands.send(Outgoing { line, descriptor }).await.is_err() {
                return Err(lost(io::ErrorKind::BrokenPipe));
            }
            answer.await.map_err(|_| lost(io::ErrorKind::UnexpectedEof))
        };
        match timeout(bound, exchange).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(message))) => Err(VmmError::Refused { command: command.to_owned(), message }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                self.pending.leave(id);
                Err(VmmError::Timeout { operation: command, bound })
            }
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.close();
    }
}

impl Pending {
    fn locked<T>(&self, work: impl FnOnce(&mut Waiting) -> T) -> T {
        work(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new id and where its answer will come; none when no answer can come any more.
    fn enter(&self) -> Option<(u64, oneshot::Receiver<Answer>)> {
        self.locked(|waiting| {
            if waiting.closed {
                return None;
            }
            waiting.last_id += 1;
            let (answer, answered) = oneshot::channel();
            waiting.answers.insert(waiting.last_id, answer);
            Some((waiting.last_id, answered))
        })
    }

    fn leave(&self, id: u64) {
        self.locked(|waiting| waiting.answers.remove(&id));
    }

    fn answer(&self, id: u64, answer: Answer) {
        if let Some(waiting) = self.locked(|waiting| waiting.answers.remove(&id)) {
            // The caller may have stopped waiting.
            drop(waiting.send(answer));
        }
    }

    fn close(&self) {
        let answers = self.locked(|waiting| {
            waiting.closed = true;
            std::mem::take(&mut waiting.answers)
        });
        drop(answers);
    }
}

async fn write_all(stream: Arc<UnixStream>, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { line, mut descriptor }) = queue.recv().await {
        let mut rest = line.as_slice();
        while !rest.is_empty() {
            let wrote = stream
                .async_io(Interest::WRITABLE, || Ok(send_once(&stream, rest, descriptor.as_ref())?))
                .await;
            match wrote {
                Ok(count) => rest = &rest[count..],
                // The reader sees the same end, and tells those who wait.
                Err(_) => return,
            }
            // It went with the first bytes.
            descriptor = None;
        }
    }
}

fn send_once(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> rustix::io::Result<usize> {
    let passed = descriptor.map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(passed) = passed.as_slice().first() {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(passed)));
    }
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

async fn read_all(stream: Arc<UnixStream>, pending: Arc<Pending>, facts: watch::Sender<Facts>) {
    let mut lines = Lines::default();
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let read = stream
            .async_io(Interest::READABLE, || Ok(rustix::io::read(&stream, chunk.as_mut_slice())?))
            .await;
        let Ok(count @ 1..) = read else { break };
        lines.push(&chunk[..count]);
        while let Some(line) = lines.next_line() {
            take_in(&line, &pending, &facts);
        }
        if lines.is_too_long() {
            tracing::warn!("QEMU sent a line that does not end; the connection is closed");
            break;
        }
    }
    pending.close();
    facts.send_modify(|facts| facts.disconnected = true);
}

fn take_in(line: &[u8], pending: &Pending, facts: &watch::Sender<Facts>) {
    match parse(line) {
        Some(Message::Answer(id, answer)) => pending.answer(id, answer),
        Some(Message::Event(event, data)) => {
            tracing::trace!(event, %data, "event");
            facts.send_if_modified(|facts| facts.take_in(&event, &data));
        }
        None => {}
    }
}

/// What a line can be; the greeting is neither.
#[derive(Debug, PartialEq)]
enum Message {
    Answer(u64, Answer),
    Event(String, Value),
}

fn parse(line: &[u8]) -> Option<Message> {
    let mut message: Value = serde_json::from_slice(line).ok()?;
    if let Some(event) = message["event"].as_str() {
        let event = event.to_owned();
        return Some(Message::Event(event, message["data"].take()));
    }
    let id = message["id"].as_u64()?;
    let answer = if let Some(value) = message.get_mut("return") {
        Ok(value.take())
    } else {
        let error = message.get("error")?;
        Err(error["desc"].as_str().unwrap_or("without a reason").to_owned())
    };
    Some(Message::Answer(id, answer))
}

/// Bytes, cut into lines.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
    /// How far the buffer was searched for the end of a line.
    searched: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let Some(length) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let rest = self.buffer.split_off(self.searched + length + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.buffer, rest))
    }

    /// Asked when no line is complete.
    fn is_too_long(&self) -> bool {
        self.buffer.len() > LINE_LIMIT
    }
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
