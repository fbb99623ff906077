//! A file system that others can change, and one that does not answer: a FUSE mount that this test serves, or does not.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of this is tests")]

mod harness;

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    time::Duration,
};

use connectrpc::{ErrorCode, client::CallOptions};
use harness::{Agent, command, run};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use wrenn_proto::filesystem::{CreateWatcherRequest, StatRequest, WatchDirRequest};

/// The mount, in a mount namespace of this thread and of what it starts.
struct Mount {
    directory: tempfile::TempDir,
    device: File,
}

impl Mount {
    fn new() -> Option<Self> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                println!("skipped: no FUSE here: {error}");
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        harness::mounts::separate();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("test"), directory.path(), Some("fuse"), MsFlags::empty(), Some(&*data)).unwrap();
        Some(Self { directory, device })
    }

    fn path(&self) -> String {
        self.directory.path().to_str().unwrap().to_owned()
    }

    /// Answers what is asked of an empty directory, until the mount ends.
    fn serve(&self) {
        let mut device = self.device.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut request = vec![0; 1 << 17];
            while let Ok(length) = device.read(&mut request) {
                let field = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
                assert!(length >= 40);
                let (error, body) = answer(field(4));
                let Some(body) = body else { continue };
                let total = u32::try_from(16 + body.len()).unwrap();
                let mut reply = [total.to_ne_bytes(), error.to_ne_bytes()].concat();
                reply.extend(&request[8..16]);
                reply.extend(body);
                let _ = device.write_all(&reply);
            }
        });
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The error and the body of an answer, by the operation that was asked for; no body means no answer.
fn answer(operation: u32) -> (i32, Option<Vec<u8>>) {
    let body = match operation {
        2 => return (0, None),
        // The attributes of the root: an empty directory.
        3 => {
            let mut attributes = words(&[0; 26]);
            attributes[16] = 1;
            attributes[76..80].copy_from_slice(&0o40755_u32.to_ne_bytes());
            attributes[80] = 2;
            attributes
        }
        17 => words(&[0; 20]),
        26 => words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        27 => words(&[0; 4]),
        28 | 29 => Vec::new(),
        _ => return (-38, Some(Vec::new())),
    };
    (0, Some(body))
}

#[tokio::test]
async fn what_others_can_change_is_watched_only_if_asked_for() {
    let Some(mount) = Mount::new() else { return };
    mount.serve();
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
    // The mount goes first, also where this fails: until then not even the end of the agent is seen.
    let (agent, mount) = (Agent::start(), mount);
    let stats = (0..30).map(|index| {
        let (client, path) = (agent.filesystem(), format!("{}/{index}", mount.path()));
        tokio::spawn(async move { drop(client.stat(StatRequest { path, ..Default::default() }).await) })
    });
    let starts = (0..120).map(|index| {
        let (client, mut start) = (agent.processes(), command(&["true"]));
        let (process, there) = (start.process.get_or_insert_default(), format!("{}/{index}", mount.path()));
        match index % 3 {
            0 => process.cwd = Some(there),
            1 => process.cmd = there,
            _ => drop(process.envs.insert("PATH".to_owned(), format!("{there}:/usr/bin:/bin"))),
        }
        tokio::spawn(async move { drop(harness::run_as(&client, start, CallOptions::default()).await) })
    });
    let asked: Vec<_> = stats.chain(starts).collect();
    let files: Vec<_> =
        (0..70).map(|index| ask_for_file(&agent, &format!("{}/{index}", mount.path()))).collect();
    // 24 of the service, 16 of files and 8 of starts.
    harness::observe::eventually(|| waiting_threads(agent.pid()) >= 48).await;
    for _ in 0..20 {
        assert_eq!(run(&agent.processes(), command(&["echo", "alive"])).await.text(), "alive\n");
    }
    assert_eq!(waiting_threads(agent.pid()), 48);
    // The mount ends, and others have their turn.
    drop(mount);
    drop(files);
    for task in asked {
        tokio::time::timeout(harness::PATIENCE, task).await.unwrap().unwrap();
    }
    assert_eq!(agent.upload("/tmp/.wrenn-test-threads", "x").await.status, 200);
    std::fs::remove_file("/tmp/.wrenn-test-threads").unwrap();
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
