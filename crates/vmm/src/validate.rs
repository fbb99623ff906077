//! What can be said about a machine's description before anything is started. Every driver asks here, so
//! that the same description is refused everywhere, and with the same words.

use std::os::unix::fs::MetadataExt;

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::Shape;

use crate::{
    AdoptedMachine, DiskFormat, DiskSpec, MachineSpec, SnapshotFiles, VmmError, VmmResult, files::cannot,
    guest_memory::not_mapped, qcow2,
};

/// The longest path of a Unix socket, without its terminator.
const SOCKET_PATH: usize = 107;
/// The name of the longest socket that a driver makes in the run directory, with its slash.
const LONGEST_SOCKET: usize = "/control.sock".len();
/// The kernel takes 2047 characters; the drivers' own words need some.
const COMMAND_LINE: usize = 1536;
/// The longest name of a network interface.
const INTERFACE_NAME: usize = 15;

pub(crate) fn machine(spec: &MachineSpec) -> VmmResult<()> {
    name(&spec.name)?;
    for (field, path) in [("run_dir", &spec.run_dir), ("kernel", &spec.guest.kernel)] {
        absolute(field, path)?;
    }
    absolute("initramfs", &spec.guest.initramfs)?;
    sockets(&spec.run_dir)?;
    if let Some(disk) = &spec.disk {
        absolute("disk", &disk.path)?;
        if disk.format == DiskFormat::DmSnapshot {
            let problem = "a machine takes the device of a dm-snapshot, not its file";
            return Err(VmmError::Unsupported { operation: "the disk's format", problem });
        }
    }
    if spec.disk.is_none() && !spec.disk_rate.is_free() {
        return refuse("disk_rate", "there is no disk that could have one");
    }
    if let Some(network) = &spec.network {
        absolute("network namespace", &network.namespace)?;
        tap(&network.tap)?;
    }
    kernel_arguments(&spec.kernel_arguments)
}

pub(crate) fn adopted(machine: &AdoptedMachine) -> VmmResult<()> {
    name(&machine.name)?;
    absolute("run_dir", &machine.run_dir)?;
    sockets(&machine.run_dir)
}

/// The files fit a machine that was restored, or one that booted. The VMM opens some of them itself.
pub(crate) fn snapshot_files(files: &SnapshotFiles, restored: bool) -> VmmResult<()> {
    absolute("state", &files.state)?;
    match (&files.pages, restored) {
        (Some(pages), true) => absolute("pages", pages),
        (None, false) => Ok(()),
        (None, true) => refuse("pages", "the memory of a restored machine needs a file for what differs"),
        (Some(_), false) => refuse("pages", "a machine that booted has all of its memory in the other file"),
    }
}

/// Where a snapshot of a machine that maps `base` has its pages.
pub(crate) fn snapshot_over(
    base: &Utf8Path,
    files: &SnapshotFiles,
    operation: &'static str,
) -> VmmResult<Utf8PathBuf> {
    snapshot_files(files, true)?;
    if !same_file(base, &files.memory).map_err(cannot("open", &files.memory))? {
        return Err(not_mapped(operation));
    }
    files.pages.clone().ok_or_else(|| not_mapped(operation))
}

/// A file that can be put on top of a disk whose top is `top`, and of which the guest sees `bytes`, if that
/// is known.
pub(crate) fn overlay(overlay: &DiskSpec, top: &Utf8Path, bytes: Option<u64>) -> VmmResult<()> {
    absolute("disk", &overlay.path)?;
    if overlay.format != DiskFormat::Qcow2 {
        let problem = "only a qcow2 file can stand on another one";
        return Err(VmmError::Unsupported { operation: "pivot_disk", problem });
    }
    let header = qcow2::header(&overlay.path).map_err(cannot("open", &overlay.path))?;
    let Some(header) = header else {
        return refuse("disk", format!("{} is no qcow2 file", overlay.path));
    };
    let Some(base) = header.backing_file else {
        return refuse("disk", format!("{} stands on nothing", overlay.path));
    };
    if !same_file(&base, top).map_err(cannot("open", &base))? {
        return refuse("disk", format!("{} stands on {base}, and the disk's top is {top}", overlay.path));
    }
    let found = header.virtual_bytes;
    if let Some(bytes) = bytes
        && bytes != found
    {
        return refuse("disk", format!("{} has {found} bytes, and the disk {bytes}", overlay.path));
    }
    Ok(())
}

/// Where in a chain of files one stands that is not its top.
pub(crate) fn below_the_top(chain: &[Utf8PathBuf], base: &Utf8Path) -> VmmResult<usize> {
    let found = chain.iter().position(|file| file == base || same_file(file, base).unwrap_or(false));
    match found {
        Some(at @ 1..) => Ok(at),
        Some(0) => refuse("disk", format!("{base} is its top")),
        None => refuse("disk", format!("{base} is no file of it")),
    }
}

/// Whether two paths lead to the same file.
pub(crate) fn same_file(one: &Utf8Path, other: &Utf8Path) -> std::io::Result<bool> {
    let (one, other) = (std::fs::metadata(one)?, std::fs::metadata(other)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// A snapshot's memory is that of a machine of this shape.
pub(crate) fn snapshot_memory(memory: &Utf8Path, shape: Shape) -> VmmResult<()> {
    let file = std::fs::metadata(memory);
    let (length, bytes) = (file.map_err(cannot("open", memory))?.len(), shape.memory.bytes());
    if length != bytes {
        return refuse("memory", format!("the snapshot's has {length} bytes, and the shape's {bytes}"));
    }
    Ok(())
}

fn refuse<T>(field: &'static str, problem: impl Into<String>) -> VmmResult<T> {
    Err(VmmError::Spec { field, problem: problem.into() })
}

fn name(name: &str) -> VmmResult<()> {
    let good = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if name.is_empty() || name.len() > 64 || name.starts_with('-') || !good {
        return refuse("name", "it is 1 to 64 letters, digits and dashes, the first no dash");
    }
    Ok(())
}

fn sockets(directory: &Utf8Path) -> VmmResult<()> {
    if directory.as_str().len() + LONGEST_SOCKET > SOCKET_PATH {
        return refuse("run_dir", format!("a socket in {directory} would have too long a path"));
    }
    Ok(())
}

fn tap(name: &str) -> VmmResult<()> {
    let good = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if name.is_empty() || name.len() > INTERFACE_NAME || name.starts_with('.') || !good {
        return refuse("tap", "it is 1 to 15 letters, digits, dashes, underscores and dots");
    }
    Ok(())
}

fn absolute(field: &'static str, path: &Utf8Path) -> VmmResult<()> {
    if !path.is_absolute() || path.as_str().contains('\0') {
        return refuse(field, format!("{path} is no absolute path"));
    }
    Ok(())
}

fn kernel_arguments(words: &[String]) -> VmmResult<()> {
    if words.iter().any(|word| word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic())) {
        return refuse("kernel_arguments", "each is a word of visible ASCII characters");
    }
    if words.iter().map(|word| word.len() + 1).sum::<usize>() > COMMAND_LINE {
        return refuse(
            "kernel_arguments",
            format!("together they are longer than {COMMAND_LINE} characters"),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        for good in ["a", "wrenn-0123abcd-sb-01234567", &"a".repeat(64)] {
            assert!(name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a,b", "a b", "a/b", "../x", "ä", "a\0", &"a".repeat(65)] {
            assert!(name(bad).is_err(), "{bad}");
        }
        assert!(tap("tap0").is_ok());
        for bad in ["", "a,b", "tap0,script=/bin/sh", "0123456789abcdef", ".."] {
            assert!(tap(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_one_word(word in ".{0,40}") {
            if kernel_arguments(std::slice::from_ref(&word)).is_ok() {
                prop_assert!(!word.contains(char::is_whitespace) && !word.contains('\0') && !word.is_empty());
            }
        }
    }
}
