//! Which QEMU there is, and what runs the guest.
//!
//! An openable `/dev/kvm` is no proof. There are hosts whose paravirtual KVM takes every call, runs user code
//! at full speed and a guest's kernel at one instruction in a thousand, and never reaches init. So KVM is used
//! only after a machine with the real kernel and initramfs has said on its console that it is ready, within
//! a bound. The answer holds until the host boots again or QEMU or the guest changes; it is kept in a file, so
//! that only the first start pays.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};
use wrenn_host_linux::{process::Spawn, tsc};
use wrenn_types::{MemoryMib, Shape, Vcpus};

use super::{
    Qemu,
    arguments::{Console, Launch, Memory, Start, arguments, cpu_model, kernel_command_line, machine_type},
    launch::Engine,
};
use crate::{
    Accelerator, GuestBundle, VmmError, VmmIdentity, VmmResult, host_cpu,
    program::{self, end, start},
    tail::Tail,
};

/// What the guest prints when its agent listens.
const READY: &str = "wrenn-guest ready";
const DEFAULT_PROGRAM: &str = "qemu-system-x86_64";
const REMEDY: &str = "install the package qemu-system-x86, or set WRENN_QEMU to the program";
/// A guest on real KVM is up in a second or two; one that needs longer is better off translated.
const PROBE_BOUND: Duration = Duration::from_secs(10);
/// How long the time stamp counter is watched.
const TSC_INTERVAL: Duration = Duration::from_millis(50);
const KVM: &str = "/dev/kvm";

/// Who decides what runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AcceleratorChoice {
    /// KVM where it proves itself, else TCG.
    #[default]
    Auto,
    /// This one, without a probe.
    Always(Accelerator),
}

/// How to look for QEMU.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// The program; else `qemu-system-x86_64` on the `PATH`.
    pub program: Option<Utf8PathBuf>,
    /// Who decides what runs the guest.
    pub accelerator: AcceleratorChoice,
    /// The guest to probe KVM with. Without one, KVM is never found to work.
    pub guest: Option<GuestBundle>,
    /// Where the outcome of the probe is kept for the next start.
    pub cache_file: Option<Utf8PathBuf>,
    /// How long the probe's guest may take until it is ready.
    pub probe_bound: Duration,
}

impl Default for QemuOptions {
    fn default() -> Self {
        Self {
            program: None,
            accelerator: AcceleratorChoice::Auto,
            guest: None,
            cache_file: None,
            probe_bound: PROBE_BOUND,
        }
    }
}

impl QemuOptions {
    /// What the environment asks for: `WRENN_QEMU` names the program, `WRENN_ACCEL` is `auto`, `tcg` or `kvm`.
    ///
    /// # Errors
    /// `WRENN_ACCEL` is something else.
    pub fn from_environment() -> VmmResult<Self> {
        let program = std::env::var("WRENN_QEMU").ok().filter(|program| !program.is_empty());
        let accelerator = match std::env::var("WRENN_ACCEL").as_deref() {
            Err(_) | Ok("" | "auto") => AcceleratorChoice::Auto,
            Ok("tcg") => AcceleratorChoice::Always(Accelerator::Tcg),
            Ok("kvm") => AcceleratorChoice::Always(Accelerator::Kvm),
            Ok(other) => {
                return Err(VmmError::Unavailable {
                    program: other.to_owned(),
                    problem: "it is no accelerator".to_owned(),
                    remedy: "set WRENN_ACCEL to auto, tcg or kvm",
                });
            }
        };
        Ok(Self { program: program.map(Into::into), accelerator, ..Self::default() })
    }
}

impl Qemu {
    /// Finds QEMU and decides what runs the guest. The first time on a host this can take as long as the
    /// probe's bound; after that, the tenth of a second that it takes to ask QEMU for its version.
    ///
    /// # Errors
    /// [`VmmError::Unavailable`] says what is missing and how to get it.
    pub async fn detect(options: QemuOptions) -> VmmResult<Self> {
        let wanted = options.program.as_deref().unwrap_or_else(|| Utf8Path::new(DEFAULT_PROGRAM));
        let program = program::find(wanted, REMEDY)?;
        let (version, tsc_khz) = tokio::join!(version(&program), tsc_khz());
        let version = version?;
        let decision = decide(&program, &version, &options).await?;
        let accelerator = decision.accelerator;
        Ok(Self {
            engine: Engine {
                program,
                accelerator,
                tsc_khz: tsc_khz.filter(|_| accelerator == Accelerator::Tcg),
            },
            identity: VmmIdentity {
                name: "qemu".to_owned(),
                version,
                machine: machine_type(accelerator).to_owned(),
                cpu_model: seen_cpu(accelerator)?,
                accelerator,
            },
            accelerator_reason: decision.reason,
        })
    }
}

/// What the guest sees as its processor: translated, it is the same everywhere.
fn seen_cpu(accelerator: Accelerator) -> VmmResult<String> {
    let model = cpu_model(accelerator);
    match accelerator {
        Accelerator::Tcg => Ok(model.to_owned()),
        Accelerator::Kvm => host_cpu::seen().map(|word| format!("{model} {word}")),
    }
}

async fn tsc_khz() -> Option<u32> {
    let first = tsc::Sample::now();
    tokio::time::sleep(TSC_INTERVAL).await;
    tsc::Sample::now().khz_since(&first)
}

/// What QEMU says it is: `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`.
async fn version(program: &Utf8Path) -> VmmResult<String> {
    let said = program::ask(program, "--version", REMEDY).await?;
    parse_version(&said)
        .ok_or_else(|| program::unusable(program, "it does not say its version".to_owned(), REMEDY))
}

fn parse_version(said: &str) -> Option<String> {
    let line = said.lines().next()?;
    let (program, version) = line.split_once(" version ")?;
    (program.contains("QEMU") && !version.is_empty()).then(|| version.trim().to_owned())
}

/// What runs the guest, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Decision {
    accelerator: Accelerator,
    reason: String,
}

async fn decide(program: &Utf8Path, version: &str, options: &QemuOptions) -> VmmResult<Decision> {
    let translated = |reason: String| Ok(Decision { accelerator: Accelerator::Tcg, reason });
    let openable = std::fs::OpenOptions::new().read(true).write(true).open(KVM);
    match (options.accelerator, openable) {
        (AcceleratorChoice::Always(Accelerator::Tcg), _) => translated("TCG was asked for".to_owned()),
        (AcceleratorChoice::Always(Accelerator::Kvm), Ok(_)) => {
            Ok(Decision { accelerator: Accelerator::Kvm, reason: "KVM was asked for".to_owned() })
        }
        (AcceleratorChoice::Always(Accelerator::Kvm), Err(error)) => Err(VmmError::Unavailable {
            program: KVM.to_owned(),
            problem: error.to_string(),
            remedy: "enable virtualisation and load kvm_intel or kvm_amd, or set WRENN_ACCEL=tcg",
        }),
        (AcceleratorChoice::Auto, Err(error)) => translated(format!("{KVM} cannot be opened: {error}")),
        (AcceleratorChoice::Auto, Ok(_)) => {
            let Some(guest) = &options.guest else {
                return translated("there is no guest to probe KVM with".to_owned());
            };
            let key = Key::new(program, version, guest);
            if let Some(decision) = options.cache_file.as_deref().and_then(|file| recall(file, &key)) {
                return Ok(decision);
            }
            let decision = probe(program, guest, options.probe_bound).await?;
            if let Some(file) = &options.cache_file
                && let Err(error) = remember(file, key, &decision)
            {
                tracing::warn!(%file, %error, "the outcome of the KVM probe is not kept: the next start probes again");
            }
            Ok(decision)
        }
    }
}

/// Boots a machine under KVM and waits for its guest.
async fn probe(program: &Utf8Path, guest: &GuestBundle, bound: Duration) -> VmmResult<Decision> {
    tracing::info!(?bound, "trying whether a guest comes up under KVM");
    let failed = |source: io::Error| VmmError::Spawn { program: program.to_owned(), source };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let (errors, stderr) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let shape = Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() };
    let words = arguments(&Launch {
        accelerator: Accelerator::Kvm,
        name: "wrenn-kvm-probe",
        shape,
        memory: Memory::Anonymous,
        start: Start::Kernel {
            kernel: &guest.kernel,
            initramfs: &guest.initramfs,
            command_line: &kernel_command_line(None, &[]),
        },
        disk: None,
        tap: None,
        control: None,
        console: Console::Socket(theirs.as_raw_fd()),
    })?;
    let spawn = Spawn::new(program.as_std_path())
        .args(words)
        .current_dir("/")
        .keep_open(OwnedFd::from(theirs))
        .stderr(stderr)
        .no_core_dump()
        .die_with_parent();
    let begin = Instant::now();
    let child = start(spawn).await.map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let console = tokio::net::UnixStream::from_std(ours).map_err(failed)?;
    let watched = timeout(bound, until_ready(console)).await;
    let elapsed = begin.elapsed();
    end(child).await;
    let decision = match watched {
        Ok(Ok(())) => Decision {
            accelerator: Accelerator::Kvm,
            reason: format!("a guest came up under KVM in {} ms", elapsed.as_millis()),
        },
        Ok(Err(said)) => {
            let mut error = String::new();
            // The process is gone: what it said is in the pipe, and then there is its end.
            if let Ok(errors) = pipe::Receiver::from_owned_fd(errors) {
                drop(errors.take(1024).read_to_string(&mut error).await);
            }
            let said = if error.trim().is_empty() { said } else { error };
            let reason = format!("a guest under KVM ended before it was up: {}", last_line(&said));
            Decision { accelerator: Accelerator::Tcg, reason }
        }
        Err(_) => Decision {
            accelerator: Accelerator::Tcg,
            reason: format!("{KVM} opens, but a guest under it was not up within {bound:?}"),
        },
    };
    Ok(decision)
}

/// Reads a console until it says that the guest is ready; else what it said.
async fn until_ready(mut console: tokio::net::UnixStream) -> Result<(), String> {
    let mut said = Tail::new(4096);
    let mut chunk = [0; 512];
    while let Ok(count @ 1..) = console.read(&mut chunk).await {
        said.push(&chunk[..count]);
        if said.text().contains(READY) {
            return Ok(());
        }
    }
    Err(said.text())
}

fn last_line(said: &str) -> &str {
    said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing")
}

/// What an outcome holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    program: Utf8PathBuf,
    version: String,
    guest: String,
}

impl Key {
    fn new(program: &Utf8Path, version: &str, guest: &GuestBundle) -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot_id: boot_id.trim().to_owned(),
            program: program.to_owned(),
            version: version.to_owned(),
            guest: guest.id.clone(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    key: Key,
    decision: Decision,
}

/// The outcome in the file, if it is about the same things. Whatever else is there counts as nothing.
fn recall(file: &Utf8Path, key: &Key) -> Option<Decision> {
    let remembered: Remembered = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (remembered.key == *key).then_some(remembered.decision)
}

fn remember(file: &Utf8Path, key: Key, decision: &Decision) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let text = serde_json::to_string(&Remembered { key, decision: decision.clone() })?;
    // Two agents may start at once: each writes a file of its own, and the last one counts.
    let aside = Utf8PathBuf::from(format!("{file}.{}", std::process::id()));
    std::fs::write(&aside, text)?;
    std::fs::rename(&aside, file)
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
