//! Giving up what a process of root may do and have.

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Becomes a user and a group, with no other group, for ever: no program that is executed later gives anything
/// back. What the process has open stays open. Every thread of it changes.
///
/// # Errors
/// Not permitted, or the user is not one here. The process may have changed in part then, and has to end.
pub fn give_up(user: u32, group: u32) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    // With the last of the three user ids goes every capability.
    Ok(setresuid(user, user, user)?)
}

/// What a process may have at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Open descriptors.
    pub descriptors: u64,
    /// Bytes of memory that it can write and shares with nobody, stacks excepted.
    pub memory: u64,
    /// How long a file may become by its writing.
    pub file: u64,
}

/// Bounds this process for ever: also in what no process that only serves needs. It locks no memory and
/// leaves no core dump; and once it has [given up](give_up) what root may do, it makes no process and no thread.
///
/// # Errors
/// Not permitted: more descriptors than the process may have are for root alone.
pub fn bound(bounds: Bounds) -> io::Result<()> {
    for (resource, value) in [
        (Resource::Nofile, bounds.descriptors),
        (Resource::Data, bounds.memory),
        (Resource::Nproc, 0),
        (Resource::Fsize, bounds.file),
        (Resource::Memlock, 0),
        (Resource::Core, 0),
    ] {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
    }
    Ok(())
}
