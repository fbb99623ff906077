//! What the process of a filter may be and have: little, because it reads what a guest sends.
//!
//! ```text
//!  agent     a control group with bounds ─► the process is born in it
//!  process   resource limits ─► its sockets ─► a user of its slot's own ─► only the system calls that it needs ─► serves
//! ```
//!
//! - **User.** Each slot's filter has a number of its own, which nobody else has, so that who breaks into one can
//!   neither signal nor trace anything of another or of the host. Where the numbers are not mapped, because all of
//!   this is in a user namespace, all filters are `nobody`.
//! - **Bounds.** The control group bounds memory, that of its sockets included, and tasks, where the kernel has the
//!   controllers. The resource limits hold everywhere: descriptors, memory of its own, no files, no further tasks.
//! - **System calls.** Those of sockets, memory and time. It cannot open a file, execute, signal or trace, nor make a
//!   socket that is none of IPv4.
//!
//! With the user goes every capability, and nothing that is executed later gives one back.

use std::{fs, io, os::fd::OwnedFd, sync::LazyLock};

use wrenn_host_linux::{
    cgroup::{Controller, Hierarchy},
    privileges::{self, Bounds},
    syscalls::{self, Call},
};
use wrenn_types::InstanceId;

use super::streams;
use crate::network::addresses::SlotNumber;

/// The variable that tells a process who it is to become.
pub(super) const USER_VARIABLE: &str = "WRENN_FILTER_USER";
/// How the names of all filters' control groups begin.
const GROUP_PREFIX: &str = "filter-";
/// The user of slot 0, which there is not. In a part of the numbers that no registry of users gives out.
const FIRST_USER: u32 = 0x7772_0000;
/// Who nobody is.
const NOBODY: u32 = 65_534;
/// How many descriptors a process may have: two for a stream, and some.
const DESCRIPTORS: u64 = 2 * streams::STREAMS as u64 + 512;
/// How many bytes of memory of its own it may have. All that it keeps for a guest is a tenth of that.
const MEMORY: u64 = 128 << 20;
/// How many bytes it and its sockets may have: those of all streams, with full queues.
const GROUP_MEMORY: u64 = MEMORY + (256 << 20);
/// How many tasks there may be: it makes none, but that is for its own limit to say.
const GROUP_TASKS: u64 = 8;

/// Whether the numbers of all filters are mapped to users, by the text of `uid_map` or `gid_map`. Pure.
fn maps_all(map: &str) -> bool {
    let (first, last) = (u64::from(FIRST_USER), u64::from(FIRST_USER) + u64::from(SlotNumber::LAST.get()));
    map.lines().any(|line| {
        let numbers: Option<Vec<u64>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
        match numbers.as_deref() {
            Some([inside, _, count]) => *inside <= first && last - inside < *count,
            _ => false,
        }
    })
}

/// The number of the user and group as which the filters of a slot run: the rules of the kernel let out what this user
/// sends.
pub(in super::super) fn user(number: SlotNumber) -> u32 {
    static ARE_MAPPED: LazyLock<bool> = LazyLock::new(|| {
        ["/proc/self/uid_map", "/proc/self/gid_map"]
            .iter()
            .all(|path| fs::read_to_string(path).is_ok_and(|map| maps_all(&map)))
    });
    if *ARE_MAPPED { FIRST_USER + u32::from(number.get()) } else { NOBODY }
}

/// The name of the control group of a slot's filter.
fn group_name(number: SlotNumber) -> String {
    format!("{GROUP_PREFIX}{number}")
}

/// Whether a control group of an instance is that of a filter.
pub(crate) fn is_group_of_filter(name: &str) -> bool {
    name.strip_prefix(GROUP_PREFIX).is_some_and(|number| number.parse::<SlotNumber>().is_ok())
}

/// Makes the control group of a slot's filter and opens its entrance; none where the instance has no groups.
pub(super) fn enter_group(instance: &InstanceId, number: SlotNumber) -> io::Result<Option<OwnedFd>> {
    let Some(hierarchy) = Hierarchy::find(instance.as_str()) else { return Ok(None) };
    // One that somebody could not remove is no reason for a slot to have no filter.
    hierarchy.group(&group_name(number)).remove()?;
    let limits = [
        (Controller::Memory, "memory.max", GROUP_MEMORY.to_string()),
        (Controller::Memory, "memory.swap.max", "0".to_owned()),
        (Controller::Pids, "pids.max", GROUP_TASKS.to_string()),
    ];
    hierarchy.create(&group_name(number), &limits)?.entrance().map(Some)
}

/// Removes it, if it is there. Its processes have ended before.
pub(super) fn remove_group(instance: &InstanceId, number: SlotNumber) -> io::Result<()> {
    let hierarchy = Hierarchy::find(instance.as_str());
    hierarchy.map_or(Ok(()), |hierarchy| hierarchy.group(&group_name(number)).remove())
}

/// The first thing that a process does: whatever it reads, it has no more than this.
pub(super) fn bound() -> io::Result<()> {
    privileges::bound(Bounds { descriptors: DESCRIPTORS, memory: MEMORY, file: 0 })
}

/// The last thing that it does before it serves: from here on it can do nothing but that.
pub(super) fn give_up() -> io::Result<()> {
    let user = std::env::var(USER_VARIABLE).ok().and_then(|text| text.parse::<u32>().ok());
    let user = user.filter(|user| *user != 0).ok_or_else(|| io::Error::other("nobody said as which user"))?;
    privileges::give_up(user, user)?;
    syscalls::allow_only(
        &[syscalls::OF_SOCKETS, syscalls::OF_MEMORY, syscalls::OF_TIME, &[Call::IPV4_SOCKET]].concat(),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn which_maps_have_the_users_of_filters() {
        assert!(maps_all("         0          0 4294967295\n"));
        assert!(!maps_all("0 100000 65536\n") && !maps_all("") && !maps_all("0 0 x\n0 0\n"));
        assert!(maps_all("0 1000 1\n2003959808 7 40000\n"));
        assert!(!maps_all("2003959809 7 40000\n"), "begins behind the first");
        assert!(!maps_all("2003959808 7 32767\n") && maps_all("2003959808 7 32768\n"), "the last one counts");
    }

    #[test]
    fn a_group_of_a_filter_is_known_by_its_name() {
        assert!(is_group_of_filter(&group_name(SlotNumber::LAST)));
        for other in ["filter-0", "filter-x", "filter-", "sb-0123-layer-4567", "xfilter-1"] {
            assert!(!is_group_of_filter(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_two_slots_share_a_user(one in 1_u16..=32_767, other in 1_u16..=32_767) {
            let of = |number| FIRST_USER + u32::from(SlotNumber::new(number).unwrap().get());
            prop_assert_eq!(of(one) == of(other), one == other);
            prop_assert!(of(one) != 0 && of(one) != NOBODY && of(one) < i32::MAX.unsigned_abs());
        }
    }
}
