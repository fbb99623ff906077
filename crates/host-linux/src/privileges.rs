//! Giving up what a process of root may do.

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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

/// Lets this process have so many open descriptors, if it may not have more already.
///
/// # Errors
/// Not permitted.
pub fn allow_descriptors(count: u64) -> io::Result<()> {
    // None is no limit.
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        let maximum = maximum.map(|maximum| maximum.max(count));
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum })?;
    }
    Ok(())
}
