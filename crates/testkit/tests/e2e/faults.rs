//! What goes wrong on a host. Each case has its own stack, because it harms it.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use wrenn_testkit::{Stack, StackOptions, stack};

use crate::{
    context::{OwnCase, Sandbox, own_case},
    lifecycle::process_exists,
};

/// The cases of this file.
pub(crate) fn cases() -> Vec<OwnCase> {
    vec![
        own_case("faults::an_interrupt_destroys_the_sandboxes_and_ends_well", interrupt),
        own_case(
            "faults::after_kill_9_of_everything_the_next_start_collects_its_own_and_keeps_what_is_saved",
            kill_everything,
        ),
        own_case("faults::a_stack_that_is_stopped_and_started_again_can_leave_what_runs", upgrade),
        own_case("faults::a_killed_agent_is_followed_by_one_that_goes_on", killed_agent),
        own_case("faults::a_lost_control_plane_pauses_what_runs_if_asked_to", lost_control_plane),
        own_case("faults::two_stacks_do_not_see_each_other", two_stacks),
        own_case("faults::postgres_gone_for_ten_seconds_is_survived", postgres_gone),
        own_case("faults::a_full_disk_is_named_and_leaves_nothing", full_disk),
        own_case("faults::a_missing_monitor_is_named", missing_vmm),
    ]
}

/// What of an instance is on the machine: processes, directories, namespaces, control groups.
pub(crate) fn left_of(instance: &str) -> Result<Vec<String>> {
    let mut left = Vec::new();
    if process_exists(&format!("guest=wrenn-{instance}-"))? {
        left.push("a machine".to_owned());
    }
    if let Ok(entries) = std::fs::read_dir(format!("/run/wrenn/{instance}/vm")) {
        left.extend(entries.flatten().map(|entry| entry.path().display().to_string()));
    }
    left.extend(crate::host::groups(instance).map(|groups| format!("control groups {groups:?}")));
    for entry in std::fs::read_dir("/run/wrenn/slots").into_iter().flatten().flatten() {
        if std::fs::read_to_string(entry.path()).is_ok_and(|owner| owner.contains(instance)) {
            let name = format!("/run/netns/wrenn-ns-{}", entry.file_name().to_string_lossy());
            if Path::new(&name).exists() {
                left.push(name);
            }
        }
    }
    Ok(left)
}

async fn interrupt() -> Result<()> {
    let running = Stack::start(StackOptions::default()).await?;
    let instance = running.instance()?;
    let mut kept = Vec::new();
    for _ in 0..2 {
        kept.push(Sandbox::create(running.client()).await?);
    }
    ensure!(process_exists(&format!("guest=wrenn-{instance}-"))?, "there are machines");
    let sandboxes = running.dir().join("agent/sandboxes");
    // The directory goes with the stack, so it is looked at by the number of its entries before.
    ensure!(std::fs::read_dir(&sandboxes)?.count() == 2, "two records");
    running.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    ensure!(!Path::new(&format!("/run/wrenn/{instance}")).exists(), "nor a directory of sockets");
    Ok(())
}

/// Every process below this one, itself last.
pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut tasks: Vec<u32> = children.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // A child belongs to the thread that made it.
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(entry.path().join("children")).unwrap_or_default();
        tasks.extend(text.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    tasks.sort_unstable();
    tasks.dedup();
    for child in tasks {
        found.extend(descendants(child));
    }
    found.push(pid);
    found
}

async fn kill_everything() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("wrenn-test-").tempdir()?;
    let options = || StackOptions { dir: Some(dir.path().to_owned()), ..StackOptions::default() };
    let first = Stack::start(options()).await?;
    let (instance, key) = (first.instance()?, first.key().to_owned());
    let bystander = Stack::start(StackOptions::default()).await?;
    let mut other = Sandbox::create(bystander.client()).await?;
    let lost = Sandbox::create(first.client()).await?;
    let mut resting = Sandbox::create(first.client()).await?;
    resting.output("echo resting > /tmp/state").await?;
    let path = resting.path("/pause");
    resting.client.post(&path, &json!({})).await?.expect(200)?;
    let records = dir.path().join("agent/sandboxes");
    ensure!(records.join(&lost.id).exists(), "there is a record");

    // From the top, so that nobody restarts what is killed below.
    let mut pids = descendants(first.pid().context("it runs")?);
    pids.reverse();
    for pid in pids {
        let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL);
    }
    let uplink = first.ended().await?;
    ensure!(!left_of(&instance)?.is_empty(), "a kill leaves something, else this proves nothing");

    let second = Stack::start(StackOptions { uplink: Some(uplink), ..options() }).await?;
    ensure!(second.instance()? == instance && second.key() == key, "the same stack");
    ensure!(!records.join(&lost.id).exists(), "what was lost is collected");
    ensure!(!process_exists(&format!("guest=wrenn-{instance}-{}", lost.id))?, "its machine too");
    let mut client = second.client();
    // Its row may have been lost with the last moments of the database: then it is one that never came up,
    // and the control plane gives its host a while before it says so.
    crate::lifecycle::wait_for_status(&mut client, &lost.id, "stopped|error", Duration::from_secs(60))
        .await?;
    crate::lifecycle::wait_for_status(&mut client, &resting.id, "paused", Duration::from_secs(60)).await?;
    let mut resting = Sandbox { id: resting.id, client: second.client() };
    let path = resting.path("/resume");
    resting.client.post(&path, &json!({})).await?.expect(200)?;
    ensure!(resting.output("cat /tmp/state").await?.trim() == "resting", "what was saved is not lost");
    let mut fresh = Sandbox::create(second.client()).await?;
    ensure!(fresh.output("echo works").await?.trim() == "works", "a new one works");
    ensure!(other.output("echo unharmed").await?.trim() == "unharmed", "the bystander's does too");
    second.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    bystander.stop().await
}

/// As at an upgrade: every process of the stack is another one afterwards, and no sandbox is.
async fn upgrade() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("wrenn-test-").tempdir()?;
    let options = |action: &str| StackOptions {
        dir: Some(dir.path().to_owned()),
        environment: vec![("WRENN_ON_STOP".to_owned(), action.to_owned())],
        ..StackOptions::default()
    };
    let first = Stack::start(options("leave")).await?;
    let instance = first.instance()?;
    let template = json!({ "vcpus": 2, "memory_mb": 256, "envs": { "COLOUR": "green" } });
    let mut sandbox = Sandbox::create_with(first.client(), &template).await?;
    let (id, path) = (sandbox.id.clone(), sandbox.path(""));
    let created = sandbox.client.get(&path).await?.expect(200)?.json();
    let before = sandbox.output("sleep 1000 >/dev/null 2>&1 & echo $! > /tmp/pid; cat /tmp/pid").await?;
    let machine = format!("guest=wrenn-{instance}-{id}");
    let agent = agent_of(&first)?;
    kill(Pid::from_raw(i32::try_from(first.pid().context("it runs")?)?), Signal::SIGINT)?;
    let uplink = first.ended().await?;
    ensure!(kill(agent, None).is_err(), "the agent is gone");
    ensure!(process_exists(&machine)?, "its machine goes on");

    let second = Stack::start(StackOptions { uplink: Some(uplink), ..options("destroy") }).await?;
    let mut sandbox = Sandbox { id: id.clone(), client: second.client() };
    let told = sandbox.client.get(&sandbox.path("")).await?.expect(200)?.json();
    ensure!(told["status"] == "running", "{told}");
    for (name, value) in
        [("vcpus", json!(2)), ("memory_mb", json!(256)), ("template", created["template"].clone())]
    {
        ensure!(told[name] == value, "{name}: {told}");
    }
    let line = "kill -0 $(cat /tmp/pid) && cat /tmp/pid && echo $COLOUR";
    let after = sandbox.output(line).await?;
    ensure!(after == format!("{before}green\n"), "{before:?} became {after:?}");
    second.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

/// The process id of the host agent of a stack.
pub(crate) fn agent_of(stack: &Stack) -> Result<Pid> {
    part_of(stack, "agent")
}

/// The process id of a part of a stack, by its subcommand.
fn part_of(stack: &Stack, name: &str) -> Result<Pid> {
    let pids = descendants(stack.pid().context("it runs")?);
    let is_it = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(name.as_bytes())
    };
    let pid = pids.into_iter().find(is_it).with_context(|| format!("there is a process {name}"))?;
    Ok(Pid::from_raw(i32::try_from(pid)?))
}

async fn lost_control_plane() -> Result<()> {
    let environment = [("WRENN_ON_CONTROL_PLANE_LOSS", "pause"), ("WRENN_CONTROL_PLANE_LOSS_AFTER", "2")];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let running = Stack::start(StackOptions { environment, ..StackOptions::default() }).await?;
    let mut sandbox = Sandbox::create(running.client()).await?;
    sandbox.output("echo here > /dev/shm/state").await?;

    // The next control plane waits for its database, so that it is the test that says how long there is none.
    let cluster = cluster(running.dir())?;
    signal_all(&cluster, Signal::SIGSTOP)?;
    let first = part_of(&running, "control-plane")?;
    kill(first, Signal::SIGKILL)?;
    let record = running.dir().join("agent/sandboxes").join(&sandbox.id).join("record.json");
    let is_paused = || {
        let text = std::fs::read_to_string(&record).unwrap_or_default();
        let record = serde_json::from_str::<serde_json::Value>(&text);
        std::future::ready(record.is_ok_and(|record| record["paused"].is_object()))
    };
    let paused = eventually(Duration::from_secs(60), is_paused).await;
    signal_all(&cluster, Signal::SIGCONT)?;
    ensure!(paused, "it is paused without anybody asking: {}", running.log());

    ensure!(
        eventually(Duration::from_secs(60), || recovers(&running)).await,
        "there is a control plane again"
    );
    ensure!(part_of(&running, "control-plane")? != first, "it is another one");
    let mut client = running.client();
    crate::lifecycle::wait_for_status(&mut client, &sandbox.id, "paused", Duration::from_secs(30)).await?;
    let log = running.log();
    let mut told = log.lines().filter(|line| line.contains("without a control plane for longer"));
    ensure!(told.any(|line| line.contains(&sandbox.id)), "it is told: {log}");
    let path = sandbox.path("/resume");
    sandbox.client.post(&path, &json!({})).await?.expect(200)?;
    ensure!(sandbox.output("cat /dev/shm/state").await?.trim() == "here", "nothing is lost");
    sandbox.destroy().await?;
    running.stop().await
}

async fn killed_agent() -> Result<()> {
    let running = Stack::start(StackOptions::default()).await?;
    let mut sandbox = Sandbox::create(running.client()).await?;
    let mut resting = Sandbox::create(running.client()).await?;
    let path = resting.path("/pause");
    resting.client.post(&path, &json!({})).await?.expect(200)?;
    let boot = sandbox.output("cat /proc/sys/kernel/random/boot_id; echo here > /tmp/state").await?;
    for round in 0..3 {
        let agent = agent_of(&running)?;
        kill(agent, Signal::SIGKILL)?;
        // The answer comes from the next agent, from the machine that went on meanwhile.
        let end = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let path = sandbox.path("/exec");
            let body = json!({ "cmd": "cat", "args": ["/proc/sys/kernel/random/boot_id", "/tmp/state"] });
            let answer = sandbox.client.post(&path, &body).await?;
            if answer.status == 200 {
                ensure!(answer.json()["stdout"] == format!("{boot}here\n"), "{}", answer.text());
                break;
            }
            ensure!(tokio::time::Instant::now() < end, "round {round}: {}", answer.text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ensure!(agent_of(&running)? != agent, "it is another agent");
        let path = if round % 2 == 0 { resting.path("/resume") } else { resting.path("/pause") };
        resting.client.post(&path, &json!({})).await?.expect(200)?;
    }
    sandbox.destroy().await?;
    resting.destroy().await?;
    let instance = running.instance()?;
    running.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

async fn two_stacks() -> Result<()> {
    let (one, two) =
        tokio::try_join!(Stack::start(StackOptions::default()), Stack::start(StackOptions::default()))?;
    let mut first = Sandbox::create(one.client()).await?;
    let mut second = Sandbox::create(two.client()).await?;
    let (mut to_one, mut to_two) = (one.client(), two.client());
    to_two.get(&first.path("")).await?.expect(404)?;
    to_one.get(&second.path("")).await?.expect(404)?;
    let stranger = wrenn_testkit::Client::new(to_one.authority(), two.key());
    stranger.clone().get("/v1/sandboxes").await?.expect(401)?;
    one.stop().await?;
    ensure!(second.output("echo still").await?.trim() == "still", "the other goes on");
    ensure!(first.output("true").await.is_err(), "this one is gone");
    two.stop().await
}

/// The postmaster of a stack's private cluster.
fn postmaster(dir: &Path) -> Result<Pid> {
    let text = std::fs::read_to_string(dir.join("pg/postmaster.pid"))?;
    Ok(Pid::from_raw(text.lines().next().context("a first line")?.trim().parse()?))
}

/// The processes of that cluster.
fn cluster(dir: &Path) -> Result<Vec<Pid>> {
    let all = descendants(postmaster(dir)?.as_raw().cast_unsigned());
    Ok(all.into_iter().map(|pid| Pid::from_raw(pid.cast_signed())).collect())
}

fn signal_all(processes: &[Pid], signal: Signal) -> Result<()> {
    processes.iter().try_for_each(|pid| Ok(kill(*pid, signal)?))
}

async fn postgres_gone() -> Result<()> {
    let running = Stack::start(StackOptions::default()).await?;
    let mut sandbox = Sandbox::create(running.client()).await?;
    // Stopped and not killed: it is there and does not answer, which is the worse of the two.
    let cluster = cluster(running.dir())?;
    signal_all(&cluster, Signal::SIGSTOP)?;
    let begin = tokio::time::Instant::now();
    let mut client = running.client();
    let answer = client.post("/v1/sandboxes", &json!({})).await?;
    ensure!(answer.status.as_u16() == 503, "{} {}", answer.status, answer.text());
    ensure!(begin.elapsed() < Duration::from_secs(30), "bounded: {:?}", begin.elapsed());
    tokio::time::sleep(Duration::from_secs(10).saturating_sub(begin.elapsed())).await;
    signal_all(&cluster, Signal::SIGCONT)?;
    ensure!(eventually(Duration::from_secs(20), || recovers(&running)).await, "it recovers");
    ensure!(sandbox.output("echo there").await?.trim() == "there", "the sandbox was not harmed");

    kill(postmaster(running.dir())?, Signal::SIGKILL)?;
    ensure!(eventually(Duration::from_secs(60), || recovers(&running)).await, "it recovers from a crash");
    ensure!(sandbox.output("echo there").await?.trim() == "there", "the sandbox was not harmed");
    sandbox.destroy().await?;
    let instance = running.instance()?;
    running.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

async fn recovers(running: &Stack) -> bool {
    let mut client = running.client();
    matches!(client.get("/v1/sandboxes").await, Ok(answer) if answer.status.as_u16() == 200)
}

pub(crate) async fn eventually<F: Future<Output = bool>>(bound: Duration, mut is: impl FnMut() -> F) -> bool {
    let end = tokio::time::Instant::now() + bound;
    loop {
        if is().await {
            return true;
        }
        if tokio::time::Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

/// A file system of its own for a stack, given back when it is dropped.
struct Mounted(tempfile::TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

async fn full_disk() -> Result<()> {
    let dir = Mounted(tempfile::Builder::new().prefix("wrenn-test-").tempdir()?);
    let path = dir.0.path().to_str().context("a path is text")?;
    run("mount", &["-t", "tmpfs", "-o", "size=600m,mode=755", "small", path])?;
    let options = StackOptions { dir: Some(dir.0.path().to_owned()), ..StackOptions::default() };
    let running = Stack::start(options).await?;
    Sandbox::create(running.client()).await?.destroy().await?;

    // PostgreSQL keeps its own space beforehand, so that only what is new finds none.
    let ballast = dir.0.path().join("agent/ballast");
    let _ =
        Command::new("dd").args(["if=/dev/zero", "bs=1M", &format!("of={}", ballast.display())]).output()?;
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=1", "count=8192", "oflag=append", "conv=notrunc"])
        .arg(format!("of={}", ballast.display()))
        .output()?;
    let mut client = running.client();
    let answer = client.post("/v1/sandboxes", &json!({})).await?;
    ensure!([503, 507].contains(&answer.status.as_u16()), "{} {}", answer.status, answer.text());
    let instance = running.instance()?;
    ensure!(!process_exists(&format!("guest=wrenn-{instance}-"))?, "no machine is left");
    ensure!(std::fs::read_dir(dir.0.path().join("agent/sandboxes"))?.count() == 0, "no record is left");

    std::fs::remove_file(&ballast)?;
    let creates = async || Sandbox::create(running.client()).await.ok();
    let end = tokio::time::Instant::now() + Duration::from_secs(60);
    let fresh = loop {
        if let Some(fresh) = creates().await {
            break fresh;
        }
        ensure!(tokio::time::Instant::now() < end, "it recovers once there is room");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    fresh.destroy().await?;
    running.stop().await
}

async fn missing_vmm() -> Result<()> {
    let program = if stack::is_lab() { "WRENN_FIRECRACKER" } else { "WRENN_QEMU" };
    let environment = vec![(program.to_owned(), "/nonexistent/vmm".to_owned())];
    let outcome = Stack::start(StackOptions { environment, ..StackOptions::default() }).await;
    let error = format!("{:?}", outcome.err().context("it must not start")?);
    ensure!(error.contains("/nonexistent/vmm"), "{error}");
    ensure!(stack::binary().is_ok(), "the binary itself is there");
    Ok(())
}
