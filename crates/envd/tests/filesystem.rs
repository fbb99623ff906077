//! The filesystem service, over the wire, against a real agent.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of this is tests")]

mod harness;

use std::{fs, os::unix::fs::MetadataExt};

use harness::{Agent, as_user};
use wrenn_proto::filesystem::{
    FileType, ListDirRequest, MakeDirRequest, MoveRequest, RemoveRequest, StatRequest,
};

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
}

fn stat(path: impl Into<String>) -> StatRequest {
    StatRequest { path: path.into(), ..Default::default() }
}

fn make(path: impl Into<String>) -> MakeDirRequest {
    MakeDirRequest { path: path.into(), ..Default::default() }
}

fn remove(path: impl Into<String>) -> RemoveRequest {
    RemoveRequest { path: path.into(), ..Default::default() }
}

fn list(path: impl Into<String>, depth: u32) -> ListDirRequest {
    ListDirRequest { path: path.into(), depth, ..Default::default() }
}

fn rename(source: impl Into<String>, destination: impl Into<String>) -> MoveRequest {
    MoveRequest { source: source.into(), destination: destination.into(), ..Default::default() }
}

#[tokio::test]
async fn make_list_move_and_remove() {
    let place = Place::new();
    let client = place.agent.filesystem();
    let made = client.make_dir_with_options(make(place.path("a/b")), as_user("nobody")).await.unwrap();
    let entry = made.into_owned().entry.into_option().unwrap();
    assert_eq!((entry.owner.as_str(), entry.group.as_str()), ("nobody", "nogroup"));
    assert_eq!((entry.mode, entry.permissions.as_str()), (0o755, "drwxr-xr-x"));
    assert_eq!(fs::metadata(place.path("a")).unwrap().uid(), 65534);
    fs::write(place.path("a/file"), "hello").unwrap();
    fs::write(place.path("a/b/deep"), "").unwrap();

    let names = async |depth| {
        let answer = client.list_dir(list(place.path("a"), depth)).await.unwrap().into_owned();
        answer.entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
    };
    assert_eq!(names(0).await, ["b", "file"]);
    assert_eq!(names(1).await, ["b", "file"]);
    assert_eq!(names(2).await, ["b", "deep", "file"]);

    let moved = client.r#move(rename(place.path("a/file"), place.path("c/d/file"))).await.unwrap();
    let entry = moved.into_owned().entry.into_option().unwrap();
    assert_eq!((entry.path, entry.size), (place.path("c/d/file"), 5));
    assert_eq!(entry.r#type, FileType::FILE_TYPE_FILE);
    assert!(entry.modified_time.is_set());

    client.remove(remove(place.path("a"))).await.unwrap();
    client.remove(remove(place.path("a"))).await.unwrap();
    assert!(!fs::exists(place.path("a")).unwrap());
}

#[tokio::test]
async fn links_are_told_and_not_followed() {
    let place = Place::new();
    let client = place.agent.filesystem();
    fs::create_dir(place.path("real")).unwrap();
    fs::write(place.path("real/file"), "").unwrap();
    std::os::unix::fs::symlink("real", place.path("link")).unwrap();
    let entry =
        client.stat(stat(place.path("link"))).await.unwrap().into_owned().entry.into_option().unwrap();
    assert_eq!(entry.r#type, FileType::FILE_TYPE_DIRECTORY);
    assert_eq!(entry.symlink_target, Some(place.path("real")));
    assert_eq!(entry.path, place.path("link"));
    let listed = client.list_dir(list(place.path(""), 9)).await.unwrap().into_owned();
    let names: Vec<_> = listed.entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["link", "real", "file"]);
    client.remove(remove(place.path("link"))).await.unwrap();
    assert!(fs::exists(place.path("real/file")).unwrap());
}

#[tokio::test]
async fn paths_are_resolved_for_the_user() {
    let place = Place::new();
    let client = place.agent.filesystem();
    let path = async |given: &str| {
        client.stat(stat(given)).await.unwrap().into_owned().entry.into_option().unwrap().path
    };
    assert_eq!(path("~").await, "/root");
    assert_eq!(path("").await, "/root");
    assert_eq!(path("../etc/../etc/passwd").await, "/etc/passwd");
    assert_eq!(path("/").await, "/");
    let body = r#"{"defaultWorkdir":"/usr"}"#;
    assert_eq!(place.agent.send(http::Request::post("/init"), body).await.status, 204);
    assert_eq!(path("").await, "/usr");
    assert_eq!(path("~").await, "/root");
}

#[tokio::test]
async fn names_that_are_no_text_do_not_break_a_list() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let client = place.agent.filesystem();
    fs::write(place.directory.path().join(std::ffi::OsStr::from_bytes(b"odd\xff")), "x").unwrap();
    fs::write(place.path("even"), "").unwrap();
    fs::write(place.path("new\nline"), "").unwrap();
    let listed = client.list_dir(list(place.path(""), 1)).await.unwrap().into_owned();
    let names: Vec<_> = listed.entries.iter().map(|entry| (entry.name.as_str(), entry.size)).collect();
    assert_eq!(names, [("even", 0), ("new\nline", 0), ("odd\u{fffd}", 1)]);
}

#[tokio::test]
async fn a_move_to_another_file_system_is_a_move() {
    let place = Place::new();
    let client = place.agent.filesystem();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = elsewhere.path().join("a/tree").to_str().unwrap().to_owned();
    fs::create_dir_all(place.path("tree/sub")).unwrap();
    fs::write(place.path("tree/sub/file"), "content").unwrap();
    let moved = client.r#move(rename(place.path("tree"), &target)).await.unwrap().into_owned();
    assert_eq!(moved.entry.as_option().unwrap().path, target);
    assert_eq!(fs::read(format!("{target}/sub/file")).unwrap(), b"content");
    assert!(!fs::exists(place.path("tree")).unwrap());
    client.r#move(rename(format!("{target}/sub/file"), place.path("back"))).await.unwrap();
    assert_eq!(fs::read(place.path("back")).unwrap(), b"content");
}

#[tokio::test]
async fn an_entry_has_the_metadata_of_its_file() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    let set = rustix::fs::setxattr(
        place.path("file"),
        "user.e2b.purpose",
        b"test",
        rustix::fs::XattrFlags::empty(),
    );
    if set.is_err() {
        println!("skipped: no extended attributes here");
        return;
    }
    let client = place.agent.filesystem();
    let listed = client.list_dir(list(place.path(""), 1)).await.unwrap().into_owned();
    assert_eq!(listed.entries[0].metadata.get("purpose").map(String::as_str), Some("test"));
}

/// Every refusal of the service, as it is on the wire.
#[tokio::test]
async fn what_cannot_be_done_is_refused_in_the_words_of_the_contract() {
    use serde_json::json;
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    fs::create_dir_all(place.path("full/x")).unwrap();
    fs::create_dir_all(place.path("also/x")).unwrap();
    std::os::unix::fs::symlink("round", place.path("round")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("dangling")).unwrap();
    let path = |name: &str| place.path(name);
    let (file, full, nowhere, round) = (path("file"), path("full"), path("nowhere"), path("round"));
    let long = "x".repeat(300);
    let root = "root";
    let table = [
        ("Stat", json!({"path": nowhere}), root, "not_found", format!("file not found: {nowhere}")),
        ("Stat", json!({"path": path("file/x")}), root, "not_found", format!("file not found: {file}/x")),
        (
            "Stat",
            json!({"path": path("round/x")}),
            root,
            "failed_precondition",
            format!("cannot stat {round}/x: Too many levels of symbolic links (os error 40)"),
        ),
        (
            "Stat",
            json!({"path": path(&long)}),
            root,
            "invalid_argument",
            format!("cannot stat {}: File name too long (os error 36)", path(&long)),
        ),
        ("Stat", json!({"path": "a\0b"}), root, "invalid_argument", "path contains a zero byte".to_owned()),
        (
            "Stat",
            json!({"path": "x/".repeat(3000)}),
            root,
            "invalid_argument",
            "path is longer than 4095 bytes".to_owned(),
        ),
        (
            "Stat",
            json!({"path": "~root/x"}),
            root,
            "invalid_argument",
            "cannot expand user-specific home dir".to_owned(),
        ),
        ("Stat", json!({"path": "/"}), "nosuch", "unauthenticated", "invalid username: 'nosuch'".to_owned()),
        ("ListDir", json!({"path": nowhere}), root, "not_found", format!("path not found: {nowhere}")),
        (
            "ListDir",
            json!({"path": file}),
            root,
            "invalid_argument",
            format!("path is not a directory: {file}"),
        ),
        (
            "ListDir",
            json!({"path": round}),
            root,
            "failed_precondition",
            format!("cyclic symlink or chain >255 links at \"{round}\""),
        ),
        (
            "ListDir",
            json!({"path": path(&long)}),
            root,
            "invalid_argument",
            format!("cannot list {}: File name too long (os error 36)", path(&long)),
        ),
        (
            "MakeDir",
            json!({"path": full}),
            root,
            "already_exists",
            format!("directory already exists: {full}"),
        ),
        (
            "MakeDir",
            json!({"path": file}),
            root,
            "invalid_argument",
            format!("path already exists but it is not a directory: {file}"),
        ),
        (
            "MakeDir",
            json!({"path": path("file/x")}),
            root,
            "invalid_argument",
            format!("path already exists but it is not a directory: {file}/x"),
        ),
        (
            "MakeDir",
            json!({"path": path("dangling")}),
            root,
            "invalid_argument",
            format!("path already exists but it is not a directory: {}", path("dangling")),
        ),
        (
            "MakeDir",
            json!({"path": path("round/x")}),
            root,
            "failed_precondition",
            format!("cannot make the directory {round}/x: Too many levels of symbolic links (os error 40)"),
        ),
        (
            "MakeDir",
            json!({"path": path(&long)}),
            root,
            "invalid_argument",
            format!("cannot make the directory {}: File name too long (os error 36)", path(&long)),
        ),
        ("MakeDir", json!({"path": "/"}), root, "already_exists", "directory already exists: /".to_owned()),
        (
            "Move",
            json!({"source": nowhere, "destination": file}),
            root,
            "not_found",
            format!("source file not found: {nowhere}"),
        ),
        (
            "Move",
            json!({"source": full, "destination": path("full/x/y")}),
            root,
            "invalid_argument",
            format!("cannot move {full} into itself"),
        ),
        (
            "Move",
            json!({"source": file, "destination": path("file/x")}),
            root,
            "invalid_argument",
            format!("cannot move to {file}/x: not a directory"),
        ),
        (
            "Move",
            json!({"source": full, "destination": path("also")}),
            root,
            "invalid_argument",
            format!("cannot move to {}: Directory not empty (os error 39)", path("also")),
        ),
        (
            "Move",
            json!({"source": path("file/x"), "destination": nowhere}),
            root,
            "not_found",
            format!("source file not found: {file}/x"),
        ),
        (
            "Move",
            json!({"source": file, "destination": full}),
            root,
            "invalid_argument",
            format!("cannot move to {full}: Is a directory (os error 21)"),
        ),
        (
            "Move",
            json!({"source": full, "destination": file}),
            root,
            "invalid_argument",
            format!("cannot move to {file}: Not a directory (os error 20)"),
        ),
        (
            "Move",
            json!({"source": file, "destination": path("round/x")}),
            root,
            "failed_precondition",
            format!("cannot move to {round}/x: Too many levels of symbolic links (os error 40)"),
        ),
        (
            "Move",
            json!({"source": path("round/x"), "destination": nowhere}),
            root,
            "failed_precondition",
            format!("cannot move {round}/x: Too many levels of symbolic links (os error 40)"),
        ),
        (
            "Move",
            json!({"source": file, "destination": path(&long)}),
            root,
            "invalid_argument",
            format!("cannot move to {}: File name too long (os error 36)", path(&long)),
        ),
        (
            "Move",
            json!({"source": "/", "destination": nowhere}),
            root,
            "failed_precondition",
            format!("cannot move to {nowhere}: Device or resource busy (os error 16)"),
        ),
        (
            "Remove",
            json!({"path": path(&long)}),
            root,
            "invalid_argument",
            format!("cannot remove {}: File name too long (os error 36)", path(&long)),
        ),
        (
            "Remove",
            json!({"path": path("round/x")}),
            root,
            "failed_precondition",
            format!("cannot remove {round}/x: Too many levels of symbolic links (os error 40)"),
        ),
        (
            "Remove",
            json!({"path": "/../"}),
            root,
            "invalid_argument",
            "/ is the root of the file system".to_owned(),
        ),
        (
            "GetWatcherEvents",
            json!({"watcherId": "x"}),
            root,
            "not_found",
            "watcher with id x not found".to_owned(),
        ),
        (
            "RemoveWatcher",
            json!({"watcherId": ""}),
            root,
            "not_found",
            "watcher with id  not found".to_owned(),
        ),
        ("CreateWatcher", json!({"path": nowhere}), root, "not_found", format!("path {nowhere} not found")),
        (
            "CreateWatcher",
            json!({"path": file}),
            root,
            "invalid_argument",
            format!("path {file} not a directory"),
        ),
    ];
    for (method, body, user, code, message) in table {
        let answer = place.agent.call(&format!("filesystem.Filesystem/{method}"), user, &body).await;
        assert_eq!(answer.refusal(), (code.to_owned(), message), "{method} {body}");
    }
    assert!(fs::exists(path("full/x")).unwrap() && fs::exists(path("also/x")).unwrap());
}

/// Whatever a path is, there is an answer, and it is not that of a fault.
#[tokio::test]
async fn any_path_is_answered() {
    let place = Place::new();
    let mut paths: Vec<String> = [
        "~",
        "~~",
        "~root",
        ".",
        "..",
        "/.",
        "//",
        "/proc/self/fd/0/..",
        "/dev/null/",
        "\u{fffd}",
        "%00",
        "a\nb",
    ]
    .map(str::to_owned)
    .into();
    paths.push("/".repeat(5000));
    paths.push("../".repeat(2000));
    paths.push("é".repeat(127));
    for path in paths {
        for method in ["Stat", "ListDir"] {
            let body = serde_json::json!({"path": path});
            let answer = place.agent.call(&format!("filesystem.Filesystem/{method}"), "root", body).await;
            assert!(answer.status.as_u16() < 500, "{method} {path:?}: {:?}", answer.body);
        }
    }
}
