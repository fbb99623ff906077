//! What the kernel writes, as values. All of it is pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use camino::{Utf8Path, Utf8PathBuf};

/// User ids, both ends among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The lowest.
    pub first: u32,
    /// The highest.
    pub last: u32,
}

/// The text names no range of user ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a range of user ids is FIRST-LAST, two numbers above 0, the second not below the first")]
pub struct NotARange;

impl IdRange {
    /// How many ids there are in it.
    #[must_use]
    pub fn count(self) -> u64 {
        u64::from(self.last - self.first) + 1
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl FromStr for IdRange {
    type Err = NotARange;

    fn from_str(text: &str) -> Result<Self, NotARange> {
        let (first, last) = text.split_once('-').ok_or(NotARange)?;
        let [first, last]: [u32; 2] =
            [first.parse().map_err(|_| NotARange)?, last.parse().map_err(|_| NotARange)?];
        // The last number of all means "no user" to the kernel.
        if first == 0 || last < first || last == u32::MAX { Err(NotARange) } else { Ok(Self { first, last }) }
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// The processors of a host, as `/proc/cpuinfo` tells of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Processors {
    /// The features of the first one.
    pub flags: BTreeSet<String>,
    /// The revisions of microcode that there are; more than one if some were not updated.
    pub microcode: BTreeSet<String>,
}

pub(super) fn processors(text: &str) -> Option<Processors> {
    let values = |name: &'static str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .filter(move |(key, _)| key.trim() == name)
            .map(|(_, value)| value.trim())
    };
    let flags = values("flags").next()?;
    Some(Processors {
        flags: flags.split_ascii_whitespace().map(str::to_owned).collect(),
        microcode: values("microcode").map(str::to_owned).collect(),
    })
}

/// The set of capabilities that a process has in force, from its `status`.
pub(super) fn capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// How many files a process may have open, from its `limits`: `u64::MAX` where there is no limit.
pub(super) fn open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let number = |word: &str| if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() };
    number(line.split_ascii_whitespace().next()?)
}

/// The two numbers that a release begins with.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The names of what is swapped to, without the heading.
pub(super) fn swaps(text: &str) -> Vec<String> {
    text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()).map(str::to_owned).collect()
}

/// A mount, from the list of those of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub point: Utf8PathBuf,
    /// The kind of file system.
    pub kind: String,
    /// The options of the mount, and those of the file system.
    pub options: BTreeSet<String>,
}

pub(super) fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (place, system) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(4);
        let (point, own) = (place.next()?, place.next()?);
        let mut system = system.split(' ');
        let (kind, common) = (system.next()?, system.nth(1).unwrap_or_default());
        let options = own.split(',').chain(common.split(',')).map(str::to_owned).collect();
        // The one escaped character that occurs; others only make that mount unknown.
        Some(Mount { point: point.replace("\\040", " ").into(), kind: kind.to_owned(), options })
    };
    text.lines().filter_map(mount).collect()
}

/// The mount that a path is on: the deepest, and of several at one place the last.
pub(super) fn mount_of<'a>(mounts: &'a [Mount], path: &Utf8Path) -> Option<&'a Mount> {
    let those = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    those.max_by_key(|mount| mount.point.components().count())
}

/// How a module of the kernel can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// It is there.
    Present,
    /// It can be loaded.
    Loadable,
    /// Neither.
    Missing,
}

/// Whether a list of modules, as `depmod` writes it, has one.
pub(super) fn lists_module(list: &str, name: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split('.').next().unwrap_or_default().replace('-', "_") == name
    })
}

/// The ports on which somebody listens, from a list of sockets of the kernel.
pub(super) fn listening(text: &str) -> BTreeSet<u16> {
    const LISTEN: &str = "0A";
    let port = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let local = words.next()?;
        (words.nth(1)? == LISTEN).then_some(())?;
        u16::from_str_radix(local.rsplit(':').next()?, 16).ok()
    };
    text.lines().skip(1).filter_map(port).collect()
}

/// The ids that `/etc/passwd` or `/etc/group` gives out, with their names.
pub(super) fn single_ids(text: &str) -> Vec<(String, IdRange)> {
    let id = |line: &str| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        Some((name.to_owned(), IdRange { first: id, last: id }))
    };
    text.lines().filter_map(id).collect()
}

/// The ranges that `/etc/subuid` or `/etc/subgid` gives out, with the names of whose they are.
pub(super) fn subordinate_ids(text: &str) -> Vec<(String, IdRange)> {
    let range = |line: &str| {
        let mut fields = line.split(':');
        let (name, first, count) = (fields.next()?, fields.next()?.parse::<u32>().ok()?, fields.next()?);
        let last = first.saturating_add(count.parse::<u32>().ok()?.checked_sub(1)?);
        Some((name.to_owned(), IdRange { first, last }))
    };
    text.lines().filter_map(range).collect()
}

/// The ids of this namespace of users that mean one outside of it.
pub(super) fn mapped_ids(text: &str) -> Vec<IdRange> {
    let range = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (first, count): (u32, u32) = (words.next()?.parse().ok()?, words.nth(1)?.parse().ok()?);
        Some(IdRange { first, last: first.saturating_add(count.checked_sub(1)?) })
    };
    text.lines().filter_map(range).collect()
}

/// The words of a kernel's command line, the last value of each name.
pub(super) fn words(command_line: &str) -> BTreeMap<&str, &str> {
    command_line.split_ascii_whitespace().map(|word| word.split_once('=').unwrap_or((word, ""))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ids() {
        let range: IdRange = "2000000-2032767".parse().unwrap();
        assert_eq!((range.count(), range.to_string().as_str()), (32_768, "2000000-2032767"));
        for wrong in ["", "5", "0-9", "9-5", "5-4294967295", "a-b", "-5"] {
            assert_eq!(wrong.parse::<IdRange>(), Err(NotARange), "{wrong}");
        }
        assert!(range.overlaps("2032767-2032768".parse().unwrap()));
        assert!(!range.overlaps("2032768-2032769".parse().unwrap()));
        assert_eq!(
            single_ids("root:x:0:0::/root:\nbad\n"),
            [("root".to_owned(), IdRange { first: 0, last: 0 })]
        );
        let given = subordinate_ids("ann:100000:65536\nbob:7:0\n");
        assert_eq!(given, [("ann".to_owned(), IdRange { first: 100_000, last: 165_535 })]);
        assert_eq!(
            mapped_ids("         0          0 4294967295\n"),
            [IdRange { first: 0, last: u32::MAX - 1 }]
        );
    }

    #[test]
    fn what_the_kernel_tells_of_a_process() {
        assert_eq!(capabilities("Name:\tx\nCapEff:\t00000000a80425fb\n"), Some(0xa804_25fb));
        assert_eq!(capabilities("Name:\tx\n"), None);
        let limits = "Max processes 1 1 x\nMax open files            1024                 524288               files\n";
        assert_eq!(open_files(limits), Some(1024));
        assert_eq!(open_files("Max open files unlimited unlimited files"), Some(u64::MAX));
        assert_eq!(open_files(""), None);
    }

    #[test]
    fn releases_begin_with_two_numbers() {
        assert_eq!(version("6.1.0-40-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(version("six"), None);
    }

    #[test]
    fn mounts_are_told_apart() {
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
                    30 22 0:5 / /var/my\\040data rw,nodev - xfs /dev/sdb rw\n\
                    31 22 0:6 / /var rw - ext4 /dev/sdc ro\n";
        let mounts = mounts(text);
        assert_eq!(mount_of(&mounts, "/etc".into()).unwrap().kind, "ext4");
        let data = mount_of(&mounts, "/var/my data/x".into()).unwrap();
        assert_eq!(data.kind, "xfs");
        assert!(data.options.contains("nodev"));
        assert!(mount_of(&mounts, "/var/x".into()).unwrap().options.contains("ro"));
        assert!(mount_of(&[], "/".into()).is_none());
    }

    #[test]
    fn modules_are_found_under_both_names() {
        let list =
            "kernel/drivers/md/dm-snapshot.ko.xz: kernel/drivers/md/dm-mod.ko.xz\nkernel/net/tun.ko:\n";
        assert!(lists_module(list, "dm_snapshot") && lists_module(list, "tun"));
        assert!(!lists_module(list, "dm_mod"), "only what stands first");
    }

    #[test]
    fn ports_that_are_listened_on() {
        let text = "  sl  local_address rem_address   st\n\
                    0: 0100007F:1F40 00000000:0000 0A 0\n\
                    1: 0100007F:1F41 0100007F:0050 01 0\n";
        assert_eq!(listening(text), BTreeSet::from([8000]));
    }

    #[test]
    fn processors_say_what_they_are() {
        let text = "flags\t\t: fpu svm\nmicrocode\t: 0x1\n\nflags\t\t: fpu\nmicrocode\t: 0x2\n";
        let found = processors(text).unwrap();
        assert!(found.flags.contains("svm"));
        assert_eq!(found.microcode.len(), 2);
        assert_eq!(processors("model name: x"), None);
    }

    #[test]
    fn swaps_and_words() {
        assert_eq!(swaps("Filename Type\n/dev/sda2 partition 1 0 -2\n"), ["/dev/sda2"]);
        assert!(swaps("Filename Type\n").is_empty());
        assert_eq!(words("quiet a=1 a=2")["a"], "2");
    }
}
