//! For tests: a small filesystem of one's own, in a mount namespace of one thread, so that nothing of it
//! is seen outside and nothing is left when the thread ends.

use std::{process::Command, thread};

use camino::{Utf8Path, Utf8PathBuf};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// What to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In memory; knows holes, shares no blocks.
    Tmpfs,
    /// In a file; shares blocks.
    Btrfs,
    /// In a file of 300 MiB at least; shares blocks if it is to.
    Xfs {
        /// Whether files may share blocks.
        reflink: bool,
    },
}

/// Whether the machine could make it.
#[derive(Debug)]
pub(crate) enum Made {
    Yes,
    No(String),
}

impl Made {
    /// Says on the test's output what was not tested, and why.
    #[expect(clippy::print_stdout, reason = "this is how a test says so")]
    pub(crate) fn or_say_skipped(self, what: &str) {
        if let Self::No(reason) = self {
            println!("skipped: {what}: {reason}");
        }
    }
}

/// Runs `test` with the directory of a new filesystem of so many bytes. A panic in it is passed on.
pub(crate) fn with(kind: Kind, bytes: u64, test: impl FnOnce(&Utf8Path) + Send) -> Made {
    let directory = tempfile::tempdir().unwrap();
    let at = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
    thread::scope(|scope| {
        let thread = scope.spawn(|| match mount_it(kind, bytes, &at) {
            Ok(()) => {
                test(&at.join("mnt"));
                Made::Yes
            }
            Err(reason) => Made::No(reason),
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn mount_it(kind: Kind, bytes: u64, at: &Utf8Path) -> Result<(), String> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace ({error})"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(|e| e.to_string())?;
    let target = at.join("mnt");
    std::fs::create_dir(&target).map_err(|error| error.to_string())?;
    match kind {
        Kind::Tmpfs => {
            let options = format!("size={bytes}");
            mount(Some("tmpfs"), target.as_str(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
                .map_err(|error| format!("no tmpfs ({error})"))
        }
        Kind::Btrfs => mount_file("btrfs", &["-q"], bytes, at, &target),
        Kind::Xfs { reflink } => {
            let option = format!("reflink={}", u8::from(reflink));
            mount_file("xfs", &["-q", "-m", &option], bytes, at, &target)
        }
    }
}

/// Makes a file with a filesystem and mounts it. The loop device goes with the mount, and that with the namespace.
fn mount_file(
    name: &str,
    options: &[&str],
    bytes: u64,
    at: &Utf8Path,
    target: &Utf8Path,
) -> Result<(), String> {
    let image = at.join("image");
    let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
    file.set_len(bytes).map_err(|error| error.to_string())?;
    run(&format!("mkfs.{name}"), &[options, &[image.as_str()]].concat())?;
    run("mount", &["-t", name, "-o", "loop", image.as_str(), target.as_str()])
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program} cannot be run ({error})"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}
