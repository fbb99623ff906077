//! Files up and down, over the wire, against a real agent.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "all of this is tests, and says what was skipped"
)]

mod files_place;
mod harness;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::MetadataExt,
};

use bytes::Bytes;
use files_place::{FORM, Place, form, noise};
use harness::Agent;
use http::Request;

#[tokio::test]
async fn a_large_file_up_and_down() {
    let place = Place::new();
    let content = noise(32 << 20);
    let answer = place.agent.upload(&place.path("new/dir/large"), content.clone()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let path = place.path("new/dir/large");
    assert_eq!(answer.json(), serde_json::json!([{"path": path, "name": "large", "type": "file"}]));
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    let down = place.agent.get(&place.uri("new/dir/large")).await;
    assert_eq!((down.status.as_u16(), down.headers["content-length"].to_str().unwrap()), (200, "33554432"));
    assert!(down.body.unwrap() == content);
}

#[tokio::test]
async fn what_is_written_belongs_to_the_user() {
    let place = Place::new();
    let uri = format!("{}&username=nobody", place.uri("a/b/file"));
    let request = Request::post(uri).header("content-type", "application/octet-stream");
    let pieces = vec![Bytes::from("one "), Bytes::new(), Bytes::from("two")];
    assert_eq!(place.agent.send_pieces(request, pieces).await.status, 200);
    assert_eq!(fs::read_to_string(place.path("a/b/file")).unwrap(), "one two");
    for made in ["a", "a/b", "a/b/file"] {
        assert_eq!(fs::metadata(place.path(made)).unwrap().uid(), 65534, "{made}");
    }
    // A shorter file over a longer one.
    assert_eq!(place.agent.upload(&place.path("a/b/file"), "x").await.status, 200);
    assert_eq!(fs::read_to_string(place.path("a/b/file")).unwrap(), "x");
    assert_eq!(place.agent.upload(&place.path("empty"), "").await.status, 200);
    let empty = place.agent.get(&place.uri("empty")).await;
    assert_eq!(empty.headers["content-length"], "0");
}

#[tokio::test]
async fn half_a_body_leaves_no_file() {
    let agent = Agent::start();
    // What is on a disk is written by jobs, what is in memory as it comes.
    for parent in ["/var/tmp", "/dev/shm"] {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let path = directory.path().join("half");
        let head = format!(
            "POST /files?path={} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n\
             Content-Length: 1000000\r\n\r\n",
            path.display()
        );
        let mut stream = TcpStream::connect(agent.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&noise(900_000)).unwrap();
        let wait = async |length: Option<u64>| {
            let look = async {
                let mut interval = tokio::time::interval(std::time::Duration::from_millis(5));
                while fs::metadata(&path).ok().map(|metadata| metadata.len()) < length
                    || length.is_none() && path.exists()
                {
                    interval.tick().await;
                }
            };
            tokio::time::timeout(harness::PATIENCE, look).await.unwrap();
        };
        wait(Some(500_000)).await;
        drop(stream);
        wait(None).await;
    }
}

#[tokio::test]
async fn files_of_the_kernel_have_no_size_and_a_content() {
    let agent = Agent::start();
    let boot = agent.get("/files?path=/proc/sys/kernel/random/boot_id").await;
    assert_eq!(boot.status, 200);
    assert_eq!(boot.body.unwrap(), fs::read("/proc/sys/kernel/random/boot_id").unwrap());
    // One that is larger than what is read at once.
    let symbols = agent.get("/files?path=/proc/kallsyms").await;
    assert_eq!(symbols.body.unwrap().len(), fs::read("/proc/kallsyms").unwrap().len());
    let attribute = agent.get("/files?path=/sys/kernel/mm/transparent_hugepage/enabled").await;
    assert_eq!(attribute.body.unwrap(), fs::read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap());
}

#[tokio::test]
async fn a_file_that_shrinks_breaks_off_instead_of_ending() {
    let place = Place::new();
    let file = fs::File::create(place.path("file")).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut stream = TcpStream::connect(place.agent.address).unwrap();
    let request = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", place.uri("file"));
    stream.write_all(request.as_bytes()).unwrap();
    let mut start = [0; 16];
    stream.read_exact(&mut start).unwrap();
    assert!(start.starts_with(b"HTTP/1.1 200"));
    file.set_len(0).unwrap();
    let mut rest = Vec::new();
    // Closed or reset, but never the promised length.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 64 << 20);
}

#[tokio::test]
async fn several_files_in_one_form() {
    let place = Place::new();
    let (one, two) = (place.path("ünï/one"), place.path("two"));
    let send = async |uri: &str, parts: &[(&str, Option<&str>, &[u8])]| {
        place.agent.send(Request::post(uri).header("content-type", FORM), form(parts)).await
    };
    let parts: [(&str, Option<&str>, &[u8]); 3] =
        [("file", Some(&one), b"1"), ("other", None, b"x"), ("file", Some(&two), b"")];
    let answer = send("/files", &parts).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(
        answer.json(),
        serde_json::json!([
            {"path": one, "name": "one", "type": "file"},
            {"path": two, "name": "two", "type": "file"},
        ])
    );
    assert_eq!((place.read("ünï/one"), place.read("two")), (b"1".to_vec(), Vec::new()));
    // The query names the file, and the part need not, or says something else.
    let answer = send(&place.uri("three"), &[("file", None, b"333")]).await;
    assert_eq!((answer.status.as_u16(), place.read("three")), (200, b"333".to_vec()));
    let answer = send(&place.uri("four"), &[("file", Some("/else/where"), b"4")]).await;
    assert_eq!((answer.status.as_u16(), place.read("four")), (200, b"4".to_vec()));

    // A large one, in one piece and in many small ones, with what looks like a boundary inside.
    let content = [noise(3 << 20).as_ref(), b"\r\n--X\r\n--", &noise(100_000)].concat();
    let body = Bytes::from(form(&[("file", Some(&one), &content), ("file", Some(&two), b"2")]));
    let request = || Request::post("/files").header("content-type", FORM);
    assert_eq!(place.agent.send(request(), body.clone()).await.status, 200);
    assert!(place.read("ünï/one") == content);
    let pieces = (0..body.len()).step_by(9973).map(|at| body.slice(at..body.len().min(at + 9973)));
    assert_eq!(place.agent.send_pieces(request(), pieces.collect()).await.status, 200);
    assert!(place.read("ünï/one") == content && place.read("two") == b"2");

    // What came whole before something went wrong stays.
    let names: Vec<String> = (0..3).map(|number| place.path(&format!("many/{number}"))).collect();
    let mut parts: Vec<(&str, Option<&str>, &[u8])> =
        names.iter().map(|name| ("file", Some(name.as_str()), b"first".as_slice())).collect();
    parts.push(("file", Some(&names[1]), b"second"));
    assert_eq!(send("/files", &parts).await.status, 400);
    assert_eq!(place.read("many/1"), b"first");
}

#[tokio::test]
async fn metadata_comes_with_a_file_and_goes_with_the_next() {
    let place = Place::new();
    let answer = place.put("file", &[("X-Metadata-Author", "me"), ("x-metadata-empty", "")], "1").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let Some(metadata) = answer.json()[0].get("metadata").cloned() else {
        println!("skipped: this file system has no extended attributes");
        return;
    };
    assert_eq!(metadata, serde_json::json!({"author": "me", "empty": ""}));
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(place.path("file"), "user.e2b.author", &mut value).unwrap();
    assert_eq!(&value[..length], b"me");
    let answer = place.put("file", &[("x-metadata-other", "x")], "2").await;
    assert_eq!(answer.json()[0]["metadata"], serde_json::json!({"other": "x"}));
    let answer = place.put("file", &[], "3").await;
    assert_eq!(answer.json()[0].as_object().unwrap().len(), 3, "no metadata, no key of it: {answer:?}");
    assert!(rustix::fs::getxattr(place.path("file"), "user.e2b.other", &mut value).is_err());
    // In a form every file gets it.
    let names = [place.path("a"), place.path("b")];
    let body = form(&[("file", Some(&names[0]), b"a"), ("file", Some(&names[1]), b"b")]);
    let request = Request::post("/files").header("content-type", FORM).header("x-metadata-k", "v");
    let answer = place.agent.send(request, body).await.json();
    assert_eq!((&answer[0]["metadata"]["k"], &answer[1]["metadata"]["k"]), (&"v".into(), &"v".into()));
}

#[tokio::test]
async fn a_file_is_made_and_written_in_three_events() {
    use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
    let place = Place::new();
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    let flags =
        WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::MOVE | WatchFlags::DELETE;
    inotify::add_watch(&watch, place.path("").as_str(), flags).unwrap();
    let events = || {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&watch, &mut buffer);
        let mut events = Vec::new();
        while let Ok(event) = reader.next() {
            events.push(event.events());
        }
        events
    };
    let new = [ReadFlags::CREATE, ReadFlags::ATTRIB, ReadFlags::MODIFY];
    assert_eq!(place.put("plain", &[], "content").await.status, 200);
    assert_eq!(events(), new);
    let packed = files_place::gzip(&[b'x'; 200_000]);
    assert_eq!(place.put("packed", &[("content-encoding", "gzip")], packed).await.status, 200);
    assert_eq!(events(), new);
    let request = Request::post(place.uri("pieces")).header("content-type", "application/octet-stream");
    let pieces = vec![Bytes::from("one"), Bytes::from("two"), Bytes::from("three")];
    assert_eq!(place.agent.send_pieces(request, pieces).await.status, 200);
    assert_eq!(events(), new);
    let body = form(&[("file", None, b"content")]);
    let request = Request::post(place.uri("form")).header("content-type", FORM);
    assert_eq!(place.agent.send(request, body).await.status, 200);
    assert_eq!(events(), new);
    // One that is there gets its owner, is emptied and written; the last two are one event to who reads them together.
    assert_eq!(place.put("plain", &[], "other").await.status, 200);
    assert_eq!(events(), [ReadFlags::ATTRIB, ReadFlags::MODIFY]);
    assert_eq!(place.put("empty", &[], "").await.status, 200);
    assert_eq!(events(), [ReadFlags::CREATE, ReadFlags::ATTRIB]);
}
