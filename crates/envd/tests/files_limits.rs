//! Files that are too large for something: the agent's memory, the disk, a refusal.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "all of this is tests, and says what was measured"
)]

mod files_place;
mod harness;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use bytes::Bytes;
use files_place::{FORM, Place, form, gzip, noise, prose};
use http::Request;

const MIB: usize = 1 << 20;

/// The most memory that the agent had, in KiB.
fn peak(place: &Place) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", place.agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    line.split(' ').next().unwrap().parse().unwrap()
}

/// Sends a request with a body, piece by piece, and returns the head of the answer, without the rest of it read.
fn exchange(
    place: &Place,
    head: &str,
    pieces: impl Iterator<Item = Bytes>,
) -> (String, BufReader<TcpStream>) {
    let mut stream = place.connect();
    stream.write_all(head.as_bytes()).unwrap();
    for piece in pieces {
        stream.write_all(&piece).unwrap();
    }
    let mut reader = BufReader::with_capacity(MIB, stream);
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut answer).unwrap(), 0, "{answer}");
    }
    (answer, reader)
}

fn upload(place: &Place, uri: &str, headers: &str, length: usize, pieces: impl Iterator<Item = Bytes>) {
    let head = format!("POST {uri} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n");
    let (answer, _) = exchange(place, &head, pieces);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// Content that is told apart by where it is, and how much of it there is.
fn piece(block: &Bytes, number: usize) -> Bytes {
    let mut piece = block.to_vec();
    piece[..8].copy_from_slice(&number.to_be_bytes());
    piece.into()
}

#[tokio::test]
async fn a_file_larger_than_memory_goes_up_and_down() {
    let soak = std::env::var_os("WRENN_SOAK").is_some();
    let pieces = if soak { 10 * 1024 } else { 256 };
    let place = Place::new();
    // What is needed once is there before it counts: code, threads, tables.
    assert_eq!(place.put("warm", &[("content-encoding", "gzip")], gzip(&prose(MIB))).await.status, 200);
    let body = form(&[("file", Some(&place.path("warm")), &prose(MIB))]);
    assert_eq!(
        place.agent.send(Request::post("/files").header("content-type", FORM), body).await.status,
        200
    );
    assert_eq!(place.get("warm", &[("accept-encoding", "gzip")]).await.status, 200);
    assert_eq!(place.get("warm", &[]).await.status, 200);
    let before = peak(&place);
    let block = noise(MIB);
    let content = || (0..pieces).map(|number| piece(&block, number));
    let octets = "Content-Type: application/octet-stream\r\n";
    upload(&place, &place.uri("file"), octets, pieces * MIB, content());
    let part = format!(
        "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{}\"\r\n\r\n",
        place.path("file")
    );
    let whole =
        std::iter::once(Bytes::from(part.clone())).chain(content()).chain([Bytes::from("\r\n--XX--\r\n")]);
    let length = part.len() + pieces * MIB + 10;
    upload(&place, "/files", &format!("Content-Type: {FORM}\r\n"), length, whole);
    let down = || {
        let head = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", place.uri("file"));
        let (answer, mut body) = exchange(&place, &head, std::iter::empty());
        assert!(answer.contains(&format!("content-length: {}\r\n", pieces * MIB)), "{answer}");
        let mut buffer = vec![0; MIB];
        for wanted in content() {
            body.read_exact(&mut buffer).unwrap();
            assert!(buffer == wanted);
        }
    };
    down();
    // Packed, both ways. What is packed is made here of few blocks that are packed once.
    let text = prose(MIB);
    let member = Bytes::from(gzip(&text));
    let packed = format!("{octets}Content-Encoding: gzip\r\n");
    let members = std::iter::repeat_n(member.clone(), pieces);
    upload(&place, &place.uri("text"), &packed, member.len() * pieces, members);
    assert_eq!(fs::metadata(place.path("text")).unwrap().len(), (pieces * MIB) as u64);
    let head = format!("GET {} HTTP/1.0\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n", place.uri("text"));
    let (answer, body) = exchange(&place, &head, std::iter::empty());
    assert!(answer.contains("content-encoding: gzip\r\n"), "{answer}");
    let mut unpacked = flate2::read::GzDecoder::new(body);
    let mut buffer = vec![0; MIB];
    for _ in 0..pieces {
        unpacked.read_exact(&mut buffer).unwrap();
        assert!(buffer == text);
    }
    assert_eq!(unpacked.read(&mut buffer).unwrap(), 0);
    let grown = peak(&place) - before;
    let name = if soak { "soak: " } else { "" };
    println!(
        "{name}files of {pieces} MiB up and down, plain, form and packed; seed 1; the agent's peak grew by {grown} KiB"
    );
    assert!(grown < 8 * 1024, "the agent's peak grew by {grown} KiB, from {before} KiB");
}

/// A small file system of its own.
struct Mount(String);

impl Mount {
    fn new(place: &Place, options: &str) -> Self {
        let path = place.path("mount");
        fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount(
            "none",
            &path,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .expect("these tests run as root");
        Self(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_leaves_no_half_of_a_file() {
    let place = Place::new();
    let mount = Mount::new(&place, "size=1m");
    let full = "not enough disk space available";
    let exists = || fs::exists(place.path("mount/file")).unwrap();
    // One that says how long it is.
    let answer = place.put("mount/file", &[], noise(8 * MIB)).await;
    let attempted = format!("attempted to write {} bytes: {full}", 8 * MIB);
    assert_eq!((answer.status.as_u16(), answer.message()), (507, attempted));
    assert!(!exists());
    // One that does not.
    let request = Request::post(place.uri("mount/file")).header("content-type", "application/octet-stream");
    let pieces = (0..64).map(|_| noise(MIB / 8)).collect();
    let answer = place.agent.send_pieces(request, pieces).await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (507, full));
    assert!(!exists());
    // One that is small until it is unpacked.
    let answer = place.put("mount/file", &[("content-encoding", "gzip")], gzip(&vec![0; 64 * MIB])).await;
    assert_eq!(answer.status, 507, "{answer:?}");
    assert!(answer.message().ends_with(full) && !exists());
    // One of several in a form: what came before it is whole.
    let (one, two) = (place.path("mount/one"), place.path("mount/file"));
    let body = form(&[("file", Some(&one), b"one"), ("file", Some(&two), &noise(2 * MIB))]);
    let answer = place.agent.send(Request::post("/files").header("content-type", FORM), body).await;
    assert_eq!(answer.status, 507, "{answer:?}");
    assert!(!exists());
    assert_eq!(place.read("mount/one"), b"one");
    // What fits fits, also over itself; and what is plainly too long leaves it there.
    for number in 0..3 {
        let content = piece(&noise(700_000), number);
        assert_eq!(place.put("mount/file", &[], content.clone()).await.status, 200);
        assert!(place.read("mount/file") == content);
    }
    let old = place.read("mount/file");
    assert_eq!(place.put("mount/file", &[], noise(2 * MIB)).await.status, 507);
    assert!(place.read("mount/file") == old);
    // Made of parts for which there is no room.
    fs::write(place.path("part"), noise(2 * MIB)).unwrap();
    let body = serde_json::json!({"source_paths": [place.path("part")], "destination": two});
    let answer = place.agent.send(Request::post("/files/compose"), body.to_string()).await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (507, full));
    assert!(place.read("mount/file") == old && fs::exists(place.path("part")).unwrap());
    let mut names: Vec<_> = fs::read_dir(&mount.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file", "one"]);
}

#[tokio::test]
async fn a_disk_with_no_room_for_another_name() {
    let place = Place::new();
    let mount = Mount::new(&place, "size=1m,nr_inodes=2");
    assert_eq!(place.put("mount/one", &[], "1").await.status, 200);
    let answer = place.put("mount/two", &[], "2").await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (507, "not enough inodes available"));
    drop(mount);
}

#[tokio::test]
async fn a_refused_body_of_any_length_has_an_answer() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    let mount = Mount::new(&place, "size=1m");
    let block = noise(MIB);
    let pieces = 200;
    let octets = "Content-Type: application/octet-stream\r\n";
    for (name, headers, status) in
        [("dir", octets, 400), ("mount/file", octets, 507), ("file", "Content-Type: text/plain\r\n", 400)]
    {
        // A client that reads nothing before it has sent all.
        let uri = place.uri(name);
        let head =
            format!("POST {uri} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n", pieces * MIB);
        let (answer, mut rest) = exchange(&place, &head, std::iter::repeat_n(block.clone(), pieces));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        let mut body = String::new();
        rest.read_to_string(&mut body).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["code"], status);
        // One that sends nothing more once it has the answer.
        let begun = std::iter::repeat_n(block.clone(), 1);
        let (answer, _) = exchange(&place, &head, begun);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    drop(mount);
    // After a short one the connection goes on.
    let uri = place.uri("dir");
    let head = format!("POST {uri} HTTP/1.1\r\nHost: x\r\n{octets}Content-Length: 1000\r\n\r\n");
    let (answer, mut rest) = exchange(&place, &head, std::iter::once(noise(1000)));
    assert!(answer.starts_with("HTTP/1.1 400 ") && !answer.contains("connection: close"), "{answer}");
    let length: usize =
        answer.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    rest.read_exact(&mut vec![0; length]).unwrap();
    rest.get_mut().write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut line = String::new();
    rest.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 204 "), "{line}");
}

#[tokio::test]
async fn forms_of_odd_shapes_take_no_memory() {
    let place = Place::new();
    assert_eq!(place.put("warm", &[], noise(MIB)).await.status, 200);
    let before = peak(&place);
    // A head that never ends, and very many parts that are no files.
    let endless = Bytes::from([b"--XX\r\n".as_slice(), &vec![b'a'; 64 * MIB]].concat());
    let request = || Request::post("/files").header("content-type", FORM);
    let answer = place.agent.send(request(), endless).await;
    assert_eq!(answer.message(), "malformed form: the head of a part is longer than 16384 bytes");
    let part = "--XX\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n";
    let body = format!("{}--XX--\r\n", part.repeat(500_000));
    let answer = place.agent.send(request(), body).await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (400, "there is no part named 'file'"));
    let grown = peak(&place) - before;
    assert!(grown < 8 * 1024, "the agent's peak grew by {grown} KiB");
}
