//! The host agent is killed at any moment, again and again, while it is asked for everything that it can do.
//!
//! ```text
//!  load ──► a random moment ──► kill -9 ──► each sandbox answers again, timed ──► the load comes to rest ──► audit ─┐
//!    ▲                           no new request from here on                                                      │
//!    └────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Some sandboxes only run, others are paused, resumed, snapshotted, rolled back and forked all the time, and some
//! come and go. None that was there may be lost. The audit compares what the API lists with the processes and the
//! records on the machine, and with all that there is of its network, control groups and directories ([`crate::host`]):
//! what was half-made is gone.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tokio::{sync::RwLock, task::JoinSet};
use wrenn_testkit::{Answer, Client, Stack, StackOptions};

use crate::{
    context::{OwnCase, Sandbox, own_case},
    faults::{agent_of, eventually},
    host,
    soak::{Numbers, entries, is_whole, leaves_nothing, seed, spread},
};

/// The cases of this file.
pub(crate) fn cases() -> Vec<OwnCase> {
    vec![own_case("kills::an_agent_killed_under_load_loses_nothing", killed_under_load)]
}

/// Sandboxes that only run commands.
const STEADY: usize = 2;
/// Sandboxes that are in the middle of something all the time.
const MOVING: usize = 2;
/// The longest time between two kills beyond what the next agent needs, in milliseconds.
const LONGEST_LIFE: u64 = 3000;
/// How long a sandbox may take to answer, on any machine: what it took is printed and not judged.
const ANSWER_BOUND: Duration = Duration::from_secs(60);
/// How long what was half-made may take to be gone.
const AUDIT_BOUND: Duration = Duration::from_secs(90);
/// How long after a refusal it is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Prints what is different in another guest, and in this one after a start of its own.
const WHO: &str = "cat /proc/sys/kernel/random/boot_id /tmp/mark; kill -0 $(cat /tmp/pid) && echo alive";

/// A sandbox that is there from the first kill to the last.
struct Resident {
    sandbox: Sandbox,
    /// What [`WHO`] printed at first.
    identity: String,
}

impl Resident {
    async fn create(client: Client, body: &Value) -> Result<Self> {
        let mut sandbox = Sandbox::create_with(client, body).await?;
        let id = sandbox.id.clone();
        sandbox
            .output(&format!(
                "echo {id} > /tmp/mark; setsid sleep 1000000 >/dev/null 2>&1 & echo $! > /tmp/pid"
            ))
            .await?;
        let identity = sandbox.output(WHO).await?;
        ensure!(identity.ends_with("alive\n"), "{identity}");
        Ok(Self { sandbox, identity })
    }

    /// Asks until it answers as itself: how long after `begin`, and whether it was paused and had to be resumed.
    async fn answers(&mut self, begin: Instant) -> Result<(Duration, bool)> {
        let mut resumed = false;
        let path = self.sandbox.path("/exec");
        let question = json!({ "cmd": "/bin/sh", "args": ["-c", WHO] });
        loop {
            let answer = self.sandbox.client.post(&path, &question).await?;
            if answer.status == 200 {
                let said = answer.json();
                ensure!(said["stdout"] == self.identity.as_str(), "{} became {said}", self.identity);
                return Ok((begin.elapsed(), resumed));
            }
            // Else nobody is there to answer, or it is being changed.
            if answer.status == 409 {
                let seen = self.sandbox.client.get(&self.sandbox.path("")).await?;
                match seen.json()["status"].as_str() {
                    Some("stopped" | "error" | "missing") => bail!("it is lost: {}", seen.text()),
                    Some("paused") => {
                        resumed = true;
                        let path = self.sandbox.path("/resume");
                        self.sandbox.client.post(&path, &json!({})).await?;
                    }
                    _ => {}
                }
            }
            ensure!(begin.elapsed() < ANSWER_BOUND, "{}: {}", self.sandbox.id, answer.text());
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// What the tasks of the load share. Each request holds the gate open; who closes it waits for those under way, and
/// lets no new one begin.
#[derive(Clone)]
struct Load {
    client: Client,
    gate: Arc<RwLock<()>>,
    end: Arc<AtomicBool>,
}

impl Load {
    /// One request. What an agent that is being killed answers does not matter here, but that there is an answer.
    async fn ask(&mut self, method: http::Method, path: &str, body: &Value) -> Result<Answer> {
        let _open = self.gate.read().await;
        let headers = [("content-type", "application/json")];
        let answer = self.client.send(method, path, &headers, serde_json::to_vec(body)?).await?;
        let status = answer.status.as_u16();
        ensure!(matches!(status, 200..=204 | 404 | 409 | 500..=507), "{path}: {status} {}", answer.text());
        Ok(answer)
    }

    async fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        self.ask(http::Method::POST, path, body).await
    }

    async fn delete(&mut self, path: &str) -> Result<()> {
        self.ask(http::Method::DELETE, path, &json!({})).await.map(drop)
    }

    async fn run_commands(mut self, id: String) -> Result<()> {
        while !self.end.load(Ordering::Relaxed) {
            self.post(&format!("/v1/sandboxes/{id}/exec"), &json!({ "cmd": "true" })).await?;
        }
        Ok(())
    }

    /// Sandboxes that come and go.
    async fn come_and_go(mut self) -> Result<()> {
        while !self.end.load(Ordering::Relaxed) {
            let made = self.post("/v1/sandboxes", &json!({})).await?.json();
            if let Some(id) = made["id"].as_str() {
                self.post(&format!("/v1/sandboxes/{id}/exec"), &json!({ "cmd": "true" })).await?;
                self.delete(&format!("/v1/sandboxes/{id}")).await?;
            }
        }
        Ok(())
    }

    /// Every verb, on one sandbox.
    async fn move_about(mut self, id: String, mut numbers: Numbers) -> Result<()> {
        let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
        let mut made = 0_u32;
        while !self.end.load(Ordering::Relaxed) {
            match numbers.below(4) {
                0 | 1 => {
                    self.post(&path("pause"), &json!({})).await?;
                    self.post(&path("resume"), &json!({})).await?;
                }
                2 => {
                    let name = format!("{}-{made}", id.replace("sb-", "of-"));
                    made += 1;
                    self.post("/v1/snapshots", &json!({ "sandbox_id": id, "name": name })).await?;
                    if numbers.below(2) == 0 {
                        self.post(&path("rollback"), &json!({ "snapshot": name })).await?;
                    }
                    self.delete(&format!("/v1/snapshots/{name}")).await?;
                }
                _ => {
                    let children = self.post(&path("fork"), &json!({ "count": 1 })).await?.json();
                    for child in children.as_array().into_iter().flatten() {
                        let child = child["id"].as_str().context("a child has an id")?;
                        self.delete(&format!("/v1/sandboxes/{child}")).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The sandboxes of the machines of an instance.
fn machines(instance: &str) -> Result<BTreeSet<String>> {
    let mark = format!("guest=wrenn-{instance}-");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(line) = std::fs::read(entry?.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).into_owned();
        if let Some(name) = line.split('\0').find_map(|word| word.strip_prefix(&mark)) {
            // SANDBOX-LAYER, where a sandbox is sb-XXXXXXXX.
            found.insert(name.split('-').take(2).collect::<Vec<_>>().join("-"));
        }
    }
    Ok(found)
}

/// What the API says is there, against what is on the machine; none when they agree.
async fn disagreement(stack: &Stack, instance: &str, client: &mut Client) -> Result<Option<String>> {
    let listed = client.get("/v1/sandboxes").await?.expect(200)?.json();
    let with_status = |wanted: &[&str]| -> BTreeSet<String> {
        let all = listed.as_array().into_iter().flatten();
        let of = all.filter(|one| one["status"].as_str().is_some_and(|status| wanted.contains(&status)));
        of.filter_map(|one| one["id"].as_str().map(str::to_owned)).collect()
    };
    let (running, there) = (with_status(&["running"]), with_status(&["running", "paused"]));
    let live = listed.as_array().map_or(0, Vec::len);
    let (machines, records) = (machines(instance)?, BTreeSet::from_iter(entries(stack, "sandboxes")?));
    let agree = live == there.len() && running == machines && there == records;
    if !agree {
        return Ok(Some(format!("{listed}\nmachines {machines:?}\nrecords {records:?}")));
    }
    host::difference(stack).await
}

/// Waits until what is on the machine is what the API lists.
async fn audit(stack: &Stack, instance: &str, client: &mut Client) -> Result<()> {
    let end = Instant::now() + AUDIT_BOUND;
    loop {
        let Some(difference) = disagreement(stack, instance, client).await? else { return Ok(()) };
        ensure!(Instant::now() < end, "they do not agree: {difference}");
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// From the kill to the first answer, by what the sandbox was at.
#[derive(Default)]
struct Times {
    steady: Vec<Duration>,
    moving: Vec<Duration>,
    resumed: Vec<Duration>,
}

/// One kill, and all that must be true after it.
async fn kill_once(
    stack: &Stack,
    instance: &str,
    residents: &mut Vec<Resident>,
    gate: &Arc<RwLock<()>>,
    times: &mut Times,
) -> Result<()> {
    let agent = agent_of(stack)?;
    let begin = Instant::now();
    kill(agent, Signal::SIGKILL)?;
    let resting = tokio::spawn(Arc::clone(gate).write_owned());
    let mut asked = JoinSet::new();
    for (place, mut resident) in residents.drain(..).enumerate() {
        asked.spawn(async move {
            let answered = resident.answers(begin).await;
            (place, resident, answered)
        });
    }
    let mut answered = asked.join_all().await;
    answered.sort_by_key(|(place, ..)| *place);
    for (place, resident, outcome) in answered {
        residents.push(resident);
        match outcome? {
            (_, true) if place < STEADY => bail!("one that only ran was paused"),
            (took, true) => times.resumed.push(took),
            (took, false) if place < STEADY => times.steady.push(took),
            (took, false) => times.moving.push(took),
        }
    }
    let closed = resting.await?;
    let agent_now = agent_of(stack)?;
    ensure!(agent_now != agent, "it is another agent");
    audit(stack, instance, &mut stack.client()).await?;
    drop(closed);
    Ok(())
}

async fn killed_under_load() -> Result<()> {
    let count = if is_whole() { 200 } else { 2 };
    let stack = Stack::start(StackOptions::default()).await?;
    let instance = stack.instance()?;
    let mut numbers = Numbers::new(seed());
    let mut residents = Vec::new();
    for number in 0..STEADY + MOVING {
        // Every other one has a domain filter.
        let body = [json!({}), json!({ "network": { "allow_domains": ["*.allowed.example"] } })];
        residents.push(Resident::create(stack.client(), &body[number % 2]).await?);
    }
    let load = Load { client: stack.client(), gate: Arc::default(), end: Arc::default() };
    let mut tasks = JoinSet::new();
    tasks.spawn(load.clone().run_commands(residents[0].sandbox.id.clone()));
    tasks.spawn(load.clone().come_and_go());
    for (number, resident) in residents.iter().skip(STEADY).enumerate() {
        let series = Numbers::new(seed().wrapping_mul(1000) + number as u64);
        tasks.spawn(load.clone().move_about(resident.sandbox.id.clone(), series));
    }

    let mut times = Times::default();
    for round in 0..count {
        // Any moment is as good as any other: this is what is random about it.
        tokio::time::sleep(Duration::from_millis(numbers.below(LONGEST_LIFE))).await;
        kill_once(&stack, &instance, &mut residents, &load.gate, &mut times)
            .await
            .with_context(|| format!("kill {round}, seed {}\n{}", seed(), stack.log()))?;
        if let Some(ended) = tasks.try_join_next() {
            ended?.context("the load has ended")?;
        }
    }
    load.end.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let mut client = stack.client();
    let snapshots = client.get("/v1/snapshots?type=snapshot").await?.expect(200)?.json();
    for one in snapshots.as_array().into_iter().flatten() {
        let name = one["name"].as_str().context("a snapshot has a name")?;
        client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    }
    let listed = client.get("/v1/sandboxes").await?.expect(200)?.json();
    for one in listed.as_array().into_iter().flatten() {
        let id = one["id"].as_str().context("a sandbox has an id")?;
        client.delete(&format!("/v1/sandboxes/{id}")).await?.expect(204)?;
    }
    let empty = async || matches!(machines(&instance), Ok(left) if left.is_empty());
    ensure!(eventually(AUDIT_BOUND, empty).await, "machines are left: {:?}", machines(&instance)?);
    leaves_nothing(stack).await?;
    let Times { steady, moving, resumed } = &mut times;
    println!(
        "soak: kill -9 of the host agent under load, {count}, seed {}, every sandbox went on and nothing was left; \
         kill to first exec: of those that only ran {}; of those in any verb {}; of those found paused and resumed {}",
        seed(),
        spread(steady),
        spread(moving),
        spread(resumed)
    );
    Ok(())
}
