//! A guest's agent without a guest: it answers what the host asks of one, and keeps what it is in the memory of
//! the fake machine, so that a restore brings back what it was.
//!
//! The clock of these tests goes on by itself when nothing is under way, and a conversation over a socket does
//! not count for that. So each holds the clock until it is over, or until it was made to hang.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};
use wrenn_vmm::fake::Fake;

use super::world::Control;
use crate::network::addresses::SlotNumber;

/// Pages of the machine in which the agent keeps what it is.
const CLOSED: u64 = 3;
const TOKEN: u64 = 4;
const NAME: u64 = 5;
const MACHINE: u64 = 6;

/// What the host asks of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Health,
    Init,
    Prepare,
}

/// How a guest fails it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    Refuse,
    Break,
    Hang,
}

/// All guests of one host. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Guests {
    fake: Fake,
    control: Control,
    faults: Arc<Mutex<Vec<(Call, Manner)>>>,
}

/// What a guest is, as far as anybody can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Self_ {
    pub(super) closed: bool,
    token: u64,
    name: u64,
    pub(super) machine: u64,
}

impl Self_ {
    /// Whether it took this name and this token.
    pub(super) fn is(&self, name: &str, token: &str) -> bool {
        (self.name, self.token) == (word(name), word(token))
    }
}

fn word(text: &str) -> u64 {
    let mut hash = DefaultHasher::new();
    text.hash(&mut hash);
    hash.finish() | 1
}

/// Holds the clock for as long as it lives: one that goes by itself stands still while a thread is busy.
struct Held(#[expect(dead_code, reason = "its drop ends the thread")] mpsc::Sender<()>);

impl Held {
    fn hold() -> Self {
        let (sender, receiver) = mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || receiver.recv().ok());
        Self(sender)
    }
}

struct Request {
    line: String,
    token: Option<String>,
    body: Value,
    is_last: bool,
}

impl Guests {
    pub(super) fn new(fake: Fake, control: Control) -> Self {
        Self { fake, control, faults: Arc::default() }
    }

    /// The next call of this kind fails.
    pub(super) fn fail_next(&self, call: Call, manner: Manner) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push((call, manner));
    }

    pub(super) fn calm(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn fault(&self, call: Call) -> Option<Manner> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let at = faults.iter().position(|(planned, _)| *planned == call)?;
        Some(faults.remove(at).1)
    }

    /// What the guest in a machine is.
    pub(super) fn look(&self, machine: &str) -> Option<Self_> {
        let read = |page| self.fake.read_page(machine, page);
        Some(Self_ {
            closed: read(CLOSED)? != 0,
            token: read(TOKEN)?,
            name: read(NAME)?,
            machine: read(MACHINE)?,
        })
    }

    pub(super) fn connect(&self, number: SlotNumber) -> io::Result<TcpStream> {
        let (theirs, ours) = StdUnixStream::pair()?;
        for end in [&theirs, &ours] {
            end.set_nonblocking(true)?;
        }
        let ours = UnixStream::from_std(ours)?;
        let guests = self.clone();
        let held = Held::hold();
        tokio::spawn(async move { guests.serve(number, ours, held).await });
        // Both are streams that a descriptor stands for; nobody asks this one for addresses.
        TcpStream::from_std(OwnedFd::from(theirs).into())
    }

    async fn serve(&self, number: SlotNumber, mut stream: UnixStream, held: Held) {
        let mut held = Some(held);
        while let Ok(Some(request)) = read(&mut stream).await {
            let held = held.take();
            let Some(status) = self.answer(number, &request) else {
                drop(held);
                // It says nothing until whoever asked has gone away.
                let _ = stream.read(&mut [0]).await;
                return;
            };
            if status == 0 {
                return;
            }
            let answer = format!("HTTP/1.1 {status} Said\r\ncontent-length: 0\r\n\r\n");
            if stream.write_all(answer.as_bytes()).await.is_err() || request.is_last {
                return settle().await;
            }
            settle().await;
        }
    }

    /// The status; 0 where the conversation breaks, none where there is no answer.
    fn answer(&self, number: SlotNumber, request: &Request) -> Option<u16> {
        if !self.control.goes_on() {
            return None;
        }
        let machine = self.fake.machine_in(&number.namespace())?;
        if self.fake.is_running(&machine) != Some(true) {
            return None;
        }
        let call = match request.line.as_str() {
            "GET /health" => Some(Call::Health),
            "POST /init" => Some(Call::Init),
            "POST /snapshot/prepare" => Some(Call::Prepare),
            _ => None,
        };
        match call.and_then(|call| self.fault(call)) {
            Some(Manner::Refuse) => return Some(500),
            Some(Manner::Break) => return Some(0),
            Some(Manner::Hang) => return None,
            None => {}
        }
        let this = self.look(&machine)?;
        let write = |page, number| self.fake.write_page(&machine, page, number);
        match (call, this.closed) {
            (Some(Call::Health), _) => Some(204),
            (Some(_), _) if this.token != 0 && request.token.as_deref().map(word) != Some(this.token) => {
                Some(401)
            }
            (Some(Call::Init), _) => {
                for (page, field) in [(TOKEN, "accessToken"), (NAME, "hostname"), (MACHINE, "machineId")] {
                    if let Some(text) = request.body.get(field).and_then(Value::as_str) {
                        write(page, word(text));
                    }
                }
                write(CLOSED, 0);
                Some(204)
            }
            (Some(Call::Prepare), _) => {
                write(CLOSED, 1);
                Some(204)
            }
            (None, true) => Some(503),
            (None, false) => Some(200),
        }
    }
}

/// Lets whoever was answered read it, before the clock may go on.
async fn settle() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

async fn read(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    let mut text = Vec::new();
    let head = loop {
        if let Some(end) = text.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut text).await? == 0 {
            return Ok(None);
        }
    };
    let lines = String::from_utf8_lossy(&text[..head]).into_owned();
    let header = |name: &str| {
        let mut lines = lines.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let length = header("content-length").and_then(|length| length.parse::<usize>().ok()).unwrap_or_default();
    while text.len() < head + length {
        if stream.read_buf(&mut text).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(Request {
        line: lines.split(" HTTP").next().unwrap_or_default().to_owned(),
        token: header("x-access-token"),
        body: serde_json::from_slice(&text[head..head + length]).unwrap_or_default(),
        is_last: header("connection").is_some_and(|value| value == "close"),
    }))
}
