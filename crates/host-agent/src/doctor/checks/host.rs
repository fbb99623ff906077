//! Rights, users, paths, devices, disk, limits and network.

use super::{
    super::{DiskDriver, Facts, Fix, Outcome, facts::setting, parse::Module, tree::Seen},
    Verdict, if_known,
};

/// Capabilities, by their numbers in the kernel.
pub(super) const NET_ADMIN: u64 = 1 << 12;
const CAPABILITIES: [(&str, u64); 8] = [
    ("CAP_CHOWN", 1),
    ("CAP_KILL", 1 << 5),
    ("CAP_SETGID", 1 << 6),
    ("CAP_SETUID", 1 << 7),
    ("CAP_NET_ADMIN", NET_ADMIN),
    ("CAP_SYS_CHROOT", 1 << 18),
    ("CAP_SYS_ADMIN", 1 << 21),
    ("CAP_MKNOD", 1 << 27),
];
/// What a stack needs at least, beside what sandboxes write.
const LEAST_ROOM: u64 = 10 << 30;
/// File systems without a disk.
const IN_MEMORY: [&str; 3] = ["tmpfs", "ramfs", "rootfs"];
/// For some hundreds of sandboxes.
const OPEN_FILES: u64 = 65_536;

pub(super) fn privileges(facts: &Facts) -> Verdict {
    if_known(&facts.capabilities, "its capabilities", "mount /proc", |held| {
        let missing: Vec<_> =
            CAPABILITIES.iter().filter(|(_, bit)| held & bit == 0).map(|(name, _)| *name).collect();
        match missing.is_empty() {
            true => Verdict::ok("all capabilities that machines are made with"),
            false => Verdict::failure(
                format!("without {}", missing.join(", ")),
                "run as root, outside of a container or in one with these",
            ),
        }
    })
}

pub(super) fn uids(facts: &Facts) -> Verdict {
    let range = facts.target.uids;
    let remedy = format!(
        "choose a range of {} ids that is nobody's (--uids FIRST-LAST), and give out nothing of it in /etc/subuid and /etc/subgid",
        facts.target.machines
    );
    if range.count() < facts.target.machines {
        let seen =
            format!("{range} are {} ids, and there may be {} machines", range.count(), facts.target.machines);
        return Verdict::failure(seen, remedy);
    }
    let taken: Vec<_> = facts
        .given_ids
        .iter()
        .filter(|(_, given)| given.overlaps(range))
        .map(|(name, _)| name.as_str())
        .collect();
    if !taken.is_empty() {
        return Verdict::failure(format!("some of {range} belong to {}", taken.join(", ")), remedy);
    }
    if_known(&facts.mapped_ids, "which user ids there are", "mount /proc", |mapped| {
        match mapped.iter().any(|known| known.first <= range.first && range.last <= known.last) {
            true => Verdict::ok(format!("{range} are nobody's")),
            false => Verdict::failure(format!("{range} mean nobody in this namespace of users"), remedy),
        }
    })
}

pub(super) fn paths(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "have the data, Firecracker and its jailer below directories that only root can write, and own";
    if_known(&facts.changeable, "who may change the paths", REMEDY, |changeable| {
        let those: Vec<_> = changeable.iter().map(|path| path.as_str()).collect();
        match those.is_empty() {
            true => Verdict::ok(
                "only root can change the data, the programs, the namespaces, and what is above them",
            ),
            false => Verdict::failure(format!("others than root can change {}", those.join(", ")), REMEDY),
        }
    })
}

fn loadable(facts: &Facts, modules: &[&'static str]) -> Vec<Fix> {
    let can = |module: &&&'static str| facts.modules.get(**module) == Some(&Module::Loadable);
    modules.iter().filter(can).map(|module| Fix::Load(module)).collect()
}

pub(super) fn tun(facts: &Facts) -> Verdict {
    const REMEDY: &str = "modprobe tun, and let a container have /dev/net/tun";
    match &facts.tun {
        Seen::Is(()) => Verdict::ok("/dev/net/tun can be used"),
        Seen::Absent => {
            Verdict::failure("there is no /dev/net/tun", REMEDY).fixed_by(loadable(facts, &["tun"]))
        }
        Seen::Unreadable(why) => Verdict::failure(format!("/dev/net/tun cannot be opened: {why}"), REMEDY),
    }
}

pub(super) fn device_mapper(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "modprobe -a dm_snapshot loop; a container needs /dev/mapper/control and /dev/loop-control";
    let devices = [("/dev/mapper/control", &facts.device_mapper), ("/dev/loop-control", &facts.loop_control)];
    let mut missing: Vec<_> =
        devices.into_iter().filter(|(_, seen)| **seen != Seen::Is(())).map(|(name, _)| name).collect();
    if facts.modules.get("dm_snapshot") != Some(&Module::Present) {
        missing.push("dm_snapshot");
    }
    if missing.is_empty() {
        return Verdict::ok("dm-snapshot and loop devices can be used");
    }
    let seen = format!("without {}", missing.join(", "));
    let verdict = match facts.target.disks {
        Some(DiskDriver::DmSnapshot) => Verdict::failure(seen, REMEDY),
        // No root disk needs them.
        None | Some(DiskDriver::File | DiskDriver::Qcow2) => Verdict::advice(seen, REMEDY),
    };
    verdict.fixed_by(loadable(facts, &["dm_snapshot", "loop"]))
}

pub(super) fn data_disk(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "put the data (--data-dir) on a disk of its own, XFS with reflink or Btrfs, that can be written";
    let data = &facts.data;
    let place = &data.path;
    let Some(mount) = &data.mount else {
        return Verdict::unknown(format!("it is not known what {place} is on"), REMEDY);
    };
    if IN_MEMORY.contains(&mount.kind.as_str()) {
        return Verdict::failure(format!("{place} is on {}, in memory", mount.kind), REMEDY);
    }
    // Programs and devices of jails are elsewhere: it may well be mounted with nodev and noexec.
    if mount.options.contains("ro") {
        return Verdict::failure(format!("{place} can only be read"), REMEDY);
    }
    if_known(&data.free_bytes, "how much room there is", REMEDY, |free| {
        let seen = format!("{place} is on {}, with {} GiB free", mount.kind, free >> 30);
        if *free < LEAST_ROOM { Verdict::failure(seen, REMEDY) } else { Verdict::ok(seen) }
    })
}

pub(super) fn reflink(facts: &Facts) -> Verdict {
    const REMEDY: &str = "use XFS with reflink=1 (the default of mkfs.xfs), or Btrfs";
    let place = &facts.data.path;
    match &facts.data.shares_blocks {
        Seen::Is(true) => Verdict::ok(format!("files in {place} share blocks")),
        Seen::Is(false) => Verdict::advice(
            format!(
                "files in {place} share no blocks: each disk of a sandbox, and each snapshot of one, is a copy that is waited for"
            ),
            REMEDY,
        ),
        Seen::Absent => Verdict::unknown(format!("{place} is gone"), REMEDY),
        Seen::Unreadable(why) => Verdict::unknown(format!("it could not be tried in {place}: {why}"), REMEDY),
    }
}

pub(super) fn open_files(facts: &Facts) -> Verdict {
    const REMEDY: &str = "LimitNOFILE=1048576 in the unit of the agent, or ulimit -n";
    if_known(&facts.open_files, "how many files may be open", REMEDY, |most| {
        let seen = match *most {
            u64::MAX => "any number of open files".to_owned(),
            most => format!("{most} open files for what is started from here"),
        };
        if *most < OPEN_FILES { Verdict::advice(seen, REMEDY) } else { Verdict::ok(seen) }
    })
}

/// A setting that should not be below a value.
fn at_least(facts: &Facts, path: &'static str, least: &'static str) -> Result<String, Verdict> {
    let name = path.strip_prefix("/proc/sys/").unwrap_or(path).replace('/', ".");
    let wanted: u64 = least.parse().unwrap_or(u64::MAX);
    let remedy = format!("{name} = {least} in /etc/sysctl.d/wrenn.conf");
    match facts.settings.get(path) {
        Some(Seen::Is(value)) if *value >= wanted => Ok(format!("{name} = {value}")),
        Some(Seen::Is(value)) => {
            Err(Verdict::advice(format!("{name} = {value}"), remedy)
                .fixed_by([Fix::Set { path, value: least }]))
        }
        Some(Seen::Unreadable(why)) => Err(Verdict::unknown(format!("{name}: {why}"), remedy)),
        Some(Seen::Absent) | None => Err(Verdict::unknown(format!("there is no {name}"), remedy)),
    }
}

pub(super) fn kernel_limits(facts: &Facts) -> Verdict {
    // Each machine is a process with some threads, is watched for its sockets, and maps many pieces of memory.
    let wanted = [
        (setting::PROCESSES, "131072"),
        (setting::THREADS, "65536"),
        (setting::FILES, "1048576"),
        (setting::WATCHERS, "1024"),
        (setting::MAPPINGS, "65530"),
    ];
    let found: Vec<_> = wanted.into_iter().map(|(path, least)| at_least(facts, path, least)).collect();
    let wrong: Vec<_> = found.iter().filter_map(|one| one.as_ref().err()).collect();
    if wrong.is_empty() {
        return Verdict::ok(found.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
    let outcome = if wrong.iter().any(|verdict| verdict.outcome == Outcome::Advice) {
        Outcome::Advice
    } else {
        Outcome::Unknown
    };
    let all =
        |text: fn(&Verdict) -> &str| wrong.iter().map(|verdict| text(verdict)).collect::<Vec<_>>().join(", ");
    let (seen, remedy) =
        (all(|verdict| &verdict.seen), all(|verdict| verdict.remedy.as_deref().unwrap_or_default()));
    Verdict::bad(outcome, seen, remedy).fixed_by(wrong.iter().flat_map(|verdict| verdict.fixes.clone()))
}

pub(super) fn forwarding(facts: &Facts) -> Verdict {
    // The agent turns it on by itself; somebody who turns it off again takes the network from all sandboxes.
    at_least(facts, setting::FORWARD, "1").map_or_else(|verdict| verdict, Verdict::ok)
}

pub(super) fn connections(facts: &Facts) -> Verdict {
    at_least(facts, setting::CONNECTIONS, "262144").map_or_else(
        |verdict| match verdict.outcome {
            Outcome::Unknown => verdict.fixed_by(loadable(facts, &["nf_conntrack"])),
            _ => verdict,
        },
        Verdict::ok,
    )
}

pub(super) fn ports(facts: &Facts) -> Verdict {
    if_known(&facts.listening, "which ports are taken", "mount /proc", |listening| {
        let wanted = &facts.target.ports;
        let taken: Vec<_> =
            wanted.iter().filter(|port| listening.contains(port)).map(u16::to_string).collect();
        match (taken.is_empty(), wanted.is_empty()) {
            (true, true) => Verdict::ok("none is wanted"),
            (true, false) => {
                let wanted: Vec<_> = wanted.iter().map(u16::to_string).collect();
                Verdict::ok(format!("free: {}", wanted.join(", ")))
            }
            (false, _) => Verdict::advice(
                format!("somebody listens on {}", taken.join(", ")),
                "unless that is this stack, choose another (--listen, --metrics)",
            ),
        }
    })
}
