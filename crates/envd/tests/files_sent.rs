//! Large files as they come out of a connection that is kept: whole, in parts, between other answers, to many at once,
//! to whoever is slow, and from wherever they are.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod files_place;
mod harness;

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::FileExt,
    thread,
};

use bytes::Bytes;
use files_place::{gunzip, noise};
use harness::{Agent, PATIENCE, encode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::{prelude::*, test_runner::TestRunner};

const MIB: usize = 1 << 20;
const HEALTH: &str = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";

/// A file that goes with this.
struct Served {
    file: tempfile::NamedTempFile,
    content: Bytes,
}

impl Served {
    fn new(directory: &str, content: Bytes) -> Self {
        let mut file = tempfile::NamedTempFile::new_in(directory).unwrap();
        file.write_all(&content).unwrap();
        Self { file, content }
    }

    /// Lets the kernel forget what it can read again.
    fn cool(&self) {
        self.file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(self.file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    fn request(&self, method: &str, headers: &str) -> String {
        let path = encode(self.file.path().to_str().unwrap());
        format!("{method} /files?path={path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n")
    }
}

/// A connection that is kept, and what was read of it too early.
struct Kept {
    stream: TcpStream,
    read: Vec<u8>,
}

/// An answer: its status, its head in small letters, its body.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Kept {
    fn new(agent: &Agent) -> Self {
        let stream = TcpStream::connect(agent.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, read: Vec::new() }
    }

    fn send(&mut self, request: &str) {
        self.stream.write_all(request.as_bytes()).unwrap();
    }

    /// Reads until there are so many bytes, and some more.
    fn fill(&mut self, wanted: usize) {
        let mut buffer = vec![0; 64 * 1024];
        while self.read.len() < wanted {
            let length = self.stream.read(&mut buffer).unwrap();
            assert_ne!(length, 0, "the connection ended");
            self.read.extend_from_slice(&buffer[..length]);
        }
    }

    fn answer(&mut self, has_body: bool) -> Answer {
        let end = loop {
            match self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                Some(end) => break end + 4,
                None => self.fill(self.read.len() + 1),
            }
        };
        let head: Vec<u8> = self.read.drain(..end).collect();
        let head = String::from_utf8(head).unwrap().to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length = length.filter(|_| has_body).map_or(0, |length| length.parse().unwrap());
        self.fill(length);
        let body = self.read.drain(..length).collect();
        Answer { status: head[9..12].parse().unwrap(), head, body }
    }

    fn is_healthy(&mut self) {
        self.send(HEALTH);
        assert_eq!(self.answer(false).status, 204);
    }

    fn get(&mut self, served: &Served) -> Answer {
        self.send(&served.request("GET", ""));
        self.answer(true)
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
enum Asked {
    Whole,
    Head,
    Part(usize, usize),
    Parts(Vec<(usize, usize)>),
    Packed,
    Unchanged,
    Beyond,
    Health,
}

/// Around what is read, sent, and looked at together.
fn place(length: usize) -> impl Strategy<Value = usize> {
    let edges = prop::sample::select(vec![0, 64 << 10, 256 << 10, 512 << 10, 1 << 20]);
    let near = (edges, -2..3_isize).prop_map(|(edge, off): (usize, isize)| edge.saturating_add_signed(off));
    prop_oneof![near, 0..length].prop_map(move |place| place.min(length - 1))
}

fn part(length: usize) -> impl Strategy<Value = (usize, usize)> {
    (place(length), place(length)).prop_map(|(one, other)| (one.min(other), one.max(other)))
}

fn asked(length: usize) -> impl Strategy<Value = Asked> {
    prop_oneof![
        2 => Just(Asked::Whole),
        1 => Just(Asked::Head),
        6 => part(length).prop_map(|(first, last)| Asked::Part(first, last)),
        2 => prop::collection::vec(part(length / 4), 2..4).prop_map(Asked::Parts),
        1 => Just(Asked::Packed),
        1 => Just(Asked::Unchanged),
        1 => Just(Asked::Beyond),
        1 => Just(Asked::Health),
    ]
}

impl Asked {
    fn request(&self, served: &Served, tag: &str) -> String {
        let range = |first: &usize, last: &usize| format!("{first}-{last}");
        match self {
            Self::Whole => served.request("GET", ""),
            Self::Head => served.request("HEAD", ""),
            Self::Part(first, last) => {
                served.request("GET", &format!("Range: bytes={}\r\n", range(first, last)))
            }
            Self::Parts(parts) => {
                let ranges: Vec<_> = parts.iter().map(|(first, last)| range(first, last)).collect();
                served.request("GET", &format!("Range: bytes={}\r\n", ranges.join(",")))
            }
            Self::Packed => served.request("GET", "Accept-Encoding: gzip, identity;q=0\r\n"),
            Self::Unchanged => served.request("GET", &format!("If-None-Match: {tag}\r\n")),
            Self::Beyond => served.request("GET", &format!("Range: bytes={}-\r\n", served.content.len())),
            Self::Health => HEALTH.to_owned(),
        }
    }

    fn check(&self, kept: &mut Kept, served: &Served) {
        if matches!(self, Self::Packed) {
            // Its length is not said.
            return self.check_packed(kept, served);
        }
        let answer = kept.answer(!matches!(self, Self::Head));
        let (status, content) = (answer.status, &served.content);
        match self {
            Self::Whole => assert!(status == 200 && answer.body == *content),
            Self::Head => assert!(answer.head.contains(&format!("content-length: {}\r\n", content.len()))),
            Self::Part(first, last) => assert!(status == 206 && answer.body == content[*first..=*last]),
            Self::Parts(parts) => {
                assert_eq!(status, 206);
                let boundary = answer.head.split("boundary=").nth(1).unwrap().lines().next().unwrap();
                let mut body = answer.body.as_slice();
                for (first, last) in parts {
                    let end = body.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
                    let head = String::from_utf8_lossy(&body[..end]);
                    assert!(head.contains(&format!("bytes {first}-{last}/{}\r\n", content.len())), "{head}");
                    let (part, rest) = body[end..].split_at(last - first + 1);
                    assert!(part == &content[*first..=*last]);
                    body = rest;
                }
                assert_eq!(body, format!("\r\n--{boundary}--\r\n").as_bytes());
            }
            Self::Unchanged => assert_eq!(status, 304),
            Self::Beyond => assert_eq!(status, 416),
            Self::Health | Self::Packed => assert_eq!(status, 204),
        }
    }

    fn check_packed(&self, kept: &mut Kept, served: &Served) {
        let answer = kept.answer(false);
        assert!(answer.head.contains("content-encoding: gzip"), "{self:?}: {}", answer.head);
        let mut packed = Vec::new();
        loop {
            let end = loop {
                match kept.read.windows(2).position(|window| window == b"\r\n") {
                    Some(end) => break end,
                    None => kept.fill(kept.read.len() + 1),
                }
            };
            let length = std::str::from_utf8(&kept.read[..end]).unwrap();
            let length = usize::from_str_radix(length, 16).unwrap();
            kept.fill(end + 2 + length + 2);
            packed.extend_from_slice(&kept.read[end + 2..end + 2 + length]);
            kept.read.drain(..end + 2 + length + 2);
            if length == 0 {
                break;
            }
        }
        assert!(gunzip(&packed) == served.content);
    }
}

#[test]
fn any_mixture_of_requests_on_one_connection_is_answered_byte_by_byte() {
    let agent = Agent::start();
    let content = noise(1_400_001);
    for directory in ["/dev/shm", "/var/tmp"] {
        let served = Served::new(directory, content.clone());
        let mut kept = Kept::new(&agent);
        let head = kept.get(&served).head;
        let tag = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap().to_owned();
        let mixture = (prop::collection::vec(asked(content.len()), 1..6), any::<bool>(), any::<bool>());
        let mut runner = TestRunner::new(ProptestConfig::with_cases(16));
        let run = runner.run(&mixture, |(all, ahead, cool)| {
            if cool {
                served.cool();
            }
            let mut kept = Kept::new(&agent);
            if ahead {
                // All are sent before the first is answered.
                let requests: Vec<_> = all.iter().map(|asked| asked.request(&served, &tag)).collect();
                kept.send(&requests.concat());
            }
            for asked in &all {
                if !ahead {
                    kept.send(&asked.request(&served, &tag));
                }
                asked.check(&mut kept, &served);
            }
            Ok(())
        });
        run.unwrap();
        // The first connection is still good.
        assert!(kept.get(&served).body == content);
    }
}

#[test]
fn many_connections_at_once_get_each_its_own() {
    let agent = Agent::start();
    let files: Vec<_> = ["/dev/shm", "/var/tmp", "/dev/shm", "/var/tmp"]
        .into_iter()
        .enumerate()
        .map(|(index, directory)| Served::new(directory, noise(3 * MIB + index).slice(index..)))
        .collect();
    thread::scope(|scope| {
        for first in 0..files.len() {
            let (agent, files) = (&agent, &files);
            scope.spawn(move || {
                let mut kept = Kept::new(agent);
                for served in files.iter().cycle().skip(first).take(2 * files.len()) {
                    assert!(kept.get(served).body == served.content);
                }
            });
        }
    });
}

#[tokio::test]
async fn streams_that_share_a_connection_get_the_same() {
    let agent = Agent::start();
    let served = Served::new("/dev/shm", noise(2 * MIB + 1));
    let stream = tokio::net::TcpStream::connect(agent.address).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let path = encode(served.file.path().to_str().unwrap());
    let uri = format!("http://{}/files?path={path}", agent.address);
    let answers: Vec<_> = (0..4)
        .map(|_| sender.send_request(http::Request::get(&uri).body(Empty::<Bytes>::new()).unwrap()))
        .collect();
    for body in futures::future::join_all(
        answers
            .into_iter()
            .map(async |answer| answer.await.unwrap().into_body().collect().await.unwrap().to_bytes()),
    )
    .await
    {
        assert!(body == served.content);
    }
    connection.abort();
}

#[test]
fn a_file_that_is_not_in_memory_is_read_while_others_are_served() {
    let agent = Agent::start();
    let served = Served::new("/var/tmp", noise(9 * MIB + 1));
    for _ in 0..3 {
        served.cool();
        let (mut kept, mut other) = (Kept::new(&agent), Kept::new(&agent));
        kept.send(&served.request("GET", ""));
        other.is_healthy();
        assert!(kept.answer(true).body == served.content);
    }
}

#[test]
fn who_reads_slowly_holds_up_nobody_and_no_memory() {
    let agent = Agent::start();
    let served = Served::new("/dev/shm", noise(16 * MIB));
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
        line.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(Kept::new(&agent).get(&served).body == served.content);
    let before = peak();
    let mut slow: Vec<_> = (0..4).map(|_| Kept::new(&agent)).collect();
    for kept in &mut slow {
        kept.send(&served.request("GET", ""));
        // It is being sent by now.
        kept.fill(1);
    }
    assert!(Kept::new(&agent).get(&served).body == served.content);
    Kept::new(&agent).is_healthy();
    let grown = peak() - before;
    assert!(grown < 4096, "the agent's peak grew by {grown} KiB");
    // Who waited long enough gets all, and the next answer.
    for kept in &mut slow {
        assert!(kept.answer(true).body == served.content);
        assert!(kept.get(&served).body == served.content);
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_is_cut_off_and_only_it() {
    for directory in ["/dev/shm", "/var/tmp"] {
        let agent = Agent::start();
        let served = Served::new(directory, noise(16 * MIB));
        let mut other = Kept::new(&agent);
        let mut kept = Kept::new(&agent);
        kept.send(&served.request("GET", ""));
        kept.fill(1);
        // In front of what is being sent: no socket holds so much.
        let left = 12 * MIB;
        File::options().write(true).open(served.file.path()).unwrap().set_len(left as u64).unwrap();
        let mut rest = Vec::new();
        // Closed or reset, and never in the middle of what was there all the time.
        let _ = kept.stream.read_to_end(&mut rest);
        kept.read.extend(rest);
        let start = kept.read.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let body = &kept.read[start..];
        assert!(body.len() <= left && *body == served.content[..body.len()], "{directory}: {}", body.len());
        assert!(body.len() > MIB, "{directory}: {}", body.len());
        other.is_healthy();
        let content = served.content.slice(..left);
        assert!(other.get(&served).body == content);
    }
}

#[test]
fn a_client_that_goes_away_in_the_middle_is_nobody_elses_business() {
    let agent = Agent::start();
    let served = Served::new("/var/tmp", noise(16 * MIB));
    let mut other = Kept::new(&agent);
    for _ in 0..8 {
        let mut gone = Kept::new(&agent);
        gone.send(&served.request("GET", ""));
        // With unread bytes left, this is a reset.
        gone.fill(1);
        drop(gone);
        other.is_healthy();
    }
    assert!(other.get(&served).body == served.content);
}

#[test]
fn what_is_written_behind_a_file_while_it_is_sent_is_not_part_of_it() {
    let agent = Agent::start();
    let served = Served::new("/dev/shm", noise(8 * MIB));
    let mut kept = Kept::new(&agent);
    kept.send(&served.request("GET", ""));
    kept.fill(1);
    let more = served.file.as_file();
    more.write_all_at(b"more", served.content.len() as u64).unwrap();
    assert!(kept.answer(true).body == served.content);
    kept.is_healthy();
}
