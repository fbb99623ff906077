//! Each check both ways: one fact of a good host is changed, and one finding changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use proptest::prelude::*;

use super::{
    super::{
        facts::{Smt, Swap, setting},
        parse::Module,
        programs::Program,
        tests::MadeUp,
    },
    *,
};
use crate::config::{DiskDriver, VmmDriver};

/// A host on which all is well.
fn good() -> Facts {
    static GOOD: LazyLock<Facts> = LazyLock::new(|| MadeUp::new().facts());
    GOOD.clone()
}

fn find(facts: &Facts, name: &str) -> Finding {
    all(facts).into_iter().find(|finding| finding.name == name).unwrap()
}

/// Changes one fact, and expects that check, and no other, to come out so.
#[track_caller]
fn expect(name: &str, wanted: Outcome, change: impl FnOnce(&mut Facts)) -> Finding {
    let mut facts = good();
    assert_eq!(find(&facts, name).outcome, Outcome::Ok);
    change(&mut facts);
    for finding in all(&facts) {
        let wanted = if finding.name == name { wanted } else { Outcome::Ok };
        assert_eq!(finding.outcome, wanted, "{finding:?}");
    }
    let finding = find(&facts, name);
    assert_eq!(finding.remedy.is_some(), wanted != Outcome::Ok, "{finding:?}");
    finding
}

/// What a check says that expects to know something and does not.
fn unreadable<T>() -> Seen<T> {
    Seen::Unreadable("not permitted".to_owned())
}

fn flags(facts: &mut Facts, change: impl FnOnce(&mut BTreeSet<String>)) {
    let Seen::Is(processors) = &mut facts.processors else { panic!() };
    change(&mut processors.flags);
}

fn said_of(text: &str) -> Seen<BTreeMap<String, String>> {
    Seen::Is(BTreeMap::from([("some".to_owned(), text.to_owned())]))
}

fn answers(said: &str) -> Program {
    Program::Answers { path: "/opt/program".into(), said: said.to_owned() }
}

#[test]
fn names_are_of_one_check_each_and_of_one_form() {
    let names: BTreeSet<_> = CHECKS.iter().map(|check| check.name).collect();
    assert_eq!(names.len(), CHECKS.len());
    for name in names {
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{name}");
        let page = include_str!("../mod.rs");
        assert!(page.contains(&format!("`{name}`")), "the page does not name {name}");
    }
}

#[test]
fn what_is_not_known_blocks_where_it_is_required() {
    let mut facts = good();
    facts.smt = unreadable();
    facts.error_correcting = unreadable();
    let (smt, errors) = (find(&facts, "smt"), find(&facts, "memory-errors"));
    assert_eq!((smt.outcome, smt.blocks), (Outcome::Unknown, true));
    assert_eq!((errors.outcome, errors.blocks), (Outcome::Unknown, false));
    assert!(smt.seen.contains("not permitted"));
}

#[test]
fn rights() {
    let found =
        expect("privileges", Outcome::Failure, |facts| facts.capabilities = Seen::Is(!(1 << 27 | 1 << 21)));
    assert_eq!(found.seen, "without CAP_SYS_ADMIN, CAP_MKNOD");
    expect("privileges", Outcome::Unknown, |facts| facts.capabilities = unreadable());
    // Without the right to look, nothing is known of the rules.
    let mut facts = good();
    facts.nft = Program::Fails { path: "/usr/sbin/nft".into(), problem: "not permitted".to_owned() };
    assert_eq!(find(&facts, "nftables").outcome, Outcome::Failure);
    facts.capabilities = Seen::Is(0);
    let found = find(&facts, "nftables");
    assert_eq!((found.outcome, found.blocks), (Outcome::Unknown, true));
    expect("nftables", Outcome::Failure, |facts| facts.nft = Program::Missing);
}

#[test]
fn virtualization() {
    expect("kvm", Outcome::Failure, |facts| facts.kvm = unreadable());
    let found = expect("kvm", Outcome::Failure, |facts| facts.kvm = Seen::Absent);
    assert_eq!(found.fixes, [Fix::Load("kvm_amd")]);
    let found = expect("kvm", Outcome::Failure, |facts| {
        facts.kvm = Seen::Absent;
        facts.modules.insert("kvm_amd", Module::Missing);
    });
    assert_eq!(found.fixes, []);
    let found = expect("kvm", Outcome::Failure, |facts| {
        facts.kvm = Seen::Absent;
        flags(facts, |flags| flags.retain(|flag| flag != "svm"));
    });
    assert!(found.seen.contains("shows no virtualization"));
    let mut facts = good();
    flags(&mut facts, |flags| flags.extend(["hypervisor".to_owned()]));
    for name in ["bare-metal", "microcode"] {
        assert_eq!(find(&facts, name).outcome, Outcome::Advice, "{name}");
    }
}

#[test]
fn microcode_is_the_newest_as_far_as_the_kernel_knows() {
    expect("microcode", Outcome::Failure, |facts| {
        facts.vulnerabilities =
            Seen::Is(BTreeMap::from([("old_microcode".to_owned(), "Vulnerable".to_owned())])).map(
                |mut said| {
                    said.insert("other".to_owned(), "Not affected".to_owned());
                    said
                },
            );
    });
    let revision = |facts: &mut Facts, change: fn(&mut BTreeSet<String>)| {
        let Seen::Is(processors) = &mut facts.processors else { panic!() };
        change(&mut processors.microcode);
    };
    expect("microcode", Outcome::Failure, |facts| {
        revision(facts, |revisions| revisions.extend(["0x1".to_owned()]));
    });
    expect("microcode", Outcome::Unknown, |facts| revision(facts, BTreeSet::clear));
}

#[test]
fn what_the_kernel_says_of_weaknesses() {
    for (text, wanted) in [
        ("Not affected", Outcome::Ok),
        ("Mitigation: PTI", Outcome::Ok),
        ("Mitigation: Clear CPU buffers; SMT vulnerable", Outcome::Ok),
        ("Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT vulnerable", Outcome::Ok),
        ("Mitigation: PTE Inversion; VMX: SMT vulnerable", Outcome::Ok),
        ("KVM: Mitigation: Split huge pages", Outcome::Ok),
        ("Vulnerable", Outcome::Failure),
        ("KVM: Vulnerable", Outcome::Failure),
        ("Mitigation: PTE Inversion; VMX: vulnerable", Outcome::Failure),
        ("Mitigation: Retpolines; IBPB: conditional; BHI: Vulnerable", Outcome::Failure),
        ("Vulnerable: Safe RET", Outcome::Failure),
        ("Vulnerable; SMT vulnerable", Outcome::Failure),
        ("Vulnerable: SMT something", Outcome::Failure),
        ("Unknown: No mitigations", Outcome::Failure),
        ("Unknown: Dependent on hypervisor status", Outcome::Unknown),
    ] {
        expect("vulnerabilities", wanted, |facts| facts.vulnerabilities = said_of(text));
    }
    expect("vulnerabilities", Outcome::Unknown, |facts| facts.vulnerabilities = Seen::Absent);
    expect("vulnerabilities", Outcome::Unknown, |facts| facts.vulnerabilities = Seen::Is(BTreeMap::new()));
}

#[test]
fn what_the_kernel_was_started_with() {
    for (line, wanted) in [
        ("quiet nosmt mitigations=auto,nosmt", Outcome::Ok),
        ("mds=full,nosmt l1tf=full,force init=/off", Outcome::Ok),
        ("mitigations=off", Outcome::Failure),
        ("mitigations=auto,no_guest_host", Outcome::Failure),
        ("mitigations=auto,no_user_kernel,no_guest_guest", Outcome::Failure),
        ("nopti", Outcome::Failure),
        ("mds=off", Outcome::Failure),
        ("kvm_intel.vmentry_l1d_flush=never", Outcome::Failure),
        ("spec_rstack_overflow=off", Outcome::Failure),
    ] {
        expect("mitigations", wanted, |facts| facts.command_line = Seen::Is(line.to_owned()));
    }
    expect("mitigations", Outcome::Unknown, |facts| facts.command_line = Seen::Absent);
}

#[test]
fn threads_of_a_core() {
    let smt = |control: &str, is_active| Seen::Is(Smt { control: control.to_owned(), is_active });
    expect("smt", Outcome::Ok, |facts| facts.smt = smt("notsupported", false));
    expect("smt", Outcome::Failure, |facts| facts.smt = smt("on", true));
    expect("smt", Outcome::Unknown, |facts| facts.smt = Seen::Absent);
    expect("smt", Outcome::Unknown, |facts| {
        facts.vulnerabilities = said_of("Mitigation: Clear CPU buffers; SMT Host state unknown");
    });
}

#[test]
fn memory_of_guests() {
    expect("ksm", Outcome::Ok, |facts| facts.ksm = Seen::Absent);
    expect("ksm", Outcome::Ok, |facts| facts.ksm = Seen::Is(2));
    let found = expect("ksm", Outcome::Failure, |facts| facts.ksm = Seen::Is(1));
    assert_eq!(found.fixes, [Fix::Set { path: "/sys/kernel/mm/ksm/run", value: "2" }]);
    expect("ksm", Outcome::Unknown, |facts| facts.ksm = unreadable());
    let swap = |is_safe| Swap { name: "/dev/sda2".to_owned(), is_safe };
    expect("swap", Outcome::Ok, |facts| facts.swaps = Seen::Is(vec![swap(true)]));
    let found =
        expect("swap", Outcome::Failure, |facts| facts.swaps = Seen::Is(vec![swap(true), swap(false)]));
    assert_eq!(found.fixes, [], "what is swapped may not fit into memory");
    expect("swap", Outcome::Unknown, |facts| facts.swaps = unreadable());
    expect("memory-errors", Outcome::Advice, |facts| facts.error_correcting = Seen::Is(0));
    expect("memory-errors", Outcome::Unknown, |facts| facts.error_correcting = Seen::Absent);
}

#[test]
fn kernels_and_clocks() {
    let release = |text: &str| Seen::Is(text.to_owned());
    for (text, wanted) in [
        ("5.10.0-30-amd64", Outcome::Ok),
        ("6.18.4", Outcome::Ok),
        ("6.12.0", Outcome::Advice),
        ("5.4.0-generic", Outcome::Failure),
        ("4.19.0", Outcome::Failure),
        ("plan9", Outcome::Unknown),
    ] {
        expect("kernel", wanted, |facts| facts.kernel = release(text));
    }
    for (text, wanted) in [("tsc", Outcome::Ok), ("kvm-clock", Outcome::Advice), ("hpet", Outcome::Failure)] {
        expect("clock-source", wanted, |facts| facts.clock_source = release(text));
    }
    expect("kvm-timer", Outcome::Advice, |facts| facts.kvm_timer_period = Seen::Is(200));
    expect("kvm-timer", Outcome::Unknown, |facts| facts.kvm_timer_period = Seen::Absent);
    expect("console", Outcome::Advice, |facts| facts.console_level = Seen::Is(7));
}

#[test]
fn how_long_a_new_machine_waits() {
    let plain = |facts: &mut Facts| {
        let Seen::Is(groups) = &mut facts.groups else { panic!() };
        groups.mount.options.remove("favordynmods");
    };
    let found = expect("machine-creation", Outcome::Advice, plain);
    assert!(found.remedy.unwrap().contains("favordynmods"));
    let found = expect("machine-creation", Outcome::Advice, |facts| {
        plain(facts);
        let said = BTreeMap::from([("itlb_multihit".to_owned(), "Not affected".to_owned())]);
        facts.vulnerabilities = Seen::Is(said);
    });
    assert!(found.remedy.unwrap().contains("nx_huge_pages=never"));
    expect("machine-creation", Outcome::Ok, |facts| {
        plain(facts);
        facts.kvm_nx_huge_pages = Seen::Is("never".to_owned());
    });
    expect("machine-creation", Outcome::Ok, |facts| {
        plain(facts);
        facts.kernel = Seen::Is("5.10.0".to_owned());
    });
}

#[test]
fn control_groups() {
    expect("cgroups", Outcome::Failure, |facts| {
        // So that what depends on their mount does not come out otherwise.
        facts.kvm_nx_huge_pages = Seen::Is("never".to_owned());
        facts.groups = Seen::Absent;
    });
    let change = |facts: &mut Facts, change: fn(&mut super::super::facts::Groups)| {
        let Seen::Is(groups) = &mut facts.groups else { panic!() };
        change(groups);
    };
    let found = expect("cgroups", Outcome::Failure, |facts| {
        change(facts, |groups| groups.controllers.retain(|name| name != "io" && name != "memory"));
    });
    assert_eq!(found.seen, "/sys/fs/cgroup limits no io, no memory");
    expect("cgroups", Outcome::Failure, |facts| {
        change(facts, |groups| groups.mount.options.extend(["ro".to_owned()]));
    });
}

#[test]
fn firecracker_and_its_jailer_are_of_one_release() {
    expect("vmm", Outcome::Failure, |facts| facts.target.vmm = VmmDriver::Qemu);
    expect("confinement", Outcome::Failure, |facts| facts.target.is_confined = false);
    expect("jailer", Outcome::Failure, |facts| facts.jailer = Program::Missing);
    let found = expect("jailer", Outcome::Failure, |facts| facts.jailer = answers("Jailer v1.15.0\n"));
    assert_eq!(found.seen, "/opt/program is jailer 1.15.0, and Firecracker is 1.16.1");
    expect("jailer", Outcome::Failure, |facts| facts.jailer = answers("Firecracker v1.16.1\n"));
    let both = |firecracker: Program, jailer: &str| {
        let mut facts = good();
        (facts.firecracker, facts.jailer) = (firecracker, answers(jailer));
        (find(&facts, "vmm").outcome, find(&facts, "jailer").outcome)
    };
    let (ok, failure) = (Outcome::Ok, Outcome::Failure);
    assert_eq!(both(answers("Firecracker v1.17.0-dev\n\nlog\n"), "Jailer v1.17.0-dev\n"), (ok, ok));
    assert_eq!(both(answers("Firecracker v1.13.0\n"), "Jailer v1.13.0\n"), (failure, ok));
    assert_eq!(both(answers("QEMU emulator version 7.2\n"), "Jailer v1.13.0\n"), (failure, failure));
    assert_eq!(both(Program::Missing, "Jailer v1.16.1\n"), (failure, failure));
    let fails = Program::Fails { path: "/bin/false".into(), problem: "it failed".to_owned() };
    assert_eq!(both(fails, "Jailer v1.16.1\n"), (failure, failure));
}

#[test]
fn users_and_paths() {
    let range = |text: &str| text.parse().unwrap();
    let found = expect("uids", Outcome::Failure, |facts| facts.target.uids = range("2000000-2000099"));
    assert!(found.seen.contains("are 100 ids"), "{found:?}");
    let found = expect("uids", Outcome::Failure, |facts| facts.target.uids = range("150000-200000"));
    assert!(found.seen.contains("ann in /etc/subuid"), "{found:?}");
    expect("uids", Outcome::Failure, |facts| facts.mapped_ids = Seen::Is(vec![range("1-65536")]));
    expect("uids", Outcome::Unknown, |facts| facts.mapped_ids = unreadable());
    let found = expect("paths", Outcome::Failure, |facts| {
        facts.changeable = Seen::Is(BTreeSet::from(["/data".into()]));
    });
    assert!(found.seen.ends_with("/data"));
    expect("paths", Outcome::Unknown, |facts| facts.changeable = unreadable());
}

#[test]
fn devices() {
    let found = expect("tun", Outcome::Failure, |facts| facts.tun = Seen::Absent);
    assert_eq!(found.fixes, [Fix::Load("tun")]);
    expect("tun", Outcome::Failure, |facts| facts.tun = unreadable());
    let found = expect("device-mapper", Outcome::Advice, |facts| {
        facts.device_mapper = Seen::Absent;
        facts.modules.insert("dm_snapshot", Module::Loadable);
    });
    assert_eq!(found.seen, "without /dev/mapper/control, dm_snapshot");
    assert_eq!(found.fixes, [Fix::Load("dm_snapshot")]);
    expect("device-mapper", Outcome::Advice, |facts| facts.loop_control = unreadable());
    for (disks, outcome) in [(DiskDriver::File, Outcome::Advice), (DiskDriver::DmSnapshot, Outcome::Failure)]
    {
        let found = expect("device-mapper", outcome, |facts| {
            facts.target.disks = Some(disks);
            facts.loop_control = Seen::Absent;
        });
        assert_eq!(found.blocks, outcome == Outcome::Failure);
    }
}

#[test]
fn the_disk_of_the_data() {
    for kind in ["tmpfs", "ramfs"] {
        expect("data-disk", Outcome::Failure, |facts| {
            facts.data.mount.as_mut().unwrap().kind = kind.to_owned();
        });
    }
    for (option, outcome) in [("nodev", Outcome::Ok), ("noexec", Outcome::Ok), ("ro", Outcome::Failure)] {
        expect("data-disk", outcome, |facts| {
            facts.data.mount.as_mut().unwrap().options.insert(option.to_owned());
        });
    }
    expect("data-disk", Outcome::Failure, |facts| facts.data.free_bytes = Seen::Is(9 << 30));
    expect("data-disk", Outcome::Unknown, |facts| facts.data.mount = None);
    expect("reflink", Outcome::Advice, |facts| facts.data.shares_blocks = Seen::Is(false));
    expect("reflink", Outcome::Unknown, |facts| facts.data.shares_blocks = unreadable());
}

#[test]
fn limits_and_settings() {
    expect("open-files", Outcome::Advice, |facts| facts.open_files = Seen::Is(1024));
    let found = expect("open-files", Outcome::Ok, |facts| facts.open_files = Seen::Is(u64::MAX));
    assert_eq!(found.seen, "any number of open files");
    let set = |path, value| move |facts: &mut Facts| drop(facts.settings.insert(path, value));
    let found = expect("kernel-limits", Outcome::Advice, |facts| {
        set(setting::PROCESSES, Seen::Is(32_768))(facts);
        set(setting::WATCHERS, Seen::Is(128))(facts);
    });
    assert_eq!(found.seen, "kernel.pid_max = 32768, fs.inotify.max_user_instances = 128");
    assert_eq!(found.fixes.len(), 2);
    expect("kernel-limits", Outcome::Unknown, set(setting::MAPPINGS, Seen::Absent));
    let found = expect("forwarding", Outcome::Advice, set(setting::FORWARD, Seen::Is(0)));
    assert_eq!(found.fixes, [Fix::Set { path: setting::FORWARD, value: "1" }]);
    expect("connections", Outcome::Advice, set(setting::CONNECTIONS, Seen::Is(65_536)));
    let found = expect("connections", Outcome::Unknown, |facts| {
        set(setting::CONNECTIONS, Seen::Absent)(facts);
        facts.modules.insert("nf_conntrack", Module::Loadable);
    });
    assert_eq!(found.fixes, [Fix::Load("nf_conntrack")]);
    expect("ports", Outcome::Advice, |facts| facts.listening = Seen::Is(BTreeSet::from([8000])));
    expect("ports", Outcome::Ok, |facts| facts.target.ports.clear());
    expect("ports", Outcome::Unknown, |facts| facts.listening = unreadable());
}

proptest! {
    /// What no check understands is never taken for good where it is required, and nothing panics.
    #[test]
    fn nothing_that_the_kernel_may_say_is_taken_for_protection(text in "\\PC{0,60}") {
        let mut facts = good();
        facts.vulnerabilities = said_of(&format!("Vulnerable: {text}"));
        facts.command_line = Seen::Is(format!("{text} mitigations=off"));
        facts.clock_source = Seen::Is(format!("x{text}"));
        facts.firecracker = answers(&text);
        facts.jailer = answers(&text);
        for name in ["vulnerabilities", "mitigations", "clock-source", "vmm", "jailer"] {
            prop_assert!(find(&facts, name).blocks, "{name}: {text:?}");
        }
    }
}
