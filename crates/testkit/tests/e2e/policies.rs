//! A policy holds through everything that a sandbox goes through, before its first packet each time.
//!
//! ```text
//!  a program in the guest tries everything, without a pause ──────────────────────────────────────────────►
//!      create ─ pause, resume ─ rollback ─ rollback to what was saved under an open policy ─ fork ─ kill -9 of the agent
//!         └─ after each of them: what is to be reached answers, nothing else ever has, and nothing else left the slot
//! ```
//!
//! What is in the program's memory goes through all of it too: it never waits for anything, so that it sends as soon
//! as a guest's first program runs. The kernel counts at the far end ([`Uplink::watch`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde::Deserialize;
use serde_json::{Value, json};
use wrenn_testkit::{
    Stack, StackOptions,
    uplink::{ELSEWHERE, HOST_PUBLIC, INTERNET, METADATA, PORT, PRIVATE, PRIVATE_TEN, PROBE, Uplink},
};

use crate::{
    context::{OwnCase, Sandbox, own_case},
    faults::agent_of,
    host::filters,
    persistence::verb,
};

/// The cases of this file.
pub(crate) fn cases() -> Vec<OwnCase> {
    vec![own_case("policies::a_policy_holds_through_everything", hold)]
}

/// What runs in the guest.
const PROGRAM: &str = include_str!("probe.py");
/// How long what is to be reached may take to answer, on a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(120);
/// How often the program tries everything at least before that counts as a try.
const ROUNDS: u64 = 20;
/// How often a guest is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What a guest tries to reach.
#[derive(Debug, Clone)]
enum Place {
    Datagram(Ipv4Addr, u16),
    Http(Ipv4Addr, u16, &'static str),
    Name(&'static str),
}

impl Place {
    fn json(&self) -> Value {
        match self {
            Self::Datagram(address, port) => json!(["udp", address, port]),
            Self::Http(address, port, host) => json!(["http", address, port, host]),
            Self::Name(name) => json!(["dns", INTERNET, name]),
        }
    }

    /// As the program names it.
    fn key(&self) -> String {
        match self {
            Self::Datagram(address, port) => format!("udp {address} {port}"),
            Self::Http(address, port, host) => format!("http {address} {port} {host}"),
            Self::Name(name) => format!("dns {INTERNET} {name}"),
        }
    }

    fn target(&self) -> Option<SocketAddrV4> {
        match self {
            Self::Datagram(address, port) | Self::Http(address, port, _) => {
                Some(SocketAddrV4::new(*address, *port))
            }
            Self::Name(_) => None,
        }
    }
}

/// A policy, and what it says about the places that there are.
struct Row {
    name: &'static str,
    policy: Value,
    reached: Vec<Place>,
    forbidden: Vec<Place>,
}

fn table() -> Vec<Row> {
    use Place::{Datagram, Http, Name};
    vec![
        Row {
            name: "networks are denied",
            policy: json!({ "deny_cidrs": [format!("{ELSEWHERE}/32")] }),
            reached: vec![Datagram(INTERNET, PROBE), Http(INTERNET, PORT, "any.example")],
            forbidden: vec![Datagram(ELSEWHERE, PROBE), Http(ELSEWHERE, PORT, "denied-network.example")],
        },
        Row {
            name: "networks and names are allowed, and a name denied",
            policy: json!({
                "allow_cidrs": [format!("{ELSEWHERE}/32")],
                "allow_domains": ["*.allowed.example"],
                "deny_domains": ["bad.allowed.example"],
                "dns_servers": [INTERNET.to_string()],
            }),
            reached: vec![
                Name("www.allowed.example"),
                Http(INTERNET, PORT, "www.allowed.example"),
                Datagram(ELSEWHERE, PROBE),
                Http(ELSEWHERE, PORT, "listed.example"),
            ],
            forbidden: vec![
                Name("other.example"),
                Name("bad.allowed.example"),
                Http(INTERNET, PORT, "other.example"),
                Http(INTERNET, PORT, "bad.allowed.example"),
                Http(ELSEWHERE, PORT, "bad.allowed.example"),
                Http(INTERNET, PROBE, "www.allowed.example"),
                Datagram(INTERNET, PROBE),
            ],
        },
        Row {
            name: "there is no internet",
            policy: json!({ "allow_internet_access": false }),
            reached: Vec::new(),
            forbidden: vec![
                Datagram(INTERNET, PROBE),
                Http(INTERNET, PORT, "offline.example"),
                Datagram(ELSEWHERE, PROBE),
                Name("www.allowed.example"),
            ],
        },
    ]
}

/// What no policy opens: this host, private networks, metadata, and the slots of all sandboxes.
async fn never(uplink: &Uplink) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for address in [PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC] {
        places.push(Place::Datagram(address, PROBE));
        places.push(Place::Http(address, PORT, "never.example"));
    }
    for veth in uplink.veths().await? {
        let number: u32 = veth.trim_start_matches("wrenn-v-").parse()?;
        for address in [0x0a0b_0000 + number, 0x0a0c_0000 + 2 * number, 0x0a0c_0000 + 2 * number + 1] {
            places.push(Place::Datagram(address.into(), PROBE));
            places.push(Place::Http(address.into(), PROBE, "never.example"));
        }
    }
    Ok(places)
}

/// What the program says.
#[derive(Debug, Deserialize)]
struct Said {
    rounds: u64,
    plan: u64,
    answers: BTreeMap<String, u64>,
    heard: u64,
    own: u64,
}

/// A sandbox with the program in it, and what it may reach.
struct Guest<'a> {
    sandbox: Sandbox,
    row: &'a Row,
    /// How often what is forbidden had answered before it was forbidden.
    excused: BTreeMap<String, u64>,
    plan: u64,
}

impl Guest<'_> {
    async fn create<'a>(stack: &Stack, row: &'a Row) -> Result<Guest<'a>> {
        let body = json!({ "network": row.policy });
        let mut sandbox = Sandbox::create_with(stack.client(), &body).await?;
        let path = sandbox.path("/files?path=/tmp/probe.py");
        sandbox.client.put(&path, PROGRAM).await?;
        let path = sandbox.path("/exec");
        let started = json!({ "cmd": "python3", "args": ["/tmp/probe.py"], "background": true });
        sandbox.client.post(&path, &started).await?.expect(202)?;
        Ok(Guest { sandbox, row, excused: BTreeMap::new(), plan: 0 })
    }

    /// Tells the program what to try: also the slots that there are by now.
    async fn tell(&mut self, uplink: &Uplink) -> Result<()> {
        self.plan += 1;
        let all = |places: &[Place]| places.iter().map(Place::json).collect::<Vec<_>>();
        let forbidden = [all(&self.row.forbidden), all(&never(uplink).await?)].concat();
        let plan = json!({ "number": self.plan, "reached": all(&self.row.reached), "forbidden": forbidden });
        let path = self.sandbox.path("/files?path=/tmp/plan.json");
        self.sandbox.client.put(&path, plan.to_string()).await?;
        Ok(())
    }

    /// What the program says now. An agent that has just been killed is waited for.
    async fn said(&mut self) -> Result<Said> {
        let (path, end) = (self.sandbox.path("/exec"), Instant::now() + BOUND);
        let question = json!({ "cmd": "cat", "args": ["/dev/shm/probe.json"] });
        loop {
            let answer = self.sandbox.client.post(&path, &question).await?;
            if let Some(text) = answer.json()["stdout"].as_str().filter(|text| text.ends_with('}')) {
                return Ok(serde_json::from_str(text)?);
            }
            ensure!(Instant::now() < end, "{}", answer.text());
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Waits until the program has tried everything and all that is to be reached has answered since this began: then
    /// nothing else has.
    async fn check(&mut self, when: &str) -> Result<()> {
        let (name, end) = (self.row.name, Instant::now() + BOUND);
        let before = self.said().await?;
        loop {
            let said = self.said().await?;
            let count = |said: &Said, key: &str| said.answers.get(key).copied().unwrap_or(0);
            for (key, times) in &said.answers {
                let is_reached = self.row.reached.iter().any(|place| place.key() == *key);
                let excused = self.excused.get(key).copied().unwrap_or(0);
                ensure!(is_reached || *times <= excused, "{name}, {when}: {key} answered: {said:?}");
            }
            ensure!(said.heard == 0, "{name}, {when}: somebody has reached it: {said:?}");
            let answer = |place: &Place| count(&said, &place.key()) > count(&before, &place.key());
            let tried = said.plan == self.plan && said.rounds > before.rounds + ROUNDS && said.own == 1;
            if tried && self.row.reached.iter().all(answer) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{name}, {when}: not all is reached: {before:?} {said:?}");
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// What of that which is forbidden has left a slot, or has arrived.
    async fn check_far_end(&self, uplink: &Uplink, when: &str) -> Result<()> {
        let (left, delivered) = (uplink.left_sandboxes().await?, uplink.delivered().await?);
        let reached: BTreeSet<_> = self.row.reached.iter().filter_map(Place::target).collect();
        let forbidden = [self.row.forbidden.clone(), never(uplink).await?].concat();
        for target in forbidden.iter().filter_map(Place::target).filter(|target| !reached.contains(target)) {
            // The host's own public address is like any other to a slot; it is the host that refuses.
            ensure!(
                *target.ip() == HOST_PUBLIC || !left.contains_key(&target),
                "{}, {when}: {target} left: {left:?}",
                self.row.name
            );
            ensure!(
                !delivered.contains_key(&target),
                "{}, {when}: {target} arrived: {delivered:?}",
                self.row.name
            );
        }
        let hosts = uplink.hosts();
        let asked = |place: &Place| matches!(place, Place::Http(_, _, host) if hosts.contains(*host));
        let allowed = |place: &Place| matches!(place, Place::Http(_, PROBE, _));
        let strays: Vec<_> = forbidden.iter().filter(|place| asked(place) && !allowed(place)).collect();
        ensure!(strays.is_empty(), "{}, {when}: somebody was asked for {strays:?}", self.row.name);
        Ok(())
    }

    async fn snapshot(&mut self, name: &str) -> Result<String> {
        let name = format!("{name}-{}", self.sandbox.id.replace("sb-", ""));
        let body = json!({ "sandbox_id": self.sandbox.id, "name": name });
        self.sandbox.client.post("/v1/snapshots", &body).await?.expect(201)?;
        Ok(name)
    }

    async fn set_policy(&mut self, policy: &Value) -> Result<()> {
        let path = self.sandbox.path("/network");
        self.sandbox.client.put(&path, policy.to_string()).await?.expect(200).map(drop)
    }

    /// Excuses what was under way when a policy came into force: the program tells a little later what it got.
    async fn excuse(&mut self) -> Result<()> {
        let (mut said, end) = (self.said().await?, Instant::now() + BOUND);
        let enough = said.rounds + 2 * ROUNDS;
        while said.rounds < enough {
            ensure!(Instant::now() < end, "{}: the program goes on: {said:?}", self.row.name);
            tokio::time::sleep(ASK_AGAIN).await;
            said = self.said().await?;
        }
        self.excused = said.answers;
        Ok(())
    }

    async fn fork(&mut self, count: usize) -> Result<Vec<Self>> {
        let path = self.sandbox.path("/fork");
        let answer = self.sandbox.client.post(&path, &json!({ "count": count })).await?;
        let children = answer.expect(201)?.json();
        let mut guests = Vec::new();
        for child in children.as_array().context("an array")? {
            let id = child["id"].as_str().context("an id")?.to_owned();
            let sandbox = Sandbox { id, client: self.sandbox.client.clone() };
            guests.push(Self { sandbox, row: self.row, excused: self.excused.clone(), plan: self.plan });
        }
        ensure!(guests.len() == count, "{children}");
        Ok(guests)
    }
}

/// Everything answers whoever may ask, and the kernel counts it: else nothing below proves anything.
async fn controls(uplink: &Uplink) -> Result<()> {
    let all = [INTERNET, ELSEWHERE, PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC];
    for address in all {
        for port in [PORT, PROBE] {
            ensure!(uplink.answers((address, port).into()).await?, "{address}:{port} answers");
        }
        ensure!(uplink.answers_datagram((address, PROBE).into()).await?, "{address} answers a datagram");
    }
    let delivered = uplink.delivered().await?;
    for (address, port) in all.into_iter().flat_map(|address| [(address, PORT), (address, PROBE)]) {
        let count = delivered.get(&SocketAddrV4::new(address, port)).copied().unwrap_or(0);
        ensure!(count > 0, "{address}:{port} is counted: {delivered:?}");
    }
    uplink.forget_packets().await
}

/// There are so many domain filters, each a user of its own, and none of them may do more than serve.
fn check_filters(stack: &Stack, count: usize) -> Result<()> {
    let mut users = BTreeSet::new();
    let filters = filters(&stack.instance()?);
    for (slot, pid) in &filters {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        for (name, value) in [("NoNewPrivs", "1"), ("Seccomp", "2"), ("Threads", "1")] {
            ensure!(of(name) == [value], "{name} of the filter of slot {slot}: {status}");
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            ensure!(of(set) == ["0000000000000000"], "{set} of the filter of slot {slot}: {status}");
        }
        ensure!(of("Uid") == of("Gid") && of("Groups").is_empty(), "slot {slot}: {status}");
        ensure!(of("Uid").iter().all(|id| *id == of("Uid")[0] && id != "0"), "slot {slot}: {status}");
        users.extend(of("Uid"));
    }
    // In a user namespace without numbers for them, all are nobody.
    ensure!(users.len() == filters.len() || users == BTreeSet::from(["65534".to_owned()]), "{users:?}");
    ensure!(filters.len() == count, "filters {filters:?}");
    Ok(())
}

async fn hold() -> Result<()> {
    let mut uplink = Uplink::create().await?;
    uplink.watch().await?;
    controls(&uplink).await?;
    let stack = Stack::start(StackOptions { uplink: Some(uplink), ..StackOptions::default() }).await?;
    for row in table() {
        hold_one(&stack, &row).await.with_context(|| row.name)?;
    }
    stack.stop().await
}

async fn hold_one(stack: &Stack, row: &Row) -> Result<()> {
    let uplink = stack.uplink();
    let mut guest = Guest::create(stack, row).await?;
    guest.tell(uplink).await?;
    let check = async |guest: &mut Guest<'_>, when: &str| -> Result<()> {
        let begin = Instant::now();
        guest.check(when).await?;
        guest.check_far_end(uplink, when).await?;
        eprintln!("{}, {when}: held for {:.1} s", row.name, begin.elapsed().as_secs_f64());
        Ok(())
    };
    check(&mut guest, "at first").await?;
    let has_names = row.policy.get("allow_domains").is_some();
    check_filters(stack, usize::from(has_names)).context("at first")?;
    let targets: BTreeSet<_> = row.reached.iter().filter_map(Place::target).collect();
    let left = uplink.left_sandboxes().await?;
    ensure!(targets.iter().all(|target| left.contains_key(target)), "what leaves is counted: {left:?}");

    verb(&mut guest.sandbox, "pause", &json!({}), "paused").await?;
    verb(&mut guest.sandbox, "resume", &json!({}), "running").await?;
    check(&mut guest, "after a pause").await?;
    let saved = guest.snapshot("saved").await?;
    verb(&mut guest.sandbox, "rollback", &json!({ "snapshot": saved }), "running").await?;
    check(&mut guest, "after a rollback").await?;

    let mut children = guest.fork(2).await?;
    for one in children.iter_mut().chain([&mut guest]) {
        check(one, "after a fork").await?;
        // Each tries the others too, wherever they are by now.
        one.tell(uplink).await?;
    }
    for one in children.iter_mut().chain([&mut guest]) {
        check(one, "beside others").await?;
    }
    check_filters(stack, if has_names { 3 } else { 0 }).context("after a fork")?;
    kill(agent_of(stack)?, Signal::SIGKILL)?;
    for one in children.iter_mut().chain([&mut guest]) {
        check(one, "after the agent was killed").await?;
    }
    for child in children {
        child.sandbox.destroy().await?;
    }

    // What is saved while everything is open comes back to what is said now.
    guest.set_policy(&json!({})).await?;
    let is_open = |said: &Said| said.answers.contains_key(&Place::Datagram(INTERNET, PROBE).key());
    let end = Instant::now() + BOUND;
    while !is_open(&guest.said().await?) {
        ensure!(Instant::now() < end, "{}: an open policy opens", row.name);
        tokio::time::sleep(ASK_AGAIN).await;
    }
    let opened = guest.snapshot("open").await?;
    guest.set_policy(&row.policy).await?;
    guest.excuse().await?;
    uplink.forget_packets().await?;
    uplink.forget_hosts();
    check(&mut guest, "after it was open").await?;
    verb(&mut guest.sandbox, "rollback", &json!({ "snapshot": opened }), "running").await?;
    check(&mut guest, "after a rollback to what was open").await?;
    for name in [saved, opened] {
        guest.sandbox.client.delete(&format!("/v1/snapshots/{name}")).await?.expect(204)?;
    }
    guest.sandbox.destroy().await?;
    uplink.forget_packets().await
}
