//! Made-up hosts, from their files to the report.

use std::fs;

use camino::{Utf8Path, Utf8PathBuf};

use super::{facts::Asked, programs::Program, tree::Seen, *};
use crate::{Agent, StartError};

/// A directory that is the tree of a host on which production may start.
pub(super) struct MadeUp {
    place: tempfile::TempDir,
}

const MIDDLE_OF_CPUINFO: &str = "flags\t\t: fpu svm aes\nmicrocode\t: 0xa101154\n";

impl MadeUp {
    pub(super) fn new() -> Self {
        let host = Self { place: tempfile::tempdir().unwrap() };
        let cpu = "/sys/devices/system/cpu";
        for (path, text) in [
            ("/proc/self/status", "Name:\twrenn\nCapEff:\t000001ffffffffff\n"),
            ("/proc/self/uid_map", "         0          0 4294967295\n"),
            (
                "/proc/self/limits",
                "Limit Soft Hard Units\nMax open files            1048576              1048576              files\n",
            ),
            (
                "/proc/self/mountinfo",
                "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
                 23 22 0:29 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,favordynmods\n\
                 24 22 8:2 / /data rw,relatime - xfs /dev/sdb rw\n",
            ),
            ("/proc/sys/kernel/osrelease", "6.1.0-40-amd64\n"),
            ("/proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet loglevel=1 nosmt\n"),
            ("/proc/sys/kernel/printk", "1\t4\t1\t7\n"),
            ("/proc/cpuinfo", MIDDLE_OF_CPUINFO),
            ("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n"),
            ("/proc/net/tcp", "  sl  local_address\n   0: 0100007F:0016 00000000:0000 0A 0\n"),
            ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("/etc/subuid", "ann:100000:65536\n"),
            ("/proc/sys/net/ipv4/ip_forward", "1\n"),
            ("/proc/sys/net/netfilter/nf_conntrack_max", "1048576\n"),
            ("/proc/sys/kernel/pid_max", "4194304\n"),
            ("/proc/sys/kernel/threads-max", "255000\n"),
            ("/proc/sys/fs/file-max", "9223372036854775807\n"),
            ("/proc/sys/fs/inotify/max_user_instances", "8192\n"),
            ("/proc/sys/vm/max_map_count", "65530\n"),
            ("/sys/kernel/mm/ksm/run", "0\n"),
            ("/sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
            ("/sys/devices/system/edac/mc/mc0/mc_name", "F19h\n"),
            ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n"),
            ("/sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
            ("/sys/module/kvm/parameters/min_timer_period_us", "500\n"),
            ("/sys/module/dm_snapshot/refcnt", "0\n"),
            (&format!("{cpu}/smt/control"), "off\n"),
            (&format!("{cpu}/smt/active"), "0\n"),
            (&format!("{cpu}/vulnerabilities/meltdown"), "Not affected\n"),
            (
                &format!("{cpu}/vulnerabilities/spectre_v2"),
                "Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; STIBP: disabled; RSB filling\n",
            ),
            ("/dev/kvm", ""),
            ("/dev/net/tun", ""),
            ("/dev/mapper/control", ""),
            ("/dev/loop-control", ""),
            ("/data/wrenn/instance", "x\n"),
            (
                "/lib/modules/6.1.0-40-amd64/modules.dep",
                "kernel/drivers/net/tun.ko:\nkernel/arch/x86/kvm/kvm-amd.ko:\n",
            ),
        ] {
            host.write(path, text);
        }
        host
    }

    fn at(&self, path: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.place.path()).unwrap().join(path.trim_start_matches('/'))
    }

    pub(super) fn write(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(super) fn remove(&self, path: &str) {
        fs::remove_file(self.at(path)).unwrap();
    }

    pub(super) fn tree(&self) -> Tree {
        Tree::below(self.at(""))
    }

    /// What is read of it. Of the disk that the test runs on nothing is told.
    pub(super) fn facts(&self) -> Facts {
        let target = Target {
            is_confined: true,
            ports: vec![8000],
            ..Target::new(VmmDriver::Firecracker, "/data/wrenn".into())
        };
        let answers = |path: &str, said: &str| Program::Answers { path: path.into(), said: said.to_owned() };
        let asked = Asked {
            nft: answers("/usr/sbin/nft", ""),
            firecracker: answers("/usr/bin/firecracker", "Firecracker v1.16.1\n"),
            jailer: answers("/usr/bin/jailer", "Jailer v1.16.1\n"),
        };
        let mut facts = facts::read(&self.tree(), target, asked);
        facts.data.free_bytes = Seen::Is(100 << 30);
        facts.data.shares_blocks = Seen::Is(true);
        facts
    }
}

fn outcome(report: &Report, name: &str) -> Outcome {
    report.findings.iter().find(|finding| finding.name == name).unwrap().outcome
}

#[test]
fn on_a_host_that_has_everything_production_may_start() {
    let report = Report::of(&MadeUp::new().facts());
    for finding in &report.findings {
        assert_eq!((finding.outcome, finding.blocks), (Outcome::Ok, false), "{finding:?}");
        assert_eq!((&finding.remedy, &finding.fixes), (&None, &vec![]), "{finding:?}");
    }
    assert!(report.production);
}

#[test]
fn of_a_host_that_tells_nothing_everything_is_said_to_be_missing() {
    let place = tempfile::tempdir().unwrap();
    let tree = Tree::below(Utf8Path::from_path(place.path()).unwrap());
    let asked = Asked { nft: Program::Missing, firecracker: Program::Missing, jailer: Program::Missing };
    let report = Report::of(&facts::read(&tree, Target::new(VmmDriver::Firecracker, "/data".into()), asked));
    assert!(!report.production);
    assert_eq!(report.findings.len(), Report::of(&MadeUp::new().facts()).findings.len());
    for finding in report.findings.iter().filter(|finding| finding.outcome != Outcome::Ok) {
        assert!(finding.remedy.is_some(), "{finding:?}");
    }
    // What a kernel can be built without is as good as turned off.
    let ok = report.findings.iter().filter(|finding| finding.outcome == Outcome::Ok);
    let ok: Vec<_> = ok.map(|finding| finding.name).collect();
    assert_eq!(ok, ["ksm", "swap", "machine-creation", "confinement", "paths"]);
}

#[test]
fn files_of_a_host_decide() {
    let vulnerability = "/sys/devices/system/cpu/vulnerabilities/x";
    for (path, text, name, wanted) in [
        ("/proc/self/uid_map", "0 100000 65536", "uids", Outcome::Failure),
        ("/etc/subgid", "bob:2032767:1", "uids", Outcome::Failure),
        ("/etc/group", "machines:x:2000000:", "uids", Outcome::Failure),
        ("/proc/swaps", "Filename Type\n/dev/sda2 partition 1 0 -2\n", "swap", Outcome::Failure),
        ("/proc/swaps", "Filename Type\n/dev/zram0 partition 1 0 -2\n", "swap", Outcome::Ok),
        (vulnerability, "Vulnerable: No microcode", "microcode", Outcome::Failure),
        (vulnerability, "Vulnerable: No microcode", "vulnerabilities", Outcome::Failure),
        ("/sys/devices/system/cpu/smt/active", "1", "smt", Outcome::Failure),
        ("/sys/fs/cgroup/cgroup.controllers", "cpuset pids", "cgroups", Outcome::Failure),
        (
            "/proc/net/tcp6",
            "  sl\n 0: 00000000000000000000000000000000:1F40 0:0 0A 0\n",
            "ports",
            Outcome::Advice,
        ),
        ("/proc/self/mountinfo", "22 1 8:1 / / rw - tmpfs none rw\n", "data-disk", Outcome::Failure),
        ("/proc/cmdline", "mitigations=off", "mitigations", Outcome::Failure),
    ] {
        let host = MadeUp::new();
        host.write(path, text);
        assert_eq!(outcome(&Report::of(&host.facts()), name), wanted, "{path}: {text}");
    }
    let host = MadeUp::new();
    host.write("/proc/swaps", "Filename Type\n/dev/dm-3 partition 1 0 -2\n/dev/zram0 partition 1 0 1\n");
    host.write("/sys/block/dm-3/dm/uuid", "CRYPT-PLAIN-swap");
    host.write("/sys/block/zram0/backing_dev", "none");
    assert_eq!(outcome(&Report::of(&host.facts()), "swap"), Outcome::Ok);
    host.write("/sys/block/zram0/backing_dev", "/dev/sda3");
    assert_eq!(outcome(&Report::of(&host.facts()), "swap"), Outcome::Failure);
}

#[test]
fn a_module_is_loaded_only_where_it_is_there() {
    let host = MadeUp::new();
    host.remove("/dev/net/tun");
    host.remove("/dev/kvm");
    let fixes = |host: &MadeUp| {
        let findings = Report::of(&host.facts()).findings;
        findings.into_iter().flat_map(|finding| finding.fixes).collect::<Vec<_>>()
    };
    assert_eq!(fixes(&host), [Fix::Load("kvm_amd"), Fix::Load("tun")]);
    host.remove("/lib/modules/6.1.0-40-amd64/modules.dep");
    assert_eq!(fixes(&host), []);
}

#[test]
fn what_others_can_change_is_not_trusted() {
    use std::os::unix::fs::PermissionsExt as _;
    for path in ["/data/wrenn", "/data", "/run/netns", "/run/wrenn"] {
        let host = MadeUp::new();
        host.write("/run/netns/one", "");
        host.write("/run/wrenn/slots/1", "");
        assert_eq!(outcome(&Report::of(&host.facts()), "paths"), Outcome::Ok);
        fs::set_permissions(host.at(path), fs::Permissions::from_mode(0o775)).unwrap();
        let report = Report::of(&host.facts());
        let found = report.blocking().find(|finding| finding.name == "paths").unwrap();
        assert!(found.seen.ends_with(&format!("can change {path}")), "{found:?}");
    }
}

#[tokio::test]
async fn what_is_safe_is_fixed_and_looked_at_again() {
    let host = MadeUp::new();
    host.write("/sys/kernel/mm/ksm/run", "1\n");
    host.write("/proc/sys/net/ipv4/ip_forward", "0\n");
    host.write("/proc/sys/net/netfilter/nf_conntrack_max", "65536\n");
    host.write("/proc/swaps", "Filename Type\n/dev/sda2 partition 1 0 -2\n");
    let target = Target::new(VmmDriver::Firecracker, "/data/wrenn".into());
    let before = examine(&host.tree(), &target).await.unwrap();
    let fixed = examine_and_fix(&host.tree(), &target).await.unwrap();
    for (name, was, is) in [
        ("ksm", Outcome::Failure, Outcome::Ok),
        ("forwarding", Outcome::Advice, Outcome::Ok),
        ("connections", Outcome::Advice, Outcome::Ok),
        ("swap", Outcome::Failure, Outcome::Failure),
    ] {
        assert_eq!((outcome(&before, name), outcome(&fixed, name)), (was, is), "{name}");
    }
    let done: Vec<_> = fixed.fixes.iter().map(|fix| (fix.name, fix.undo.as_deref())).collect();
    let undo = |name, command| (name, Some(command));
    assert_eq!(
        done,
        [
            undo("ksm", "echo 1 > /sys/kernel/mm/ksm/run"),
            undo("forwarding", "echo 0 > /proc/sys/net/ipv4/ip_forward"),
            undo("connections", "echo 65536 > /proc/sys/net/netfilter/nf_conntrack_max"),
        ]
    );
}

#[tokio::test]
async fn production_is_refused_with_everything_that_is_missing() {
    let host = MadeUp::new();
    host.write("/sys/devices/system/cpu/smt/active", "1\n");
    host.remove("/proc/cmdline");
    let target = Target::new(VmmDriver::Qemu, "/data/wrenn".into());
    let refused = require(&host.tree(), &target).await.unwrap_err();
    let text = refused.to_string();
    let NotFit::Findings { findings } = refused else { panic!("{refused:?}") };
    let names: Vec<_> = findings.iter().map(|finding| finding.name).collect();
    for name in ["smt", "mitigations", "vmm"] {
        assert!(names.contains(&name) && text.contains(&format!("{name}: ")), "{name}: {text}");
    }
    assert!(!names.contains(&"ksm"));
    assert!(findings.iter().all(|finding| finding.blocks));
}

#[tokio::test]
async fn an_agent_for_production_makes_nothing_where_it_must_not_start() {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        config: Config,
    }
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("stack");
    // Whatever this host is: QEMU is not for production.
    let words = ["agent", "--production", "--vmm", "qemu", "--dir", dir.to_str().unwrap()];
    let line = <Line as clap::Parser>::parse_from(words);
    let refused = Agent::start(line.config).await.unwrap_err();
    let StartError::NotFit(NotFit::Findings { findings }) = refused else { panic!("{refused:?}") };
    assert!(findings.iter().any(|finding| finding.name == "vmm"), "{findings:?}");
    assert!(!dir.exists());
}

#[test]
fn the_form_of_the_report() {
    let host = MadeUp::new();
    host.write("/sys/kernel/mm/ksm/run", "1\n");
    let mut report = Report::of(&host.facts());
    report.findings.retain(|finding| ["ksm", "swap"].contains(&finding.name));
    report.fixes.push(Fixed {
        name: "ksm",
        change: "echo 2 > f".to_owned(),
        undo: None,
        error: Some("no".to_owned()),
    });
    let wanted = serde_json::json!({
        "schema": 1,
        "production": false,
        "findings": [
            {
                "name": "ksm", "outcome": "failure", "blocks": true, "can_fix": true,
                "seen": "equal pages are merged, which shows one guest what another holds",
                "remedy": "echo 2 > /sys/kernel/mm/ksm/run, and disable what turns it on (ksmtuned)",
            },
            {
                "name": "swap", "outcome": "ok", "blocks": false, "can_fix": false,
                "seen": "memory is written to no disk", "remedy": null,
            },
        ],
        "fixes": [{ "name": "ksm", "change": "echo 2 > f", "undo": null, "error": "no" }],
    });
    assert_eq!(serde_json::to_value(&report).unwrap(), wanted);
}
