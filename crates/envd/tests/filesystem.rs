//! The filesystem service, over the wire, against a real agent.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{fs, os::unix::fs::MetadataExt};

use connectrpc::ErrorCode;
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
async fn what_cannot_be_done_is_refused_in_the_words_of_the_contract() {
    let place = Place::new();
    let client = place.agent.filesystem();
    fs::write(place.path("file"), "").unwrap();
    fs::create_dir_all(place.path("full/x")).unwrap();
    let file = place.path("file");
    let nowhere = place.path("nowhere");
    let check = |answer: Option<connectrpc::ConnectError>, code, message: String| {
        let error = answer.expect("an error");
        assert_eq!((error.code, error.message.unwrap_or_default()), (code, message));
    };
    check(client.stat(stat(&nowhere)).await.err(), ErrorCode::NotFound, format!("file not found: {nowhere}"));
    check(
        client.stat(stat(format!("{file}/x"))).await.err(),
        ErrorCode::NotFound,
        format!("file not found: {file}/x"),
    );
    check(
        client.list_dir(list(&nowhere, 1)).await.err(),
        ErrorCode::NotFound,
        format!("path not found: {nowhere}"),
    );
    check(
        client.list_dir(list(&file, 1)).await.err(),
        ErrorCode::InvalidArgument,
        format!("path is not a directory: {file}"),
    );
    check(
        client.make_dir(make(place.path("full"))).await.err(),
        ErrorCode::AlreadyExists,
        format!("directory already exists: {}", place.path("full")),
    );
    check(
        client.make_dir(make(&file)).await.err(),
        ErrorCode::InvalidArgument,
        format!("path already exists but it is not a directory: {file}"),
    );
    check(
        client.make_dir(make(format!("{file}/x"))).await.err(),
        ErrorCode::InvalidArgument,
        format!("path already exists but it is not a directory: {file}/x"),
    );
    check(
        client.r#move(rename(&nowhere, &file)).await.err(),
        ErrorCode::NotFound,
        format!("source file not found: {nowhere}"),
    );
    check(
        client.remove(remove("/../")).await.err(),
        ErrorCode::InvalidArgument,
        "/ is the root of the file system".to_owned(),
    );
    check(
        client.stat(stat("a\0b")).await.err(),
        ErrorCode::InvalidArgument,
        "path contains a zero byte".to_owned(),
    );
    check(
        client.stat_with_options(stat("/"), as_user("nosuch")).await.err(),
        ErrorCode::Unauthenticated,
        "invalid username: 'nosuch'".to_owned(),
    );
    let onto_full = client.r#move(rename(place.path("full/x"), "/proc/x")).await.unwrap_err();
    assert!(!onto_full.message.unwrap_or_default().is_empty());
}
