//! What an SDK needs to run, made once for all clones, and programs with a bound.
//!
//! An environment is named by everything that it is made from, made beside under another name and then renamed: one that
//! is there is whole, and of two runs that make it at once one wins.

use std::{
    env, fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use libtest_mimic::Failed;
use sha2::{Digest as _, Sha256};

/// How long making an environment may take, and the tests of one file.
const BOUND: Duration = Duration::from_secs(300);

/// What a program printed, and whether it was content.
pub(crate) struct Said {
    pub(crate) success: bool,
    pub(crate) text: String,
}

/// The environment of that kind made from `ingredients`: the one that is there, or else what `make` makes in the
/// directory that it is given, which does not exist yet.
pub(crate) fn environment(
    kind: &str,
    ingredients: &[&[u8]],
    make: impl FnOnce(&Path) -> Result<(), Failed>,
) -> Result<PathBuf, Failed> {
    let digest = ingredients.iter().fold(Sha256::new(), |digest, bytes| digest.chain_update(bytes));
    let name: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let cache = match (env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache).join("wrenn"),
        (_, Some(home)) => PathBuf::from(home).join(".cache/wrenn"),
        _ => return Err("neither XDG_CACHE_HOME nor HOME is set".into()),
    };
    let place = cache.join(kind).join(name);
    if !place.is_dir() {
        fs::create_dir_all(cache.join(kind))?;
        let made = place.with_extension(format!("{}-{:?}", std::process::id(), thread::current().id()));
        // Whoever was first has it in place; ours is not needed then.
        let placed = make(&made).map(|()| fs::rename(&made, &place));
        let _ = fs::remove_dir_all(&made);
        placed?.or_else(|error| if place.is_dir() { Ok(()) } else { Err(error) })?;
    }
    Ok(place)
}

/// What a program says of itself; nothing if it is not there.
pub(crate) fn version(program: &str) -> io::Result<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a program that has to succeed.
pub(crate) fn succeed(command: Command) -> Result<String, Failed> {
    let program = command.get_program().to_string_lossy().into_owned();
    match bounded(command)? {
        Said { success: true, text } => Ok(text),
        Said { text, .. } => Err(format!("{program} failed\n{text}").into()),
    }
}

/// Runs a program to its end or that of its time, with everything that it starts.
pub(crate) fn bounded(mut command: Command) -> Result<Said, Failed> {
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
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Said { success: output.status.success(), text: text.concat() })
}

/// A directory of one run's own below the build's.
pub(crate) fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sdk-{}-{name}", std::process::id()))
}
