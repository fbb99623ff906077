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
//! Where the kernel has no control groups of version 2, or they cannot limit something, the agent says so at its
//! start ([`Limits`] as a text), and whoever asks for the host is told.

use std::{fmt, io, os::fd::OwnedFd};

use wrenn_host_linux::cgroup::{Controller, Hierarchy};
use wrenn_types::{InstanceId, LayerId, SandboxId, Shape};

use crate::sandbox::{driver::chain, machine::Machine};

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

/// What each machine may have. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Limits {
    /// Each has a group.
    Groups(Hierarchy),
    /// There are none, and why.
    Absent(String),
}

/// What a machine of this shape may have. Pure.
fn limits_of(shape: Shape) -> Vec<(Controller, &'static str, String)> {
    let (vcpus, memory) = (u64::from(shape.vcpus.get()), u64::from(shape.memory.get()));
    let cpu = PERIOD_MICROS * (vcpus * 100 + VMM_CPU_PERCENT) / 100;
    let memory = (memory + memory / PAGE_TABLES + VMM_MEMORY_MIB) << 20;
    vec![
        (Controller::Cpu, "cpu.max", format!("{cpu} {PERIOD_MICROS}")),
        (Controller::Memory, "memory.max", memory.to_string()),
        (Controller::Memory, "memory.swap.max", "0".to_owned()),
        // Half a VMM is none.
        (Controller::Memory, "memory.oom.group", "1".to_owned()),
        (Controller::Pids, "pids.max", (vcpus + VMM_THREADS).to_string()),
    ]
}

/// The name of a machine's group.
fn name(id: &SandboxId, layer: &LayerId) -> String {
    format!("{id}-{layer}")
}

impl Limits {
    /// Makes the directory of an instance's groups, if there can be one.
    #[must_use]
    pub fn open(instance: &InstanceId) -> Self {
        match Hierarchy::open(instance.as_str()) {
            Ok(hierarchy) => Self::Groups(hierarchy),
            Err(error) => Self::Absent(chain(&error)),
        }
    }

    /// Makes the group of a machine that is about to be started, and opens its entrance; none where there are none.
    ///
    /// # Errors
    /// The group cannot be made as it should be. A machine without its limits is not started.
    pub fn begin(&self, id: &SandboxId, layer: &LayerId, shape: Shape) -> io::Result<Option<OwnedFd>> {
        let Self::Groups(groups) = self else { return Ok(None) };
        groups.create(&name(id, layer), &limits_of(shape))?.entrance().map(Some)
    }

    /// Removes the group of a machine that has ended.
    pub fn end(&self, id: &SandboxId, layer: &LayerId) {
        let Self::Groups(groups) = self else { return };
        if let Err(error) = groups.group(&name(id, layer)).remove() {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "a control group stays until the next start");
        }
    }

    /// Whether the kernel has killed a machine because it needed more memory than it may have.
    #[must_use]
    pub fn was_out_of_memory(&self, machine: &Machine) -> bool {
        let Self::Groups(groups) = self else { return false };
        groups.group(&name(&machine.id, &machine.name)).oom_kills() > 0
    }

    /// Removes the groups of machines that are gone. One that cannot be removed is tried again at the next start.
    pub fn keep_only(&self, is_known: impl Fn(&str) -> bool) {
        let Self::Groups(groups) = self else { return };
        for name in groups.names().unwrap_or_default() {
            if !is_known(&name)
                && let Err(error) = groups.group(&name).remove()
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
            groups.close();
        }
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = [Controller::Cpu, Controller::Memory, Controller::Pids];
        let groups = match self {
            Self::Absent(why) => return write!(f, "machines are not limited on this host: {why}"),
            Self::Groups(groups) => groups,
        };
        let words = |is_there: bool| {
            let those =
                used.iter().filter(|controller| groups.controllers().contains(controller) == is_there);
            those.map(|controller| controller.name()).collect::<Vec<_>>().join(", ")
        };
        let (there, missing) = (words(true), words(false));
        match (there.is_empty(), missing.is_empty()) {
            (false, true) => write!(f, "each machine is limited in {there}"),
            (false, false) => write!(
                f,
                "each machine is limited in {there}, but not in {missing}: \
                the kernel has no control group of version 2 for that"
            ),
            _ => write!(
                f,
                "each machine has a control group, but nothing is limited: the kernel has no controllers of \
                version 2 for {missing}"
            ),
        }
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
        let limits = limits_of(shape);
        let found: Vec<_> = limits.iter().map(|(_, file, value)| (*file, value.as_str())).collect();
        let expected = [
            ("cpu.max", "150000 100000"),
            ("memory.max", "947912704"),
            ("memory.swap.max", "0"),
            ("memory.oom.group", "1"),
            ("pids.max", "129"),
        ];
        assert_eq!(found, expected);
    }

    proptest! {
        #[test]
        fn a_guest_that_uses_all_it_has_is_within_its_limits(
            vcpus in i64::from(Vcpus::MINIMUM)..=i64::from(Vcpus::MAXIMUM),
            memory in i64::from(MemoryMib::MINIMUM)..=i64::from(MemoryMib::MAXIMUM),
        ) {
            let shape = Shape { vcpus: Vcpus::new(vcpus).unwrap(), memory: MemoryMib::new(memory).unwrap() };
            for (controller, file, value) in limits_of(shape) {
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
