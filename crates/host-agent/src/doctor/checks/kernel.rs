//! The kernel: its version, its clock, its control groups, and how it runs machines.

use super::{
    super::{Facts, parse, tree::Seen},
    Verdict, if_known,
};

/// The series that Firecracker is tested on (its kernel policy); before the first, it does not run.
const TESTED: [(u32, u32); 3] = [(5, 10), (6, 1), (6, 18)];
/// What limits machines.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];
/// What the kernel has when nobody says, in microseconds.
const USUAL_TIMER_PERIOD: u64 = 200;

pub(super) fn kernel(facts: &Facts) -> Verdict {
    const REMEDY: &str = "boot a kernel of series 6.1 or 6.18 with the security updates of the distribution";
    if_known(&facts.kernel, "its release", "mount /proc", |release| match parse::version(release) {
        None => Verdict::unknown(format!("{release:?} is no release that is known"), REMEDY),
        Some(version) if version < TESTED[0] => {
            Verdict::failure(format!("{release} is older than all that Firecracker runs on"), REMEDY)
        }
        Some(version) if TESTED.contains(&version) => {
            Verdict::ok(format!("{release}, a series that Firecracker is tested on"))
        }
        Some(_) => Verdict::advice(format!("Firecracker is not tested on {release}"), REMEDY),
    })
}

pub(super) fn clock_source(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "look in the kernel's messages for why it does not trust the TSC (firmware, `tsc=`, `clocksource=`)";
    if_known(&facts.clock_source, "what it takes the time from", REMEDY, |source| match source.as_str() {
        "tsc" => Verdict::ok("tsc"),
        "kvm-clock" | "hyperv_clocksource_tsc_page" | "xen" => {
            Verdict::advice(format!("{source}, which the hypervisor around keeps"), REMEDY)
        }
        _ => Verdict::failure(
            format!("{source}: the TSC, from which guests have their time, is not to be trusted here"),
            REMEDY,
        ),
    })
}

pub(super) fn kvm_timer(facts: &Facts) -> Verdict {
    const REMEDY: &str = "where guests may load the host with timers: `options kvm min_timer_period_us=500` (or what your \
                          workloads bear) in /etc/modprobe.d/kvm.conf";
    if_known(&facts.kvm_timer_period, "KVM's shortest timer", REMEDY, |period| {
        let seen = format!("the shortest period of a guest's timer is {period} µs");
        if *period > USUAL_TIMER_PERIOD { Verdict::ok(seen) } else { Verdict::advice(seen, REMEDY) }
    })
}

pub(super) fn machine_creation(facts: &Facts) -> Verdict {
    let is_slow = matches!(&facts.kernel, Seen::Is(release) if parse::version(release) >= Some((6, 0)));
    if !is_slow {
        return Verdict::ok("this kernel makes machines without waiting for all processors");
    }
    let favours = matches!(&facts.groups, Seen::Is(groups) if groups.mount.options.contains("favordynmods"));
    if favours {
        return Verdict::ok("control groups are mounted with favordynmods");
    }
    if facts.kvm_nx_huge_pages == Seen::Is("never".to_owned()) {
        return Verdict::ok("KVM's nx_huge_pages is never");
    }
    let unaffected = matches!(&facts.vulnerabilities, Seen::Is(said)
        if said.get("itlb_multihit").is_some_and(|text| text == "Not affected"));
    let remedy = if unaffected {
        "`options kvm nx_huge_pages=never` in /etc/modprobe.d/kvm.conf (this processor does not need it)"
    } else {
        "mount -o remount,favordynmods /sys/fs/cgroup, for all that is on this host"
    };
    Verdict::advice("since Linux 6.0, each new machine waits for all processors", remedy)
}

pub(super) fn console(facts: &Facts) -> Verdict {
    const REMEDY: &str = "boot with `quiet loglevel=1`: each machine makes the kernel say something, and a serial console is \
                          slow";
    if_known(&facts.console_level, "what it writes to the console", REMEDY, |level| match level {
        0 | 1 => Verdict::ok("the kernel writes next to nothing to its console"),
        level => {
            Verdict::advice(format!("the kernel writes messages up to level {level} to its console"), REMEDY)
        }
    })
}

pub(super) fn cgroups(facts: &Facts) -> Verdict {
    const REMEDY: &str = "boot with `systemd.unified_cgroup_hierarchy=1`, without controllers of version 1, and let a \
                          container write /sys/fs/cgroup";
    match &facts.groups {
        Seen::Absent => Verdict::failure("no control groups of version 2 are mounted", REMEDY),
        Seen::Unreadable(why) => Verdict::unknown(format!("control groups cannot be read: {why}"), REMEDY),
        Seen::Is(groups) => {
            let place = &groups.mount.point;
            let missing: Vec<_> =
                CONTROLLERS.into_iter().filter(|name| !groups.controllers.contains(*name)).collect();
            if !missing.is_empty() {
                return Verdict::failure(format!("{place} limits no {}", missing.join(", no ")), REMEDY);
            }
            match groups.mount.options.contains("ro") {
                true => Verdict::failure(format!("{place} cannot be written"), REMEDY),
                false => Verdict::ok(format!("{place} limits {}", CONTROLLERS.join(", "))),
            }
        }
    }
}
