//! The lab: a whole machine, emulated, in which tests run that need a kernel of their own.
//!
//! Build machines are often containers: their kernel has no control groups of version 2 that could be written, no
//! device mapper, no KVM that runs a guest. The lab has all of that, wherever QEMU runs: it is QEMU's `q35` machine with
//! translated instructions, a processor with AMD's virtualization (which QEMU emulates too, so that KVM works in it), and
//! Debian's own kernel.
//!
//! ```text
//!  cargo xtask lab -- PROGRAM [ARGUMENT…] [-- PROGRAM [ARGUMENT…]]…
//!
//!  image (cached)    lab/recipe, the kernel's package ─► root disk, kernel, modules          [`image`]
//!  input             programs, files, plan ─► a second disk, read-only                      [`input`]
//!  machine           QEMU ─► wrenn-lab-init ─► each program in turn, as root                [`machine`]
//!  what comes back   output as it is written, exits, the files of $WRENN_LAB_OUTPUT   crate `wrenn-lab`
//!
//!  cargo xtask lab            every test that is marked for the lab, with a closing line of counts   [`marked`]
//! ```
//!
//! # What a program finds
//!
//! It is root, alone with an init that reaps, in the directory that it is told to start in. It has `WRENN_LAB=1`, its own
//! path of the host, `WRENN_FIRECRACKER` and `WRENN_JAILER` naming the lab's copies of those that there are outside
//! ([`crate::firecracker`]), a writable root disk of 4 GiB, all controllers of version 2 delegated at `/sys/fs/cgroup`, and
//! no network but what it makes. When it ends, whatever it left running is killed; what it mounted or made stays for the
//! next program of the same lab.
//!
//! # What comes out
//!
//! The exit code is that of the first program that did not end with 0, a signal as 128 and its number. 125 means
//! that the lab itself failed: it did not boot, was silent for too long, or its kernel ended. The error then holds the last
//! lines of its console.
//!
//! | what fails | what happens |
//! |---|---|
//! | QEMU is not there, memory is short | nothing is started, 125; in `make test` what is marked is skipped, with the reason |
//! | no `Ready` within the bound of the boot | killed, 125 |
//! | the programs take longer than `--bound` | killed, 125; what they wrote was shown |
//! | the kernel panics, the init dies | QEMU ends, 125 |
//! | interrupted, or killed | QEMU dies with it; a directory of the cache that is left is collected by the next command |

mod capacity;
mod image;
mod input;
mod machine;
pub(crate) mod marked;

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use wrenn_lab::{
    message::{Exit, Message},
    plan::Program,
};

pub(crate) use self::capacity::Capacity;
use self::{
    input::Input,
    machine::{Files, Machine, QEMU},
};
use crate::{
    cache::{Cache, Scratch},
    firecracker, guest_bundle, host,
    repository::Repository,
    step,
};

/// The exit code of a lab that failed itself.
const LAB_FAILED: u8 = 125;
/// What the host needs beside the memory of the machine, in MiB: QEMU, translated code, pages of files.
const OVERHEAD_MIB: u64 = 768;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The machine's memory, in MiB; 2048, with a Firecracker 6144
    #[arg(long)]
    memory: Option<u32>,
    /// The machine's processors; 2, with a Firecracker 1
    #[arg(long)]
    cpus: Option<u8>,
    /// How many seconds all programs together may take; 2400, with a Firecracker 7200
    #[arg(long)]
    bound: Option<u64>,
    /// Where files are put that programs leave in `$WRENN_LAB_OUTPUT`. Without it: target/lab.
    #[arg(long)]
    output: Option<PathBuf>,
    /// A file or directory that programs need, at the same path; can be given several times.
    #[arg(long)]
    with: Vec<PathBuf>,
    /// Without programs: only the marked tests of this package; can be given several times.
    #[arg(short, long)]
    package: Vec<String>,
    /// Programs with their arguments, separated by `--`. Without any: all tests that are marked for the lab.
    #[arg(last = true)]
    programs: Vec<String>,
}

/// What is to be done in one lab.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) programs: Vec<Program>,
    pub(crate) with: Vec<PathBuf>,
    pub(crate) capacity: Capacity,
    pub(crate) output: PathBuf,
}

/// What happens meanwhile.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// The first program starts now; how long it took until then.
    Ready { kernel: &'a str, after: Duration },
    /// A program wrote to its standard output.
    Output(&'a [u8]),
    /// A program wrote to its standard error.
    ErrorOutput(&'a [u8]),
}

/// The command: runs programs, shows what they write, and gives the exit code.
pub(crate) fn run(repository: &Repository, arguments: &Arguments) -> Result<u8> {
    if arguments.programs.is_empty() {
        return marked::run_all(repository, &arguments.package);
    }
    let directory = env::current_dir().context("asking for the current directory")?;
    let programs = programs(&arguments.programs, &directory)?;
    ensure!(!programs.is_empty(), "which program is to be run? `cargo xtask lab -- PROGRAM [ARGUMENT…]`");
    let usual = Capacity::usual(repository)?;
    let capacity = Capacity {
        memory_mib: arguments.memory.unwrap_or(usual.memory_mib),
        cpus: arguments.cpus.unwrap_or(usual.cpus),
        bound: arguments.bound.map_or(usual.bound, Duration::from_secs),
    };
    let job = Job {
        programs,
        with: arguments.with.iter().map(|path| directory.join(path)).collect(),
        capacity,
        output: arguments.output.clone().unwrap_or_else(|| repository.target().join("lab")),
    };
    Ok(run_job(repository, &job))
}

/// Runs a lab, shows what its programs write, and gives the exit code.
pub(crate) fn run_job(repository: &Repository, job: &Job) -> u8 {
    if let Some(why) = cannot_run(job.capacity.memory_mib) {
        eprintln!("error: there can be no lab here: {why}");
        return LAB_FAILED;
    }
    match perform(repository, job, &mut show) {
        Ok(exits) => exits.into_iter().map(Exit::code).find(|code| *code != 0).unwrap_or(0),
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            LAB_FAILED
        }
    }
}

fn show(event: &Event<'_>) -> Result<()> {
    match event {
        Event::Ready { kernel, after } => {
            step::announce(&format!("the lab is up after {:.1} s, with Linux {kernel}", after.as_secs_f64()));
            Ok(())
        }
        Event::Output(bytes) => write_all(io::stdout().lock(), bytes),
        Event::ErrorOutput(bytes) => write_all(io::stderr().lock(), bytes),
    }
}

fn write_all(mut to: impl io::Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("showing the output of a program")
}

/// Why there can be no lab of that much memory here, if so.
pub(crate) fn cannot_run(memory_mib: u32) -> Option<String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_missing = |program: &&str| host::on_path(program, &path, host::is_program).is_none();
    if let Some(missing) = [QEMU, "setpriv", "mke2fs"].into_iter().find(is_missing) {
        return Some(format!("{missing} is not on the PATH"));
    }
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let needed = u64::from(memory_mib) + OVERHEAD_MIB;
    // Where the kernel does not say, the start of QEMU tells.
    let available = available_mib(&text).filter(|available| *available < needed)?;
    Some(format!("it needs {needed} MiB of memory, and {available} MiB are free"))
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

/// The programs of a command line: words between `--`.
fn programs(words: &[String], directory: &Path) -> Result<Vec<Program>> {
    words
        .split(|word| word == "--")
        .filter(|words| !words.is_empty())
        .map(|words| {
            let [name, arguments @ ..] = words else { bail!("a program has a name") };
            let path = if name.contains('/') { directory.join(name) } else { PathBuf::from(name) };
            Ok(Program { path, arguments: arguments.to_vec(), directory: directory.to_owned() })
        })
        .collect()
}

/// Runs a lab from its start to its end, and says how each of the programs ended.
pub(crate) fn perform(
    repository: &Repository,
    job: &Job,
    listen: &mut dyn FnMut(&Event<'_>) -> Result<()>,
) -> Result<Vec<Exit>> {
    let cache = Cache::open()?;
    let image = image::find_or_make(repository, &cache)?;
    let (_, init) = guest_bundle::build_static(
        repository,
        &cache,
        "wrenn-lab",
        "wrenn-lab-init",
        "building the first process of the lab",
    )?;
    let variables = firecracker::variables(repository)?;
    let input = Input::new(job.programs.clone(), &job.with, image.modules, variables)?;

    let scratch = cache.scratch("lab")?;
    let input = input.make_disk(scratch.path()).context("making the disk of the programs")?;
    let initramfs = nameless(&scratch, "initramfs")?;
    (&initramfs).write_all(&guest_bundle::initramfs(&image.kernel, &init)?)?;
    let console = nameless(&scratch, "console")?;
    drop(scratch);

    let files = Files {
        kernel: image.kernel.image,
        initramfs: machine::path_of(&initramfs),
        root: image.disk,
        input: machine::path_of(&input),
        console: machine::path_of(&console),
    };
    let mut machine = Machine::start(job.capacity, &files, console)?;
    let mut exits = Vec::new();
    let mut unpacker: Option<Child> = None;
    loop {
        match machine.next_message()? {
            Message::Ready(kernel) => listen(&Event::Ready { kernel: &kernel, after: machine.age() })?,
            Message::Output(bytes) => listen(&Event::Output(&bytes))?,
            Message::ErrorOutput(bytes) => listen(&Event::ErrorOutput(&bytes))?,
            Message::Ended(exit) => exits.push(exit),
            Message::Files(bytes) => {
                let child = match &mut unpacker {
                    Some(child) => child,
                    none => none.insert(start_unpacker(&job.output)?),
                };
                let to = child.stdin.as_mut().context("tar has no input")?;
                to.write_all(&bytes).context("unpacking the files of the lab")?;
            }
            Message::Done => break,
            Message::Failed(why) => bail!("the lab cannot go on: {why}"),
        }
    }
    drop(machine);
    if let Some(mut child) = unpacker {
        drop(child.stdin.take());
        let status = child.wait().context("waiting for tar")?;
        ensure!(status.success(), "the files of the lab cannot be unpacked: tar ended with {status}");
    }
    ensure!(
        exits.len() == job.programs.len(),
        "the lab ran {} of {} programs",
        exits.len(),
        job.programs.len()
    );
    Ok(exits)
}

/// A file that only this process, and who opens it through this process, can read.
fn nameless(scratch: &Scratch, name: &str) -> Result<File> {
    let path = scratch.path().join(name);
    let open = || {
        let file = OpenOptions::new().read(true).append(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    };
    open().map_err(|error: io::Error| error).with_context(|| format!("making {}", path.display()))
}

/// `tar` refuses names that lead out of its directory.
fn start_unpacker(output: &Path) -> Result<Child> {
    fs::create_dir_all(output).with_context(|| format!("making {}", output.display()))?;
    Command::new("tar")
        .args(["--extract", "--no-same-owner", "--directory"])
        .arg(output)
        .stdin(Stdio::piped())
        .spawn()
        .context("starting tar")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_separated_by_two_dashes() {
        let words = ["./a", "--exact", "b", "--", "true", "--", "/c", "d"].map(str::to_owned);
        let found = programs(&words, Path::new("/code")).unwrap();
        let program = |path: &str, arguments: &[&str]| Program {
            path: path.into(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            directory: "/code".into(),
        };
        assert_eq!(
            found,
            [program("/code/./a", &["--exact", "b"]), program("true", &[]), program("/c", &["d"])]
        );
        assert_eq!(programs(&[], Path::new("/code")).unwrap(), []);
    }

    #[test]
    fn memory_is_read_as_the_kernel_says_it() {
        assert_eq!(available_mib("MemTotal:  9 kB\nMemAvailable:   2097152 kB\n"), Some(2048));
        assert_eq!(available_mib("MemTotal:  9 kB\n"), None);
    }

    #[test]
    fn a_lab_that_does_not_fit_says_so() {
        let why = cannot_run(u32::MAX).unwrap();
        assert!(why.contains("MiB") || why.contains("PATH"), "{why}");
    }
}
