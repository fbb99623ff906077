//! What becomes of connections: those that a snapshot held, and too many of them.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use connectrpc::client::CallOptions;
use harness::{Agent, PATIENCE, Running, by_pid, observe::eventually, shell};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use wrenn_proto::process::{ConnectRequest, ConnectResponse};

/// Writes as fast as it is read.
const WRITER: &str = "while :; do echo some line of output; done";
/// As many as may be connected that are not the host.
const MAXIMUM: usize = 4096;
/// Fewer than may wait to be accepted, or than the kernel carries at once.
const QUEUE: usize = 128;

/// A request as it is on the wire, on a connection that it leaves open.
fn ask(stream: &mut TcpStream, method: &str, path: &str, kind: &str, body: &[u8]) {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n\
         connect-protocol-version: 1\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
}

/// The status of the answer that comes next.
fn status(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap().split(' ').nth(1).unwrap().to_owned()
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The same connection, for who waits.
fn plain(stream: tokio::net::TcpStream) -> TcpStream {
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Connects so often, all at once.
async fn connect_many(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let all = futures::future::join_all((0..count).map(|_| tokio::net::TcpStream::connect(address)));
    tokio::time::timeout(PATIENCE, all)
        .await
        .unwrap()
        .into_iter()
        .map(|stream| plain(stream.unwrap()))
        .collect()
}

/// Begins to follow a process and then takes nothing more, as a machine that is gone does.
fn follow_and_fall_silent(address: SocketAddr, pid: u32) -> TcpStream {
    let message = format!(r#"{{"process":{{"pid":{pid}}}}}"#).into_bytes();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0], length.as_slice(), &message].concat();
    let mut stream = connect(address);
    ask(&mut stream, "POST", "/process.Process/Connect", "application/connect+json", &body);
    assert_eq!(status(&mut stream), "200");
    stream
}

#[tokio::test]
async fn connections_from_before_a_restore_hold_up_nobody() {
    let agent = Agent::start();
    let client = agent.processes();
    let mut first = Running::start(&client, shell(WRITER), CallOptions::default()).await.unwrap();
    let pid = first.seen.pid;
    let mut silent = follow_and_fall_silent(agent.address, pid);
    let mut own = connect(agent.address);
    // It waits for a reader: whoever else listens gets nothing.
    loop {
        let next = tokio::time::timeout(std::time::Duration::from_secs(1), first.next()).await;
        match next {
            Ok(more) => assert!(more.unwrap()),
            Err(_) => break,
        }
    }
    eventually(|| harness::observe::waits_for_room(pid)).await;

    // A machine that goes on where it was keeps its callers.
    ask(&mut own, "POST", "/init", "application/json", b"{}");
    assert_eq!(status(&mut own), "204");
    assert!(silent.take_error().unwrap().is_none(), "a connection was reset");

    ask(&mut own, "POST", "/init", "application/json", br#"{"restored":true}"#);
    assert_eq!(status(&mut own), "204");
    // Both ended in the middle, and the program goes on for who comes now.
    while let Ok(more) = first.next().await {
        assert!(more, "an end in order");
    }
    let mut rest = Vec::new();
    let ended = silent.read_to_end(&mut rest);
    assert!(ended.is_err() || !rest.ends_with(b"0\r\n\r\n"), "an end in order");
    let request = ConnectRequest { process: by_pid(pid).into(), ..Default::default() };
    let mut again = client.connect(request).await.unwrap();
    for _ in 0..100 {
        let message =
            tokio::time::timeout(PATIENCE, again.message::<ConnectResponse>()).await.unwrap().unwrap();
        assert!(message.is_some(), "output goes on");
    }
    // The connection that said so is there for the next request.
    ask(&mut own, "GET", "/health", "application/json", b"");
    assert_eq!(status(&mut own), "204");
}

#[test]
fn the_host_gets_through_a_crowd() {
    // A network of this thread's own, in which the gateway's address is ours.
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests run as root");
    for words in [["link", "set", "lo", "up"].as_slice(), &["addr", "add", "169.254.0.22/32", "dev", "lo"]] {
        assert!(std::process::Command::new("ip").args(words).status().unwrap().success());
    }
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let agent = Agent::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut crowd = Vec::with_capacity(MAXIMUM);
    while crowd.len() < MAXIMUM {
        // Once the last of those that wait to be accepted is answered, all are in, and there is room for more to wait.
        crowd.extend(runtime.block_on(connect_many(agent.address, QUEUE)));
        let last = crowd.last_mut().unwrap();
        ask(last, "GET", "/health", "", b"");
        assert_eq!(status(last), "204");
    }
    // One more of them is sent away, at once.
    let mut late = connect(agent.address);
    assert!(matches!(late.read(&mut [0]), Ok(0) | Err(_)));

    let mut host = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("169.254.0.22:0".parse().unwrap()).unwrap();
        plain(tokio::time::timeout(PATIENCE, socket.connect(agent.address)).await.unwrap().unwrap())
    });
    ask(&mut host, "POST", "/init", "application/json", br#"{"defaultUser":"nobody"}"#);
    assert_eq!(status(&mut host), "204");
    // A restored machine has room again.
    ask(&mut host, "POST", "/init", "application/json", br#"{"restored":true}"#);
    assert_eq!(status(&mut host), "204");
    // So many ends at once are more than the kernel takes to the other side: what counts is that they are gone on this.
    let pid = agent.pid();
    runtime.block_on(eventually(|| harness::observe::sockets(pid) < 16));
    drop(crowd);
    let mut next = connect(agent.address);
    ask(&mut next, "GET", "/health", "", b"");
    assert_eq!(status(&mut next), "204");
}
