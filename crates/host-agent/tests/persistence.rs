//! Real sandboxes of a real agent, through its registry: what is saved comes back, and what an agent leaves is taken
//! over by the next one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

use std::{collections::BTreeMap, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use camino::{Utf8Path, Utf8PathBuf};
use libtest_mimic::{Arguments, Trial};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wrenn_host_agent::{
    Agent, Config,
    config::{
        AcceleratorFlag, CONTROL_PLANE_LOSS_AFTER, DiskDriver, MemoryBackendFlag, OnControlPlaneLoss, OnStop,
        SCRUB_INTERVAL, VmmDriver,
    },
    doctor::UIDS,
    guest::ENVD_PORT,
    pager,
    registry::Registry,
    sandbox::{Deadline, Handle, Outcome, SandboxSpec, Settings, Stage, Update, queue::Verb},
    snapshots::Extent,
};
use wrenn_testkit::{stack, uplink::Uplink};
use wrenn_types::{
    AccessToken, DiskMib, InactivityTimeout, NetworkPolicy, SandboxId, Shape, SnapshotId, TimeoutAction,
};

#[path = "persistence/broken_off.rs"]
mod broken_off;
#[path = "persistence/disks.rs"]
mod disks;
#[path = "persistence/firecracker.rs"]
mod firecracker;

const BOUND: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    // An agent of this program starts it again, as the pager of a machine.
    if std::env::args_os().nth(1).is_some_and(|word| word == pager::WORD) {
        return match pager::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => panic!("{error:?}"),
        };
    }
    let arguments = Arguments::from_args();
    let skip = stack::cannot_run();
    if let Some(reason) = &skip {
        println!("{reason}");
    }
    let trial = |name: &str, run: fn(Arc<Place>) -> Running| {
        let skipped = skip.is_some();
        Trial::test(name, move || with_place(Kind::QEMU, run).map_err(|error| format!("{error:?}").into()))
            .with_ignored_flag(skipped)
    };
    let mut trials = vec![
        trial("persistence::what_is_paused_comes_back", |place| Box::pin(pause_and_resume(place))),
        trial("persistence::chains_stay_short", |place| Box::pin(short_chains(place))),
        trial("persistence::a_damaged_layer_is_refused", |place| Box::pin(disks::damaged_layer(place))),
        trial("persistence::a_host_disk_that_is_full_loses_nothing", |place| {
            Box::pin(disks::full_host(place))
        }),
        trial("persistence::a_snapshot_outlives_everything_else", |place| Box::pin(snapshots(place))),
        trial("persistence::another_agent_goes_on_where_one_left", |place| Box::pin(adoption(place))),
        trial("persistence::a_clock_pauses_and_does_not_destroy", |place| Box::pin(clock(place))),
        trial("persistence::what_was_measured_outlives_machines_and_agents", |place| {
            Box::pin(measured(place))
        }),
        trial("persistence::a_lost_control_plane_pauses_what_runs", |place| Box::pin(loss(place))),
        trial("persistence::a_deadline_that_was_met_is_over", |place| Box::pin(met_deadline(place))),
        trial("persistence::a_create_that_is_broken_off_leaves_nothing", |place| {
            Box::pin(broken_off::leaves_nothing(place))
        }),
    ];
    trials.extend(firecracker::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}

type Running = std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// A directory for agents, and an outside for their sandboxes.
struct Place {
    dir: tempfile::TempDir,
    outside: String,
    kind: Kind,
}

/// What the machines of an agent run on.
#[derive(Debug, Clone, Copy)]
struct Kind {
    vmm: VmmDriver,
    disks: Option<DiskDriver>,
    memory: MemoryBackendFlag,
}

impl Kind {
    const QEMU: Self = Self { vmm: VmmDriver::Qemu, disks: None, memory: MemoryBackendFlag::File };
    const FIRECRACKER: Self = Self { vmm: VmmDriver::Firecracker, ..Self::QEMU };
}

fn with_place(kind: Kind, run: fn(Arc<Place>) -> Running) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let outside = Uplink::create().await?;
        let dir = tempfile::Builder::new().prefix("wrenn-test-").tempdir()?;
        let place = Arc::new(Place { dir, outside: outside.name().to_owned(), kind });
        // A guest of the lab is translated, and so is its host.
        let bound = if kind.vmm == VmmDriver::Firecracker { 4 * BOUND } else { 2 * BOUND };
        let outcome = tokio::time::timeout(bound, run(Arc::clone(&place))).await.context("in time");
        // Whatever a case that failed has left is ended by one more agent.
        place.agent(OnStop::Destroy).await?.stop().await;
        outside.remove().await?;
        outcome??;
        no_device_is_left(&place)
    })
}

/// Of an instance without sandboxes the kernel has no devices of disks.
fn no_device_is_left(place: &Place) -> Result<()> {
    let instance = std::fs::read_to_string(place.path().join("instance"))?;
    for entry in std::fs::read_dir("/sys/block")? {
        // Most block devices have no such name.
        let name = std::fs::read_to_string(entry?.path().join("dm/name")).unwrap_or_default();
        ensure!(!name.contains(instance.trim()), "{name} is left");
    }
    Ok(())
}

impl Place {
    fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    async fn agent(&self, on_stop: OnStop) -> Result<Agent> {
        self.agent_with(on_stop, OnControlPlaneLoss::Keep, CONTROL_PLANE_LOSS_AFTER).await
    }

    async fn agent_with(
        &self,
        on_stop: OnStop,
        on_control_plane_loss: OnControlPlaneLoss,
        control_plane_loss_after: u32,
    ) -> Result<Agent> {
        let images = Utf8PathBuf::from_path_buf(stack::images()?).unwrap();
        // Machines are confined where they can be.
        let jailer = std::env::var("WRENN_JAILER").ok().map(Utf8PathBuf::from);
        let is_confined = match self.kind.vmm {
            VmmDriver::Qemu => true,
            VmmDriver::Firecracker => jailer.is_some(),
        };
        Ok(Agent::start(Config {
            dir: self.path().to_owned(),
            snapshots: Utf8PathBuf::from_path_buf(stack::snapshots()?).unwrap(),
            images,
            socket: None,
            ready_slots: 2,
            uplink_netns: Some(self.outside.parse()?),
            dns_servers: vec!["8.8.8.8".parse()?],
            default_disk_mib: DiskMib::default().get(),
            vmm: self.kind.vmm,
            memory_backend: self.kind.memory,
            firecracker: std::env::var("WRENN_FIRECRACKER").ok().map(Utf8PathBuf::from),
            accelerator: AcceleratorFlag::Tcg,
            qemu: None,
            disks: self.kind.disks,
            metrics: None,
            production: false,
            uids: is_confined.then_some(UIDS),
            jailer,
            machine_io_mib: 1024,
            machine_io_operations: 0,
            on_stop,
            on_control_plane_loss,
            control_plane_loss_after,
            scrub_interval: SCRUB_INTERVAL,
        })
        .await?)
    }
}

fn spec(snapshot: Option<SnapshotId>) -> SandboxSpec {
    SandboxSpec {
        id: SandboxId::random(),
        generation: 1,
        template: "base".parse().unwrap(),
        shape: Shape { vcpus: Default::default(), memory: Default::default() },
        disk: DiskMib::default(),
        access_token: AccessToken::random(),
        environment: BTreeMap::from([("COLOUR".to_owned(), "green".to_owned())]),
        default_user: None,
        default_workdir: None,
        snapshot,
        settings: Settings {
            timeout: InactivityTimeout::default(),
            on_timeout: TimeoutAction::Pause,
            deadline: None,
            network: NetworkPolicy::simple(true),
        },
    }
}

async fn create(registry: &Registry, spec: SandboxSpec) -> Result<Handle> {
    let handle = registry.create(spec)?;
    let status = handle.settled().await;
    ensure!(status.stage == Stage::Running, "{:?}", status.end);
    Ok(handle)
}

/// Asks the guest's agent one thing, and answers with the body of what it says.
async fn ask(handle: &Handle, head: &str, content: &[u8]) -> Result<Vec<u8>> {
    let connector = handle.connector().context("it has a guest")?;
    let mut stream = connector.connect(ENVD_PORT).await?;
    let token = handle.spec().access_token.expose();
    let credentials = base64::engine::general_purpose::STANDARD.encode("root:");
    let request = format!(
        "{head} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\nX-Access-Token: {token}\r\n\
         Authorization: Basic {credentials}\r\nConnect-Protocol-Version: 1\r\n\
         Content-Type: application/connect+json\r\nContent-Length: {}\r\n\r\n",
        content.len()
    );
    stream.write_all(request.as_bytes()).await?;
    stream.write_all(content).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(BOUND, stream.read_to_end(&mut answer)).await??;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("an answer has a head")?;
    let status = String::from_utf8_lossy(&answer[..end]).lines().next().unwrap_or_default().to_owned();
    ensure!(status.contains(" 200 "), "{status}: {}", String::from_utf8_lossy(&answer));
    Ok(answer.split_off(end + 4))
}

/// Runs a line in the guest and answers with what it printed; the line must end well.
async fn run(handle: &Handle, line: &str) -> Result<String> {
    let (code, said) = end_of(handle, line, "/tmp").await?;
    ensure!(code == "0", "{line} ended with {code}: {said}");
    Ok(said)
}

/// Runs a line in the guest and answers with how it ended and what it printed, by way of files in a directory of the
/// guest.
async fn end_of(handle: &Handle, line: &str, through: &str) -> Result<(String, String)> {
    let script = format!("({line}) > {through}/.said 2>&1; echo $? > {through}/.code");
    let message =
        serde_json::json!({ "process": { "cmd": "/bin/bash", "args": ["-c", script] }, "stdin": false });
    let message = message.to_string().into_bytes();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len())?.to_be_bytes());
    body.extend(message);
    ask(handle, "POST /process.Process/Start", &body).await?;
    let said = ask(handle, &format!("GET /files?path={through}/.said"), &[]).await?;
    let code = ask(handle, &format!("GET /files?path={through}/.code"), &[]).await?;
    Ok((String::from_utf8(code)?.trim().to_owned(), String::from_utf8(said)?.trim().to_owned()))
}

async fn pause(handle: &Handle) -> Result<()> {
    handle.request(Verb::Pause(Extent::Machine), None).await?;
    ensure!(handle.stage() == Stage::Paused, "{:?}", handle.stage());
    Ok(())
}

async fn resume(handle: &Handle) -> Result<()> {
    handle.request(Verb::Resume { timeout: None }, None).await?;
    ensure!(handle.stage() == Stage::Running, "{:?}", handle.stage());
    Ok(())
}

async fn snapshot(handle: &Handle) -> Result<(SnapshotId, Duration)> {
    let into = SnapshotId::random();
    match handle.request(Verb::Snapshot { into: into.clone() }, None).await? {
        Outcome::Saved { stopped, .. } => Ok((into, stopped)),
        Outcome::Done => bail!("a snapshot has an outcome"),
    }
}

/// A program that lives on, with something in its memory that nobody else has.
const KEEPER: &str = "cat > /tmp/keeper.py <<'END'\nimport os, time, pathlib\nsecret = os.urandom(16).hex()\nwhile True:\n    pathlib.Path('/tmp/kept.new').write_text(f'{os.getpid()} {secret}')\n    os.rename('/tmp/kept.new', '/tmp/kept')\n    time.sleep(0.05)\nEND\nsetsid python3 /tmp/keeper.py </dev/null >/dev/null 2>&1 & until [ -s /tmp/kept ]; do sleep 0.05; done; cat /tmp/kept";

/// What the program says now, anew.
const KEPT: &str = "rm -f /tmp/kept; until [ -s /tmp/kept ]; do sleep 0.05; done; cat /tmp/kept";

async fn pause_and_resume(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let kept = run(&handle, KEEPER).await?;
    run(&handle, "head -c 4000000 /dev/urandom > /root/data; sha256sum /root/data > /root/sum").await?;
    for round in 0..5 {
        run(
            &handle,
            &format!(
                "head -c 3000000 /dev/urandom > /dev/shm/{round}; sha256sum /dev/shm/{round} >> /dev/shm/sums"
            ),
        )
        .await?;
        pause(&handle).await.with_context(|| format!("pause {round}"))?;
        pause(&handle).await?;
        resume(&handle).await.with_context(|| format!("resume {round}"))?;
        ensure!(run(&handle, KEPT).await? == kept, "the program goes on");
        run(&handle, "sha256sum --check --quiet /root/sum /dev/shm/sums").await?;
        // Zeros over what was something: the old must not come back with the next resume.
        run(&handle, &format!("dd if=/dev/zero of=/dev/shm/{round} bs=1M count=2 conv=notrunc status=none; (cd /; sha256sum /dev/shm/?) > /dev/shm/sums")).await?;
    }
    let id = handle.spec().id.clone();
    pause(&handle).await?;
    agent.registry().destroy(&id, None).await?;
    ensure!(!place.path().join("agent/sandboxes").join(id.as_str()).exists(), "nothing is left of it");
    ensure!(
        place.path().join("agent/snapshots").read_dir_utf8()?.count() == 0,
        "nor of what it was saved as"
    );
    agent.stop().await;
    Ok(())
}

async fn short_chains(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let id = handle.spec().id.clone();
    let layers = || {
        let record = wrenn_host_agent::sandbox::record::read(&place.path().join("agent/sandboxes"), &id);
        record.map(|record| record.layers.len()).unwrap_or_default()
    };
    let mut most = 0;
    for round in 0..9 {
        run(
            &handle,
            &format!(
                "head -c 300000 /dev/urandom > /root/{round}; sync; (cd /root; sha256sum ?) > /root/sums"
            ),
        )
        .await?;
        pause(&handle).await?;
        resume(&handle).await?;
        most = most.max(layers());
    }
    // The layers are made one while it runs, without anybody's asking.
    let end = tokio::time::Instant::now() + BOUND;
    ensure!(most > 4, "each resume adds one, else this proves nothing: {most}");
    while layers() > 2 {
        ensure!(tokio::time::Instant::now() < end, "there are still {} layers", layers());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    run(&handle, "cd /root && echo 3 > /proc/sys/vm/drop_caches && sha256sum --check --quiet sums").await?;
    pause(&handle).await?;
    resume(&handle).await?;
    run(&handle, "cd /root && echo 3 > /proc/sys/vm/drop_caches && sha256sum --check --quiet sums").await?;
    agent.registry().destroy(&id, None).await?;
    agent.stop().await;
    Ok(())
}

async fn snapshots(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let registry = agent.registry();
    let handle = create(registry, spec(None)).await?;
    let kept = run(&handle, KEEPER).await?;
    run(&handle, "echo first > /root/state").await?;
    let (first, stopped) = snapshot(&handle).await?;
    println!("stood still for {stopped:?}");
    ensure!(run(&handle, KEPT).await? == kept, "it goes on");
    run(&handle, "echo second > /root/state; sync").await?;
    let (second, _) = snapshot(&handle).await?;
    run(&handle, "echo third > /root/state; sync").await?;

    handle.request(Verb::Rollback { to: first.clone() }, None).await?;
    ensure!(run(&handle, "cat /root/state").await? == "first", "back to the first");
    ensure!(run(&handle, KEPT).await? == kept, "with what ran then");
    handle.request(Verb::Rollback { to: second.clone() }, None).await?;
    ensure!(run(&handle, "cat /root/state").await? == "second", "forward to the second");
    pause(&handle).await?;
    let (third, _) = snapshot(&handle).await?;

    let mut clones = Vec::new();
    for (from, state) in [(&first, "first"), (&second, "second"), (&third, "second")] {
        let clone = create(registry, spec(Some(from.clone()))).await?;
        ensure!(run(&clone, "cat /root/state").await? == state, "{state}");
        ensure!(run(&clone, KEPT).await? == kept, "the program goes on in the clone");
        ensure!(run(&clone, "echo $COLOUR").await? == "green", "with the environment");
        clones.push(clone);
    }
    let refused = clones[0].request(Verb::Rollback { to: second.clone() }, None).await;
    ensure!(refused.is_err(), "another sandbox's snapshot is nothing to go back to");
    ensure!(run(&clones[0], "cat /root/state").await? == "first", "and nothing has changed");
    let ids =
        futures::future::try_join_all(clones.iter().map(|clone| run(clone, "cat /etc/machine-id; hostname")))
            .await?;
    ensure!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "each is itself: {ids:?}");

    // The origin and the snapshots go; what stands on them stays whole.
    registry.destroy(&handle.spec().id, None).await?;
    for id in [&first, &second, &third] {
        ensure!(registry.host().snapshots.delete(id)?, "it was there");
    }
    for (clone, state) in clones.iter().zip(["first", "second", "second"]) {
        pause(clone).await?;
        resume(clone).await?;
        let line = "echo 3 > /proc/sys/vm/drop_caches; cat /root/state; find /usr -xdev -type f | head -200 | xargs cat > /dev/null";
        ensure!(run(clone, line).await? == state, "{state}");
        registry.destroy(&clone.spec().id, None).await?;
    }
    agent.stop().await;
    Ok(())
}

async fn adoption(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Leave).await?;
    let running = create(agent.registry(), spec(None)).await?;
    let resting = create(agent.registry(), spec(None)).await?;
    let (kept, rests) = (run(&running, KEEPER).await?, run(&resting, KEEPER).await?);
    pause(&resting).await?;
    let (running, resting) = (running.spec().clone(), resting.spec().clone());
    agent.stop().await;

    for round in 0..3 {
        let agent = place.agent(OnStop::Leave).await?;
        let found = agent.registry().get(&running.id).context("it is known")?;
        ensure!(found.stage() == Stage::Running, "round {round}: {:?}", found.stage());
        ensure!(run(&found, KEPT).await? == kept, "round {round}: it went on meanwhile");
        let found = agent.registry().get(&resting.id).context("the paused one is known too")?;
        ensure!(found.stage() == Stage::Paused, "round {round}: {:?}", found.stage());
        agent.stop().await;
    }

    let agent = place.agent(OnStop::Destroy).await?;
    let found = agent.registry().get(&running.id).context("it is known")?;
    pause(&found).await?;
    resume(&found).await?;
    ensure!(run(&found, KEPT).await? == kept, "an adopted one can be paused");
    let (saved, _) = snapshot(&found).await?;
    ensure!(run(&found, KEPT).await? == kept, "and saved");
    let found = agent.registry().get(&resting.id).context("it is known")?;
    resume(&found).await?;
    ensure!(run(&found, KEPT).await? == rests, "a paused one can be resumed by another agent");
    agent.stop().await;

    // What ran was destroyed with its agent, what was saved was not.
    let agent = place.agent(OnStop::Destroy).await?;
    ensure!(agent.registry().all().is_empty(), "nothing runs");
    let clone = create(agent.registry(), spec(Some(saved))).await?;
    ensure!(run(&clone, KEPT).await? == kept, "the snapshot is there");
    agent.stop().await;
    Ok(())
}

async fn clock(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let kept = run(&handle, KEEPER).await?;
    // What is asked past the tunnels moves no clock, so it is set when nothing more is asked.
    let update = Update { timeout: Some(InactivityTimeout::new(2)?), ..Update::default() };
    handle.request(Verb::Update(Box::new(update)), None).await?;
    let mut watch = handle.watch();
    tokio::time::timeout(BOUND, watch.wait_for(|status| status.stage == Stage::Paused)).await??;
    handle.request(Verb::Resume { timeout: Some(InactivityTimeout::new(0)?) }, None).await?;
    ensure!(run(&handle, KEPT).await? == kept, "nothing is lost");
    ensure!(handle.status().settings.timeout == InactivityTimeout::new(0)?, "the clock is off");
    agent.stop().await;
    Ok(())
}

/// What the agent tells Prometheus.
async fn exposition(agent: &Agent) -> Result<String> {
    let socket = agent.socket().with_file_name("metrics.sock");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket)?.permissions());
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let mut stream = tokio::net::UnixStream::connect(&socket).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    tokio::time::timeout(BOUND, stream.read_to_string(&mut answer)).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer has a head")?;
    ensure!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    Ok(body.to_owned())
}

async fn measured(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let id = handle.spec().id.clone();
    let host = Arc::clone(agent.registry().host());
    let metrics = &host.metrics;
    match host.limits.hierarchy() {
        Some(groups) => {
            let names = groups.names()?;
            ensure!(names.len() == 1 && names[0].starts_with(id.as_str()), "{names:?}");
            let vmm = handle.footing().and_then(|footing| footing.pid).context("it has a process")?;
            ensure!(groups.group(&names[0]).processes()? == [vmm], "it is in its control group");
        }
        None => println!("skipped: {}", host.limits),
    }
    // What it sends to nowhere goes through its link all the same.
    run(
        &handle,
        "setsid bash -c 'while :; do echo > /dev/udp/192.0.2.1/9; done' </dev/null >/dev/null 2>&1 &",
    )
    .await?;
    let end = tokio::time::Instant::now() + BOUND;
    loop {
        let points = metrics.points(&id, 600_000);
        let busy =
            points.iter().filter(|point| point.values.cpu_percent > 10.0 && point.values.memory_kib > 1000);
        if busy.count() >= 3 && points.iter().any(|point| point.values.sent_per_second > 0.0) {
            break;
        }
        ensure!(tokio::time::Instant::now() < end, "it does not show that it is busy: {points:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let told = exposition(&agent).await?;
    for line in [
        "wrenn_sandboxes{state=\"running\"} 1".to_owned(),
        "wrenn_network_slots{state=\"used\"} 1".to_owned(),
        "wrenn_operation_duration_seconds_count{operation=\"create\"} 1".to_owned(),
        format!("wrenn_memory_promised_bytes {}", u64::from(handle.spec().shape.memory.get()) << 20),
    ] {
        ensure!(told.lines().any(|found| found == line), "{line} is not in {told}");
    }
    ensure!(told.contains(&format!("wrenn_sandbox_cpu_seconds_total{{sandbox=\"{id}\"}} ")), "{told}");

    pause(&handle).await?;
    let file = place.path().join(format!("agent/series/{id}.json"));
    while !file.exists() {
        ensure!(tokio::time::Instant::now() < end, "a pause puts what was measured into its file");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let before = metrics.points(&id, 3_600_000);
    ensure!(exposition(&agent).await?.contains("wrenn_sandboxes{state=\"paused\"} 1"), "it is paused");
    let socket = agent.socket().with_file_name("metrics.sock");
    agent.stop().await;
    ensure!(!socket.exists(), "nothing is left of the socket");

    let agent = place.agent(OnStop::Destroy).await?;
    let host = Arc::clone(agent.registry().host());
    let metrics = &host.metrics;
    let after = metrics.points(&id, 3_600_000);
    ensure!(!after.is_empty() && after.len() == before.len(), "{before:?} became {after:?}");
    for (one, other) in before.iter().zip(&after) {
        ensure!(one.values == other.values && (one.at - other.at).abs() < 100, "{one:?} became {other:?}");
    }
    let handle = agent.registry().get(&id).context("it is known")?;
    let resumed = jiff::Timestamp::now().as_millisecond();
    resume(&handle).await?;
    while metrics.points(&id, 600_000).is_empty() {
        ensure!(tokio::time::Instant::now() < end, "it is measured again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(
        metrics.points(&id, 600_000).iter().all(|point| point.at > resumed),
        "not for when it was paused"
    );
    agent.registry().destroy(&id, None).await?;
    while file.exists() || !metrics.points(&id, 86_400_000).is_empty() {
        ensure!(tokio::time::Instant::now() < end, "nothing is kept of what is gone");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.stop().await;
    if let Some(groups) = host.limits.hierarchy() {
        ensure!(groups.names().is_err(), "nor of its control group");
    }
    Ok(())
}

async fn met_deadline(place: Arc<Place>) -> Result<()> {
    let agent = place.agent(OnStop::Leave).await?;
    let handle = create(agent.registry(), spec(None)).await?;
    let id = handle.spec().id.clone();
    let kept = run(&handle, KEEPER).await?;
    let set = async |handle: &Handle, at| {
        let deadline = Some(Some(Deadline { at, action: TimeoutAction::Pause }));
        handle.request(Verb::Update(Box::new(Update { deadline, ..Update::default() })), None).await
    };
    let at = jiff::Timestamp::now() + Duration::from_secs(1);
    set(&handle, at).await?;
    let mut watch = handle.watch();
    let paused = async |watch: &mut tokio::sync::watch::Receiver<_>| {
        let wait = watch.wait_for(|status: &wrenn_host_agent::sandbox::Status| status.stage == Stage::Paused);
        tokio::time::timeout(BOUND, wait)
            .await
            .context("it is paused in time")?
            .map(|status| status.clone())
            .context("it lives")
    };
    let status = paused(&mut watch).await?;
    ensure!(jiff::Timestamp::try_from(status.paused.context("it is paused")?.at)? >= at, "not early");
    ensure!((status.settings.deadline, status.deadline_met) == (None, Some(at)), "it is told with the pause");

    // It does not pause it again at its resume, told again or not.
    for _ in 0..2 {
        resume(&handle).await?;
        ensure!(run(&handle, KEPT).await? == kept, "it runs");
        set(&handle, at).await?;
        ensure!(run(&handle, KEPT).await? == kept, "it goes on");
        let status = handle.status();
        ensure!((status.settings.deadline, status.deadline_met) == (None, Some(at)), "still over");
        pause(&handle).await?;
    }

    // One that passes while it is paused is met by that, also where no agent is there to see it pass.
    let next = jiff::Timestamp::now() + Duration::from_millis(300);
    set(&handle, next).await?;
    let wait = watch.wait_for(|status| status.deadline_met == Some(next));
    tokio::time::timeout(BOUND, wait).await.context("it is met in time")??;
    let last = jiff::Timestamp::now() + Duration::from_millis(300);
    set(&handle, last).await?;
    agent.stop().await;
    let agent = place.agent(OnStop::Destroy).await?;
    let handle = agent.registry().get(&id).context("it is known")?;
    // An agent that is started fast sees it pass, another finds that it has.
    let mut watch = handle.watch();
    let wait = watch.wait_for(|status| status.deadline_met == Some(last));
    tokio::time::timeout(BOUND, wait).await.context("it is met in time")??;
    resume(&handle).await?;
    ensure!(run(&handle, KEPT).await? == kept, "nothing is lost");
    let status = handle.status();
    ensure!((status.settings.deadline, status.deadline_met) == (None, Some(last)), "{:?}", status.settings);
    agent.stop().await;
    Ok(())
}

/// A session of a control plane: the stream of what happens on the host, read as JSON.
struct Watch {
    stream: tokio::net::UnixStream,
    read: Vec<u8>,
}

impl Watch {
    async fn open(agent: &Agent) -> Result<Self> {
        let mut stream = tokio::net::UnixStream::connect(agent.socket()).await?;
        let head = "POST /hostagent.v1.HostAgentService/WatchSandboxes HTTP/1.1\r\nHost: agent\r\n\
                    Connect-Protocol-Version: 1\r\nContent-Type: application/connect+json\r\n\
                    Content-Length: 7\r\n\r\n\0\0\0\0\x02{}";
        stream.write_all(head.as_bytes()).await?;
        let mut watch = Self { stream, read: Vec::new() };
        watch.until("inSync").await?;
        Ok(watch)
    }

    /// Reads until something was said, and answers with all that was said so far.
    async fn until(&mut self, said: &str) -> Result<String> {
        let wait = async {
            loop {
                let text = String::from_utf8_lossy(&self.read).into_owned();
                if text.contains(said) {
                    return Ok(text);
                }
                let mut piece = [0; 4096];
                match self.stream.read(&mut piece).await? {
                    0 => bail!("the stream ended: {text}"),
                    length => self.read.extend_from_slice(&piece[..length]),
                }
            }
        };
        tokio::time::timeout(BOUND, wait).await.with_context(|| format!("{said} in time"))?
    }
}

async fn loss(place: Arc<Place>) -> Result<()> {
    // Long enough to make two sandboxes before the first session.
    let agent = place.agent(OnStop::Leave).await?;
    let first = create(agent.registry(), spec(None)).await?;
    let second = create(agent.registry(), spec(None)).await?;
    let kept = run(&first, KEEPER).await?;
    pause(&second).await?;
    let (first, second) = (first.spec().id.clone(), second.spec().id.clone());
    agent.stop().await;

    // With `keep`, nobody's absence stops anything, and it is told.
    let agent = place.agent_with(OnStop::Leave, OnControlPlaneLoss::Keep, 1).await?;
    let mut reports = agent.sessions().reports();
    let handle = agent.registry().get(&first).context("it is known")?;
    tokio::time::timeout(BOUND, reports.changed()).await.context("a loss in time")??;
    let told = Watch::open(&agent).await?.until("inSync").await?;
    ensure!(told.contains("lostAtMs"), "{told}");
    ensure!(told.contains("\"running\":1") && !told.contains("paused\":["), "{told}");
    ensure!(handle.stage() == Stage::Running, "it goes on");
    ensure!(run(&handle, KEPT).await? == kept, "it goes on");
    agent.stop().await;

    // With `pause`, a session holds it off, and its end brings it about.
    let agent = place.agent_with(OnStop::Destroy, OnControlPlaneLoss::Pause, 2).await?;
    let watch = Watch::open(&agent).await?;
    let (handle, other) = (agent.registry().get(&first), agent.registry().get(&second));
    let (handle, other) = (handle.context("it is known")?, other.context("it is known")?);
    if handle.stage() == Stage::Paused {
        // A machine that is busy took longer to open the session than the bound.
        resume(&handle).await?;
    }
    ensure!(run(&handle, KEPT).await? == kept, "it runs while somebody is there");
    drop(watch);
    let mut status = handle.watch();
    let wait = status.wait_for(|status| status.stage == Stage::Paused);
    tokio::time::timeout(BOUND, wait).await.context("it is paused")??;
    ensure!(other.stage() == Stage::Paused, "what was paused stays so");
    let mut watch = Watch::open(&agent).await?;
    let told = watch.until(&format!("\"paused\":[\"{first}\"]")).await?;
    ensure!(told.contains("lostAtMs") && told.contains("awaySinceMs"), "{told}");
    resume(&handle).await?;
    ensure!(run(&handle, KEPT).await? == kept, "nothing is lost");
    agent.stop().await;
    Ok(())
}
