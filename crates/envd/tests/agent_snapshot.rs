//! Standing still for a snapshot: a real agent, real processes in a real cgroup.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "all of this is tests, and one that cannot run says so"
)]

mod harness;

use std::{
    fs,
    path::{Path, PathBuf},
};

use connectrpc::client::{CallOptions, HttpClient};
use harness::{Agent, Running, by_pid, command, shell, stdin};
use http::Request;
use wrenn_proto::process::{ProcessClient, SendInputRequest, SendSignalRequest, Signal};

/// A cgroup of the test's own. Whatever is in it ends with the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        for top in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let directory = Path::new(top).join(format!("wrenn-test-{}-{name}", std::process::id()));
            // Where the hierarchy of old is mounted, the first is no cgroup.
            let is_hierarchy = Path::new(top).join("cgroup.controllers").exists();
            if is_hierarchy && fs::create_dir(&directory).is_ok() {
                return Some(Self(directory));
            }
        }
        println!("skipped: no cgroup v2 of one's own can be made here");
        None
    }

    fn agent(&self) -> Agent {
        Agent::start_with(&["--cgroup", self.0.to_str().unwrap()], std::process::Stdio::inherit())
    }

    fn is_frozen(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).unwrap().lines().any(|line| line == "frozen 1")
    }

    /// Microseconds that its processes have run in all.
    fn used(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("cpu.stat")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
        line.parse().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        // It is busy until the last of them has ended.
        for _ in 0..100_000 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

const ENTROPY: &str = r#"{"entropy":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="}"#;

async fn post(agent: &Agent, path: &str, body: &str) -> u16 {
    agent.send(Request::post(path), body.to_owned()).await.status.as_u16()
}

/// The kernel says that a process is frozen a moment before it has put it aside, and counts that moment, in microseconds,
/// as the process's own. It runs no instruction of the program.
const KERNEL_TIME: u64 = 5000;

/// Counts as fast as it can, in a file and in its subprocesses.
const BUSY: &str = "echo ready; n=0; while :; do n=$((n+1)); echo $n > \"$0\"; (:); done";

#[tokio::test]
async fn none_runs_between_prepare_and_a_successful_init() {
    let Some(cgroup) = Cgroup::new("prepare") else { return };
    let directory = tempfile::tempdir().unwrap();
    let count = directory.path().join("count");
    // It may be stopped before it has counted at all.
    fs::write(&count, "").unwrap();
    let agent = cgroup.agent();
    let client = agent.processes();
    let start = command(&["/bin/sh", "-c", BUSY, count.to_str().unwrap()]);
    let mut busy = Running::start(&client, start, CallOptions::default()).await.unwrap();
    busy.until(|seen| seen.text() == "ready\n").await;
    let pid = busy.seen.pid;
    let listed = fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap();
    assert!(listed.lines().any(|line| line == pid.to_string()), "it was born in the cgroup");

    for turn in 0..3 {
        assert_eq!(post(&agent, "/snapshot/prepare", "").await, 204);
        assert!(cgroup.is_frozen());
        let (used, counted) = (cgroup.used(), fs::read_to_string(&count).unwrap());
        // This is where the snapshot is taken, and where each of its clones wakes up.
        for _ in 0..20 {
            assert_eq!(agent.get("/health").await.status, 204);
            for path in ["/process.Process/List", "/process.Process/Start", "/files?path=x", "/connect/80"] {
                let answer = agent.send(Request::post(path), "{}").await;
                assert_eq!(
                    (answer.status.as_u16(), answer.message().as_str()),
                    (503, "this guest is prepared for a snapshot")
                );
            }
            assert_eq!(agent.get("/metrics").await.status, 503);
            assert_eq!(post(&agent, "/init", r#"{"entropy":"AAAA"}"#).await, 400, "a bad one opens nothing");
            let answer = agent.send(Request::post("/unfreeze"), "").await;
            assert_eq!(
                (answer.status.as_u16(), answer.message().as_str()),
                (409, "the guest is closed: only /init opens it"),
                "nor does this"
            );
        }
        assert_eq!(post(&agent, "/snapshot/prepare", r#"{"limitMs":5000}"#).await, 204, "again is the same");
        assert_eq!(post(&agent, "/freeze", "").await, 204);
        assert!(cgroup.is_frozen());
        assert_eq!(fs::read_to_string(&count).unwrap(), counted, "turn {turn}");
        assert!(cgroup.used() - used < KERNEL_TIME, "turn {turn}: {used} {}", cgroup.used());

        assert_eq!(post(&agent, "/init", ENTROPY).await, 204);
        assert!(!cgroup.is_frozen());
        // It goes on counting, or this never ends.
        while cgroup.used() - used < 2 * KERNEL_TIME || fs::read_to_string(&count).unwrap() == counted {
            assert_eq!(agent.get("/health").await.status, 204);
        }
        assert_eq!(harness::run(&client, shell("echo hi")).await.text(), "hi\n");
    }
    let kill = SendSignalRequest {
        process: by_pid(pid).into(),
        signal: Signal::SIGNAL_SIGKILL.into(),
        ..Default::default()
    };
    client.send_signal(kill).await.unwrap();
    busy.finish().await.unwrap();
}

#[tokio::test]
async fn a_start_that_was_let_in_is_born_frozen() {
    let Some(cgroup) = Cgroup::new("born") else { return };
    let agent = cgroup.agent();
    let client = agent.processes();
    // As if `prepare` had come between the gate and the start.
    fs::write(cgroup.0.join("cgroup.freeze"), "1").unwrap();
    let task = tokio::spawn(async move { harness::run(&client, shell("echo hi")).await });
    let born = loop {
        assert_eq!(agent.get("/health").await.status, 204);
        if let Ok(pid) = fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap().trim().parse::<u32>() {
            break pid;
        }
    };
    assert_eq!(post(&agent, "/snapshot/prepare", "").await, 204);
    for _ in 0..20 {
        assert_eq!(agent.get("/health").await.status, 204);
    }
    // It has not come as far as becoming its own program.
    assert_eq!(fs::read_link(format!("/proc/{born}/exe")).unwrap(), Path::new(env!("CARGO_BIN_EXE_envd")));
    assert!(!task.is_finished());
    assert_eq!(post(&agent, "/init", ENTROPY).await, 204);
    assert_eq!(task.await.unwrap().text(), "hi\n");
}

async fn cat(client: &ProcessClient<HttpClient>) -> Running {
    let mut start = command(&["/bin/cat"]);
    start.stdin = Some(true);
    Running::start(client, start, CallOptions::default()).await.unwrap()
}

/// A line that is written to it comes back, and nothing else has come in so many turns.
async fn repeats(client: &ProcessClient<HttpClient>, cat: &mut Running, turn: usize) {
    let input = SendInputRequest {
        process: by_pid(cat.seen.pid).into(),
        input: stdin(b"line\n").into(),
        ..Default::default()
    };
    client.send_input(input).await.unwrap();
    cat.until(|seen| seen.text() == "line\n".repeat(turn)).await;
}

#[tokio::test]
async fn input_and_output_survive_standing_still() {
    let Some(cgroup) = Cgroup::new("cat") else { return };
    let agent = cgroup.agent();
    let client = agent.processes();
    let mut cat = cat(&client).await;
    for turn in 1..=3 {
        assert_eq!(post(&agent, "/freeze", "").await, 204);
        assert!(cgroup.is_frozen());
        assert_eq!(agent.get("/metrics").await.message(), "this guest is frozen");
        assert_eq!(post(&agent, "/unfreeze", "").await, 204);
        assert_eq!(post(&agent, "/unfreeze", "").await, 204);
        repeats(&client, &mut cat, turn).await;
    }
}

#[tokio::test]
async fn what_cannot_be_frozen_is_not_prepared_and_goes_on() {
    let agent = Agent::start();
    let answer = agent.send(Request::post("/snapshot/prepare"), "").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.message(), "cannot freeze the processes: there is no cgroup to freeze");
    assert_eq!(post(&agent, "/freeze", "").await, 503);
    assert_eq!(harness::run(&agent.processes(), shell("echo hi")).await.text(), "hi\n");
}

/// A file system that does not answer, for this thread and what it starts: whoever asks it cannot be stopped.
struct Silent {
    directory: tempfile::TempDir,
    _device: fs::File,
}

impl Silent {
    fn new() -> Option<Self> {
        let device = match fs::File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                println!("skipped: no FUSE here: {error}");
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        harness::mounts::separate();
        let number = std::os::fd::AsRawFd::as_raw_fd(&device);
        let data = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("test"), directory.path(), Some("fuse"), flags, Some(&*data)).unwrap();
        Some(Self { directory, _device: device })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.directory.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn what_does_not_stop_in_time_is_let_go_on_with_all_others() {
    let (Some(cgroup), Some(silent)) = (Cgroup::new("late"), Silent::new()) else { return };
    let agent = cgroup.agent();
    let client = agent.processes();
    let path = silent.directory.path().join("x");
    let start = command(&["/bin/sh", "-c", "echo ready; exec stat \"$0\"", path.to_str().unwrap()]);
    let mut stuck = Running::start(&client, start, CallOptions::default()).await.unwrap();
    let pid = stuck.until(|seen| seen.text() == "ready\n").await.pid;
    let place = || fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    harness::observe::eventually(|| ["fuse", "request_wait"].iter().any(|word| place().contains(word))).await;
    let mut cat = cat(&client).await;
    for turn in 1..=3 {
        let answer = agent.send(Request::post("/snapshot/prepare"), r#"{"limitMs":200}"#).await;
        let message = "cannot freeze the processes: the processes did not stop in time";
        assert_eq!((answer.status.as_u16(), answer.message().as_str()), (503, message));
        assert_eq!(fs::read_to_string(cgroup.0.join("cgroup.freeze")).unwrap().trim(), "0");
        repeats(&client, &mut cat, turn).await;
    }
    drop(silent);
    assert_eq!(stuck.finish().await.unwrap().end().exit_code, 1);
}

#[tokio::test]
async fn standing_still_needs_the_token() {
    let Some(cgroup) = Cgroup::new("token") else { return };
    let agent = cgroup.agent();
    assert_eq!(post(&agent, "/init", r#"{"accessToken":"secret"}"#).await, 204);
    for path in ["/snapshot/prepare", "/freeze", "/unfreeze"] {
        assert_eq!(post(&agent, path, "").await, 401, "{path}");
        assert_eq!(agent.get(path).await.status, 405, "{path}");
        let wrong = Request::post(path).header("x-access-token", "wrong");
        assert_eq!(agent.send(wrong, "").await.status, 401, "{path}");
    }
    assert!(!cgroup.is_frozen());
    let with_token = |path: &str| Request::post(path).header("x-access-token", "secret");
    let long = "x".repeat(5000);
    let table = [
        ("[]", 400, "the body is not an object"),
        ("{", 400, "the body is not what it must be: EOF while parsing"),
        (r#"{"trim":7}"#, 400, "the body is not what it must be: invalid type"),
        (r#"{"limitMs":0}"#, 400, "limitMs is not between 1 and 120000"),
        (r#"{"limitMs":9999999}"#, 400, "limitMs is not between 1 and 120000"),
        (long.as_str(), 413, "the body is too large or ended early"),
    ];
    for (body, status, message) in table {
        let answer = agent.send(with_token("/snapshot/prepare"), body.to_owned()).await;
        assert_eq!(answer.status, status, "{body}");
        assert!(answer.message().starts_with(message), "{}", answer.message());
    }
    assert_eq!(agent.send(with_token("/snapshot/prepare"), "{}").await.status, 204);
    assert_eq!(post(&agent, "/init", ENTROPY).await, 401, "a stranger does not open it");
    assert!(cgroup.is_frozen());
    assert_eq!(agent.send(with_token("/init"), ENTROPY).await.status, 204);
    assert!(!cgroup.is_frozen());
}
