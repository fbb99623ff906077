//! Ports of sandboxes by their host names.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{channel::mpsc, future::join_all};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use wrenn_control_plane::Bounds;

use super::support::{
    World,
    client::{Answer, Body, Client, full},
    eventually,
    postgres::Cluster,
    program::{self, Program},
    short_bounds,
    socket::{Said, Socket},
};

const BOUND: Duration = Duration::from_secs(30);
const NOT_FOUND: &str = "The sandbox was not found";
const NOT_OPEN: &str = "The sandbox is running but port is not open";

/// A sandbox with a program on port 8000.
async fn served(world: &World, asked: Value) -> (String, Program) {
    let created = world.client.post("/v1/sandboxes", asked).await.json();
    let id = created["id"].as_str().unwrap().to_owned();
    let program = Program::start().await;
    world.agent.put_program(&id, 8000, program.address);
    (id, program)
}

fn host(id: &str) -> String {
    format!("8000-{id}.localhost")
}

fn request(client: &Client, host: &str, method: Method, path: &str) -> http::request::Builder {
    client.request(method, path).header("host", host)
}

async fn get(client: &Client, host: &str, path: &str) -> Answer {
    client.whole(request(client, host, Method::GET, path).body(full("")).unwrap()).await
}

async fn send(client: &Client, request: Request<Body>) -> Response<Incoming> {
    client.send(request).await
}

/// The error is this one, in the form that clients know.
#[track_caller]
fn assert_told(answer: &Answer, status: u16, shown: &str, message: &str) {
    let told = answer.json();
    assert_eq!((answer.status.as_u16(), &told["code"]), (status, &json!(status)), "{told}");
    assert_eq!(told["sandboxId"], shown, "{told}");
    assert!(told["message"].as_str().unwrap().contains(message), "{told}");
}

fn header<'a>(shown: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = shown["headers"].as_array().unwrap().iter();
    headers.filter(|pair| pair[0] == name).map(|pair| pair[1].as_str().unwrap()).collect()
}

/// A body that is written while it is read.
fn written() -> (mpsc::UnboundedSender<Frame<Bytes>>, Body) {
    let (sender, receiver) = mpsc::unbounded();
    (sender, StreamBody::new(futures::StreamExt::map(receiver, Ok)).boxed_unsync())
}

/// Reads frames until so many bytes are there.
async fn read(body: &mut Incoming, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let frame = timeout(BOUND, body.frame()).await.expect("a piece in time").unwrap().unwrap();
        bytes.extend_from_slice(&frame.into_data().unwrap());
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_and_who_may_not() {
    let world = World::new().await;
    let (id, program) = served(&world, json!({})).await;
    let short = id.replace('-', "");
    for host in [
        host(&id),
        format!("8000-{id}.localhost:1234"),
        format!("8000-{}.LOCALHOST", id.to_uppercase()),
        format!("8000-{short}.localhost"),
    ] {
        let answer = get(&world.client, &host, "/").await;
        assert_eq!(answer.status, 200, "{host}: {}", answer.text());
        assert_eq!(header(&answer.json(), "host"), [host.as_str()]);
    }
    let seen = program.seen();

    for key in ["", "wrn_00000000000000000000000000000000"] {
        let answer = get(&world.client.with_key(key), &host(&id), "/").await;
        assert_told(&answer, 401, &id, "key");
    }
    // To another team it looks as one that there never was.
    let other = world.other_team().await;
    let theirs = get(&other, &host(&id), "/").await;
    assert_told(&theirs, 502, &id, NOT_FOUND);
    let none = get(&other, "8000-sb-00000000.localhost", "/").await;
    assert_eq!(theirs.text().replace(&id, "sb-00000000"), none.text());
    assert_told(&get(&other, &format!("8000-{short}.localhost"), "/").await, 502, &short, NOT_FOUND);

    let agent = get(&world.client, &format!("49983-{id}.localhost"), "/health").await;
    assert_told(&agent, 403, &id, "agent");
    for wrong in ["0-sb-00000000", "65536-sb-00000000", "8000-sb-1", "8000", "8000-sb-00000000.more"] {
        let answer = get(&world.client, &format!("{wrong}.localhost"), "/").await;
        assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (400, &json!(400)), "{wrong}");
    }
    assert_told(&get(&world.client, &format!("8001-{id}.localhost"), "/").await, 502, &id, NOT_OPEN);
    let closed = get(&world.client, &format!("8001-{id}.localhost"), "/").await.json();
    assert_eq!(closed["port"], 8001);
    // All other names are the API's, and its paths are the program's.
    for host in ["localhost", "api.localhost", "127.0.0.1:8000", &format!("8000-{id}.example.com")] {
        assert_eq!(get(&world.client, host, "/health").await.json()["status"], "ok", "{host}");
    }
    assert_eq!(get(&world.client, &host(&id), "/health").await.json()["path"], "/health");
    assert_eq!(program.seen(), seen + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_and_what_does_not() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let host = host(&id);
    let asked = request(&world.client, &host, Method::PATCH, "//a/../%2e%2F?b=c&d=%20;e")
        .header("connection", "x-mine")
        .header("x-mine", "1")
        .header("x-forwarded-for", "10.0.0.1")
        .header("x-forwarded-host", "bank.example")
        .header("forwarded", "for=10.0.0.1")
        .header("authorization", "Bearer mine")
        .header("cookie", "a=b")
        .header("accept-encoding", "gzip")
        .body(full("body"));
    let shown = world.client.whole(asked.unwrap()).await.json();
    assert_eq!((&shown["method"], &shown["body"]), (&json!("PATCH"), &json!("body")));
    assert_eq!(shown["path"], "//a/../%2e%2F?b=c&d=%20;e");
    for (name, values) in [
        ("host", vec![host.as_str()]),
        ("x-forwarded-host", vec![host.as_str()]),
        ("x-forwarded-proto", vec!["http"]),
        ("x-forwarded-for", vec!["127.0.0.1"]),
        ("authorization", vec!["Bearer mine"]),
        ("cookie", vec!["a=b"]),
        ("accept-encoding", vec!["gzip"]),
        ("content-length", vec!["4"]),
        ("forwarded", vec![]),
        ("x-mine", vec![]),
        ("x-api-key", vec![]),
    ] {
        assert_eq!(header(&shown, name), values, "{name}: {shown}");
    }
    assert!(!shown.to_string().contains(&world.client.key), "{shown}");

    let answer = get(&world.client, &host, "/hostile").await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str()), (418, "short and stout"));
    let cookies: Vec<_> = answer.headers.get_all("set-cookie").iter().collect();
    assert_eq!(cookies, ["a=b; Path=/", "c=d; Path=/"]);
    assert_eq!(answer.headers["location"], "http://elsewhere.example/");
    for name in ["x-inner", "keep-alive", "clear-site-data", "content-encoding"] {
        assert!(!answer.headers.contains_key(name), "{name}");
    }
    let head =
        world.client.whole(request(&world.client, &host, Method::HEAD, "/x").body(full("")).unwrap()).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert!(head.headers["content-length"].to_str().unwrap().parse::<usize>().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_pass_as_they_come() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let (sender, body) = written();
    let asked = request(&world.client, &host(&id), Method::POST, "/echo")
        .header("te", "trailers")
        .header("trailer", "x-sum")
        .body(body);
    let asking = tokio::spawn({
        let client = world.client.clone();
        async move { send(&client, asked.unwrap()).await }
    });
    // The first piece is back before the second is sent.
    let mut answer = None;
    let mut asking = Some(asking);
    for round in 0..20_u8 {
        let piece = vec![round; 10_000];
        sender.unbounded_send(Frame::data(piece.clone().into())).unwrap();
        if let Some(asking) = asking.take() {
            answer = Some(timeout(BOUND, asking).await.unwrap().unwrap().into_body());
        }
        assert_eq!(read(answer.as_mut().unwrap(), piece.len()).await, piece);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "200000".parse().unwrap());
    sender.unbounded_send(Frame::trailers(trailers.clone())).unwrap();
    drop(sender);
    let rest = timeout(BOUND, answer.unwrap().collect()).await.unwrap().unwrap();
    assert_eq!(rest.trailers(), Some(&trailers));

    // Much more than anything here would hold.
    let much = vec![b'm'; 32 << 20];
    let asked = request(&world.client, &host(&id), Method::PUT, "/echo").body(full(much.clone())).unwrap();
    assert!(world.client.whole(asked).await.body == much);
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_and_other_upgrades() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let mut socket = Socket::open_at(&world.client, &host(&id), "/socket").await.unwrap();
    socket.send(json!({"a": 1})).await;
    assert_eq!(socket.next().await, Said::Text(json!({"a": 1})));
    let large = vec![7; 300_000];
    socket.send_bytes(&large).await;
    assert_eq!(socket.next().await, Said::Binary(large));
    // A kill breaks it, without a proper end.
    assert_eq!(world.client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    assert_eq!(socket.rest().await, [Said::Broken]);
    assert!(Socket::open_at(&world.client, &host(&id), "/socket").await.is_err());

    // Any protocol, each direction ending by itself.
    let (id, _program) = served(&world, json!({})).await;
    let counter = Program::raw(|mut stream: TcpStream, head: String| async move {
        assert!(head.to_ascii_lowercase().contains("upgrade: count/1\r\n"), "{head}");
        let switch = "HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: count/1\r\n\r\n";
        stream.write_all(switch.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(format!("{} bytes", all.len()).as_bytes()).await.unwrap();
    })
    .await;
    world.agent.put_program(&id, 9000, counter.address);
    let mut stream = TcpStream::connect(world.client.address).await.unwrap();
    let key = &world.client.key;
    let ask = format!(
        "GET / HTTP/1.1\r\nHost: 9000-{id}.localhost\r\nX-API-Key: {key}\r\nConnection: upgrade\r\n\
         Upgrade: count/1\r\n\r\n"
    );
    stream.write_all(ask.as_bytes()).await.unwrap();
    let head = timeout(BOUND, program::head(&mut stream)).await.unwrap().unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: count/1"), "{head}");
    stream.write_all(&vec![b'x'; 1_000_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    timeout(BOUND, stream.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, "1000000 bytes");

    // A guest that changes the protocol without having been asked to is not followed.
    let answer = get(&world.client, &format!("9000-{id}.localhost"), "/").await;
    assert_eq!(answer.status, 502, "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_or_gone_does_not_answer() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let endless = Program::raw(|mut stream: TcpStream, _| async move {
        // The end of the connection is the end of the body.
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfirst").await.unwrap();
        let _ = stream.read_u8().await;
    })
    .await;
    world.agent.put_program(&id, 8001, endless.address);
    let mut ticks = send(
        &world.client,
        request(&world.client, &host(&id), Method::GET, "/ticks").body(full("")).unwrap(),
    )
    .await
    .into_body();
    let other = format!("8001-{id}.localhost");
    let mut unframed =
        send(&world.client, request(&world.client, &other, Method::GET, "/").body(full("")).unwrap())
            .await
            .into_body();
    read(&mut ticks, 30).await;
    assert_eq!(read(&mut unframed, 5).await, b"first");

    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(world.client.post(&format!("{path}/pause"), json!({})).await.status, 200);
    // Neither ends as if it were complete.
    assert!(timeout(BOUND, ticks.collect()).await.unwrap().is_err());
    assert!(timeout(BOUND, unframed.collect()).await.unwrap().is_err());
    assert_told(&get(&world.client, &host(&id), "/").await, 502, &id, NOT_FOUND);
    assert_eq!(world.agent.commanded("resume").len(), 0);

    assert_eq!(world.client.post(&format!("{path}/resume"), json!({})).await.status, 200);
    // What can be sent only once arrives, too: no connection of before is left.
    let post = request(&world.client, &host(&id), Method::POST, "/again").body(full("x")).unwrap();
    assert_eq!(world.client.whole(post).await.json()["path"], "/again");

    // One that ends by itself in that moment is gone at once.
    world.agent.crash(&id);
    assert_told(&get(&world.client, &host(&id), "/").await, 502, &id, NOT_FOUND);
    eventually("it has ended", async || {
        world.client.get(&path).await.json()["status"].as_str() != Some("running")
    })
    .await;
    assert_told(&get(&world.client, &host(&id), "/").await, 502, &id, NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_ends_with_its_connection_is_whole() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let old = Program::raw(|mut stream: TcpStream, _| async move {
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nall of it").await.unwrap();
    })
    .await;
    world.agent.put_program(&id, 8001, old.address);
    let answer = get(&world.client, &format!("8001-{id}.localhost"), "/").await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str()), (200, "all of it"));
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_wakes_what_asks_for_it_once() {
    let world = World::new().await;
    let (id, program) = served(&world, json!({"auto_resume": true})).await;
    for unheard in [false, true] {
        let before = (world.agent.commanded("resume").len(), program.seen());
        if unheard {
            world.agent.pause_unheard(&id);
        } else {
            let pause = world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await;
            assert_eq!(pause.status, 200);
        }
        let host = host(&id);
        let posts = (0..20).map(|number| {
            let body = format!("{number} {}", "x".repeat(100_000));
            let post = request(&world.client, &host, Method::POST, "/").body(full(body.clone())).unwrap();
            let client = world.client.clone();
            async move { (client.whole(post).await, body) }
        });
        for (answer, body) in join_all(posts).await {
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(answer.json()["body"], body);
        }
        assert_eq!(world.agent.commanded("resume").len(), before.0 + 1, "{unheard}");
        assert_eq!(program.seen(), before.1 + 20, "each was sent once");
    }
    // One who may not does not wake it.
    assert_eq!(world.client.post(&format!("/v1/sandboxes/{id}/pause"), json!({})).await.status, 200);
    assert_eq!(get(&world.other_team().await, &host(&id), "/").await.status, 502);
    assert_eq!(get(&world.client.with_key(""), &host(&id), "/").await.status, 401);
    assert_eq!(world.agent.commanded("resume").len(), 2);
    // A sandbox on its way to being paused is waited for, and a resume that fails is told.
    world.agent.faults(|faults| {
        faults.resume = Some(connectrpc::ConnectError::internal("the snapshot is broken"));
    });
    let answer = get(&world.client, &host(&id), "/").await;
    assert_told(&answer, 502, &id, "broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_its_way_is_said_to_be() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    world.agent.faults(|faults| {
        faults.hold_pauses = true;
        faults.hold_resumes = true;
    });
    for (verb, state, status) in [("pause", "pausing", 409), ("resume", "resuming", 503)] {
        let (client, path) = (world.client.clone(), format!("/v1/sandboxes/{id}"));
        let changing = tokio::spawn({
            let path = format!("{path}/{verb}");
            async move { client.post(&path, json!({})).await.status }
        });
        eventually("it has begun", async || world.client.get(&path).await.json()["status"] == state).await;
        assert_told(&get(&world.client, &host(&id), "/").await, status, &id, state);
        world.agent.release();
        assert_eq!(changing.await.unwrap(), 200);
        world.agent.faults(|faults| faults.hold_resumes = true);
    }
}

/// Answers one request on each connection, and breaks it off at the next.
async fn one_each(mut stream: TcpStream, _: String) {
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    let _ = program::head(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_replaced_only_for_what_can_be_repeated() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let breaking = Program::raw(one_each).await;
    world.agent.put_program(&id, 8001, breaking.address);
    let host = format!("8001-{id}.localhost");
    for number in 1..=5 {
        let answer = get(&world.client, &host, "/").await;
        assert_eq!((answer.status.as_u16(), breaking.seen()), (200, number), "{}", answer.text());
    }
    let post = request(&world.client, &host, Method::POST, "/").body(full("x")).unwrap();
    let answer = world.client.whole(post).await;
    assert_told(&answer, 502, &id, "no HTTP answer");
    assert_eq!(breaking.seen(), 5, "it was not sent twice");

    // On a connection of its own a request that breaks is not sent again, whichever it is.
    let attempts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&attempts);
    let mute = Program::raw(move |stream, _| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { drop(stream) }
    })
    .await;
    world.agent.put_program(&id, 8002, mute.address);
    let answer = get(&world.client, &format!("8002-{id}.localhost"), "/").await;
    assert_told(&answer, 502, &id, "no HTTP answer");
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_guest_should_say() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let long = format!("HTTP/1.1 200 OK\r\nX-Long: {}\r\n\r\n", "l".repeat(200_000));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(1000));
    for (port, said) in [
        (8001, "SSH-2.0-none\r\n"),
        (8002, long.as_str()),
        (8003, many.as_str()),
        (8004, "HTTP/1.1 9 x\r\n\r\n"),
    ] {
        let said = said.to_owned();
        let program = Program::raw(move |mut stream: TcpStream, _| {
            let said = said.clone();
            async move {
                let _ = stream.write_all(said.as_bytes()).await;
                let _ = stream.read_u8().await;
            }
        })
        .await;
        world.agent.put_program(&id, port, program.address);
        let answer = get(&world.client, &format!("{port}-{id}.localhost"), "/").await;
        assert_told(&answer, 502, &id, "no HTTP answer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_has_an_end_and_traffic_has_none() {
    let bounds = Bounds { port_silence: Duration::from_millis(700), ..short_bounds() };
    let world = World::with(bounds, Cluster::shared().database().await).await;
    let (id, _program) = served(&world, json!({})).await;
    let host = host(&id);
    let ticking = request(&world.client, &host, Method::GET, "/ticks").body(full("")).unwrap();
    let mut ticks = send(&world.client, ticking).await.into_body();
    assert_told(&get(&world.client, &host, "/silent").await, 504, &id, "in time");
    let mut socket = Socket::open_at(&world.client, &host, "/socket").await.unwrap();
    assert_eq!(socket.rest().await, [Said::Broken]);
    // Twice the bound and more, and it still comes.
    assert!(read(&mut ticks, 300).await.len() >= 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_not_quite_right() {
    let world = World::new().await;
    let (id, _program) = served(&world, json!({})).await;
    let (key, name) = (world.client.key.clone(), host(&id));
    let say = async |head: String| -> String {
        let mut stream = TcpStream::connect(world.client.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        timeout(BOUND, program::head(&mut stream)).await.unwrap().unwrap()
    };
    for (head, status) in [
        (format!("GET / HTTP/1.1\r\nHost: {name}\r\nHost: localhost\r\nX-API-Key: {key}\r\n\r\n"), "400"),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\nHost: {name}\r\nX-API-Key: {key}\r\n\r\n"), "400"),
        (format!("CONNECT {name}:8000 HTTP/1.1\r\nHost: {name}\r\nX-API-Key: {key}\r\n\r\n"), "400"),
        // A whole address in the request line is what counts.
        (format!("GET http://{name}/ HTTP/1.1\r\nHost: other\r\nX-API-Key: {key}\r\n\r\n"), "200"),
        (format!("GET http://localhost/health HTTP/1.1\r\nHost: {name}\r\n\r\n"), "200"),
        (format!("GET / HTTP/1.0\r\nHost: {name}\r\nX-API-Key: {key}\r\n\r\n"), "200"),
        (
            format!(
                "POST / HTTP/1.1\r\nHost: {name}\r\nX-API-Key: {key}\r\nContent-Length: 4\r\n\
                 Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            "200",
        ),
        (format!("GET / HTTP/1.1\r\nHost: {name}\r\nX-Long: {}\r\n\r\n", "l".repeat(600_000)), "431"),
    ] {
        let answer = say(head.clone()).await;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{head}{answer}");
    }
    // A body is asked for only when it is wanted.
    let expect = |key: &str| {
        format!(
            "POST / HTTP/1.1\r\nHost: {name}\r\nX-API-Key: {key}\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
        )
    };
    assert!(say(expect(&key)).await.starts_with("HTTP/1.1 100 "));
    assert!(say(expect("none")).await.starts_with("HTTP/1.1 401 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_domain_every_name_is_the_apis() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let config = wrenn_control_plane::Config { proxy_domain: None, ..world.config() };
    let running = wrenn_control_plane::start(config).await.unwrap();
    let address: SocketAddr = running.address();
    let client = world.client.at(address);
    let answer = get(&client, &host(&id), "/").await;
    assert_eq!((answer.status, answer.code().as_str()), (StatusCode::NOT_FOUND, "not_found"));
    running.stop().await;
}
