//! Streams to ports of the loopback interface: a real agent, real services.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "all of this is tests, and one that cannot run says so"
)]

mod harness;

use harness::{Agent, PATIENCE};
use http::Request;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Asks for a stream. The head of the answer, and the stream behind it.
async fn open(agent: &Agent, port: u16, behind: &[u8]) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(agent.address).await.unwrap();
    let mut request = format!(
        "POST /connect/{port} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: wrenn-tunnel\r\n\r\n"
    )
    .into_bytes();
    request.extend(behind);
    stream.write_all(&request).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
    }
    (String::from_utf8(head).unwrap(), stream)
}

async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    bytes
}

async fn service(address: &str) -> (TcpListener, u16) {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let agent = Agent::start();
    for address in ["127.0.0.1", "::1"] {
        if TcpListener::bind((address, 0)).await.is_err() {
            println!("skipped: this machine has no {address}");
            continue;
        }
        let (listener, port) = service(address).await;
        let serve = tokio::spawn(async move {
            let (mut stream, peer) = listener.accept().await.unwrap();
            assert!(peer.ip().is_loopback());
            // All that the other side has to say comes first, and the answer after its end.
            let asked = read_all(&mut stream).await;
            stream.write_all(&asked).await.unwrap();
            stream.write_all(b" and more").await.unwrap();
        });
        let large: Vec<u8> = (0..3_000_000_u32).map(|index| index.to_le_bytes()[0]).collect();
        let (head, mut stream) = open(&agent, port, b"early ").await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.to_ascii_lowercase().contains("upgrade: wrenn-tunnel"), "{head}");
        stream.write_all(&large).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = read_all(&mut stream).await;
        assert_eq!(answer, [b"early ", large.as_slice(), b" and more"].concat());
        serve.await.unwrap();
    }
}

#[tokio::test]
async fn a_service_that_breaks_off_is_seen_to() {
    let agent = Agent::start();
    let (listener, port) = service("127.0.0.1").await;
    let (head, mut stream) = open(&agent, port, b"").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (mut served, _) = listener.accept().await.unwrap();
    served.write_all(b"half").await.unwrap();
    let mut half = [0; 4];
    timeout(PATIENCE, stream.read_exact(&mut half)).await.unwrap().unwrap();
    served.set_zero_linger().unwrap();
    drop(served);
    assert!(
        timeout(PATIENCE, stream.read_u8())
            .await
            .unwrap()
            .is_err_and(|error| { error.kind() == std::io::ErrorKind::ConnectionReset })
    );
    // And the other way round.
    let (head, mut stream) = open(&agent, port, b"").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (mut served, _) = listener.accept().await.unwrap();
    stream.write_all(b"half").await.unwrap();
    timeout(PATIENCE, served.read_exact(&mut half)).await.unwrap().unwrap();
    stream.set_zero_linger().unwrap();
    drop(stream);
    assert!(
        timeout(PATIENCE, served.read_u8())
            .await
            .unwrap()
            .is_err_and(|error| { error.kind() == std::io::ErrorKind::ConnectionReset })
    );
}

/// A service that takes an end for the end of what it was sent keeps half of it otherwise.
#[tokio::test]
async fn a_stream_that_a_restore_cuts_has_no_end() {
    let agent = Agent::start();
    let (listener, port) = service("127.0.0.1").await;
    for behind in [b"".as_slice(), b"half"] {
        let (head, mut stream) = open(&agent, port, behind).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let (mut served, _) = listener.accept().await.unwrap();
        if behind.is_empty() {
            stream.write_all(b"half").await.unwrap();
        }
        let mut half = [0; 4];
        timeout(PATIENCE, served.read_exact(&mut half)).await.unwrap().unwrap();
        let init = Request::post("/init").header("content-type", "application/json");
        assert_eq!(agent.send(init, r#"{"restored":true}"#).await.status, 204);
        let end = timeout(PATIENCE, served.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn what_cannot_be_connected_is_said() {
    let agent = Agent::start();
    let (listener, port) = service("127.0.0.1").await;
    drop(listener);
    let ask =
        |path: String| Request::post(path).header("connection", "upgrade").header("upgrade", "wrenn-tunnel");
    let closed = agent.send(ask(format!("/connect/{port}")), "").await;
    assert_eq!(closed.status, 502);
    assert!(closed.message().ends_with("port is not open"), "{}", closed.message());
    for path in [
        "/connect/",
        "/connect/0",
        "/connect/65536",
        "/connect/+80",
        "/connect/80/x",
        "/connect/a",
        "/connect/%38",
    ] {
        assert_eq!(agent.send(ask(path.to_owned()), "").await.status, 400, "{path}");
    }
    for own in [49983, agent.address.port()] {
        let refused = agent.send(ask(format!("/connect/{own}")), "").await;
        assert_eq!(
            (refused.status.as_u16(), refused.message().as_str()),
            (400, "the agent is not reached through itself")
        );
    }
    let plain = agent.send(Request::post(format!("/connect/{port}")), "").await;
    assert_eq!((plain.status.as_u16(), plain.headers["upgrade"].to_str().unwrap()), (426, "wrenn-tunnel"));
    let other = Request::post(format!("/connect/{port}"))
        .header("connection", "upgrade")
        .header("upgrade", "websocket");
    assert_eq!(agent.send(other, "").await.status, 426);
    assert_eq!(agent.get(&format!("/connect/{port}")).await.status, 405);
    assert_eq!(
        agent.send(Request::post("/connect").header("content-type", "application/json"), "{}").await.status,
        404
    );
}

#[tokio::test]
async fn streams_are_counted_and_given_back() {
    let agent = Agent::start();
    let (listener, port) = service("127.0.0.1").await;
    let accept = tokio::spawn(async move {
        let mut served = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            served.push(stream);
            if served.len() == 1024 {
                break;
            }
        }
        (listener, served)
    });
    let mut streams = Vec::new();
    for _ in 0..1024 {
        let (head, stream) = open(&agent, port, b"").await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        streams.push(stream);
    }
    let (listener, served) = accept.await.unwrap();
    let (head, _) = open(&agent, port, b"").await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    drop((streams, served));
    // They end one after the other; each try is an event of its own.
    loop {
        let (head, _stream) = open(&agent, port, b"").await;
        if head.starts_with("HTTP/1.1 101 ") {
            break;
        }
    }
    drop(listener);
}
