//! What `/init` does to the machine: randomness, clock and names. (The disk is in [`crate::disk`].)
//!
//! Each step is one function and does no more than it must: this is on the path of every create. Nothing is
//! synced to the disk, because a crash before the first snapshot loses the sandbox anyway.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    system::sethostname,
    time::{ClockId, Timespec, clock_settime},
};
use wrenn_guest_linux::entropy::{EntropyError, Random};

use crate::names;

/// Marks our line in `/etc/hosts`, so that a new name replaces the old one.
const HOSTS_MARK: &str = "# this sandbox";

/// Which step failed, and why.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("cannot make the randomness fresh")]
    Entropy(#[source] EntropyError),
    #[error("cannot set the clock")]
    Clock(#[source] Errno),
    #[error("cannot set the host name")]
    Hostname(#[source] Errno),
    #[error("cannot give the boot another name")]
    BootId(#[source] io::Error),
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Mixes fresh bytes into the kernel's generator and makes it use them at once.
pub(crate) fn renew_randomness(root: &Path, bytes: &[u8]) -> Result<(), MachineError> {
    let renew = || {
        let random = Random::open(&root.join("dev/urandom"))?;
        random.add(bytes)?;
        random.reseed()
    };
    renew().map_err(MachineError::Entropy)
}

/// Sets the clock: at once, not by degrees, because a restored guest may be hours behind.
pub(crate) fn set_clock(seconds: i64, nanoseconds: i32) -> Result<(), MachineError> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    clock_settime(ClockId::Realtime, time).map_err(MachineError::Clock)
}

/// Names the machine, in the kernel and in `/etc`.
pub(crate) fn set_hostname(root: &Path, hostname: &str) -> Result<(), MachineError> {
    sethostname(hostname.as_bytes()).map_err(MachineError::Hostname)?;
    write_hostname(root, hostname)
}

fn write_hostname(root: &Path, hostname: &str) -> Result<(), MachineError> {
    write(root, "hostname", &format!("{hostname}\n"))?;
    let hosts = root.join("etc/hosts");
    let hosts = names::in_memory(root, "hosts").unwrap_or(hosts);
    // Bytes that are no text are somebody's comment in another encoding; they do not survive.
    let current = fs::read(&hosts).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    write(root, "hosts", &hosts_with(&current.unwrap_or_default(), hostname))
}

/// The host table with our name in it: everything else is kept, our earlier line is replaced.
fn hosts_with(current: &str, hostname: &str) -> String {
    let mut lines: Vec<&str> = current.lines().filter(|line| !line.ends_with(HOSTS_MARK)).collect();
    let names_localhost = |line: &&str| line.split_whitespace().skip(1).any(|name| name == "localhost");
    if !lines.iter().any(names_localhost) {
        lines.push("127.0.0.1\tlocalhost");
    }
    let ours = format!("127.0.1.1\t{hostname}\t{HOSTS_MARK}");
    lines.push(&ours);
    lines.join("\n") + "\n"
}

/// Gives the machine its id, and, if that is a new one, its boot another name: it is another machine then, and not the
/// same one that goes on.
pub(crate) fn set_machine_id(root: &Path, id: &str) -> Result<(), MachineError> {
    let text = format!("{id}\n");
    let place = names::in_memory(root, "machine-id").unwrap_or_else(|| root.join("etc/machine-id"));
    if fs::read(place).is_ok_and(|current| current == text.as_bytes()) {
        return Ok(());
    }
    names::renew_boot_id(root).map_err(MachineError::BootId)?;
    write(root, "machine-id", &text)
}

/// Names the servers that answer for names.
pub(crate) fn set_dns_servers(root: &Path, servers: &[IpAddr]) -> Result<(), MachineError> {
    let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    write(root, "resolv.conf", &text)
}

/// Writes `/etc/NAME`: where it is kept in memory, else on the disk.
fn write(root: &Path, name: &str, text: &str) -> Result<(), MachineError> {
    match names::in_memory(root, name) {
        Some(path) => fs::write(&path, text).map_err(|source| MachineError::Write { path, source }),
        None => write_to_disk(&root.join("etc").join(name), text),
    }
}

/// Writes a small file, unless it holds this text already. A symbolic link is replaced and not followed: in many
/// images `/etc/resolv.conf` points to what a service that does not run here would have made.
fn write_to_disk(path: &Path, text: &str) -> Result<(), MachineError> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let open = || {
        let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .custom_flags(no_follow)
            .open(path)
    };
    let attempt = || {
        let link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
        if link {
            fs::remove_file(path)?;
        } else if fs::read(path).is_ok_and(|current| current == text.as_bytes()) {
            return Ok(());
        }
        let mut file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(path.parent().unwrap_or_else(|| Path::new("/")))?;
                open()?
            }
            other => other?,
        };
        file.write_all(text.as_bytes())
    };
    attempt().map_err(|source| MachineError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_table_keeps_what_others_wrote() {
        let first = hosts_with("", "sb-1");
        assert_eq!(first, "127.0.0.1\tlocalhost\n127.0.1.1\tsb-1\t# this sandbox\n");
        let theirs = "127.0.0.1 localhost box\n10.0.0.1\tdatabase\n";
        let second = hosts_with(&hosts_with(theirs, "sb-1"), "sb-2");
        assert_eq!(second, format!("{theirs}127.0.1.1\tsb-2\t# this sandbox\n"));
    }

    #[test]
    fn names_are_written_also_where_there_is_no_etc_and_over_links() {
        let root = tempfile::tempdir().unwrap();
        write_hostname(root.path(), "sb-1").unwrap();
        set_machine_id(root.path(), "00112233445566778899aabbccddeeff").unwrap();
        let read = |name: &str| fs::read_to_string(root.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "sb-1\n");
        assert_eq!(read("machine-id"), "00112233445566778899aabbccddeeff\n");
        let boot_id = root.path().join("run/wrenn/names/boot_id");
        fs::create_dir_all(boot_id.parent().unwrap()).unwrap();
        fs::write(&boot_id, "first").unwrap();
        set_machine_id(root.path(), "00112233445566778899aabbccddeeff").unwrap();
        assert_eq!(fs::read_to_string(&boot_id).unwrap(), "first", "the same machine goes on");
        set_machine_id(root.path(), "ff112233445566778899aabbccddeeff").unwrap();
        assert_eq!(read("machine-id"), "ff112233445566778899aabbccddeeff\n");
        assert_ne!(fs::read_to_string(&boot_id).unwrap(), "first", "another machine");
        let link = root.path().join("etc/resolv.conf");
        std::os::unix::fs::symlink("../run/not/there", &link).unwrap();
        set_dns_servers(root.path(), &["10.0.0.1".parse().unwrap(), "::1".parse().unwrap()]).unwrap();
        assert_eq!(read("resolv.conf"), "nameserver 10.0.0.1\nnameserver ::1\n");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_file_that_holds_the_text_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        write_to_disk(&path, "text").unwrap();
        let mut permissions = fs::metadata(&path).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        fs::set_permissions(&path, permissions).unwrap();
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        write_to_disk(&path, "text").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
        write_to_disk(&path, "other").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
    }
}
