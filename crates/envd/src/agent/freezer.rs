//! Stopping every process of the guest, all at once, and letting them go on.
//!
//! The kernel's cgroup freezer does it. A process that is frozen runs no instruction until it is thawed, whatever
//! signal it gets (only killing it works), and one that is started while its cgroup is frozen is born frozen. The
//! state is in the kernel: it is part of a snapshot, and it survives the agent.
//!
//! ```text
//!   /sys/fs/cgroup            process 1, the agent: never frozen (this cgroup cannot be)
//!     ├─ user                 processes of users are born here
//!     └─ what root made       frozen too
//! ```
//!
//! A user of the guest who may become root can move a process anywhere. So before freezing whatever is in the topmost
//! cgroup and belongs to nobody of ours is moved back to `user`. That holds against programs that arrange their own
//! cgroups, as container engines do. Nothing in the guest holds against its root: it can trace the agent itself. What
//! it can spoil so is its own sandbox only, and whoever lets it, knows: a template is made of a guest that one trusts.

use std::{
    fs, io, mem,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::{
    io::Interest,
    time::{Instant, timeout_at},
};
use wrenn_guest_linux::readiness;

use super::tasks;

/// How many cgroups beside that of users are frozen. A guest has a few.
const MAXIMUM_CGROUPS: usize = 512;
/// How often processes are gathered before it is certain that somebody keeps moving them away.
const ROUNDS: usize = 8;

/// Why processes could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    #[error("there is no cgroup to freeze")]
    NoCgroup,
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there are more than {MAXIMUM_CGROUPS} cgroups")]
    TooMany,
    #[error("processes keep leaving their cgroup")]
    Leaving,
    #[error("the processes did not stop in time")]
    Late,
}

/// What is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// One cgroup: the machine belongs to others too.
    Cgroup,
    /// Everything but process 1 and the agent: the machine is ours.
    Machine,
}

/// The cgroup of users, and what else is frozen with it.
#[derive(Debug)]
pub(crate) struct Freezer {
    users: PathBuf,
    scope: Scope,
    /// The switches of what the last [`Freezer::freeze`] stopped, opened: thawing is on the way of every restore, and
    /// looking for all cgroups is most of its work. Nothing that stands still makes another one meanwhile.
    stopped: Mutex<Vec<fs::File>>,
}

impl Freezer {
    pub(crate) fn new(users: PathBuf, scope: Scope) -> Self {
        Self { users, scope, stopped: Mutex::default() }
    }

    /// Freezes, and waits until everything stands still. When it fails, some of it may be frozen.
    pub(crate) async fn freeze(&self, deadline: Instant) -> Result<(), FreezeError> {
        for _ in 0..ROUNDS {
            let cgroups = self.cgroups()?;
            let mut switches = Vec::with_capacity(cgroups.len());
            for cgroup in &cgroups {
                switches.extend(self.set(cgroup, true)?);
            }
            for cgroup in &cgroups {
                wait_until_frozen(cgroup, deadline).await?;
            }
            // Those that stand still start nothing, so a round that finds nobody is the last.
            if !self.gather_strays()? {
                *self.stopped() = switches;
                return Ok(());
            }
        }
        Err(FreezeError::Leaving)
    }

    /// Asks for freezing and does not wait.
    pub(crate) fn request(&self) -> Result<(), FreezeError> {
        self.cgroups()?.iter().try_for_each(|cgroup| self.set(cgroup, true).map(drop))
    }

    /// Lets everything go on. What can be thawed is, also when the rest cannot.
    pub(crate) fn thaw(&self) -> Result<(), FreezeError> {
        let stopped = mem::take(&mut *self.stopped());
        if !stopped.is_empty() && stopped.iter().all(|switch| turn(switch, false).is_ok()) {
            return Ok(());
        }
        let mut answer = Ok(());
        for cgroup in self.cgroups()? {
            let thawed = self.set(&cgroup, false).map(drop);
            answer = answer.and(thawed);
        }
        answer
    }

    fn stopped(&self) -> MutexGuard<'_, Vec<fs::File>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cgroup of users, and those beside it.
    fn cgroups(&self) -> Result<Vec<PathBuf>, FreezeError> {
        let mut cgroups = vec![self.users.clone()];
        let Some(top) = self.top() else { return Ok(cgroups) };
        let failed = |source| FreezeError::Read { path: top.to_owned(), source };
        for entry in fs::read_dir(top).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            if path != self.users && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if cgroups.len() > MAXIMUM_CGROUPS {
                    return Err(FreezeError::TooMany);
                }
                cgroups.push(path);
            }
        }
        Ok(cgroups)
    }

    fn top(&self) -> Option<&Path> {
        match self.scope {
            Scope::Cgroup => None,
            Scope::Machine => self.users.parent(),
        }
    }

    /// Turns the switch of a cgroup and gives it, opened; none of somebody's cgroup that is gone by now.
    fn set(&self, cgroup: &Path, frozen: bool) -> Result<Option<fs::File>, FreezeError> {
        let path = cgroup.join("cgroup.freeze");
        let open = fs::OpenOptions::new().write(true).open(&path);
        match open.and_then(|switch| turn(&switch, frozen).map(|()| switch)) {
            Err(error) if gone(&error) && cgroup != self.users => Ok(None),
            done => done.map(Some).map_err(|source| FreezeError::Write { path, source }),
        }
    }

    /// Moves processes of users that are in the topmost cgroup back; whether there were any.
    fn gather_strays(&self) -> Result<bool, FreezeError> {
        let Some(top) = self.top() else { return Ok(false) };
        let path = top.join("cgroup.procs");
        let listed = fs::read_to_string(&path).map_err(|source| FreezeError::Read { path, source })?;
        let own = std::process::id();
        let mut found = false;
        for pid in listed.lines().filter_map(|line| line.parse::<u32>().ok()) {
            if pid == 1 || pid == own || tasks::is_of_kernel(pid) {
                continue;
            }
            let path = self.users.join("cgroup.procs");
            match fs::write(&path, pid.to_string()) {
                Ok(()) => found = true,
                // It ended meanwhile.
                Err(error) if gone(&error) => {}
                Err(source) => return Err(FreezeError::Write { path, source }),
            }
        }
        Ok(found)
    }
}

fn turn(switch: &fs::File, frozen: bool) -> io::Result<()> {
    switch.write_all_at(if frozen { b"1" } else { b"0" }, 0)
}

/// What the kernel says of a cgroup or process that is not there any more.
fn gone(error: &io::Error) -> bool {
    let errno = rustix::io::Errno::from_io_error(error);
    matches!(errno, Some(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::SRCH))
}

/// Waits until the kernel says that every process of the cgroup stands still.
async fn wait_until_frozen(cgroup: &Path, deadline: Instant) -> Result<(), FreezeError> {
    let path = cgroup.join("cgroup.events");
    let failed = |source| FreezeError::Read { path: path.clone(), source };
    let file = match fs::File::open(&path) {
        Err(error) if gone(&error) => return Ok(()),
        file => file.map_err(failed)?,
    };
    let copy = file.try_clone().map_err(failed)?;
    let events = readiness::register(file.into(), Interest::PRIORITY).map_err(failed)?;
    loop {
        let mut text = [0; 256];
        let length = match copy.read_at(&mut text, 0) {
            Err(error) if gone(&error) => return Ok(()),
            length => length.map_err(failed)?,
        };
        if is_frozen(&text[..length.min(text.len())]) {
            return Ok(());
        }
        let changed = timeout_at(deadline, events.ready(Interest::PRIORITY)).await;
        changed.map_err(|_| FreezeError::Late)?.map_err(failed)?.clear_ready();
    }
}

/// Reads `cgroup.events`.
fn is_frozen(events: &[u8]) -> bool {
    events.split(|byte| *byte == b'\n').any(|line| line == b"frozen 1")
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

    use std::{
        io::{BufRead, BufReader, Write},
        process::{Child, Command, Stdio},
        time::Duration,
    };

    use proptest::prelude::*;

    use super::*;

    /// A cgroup of our own, if this machine lets us have one. It ends with the test, and so does what is in it.
    pub(in super::super) struct Own(PathBuf);

    impl Own {
        pub(in super::super) fn new(name: &str) -> Option<Self> {
            for top in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                let directory = Path::new(top).join(format!("wrenn-test-{}-{name}", std::process::id()));
                // Where the hierarchy of old is mounted, the first is no cgroup.
                let is_hierarchy = Path::new(top).join("cgroup.controllers").exists();
                if is_hierarchy && fs::create_dir(&directory).is_ok() {
                    return Some(Self(directory));
                }
            }
            println!("skipped: no cgroup v2 of one's own can be made here");
            None
        }

        pub(in super::super) fn directory(&self) -> &Path {
            &self.0
        }

        /// A program in it that answers each line with a line.
        pub(in super::super) fn cat(&self) -> Child {
            let cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            fs::write(self.0.join("cgroup.procs"), cat.id().to_string()).unwrap();
            cat
        }

        fn frozen(&self) -> bool {
            stands_still(&self.0)
        }
    }

    pub(in super::super) fn stands_still(cgroup: &Path) -> bool {
        is_frozen(&fs::read(cgroup.join("cgroup.events")).unwrap())
    }

    impl Drop for Own {
        fn drop(&mut self) {
            let _ = fs::write(self.0.join("cgroup.freeze"), "0");
            let _ = fs::remove_dir(&self.0);
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[tokio::test]
    async fn what_is_frozen_stands_still_and_goes_on_later() {
        let Some(own) = Own::new("still") else { return };
        let freezer = Freezer::new(own.0.clone(), Scope::Cgroup);
        let mut cat = own.cat();
        let (mut input, mut output) = (cat.stdin.take().unwrap(), BufReader::new(cat.stdout.take().unwrap()));
        for _ in 0..3 {
            freezer.freeze(soon()).await.unwrap();
            assert!(own.frozen());
            freezer.freeze(soon()).await.unwrap();
            input.write_all(b"line\n").unwrap();
            freezer.thaw().unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "line\n");
        }
        drop(input);
        cat.wait().unwrap();
    }

    #[tokio::test]
    async fn an_empty_cgroup_is_frozen_at_once_and_a_missing_one_never() {
        let Some(own) = Own::new("empty") else { return };
        Freezer::new(own.0.clone(), Scope::Cgroup).freeze(soon()).await.unwrap();
        assert!(own.frozen());
        let nothing = Freezer::new(own.0.join("nothing"), Scope::Cgroup);
        assert!(matches!(nothing.freeze(soon()).await, Err(FreezeError::Write { .. })));
        assert!(matches!(nothing.thaw(), Err(FreezeError::Write { .. })));
    }

    #[tokio::test]
    async fn waiting_for_what_does_not_freeze_has_a_bound() {
        let Some(own) = Own::new("bound") else { return };
        let now = Instant::now();
        assert!(matches!(wait_until_frozen(&own.0, now).await, Err(FreezeError::Late)));
        assert!(wait_until_frozen(&own.0.join("gone"), now).await.is_ok());
    }

    #[tokio::test]
    async fn with_the_machine_its_siblings_stand_still_too() {
        let Some(own) = Own::new("tree") else { return };
        let (users, other) = (own.0.join("user"), own.0.join("other"));
        fs::create_dir(&users).unwrap();
        fs::create_dir(&other).unwrap();
        let mut stray = own.cat();
        let freezer = Freezer::new(users.clone(), Scope::Machine);
        freezer.freeze(soon()).await.unwrap();
        let listed = fs::read_to_string(users.join("cgroup.procs")).unwrap();
        assert_eq!(listed.trim(), stray.id().to_string(), "it was moved back");
        for cgroup in [&users, &other] {
            assert!(stands_still(cgroup), "{cgroup:?}");
        }
        freezer.thaw().unwrap();
        drop(stray.stdin.take());
        stray.wait().unwrap();
        for cgroup in [users, other] {
            fs::remove_dir(cgroup).unwrap();
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            is_frozen(&bytes);
        }

        #[test]
        fn only_the_line_itself_counts(before in "[a-z0-9 \n]{0,20}", digit in "[0-9]{1,2}") {
            let text = format!("{before}\nfrozen {digit}\n");
            let earlier = before.split('\n').any(|line| line == "frozen 1");
            prop_assert_eq!(is_frozen(text.as_bytes()), digit == "1" || earlier);
        }
    }
}
