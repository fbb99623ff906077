//! The machine of a lab, as a process: QEMU, started, listened to within bounds, and ended.
//!
//! ```text
//!  start ─► booting (bound) ─► Ready ─► running (bound) ─► Done ─► killed
//!             └──────────── silence, an end, nonsense ──────┴────► killed, and the console's last lines are the error
//! ```
//!
//! There is nothing to clean up but the process: its disks and its console are files without names, which it opens
//! through this process, its root disk is read-only and what it writes goes to a file that QEMU unlinks as it makes
//! it. And it dies with this process however that dies, because `setpriv` asks the kernel for it before it becomes
//! QEMU. It has no network device, so two of them have no way to each other.

use std::{
    fs::File,
    io::Read as _,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use wrenn_lab::message::{Decoder, Message};

use super::Capacity;

/// The program that is the machine.
pub(super) const QEMU: &str = "qemu-system-x86_64";
/// How long it may take until the first program starts: a machine that is busy with other things may need minutes.
const BOOT_BOUND: Duration = Duration::from_secs(300);
/// How many of the console's last lines belong to an error.
const CONSOLE_LINES: usize = 30;
/// How many messages may be read ahead of who handles them.
const AHEAD: usize = 64;

/// The files that it starts from, as paths that QEMU can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) root: PathBuf,
    pub(super) input: PathBuf,
    pub(super) console: PathBuf,
}

/// The path by which a child of this process opens a file that has no name.
pub(super) fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// The kernel's command line. A panic starts the machine anew, at which QEMU ends. Without `mitigations=off` a
/// translated kernel would work around faults that no translated processor has.
///
/// The clock ticks all the time. A processor of QEMU 7.2 that enters or leaves a guest changes its record of pending
/// interrupts without a lock: one that comes in that moment stays in its controller, and is looked at when
/// the next one comes. Were that the last timer of an idle machine, it would sleep for ever.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 quiet tsc=reliable mitigations=off nohz=off highres=off";

/// QEMU's arguments. Pure.
fn arguments(capacity: Capacity, files: &Files) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    // A comma ends an option's value, unless there are two.
    let value = |path: &Path| text(path).replace(',', ",,");
    let mut arguments = Vec::new();
    let mut add = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
    add("machine", "q35,graphics=off".to_owned());
    add("accel", "tcg,thread=multi".to_owned());
    add("cpu", "EPYC,+svm,+npt".to_owned());
    add("smp", capacity.cpus.to_string());
    add("m", format!("{}M", capacity.memory_mib));
    add("kernel", text(&files.kernel));
    add("initrd", text(&files.initramfs));
    add("append", KERNEL_COMMAND_LINE.to_owned());
    add("drive", format!("if=none,id=root,format=raw,snapshot=on,cache=unsafe,file={}", value(&files.root)));
    add("device", "virtio-blk-pci,drive=root".to_owned());
    add("drive", format!("if=none,id=input,format=raw,readonly=on,file={}", value(&files.input)));
    add("device", "virtio-blk-pci,drive=input".to_owned());
    add("chardev", "stdio,id=host,signal=off".to_owned());
    add("device", "virtio-serial-pci".to_owned());
    add("device", "virtserialport,chardev=host".to_owned());
    add("chardev", format!("file,id=console,append=on,path={}", value(&files.console)));
    add("serial", "chardev:console".to_owned());
    add("display", "none".to_owned());
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        arguments.push(flag.to_owned());
    }
    arguments
}

/// A machine that runs.
#[derive(Debug)]
pub(super) struct Machine {
    process: Child,
    console: File,
    messages: Receiver<Result<Message>>,
    since: Instant,
    phase: Phase,
    run_bound: Duration,
}

/// What it is being waited for, and from when on.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Booting,
    Running(Instant),
}

impl Machine {
    /// Starts it. The console is a file that is open for appending.
    pub(super) fn start(capacity: Capacity, files: &Files, console: File) -> Result<Self> {
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", QEMU])
            .args(arguments(capacity, files))
            // Never written to. Its end would be the end of the port, so it is kept open.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What QEMU says of itself belongs to what the machine's console says.
            .stderr(console.try_clone().context("sharing the console")?)
            .spawn()
            .context("starting QEMU by setpriv")?;
        let mut stdout = process.stdout.take().context("QEMU has no output")?;
        let (found, messages) = mpsc::sync_channel(AHEAD);
        thread::spawn(move || {
            let mut decoder = Decoder::default();
            let mut part = vec![0; 1 << 16];
            loop {
                let outcome = match stdout.read(&mut part) {
                    Ok(0) => return,
                    Ok(length) => {
                        decoder.feed(part.get(..length).unwrap_or_default());
                        Ok(())
                    }
                    Err(error) => Err(anyhow!(error).context("reading what the machine says")),
                };
                if let Err(error) = outcome {
                    drop(found.send(Err(error)));
                    return;
                }
                loop {
                    let message = match decoder.next_message() {
                        Ok(None) => break,
                        Ok(Some(message)) => Ok(message),
                        Err(error) => Err(anyhow!(error).context("understanding what the machine says")),
                    };
                    let is_last = message.is_err();
                    if found.send(message).is_err() || is_last {
                        return;
                    }
                }
            }
        });
        Ok(Self {
            process,
            console,
            messages,
            since: Instant::now(),
            phase: Phase::Booting,
            run_bound: capacity.bound,
        })
    }

    /// The next thing that it says, within the bound of what it is at.
    pub(super) fn next_message(&mut self) -> Result<Message> {
        let (from, bound, what) = match self.phase {
            Phase::Booting => (self.since, BOOT_BOUND, "booted"),
            Phase::Running(from) => (from, self.run_bound, "done what it was started for"),
        };
        let left = bound.saturating_sub(from.elapsed());
        let problem = match self.messages.recv_timeout(left) {
            Ok(Ok(Message::Failed(why))) => anyhow!("the lab cannot go on: {why}"),
            Ok(Ok(message)) => {
                if matches!(message, Message::Ready(_)) {
                    self.phase = Phase::Running(Instant::now());
                }
                return Ok(message);
            }
            Ok(Err(error)) => error,
            Err(RecvTimeoutError::Timeout) => {
                anyhow!("the lab has not {what} within {} s, and was ended", bound.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.process.wait().context("waiting for QEMU")?;
                anyhow!("the lab ended by itself, QEMU with {status}")
            }
        };
        bail!("{problem:#}\nthe last lines of its console:\n{}", self.end_of_console())
    }

    /// How long ago it was started.
    pub(super) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    fn end_of_console(&self) -> String {
        const WINDOW: u64 = 1 << 16;
        let length = self.console.metadata().map_or(0, |metadata| metadata.len());
        let mut bytes = vec![0; usize::try_from(length.min(WINDOW)).unwrap_or(0)];
        let from = length.saturating_sub(WINDOW);
        let read = self.console.read_at(&mut bytes, from).unwrap_or(0);
        last_lines(&String::from_utf8_lossy(bytes.get(..read).unwrap_or_default()), CONSOLE_LINES)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and is waited for all the same.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The last lines of a console, indented, and without what would move the cursor of a terminal.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| *c == '\t' || !c.is_control()).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(count));
    shown.map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_of_a_machine() {
        let files = Files {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            root: "/cache,1/root".into(),
            input: "/proc/1/fd/2".into(),
            console: "/proc/1/fd/3".into(),
        };
        let capacity = Capacity { memory_mib: 1024, cpus: 2, bound: Duration::from_secs(1) };
        let found = arguments(capacity, &files);
        let pairs: Vec<(&str, &str)> = found
            .chunks(2)
            .filter_map(|pair| Some((pair.first()?.as_str(), pair.get(1)?.as_str())))
            .collect();
        for pair in [
            ("-cpu", "EPYC,+svm,+npt"),
            ("-m", "1024M"),
            ("-smp", "2"),
            ("-drive", "if=none,id=root,format=raw,snapshot=on,cache=unsafe,file=/cache,,1/root"),
            ("-drive", "if=none,id=input,format=raw,readonly=on,file=/proc/1/fd/2"),
        ] {
            assert!(pairs.contains(&pair), "{pair:?} is not in {pairs:?}");
        }
        let roots = found.iter().position(|argument| argument == "virtio-blk-pci,drive=root");
        let inputs = found.iter().position(|argument| argument == "virtio-blk-pci,drive=input");
        assert!(roots < inputs, "the root disk is the first");
        assert!(!found.iter().any(|argument| argument.contains("netdev")), "it has no network");
    }

    #[test]
    fn the_end_of_a_console_is_text() {
        assert_eq!(last_lines("one\r\n\x1b[2Jtwo\n\n\tthree\n", 2), "    [2Jtwo\n    \tthree\n");
        assert_eq!(last_lines("", 2), "");
    }
}
