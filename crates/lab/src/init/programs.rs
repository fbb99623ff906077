//! Running programs as the first process of a machine does: what they leave behind is reaped and ended.
//!
//! Nothing here waits for one child alone. Orphans come to the first process, and one that is not reaped stays in
//! /proc for ever, where a test would look for it.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Read,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
};
use wrenn_lab::{
    message::{Exit, Message},
    plan::{LAB_VARIABLE, OUTPUT, OUTPUT_VARIABLE, Program},
};

use crate::{PART, port::Port};

/// What every program has in its environment. Nothing in the lab listens to the kernel's device events, and whoever
/// makes devices must not wait for somebody to do so.
const ENVIRONMENT: [(&str, &str); 7] = [
    ("DM_DISABLE_UDEV", "1"),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("USER", "root"),
    (LAB_VARIABLE, "1"),
    (OUTPUT_VARIABLE, OUTPUT),
];

/// Runs a program of the plan and sends what it writes. It has ended when it has, whatever it left running is killed.
pub(crate) fn run(program: &Program, environment: &BTreeMap<String, String>, port: &Port) -> Result<Exit> {
    fs::create_dir_all(&program.directory)
        .with_context(|| format!("making {}", program.directory.display()))?;
    let mut command = command(&program.path, environment);
    command.args(&program.arguments).current_dir(&program.directory);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("starting it")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = (stdout.context("it has no output")?, stderr.context("it has no output")?);
    thread::scope(|scope| {
        let output = scope.spawn(|| in_parts(stdout, |part| port.send(&Message::Output(part.to_vec()))));
        let error_output =
            scope.spawn(|| in_parts(stderr, |part| port.send(&Message::ErrorOutput(part.to_vec()))));
        let how = reap(child.id());
        // Only when nobody is left who could write does the output end.
        end_all()?;
        for relay in [output, error_output] {
            let Ok(sent) = relay.join() else { bail!("the relay of its output panicked") };
            sent?;
        }
        how
    })
}

/// Runs a program and gives what it writes to somebody, in parts.
pub(crate) fn relay(
    path: &Path,
    arguments: &[&str],
    environment: &BTreeMap<String, String>,
    take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut child = command(path, environment)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", path.display()))?;
    let stdout = child.stdout.take().context("it has no output")?;
    in_parts(stdout, take)?;
    let how = reap(child.id())?;
    ensure!(how == Exit::Code(0), "{} ended with {how:?}", path.display());
    Ok(())
}

/// Runs a program that helps to set the machine up. What it says is on the console.
pub(crate) fn help(program: &str, arguments: &[&str]) -> Result<()> {
    let child = command(program, &BTreeMap::new())
        .args(arguments)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let how = reap(child.id())?;
    ensure!(how == Exit::Code(0), "{program} {} ended with {how:?}", arguments.join(" "));
    Ok(())
}

fn command(program: impl AsRef<OsStr>, environment: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(ENVIRONMENT).envs(environment).stdin(Stdio::null());
    command
}

fn in_parts(mut from: impl Read, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut part = vec![0; PART];
    loop {
        match from.read(&mut part).context("reading the output of a program")? {
            0 => return Ok(()),
            length => take(part.get(..length).unwrap_or_default())?,
        }
    }
}

/// Reaps whoever ends until it is the one with this number.
fn reap(wanted: u32) -> Result<Exit> {
    loop {
        let ended = match wait(WaitOptions::empty()) {
            Err(Errno::INTR) => continue,
            ended => ended.context("waiting for programs")?,
        };
        let Some((pid, status)) = ended else { continue };
        if u32::try_from(pid.as_raw_nonzero().get()) != Ok(wanted) {
            continue;
        }
        let number = |value: Option<i32>| value.and_then(|value| u8::try_from(value).ok());
        if let Some(code) = number(status.exit_status()) {
            return Ok(Exit::Code(code));
        }
        if let Some(signal) = number(status.terminating_signal()) {
            return Ok(Exit::Signal(signal));
        }
    }
}

/// Kills every process but this one, and reaps them, until there is none.
fn end_all() -> Result<()> {
    loop {
        // Fails when there is nobody to be killed.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        match wait(WaitOptions::empty()) {
            Err(Errno::CHILD) => return Ok(()),
            Err(Errno::INTR) | Ok(_) => {}
            Err(error) => return Err(error).context("waiting for what a program left behind"),
        }
    }
}
