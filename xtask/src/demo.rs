//! `make demo`: a program runs in a microVM, through the public API, and a table tells what took how long.
//!
//! It starts a stack of its own on a free port, in a directory of its own, so that it disturbs no other and
//! leaves nothing behind; it uses that stack the way a person does, through the `wrenn` program.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    cache, host,
    repository::Repository,
    stack::{self, Product},
    step,
};

/// What is run in the sandbox.
const PROGRAM: &str = include_str!("../demo.py");
/// How long the stack may take to be ready.
const START_BOUND: Duration = Duration::from_secs(300);
/// How long it may take to end.
const STOP_BOUND: Duration = Duration::from_secs(90);

/// Name and duration of what was done, in order.
type Phases = Vec<(String, Option<Duration>)>;

pub(crate) fn run(repository: &Repository) -> Result<()> {
    host::require_sandboxes()?;
    let mut phases = Phases::new();
    let product = timed(&mut phases, "set up (packages, images, programs)", || stack::build(repository))?;
    let directory = make_directory(&std::env::temp_dir())?;
    let result = use_stack(&product, &directory, &mut phases);
    match result {
        Ok(()) => cache::remove(&directory)?,
        Err(error) => {
            step::show_end(&log(&directory));
            bail!(error.context(format!("the stack's directory is kept: {}", directory.display())));
        }
    }
    print_table(&phases);
    Ok(())
}

fn use_stack(product: &Product, directory: &Path, phases: &mut Phases) -> Result<()> {
    let stack = timed(phases, "start the stack", || Stack::start(product, directory))?;

    step::announce("creating a sandbox");
    let created = timed(phases, "create a sandbox", || {
        let text = stack.wrenn(&["--output", "json", "sandbox", "create", "--timings"])?;
        serde_json::from_str::<Value>(&text).with_context(|| format!("understanding {text:?}"))
    })?;
    let id = created["id"].as_str().context("the new sandbox has no id")?.to_owned();
    for phase in created["timings"].as_array().into_iter().flatten() {
        let name = phase["description"].as_str().or_else(|| phase["name"].as_str()).unwrap_or("?");
        let took = phase["milliseconds"].as_f64().map(|ms| Duration::from_secs_f64((ms / 1000.0).max(0.0)));
        phases.push((format!("    of which: {name}"), took));
    }

    step::announce(&format!("running a Python program in {id}"));
    let output = timed(phases, "run the program", || {
        stack.wrenn(&["sandbox", "exec", &id, "--", "python3", "-c", PROGRAM])
    })?;
    println!();
    for line in output.lines() {
        println!("    {line}");
    }
    println!();
    ensure!(output.contains("Hello from a microVM"), "that is not what the program prints");

    step::announce(&format!("destroying {id}"));
    timed(phases, "destroy the sandbox", || stack.wrenn(&["sandbox", "rm", &id]))?;
    step::announce("stopping the stack");
    timed(phases, "stop the stack", || stack.stop())
}

fn timed<T>(phases: &mut Phases, name: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = action().with_context(|| name.to_owned());
    phases.push((name.to_owned(), Some(start.elapsed())));
    result
}

fn print_table(phases: &Phases) {
    let width = phases.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    println!();
    for (name, took) in phases {
        println!("{name:width$}  {:>10}", took.map_or_else(|| "-".to_owned(), in_words));
    }
}

/// A duration with the precision that is of interest.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 10.0 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.0} s   ") }
}

fn log(directory: &Path) -> PathBuf {
    directory.join("stack.log")
}

/// A new directory. Not in the clone, which may be where the database's unprivileged user cannot go.
fn make_directory(parent: &Path) -> Result<PathBuf> {
    let mut number = std::process::id();
    loop {
        let directory = parent.join(format!("wrenn-demo-{number}"));
        match fs::create_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            result => {
                result.with_context(|| format!("making {}", directory.display()))?;
                return Ok(directory);
            }
        }
    }
}

/// A stack of the demo's own.
struct Stack {
    child: Child,
    program: PathBuf,
    base_url: String,
    api_key: String,
}

impl Stack {
    fn start(product: &Product, directory: &Path) -> Result<Self> {
        step::announce("starting the stack: database, host agent, control plane");
        let log = log(directory);
        let mut child = Command::new(&product.program)
            .args(["dev", "--listen", "127.0.0.1:0", "--dir"])
            .arg(directory)
            .arg("--images")
            .arg(&product.images)
            .env_remove("DATABASE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("starting {}", product.program.display()))?;
        let stdout = child.stdout.take().context("the stack has no output")?;
        let mut stack =
            Self { child, program: product.program.clone(), base_url: String::new(), api_key: String::new() };

        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            // Read to the end, so that the stack never waits for somebody to read.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.contains("\"ready\"") {
                    drop(send.send(line));
                }
            }
        });
        let line =
            step::wait(&lines, &log, Some(START_BOUND)).context("waiting for the stack to be ready")?;
        let ready: Value = serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))?;
        let text =
            |key: &str| ready[key].as_str().map(str::to_owned).with_context(|| format!("no {key} in {line}"));
        (stack.base_url, stack.api_key) = (text("base_url")?, text("api_key")?);
        println!("    {}", stack.base_url);
        Ok(stack)
    }

    /// Runs the command line program against this stack and gives what it prints.
    fn wrenn(&self, arguments: &[&str]) -> Result<String> {
        step::output(
            Command::new(&self.program)
                .args(arguments)
                .env("WRENN_BASE_URL", &self.base_url)
                .env("WRENN_API_KEY", &self.api_key),
        )
    }

    fn stop(mut self) -> Result<()> {
        let status = self.end().context("the stack did not end in time and was killed")?;
        ensure!(status.success(), "the stack ended with {status}");
        Ok(())
    }

    /// Asks the stack to stop and waits; kills it if it does not.
    fn end(&mut self) -> Option<std::process::ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        let pid = Pid::from_child(&self.child);
        let _ = kill_process(pid, Signal::TERM);
        let (send, ended) = mpsc::channel::<()>();
        // The bound is kept by a thread that kills unless it is told in time that there is no more need.
        let killer = std::thread::spawn(move || {
            let late = ended.recv_timeout(STOP_BOUND) == Err(mpsc::RecvTimeoutError::Timeout);
            if late {
                let _ = kill_process(pid, Signal::KILL);
            }
            late
        });
        let status = self.child.wait().ok();
        drop(send);
        if killer.join().unwrap_or(true) { None } else { status }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.end();
    }
}
