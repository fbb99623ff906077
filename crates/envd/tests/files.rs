//! Files up and down, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::MetadataExt,
};

use bytes::Bytes;
use harness::{Agent, encode};
use http::Request;

struct Place {
    agent: Agent,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { agent: Agent::start(), directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn uri(&self, name: &str) -> String {
        format!("/files?path={}", encode(&self.path(name)))
    }
}

fn noise(length: usize) -> Bytes {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

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
    let peak = fs::read_to_string(format!("/proc/{}/status", place.agent.pid())).unwrap();
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    let peak: u64 = peak.split(' ').next().unwrap().parse().unwrap();
    assert!(peak < 28 * 1024, "the agent used {peak} KiB for a file of 32768 KiB");
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
async fn several_files_in_one_form() {
    let place = Place::new();
    let (one, two) = (place.path("ünï/one"), place.path("two"));
    let part = |name: &str, file: &str, content: &str| {
        format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{content}\r\n")
    };
    let send = async |uri: &str, parts: &[String]| {
        let body = format!("{}--XX--\r\n", parts.concat());
        let request = Request::post(uri).header("content-type", "multipart/form-data; boundary=XX");
        place.agent.send(request, body).await
    };
    let named = |path: &str| format!("; filename=\"{path}\"");
    let parts = [part("file", &named(&one), "1"), part("other", "", "x"), part("file", &named(&two), "22")];
    let answer = send("/files", &parts).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()[1]["name"], "two");
    assert_eq!(
        (fs::read_to_string(&one).unwrap(), fs::read_to_string(&two).unwrap()),
        ("1".into(), "22".into())
    );
    // The query names the file, and the part need not.
    let answer = send(&place.uri("three"), &[part("file", "", "333")]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(fs::read_to_string(place.path("three")).unwrap(), "333");

    let twice = send("/files", &[part("file", &named(&one), "1"), part("file", &named(&one), "2")]).await;
    assert_eq!((twice.status.as_u16(), twice.message()), (400, format!("path '{one}' is given twice")));
    let nameless = send("/files", &[part("file", "", "1")]).await;
    assert_eq!(nameless.status, 400);
    let none = send("/files", &[part("other", "", "1")]).await;
    assert_eq!(none.message(), "there is no part named 'file'");
    let broken = Request::post("/files").header("content-type", "multipart/form-data; boundary=XX");
    let half = part("file", &named(&place.path("half")), "half of it");
    let answer = place.agent.send(broken, half.trim_end().to_owned()).await;
    assert_eq!(answer.status, 400);
    assert!(!fs::exists(place.path("half")).unwrap());
}

#[tokio::test]
async fn half_a_body_leaves_no_file() {
    let place = Place::new();
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n",
        place.uri("half")
    );
    let mut stream = TcpStream::connect(place.agent.address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&noise(300_000)).unwrap();
    let wait = async |wanted: bool| {
        let look = async {
            let mut interval = tokio::time::interval(std::time::Duration::from_millis(5));
            while fs::exists(place.path("half")).unwrap() != wanted {
                interval.tick().await;
            }
        };
        tokio::time::timeout(harness::PATIENCE, look).await.unwrap();
    };
    wait(true).await;
    drop(stream);
    wait(false).await;
}

#[tokio::test]
async fn a_full_disk_leaves_no_file() {
    let place = Place::new();
    let mount = place.path("small");
    fs::create_dir(&mount).unwrap();
    let mounted =
        rustix::mount::mount("small", &mount, "tmpfs", rustix::mount::MountFlags::empty(), c"size=1m");
    mounted.expect("these tests run as root");
    let answer = place.agent.upload(&format!("{mount}/file"), noise(8 << 20)).await;
    let left = fs::exists(format!("{mount}/file")).unwrap();
    let fits = place.agent.upload(&format!("{mount}/file"), noise(500_000)).await;
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (507, "not enough disk space"));
    assert!(!left);
    assert_eq!(fits.status, 200);
}

#[tokio::test]
async fn parts_of_a_file() {
    let place = Place::new();
    for (name, length) in [("small", 1000_usize), ("large", 1_000_000)] {
        let content = noise(length);
        fs::write(place.path(name), &content).unwrap();
        let get = async |range: &str| {
            place.agent.send(Request::get(place.uri(name)).header("range", range), "").await
        };
        let answer = get("bytes=10-19").await;
        assert_eq!(answer.status, 206);
        assert_eq!(answer.headers["content-range"].to_str().unwrap(), format!("bytes 10-19/{length}"));
        assert_eq!(answer.body.unwrap(), content.slice(10..20));
        assert!(get("bytes=500-").await.body.unwrap() == content.slice(500..));
        assert!(get("bytes=-7").await.body.unwrap() == content.slice(length - 7..));
        let beyond = get("bytes=1000000-").await;
        assert_eq!(beyond.status, 416);
        assert_eq!(beyond.headers["content-range"].to_str().unwrap(), format!("bytes */{length}"));
        assert_eq!(get("nonsense").await.status, 200);
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
async fn what_cannot_be_done_is_refused_in_the_words_of_the_contract() {
    let place = Place::new();
    let agent = &place.agent;
    let root = place.path("");
    fs::create_dir(place.path("dir")).unwrap();
    fs::write(place.path("file"), "").unwrap();
    let (missing, dir) = (place.path("missing"), place.path("dir"));
    let octets = |uri: String| Request::post(uri).header("content-type", "application/octet-stream");
    let answers = [
        (agent.get(&place.uri("missing")).await, 404, format!("path '{missing}' does not exist")),
        (agent.get(&place.uri("file/x")).await, 404, format!("path '{root}file/x' does not exist")),
        (agent.get(&place.uri("dir")).await, 400, format!("path '{dir}' is a directory")),
        (agent.get("/files?path=/dev/zero").await, 400, "path '/dev/zero' is not a regular file".to_owned()),
        (agent.get("/files?path=a%00b").await, 400, "path contains a zero byte".to_owned()),
        (agent.get("/files?path=%ff").await, 400, "the query is not text".to_owned()),
        (agent.get("/files?path=/x&username=nosuch").await, 401, "invalid username: 'nosuch'".to_owned()),
        (agent.upload(&dir, "x").await, 400, format!("path '{dir}' is a directory")),
        (agent.upload("/dev/null", "x").await, 400, "path '/dev/null' is not a regular file".to_owned()),
        (
            agent.send(octets("/files".to_owned()), "x").await,
            400,
            "path is needed for this content type".to_owned(),
        ),
        (
            agent.send(octets(place.uri("z")).header("content-encoding", "gzip"), "x").await,
            415,
            "content encoding 'gzip' is not supported".to_owned(),
        ),
        (
            agent.send(Request::post("/files?path=/x").header("content-type", "text/plain"), "x").await,
            400,
            "content type 'text/plain' is not supported".to_owned(),
        ),
        (agent.send(Request::delete("/files?path=/x"), "").await, 405, "method not allowed".to_owned()),
    ];
    for (answer, status, message) in answers {
        assert_eq!((answer.status.as_u16(), answer.message()), (status, message));
    }
}
