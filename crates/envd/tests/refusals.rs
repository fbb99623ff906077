//! Refusals that the machine is the reason for: another user, a full disk, mounts, limits. And what any refusal is on the
//! wire.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Stdio,
};

use connectrpc::ErrorCode;
use harness::{Agent, as_user, command, encode, mounts, run_as};
use http::Request;
use serde_json::{Value, json};

/// How many entries one list may hold.
const MAXIMUM_ENTRIES: usize = 100_000;

fn path(directory: &Path, name: &str) -> String {
    directory.join(name).to_str().unwrap().to_owned()
}

/// Calls methods of the file system service, each of which must be refused so.
async fn all_refused(agent: &Agent, user: &str, table: &[(&str, Value, &str, String)]) {
    for (method, body, code, message) in table {
        let answer = agent.call(&format!("filesystem.Filesystem/{method}"), user, body).await;
        assert_eq!(answer.refusal(), ((*code).to_owned(), message.clone()), "{method} {body}");
    }
}

/// Whether `/files` answers so, for reading and for writing.
async fn files_refused(agent: &Agent, path: &str, status: u16, down: &str, up: &str) {
    let answer = agent.get(&format!("/files?path={}", encode(path))).await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (status, down));
    let answer = agent.upload(path, "x").await;
    assert_eq!((answer.status.as_u16(), answer.message().as_str()), (status, up));
}

#[tokio::test]
async fn an_agent_that_is_not_root_says_what_it_may_not() {
    let directory = tempfile::tempdir().unwrap();
    let closed = directory.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::write(closed.join("file"), "x").unwrap();
    fs::write(directory.path().join("ours"), "x").unwrap();
    for path in [&closed, &directory.path().join("ours")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let agent = Agent::start_as_nobody(directory.path());

    let of = |name: &str| path(directory.path(), name);
    let (closed, inside, ours) = (of("closed"), of("closed/file"), of("ours"));
    let denied = |operation: &str, path: &str| {
        ("permission_denied", format!("cannot {operation} {path}: Permission denied (os error 13)"))
    };
    let row = |method, body, (code, message)| (method, body, code, message);
    let table = [
        row("Stat", json!({"path": inside}), denied("stat", &inside)),
        row("ListDir", json!({"path": closed}), denied("list", &closed)),
        row("MakeDir", json!({"path": of("new")}), denied("make the directory", &of("new"))),
        row("MakeDir", json!({"path": of("closed/new")}), denied("make the directory", &of("closed/new"))),
        row("Move", json!({"source": inside, "destination": "/tmp/x"}), denied("move", &inside)),
        row("Move", json!({"source": ours, "destination": of("other")}), denied("move to", &of("other"))),
        row("Remove", json!({"path": ours}), denied("remove", &ours)),
        row("Remove", json!({"path": closed}), denied("remove", &closed)),
        row("CreateWatcher", json!({"path": closed}), denied("watch", &closed)),
    ];
    all_refused(&agent, "nobody", &table).await;
    let said = |operation: &str| format!("cannot {operation} '{ours}': Permission denied (os error 13)");
    files_refused(&agent, &ours, 403, &said("read"), &said("write")).await;
    assert_eq!(fs::read(&ours).unwrap(), b"x");
}

#[tokio::test]
async fn a_disk_without_room_is_said_to_be_full() {
    mounts::separate();
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small");
    // The top, and two more.
    mounts::memory(&small, "size=1m,nr_inodes=3");
    let agent = Agent::start();
    let of = |name: &str| path(directory.path(), name);
    fs::write(of("large"), vec![1; 2 << 20]).unwrap();
    let full = |operation: &str, path: String| {
        format!("cannot {operation} {path}: No space left on device (os error 28)")
    };
    let table = [
        (
            "Move",
            json!({"source": of("large"), "destination": of("small/large")}),
            "resource_exhausted",
            full("move to", of("small/large")),
        ),
        (
            "MakeDir",
            json!({"path": of("small/a/b/c")}),
            "resource_exhausted",
            full("make the directory", of("small/a/b/c")),
        ),
    ];
    all_refused(&agent, "root", &table).await;
    assert_eq!(fs::metadata(of("large")).unwrap().len(), 2 << 20, "what cannot move stays");
    assert!(!fs::exists(of("small/large")).unwrap());
}

#[tokio::test]
async fn what_is_mounted_is_in_the_way_and_outlives_it() {
    mounts::separate();
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| path(directory.path(), name);
    fs::create_dir_all(of("tree/a")).unwrap();
    fs::create_dir(of("outside")).unwrap();
    fs::write(of("outside/file"), "content").unwrap();
    mounts::bind(of("outside"), of("tree/a/here"));
    mounts::memory(of("read-only"), "size=1m");
    mounts::memory(of("other"), "size=1m");
    fs::write(of("read-only/file"), "content").unwrap();
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount_remount(of("read-only"), flags, c"").unwrap();
    let agent = Agent::start();
    let busy = |operation: &str, path: String| {
        format!("cannot {operation} {path}: Device or resource busy (os error 16)")
    };
    let read_only = |operation: &str, path: String| {
        format!("cannot {operation} {path}: Read-only file system (os error 30)")
    };
    let (here, file) = (of("tree/a/here"), of("read-only/file"));
    let table = [
        ("Remove", json!({"path": of("tree")}), "failed_precondition", busy("remove", of("tree"))),
        ("Remove", json!({"path": here}), "failed_precondition", busy("remove", here.clone())),
        (
            "Move",
            json!({"source": of("tree"), "destination": of("other/tree")}),
            "failed_precondition",
            busy("move to", of("other/tree")),
        ),
        ("Remove", json!({"path": file}), "permission_denied", read_only("remove", file.clone())),
        (
            "MakeDir",
            json!({"path": of("read-only/new")}),
            "permission_denied",
            read_only("make the directory", of("read-only/new")),
        ),
        (
            "Move",
            json!({"source": of("outside"), "destination": of("read-only/new")}),
            "permission_denied",
            read_only("move to", of("read-only/new")),
        ),
    ];
    all_refused(&agent, "root", &table).await;
    assert_eq!(fs::read(of("outside/file")).unwrap(), b"content");
    assert_eq!(fs::read_dir(of("other")).unwrap().count(), 0);
    let answer = agent.upload(&file, "x").await;
    let message = format!("cannot write '{file}': Read-only file system (os error 30)");
    assert_eq!((answer.status.as_u16(), answer.message()), (403, message));
}

#[tokio::test]
async fn a_list_has_an_end() {
    mounts::separate();
    let directory = tempfile::tempdir().unwrap();
    mounts::memory(directory.path().join("many"), "nr_inodes=0");
    let of = |name: &str| path(directory.path(), name);
    // Their number is the same at any depth.
    fs::create_dir(of("many/deep")).unwrap();
    File::create(of("many/one")).unwrap();
    for index in 2..MAXIMUM_ENTRIES {
        fs::hard_link(of("many/one"), of(&format!("many/deep/{index}"))).unwrap();
    }
    let agent = Agent::start();
    let list = json!({"path": of("many"), "depth": 2});
    let answer = agent.call("filesystem.Filesystem/ListDir", "root", &list).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["entries"].as_array().unwrap().len(), MAXIMUM_ENTRIES);
    for name in ["many/deep/more", "many/deep/again"] {
        symlink("nowhere", of(name)).unwrap();
    }
    symlink("nowhere", of("many/deep/and again")).unwrap();
    let too_many = "there are more than 100000 entries: ask for less depth".to_owned();
    let refused = |path: String, depth: u32| {
        ("ListDir", json!({"path": path, "depth": depth}), "resource_exhausted", too_many.clone())
    };
    all_refused(&agent, "root", &[refused(of("many"), 2), refused(of("many/deep"), 1)]).await;
    let list = json!({"path": of("many"), "depth": 1});
    let answer = agent.call("filesystem.Filesystem/ListDir", "root", &list).await;
    assert_eq!(answer.json()["entries"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn without_a_user_database_nobody_is_served_by_mistake() {
    mounts::separate();
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start();
    // It is looked at for each request.
    mounts::memory("/etc", "size=1m");
    fs::create_dir("/etc/passwd").unwrap();
    let message = "cannot read the user database: Is a directory (os error 21)";
    let here = path(directory.path(), "");
    let table = ["Stat", "ListDir", "MakeDir", "Remove", "CreateWatcher"]
        .map(|method| (method, json!({"path": here}), "internal", message.to_owned()));
    all_refused(&agent, "root", &table).await;
    let error = run_as(&agent.processes(), command(&["/bin/true"]), Default::default()).await.unwrap_err();
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::Internal, Some(message)));
    files_refused(&agent, &path(directory.path(), "x"), 500, message, message).await;
    // Without the file there are no users but the one that always is.
    fs::remove_dir("/etc/passwd").unwrap();
    let row = ("Stat", json!({"path": "/"}), "unauthenticated", "invalid username: 'nobody'".to_owned());
    all_refused(&agent, "nobody", &[row]).await;
    assert_eq!(agent.call("filesystem.Filesystem/Stat", "root", json!({"path": "/"})).await.status, 200);
}

#[tokio::test]
async fn a_process_that_the_kernel_does_not_make_is_a_bad_request() {
    let directory = tempfile::tempdir().unwrap();
    // Nothing can be born in a directory that is no cgroup.
    let agent = Agent::start_with(&["--cgroup", &path(directory.path(), "")], Stdio::inherit());
    let error = run_as(&agent.processes(), command(&["/bin/true"]), as_user("nobody")).await.unwrap_err();
    let message = "cannot start a process: Clone: Bad file descriptor (os error 9)";
    assert_eq!((error.code, error.message.as_deref()), (ErrorCode::InvalidArgument, Some(message)));
}

/// A message in its frame.
fn frame(flags: u8, body: &str) -> Vec<u8> {
    [[flags].as_slice(), &u32::try_from(body.len()).unwrap().to_be_bytes(), body.as_bytes()].concat()
}

#[tokio::test]
async fn a_stream_is_refused_in_its_last_frame() {
    let agent = Agent::start();
    let call = async |method: &str, user: &str, body: Vec<u8>| {
        let request = Request::post(format!("/{method}"))
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .header("authorization", harness::basic(user));
        let answer = agent.send(request, body).await;
        assert_eq!(answer.status, 200, "{method}");
        assert_eq!(answer.headers["content-type"], "application/connect+json", "{method}");
        let body = answer.body.unwrap();
        let (head, rest) = body.split_at(5);
        assert_eq!((head[0], &head[1..]), (2, u32::try_from(rest.len()).unwrap().to_be_bytes().as_slice()));
        serde_json::from_slice::<Value>(rest).unwrap()
    };
    let start = json!({"process": {"cmd": "/bin/true"}}).to_string();
    let nobody = json!({"process": {"pid": 4_000_000_000_u32}}).to_string();
    let input = json!({"start": {"process": {"tag": "x"}}}).to_string();
    let (nowhere, file) =
        (json!({"path": "/no/where"}).to_string(), json!({"path": "/etc/passwd"}).to_string());
    let gone = "process with pid 4000000000 not found";
    let table = [
        ("process.Process/Start", "nosuch", &start, "unauthenticated", "invalid username: 'nosuch'"),
        ("process.Process/Start", "root", &"{}".to_owned(), "invalid_argument", "no process"),
        ("process.Process/Connect", "root", &nobody, "not_found", gone),
        ("process.Process/StreamInput", "root", &input, "not_found", "process with tag x not found"),
        ("filesystem.Filesystem/WatchDir", "root", &nowhere, "not_found", "path /no/where not found"),
        (
            "filesystem.Filesystem/WatchDir",
            "root",
            &file,
            "invalid_argument",
            "path /etc/passwd not a directory",
        ),
        ("filesystem.Filesystem/WatchDir", "nosuch", &file, "unauthenticated", "invalid username: 'nosuch'"),
    ];
    for (method, user, body, code, message) in table {
        let end = call(method, user, frame(0, body)).await;
        assert_eq!(end, json!({"error": {"code": code, "message": message}}), "{method}");
    }
    // What is no message at all, in words that are the library's.
    for body in [
        frame(0, "{"),
        frame(0, "[]"),
        frame(0, r#"{"process":7}"#),
        frame(0, "\u{0}"),
        frame(0, "{}")[..4].to_vec(),
        frame(0, "{}")[..6].to_vec(),
        frame(1, "{}"),
        Vec::new(),
    ] {
        let end = call("process.Process/Start", "root", body.clone()).await;
        assert!(end["error"]["code"].is_string() && end["error"]["message"].is_string(), "{body:?}: {end}");
    }
}
