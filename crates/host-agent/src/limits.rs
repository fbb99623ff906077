//! What each machine may have of the host: a control group for each, where the kernel has them.
//!
//! ```text
//!  at the agent's start: wrenn/INSTANCE is made, groups of machines that are gone are removed
//!  a bring-up ─► group SANDBOX-LAYER with limits ─► the VMM is born in it ─► its end ─► the group is removed
//! ```
//!
//! A machine has a group of its own and not its sandbox, because during a rollback a sandbox has two machines. An
//! adopted machine is in the group that it was born in.
//!
//! What is limited is what a VMM can do to others by being broken into or being broken: a guest is limited by its
//! machine already. So the limits are generous, and those of a machine that behaves are never felt.
//!
//! I/O is limited on the one disk that the stack's directory is on. A guest writes as fast as it may, so that limit is
//! one that a machine which behaves may meet; who runs the host sets it.
//!
//! What filters names for a guest has a group too, with limits of its own
//! ([`crate::network::filter`]). It lives as long as its slot.
//!
//! Where the kernel has no control groups of version 2, or they cannot limit something, the agent says so at its
//! start ([`Limits`] as a text), and whoever asks for the host is told.

use std::{fmt, io, num::NonZeroU64, os::fd::OwnedFd};

use camino::Utf8Path;
use wrenn_host_linux::{
    cgroup::{Controller, Hierarchy},
    disk::Disk,
};
use wrenn_types::{InstanceId, LayerId, SandboxId, Shape};

use crate::{network::filter::confinement::is_group_of_filter, sandbox::driver::chain};

/// The period over which time of the processors is counted, in microseconds: the kernel's default.
const PERIOD_MICROS: u64 = 100_000;
/// What the threads of a VMM that are none of the guest's CPUs may have of a processor, in percent.
const VMM_CPU_PERCENT: u64 = 50;
/// What a VMM needs beside the memory of its guest, in MiB: itself, translated code, buffers of the disk.
const VMM_MEMORY_MIB: u64 = 384;
/// One part of so many of the guest's memory is for the tables of the pages of it.
const PAGE_TABLES: u64 = 64;
/// How many threads a VMM may have beside one for each CPU: QEMU reads and writes disks with up to 64.
const VMM_THREADS: u64 = 128;

/// What each machine may have.
#[derive(Debug)]
pub enum Limits {
    /// Each has a group.
    Groups(Groups),
    /// There are none, and why.
    Absent(String),
}

/// Where the groups are, and what is the same for all of them.
#[derive(Debug)]
pub struct Groups {
    hierarchy: Hierarchy,
    io: Io,
}

impl Groups {
    /// The directory in which they are.
    #[must_use]
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }
}

/// What a machine may read of the disk, and what it may write. None is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoBound {
    /// Bytes per second.
    pub bytes: Option<NonZeroU64>,
    /// Operations per second.
    pub operations: Option<NonZeroU64>,
}

/// Whether I/O is limited, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Io {
    /// As the kernel is told it.
    Limited(String),
    /// Nobody wants it to be.
    Free,
    /// The disks of sandboxes are on no disk of the host of which the kernel counts the reads and writes.
    NoDisk,
}

impl Io {
    fn new(bound: IoBound, disk: Option<Disk>) -> Self {
        let bounds = [("bps", bound.bytes), ("iops", bound.operations)];
        let set = bounds.into_iter().filter_map(|(unit, number)| Some((unit, number?)));
        let words: String = set.map(|(unit, number)| format!(" r{unit}={number} w{unit}={number}")).collect();
        match disk {
            _ if words.is_empty() => Self::Free,
            Some(disk) => Self::Limited(format!("{disk}{words}")),
            None => Self::NoDisk,
        }
    }
}

/// What a machine of this shape may have. Pure.
fn limits_of(shape: Shape, io: &Io) -> Vec<(Controller, &'static str, String)> {
    let (vcpus, memory) = (u64::from(shape.vcpus.get()), u64::from(shape.memory.get()));
    let cpu = PERIOD_MICROS * (vcpus * 100 + VMM_CPU_PERCENT) / 100;
    let memory = (memory + memory / PAGE_TABLES + VMM_MEMORY_MIB) << 20;
    let mut limits = vec![
        (Controller::Cpu, "cpu.max", format!("{cpu} {PERIOD_MICROS}")),
        (Controller::Memory, "memory.max", memory.to_string()),
        (Controller::Memory, "memory.swap.max", "0".to_owned()),
        // Half a VMM is none.
        (Controller::Memory, "memory.oom.group", "1".to_owned()),
        (Controller::Pids, "pids.max", (vcpus + VMM_THREADS).to_string()),
    ];
    if let Io::Limited(value) = io {
        limits.push((Controller::Io, "io.max", value.clone()));
    }
    limits
}

/// The name of a machine's group.
fn name(id: &SandboxId, layer: &LayerId) -> String {
    format!("{id}-{layer}")
}

impl Limits {
    /// Makes the directory of an instance's groups, if there can be one. The bound is for the disk that `disks` is on.
    #[must_use]
    pub fn open(instance: &InstanceId, disks: &Utf8Path, bound: IoBound) -> Self {
        let hierarchy = match Hierarchy::open(instance.as_str()) {
            Ok(hierarchy) => hierarchy,
            Err(error) => return Self::Absent(chain(&error)),
        };
        let disk = Disk::of(disks.as_std_path()).unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the disk of {disks} is not known");
            None
        });
        Self::Groups(Groups { hierarchy, io: Io::new(bound, disk) })
    }

    /// What is limited here, and what is not.
    #[must_use]
    pub fn controllers(&self) -> [(Controller, bool); Controller::ALL.len()] {
        Controller::ALL.map(|controller| {
            let is_limited = match self {
                Self::Absent(_) => false,
                Self::Groups(Groups { hierarchy, io }) => {
                    let is_wanted = controller != Controller::Io || matches!(io, Io::Limited(_));
                    is_wanted && hierarchy.controllers().contains(&controller)
                }
            };
            (controller, is_limited)
        })
    }

    /// By what no machine is limited here.
    pub fn absent(&self) -> impl Iterator<Item = Controller> {
        self.controllers().into_iter().filter(|(_, is_limited)| !is_limited).map(|(controller, _)| controller)
    }

    /// Makes the group of a machine that is about to be started, and opens its entrance; none where there are none.
    ///
    /// # Errors
    /// The group cannot be made as it should be. A machine without its limits is not started.
    pub fn begin(&self, id: &SandboxId, layer: &LayerId, shape: Shape) -> io::Result<Option<OwnedFd>> {
        let Self::Groups(Groups { hierarchy, io }) = self else { return Ok(None) };
        hierarchy.create(&name(id, layer), &limits_of(shape, io))?.entrance().map(Some)
    }

    /// Removes the group of a machine that has ended.
    pub fn end(&self, id: &SandboxId, layer: &LayerId) {
        let Self::Groups(groups) = self else { return };
        if let Err(error) = groups.hierarchy.group(&name(id, layer)).remove() {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "a control group stays until the next start");
        }
    }

    /// Whether the kernel has killed the machine of a group because it needed more memory than it may have.
    #[must_use]
    pub fn was_out_of_memory(&self, id: &SandboxId, layer: &LayerId) -> bool {
        let Self::Groups(groups) = self else { return false };
        groups.hierarchy.group(&name(id, layer)).oom_kills() > 0
    }

    /// Removes the groups of machines that are gone. One that cannot be removed is tried again at the next start.
    pub fn keep_only(&self, is_known: impl Fn(&str) -> bool) {
        let Self::Groups(Groups { hierarchy, .. }) = self else { return };
        for name in hierarchy.names().unwrap_or_default() {
            if is_known(&name) {
                continue;
            }
            let removed = hierarchy.group(&name).remove();
            // That of a filter which lives goes with its slot.
            if let Err(error) = removed
                && !is_group_of_filter(&name)
            {
                tracing::warn!(
                    name,
                    error = &error as &dyn std::error::Error,
                    "a control group of nobody stays"
                );
            }
        }
    }

    /// Removes the directory if no machine is left.
    pub fn close(&self) {
        if let Self::Groups(groups) = self {
            groups.hierarchy.close();
        }
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = match self {
            Self::Absent(why) => return write!(f, "machines are not limited on this host: {why}"),
            Self::Groups(groups) => groups,
        };
        let words = |wanted: bool| {
            // What nobody wants to be limited is in neither list.
            let is_told = |controller| wanted || controller != Controller::Io || groups.io != Io::Free;
            let all = self.controllers().into_iter();
            let those = all.filter(|(controller, is_limited)| *is_limited == wanted && is_told(*controller));
            those.map(|(controller, _)| controller.name()).collect::<Vec<_>>().join(", ")
        };
        let (there, missing) = (words(true), words(false));
        match there.is_empty() {
            true => write!(f, "each machine has a control group, but nothing is limited")?,
            false => write!(f, "each machine is limited in {there}")?,
        }
        if !missing.is_empty() {
            write!(f, "; not limited: {missing} (the kernel has no controller of version 2 for it here)")?;
        }
        if groups.io == Io::NoDisk {
            write!(f, "; the disks of sandboxes are not on one disk of the host, so I/O cannot be limited")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wrenn_types::{MemoryMib, Vcpus};

    use super::*;

    #[test]
    fn the_limits_of_a_small_machine() {
        let shape = Shape { vcpus: Vcpus::new(1).unwrap(), memory: MemoryMib::new(512).unwrap() };
        let bound = IoBound { bytes: NonZeroU64::new(1 << 20), operations: None };
        let io = Io::new(bound, Disk::parse("8:16"));
        let limits = limits_of(shape, &io);
        let found: Vec<_> = limits.iter().map(|(_, file, value)| (*file, value.as_str())).collect();
        let expected = [
            ("cpu.max", "150000 100000"),
            ("memory.max", "947912704"),
            ("memory.swap.max", "0"),
            ("memory.oom.group", "1"),
            ("pids.max", "129"),
            ("io.max", "8:16 rbps=1048576 wbps=1048576"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn without_control_groups_nothing_is_limited() {
        let limits = Limits::Absent("no control groups here".to_owned());
        assert!(limits.absent().eq(Controller::ALL));
        assert_eq!(
            limits.absent().map(Controller::name).collect::<Vec<_>>(),
            ["cpu", "io", "memory", "pids"]
        );
    }

    #[test]
    fn io_is_limited_where_somebody_wants_it_and_there_is_a_disk() {
        let number = NonZeroU64::new;
        let both = IoBound { bytes: number(5), operations: number(7) };
        let limited = Io::Limited("8:0 rbps=5 wbps=5 riops=7 wiops=7".to_owned());
        assert_eq!(Io::new(both, Disk::parse("8:0")), limited);
        assert_eq!(Io::new(both, None), Io::NoDisk);
        assert_eq!(Io::new(IoBound { bytes: None, operations: None }, None), Io::Free);
    }

    proptest! {
        #[test]
        fn a_guest_that_uses_all_it_has_is_within_its_limits(
            vcpus in i64::from(Vcpus::MINIMUM)..=i64::from(Vcpus::MAXIMUM),
            memory in i64::from(MemoryMib::MINIMUM)..=i64::from(MemoryMib::MAXIMUM),
        ) {
            let shape = Shape { vcpus: Vcpus::new(vcpus).unwrap(), memory: MemoryMib::new(memory).unwrap() };
            for (controller, file, value) in limits_of(shape, &Io::Free) {
                let number: i64 = value.split(' ').next().unwrap().parse().unwrap();
                match (controller, file) {
                    (Controller::Cpu, _) => prop_assert!(number > vcpus * 100_000),
                    (_, "memory.max") => prop_assert!(number >= (memory + 256) << 20),
                    (Controller::Pids, _) => prop_assert!(number > vcpus + 64),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn the_machine_that_needed_more_memory_than_it_may_have_is_known() {
        // A mount of plain files, in which nobody counts but this test.
        let mount = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::below(mount.path(), "owner").unwrap();
        let limits = Limits::Groups(Groups { hierarchy, io: Io::Free });
        let (id, layer, other) = (SandboxId::random(), LayerId::random(), LayerId::random());
        for (layer, kills) in [(&layer, 1), (&other, 0)] {
            let group = mount.path().join("wrenn/owner").join(name(&id, layer));
            std::fs::create_dir(&group).unwrap();
            std::fs::write(group.join("memory.events"), format!("max 3\noom_kill {kills}\n")).unwrap();
        }
        assert!(limits.was_out_of_memory(&id, &layer));
        assert!(!limits.was_out_of_memory(&id, &other), "another machine of the same sandbox");
        assert!(!limits.was_out_of_memory(&SandboxId::random(), &layer));
        assert!(!Limits::Absent(String::new()).was_out_of_memory(&id, &layer));
    }

    #[test]
    fn what_is_absent_is_said() {
        let text = Limits::Absent("no control groups of version 2 are mounted".to_owned()).to_string();
        assert_eq!(text, "machines are not limited on this host: no control groups of version 2 are mounted");
    }

    #[test]
    fn without_groups_nothing_is_asked_of_the_kernel() {
        let limits = Limits::Absent(String::new());
        let (id, layer) = (SandboxId::random(), LayerId::random());
        let shape = Shape { vcpus: Default::default(), memory: Default::default() };
        assert!(limits.begin(&id, &layer, shape).unwrap().is_none());
        limits.end(&id, &layer);
        limits.keep_only(|_| false);
        limits.close();
    }
}
