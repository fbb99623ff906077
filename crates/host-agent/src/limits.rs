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
//! one that a machine which behaves may meet; who runs the host sets it. Where no group can limit it, because the kernel has no
//! controller for it or it is no disk of the host's own, the virtual machine monitor does, for its guest's disk
//! ([`Limits::disk_rate`]): that holds what a guest does, and not a monitor that was broken into.
//!
//! What filters names for a guest has a group too, with limits of its own
//! ([`crate::network::filter`]). It lives as long as its slot.
//!
//! Where the kernel has no control groups of version 2, or they cannot limit something, the agent says so at its
//! start ([`Limits`] as a text), and whoever asks for the host is told.

use std::{fmt, io, os::fd::OwnedFd, time::Duration};

use camino::Utf8Path;
use wrenn_host_linux::{
    cgroup::{Controller, Group, Hierarchy},
    disk::Disk,
};
use wrenn_types::{InstanceId, LayerId, SandboxId, Shape};
use wrenn_vmm::DiskRate;

use crate::{network::filter::confinement::is_group_of_filter, sandbox::driver::chain, warm::blocking};

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
/// How long what is killed in a group may take to be gone.
const END_BOUND: Duration = Duration::from_secs(10);

/// What each machine may have.
#[derive(Debug)]
pub struct Limits {
    /// Where the groups are; or why there are none.
    groups: Result<Hierarchy, String>,
    io: Io,
}

/// Whether I/O is limited, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Io {
    /// By the group: reads and writes each. As the kernel is told it.
    Group(String),
    /// By the virtual machine monitor: both together.
    Machine(DiskRate),
    /// Nobody wants it to be.
    Free,
}

impl Io {
    /// `disk` is the one on which groups can limit it.
    fn new(rate: DiskRate, disk: Option<Disk>) -> Self {
        let bounds = [("bps", rate.bytes), ("iops", rate.operations)];
        let set = bounds.into_iter().filter_map(|(unit, number)| Some((unit, number?)));
        let words: String = set.map(|(unit, number)| format!(" r{unit}={number} w{unit}={number}")).collect();
        match disk {
            _ if words.is_empty() => Self::Free,
            Some(disk) => Self::Group(format!("{disk}{words}")),
            None => Self::Machine(rate),
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
    if let Io::Group(value) = io {
        limits.push((Controller::Io, "io.max", value.clone()));
    }
    limits
}

/// The name of a machine's group.
fn name(id: &SandboxId, layer: &LayerId) -> String {
    format!("{id}-{layer}")
}

impl Limits {
    /// Makes the directory of an instance's groups, if there can be one. The rate is for the disk that `disks` is on.
    #[must_use]
    pub fn open(instance: &InstanceId, disks: &Utf8Path, rate: DiskRate) -> Self {
        let hierarchy = match Hierarchy::open(instance.as_str()) {
            Ok(hierarchy) => hierarchy,
            Err(error) => return Self::without_groups(chain(&error), rate),
        };
        let disk = Disk::of(disks.as_std_path()).unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the disk of {disks} is not known");
            None
        });
        let disk = disk.filter(|_| hierarchy.controllers().contains(&Controller::Io));
        Self { groups: Ok(hierarchy), io: Io::new(rate, disk) }
    }

    /// Those of a host without control groups, for this reason.
    #[must_use]
    pub fn without_groups(why: String, rate: DiskRate) -> Self {
        Self { groups: Err(why), io: Io::new(rate, None) }
    }

    /// The directory in which the groups are, where there are any.
    #[must_use]
    pub fn hierarchy(&self) -> Option<&Hierarchy> {
        self.groups.as_ref().ok()
    }

    /// What a machine's own monitor has to limit.
    #[must_use]
    pub fn disk_rate(&self) -> DiskRate {
        match self.io {
            Io::Machine(rate) => rate,
            Io::Group(_) | Io::Free => DiskRate::default(),
        }
    }

    /// What is limited here, and what is not.
    #[must_use]
    pub fn controllers(&self) -> [(Controller, bool); Controller::ALL.len()] {
        Controller::ALL.map(|controller| {
            let is_limited = match controller {
                Controller::Io => self.io != Io::Free,
                _ => self.hierarchy().is_some_and(|groups| groups.controllers().contains(&controller)),
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
        let Some(hierarchy) = self.hierarchy() else { return Ok(None) };
        hierarchy.create(&name(id, layer), &limits_of(shape, &self.io))?.entrance().map(Some)
    }

    /// Removes the group of a machine that has ended. What is still in it, since it ends by itself or was not waited for, is
    /// killed, and gone when this comes back.
    pub async fn end(&self, id: &SandboxId, layer: &LayerId) {
        let Some(hierarchy) = self.hierarchy() else { return };
        if let Err(error) = end(hierarchy.group(&name(id, layer))).await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "a control group stays until the next start");
        }
    }

    /// Whether the kernel has killed the machine of a group because it needed more memory than it may have.
    #[must_use]
    pub fn was_out_of_memory(&self, id: &SandboxId, layer: &LayerId) -> bool {
        self.hierarchy().is_some_and(|hierarchy| hierarchy.group(&name(id, layer)).oom_kills() > 0)
    }

    /// Removes the groups of machines that are gone. What is still in one, such as a pager that ends because its machine has, is
    /// killed and waited for. One that cannot be removed is tried again at the next start.
    pub async fn keep_only(&self, is_known: impl Fn(&str) -> bool) {
        let Some(hierarchy) = self.hierarchy() else { return };
        for name in hierarchy.names().unwrap_or_default() {
            if is_known(&name) {
                continue;
            }
            let (group, is_filters) = (hierarchy.group(&name), is_group_of_filter(&name));
            let removed = if is_filters { group.remove() } else { end(group).await };
            // That of a filter which lives goes with its slot.
            if let Err(error) = removed
                && !(is_filters && error.kind() == io::ErrorKind::ResourceBusy)
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
        if let Some(hierarchy) = self.hierarchy() {
            hierarchy.close();
        }
    }
}

/// Removes a group, and what is still in it.
async fn end(group: Group) -> io::Result<()> {
    blocking(move || group.end(END_BOUND)).await
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_by_machine = matches!(self.io, Io::Machine(_));
        let words = |wanted: bool| {
            // What nobody wants to be limited is in neither list.
            let is_told = |controller| controller != Controller::Io || (wanted && !is_by_machine);
            let all = self.controllers().into_iter();
            let those = all.filter(|(controller, is_limited)| *is_limited == wanted && is_told(*controller));
            those.map(|(controller, _)| controller.name()).collect::<Vec<_>>().join(", ")
        };
        match &self.groups {
            Err(why) => write!(f, "machines have no control groups on this host: {why}")?,
            Ok(_) => {
                let (there, missing) = (words(true), words(false));
                match there.is_empty() {
                    true => write!(f, "each machine has a control group, but nothing is limited by it")?,
                    false => write!(f, "each machine is limited in {there}")?,
                }
                if !missing.is_empty() {
                    write!(
                        f,
                        "; not limited: {missing} (the kernel has no controller of version 2 for it here)"
                    )?;
                }
            }
        }
        if is_by_machine {
            write!(f, "; reads and writes of its disk are limited by the virtual machine monitor alone")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use proptest::prelude::*;
    use wrenn_types::{MemoryMib, Vcpus};

    use super::*;

    #[test]
    fn the_limits_of_a_small_machine() {
        let shape = Shape { vcpus: Vcpus::new(1).unwrap(), memory: MemoryMib::new(512).unwrap() };
        let rate = DiskRate { bytes: NonZeroU64::new(1 << 20), operations: None };
        let io = Io::new(rate, Disk::parse("8:16"));
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

    fn both() -> DiskRate {
        DiskRate { bytes: NonZeroU64::new(5), operations: NonZeroU64::new(7) }
    }

    #[test]
    fn without_control_groups_only_the_monitor_limits_something() {
        let names = |limits: &Limits| limits.absent().map(Controller::name).collect::<Vec<_>>();
        let limits = Limits::without_groups("no control groups here".to_owned(), both());
        assert_eq!(names(&limits), ["cpu", "memory", "pids"]);
        assert_eq!(limits.disk_rate(), both());
        let limits = Limits::without_groups("no control groups here".to_owned(), DiskRate::default());
        assert!(limits.absent().eq(Controller::ALL));
        assert!(limits.disk_rate().is_free());
    }

    #[test]
    fn io_is_limited_where_somebody_wants_it_and_once() {
        let by_group = Io::Group("8:0 rbps=5 wbps=5 riops=7 wiops=7".to_owned());
        assert_eq!(Io::new(both(), Disk::parse("8:0")), by_group);
        assert_eq!(Io::new(both(), None), Io::Machine(both()));
        assert_eq!(Io::new(DiskRate::default(), Disk::parse("8:0")), Io::Free);
        let mount = tempfile::tempdir().unwrap();
        let limits = Limits { groups: Ok(Hierarchy::below(mount.path(), "owner").unwrap()), io: by_group };
        assert!(limits.disk_rate().is_free());
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
        let limits = Limits { groups: Ok(hierarchy), io: Io::Free };
        let (id, layer, other) = (SandboxId::random(), LayerId::random(), LayerId::random());
        for (layer, kills) in [(&layer, 1), (&other, 0)] {
            let group = mount.path().join("wrenn/owner").join(name(&id, layer));
            std::fs::create_dir(&group).unwrap();
            std::fs::write(group.join("memory.events"), format!("max 3\noom_kill {kills}\n")).unwrap();
        }
        assert!(limits.was_out_of_memory(&id, &layer));
        assert!(!limits.was_out_of_memory(&id, &other), "another machine of the same sandbox");
        assert!(!limits.was_out_of_memory(&SandboxId::random(), &layer));
        let absent = Limits::without_groups(String::new(), DiskRate::default());
        assert!(!absent.was_out_of_memory(&id, &layer));
    }

    #[test]
    fn what_is_absent_is_said() {
        let why = "no control groups of version 2 are mounted";
        let text = |rate| Limits::without_groups(why.to_owned(), rate).to_string();
        let said = "machines have no control groups on this host: no control groups of version 2 are mounted";
        assert_eq!(text(DiskRate::default()), said);
        let more = "; reads and writes of its disk are limited by the virtual machine monitor alone";
        assert_eq!(text(both()), format!("{said}{more}"));
    }

    #[tokio::test]
    async fn without_groups_nothing_is_asked_of_the_kernel() {
        let limits = Limits::without_groups(String::new(), DiskRate::default());
        let (id, layer) = (SandboxId::random(), LayerId::random());
        let shape = Shape { vcpus: Default::default(), memory: Default::default() };
        assert!(limits.begin(&id, &layer, shape).unwrap().is_none());
        limits.end(&id, &layer).await;
        limits.keep_only(|_| false).await;
        limits.close();
    }
}
