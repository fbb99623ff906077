//! Watching directories, both ways, over the wire, against a real agent.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of this is tests")]

mod harness;

use std::{fs, path::Path, time::Duration};

use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, HttpClient},
};
use harness::{Agent, PATIENCE, as_user};
use wrenn_proto::filesystem::{
    __buffa::{oneof::watch_dir_response::Event, view::WatchDirResponseView},
    CreateWatcherRequest, EventType, FilesystemClient, FilesystemEvent, GetWatcherEventsRequest,
    MakeDirRequest, RemoveWatcherRequest, WatchDirRequest, WatchDirResponse,
};

const CREATE: EventType = EventType::EVENT_TYPE_CREATE;
const WRITE: EventType = EventType::EVENT_TYPE_WRITE;
const REMOVE: EventType = EventType::EVENT_TYPE_REMOVE;
const RENAME: EventType = EventType::EVENT_TYPE_RENAME;
const CHMOD: EventType = EventType::EVENT_TYPE_CHMOD;

struct Place {
    agent: Agent,
    client: FilesystemClient<HttpClient>,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self::of(Agent::start(), tempfile::tempdir().unwrap())
    }

    fn of(agent: Agent, directory: tempfile::TempDir) -> Self {
        Self { client: agent.filesystem(), agent, directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    async fn watcher(&self, request: CreateWatcherRequest) -> Result<String, ConnectError> {
        Ok(self.client.create_watcher(request).await?.into_owned().watcher_id)
    }

    async fn events(&self, id: &str) -> Result<Vec<FilesystemEvent>, ConnectError> {
        let request = GetWatcherEventsRequest { watcher_id: id.to_owned(), ..Default::default() };
        Ok(self.client.get_watcher_events(request).await?.into_owned().events)
    }

    async fn remove(&self, id: &str) -> Result<(), ConnectError> {
        let request = RemoveWatcherRequest { watcher_id: id.to_owned(), ..Default::default() };
        self.client.remove_watcher(request).await.map(drop)
    }

    async fn stream(&self, request: WatchDirRequest, options: CallOptions) -> Result<Watching, ConnectError> {
        let stream = self.client.watch_dir_with_options(request, options).await?;
        let mut watching = Watching { stream };
        match watching.next().await? {
            Some(Event::Start(_)) => Ok(watching),
            other => panic!("{other:?} before the start"),
        }
    }

    /// How many inotify descriptors the agent has.
    fn descriptors(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.agent.pid())).unwrap();
        links
            .filter(|link| {
                let target = fs::read_link(link.as_ref().unwrap().path()).unwrap_or_default();
                target == Path::new("anon_inode:inotify")
            })
            .count()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.agent.pid()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }
}

type Body = <HttpClient as connectrpc::client::ClientTransport>::ResponseBody;

struct Watching {
    stream: connectrpc::client::ServerStream<Body, WatchDirResponseView<'static>>,
}

impl Watching {
    async fn next(&mut self) -> Result<Option<Event>, ConnectError> {
        let message = tokio::time::timeout(PATIENCE, self.stream.message::<WatchDirResponse>());
        match message.await.unwrap()? {
            Some(message) => Ok(Some(message.to_owned_message().event.unwrap())),
            None => self.stream.error().map_or(Ok(None), |error| Err(error.clone())),
        }
    }

    async fn event(&mut self) -> (String, EventType) {
        match self.next().await.unwrap() {
            Some(Event::Filesystem(event)) => told(std::slice::from_ref(&event)).remove(0),
            other => panic!("{other:?} is no event"),
        }
    }
}

fn polled(path: impl Into<String>) -> CreateWatcherRequest {
    CreateWatcherRequest { path: path.into(), ..Default::default() }
}

fn streamed(path: impl Into<String>) -> WatchDirRequest {
    WatchDirRequest { path: path.into(), ..Default::default() }
}

fn told(events: &[FilesystemEvent]) -> Vec<(String, EventType)> {
    events.iter().map(|event| (event.name.clone(), event.r#type.as_known().unwrap())).collect()
}

fn all(events: &[(&str, EventType)]) -> Vec<(String, EventType)> {
    events.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

#[tokio::test]
async fn a_new_file_is_three_events_and_they_are_there_at_once() {
    let place = Place::new();
    let id = place.watcher(polled(place.path(""))).await.unwrap();
    let mut stream = place.stream(streamed(place.path("")), CallOptions::default()).await.unwrap();
    for round in 0..50 {
        let name = format!("file-{round}");
        assert_eq!(place.agent.upload(&place.path(&name), "content").await.status, 200);
        let wanted = all(&[(&name, CREATE), (&name, CHMOD), (&name, WRITE)]);
        assert_eq!(told(&place.events(&id).await.unwrap()), wanted);
        for event in wanted {
            assert_eq!(stream.event().await, event);
        }
    }
    assert_eq!(place.events(&id).await.unwrap(), []);
}

#[tokio::test]
async fn each_change_in_the_words_of_the_contract() {
    let place = Place::new();
    let request = CreateWatcherRequest { include_entry: true, ..polled(place.path("")) };
    let id = place.watcher(request).await.unwrap();
    fs::write(place.path("a"), "x").unwrap();
    fs::set_permissions(place.path("a"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let events = place.events(&id).await.unwrap();
    assert_eq!(told(&events), all(&[("a", CREATE), ("a", WRITE), ("a", CHMOD)]));
    for event in &events {
        let entry = event.entry.as_option().unwrap();
        assert_eq!((&*entry.name, &*entry.path), ("a", &*place.path("a")));
    }
    assert_eq!(events[2].entry.as_option().map(|entry| (entry.size, entry.mode)), Some((1, 0o600)));
    fs::rename(place.path("a"), place.path("b")).unwrap();
    fs::remove_file(place.path("b")).unwrap();
    fs::write(place.path("a"), "").unwrap();
    let events = place.events(&id).await.unwrap();
    assert_eq!(told(&events), all(&[("a", RENAME), ("b", CREATE), ("b", REMOVE), ("a", CREATE)]));
    let with_entry: Vec<_> = events.iter().map(|event| event.entry.is_set()).collect();
    // Whether the one in the middle has one depends on when it was looked at.
    assert!(!with_entry[0] && !with_entry[2], "what is gone has none, though another took its name");
    assert!(with_entry[3]);
    let id = place.watcher(polled(place.path(""))).await.unwrap();
    fs::write(place.path("c"), "").unwrap();
    assert!(!place.events(&id).await.unwrap()[0].entry.is_set(), "not asked for");
}

#[tokio::test]
async fn new_directories_are_followed() {
    let place = Place::new();
    let flat = place.watcher(polled(place.path(""))).await.unwrap();
    let request = CreateWatcherRequest { recursive: true, ..polled(place.path("")) };
    let deep = place.watcher(request.clone()).await.unwrap();
    for round in 0..20 {
        let name = format!("new-{round}");
        let make = MakeDirRequest { path: place.path(&name), ..Default::default() };
        place.client.make_dir(make).await.unwrap();
        place.agent.upload(&place.path(&format!("{name}/file")), "content").await;
        let events = told(&place.events(&deep).await.unwrap());
        assert_eq!(events[0], (name.clone(), CREATE));
        let file = format!("{name}/file");
        let of_file: Vec<_> =
            events.iter().filter(|(name, _)| *name == file).map(|(_, kind)| *kind).collect();
        // Whether its note or a listing told of it depends on when the directory was seen; it is told once.
        assert!(
            of_file == [CREATE, CHMOD, WRITE]
                || of_file == [CREATE, WRITE]
                || of_file == [CREATE, WRITE, WRITE]
                || of_file == [CREATE, CHMOD, WRITE, WRITE]
                || of_file == [CREATE, WRITE, CHMOD, WRITE],
            "{of_file:?}"
        );
    }
    assert!(told(&place.events(&flat).await.unwrap()).iter().all(|(name, _)| !name.contains('/')));
}

#[tokio::test]
async fn a_stream_starts_lives_and_ends() {
    let place = Place::new();
    fs::create_dir(place.path("d")).unwrap();
    let often = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let mut stream = place.stream(streamed(place.path("d")), often).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Some(Event::Keepalive(_))));
    fs::write(place.path("d/x"), "").unwrap();
    assert_eq!(stream.event().await, ("x".to_owned(), CREATE));
    fs::remove_dir_all(place.path("d")).unwrap();
    assert_eq!(stream.event().await, ("x".to_owned(), REMOVE));
    assert_eq!(stream.event().await, (".".to_owned(), REMOVE));
    assert_eq!(stream.next().await.unwrap(), None);

    // The agent's own clock, not the client's.
    let short = CallOptions::default().with_header("connect-timeout-ms", "300");
    let mut stream = place.stream(streamed(place.path("")), short).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
    assert_eq!(error.message.as_deref(), Some("the time limit of this watch has passed"));
}

#[tokio::test]
async fn a_watch_ends_with_its_client() {
    let place = Place::new();
    let id = place.watcher(polled(place.path(""))).await.unwrap();
    let stream = place.stream(streamed(place.path("")), CallOptions::default()).await.unwrap();
    assert!(place.descriptors() >= 2);
    drop(stream);
    place.remove(&id).await.unwrap();
    let gone = async {
        while place.descriptors() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    assert_eq!(place.events(&id).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused_in_the_words_of_the_contract() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    std::os::unix::fs::symlink("round", place.path("round")).unwrap();
    let (file, nowhere) = (place.path("file"), place.path("nowhere"));
    let table = [
        (nowhere.clone(), ErrorCode::NotFound, format!("path {nowhere} not found")),
        (file.clone(), ErrorCode::InvalidArgument, format!("path {file} not a directory")),
        (format!("{file}/x"), ErrorCode::InvalidArgument, format!("path {file}/x not a directory")),
        ("a\0b".to_owned(), ErrorCode::InvalidArgument, "path contains a zero byte".to_owned()),
        ("x".repeat(5000), ErrorCode::InvalidArgument, "path is longer than 4095 bytes".to_owned()),
        ("~root".to_owned(), ErrorCode::InvalidArgument, "cannot expand user-specific home dir".to_owned()),
        (
            place.path(&"x".repeat(300)),
            ErrorCode::InvalidArgument,
            format!("cannot watch {}: File name too long (os error 36)", place.path(&"x".repeat(300))),
        ),
        (
            place.path("round"),
            ErrorCode::FailedPrecondition,
            format!("cannot watch {}: Too many levels of symbolic links (os error 40)", place.path("round")),
        ),
    ];
    for (path, code, message) in table {
        for error in [
            place.watcher(polled(&path)).await.err(),
            place.stream(streamed(&path), CallOptions::default()).await.err(),
        ] {
            let error = error.expect("an error");
            assert_eq!((error.code, error.message.unwrap_or_default()), (code, message.clone()));
        }
    }
    let stranger = place.stream(streamed("/"), as_user("nosuch")).await.err().unwrap();
    assert_eq!(stranger.code, ErrorCode::Unauthenticated);
    for error in [place.events("w1").await.unwrap_err(), place.remove("w1").await.unwrap_err()] {
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(error.message.as_deref(), Some("watcher with id w1 not found"));
    }
}

#[tokio::test]
async fn a_loss_is_told_once_and_then_it_goes_on() {
    let place = Place::new();
    let request = CreateWatcherRequest { recursive: true, ..polled(place.path("")) };
    let id = place.watcher(request).await.unwrap();
    let mut stream = place.stream(streamed(place.path("")), CallOptions::default()).await.unwrap();
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    place.signal(rustix::process::Signal::STOP);
    let (one, another) = (place.path("one"), place.path("another"));
    fs::write(&one, "").unwrap();
    for _ in 0..=limit {
        fs::rename(&one, &another).unwrap();
        fs::rename(&another, &one).unwrap();
    }
    fs::create_dir(place.path("unseen")).unwrap();
    place.signal(rustix::process::Signal::CONT);

    assert_eq!(place.events(&id).await.unwrap().len(), limit, "those that there was room for");
    let error = place.events(&id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!(error.message.unwrap().starts_with("events were lost"));
    fs::write(place.path("unseen/file"), "").unwrap();
    assert_eq!(told(&place.events(&id).await.unwrap()), all(&[("unseen/file", CREATE)]));

    let mut count = 0;
    let error = loop {
        match stream.next().await {
            Ok(Some(Event::Filesystem(_))) => count += 1,
            Ok(other) => panic!("{other:?} instead of an error"),
            Err(error) => break error,
        }
    };
    assert_eq!((count, error.code), (limit, ErrorCode::ResourceExhausted));
}

#[tokio::test]
async fn there_is_a_limit_and_room_again_below_it() {
    // The kernel's limit is for all programs of a user: this one must not take it from the others of root.
    let directory = tempfile::tempdir().unwrap();
    let place = Place::of(Agent::start_as_nobody(directory.path()), directory);
    let mut ids = Vec::new();
    let error = loop {
        match place.watcher(polled(place.path(""))).await {
            Ok(id) => ids.push(id),
            Err(error) => break error,
        }
        assert!(ids.len() <= 512);
    };
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    // Ours, or the kernel's, which the machine shares among all of a user's programs.
    let limits = [
        "too many watchers".to_owned(),
        format!("cannot watch {}: there is no room for another watcher", place.directory.path().display()),
    ];
    assert!(limits.contains(error.message.as_ref().unwrap()), "{error:?}");
    let unique: std::collections::HashSet<_> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len());
    fs::write(place.path("x"), "").unwrap();
    for id in &ids {
        assert_eq!(told(&place.events(id).await.unwrap()), all(&[("x", CREATE)]));
        place.remove(id).await.unwrap();
    }
    place.watcher(polled(place.path(""))).await.unwrap();
}

/// Many small files: all of them listed in order, and all of them told.
#[tokio::test]
async fn many_small_files_are_listed_and_told() {
    let soak = std::env::var_os("WRENN_SOAK").is_some();
    let count: usize = if soak { 35_000 } else { 3_000 };
    let place = Place::new();
    let request = CreateWatcherRequest { recursive: true, ..polled(place.path("")) };
    let id = place.watcher(request).await.unwrap();
    let mut created = std::collections::HashSet::new();
    let mut wanted = std::collections::HashSet::new();
    for index in 0..count {
        let directory = format!("d{:03}/e{:02}", index % 100, index % 7);
        fs::create_dir_all(place.path(&directory)).unwrap();
        let name = format!("{directory}/f{index:05}");
        fs::write(place.path(&name), "x").unwrap();
        wanted.insert(name);
        // As a client would: now and then, while it goes on.
        if index % 1000 == 999 {
            take(&place, &id, &mut created).await;
        }
    }
    take(&place, &id, &mut created).await;
    created.retain(|name| name.contains("/f"));
    assert_eq!(created.len(), wanted.len());
    assert_eq!(created, wanted);
    let request =
        wrenn_proto::filesystem::ListDirRequest { path: place.path(""), depth: 3, ..Default::default() };
    let large = CallOptions::default().with_max_message_size(64 << 20);
    let listed = place.client.list_dir_with_options(request, large).await.unwrap().into_owned().entries;
    let paths: Vec<_> = listed.iter().map(|entry| Path::new(&entry.path)).collect();
    assert!(paths.is_sorted(), "depth first, each directory in the order of its names");
    assert_eq!(listed.iter().filter(|entry| entry.name.starts_with('f')).count(), count);
    if soak {
        println!("soak: small files watched and listed, {count}, no seed, each told once and listed once");
    }
}

async fn take(place: &Place, id: &str, created: &mut std::collections::HashSet<String>) {
    for (name, kind) in told(&place.events(id).await.unwrap()) {
        if kind == CREATE {
            assert!(created.insert(name.clone()), "{name} twice");
        }
    }
}
