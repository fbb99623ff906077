//! Running one external program as a step that a person can follow.
//!
//! A quiet step says what it does and how long it has been at it, keeps the program's output in a log, and
//! shows the end of that log if the program fails. A loud step leaves the terminal to the program.

use std::{
    fs,
    io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    process::{Command, Output, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

/// How often a step says that it is still going: each second on a terminal, where the line is rewritten.
const ON_TERMINAL: Duration = Duration::from_secs(1);
const IN_LOG: Duration = Duration::from_secs(15);
/// How many lines of a failed program's output are shown.
const SHOWN_LINES: usize = 30;

/// Says what begins now.
pub(crate) fn announce(what: &str) {
    println!("==> {what}");
}

/// Runs `command` with its output in the file `log`.
pub(crate) fn quiet(what: &str, log: &Path, command: &mut Command) -> Result<()> {
    announce(what);
    if let Some(parent) = log.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    let output = fs::File::create(log).with_context(|| format!("making {}", log.display()))?;
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("starting {}", name(command)))?;

    let (ended, end) = mpsc::channel();
    let waiter = std::thread::spawn(move || ended.send(child.wait()).is_ok());
    let status = wait(&end, log, None)
        .with_context(|| format!("waiting for {}", name(command)))?
        .with_context(|| format!("waiting for {}", name(command)))?;
    drop(waiter.join());
    if !status.success() {
        show_end(log);
        bail!("{} ended with {status}; all of its output is in {}", name(command), log.display());
    }
    let took = start.elapsed();
    if took >= Duration::from_secs(2) {
        println!("    took {:.0} s", took.as_secs_f64());
    }
    Ok(())
}

/// Waits for a message of the thread that follows a program, and says meanwhile how that program is doing.
pub(crate) fn wait<T>(messages: &Receiver<T>, log: &Path, bound: Option<Duration>) -> Result<T> {
    let terminal = io::stdout().is_terminal();
    let start = Instant::now();
    let message = loop {
        match messages.recv_timeout(if terminal { ON_TERMINAL } else { IN_LOG }) {
            Ok(message) => break Ok(message),
            Err(RecvTimeoutError::Timeout) if bound.is_some_and(|bound| start.elapsed() > bound) => {
                break Err(anyhow!("it took more than {} s", start.elapsed().as_secs()));
            }
            Err(RecvTimeoutError::Timeout) => show_progress(terminal, start, log),
            Err(RecvTimeoutError::Disconnected) => break Err(anyhow!("it ended without an answer")),
        }
    };
    if terminal {
        print!("\r\x1b[K");
    }
    message
}

/// Shows the end of what a failed program said.
pub(crate) fn show_end(log: &Path) {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(SHOWN_LINES)) {
        eprintln!("    {line}");
    }
}

fn show_progress(terminal: bool, start: Instant, log: &Path) {
    let seconds = start.elapsed().as_secs();
    let line = last_line(log).unwrap_or_default();
    if terminal {
        print!("\r\x1b[K    {seconds} s  {line}");
        // A terminal that takes no more output is no reason to stop.
        drop(io::stdout().flush());
    } else {
        println!("    {seconds} s  {line}");
    }
}

/// The last thing that a program said, shortened to fit beside the clock.
fn last_line(log: &Path) -> io::Result<String> {
    const WINDOW: u64 = 512;
    let mut file = fs::File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(WINDOW)))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let line = text.split(['\n', '\r']).map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    Ok(line.chars().filter(|c| !c.is_control()).take(70).collect())
}

/// Runs `command` with the terminal to itself.
pub(crate) fn loud(what: &str, command: &mut Command) -> Result<()> {
    announce(what);
    let status = command.status().with_context(|| format!("starting {}", name(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", described(command));
    }
    Ok(())
}

/// Runs a short `command` and gives what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {}", name(command)))?;
    if !status.success() {
        bail!("{} ended with {status}: {}", described(command), String::from_utf8_lossy(&stderr).trim());
    }
    String::from_utf8(stdout).with_context(|| format!("{} printed what is not text", name(command)))
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn described(command: &Command) -> String {
    let mut text = name(command);
    for argument in command.get_args().take(6) {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
