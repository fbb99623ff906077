//! Where a confined QEMU is: what it sees, and who opens what it cannot see.

use std::{
    fs::{self, File},
    io,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::task::spawn_blocking;
use wrenn_host_linux::process::{Jail, Opens};

use super::{
    arguments::{Memory, Start},
    launch::Engine,
};
use crate::{
    Accelerator, VmmResult,
    files::{cannot, public},
};

/// Where programs have their libraries and QEMU its firmware, on every system that puts them where they belong.
const SYSTEM: [&str; 9] = [
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/etc/ld.so.cache",
];
/// The same of a QEMU that is elsewhere, beside the directory of its program.
const BESIDE: [&str; 3] = ["lib", "lib64", "share/qemu"];
const KVM: &str = "/dev/kvm";
/// How long QEMU may take until it asks for its memory, on a machine that is busy with many others.
const MEMORY_BOUND: Duration = Duration::from_secs(20);

/// The jail of a machine. Its root is mounted over `run_dir`, in which QEMU itself needs nothing.
pub(super) fn jail(engine: &Engine, run_dir: &Utf8Path, user: u32, from: Start<'_>) -> VmmResult<Jail> {
    let mut jail = Jail::new(run_dir.as_std_path(), user);
    let prefix = engine.program.parent().and_then(Utf8Path::parent);
    let beside = prefix.into_iter().flat_map(|prefix| BESIDE.map(|name| prefix.join(name)));
    let shown = SYSTEM.map(Utf8PathBuf::from).into_iter().chain(beside);
    for path in shown.filter(|path| fs::symlink_metadata(path).is_ok()) {
        jail = jail.show(path);
    }
    jail = jail.show(engine.program.as_std_path());
    if let Start::Kernel { kernel, initramfs, .. } = from {
        for (field, path) in [("kernel", kernel), ("initramfs", initramfs)] {
            jail = jail.show(public(field, path)?.as_std_path());
        }
    }
    // It tries there which kind of locks the kernel has.
    jail = jail.device("/dev/null");
    Ok(match engine.accelerator {
        Accelerator::Kvm => jail.device(KVM),
        Accelerator::Tcg => jail,
    })
}

/// The memory of a machine, opened for it.
#[derive(Debug)]
pub(super) struct OpenedMemory {
    path: Utf8PathBuf,
    file: File,
}

impl OpenedMemory {
    /// Opens a file with the rights that are needed. None where there is none.
    pub(super) fn open(memory: Memory<'_>) -> VmmResult<Option<Self>> {
        let (path, is_written) = match memory {
            Memory::Anonymous => return Ok(None),
            Memory::SharedFile(path) => (path, true),
            Memory::PrivateFile(path) => (path, false),
        };
        let file = File::options().read(true).write(is_written).open(path).map_err(cannot("open", path))?;
        Ok(Some(Self { path: path.to_owned(), file }))
    }

    /// Gives it to a QEMU that asks for it, and nothing after it. A QEMU that asks too late does without, and ends.
    pub(super) fn give(self, opens: Opens) {
        // It ends by itself.
        drop(spawn_blocking(move || {
            let begin = Instant::now();
            while let Some(left) = MEMORY_BOUND.checked_sub(begin.elapsed())
                && let Ok(Some(open)) = opens.next(left)
            {
                let is_it = open.path().is_ok_and(|path| path == self.path);
                match if is_it { open.give(&self.file) } else { open.go_on() } {
                    Ok(()) if is_it => return,
                    Ok(()) => {}
                    // A signal broke it off, and it is made again.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => {
                        return tracing::warn!(path = %self.path, %error, "a memory cannot be handed over");
                    }
                }
            }
        }));
    }
}
