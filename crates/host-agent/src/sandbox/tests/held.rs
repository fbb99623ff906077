//! What an agent holds of its host does not grow with what it does: open files, threads, child processes.
//!
//! They are those of a process, and other tests run in this one. So the test begins itself anew, alone.

use std::{fs, process::Command};

use wrenn_types::SnapshotId;

use super::{
    Extent, Verb,
    lives::{RESUME, ask, created, end, live_alone},
    quiet,
};
use crate::{registry::Registry, sandbox::Handle};

/// Set for the process that is alone.
const ALONE: &str = "WRENN_TEST_ALONE";
/// How many times everything is done before it is counted: threads and pools are there then.
const WARM: usize = 10;
/// And while it is.
const ROUNDS: usize = 50;
/// How many threads more there may be: those that wait for the disk come and go with what is under way at once.
const THREADS: usize = 4;
/// For so many seconds of the clock of these tests, what ends by itself is waited for.
const SETTLE: usize = 120;

#[derive(Debug)]
struct Held {
    /// What is open, each by what it is.
    files: Vec<String>,
    threads: usize,
    children: usize,
}

fn held() -> Held {
    let listed = |path: &str| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let files = listed("/proc/self/fd").filter_map(|path| fs::read_link(path).ok());
    let mut files: Vec<String> = files.map(|target| target.to_string_lossy().into_owned()).collect();
    files.sort();
    let threads: Vec<_> = listed("/proc/self/task").collect();
    // A thread that has ended meanwhile has none.
    let children = threads.iter().map(|task| fs::read_to_string(task.join("children")).unwrap_or_default());
    let children = children.map(|words| words.split_whitespace().count()).sum();
    Held { files, threads: threads.len(), children }
}

/// Each verb that makes or ends a machine.
async fn round(registry: &Registry, handle: &Handle, number: usize) {
    ask(handle, Verb::Pause(Extent::Machine)).await.unwrap();
    ask(handle, RESUME).await.unwrap();
    if number.is_multiple_of(5) {
        let into = SnapshotId::random();
        ask(handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
        ask(handle, Verb::Rollback { to: into.clone() }).await.unwrap();
        registry.host().snapshots.delete(&into).unwrap();
        ask(handle, Verb::Pause(Extent::Disk)).await.unwrap();
        ask(handle, RESUME).await.unwrap();
        let other = created(registry).await;
        registry.destroy(&other.spec().id, None).await.unwrap();
    }
}

#[test]
fn many_pauses_and_resumes_leave_nothing_open() {
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let name = "sandbox::tests::held::many_pauses_and_resumes_leave_nothing_open";
        let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}\n{failed}");
        return;
    }
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        for number in 0..WARM {
            round(&registry, &handle, number).await;
        }
        quiet().await;
        let before = held();
        for number in 0..ROUNDS {
            round(&registry, &handle, number).await;
        }
        let mut after = held();
        for _ in 0..SETTLE {
            if after.files.len() <= before.files.len() && after.threads <= before.threads + THREADS {
                break;
            }
            quiet().await;
            after = held();
        }
        assert!(after.files.len() <= before.files.len(), "{before:#?}\n{after:#?}");
        assert!(after.threads <= before.threads + THREADS, "{} and {}", before.threads, after.threads);
        assert_eq!((before.children, after.children), (0, 0));
        end(world, &registry).await;
    });
}
