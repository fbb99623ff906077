//! What a host is, read from its files and asked of its programs. Nothing is judged here, and nothing is changed:
//! but for files without a name that try what the file system of the data can do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::OFlags;
use tokio::time::timeout;
use wrenn_host_linux::netns;

use super::{
    Target, parse,
    parse::{IdRange, Module, Mount, Processors},
    programs::{self, Program},
    tree::{Seen, Tree},
};
use crate::agent::RUN_DIR;

/// The modules of the kernel that are looked for.
pub(super) const MODULES: [&str; 7] =
    ["dm_snapshot", "kvm_amd", "kvm_intel", "loop", "nf_conntrack", "nf_tables", "tun"];
const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";
/// Where Debian has it. A login without root's PATH does not find it by its name.
const NFT: &str = "/usr/sbin/nft";

/// Simultaneous multithreading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smt {
    /// What the kernel was told, such as `on`, `off` or `notsupported`.
    pub control: String,
    /// Whether a core runs two threads now.
    pub is_active: bool,
}

/// Something that memory is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    /// Its name.
    pub name: String,
    /// Whether nothing that can be read stays: it is in memory, or encrypted.
    pub is_safe: bool,
}

/// Control groups of version 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// Their mount.
    pub mount: Mount,
    /// The controllers that they have.
    pub controllers: BTreeSet<String>,
}

/// The place of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataPlace {
    /// The directory, or the nearest one above it that is there.
    pub path: Utf8PathBuf,
    /// What it is on.
    pub mount: Option<Mount>,
    /// How many bytes can be written.
    pub free_bytes: Seen<u64>,
    /// Whether two files can share blocks there.
    pub shares_blocks: Seen<bool>,
}

/// All that is known of a host.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What is to run here.
    pub target: Target,
    /// The capabilities of this process that are in force, as a set of bits.
    pub capabilities: Seen<u64>,
    /// The ranges of user ids that mean something here.
    pub mapped_ids: Seen<Vec<IdRange>>,
    /// User ids and group ids that are somebody's, with the file and the name.
    pub given_ids: Vec<(String, IdRange)>,
    /// The release of the kernel.
    pub kernel: Seen<String>,
    /// What the kernel was started with.
    pub command_line: Seen<String>,
    /// The importance up to which messages of the kernel go to the console.
    pub console_level: Seen<u64>,
    /// The processors.
    pub processors: Seen<Processors>,
    /// What the kernel says of each weakness of processors.
    pub vulnerabilities: Seen<BTreeMap<String, String>>,
    /// Simultaneous multithreading.
    pub smt: Seen<Smt>,
    /// `/dev/kvm`.
    pub kvm: Seen<()>,
    /// KVM's `nx_huge_pages`.
    pub kvm_nx_huge_pages: Seen<String>,
    /// KVM's shortest period of a timer, in microseconds.
    pub kvm_timer_period: Seen<u64>,
    /// What the kernel takes the time from.
    pub clock_source: Seen<String>,
    /// The state of the merging of equal pages.
    pub ksm: Seen<u64>,
    /// What memory is written to.
    pub swaps: Seen<Vec<Swap>>,
    /// How many memory controllers correct errors and say so.
    pub error_correcting: Seen<usize>,
    /// Control groups.
    pub groups: Seen<Groups>,
    /// How modules of the kernel can be had, by their names.
    pub modules: BTreeMap<&'static str, Module>,
    /// `/dev/net/tun`.
    pub tun: Seen<()>,
    /// `/dev/mapper/control`.
    pub device_mapper: Seen<()>,
    /// `/dev/loop-control`.
    pub loop_control: Seen<()>,
    /// What lists the rules of the packet filter.
    pub nft: Program,
    /// Firecracker's version.
    pub firecracker: Program,
    /// Its jailer's version.
    pub jailer: Program,
    /// What of the paths that production trusts somebody other than root can change.
    pub changeable: Seen<BTreeSet<Utf8PathBuf>>,
    /// Where the data is.
    pub data: DataPlace,
    /// How many files this process may have open.
    pub open_files: Seen<u64>,
    /// Settings of the kernel that are numbers, by their path.
    pub settings: BTreeMap<&'static str, Seen<u64>>,
    /// The TCP ports on which somebody listens.
    pub listening: Seen<BTreeSet<u16>>,
}

/// The settings of the kernel that are numbers.
pub(super) mod setting {
    pub(in super::super) const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
    pub(in super::super) const CONNECTIONS: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
    pub(in super::super) const PROCESSES: &str = "/proc/sys/kernel/pid_max";
    pub(in super::super) const THREADS: &str = "/proc/sys/kernel/threads-max";
    pub(in super::super) const FILES: &str = "/proc/sys/fs/file-max";
    pub(in super::super) const WATCHERS: &str = "/proc/sys/fs/inotify/max_user_instances";
    pub(in super::super) const MAPPINGS: &str = "/proc/sys/vm/max_map_count";
    pub(in super::super) const ALL: [&str; 7] =
        [FORWARD, CONNECTIONS, PROCESSES, THREADS, FILES, WATCHERS, MAPPINGS];
}

/// How long all files of the host may take. They are the kernel's own, but for those on the disk of the data.
const READ_BOUND: Duration = Duration::from_secs(60);

/// Nothing is known of a host.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// A file system does not answer.
    #[error("the host's files were not read within {READ_BOUND:?}")]
    TimedOut,
    /// The thread that reads them ended.
    #[error("the host's files were not read")]
    Ended(#[source] tokio::task::JoinError),
}

/// Gathers everything. What cannot be read is part of it.
///
/// # Errors
/// Reading does not come to an end.
pub async fn gather(tree: &Tree, target: &Target) -> Result<Facts, GatherError> {
    let named = |program: &Option<Utf8PathBuf>, name: &str| program.clone().unwrap_or_else(|| name.into());
    let firecracker = named(&target.firecracker, "firecracker");
    // A release has both in one place.
    let beside = target.firecracker.as_ref().map(|path| path.with_file_name("jailer"));
    let jailer = named(&target.jailer.clone().or_else(|| beside.filter(|path| path.exists())), "jailer");
    let (nft, firecracker, jailer) = tokio::join!(
        programs::ask(Utf8Path::new(NFT), &["list", "tables"]),
        programs::ask(&firecracker, &["--version"]),
        programs::ask(&jailer, &["--version"]),
    );
    let (tree, target) = (tree.clone(), target.clone());
    let asked = Asked { nft, firecracker, jailer };
    let read = tokio::task::spawn_blocking(move || read(&tree, target, asked));
    let read = timeout(READ_BOUND, read).await.map_err(|_| GatherError::TimedOut)?;
    read.map_err(GatherError::Ended)
}

/// What programs said.
pub(super) struct Asked {
    pub(super) nft: Program,
    pub(super) firecracker: Program,
    pub(super) jailer: Program,
}

pub(super) fn read(tree: &Tree, target: Target, Asked { nft, firecracker, jailer }: Asked) -> Facts {
    let (mounts, kernel) = (tree.text("/proc/self/mountinfo"), tree.text("/proc/sys/kernel/osrelease"));
    let mounts = mounts.map(|text| parse::mounts(&text));
    let own = [target.data_dir.as_path(), Utf8Path::new(RUN_DIR), Utf8Path::new(netns::NAMES)];
    let trusted = own.into_iter().chain([firecracker.path(), jailer.path()].into_iter().flatten());
    let status = tree.text("/proc/self/status");
    Facts {
        capabilities: status.parse(|text| parse::capabilities(text)),
        mapped_ids: tree.text("/proc/self/uid_map").map(|text| parse::mapped_ids(&text)),
        given_ids: given_ids(tree),
        command_line: tree.text("/proc/cmdline"),
        console_level: tree.number("/proc/sys/kernel/printk"),
        processors: tree.text("/proc/cpuinfo").map(|text| parse::processors(&text).unwrap_or_default()),
        vulnerabilities: vulnerabilities(tree),
        smt: smt(tree),
        kvm: tree.opens("/dev/kvm"),
        kvm_nx_huge_pages: tree.text("/sys/module/kvm/parameters/nx_huge_pages"),
        kvm_timer_period: tree.number("/sys/module/kvm/parameters/min_timer_period_us"),
        clock_source: tree.text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        ksm: tree.number("/sys/kernel/mm/ksm/run"),
        swaps: swaps(tree),
        error_correcting: tree
            .names("/sys/devices/system/edac/mc")
            .map(|names| names.iter().filter(|name| name.starts_with("mc")).count()),
        groups: groups(tree, &mounts),
        modules: modules(tree, &kernel),
        tun: tree.opens("/dev/net/tun"),
        device_mapper: tree.opens("/dev/mapper/control"),
        loop_control: tree.opens("/dev/loop-control"),
        changeable: changeable(tree, trusted),
        data: data(tree, &target.data_dir, &mounts),
        open_files: tree.text("/proc/self/limits").parse(|text| parse::open_files(text)),
        settings: setting::ALL.into_iter().map(|path| (path, tree.number(path))).collect(),
        listening: listening(tree),
        nft,
        firecracker,
        jailer,
        kernel,
        target,
    }
}

fn given_ids(tree: &Tree) -> Vec<(String, IdRange)> {
    let read = |file: &str, parse: fn(&str) -> Vec<(String, IdRange)>| match tree.text(file) {
        Seen::Is(text) => {
            parse(&text).into_iter().map(|(name, range)| (format!("{name} in {file}"), range)).collect()
        }
        // A host without such a file has given out nothing by it.
        Seen::Absent | Seen::Unreadable(_) => Vec::new(),
    };
    [
        read("/etc/passwd", parse::single_ids),
        read("/etc/group", parse::single_ids),
        read("/etc/subuid", parse::subordinate_ids),
        read("/etc/subgid", parse::subordinate_ids),
    ]
    .concat()
}

fn vulnerabilities(tree: &Tree) -> Seen<BTreeMap<String, String>> {
    tree.names(VULNERABILITIES).map(|names| {
        let said = |name: &String| match tree.text(format!("{VULNERABILITIES}/{name}")) {
            Seen::Is(text) => text,
            Seen::Absent => "Unknown: there is no such file".to_owned(),
            Seen::Unreadable(why) => format!("Unknown: {why}"),
        };
        names.into_iter().map(|name| (name.clone(), said(&name))).collect()
    })
}

fn smt(tree: &Tree) -> Seen<Smt> {
    let control = tree.text("/sys/devices/system/cpu/smt/control");
    match tree.number("/sys/devices/system/cpu/smt/active") {
        Seen::Is(active) => control.map(|control| Smt { control, is_active: active != 0 }),
        Seen::Absent => Seen::Absent,
        Seen::Unreadable(why) => Seen::Unreadable(why),
    }
}

fn swaps(tree: &Tree) -> Seen<Vec<Swap>> {
    let is_safe = |name: &str| {
        let device = name.strip_prefix("/dev/").unwrap_or_default();
        let encrypted = format!("/sys/block/{device}/dm/uuid");
        // Compressed memory may be told to write to a disk what is used least.
        let backing = format!("/sys/block/{device}/backing_dev");
        match device.starts_with("zram") {
            true => match tree.text(backing) {
                Seen::Is(file) => file == "none",
                Seen::Absent => true,
                Seen::Unreadable(_) => false,
            },
            false => matches!(tree.text(encrypted), Seen::Is(uuid) if uuid.starts_with("CRYPT-")),
        }
    };
    tree.text("/proc/swaps").map(|text| {
        let names = parse::swaps(&text).into_iter();
        names.map(|name| Swap { is_safe: is_safe(&name), name }).collect()
    })
}

fn groups(tree: &Tree, mounts: &Seen<Vec<Mount>>) -> Seen<Groups> {
    let mounts = match mounts {
        Seen::Is(mounts) => mounts,
        Seen::Absent => return Seen::Absent,
        Seen::Unreadable(why) => return Seen::Unreadable(why.clone()),
    };
    let Some(mount) = mounts.iter().find(|mount| mount.kind == "cgroup2") else { return Seen::Absent };
    tree.text(mount.point.join("cgroup.controllers")).map(|text| Groups {
        mount: mount.clone(),
        controllers: text.split_ascii_whitespace().map(str::to_owned).collect(),
    })
}

fn modules(tree: &Tree, kernel: &Seen<String>) -> BTreeMap<&'static str, Module> {
    let list = |file: &str| match kernel {
        Seen::Is(release) => match tree.text(format!("/lib/modules/{release}/{file}")) {
            Seen::Is(text) => text,
            _ => String::new(),
        },
        _ => String::new(),
    };
    let (builtin, loadable) = (list("modules.builtin"), list("modules.dep"));
    let state = |name: &str| {
        if tree.exists(format!("/sys/module/{name}")) || parse::lists_module(&builtin, name) {
            Module::Present
        } else if parse::lists_module(&loadable, name) {
            Module::Loadable
        } else {
            Module::Missing
        }
    };
    MODULES.into_iter().map(|name| (name, state(name))).collect()
}

fn changeable<'a>(tree: &Tree, paths: impl Iterator<Item = &'a Utf8Path>) -> Seen<BTreeSet<Utf8PathBuf>> {
    let mut found = BTreeSet::new();
    for path in paths {
        match tree.changeable_by_others(path) {
            Seen::Is(those) => found.extend(those),
            Seen::Absent => {}
            Seen::Unreadable(why) => return Seen::Unreadable(why),
        }
    }
    Seen::Is(found)
}

fn data(tree: &Tree, directory: &Utf8Path, mounts: &Seen<Vec<Mount>>) -> DataPlace {
    let path = tree.nearest(directory);
    let place = tree.place(&path);
    let mount = match mounts {
        Seen::Is(mounts) => parse::mount_of(mounts, &tree.real(&path)).cloned(),
        _ => None,
    };
    let room = rustix::fs::statvfs(place.as_str()).map_err(io::Error::from);
    DataPlace {
        path,
        mount,
        free_bytes: Seen::of(room.map(|room| room.f_bavail.saturating_mul(room.f_frsize))),
        shares_blocks: Seen::of(shares_blocks(&place)),
    }
}

/// Tries it with two files that have no name, and so are gone whatever happens.
fn shares_blocks(directory: &Utf8Path) -> io::Result<bool> {
    const BYTES: usize = 64 << 10;
    let unnamed = || -> io::Result<File> {
        let flag = i32::try_from(OFlags::TMPFILE.bits()).map_err(io::Error::other)?;
        OpenOptions::new().read(true).write(true).custom_flags(flag).mode(0o600).open(directory)
    };
    let (mut from, to) = (unnamed()?, unnamed()?);
    from.write_all(&vec![1; BYTES])?;
    Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
}

fn listening(tree: &Tree) -> Seen<BTreeSet<u16>> {
    let ports = |file: &str| tree.text(file).map(|text| parse::listening(&text));
    match (ports("/proc/net/tcp"), ports("/proc/net/tcp6")) {
        (Seen::Is(four), Seen::Is(six)) => Seen::Is(four.union(&six).copied().collect()),
        // A host without IPv6.
        (four, _) => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::own_filesystem::{self, Kind};

    #[test]
    fn whether_files_share_blocks_is_tried_and_leaves_nothing() {
        let xfs = |reflink| (Kind::Xfs { reflink }, 512 << 20, reflink);
        for (kind, bytes, wanted) in [(Kind::Tmpfs, 1 << 20, false), xfs(true), xfs(false)] {
            let made = own_filesystem::with(kind, bytes, |at| {
                assert_eq!(shares_blocks(at).unwrap(), wanted, "{kind:?}");
                assert_eq!(at.read_dir_utf8().unwrap().count(), 0, "{kind:?}");
            });
            made.or_say_skipped("sharing blocks between files without a name");
        }
        assert!(shares_blocks("/proc/self".into()).is_err());
    }
}
