//! What every driver must do: one list of cases, run against each of them, the fake included.
//!
//! A test of a driver makes a [`Subject`] and calls [`run`]. The cases know nothing of the driver; they see
//! what a caller sees: the traits, the files, the processes. Their guest counts on its console:
//!
//! ```text
//! wrenn-guest ready          once, after a boot
//! tick TOKEN N ok            again and again; TOKEN is new at each boot, N goes up by one; BAD instead of ok
//!                            when its memory is not what it had written there
//! ```
//!
//! At each tick it writes some pages anew, and makes others zero that were not; and if it has a disk, it writes
//! there too, and reads what it wrote before. With `conformance=poweroff`,
//! `reboot` or `panic` among its kernel arguments it does that instead of counting. So a restored guest is known from a booted one, and where it goes on is known too.
#![allow(clippy::unwrap_used)]

mod adoption;
mod diffs;
mod disks;
mod lifecycle;
mod refusals;
mod snapshots;
mod zeros;

use std::{os::fd::OwnedFd, time::Duration};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::time::{Instant, timeout};
use wrenn_host_linux::process::find_by_argument;
use wrenn_types::{MemoryMib, Shape, Vcpus};

use crate::{
    AdoptedMachine, BootMemory, DiskRate, ExitReason, GuestBundle, MachineSpec, SnapshotFiles, Vm, Vmm,
    pager, process::mark,
};

/// How long a guest may take to come up, translated, on a machine with other work to do, which may be translated too.
const BOOT_BOUND: Duration = Duration::from_secs(240);
/// How long anything else may take.
const BOUND: Duration = Duration::from_secs(60);
/// How often the console is read while something is waited for on it.
const READING: Duration = Duration::from_millis(10);

/// A driver under test.
#[async_trait]
pub trait Subject: Send + Sync {
    /// The driver.
    fn vmm(&self) -> &dyn Vmm;

    /// The guest that counts.
    fn guest(&self) -> GuestBundle;

    /// An empty directory with a short path, for the cases' files.
    fn directory(&self) -> &Utf8Path;

    /// The user that the next machine is confined as, another one for each; none where machines are not confined.
    fn user(&self) -> Option<u32> {
        None
    }

    /// Ends a machine from outside, as `kill -9` of its process would.
    async fn kill(&self, vm: &dyn Vm, name: &str);

    /// Does so with a machine that nobody owns, and waits until it is gone.
    async fn kill_by_name(&self, name: &str);
}

/// Runs every case, one after the other, and says which one is running.
///
/// # Panics
/// With the first thing that a driver does otherwise.
#[allow(clippy::print_stderr)]
pub async fn run(subject: &dyn Subject) {
    macro_rules! cases {
        ($($module:ident::$case:ident),* $(,)?) => {
            $({
                let bench = Bench::new(subject, stringify!($case));
                let begin = Instant::now();
                $module::$case(&bench).await;
                bench.nothing_is_left().await;
                eprintln!("{}: {} in {:?}", subject.vmm().identity().name, stringify!($case), begin.elapsed());
            })*
        };
    }
    cases![
        refusals::impossible_machines_are_refused,
        refusals::missing_files_are_named,
        refusals::what_is_not_possible_now_is_refused,
        lifecycle::pause_and_resume_are_idempotent,
        lifecycle::stop_works_in_every_state,
        lifecycle::a_dropped_machine_is_gone,
        lifecycle::an_abandoned_start_leaves_nothing,
        lifecycle::a_killed_machine_says_so_at_once,
        lifecycle::files_are_kept_open_as_long_as_it_lives,
        lifecycle::a_disk_only_grows,
        lifecycle::a_guest_that_powers_off_has_shut_down,
        lifecycle::a_guest_that_reboots_has_shut_down,
        lifecycle::a_guest_that_panics_is_known,
        snapshots::a_restored_guest_goes_on_where_it_was,
        snapshots::damaged_snapshots_are_refused,
        diffs::a_restored_guest_is_saved_and_goes_on,
        diffs::ten_generations_keep_what_each_has_written,
        diffs::what_cannot_be_saved_is_refused,
        diffs::damaged_pages_are_refused,
        zeros::a_machine_boots_over_zeros_and_is_saved_like_any_other,
        zeros::what_is_not_as_long_as_the_memory_is_refused,
        adoption::a_released_machine_goes_on_and_is_adopted,
        adoption::an_adopted_machine_is_saved_and_has_its_disk,
        adoption::the_end_of_an_adopted_machine_is_noticed,
    ];
    if subject.vmm().capabilities().supports_overlays {
        cases![
            disks::a_disk_goes_on_on_an_overlay,
            disks::overlays_that_do_not_fit_are_refused,
            disks::a_chain_is_copied_into_its_top,
        ];
    } else {
        cases![disks::a_disk_without_layers_is_one_file];
    }
}

/// What one case works with.
pub(crate) struct Bench<'a> {
    subject: &'a dyn Subject,
    root: Utf8PathBuf,
}

impl<'a> Bench<'a> {
    fn new(subject: &'a dyn Subject, case: &'static str) -> Self {
        // Short, because sockets are made below it.
        let root = subject.directory().join(format!("{:x}", case.bytes().map(u32::from).sum::<u32>()));
        std::fs::create_dir(&root).unwrap();
        Self { subject, root }
    }

    fn vmm(&self) -> &dyn Vmm {
        self.subject.vmm()
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        self.root.join(name)
    }

    /// A machine's full name: as long as the case runs, a process with it is this case's.
    fn full_name(&self, name: &str) -> String {
        format!("wrenn-conf{}-{name}", std::process::id())
    }

    /// A small machine without disk and network, in a directory of its own.
    fn spec(&self, name: &str) -> MachineSpec {
        let run_dir = self.path(name);
        if !run_dir.exists() {
            std::fs::create_dir(&run_dir).unwrap();
        }
        MachineSpec {
            name: self.full_name(name),
            run_dir,
            shape: Shape { vcpus: Vcpus::new(1).unwrap(), memory: MemoryMib::new(128).unwrap() },
            guest: self.subject.guest(),
            disk: None,
            disk_bases: Vec::new(),
            disk_rate: DiskRate::default(),
            network: None,
            kernel_arguments: Vec::new(),
            keep_open: Vec::<OwnedFd>::new(),
            control_group: None,
            user: self.subject.user(),
        }
    }

    fn snapshot_files(&self) -> SnapshotFiles {
        SnapshotFiles { memory: self.path("memory"), state: self.path("state"), pages: None }
    }

    /// Where a snapshot of a restored machine goes.
    fn diff_files(&self, name: &str) -> SnapshotFiles {
        SnapshotFiles {
            memory: self.template_files().memory,
            state: self.path(&format!("state-{name}")),
            pages: Some(self.path(&format!("pages-{name}"))),
        }
    }

    fn template_files(&self) -> SnapshotFiles {
        let directory = self.subject.directory().join("template");
        SnapshotFiles { memory: directory.join("memory"), state: directory.join("state"), pages: None }
    }

    /// A template of a guest that counts, saved and stopped: made by the first case that wants it.
    async fn template(&self) -> SnapshotFiles {
        let files = self.template_files();
        if files.state.exists() {
            return files;
        }
        std::fs::create_dir(files.state.parent().unwrap()).unwrap();
        let mut vm =
            bounded(self.vmm().boot(self.spec("template"), BootMemory::Shared(&files.memory))).await.unwrap();
        counts(vm.as_mut(), 3, BOOT_BOUND).await;
        bounded(vm.pause()).await.unwrap();
        bounded(vm.snapshot(&files)).await.unwrap();
        bounded(vm.stop()).await.unwrap();
        files
    }

    async fn restore(&self, name: &str, files: &SnapshotFiles) -> Box<dyn Vm> {
        bounded(self.vmm().restore(self.spec(name), files)).await.unwrap()
    }

    /// What is known of a machine of this bench when its owner is gone.
    fn adopted(&self, name: &str) -> AdoptedMachine {
        AdoptedMachine {
            name: self.full_name(name),
            run_dir: self.path(name),
            has_disk: false,
            memory: None,
            pid_hint: None,
        }
    }

    async fn boot(&self, name: &str) -> Box<dyn Vm> {
        bounded(self.vmm().boot(self.spec(name), BootMemory::Anonymous)).await.unwrap()
    }

    /// Whether a process of this name runs.
    fn runs(&self, name: &str) -> bool {
        let argument = mark(&self.full_name(name));
        find_by_argument(&argument).unwrap().iter().any(|found| found.argument == argument)
    }

    /// After a case: no process, no socket, no open file of it.
    async fn nothing_is_left(&self) {
        let marks = [mark(&self.full_name("")), pager::mark(&self.full_name(""))];
        let left = || {
            let found = marks.iter().flat_map(|mark| find_by_argument(mark).unwrap());
            found.map(|found| found.argument).collect::<Vec<_>>()
        };
        // A machine that was dropped is killed, and then takes a moment to be gone.
        until(|| left().is_empty()).await;
        // And whoever reaps it takes its socket away a moment later.
        until(|| {
            use std::os::unix::fs::FileTypeExt;
            let is_socket = |entry: &Utf8PathBuf| {
                std::fs::symlink_metadata(entry).is_ok_and(|entry| entry.file_type().is_socket())
            };
            !walk(&self.root).iter().any(is_socket)
        })
        .await;
        let root = self.root.as_std_path();
        until(|| {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            !open.into_iter().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(root)))
        })
        .await;
        std::fs::remove_dir_all(&self.root).unwrap();
    }
}

fn walk(directory: &Utf8Path) -> Vec<Utf8PathBuf> {
    let mut found = Vec::new();
    for entry in directory.read_dir_utf8().unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(entry.path()));
        } else {
            found.push(entry.path().to_owned());
        }
    }
    found
}

async fn bounded<T>(work: impl Future<Output = T>) -> T {
    timeout(BOUND, work).await.unwrap()
}

/// Waits until something that nobody announces has come about.
async fn until(mut come_about: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !come_about() {
        assert!(begin.elapsed() < BOUND, "it did not come about within {BOUND:?}");
        tokio::time::sleep(READING).await;
    }
}

/// Why a machine ended, once it has.
async fn ended(vm: &dyn Vm, bound: Duration) -> ExitReason {
    let mut exit = vm.exit();
    let reason = timeout(bound, exit.wait_for(Option::is_some)).await;
    reason.unwrap().unwrap().clone().unwrap()
}

/// What a guest has counted: its token, and its ticks in order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Counted {
    token: String,
    ticks: Vec<u64>,
}

impl Counted {
    fn last(&self) -> u64 {
        *self.ticks.last().unwrap()
    }
}

fn counted(console: &str) -> Option<Counted> {
    let mut found: Option<Counted> = None;
    // The last line may not be complete.
    let complete = &console[..console.rfind('\n').map_or(0, |end| end + 1)];
    for line in complete.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["tick", token, tick, memory] = words[..] else { continue };
        assert_eq!(memory, "ok", "the memory holds what the guest has written: {line}");
        let tick = tick.parse().unwrap();
        let counted = found.get_or_insert_with(|| Counted { token: token.to_owned(), ticks: Vec::new() });
        assert_eq!(counted.token, token, "one machine has one guest");
        counted.ticks.push(tick);
    }
    found
}

/// Waits until a guest has counted this many ticks on its console.
async fn counts(vm: &mut dyn Vm, at_least: usize, bound: Duration) -> Counted {
    let begin = Instant::now();
    loop {
        let console = vm.console().await;
        if let Some(counted) = counted(&console)
            && counted.ticks.len() >= at_least
        {
            let in_order = counted.ticks.windows(2).all(|pair| pair[1] == pair[0] + 1);
            assert!(in_order, "{counted:?}");
            return counted;
        }
        let gone = vm.exit().borrow().clone();
        assert!(gone.is_none() && begin.elapsed() < bound, "{gone:?}, and the console says: {console}");
        tokio::time::sleep(READING).await;
    }
}
