//! The published E2B SDK, unmodified, against the real agent: `tests/sdk/*.py`, one test for each file.
//!
//! ```text
//!  cargo test ─► this ─► Python environment in the user's cache, made once ─► pytest of one file ─► agent of its own,
//!                                                                                                   in namespaces
//! ```
//!
//! The environment is named by everything that it is made from, made beside under another name and then renamed:
//! one that is there is whole, and of two runs that make it at once one wins.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

use std::{
    env, fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use libtest_mimic::{Arguments, Failed, Trial};
use sha2::{Digest as _, Sha256};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk");
/// How long making the environment may take, and the tests of one file.
const BOUND: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: namespaces and users need root");
    }
    let mut files: Vec<String> = fs::read_dir(SOURCES)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("test_") && name.ends_with(".py"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "there are no tests in {SOURCES}");
    let trials = files
        .into_iter()
        .map(|file| {
            let name = format!("sdk::{}", file.trim_start_matches("test_").trim_end_matches(".py"));
            Trial::test(name, move || run(&file)).with_ignored_flag(!root)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run(file: &str) -> Result<(), Failed> {
    let python = environment().map_err(|error| format!("no Python environment: {error}"))?;
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sdk-{}-{file}", std::process::id()));
    let mut command = Command::new(python);
    command
        .args(["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--basetemp"])
        .arg(&temporary)
        .arg(format!("{SOURCES}/{file}"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("ENVD", env!("CARGO_BIN_EXE_envd"));
    let outcome = bounded(command);
    // What is left is in the build directory.
    let _ = fs::remove_dir_all(temporary);
    let said = outcome?;
    println!("{file}: {}", said.lines().last().unwrap_or_default());
    Ok(())
}

/// The Python of an environment with the SDK in it.
fn environment() -> io::Result<PathBuf> {
    let requirements = Path::new(SOURCES).join("requirements.txt");
    let version = said(Command::new("python3").arg("--version"))?;
    let digest =
        Sha256::new().chain_update("1\n").chain_update(&version).chain_update(fs::read(&requirements)?);
    let name: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let cache = match (env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache).join("wrenn"),
        (_, Some(home)) => PathBuf::from(home).join(".cache/wrenn"),
        _ => return Err(io::Error::other("neither XDG_CACHE_HOME nor HOME is set")),
    };
    let place = cache.join("python").join(name);
    if !place.is_dir() {
        fs::create_dir_all(cache.join("python"))?;
        let made = place.with_extension(format!("{}-{:?}", std::process::id(), thread::current().id()));
        let python = made.join("bin/python");
        let making = bounded_command("python3", &["-m", "venv"], &made).and_then(|_| {
            let mut install = Command::new(&python);
            install.args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements);
            bounded(install)
        });
        // Whoever was first has it in place; ours is not needed then.
        let placed = making.map(|_| fs::rename(&made, &place));
        let _ = fs::remove_dir_all(&made);
        placed
            .map_err(|error| io::Error::other(error.message().unwrap_or("it failed").to_owned()))?
            .or_else(|error| if place.is_dir() { Ok(()) } else { Err(error) })?;
    }
    Ok(place.join("bin/python"))
}

fn bounded_command(program: &str, words: &[&str], path: &Path) -> Result<String, Failed> {
    let mut command = Command::new(program);
    command.args(words).arg(path);
    bounded(command)
}

fn said(command: &mut Command) -> io::Result<Vec<u8>> {
    Ok(command.stdin(Stdio::null()).output()?.stdout)
}

/// Runs a program to its end or that of its time, with everything that it starts.
fn bounded(mut command: Command) -> Result<String, Failed> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    let group = rustix::process::Pid::from_child(&child);
    let (done, wait) = mpsc::channel();
    let waiter = thread::spawn(move || done.send(child.wait_with_output()));
    let output = match wait.recv_timeout(BOUND) {
        Ok(output) => output?,
        Err(_) => {
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL)?;
            let _ = waiter.join();
            return Err(format!("{program} did not end within {BOUND:?}").into());
        }
    };
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{program}: {}\n{text}", output.status).into())
    }
}
