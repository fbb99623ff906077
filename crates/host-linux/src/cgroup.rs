//! Control groups, version 2: a group for each process that is to be limited, below a directory of its owner's.
//!
//! ```text
//!  mount of cgroup2 ─► wrenn ─► INSTANCE ─► a group for each machine: limits written, then a process born in it
//! ```
//!
//! Some hosts have no such mount, one that cannot be written, or one without the controllers that limit, because the
//! first version has them. [`Hierarchy::open`] then says so in a sentence; a group without controllers limits nothing,
//! and is otherwise the same.
//!
//! A process never moves in here after its start: it is born in its group ([`crate::process::Spawn::control_group`]),
//! so that there is no moment in which it has no limits.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// Files that some kernels do not have even where their controller is: one without swap has nothing to limit of it, and
/// an old one does not kill by groups.
const MAY_BE_MISSING: [&str; 2] = ["memory.swap.max", "memory.oom.group"];
/// How often the directories are made anew when somebody removes them meanwhile.
const ATTEMPTS: usize = 8;

/// What limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    /// Time of the processors.
    Cpu,
    /// Reads and writes of disks.
    Io,
    /// Memory.
    Memory,
    /// How many processes and threads there are.
    Pids,
}

impl Controller {
    /// All that are used.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Io, Self::Memory, Self::Pids];

    /// The kernel's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Io => "io",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }

    /// The file of its limit. A kernel may have the controller, and not what limits by it.
    fn limit(self) -> &'static str {
        match self {
            Self::Cpu => "cpu.max",
            Self::Io => "io.max",
            Self::Memory => "memory.max",
            Self::Pids => "pids.max",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why there are no groups.
#[derive(Debug, thiserror::Error)]
pub enum NoGroups {
    /// Nothing is mounted, or the list of mounts cannot be read.
    #[error("no control groups of version 2 are mounted")]
    NotMounted(#[source] Option<io::Error>),
    /// The directory of the owner cannot be made.
    #[error("no control group can be made at {path}")]
    NotWritable {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory of an owner's groups.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    directory: PathBuf,
    controllers: BTreeSet<Controller>,
}

/// Where version 2 is mounted, from the list of mounts of a process. The first one: others show the same.
fn parse_mounts(text: &str) -> Option<PathBuf> {
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let path = place.split(' ').nth(4)?;
        // A space in a path would be escaped; nobody mounts it at one.
        (kind.split(' ').next() == Some("cgroup2") && !path.contains('\\')).then(|| path.into())
    };
    text.lines().find_map(mount)
}

fn parse_controllers(text: &str) -> BTreeSet<Controller> {
    let words: BTreeSet<&str> = text.split_ascii_whitespace().collect();
    Controller::ALL.into_iter().filter(|controller| words.contains(controller.name())).collect()
}

/// Lets the children of a group use what is wanted, and answers with what they may use.
fn enable(group: &Path, wanted: &BTreeSet<Controller>) -> BTreeSet<Controller> {
    for controller in wanted {
        // Each for itself: one that is refused does not keep the others away. What holds is what can be read below.
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    let enabled = fs::read_to_string(group.join("cgroup.subtree_control")).unwrap_or_default();
    parse_controllers(&enabled).intersection(wanted).copied().collect()
}

/// Those of the controllers that limit what is in a group.
fn limiting(group: &Path, controllers: &BTreeSet<Controller>) -> BTreeSet<Controller> {
    controllers.iter().copied().filter(|controller| group.join(controller.limit()).exists()).collect()
}

/// Writes limits of a group that is there.
fn limit(
    group: &Path,
    controllers: &BTreeSet<Controller>,
    limits: &[(Controller, &str, String)],
) -> io::Result<()> {
    for (controller, file, value) in limits {
        if !controllers.contains(controller) {
            continue;
        }
        // Never made: the kernel answers to that as to one who may not, and not that there is no such file.
        let opened = OpenOptions::new().write(true).open(group.join(file));
        match opened.and_then(|mut opened| opened.write_all(value.as_bytes())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && MAY_BE_MISSING.contains(file) => {}
            written => written?,
        }
    }
    Ok(())
}

impl Hierarchy {
    /// Makes the directory of an owner, with all controllers that there are.
    ///
    /// # Errors
    /// There can be no groups here; nothing is wrong with that.
    pub fn open(owner: &str) -> Result<Self, NoGroups> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").map_err(|error| NoGroups::NotMounted(Some(error)))?;
        let mount = parse_mounts(&mounts).ok_or(NoGroups::NotMounted(None))?;
        Self::below(&mount, owner)
    }

    /// The same below a mount that is known.
    ///
    /// # Errors
    /// As [`Hierarchy::open`].
    pub fn below(mount: &Path, owner: &str) -> Result<Self, NoGroups> {
        for _ in 0..ATTEMPTS {
            match Self::make(mount, owner) {
                // Another owner removed the common directory, which was empty, before ours was in it.
                Err(NoGroups::NotWritable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                other => return other,
            }
        }
        Self::make(mount, owner)
    }

    fn make(mount: &Path, owner: &str) -> Result<Self, NoGroups> {
        let there = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let mut controllers = parse_controllers(&there);
        let mut directory = mount.to_owned();
        for name in ["wrenn", owner] {
            controllers = enable(&directory, &controllers);
            directory.push(name);
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(NoGroups::NotWritable { path: directory, source: error });
                }
                _ => {}
            }
        }
        let controllers = limiting(&directory, &enable(&directory, &controllers));
        Ok(Self { directory, controllers })
    }

    /// The directory of an owner that has one.
    #[must_use]
    pub fn find(owner: &str) -> Option<Self> {
        let mount = parse_mounts(&fs::read_to_string("/proc/self/mountinfo").ok()?)?;
        let directory = mount.join("wrenn").join(owner);
        let enabled = fs::read_to_string(directory.join("cgroup.subtree_control")).ok()?;
        Some(Self { directory, controllers: parse_controllers(&enabled) })
    }

    /// What can be limited in the groups.
    #[must_use]
    pub fn controllers(&self) -> &BTreeSet<Controller> {
        &self.controllers
    }

    /// Makes a group with limits: names of files and what is written to them. Those of controllers that are not there
    /// are left out. Any other is in force, but for those of which the kernel has nothing to limit.
    ///
    /// # Errors
    /// There is one of that name, or a limit is refused or not there; there is no new group then.
    pub fn create(&self, name: &str, limits: &[(Controller, &str, String)]) -> io::Result<Group> {
        let group = self.group(name);
        fs::create_dir(&group.path)?;
        if let Err(error) = limit(&group.path, &self.controllers, limits) {
            let _ = fs::remove_dir(&group.path);
            return Err(error);
        }
        Ok(group)
    }

    /// The group of this name, which may not be there.
    #[must_use]
    pub fn group(&self, name: &str) -> Group {
        Group { path: self.directory.join(name) }
    }

    /// The names of the groups that there are.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string().ok());
            }
        }
        Ok(names)
    }

    /// Removes the directory if no group is left in it, and the one around it if it was the last.
    pub fn close(&self) {
        if fs::remove_dir(&self.directory).is_ok()
            && let Some(parent) = self.directory.parent()
        {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// One group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// The file by which a new process enters it.
    ///
    /// # Errors
    /// The group is not there.
    pub fn entrance(&self) -> io::Result<OwnedFd> {
        Ok(OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))?.into())
    }

    /// How many of its processes the kernel has killed because its memory was full; 0 where nobody counts.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        parse_oom_kills(&text)
    }

    /// Removes it. Its processes have ended before; one that is not there is removed.
    ///
    /// # Errors
    /// A process is in it.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes it, like [`Self::remove`], but kills what is still in it, and waits for that. Whoever is about to be born in it is
    /// not. Blocks, no longer than `bound`.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`]: a process that was killed is still in it.
    pub fn end(&self, bound: Duration) -> io::Result<()> {
        let end = Instant::now() + bound;
        let removed = self.remove();
        if !is_busy(&removed) {
            return removed;
        }
        // A kernel before 5.14 has no such file: then it is only waited for.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let mut events = File::open(self.path.join("cgroup.events"))?;
        loop {
            // What changes after it is read is an event.
            events.rewind()?;
            events.read_to_end(&mut Vec::new())?;
            let removed = self.remove();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !is_busy(&removed) {
                return removed;
            }
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The processes in it.
    ///
    /// # Errors
    /// The group is not there.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let text = fs::read_to_string(self.path.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }
}

fn is_busy(removed: &io::Result<()>) -> bool {
    matches!(removed, Err(error) if error.kind() == io::ErrorKind::ResourceBusy)
}

fn parse_oom_kills(text: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_two_is_found_among_others() {
        let hybrid = "25 23 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
             26 25 0:23 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             35 25 0:32 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mounts(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(parse_mounts("26 25 0:23 / /sys/fs/cgroup/cpu rw - cgroup cgroup2 rw,cpu\n"), None);
        assert_eq!(parse_mounts("nonsense\n - \n"), None);
    }

    #[test]
    fn only_controllers_that_are_used_count() {
        let found = parse_controllers("cpuset cpu io memory hugetlb pids rdma\n");
        assert_eq!(found, BTreeSet::from(Controller::ALL));
        assert!(parse_controllers("hugetlb cpuset\n").is_empty());
    }

    #[test]
    fn kills_are_counted() {
        assert_eq!(parse_oom_kills("low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 1\n"), 1);
        assert_eq!(parse_oom_kills("oom_kill x"), 0);
        assert_eq!(parse_oom_kills(""), 0);
    }

    /// A mount that a test makes of plain files: what is written to a group can be read there.
    fn plain(controllers: &str) -> tempfile::TempDir {
        let mount = tempfile::tempdir().unwrap();
        fs::write(mount.path().join("cgroup.controllers"), controllers).unwrap();
        fs::create_dir_all(mount.path().join("wrenn/owner")).unwrap();
        for directory in ["", "wrenn", "wrenn/owner"] {
            // Plain files keep the last thing that is written; the kernel keeps all.
            fs::write(mount.path().join(directory).join("cgroup.subtree_control"), "").unwrap();
        }
        mount
    }

    #[test]
    fn limits_are_written_where_there_is_a_controller_for_them() {
        let mount = plain("memory hugetlb");
        let hierarchy = Hierarchy::below(mount.path(), "owner").unwrap();
        assert!(hierarchy.controllers().is_empty(), "a plain file says +memory, which is the name of none");
        let limits = [
            (Controller::Memory, "memory.max", "1000".to_owned()),
            (Controller::Cpu, "cpu.max", "1 2".to_owned()),
        ];
        // Without controllers nothing is written.
        let group = hierarchy.create("one", &limits).unwrap();
        for file in ["memory.max", "cpu.max"] {
            fs::write(group.path.join(file), "").unwrap();
        }
        limit(&group.path, &BTreeSet::from([Controller::Memory]), &limits).unwrap();
        assert_eq!(fs::read_to_string(group.path.join("memory.max")).unwrap(), "1000");
        assert_eq!(fs::read_to_string(group.path.join("cpu.max")).unwrap(), "");
        assert_eq!(hierarchy.names().unwrap(), ["one"]);
        assert_eq!(hierarchy.create("one", &limits).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::write(group.path.join("memory.events"), "oom_kill 3\n").unwrap();
        assert_eq!((group.oom_kills(), hierarchy.group("other").oom_kills()), (3, 0));
    }

    /// A kernel may have the controller of disks, and no limit of them: that was told as in force.
    #[test]
    fn a_controller_without_its_limit_limits_nothing() {
        let group = tempfile::tempdir().unwrap();
        let all = BTreeSet::from(Controller::ALL);
        assert!(limiting(group.path(), &all).is_empty());
        for file in ["cpu.max", "memory.max", "pids.max", "io.stat"] {
            fs::write(group.path().join(file), "").unwrap();
        }
        let some = BTreeSet::from([Controller::Cpu, Controller::Memory, Controller::Pids]);
        assert_eq!(limiting(group.path(), &all), some);
    }

    #[test]
    fn only_what_there_is_nothing_of_may_be_without_a_limit() {
        let owner = format!("test-{}-missing", std::process::id());
        let Some(hierarchy) = real(&owner) else { return };
        let hierarchy = Hierarchy { controllers: BTreeSet::from(Controller::ALL), ..hierarchy };
        let of = |file| [(Controller::Memory, file, "0".to_owned())];
        let group = hierarchy.create("one", &of("memory.swap.max")).unwrap();
        group.remove().unwrap();
        let error = hierarchy.create("two", &of("memory.nothing")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(hierarchy.names().unwrap(), Vec::<String>::new());
        hierarchy.close();
    }

    /// The kernel's own, if there is one that this process may write.
    fn real(owner: &str) -> Option<Hierarchy> {
        match Hierarchy::open(owner) {
            Ok(hierarchy) => Some(hierarchy),
            Err(error) => {
                // The words by which skipped tests are counted.
                #[allow(clippy::print_stdout)]
                {
                    println!("skipped: {error}");
                }
                None
            }
        }
    }

    #[tokio::test]
    async fn a_process_is_born_in_its_group() {
        let owner = format!("test-{}-born", std::process::id());
        let Some(hierarchy) = real(&owner) else { return };
        let group = hierarchy.create("one", &[]).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let spawn = crate::process::Spawn::new("cat").arg("/proc/self/cgroup").arg("-");
        let (stdin, hold) = io::pipe().unwrap();
        let spawn = spawn.stdin(stdin).stdout(writer).control_group(group.entrance().unwrap());
        let mut child = spawn.start().unwrap();
        assert_eq!(group.processes().unwrap(), [child.process().pid()]);
        assert!(group.remove().is_err(), "somebody is in it");
        drop(hold);
        assert!(child.wait().await.unwrap().success());
        let said = io::read_to_string(reader).unwrap();
        assert!(said.contains(&format!("/wrenn/{owner}/one\n")), "{said}");
        group.remove().unwrap();
        group.remove().unwrap();
        hierarchy.close();
        assert!(hierarchy.names().is_err(), "nothing is left");
    }

    #[tokio::test]
    async fn what_wants_more_than_its_memory_is_killed_and_counted() {
        let owner = format!("test-{}-oom", std::process::id());
        let Some(hierarchy) = real(&owner) else { return };
        if !hierarchy.controllers().contains(&Controller::Memory) {
            hierarchy.close();
            #[allow(clippy::print_stdout)]
            {
                println!("skipped: the control groups of version 2 have no controller of memory here");
            }
            return;
        }
        let limits = [
            (Controller::Memory, "memory.max", (32 << 20).to_string()),
            (Controller::Memory, "memory.swap.max", "0".to_owned()),
        ];
        let group = hierarchy.create("one", &limits).unwrap();
        // `tail` keeps what has no end of a line.
        let spawn = crate::process::Spawn::new("tail").arg("-n1").arg("/dev/zero");
        let mut child = spawn.control_group(group.entrance().unwrap()).start().unwrap();
        assert_eq!(child.wait().await.unwrap(), crate::process::Exit::Signal(9));
        assert_eq!(group.oom_kills(), 1);
        group.remove().unwrap();
        hierarchy.close();
    }
}
