//! Files, whole and in pieces.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::Method;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde_json::json;

use super::support::{
    World,
    client::{Answer, Body, Client, full},
    eventually,
};

/// Sixty-four MiB, piece by piece.
const PIECE: usize = 64 << 10;
const PIECES: usize = 1024;

fn piece(number: usize) -> Bytes {
    let mut piece = vec![0; PIECE];
    piece[..8].copy_from_slice(&(number as u64).to_le_bytes());
    piece.into()
}

fn large_body() -> Body {
    body_of(PIECES)
}

fn body_of(pieces: usize) -> Body {
    let pieces = stream::iter((0..pieces).map(|number| Ok(Frame::data(piece(number)))));
    StreamBody::new(pieces).boxed_unsync()
}

fn form(path_first: bool, path: &str, contents: &[u8]) -> (String, Vec<u8>) {
    let field =
        format!("--XX\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n").into_bytes();
    let mut file = b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"upload\"\r\n\
        Content-Type: application/octet-stream\r\n\r\n"
        .to_vec();
    file.extend_from_slice(contents);
    file.extend_from_slice(b"\r\n");
    let parts = if path_first { [field, file] } else { [file, field] };
    let mut body = parts.concat();
    body.extend_from_slice(b"--XX--\r\n");
    ("multipart/form-data; boundary=XX".to_owned(), body)
}

async fn send_form(client: &Client, path: &str, (kind, body): (String, Vec<u8>)) -> Answer {
    let request = client.request(Method::POST, path).header("content-type", kind);
    client.whole(request.body(full(body)).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_in_all_the_ways() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let base = format!("/v1/sandboxes/{id}");
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().to_str().unwrap();
    let post = async |route: &str, body| world.client.post(&format!("{base}/files/{route}"), body).await;

    // A name with everything that a query could stumble over.
    let name = format!("{root}/a b&c=d%e+ä?#.txt");
    let query = "a%20b%26c%3Dd%25e%2B%C3%A4%3F%23.txt";
    let put = world.client.request(Method::PUT, &format!("{base}/files?path={root}/{query}"));
    assert_eq!(world.client.whole(put.body(full("contents")).unwrap()).await.status, 204);
    assert_eq!(std::fs::read(&name).unwrap(), b"contents");
    let got = world.client.get(&format!("{base}/files?path={root}/{query}")).await;
    assert_eq!((got.status.as_u16(), got.text().as_str()), (200, "contents"));
    assert_eq!(got.headers["content-length"], "8");
    assert_eq!(got.headers["content-type"], "application/octet-stream");
    for route in ["read", "stream/read"] {
        assert_eq!(post(route, json!({"path": name})).await.text(), "contents");
    }

    for route in ["write", "stream/write"] {
        let path = format!("{root}/new/dir/{}", route.replace('/', "-"));
        let written =
            send_form(&world.client, &format!("{base}/files/{route}"), form(true, &path, b"\x00\xff\r\n--X"))
                .await;
        assert_eq!(written.status, 204, "{}", written.text());
        assert_eq!(std::fs::read(&path).unwrap(), b"\x00\xff\r\n--X");
        let path = format!("{root}/late");
        let refused =
            send_form(&world.client, &format!("{base}/files/{route}"), form(false, &path, b"x")).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_str()), (400, "invalid_request"));
        assert!(!std::path::Path::new(&path).exists());
    }
    let empty = world.client.request(Method::PUT, &format!("{base}/files?path={root}/empty"));
    assert_eq!(world.client.whole(empty.body(full("")).unwrap()).await.status, 204);
    let empty = world.client.get(&format!("{base}/files?path={root}/empty")).await;
    assert_eq!((empty.status.as_u16(), empty.body.len()), (200, 0));
    // What the kernel makes up as it is read has no length before.
    let made_up = world.client.get(&format!("{base}/files?path=/proc/sys/kernel/ostype")).await;
    assert_eq!(made_up.text(), "Linux\n");

    let stat = post("stat", json!({"path": name})).await.json();
    assert_eq!((&stat["entry"]["type"], &stat["entry"]["size"]), (&json!("file"), &json!(8)));
    assert_eq!(stat["entry"]["path"], name);
    assert!(stat["entry"]["modified_at"].as_i64().unwrap() > 1_700_000_000);
    std::os::unix::fs::symlink("empty", format!("{root}/link")).unwrap();
    let made = post("mkdir", json!({"path": format!("{root}/one/two")})).await;
    assert_eq!((made.status.as_u16(), &made.json()["entry"]["type"]), (200, &json!("directory")));
    let again = post("mkdir", json!({"path": format!("{root}/one/two")})).await;
    assert_eq!((again.status.as_u16(), again.code().as_str()), (409, "conflict"));
    let list = post("list", json!({"path": root})).await.json();
    let listed: Vec<(&str, &str)> = list["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["name"].as_str().unwrap(), entry["type"].as_str().unwrap()))
        .collect();
    assert_eq!(
        listed,
        [
            ("a b&c=d%e+ä?#.txt", "file"),
            ("empty", "file"),
            ("link", "symlink"),
            ("new", "directory"),
            ("one", "directory")
        ]
    );
    let deep = post("list", json!({"path": root, "depth": 3})).await.json();
    assert_eq!(deep["entries"].as_array().unwrap().len(), 9);
    let flat = post("list", json!({"path": root, "depth": 0})).await.json();
    assert_eq!(flat, list);

    let moved = post("move", json!({"source": name, "destination": format!("{root}/made/up/moved")})).await;
    assert_eq!(moved.status, 200, "{}", moved.text());
    assert_eq!(moved.json()["entry"]["name"], "moved");
    assert_eq!(std::fs::read(format!("{root}/made/up/moved")).unwrap(), b"contents");
    assert_eq!(post("remove", json!({"path": format!("{root}/made")})).await.status, 204);
    assert_eq!(post("remove", json!({"path": format!("{root}/made")})).await.status, 404);
}

/// The memory of this process, in which the control plane runs.
fn resident_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<usize>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn large_files_pass_through_without_being_held() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("large");
    let url = format!("/v1/sandboxes/{id}/files?path={}", path.display());

    let peak = Arc::new(AtomicUsize::new(0));
    let watching = tokio::spawn({
        let peak = Arc::clone(&peak);
        async move {
            loop {
                peak.fetch_max(resident_mib(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    let before = resident_mib();
    for announced in [true, false] {
        let mut request = world.client.request(Method::PUT, &url);
        if announced {
            request = request.header("content-length", PIECE * PIECES);
        }
        let answer = world.client.whole(request.body(large_body()).unwrap()).await;
        assert_eq!(answer.status, 204, "{}", answer.text());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (PIECE * PIECES) as u64);

        let response =
            world.client.send(world.client.request(Method::GET, &url).body(full("")).unwrap()).await;
        assert_eq!(response.headers()["content-length"], (PIECE * PIECES).to_string().as_str());
        let (mut length, mut numbers) = (0_usize, 0);
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            // The numbers lie at the beginnings of the pieces, wherever the frames are cut.
            let first = length.div_ceil(PIECE) * PIECE;
            for start in (first..length + data.len()).step_by(PIECE) {
                if let Some(number) = data.get(start - length..start - length + 8) {
                    assert_eq!(number, (start as u64 / PIECE as u64).to_le_bytes());
                    numbers += 1;
                }
            }
            length += data.len();
        }
        assert_eq!(length, PIECE * PIECES);
        assert!(numbers > PIECES / 2);
    }
    watching.abort();
    // The test's own client and the fake agent's tunnel are in the same process; 64 MiB would show.
    let grown = peak.load(Ordering::Relaxed) - before;
    assert!(grown < 40, "the process grew by {grown} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_have_a_cap_and_streams_have_none() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("large");
    // A little more than 100 MiB, of which the server need not take all.
    let head = format!(
        "--XX\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{}\r\n\
         --XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n",
        path.display()
    );
    for (route, status) in [("stream/write", 204), ("write", 413)] {
        let pieces = stream::iter((0..1620).map(|_| Ok(Frame::data(Bytes::from_static(&[7; PIECE])))));
        let body = stream::iter([Ok(Frame::data(Bytes::from(head.clone())))])
            .chain(pieces)
            .chain(stream::iter([Ok(Frame::data(Bytes::from_static(b"\r\n--XX--\r\n")))]));
        let request = world
            .client
            .request(Method::POST, &format!("/v1/sandboxes/{id}/files/{route}"))
            .header("content-type", "multipart/form-data; boundary=XX")
            .body(StreamBody::new(body).boxed_unsync());
        let answer = world.client.whole(request.unwrap()).await;
        assert_eq!(answer.status, status, "{route}: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_that_is_refused_is_told_why() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let url = format!("/v1/sandboxes/{id}/files?path={}", scratch.path().display());
    for announced in [true, false] {
        let mut request = world.client.request(Method::PUT, &url);
        if announced {
            request = request.header("content-length", PIECE * 128);
        }
        let answer = world.client.whole(request.body(body_of(128)).unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "invalid_request"));
        assert!(answer.text().contains("directory"), "{}", answer.text());
    }
    let wrong = world.client.with_key("wrn_00000000000000000000000000000000");
    let request = wrong.request(Method::PUT, &format!("/v1/sandboxes/{id}/files?path=/tmp/x"));
    let answer = wrong.whole(request.body(large_body()).unwrap()).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "unauthorized"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_is_no_file() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("half");
    let url = format!("/v1/sandboxes/{id}/files?path={}", path.display());
    let broken = || {
        let pieces = stream::iter((0..64).map(|number| Ok(Frame::data(piece(number)))));
        let end = stream::iter([Err(io::Error::other("the caller has gone"))]);
        StreamBody::new(pieces.chain(end)).boxed_unsync()
    };
    for announced in [false, true] {
        let mut request = world.client.request(Method::PUT, &url);
        if announced {
            request = request.header("content-length", PIECE * 128);
        }
        assert!(world.client.try_send(request.body(broken()).unwrap()).await.is_err());
    }
    // A form without its end.
    let (kind, mut body) = form(true, path.to_str().unwrap(), &[1; 5000]);
    body.truncate(body.len() - 10);
    let form = send_form(&world.client, &format!("/v1/sandboxes/{id}/files/write"), (kind, body)).await;
    assert_eq!((form.status.as_u16(), form.code().as_str()), (400, "invalid_request"));

    // The log says that it was not written, whatever the guest has kept of it.
    let database = world.database().await;
    eventually("three failures are recorded", async || {
        let rows: Vec<String> =
            sqlx::query_scalar("SELECT status FROM audit_log WHERE action = 'file_write'")
                .fetch_all(&database)
                .await
                .unwrap();
        assert!(!rows.iter().any(|status| status == "success"), "{rows:?}");
        rows.len() == 3
    })
    .await;
    // And the sandbox is none the worse for it.
    assert_eq!(world.client.shell(&id, "true").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_is_no_file() {
    let world = World::new().await;
    let id = world.sandbox().await;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("large");
    std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let url = format!("/v1/sandboxes/{id}/files?path={}", path.display());
    let response = world.client.send(world.client.request(Method::GET, &url).body(full("")).unwrap()).await;
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    world.agent.crash(&id);
    let mut last = Ok(());
    while let Some(frame) = body.frame().await {
        last = frame.map(drop);
    }
    assert!(last.is_err(), "half a file looked like a whole one");
}
