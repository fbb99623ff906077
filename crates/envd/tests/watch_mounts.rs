//! A file system that others can change, and one that does not answer: a FUSE mount that this test serves, or does not.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{io::Write, net::TcpStream, time::Duration};

use connectrpc::{ErrorCode, client::CallOptions};
use harness::{
    Agent, command,
    fuse::{Mount, of_directory},
    run,
};
use http::Request;
use wrenn_proto::{
    filesystem::{CreateWatcherRequest, StatRequest, WatchDirRequest},
    process::StartRequest,
};

#[tokio::test]
async fn what_others_can_change_is_watched_only_if_asked_for() {
    let Some(mount) = Mount::new() else { return };
    mount.serve(of_directory);
    let agent = Agent::start();
    let client = agent.filesystem();
    let polled = |allow_network_mounts| CreateWatcherRequest {
        path: mount.path(),
        recursive: true,
        allow_network_mounts,
        ..Default::default()
    };
    let streamed = |allow_network_mounts| WatchDirRequest {
        path: mount.path(),
        allow_network_mounts,
        ..Default::default()
    };
    let refused = client.create_watcher(polled(false)).await.err().unwrap();
    assert_eq!(refused.code, ErrorCode::InvalidArgument);
    assert_eq!(refused.message, Some(format!("cannot watch path on network filesystem: {}", mount.path())));
    let mut stream = client.watch_dir(streamed(false)).await.unwrap();
    let first = stream.message::<wrenn_proto::filesystem::WatchDirResponse>().await;
    let error = first.err().or_else(|| stream.error().cloned()).unwrap();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    client.create_watcher(polled(true)).await.unwrap();
    let mut stream = client.watch_dir(streamed(true)).await.unwrap();
    assert!(stream.message::<wrenn_proto::filesystem::WatchDirResponse>().await.unwrap().is_some());
}

/// Asks for a file, and does not wait for it.
fn ask_for_file(agent: &Agent, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(agent.address).unwrap();
    let request = format!("GET /files?path={} HTTP/1.1\r\nhost: x\r\n\r\n", harness::encode(path));
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

/// How many threads wait for a file system that another program serves.
fn waiting_threads(pid: u32) -> usize {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let places = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("wchan")).ok());
    // In one directory only the first of them is asked about; the others wait for that one.
    let idle = |place: &String| ["0", "futex", "epoll"].iter().any(|word| place.contains(word));
    places.filter(|place| !place.is_empty() && !idle(place)).count()
}

/// However many ask for what does not answer, and in which way, programs start.
#[tokio::test]
async fn threads_that_wait_for_files_are_not_those_on_which_programs_start() {
    let Some(mount) = Mount::new() else { return };
    let agent = Agent::start();
    let stats = (0..30).map(|index| {
        let (client, path) = (agent.filesystem(), format!("{}/{index}", mount.path()));
        tokio::spawn(async move { drop(client.stat(StatRequest { path, ..Default::default() }).await) })
    });
    let begin = |start: StartRequest| {
        let client = agent.processes();
        tokio::spawn(async move { drop(harness::run_as(&client, start, CallOptions::default()).await) })
    };
    let in_directory = || {
        let mut start = command(&["true"]);
        start.process.get_or_insert_default().cwd = Some(format!("{}/directory", mount.path()));
        start
    };
    // A program there, or one that is looked for there, of a start in a directory that answers.
    let program = || in_root(command(&[&format!("{}/program", mount.path())]));
    let searched = || {
        let mut start = in_root(command(&["program"]));
        start.process.get_or_insert_default().envs.insert("PATH".to_owned(), mount.path());
        start
    };
    let starts = (0..25).flat_map(|_| [begin(in_directory()), begin(program()), begin(searched())]);
    let mut asked: Vec<_> = stats.chain(starts).collect();
    let files: Vec<_> =
        (0..70).map(|index| ask_for_file(&agent, &format!("{}/{index}", mount.path()))).collect();
    // 24 of the service, 16 of files and 16 of starts.
    harness::observe::eventually(|| waiting_threads(agent.pid()) >= 56).await;
    for _ in 0..20 {
        is_alive(&agent, command(&["echo", "alive"])).await;
    }
    assert_eq!(waiting_threads(agent.pid()), 56);

    // Now the directory of those that name none does not answer either: they have 16 more.
    let init = Request::post("/init").header("content-type", "application/json");
    let body = serde_json::json!({ "defaultWorkdir": format!("{}/home", mount.path()) });
    assert_eq!(agent.send(init, body.to_string()).await.status, 204);
    asked.extend((0..40).map(|_| begin(command(&["true"]))));
    harness::observe::eventually(|| waiting_threads(agent.pid()) >= 72).await;
    for _ in 0..20 {
        is_alive(&agent, in_root(command(&["/bin/echo", "alive"]))).await;
    }
    assert_eq!(agent.get("/processes").await.status, 200);
    assert_eq!(waiting_threads(agent.pid()), 72);
    // The mount ends, and others have their turn.
    drop(mount);
    drop(files);
    for task in asked {
        tokio::time::timeout(harness::PATIENCE, task).await.unwrap().unwrap();
    }
    assert_eq!(agent.upload("/tmp/.wrenn-test-threads", "x").await.status, 200);
    std::fs::remove_file("/tmp/.wrenn-test-threads").unwrap();
}

async fn is_alive(agent: &Agent, start: StartRequest) {
    let client = agent.processes();
    let seen = tokio::time::timeout(harness::PATIENCE, run(&client, start)).await.unwrap();
    assert_eq!(seen.text(), "alive\n");
}

fn in_root(mut start: StartRequest) -> StartRequest {
    start.process.get_or_insert_default().cwd = Some("/".to_owned());
    start
}

#[tokio::test]
async fn a_file_system_that_does_not_answer_holds_up_nobody_else() {
    let Some(mount) = Mount::new() else { return };
    let agent = Agent::start();
    let waiting: Vec<_> = (0..10)
        .map(|index| {
            let (client, path) = (agent.filesystem(), format!("{}/{index}", mount.path()));
            tokio::spawn(
                async move { client.stat(StatRequest { path, ..Default::default() }).await.map(drop) },
            )
        })
        .collect();
    let watching = {
        let (client, path) = (agent.filesystem(), mount.path());
        let request = CreateWatcherRequest { path, allow_network_mounts: true, ..Default::default() };
        tokio::spawn(async move { client.create_watcher(request).await.map(drop) })
    };
    // One of them gives up; what it asked for goes on to hold its thread, and only that.
    let client = agent.filesystem();
    let request = StatRequest { path: mount.path(), ..Default::default() };
    let short = CallOptions::default().with_timeout(Duration::from_millis(200));
    let error = client.stat_with_options(request, short).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);

    assert_eq!(agent.get("/health").await.status, 204);
    assert_eq!(run(&agent.processes(), command(&["echo", "alive"])).await.text(), "alive\n");
    client.stat(StatRequest { path: "/".to_owned(), ..Default::default() }).await.unwrap();
    let request = CreateWatcherRequest { path: "/tmp".to_owned(), ..Default::default() };
    client.create_watcher(request).await.unwrap();
    assert!(waiting.iter().all(|it| !it.is_finished()) && !watching.is_finished());
    // The mount ends: so does all that waits for it.
    drop(mount);
    for waiting in waiting.into_iter().chain([watching]) {
        let done = tokio::time::timeout(harness::PATIENCE, waiting).await.unwrap().unwrap();
        assert!(done.is_err());
    }
}
