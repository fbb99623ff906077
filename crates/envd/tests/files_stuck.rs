//! A file system that sends its files and then does not answer those who close them.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex},
};

use harness::{
    Agent, command,
    fuse::{Answer, Mount, Request, attributes, of_directory, reply, words},
    observe::eventually,
    run,
};

/// How long every file is: longer than what is read at once, and than what a socket takes.
const LENGTH: u64 = 64 << 20;

/// Who waits to close a file. All are answered when this is dropped.
struct Closing {
    waiting: Arc<Mutex<Waiting>>,
    device: File,
}

#[derive(Default)]
struct Waiting {
    numbers: Vec<[u8; 8]>,
    /// Whether they are answered from now on.
    over: bool,
}

impl Closing {
    fn serve(mount: &Mount) -> Self {
        let waiting = Arc::<Mutex<Waiting>>::default();
        let theirs = Arc::clone(&waiting);
        mount.serve(move |request| answer(&theirs, request));
        Self { waiting, device: mount.device() }
    }

    fn count(&self) -> usize {
        self.waiting.lock().unwrap().numbers.len()
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.over = true;
        for number in waiting.numbers.drain(..) {
            reply(&mut self.device, number, 0, &[]);
        }
    }
}

/// Every name is that of a file with zeros.
fn answer(waiting: &Mutex<Waiting>, request: &Request<'_>) -> Answer {
    const FILE: u64 = 2;
    let file = attributes(FILE, 0o100_644, LENGTH);
    let body = match (request.operation(), request.node()) {
        (1, _) => [words(&[2, 0, 1, 0, 60, 0, 60, 0, 0, 0]), file].concat(),
        (3, FILE) => [words(&[60, 0, 0, 0]), file].concat(),
        (14, _) => words(&[0; 4]),
        (15, _) => {
            let left = LENGTH.saturating_sub(request.long(48));
            vec![0; usize::try_from(left.min(request.word(56).into())).unwrap()]
        }
        (18, _) => Vec::new(),
        (25, _) => {
            let mut waiting = waiting.lock().unwrap();
            if !waiting.over {
                waiting.numbers.push(request.number());
                return (0, None);
            }
            Vec::new()
        }
        _ => return of_directory(request),
    };
    (0, Some(body))
}

/// Asks for a file, and answers with the head of what comes.
fn ask(agent: &Agent, method: &str, path: &str, header: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(agent.address).unwrap();
    stream.set_read_timeout(Some(harness::PATIENCE)).unwrap();
    let path = harness::encode(path);
    write!(stream, "{method} /files?path={path} HTTP/1.1\r\nhost: x\r\n{header}\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    (String::from_utf8(head).unwrap(), stream)
}

/// The value of a header.
fn header<'a>(head: &'a str, name: &str) -> &'a str {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap()
}

/// Whoever closes such a file waits, and cannot be stopped: it must not be the one that serves all others.
#[tokio::test]
async fn a_file_that_cannot_be_closed_holds_up_nobody() {
    let Some(mount) = Mount::new() else { return };
    let agent = Agent::start();
    let closing = Closing::serve(&mount);
    let path = |name: &str| format!("{}/{name}", mount.path());
    let mut count = 0;
    let mut one_more_waits = async || {
        count += 1;
        eventually(|| closing.count() == count).await;
        assert_eq!(agent.get("/health").await.status, 204);
        assert_eq!(run(&agent.processes(), command(&["echo", "alive"])).await.text(), "alive\n");
    };
    // Nothing of it is sent.
    let (head, _stream) = ask(&agent, "HEAD", &path("head"), "");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    one_more_waits().await;
    let condition = format!("if-none-match: {}\r\n", header(&head, "etag"));
    let (head, _stream) = ask(&agent, "GET", &path("condition"), &condition);
    assert!(head.starts_with("HTTP/1.1 304 "), "{head}");
    one_more_waits().await;
    // All of it, or a part; plain, or packed.
    for headers in ["", "range: bytes=5-9999999\r\n", "accept-encoding: gzip, identity;q=0\r\n"] {
        let (head, mut stream) =
            ask(&agent, "GET", &path("whole"), &format!("connection: close\r\n{headers}"));
        assert!(head.starts_with("HTTP/1.1 20"), "{head}");
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer).unwrap() > 0 {}
        one_more_waits().await;
    }
    // The client goes away in the middle.
    for headers in ["", "accept-encoding: gzip, identity;q=0\r\n"] {
        let (head, stream) = ask(&agent, "GET", &path("half"), headers);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        drop(stream);
        one_more_waits().await;
    }
}
