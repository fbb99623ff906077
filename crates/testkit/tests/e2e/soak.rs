//! What holds once has to hold for ever: long runs, of which `make test` does a sample and `make soak` the whole.
//!
//! The seed is `WRENN_SEED`, or 1. It decides what is done; when things happen is up to the machine.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use wrenn_testkit::{Stack, StackOptions};

use crate::{
    context::{OwnCase, Sandbox, own_case},
    faults::{agent_of, descendants, eventually, left_of},
};

/// The cases of this file.
pub(crate) fn cases() -> Vec<OwnCase> {
    vec![own_case("soak::pause_and_resume_keep_memory_files_and_processes", cycles)]
}

/// How long layers that nothing stands on may stay: they are looked for now and then, and young ones are left.
const LAYERS_GONE: Duration = Duration::from_secs(420);

/// Whether the whole count is asked for.
pub(crate) fn is_whole() -> bool {
    std::env::var_os("WRENN_SOAK").is_some()
}

/// The seed of this run.
pub(crate) fn seed() -> u64 {
    std::env::var("WRENN_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    /// Begins a series.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one, below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Median, 99th percentile and largest, in milliseconds.
pub(crate) fn spread(durations: &mut [Duration]) -> String {
    durations.sort_unstable();
    let rank = |percent: usize| (durations.len() * percent).div_ceil(100).max(1) - 1;
    let at = |index: usize| durations.get(index).map_or(0, Duration::as_millis);
    let last = durations.len().saturating_sub(1);
    format!("p50 {} ms, p99 {} ms, max {} ms, of {}", at(rank(50)), at(rank(99)), at(last), durations.len())
}

/// What is in a directory of the agent.
pub(crate) fn entries(stack: &Stack, directory: &str) -> Result<Vec<String>> {
    let path = stack.dir().join("agent").join(directory);
    let names = std::fs::read_dir(&path).with_context(|| format!("list {}", path.display()))?;
    names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Nothing is left of the sandboxes of a stack, which is stopped then. Layers and snapshots are looked for in a whole
/// run only, because young ones are collected minutes later.
pub(crate) async fn leaves_nothing(stack: Stack) -> Result<()> {
    let records = entries(&stack, "sandboxes")?;
    ensure!(records.is_empty(), "records are left: {records:?}");
    if is_whole() {
        let empty = async || {
            ["disks", "snapshots"].iter().all(|name| entries(&stack, name).is_ok_and(|left| left.is_empty()))
        };
        let gone = eventually(LAYERS_GONE, empty).await;
        ensure!(gone, "left: {:?} {:?}", entries(&stack, "disks")?, entries(&stack, "snapshots")?);
    }
    let instance = stack.instance()?;
    stack.stop().await?;
    let left = left_of(&instance)?;
    ensure!(left.is_empty(), "left: {left:?}");
    ensure!(!Path::new(&format!("/run/wrenn/{instance}")).exists(), "a directory of sockets is left");
    for entry in std::fs::read_dir("/run/wrenn/slots")? {
        let path = entry?.path();
        let owner = std::fs::read_to_string(&path).unwrap_or_default();
        ensure!(!owner.contains(&instance), "a slot is left: {}", path.display());
    }
    Ok(())
}

/// Holds a pattern in its memory and files beside it, changes both when it is told to, and says what they are.
const KEEPER: &str = r#"
import hashlib, mmap, os, random, socketserver, tempfile
PAGE, PAGES, FILES = 4096, 1024, 16
HOME = "/home/user/kept"
memory = mmap.mmap(-1, PAGE * PAGES)
memory[:] = random.Random(0).randbytes(PAGE * PAGES)
os.makedirs(HOME)
# What is open: a file at some place in it, one without a name, and a pipe with something in it.
held = open("/home/user/held", "w+b", buffering=0)
nameless = tempfile.TemporaryFile(dir="/home/user", buffering=0)
reader, writer = os.pipe()
os.write(writer, bytes(32))
def change(seed):
    numbers = random.Random(seed)
    held.seek(numbers.randrange(65536))
    held.write(numbers.randbytes(512))
    os.pwrite(nameless.fileno(), numbers.randbytes(512), numbers.randrange(65536))
    os.read(reader, 32)
    os.write(writer, numbers.randbytes(32))
    for _ in range(96):
        at = numbers.randrange(PAGES) * PAGE
        kind = numbers.randrange(3)
        if kind == 0:
            memory[at:at + PAGE] = bytes(PAGE)
        elif kind == 1:
            memory[at:at + PAGE] = numbers.randbytes(PAGE)
        else:
            memory[at + numbers.randrange(PAGE)] = numbers.randrange(256)
    with open(f"{HOME}/{numbers.randrange(FILES)}", "wb") as file:
        file.write(numbers.randbytes(numbers.randrange(65536)))
        if numbers.randrange(2):
            file.flush()
            os.fsync(file.fileno())
def state():
    files = hashlib.sha256()
    for name in sorted(os.listdir(HOME)):
        with open(f"{HOME}/{name}", "rb") as file:
            files.update(name.encode() + file.read())
    waiting = os.read(reader, 32)
    os.write(writer, waiting)
    files.update(b"%d" % held.tell() + os.pread(nameless.fileno(), 1 << 20, 0) + waiting)
    files.update(os.pread(held.fileno(), 1 << 20, 0))
    return f"{os.getpid()} {hashlib.sha256(memory).hexdigest()} {files.hexdigest()}"
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        words = self.rfile.readline().decode().split()
        if words[0] == "change":
            change(int(words[1]))
        self.wfile.write(state().encode())
socketserver.TCPServer.allow_reuse_address = True
socketserver.TCPServer(("127.0.0.1", 8124), Handler).serve_forever()
"#;

/// How many cycles the agent has made pools, threads and connections after, that stay.
const WARM: usize = 2;
/// How long what ends by itself may take: connections that nobody needs, threads that wait for work.
const SETTLED: Duration = Duration::from_secs(120);
/// How many threads more there may be: those that wait for the disk come and go with what is under way at once.
const MORE_THREADS: usize = 8;

/// What an agent holds of its host.
#[derive(Debug)]
struct Held {
    files: usize,
    threads: usize,
    /// Machines and filters, and what nobody has waited for.
    children: usize,
}

impl Held {
    fn by(agent: i32) -> Result<Self> {
        let count = |what: &str| {
            let path = format!("/proc/{agent}/{what}");
            Ok::<_, anyhow::Error>(std::fs::read_dir(&path).with_context(|| format!("list {path}"))?.count())
        };
        let agent = u32::try_from(agent)?;
        let children = descendants(agent).len().saturating_sub(1);
        Ok(Self { files: count("fd")?, threads: count("task")?, children })
    }

    fn is_within(&self, before: &Self) -> bool {
        self.files <= before.files
            && self.threads <= before.threads + MORE_THREADS
            && self.children <= before.children
    }
}

/// Starts a program of Python in the background and waits until it listens.
async fn start_keeper(sandbox: &mut Sandbox) -> Result<()> {
    let path = sandbox.path("/files?path=/home/user/keeper.py");
    sandbox.client.put(&path, KEEPER).await?;
    let path = sandbox.path("/exec");
    let started = json!({ "cmd": "python3", "args": ["/home/user/keeper.py"], "background": true });
    sandbox.client.post(&path, &started).await?.expect(202)?;
    let wait = "for i in $(seq 400); do (echo > /dev/tcp/127.0.0.1/8124) 2>/dev/null && exit 0; sleep 0.05; done; exit 1";
    let up = sandbox.exec(&json!({ "cmd": "/bin/bash", "args": ["-c", wait] })).await?;
    ensure!(up["exit_code"] == 0, "it does not listen: {up}");
    Ok(())
}

/// Tells the keeper something, and answers with its process, the digest of its memory and that of its files.
async fn tell(sandbox: &mut Sandbox, words: &str) -> Result<String> {
    let line = format!("exec 3<>/dev/tcp/127.0.0.1/8124 && echo {words} >&3 && cat <&3");
    let said = sandbox.exec(&json!({ "cmd": "/bin/bash", "args": ["-c", line] })).await?;
    let state = said["stdout"].as_str().unwrap_or_default().to_owned();
    ensure!(said["exit_code"] == 0 && state.split(' ').count() == 3, "{said}");
    Ok(state)
}

async fn verb(sandbox: &mut Sandbox, verb: &str) -> Result<Duration> {
    let begin = Instant::now();
    let path = sandbox.path(&format!("/{verb}"));
    sandbox.client.post(&path, &json!({})).await?.expect(200)?;
    Ok(begin.elapsed())
}

async fn cycles() -> Result<()> {
    let count = if is_whole() { 500 } else { 3 };
    let stack = Stack::start(StackOptions::default()).await?;
    let mut numbers = Numbers::new(seed());
    let mut sandbox = Sandbox::create(stack.client()).await?;
    start_keeper(&mut sandbox).await?;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    let first = tell(&mut sandbox, "state").await?;
    let agent = agent_of(&stack)?.as_raw();
    let mut held = None;
    for cycle in 0..count {
        if cycle == WARM {
            held = Some(Held::by(agent)?);
        }
        let before = tell(&mut sandbox, &format!("change {}", numbers.below(1 << 32))).await?;
        pauses.push(verb(&mut sandbox, "pause").await?);
        let begin = Instant::now();
        verb(&mut sandbox, "resume").await?;
        sandbox.exec(&json!({ "cmd": "true" })).await?;
        resumes.push(begin.elapsed());
        if cycle % 10 == 1 {
            // Now the files come from the disk, and not from what was saved of the memory.
            sandbox.output("sync; echo 3 | sudo tee /proc/sys/vm/drop_caches").await?;
        }
        let after = tell(&mut sandbox, "state").await?;
        ensure!(after == before, "cycle {cycle}: {before} became {after}");
        ensure!(after.split(' ').next() == first.split(' ').next(), "another process: {first} {after}");
    }
    let before = held.context("there are more cycles than that")?;
    let settled =
        eventually(SETTLED, async || Held::by(agent).is_ok_and(|after| after.is_within(&before))).await;
    let after = Held::by(agent)?;
    ensure!(settled, "the agent held {before:?} after {WARM} cycles, and {after:?} after {count}");
    sandbox.destroy().await?;
    leaves_nothing(stack).await?;
    println!(
        "soak: pause and resume of a sandbox, {count}, seed {}, memory, files and process the same each time; \
         the agent held {before:?} and then {after:?}; \
         pause {}; resume to exec {}",
        seed(),
        spread(&mut pauses),
        spread(&mut resumes)
    );
    Ok(())
}
