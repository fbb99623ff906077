//! Giving up what a process of root may do.

use std::io;

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

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
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < count {
        setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count))?;
    }
    Ok(())
}
