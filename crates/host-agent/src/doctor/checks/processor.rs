//! Virtualization, microcode, and what leaks through processors.

use super::{
    super::{
        Facts, Fix, Outcome,
        parse::{self, Module},
        tree::Seen,
    },
    Verdict, if_known,
};

/// The word that the kernel lists beside the weaknesses for microcode that it knows to be old.
const OLD_MICROCODE: &str = "old_microcode";
const SYSFS: &str = "run on a kernel with /sys mounted";
const UPDATE: &str = "install the newest microcode of the processor's vendor (intel-microcode or amd64-microcode, or the \
                      firmware), have it loaded early, and boot a kernel with all security updates";
const COMMAND_LINE: &str = "remove these from the kernel's command line, and boot again";
/// Values that turn a protection off, for any name of [`PROTECTIONS`].
const OFF: [&str; 3] = ["off", "never", "0"];
/// What names a protection on the kernel's command line.
const PROTECTIONS: [&str; 19] = [
    "gather_data_sampling",
    "indirect_target_selection",
    "itlb_multihit",
    "kvm-intel.vmentry_l1d_flush",
    "l1tf",
    "mds",
    "mitigations",
    "mmio_stale_data",
    "pti",
    "reg_file_data_sampling",
    "retbleed",
    "spec_rstack_overflow",
    "spec_store_bypass_disable",
    "spectre_bhi",
    "spectre_v2",
    "srbds",
    "tsa",
    "tsx_async_abort",
    "vmscape",
];
/// Words that turn one off by themselves.
const TURNED_OFF: [&str; 6] =
    ["nopti", "nospectre_v1", "nospectre_v2", "nospectre_bhb", "nospec_store_bypass_disable", "nogds"];
/// What `mitigations=` may leave out that guests need: the host from a guest, and a guest from a guest.
const NEEDED_BY_GUESTS: [&str; 2] = ["no_guest_host", "no_guest_guest"];

fn is_virtual(facts: &Facts) -> bool {
    matches!(&facts.processors, Seen::Is(found) if found.flags.contains("hypervisor"))
}

pub(super) fn kvm(facts: &Facts) -> Verdict {
    let flags = match &facts.processors {
        Seen::Is(found) => &found.flags,
        _ => &Default::default(),
    };
    let module = [("vmx", "kvm_intel"), ("svm", "kvm_amd")];
    let module = module.into_iter().find(|(flag, _)| flags.contains(*flag)).map(|(_, module)| module);
    match &facts.kvm {
        Seen::Is(()) => Verdict::ok("/dev/kvm can be used"),
        Seen::Unreadable(why) => Verdict::failure(
            format!("/dev/kvm cannot be opened: {why}"),
            "run as root, and let a container have the device",
        ),
        Seen::Absent => match module {
            None => Verdict::failure(
                "there is no /dev/kvm, and the processor shows no virtualization",
                "enable it in the firmware (VT-x, AMD-V), or nested virtualization in the hypervisor around",
            ),
            Some(module) => {
                let loadable = facts.modules.get(module) == Some(&Module::Loadable);
                Verdict::failure("there is no /dev/kvm", format!("modprobe {module}"))
                    .fixed_by(loadable.then_some(Fix::Load(module)))
            }
        },
    }
}

pub(super) fn bare_metal(facts: &Facts) -> Verdict {
    if_known(&facts.processors, "which processor it has", SYSFS, |_| match is_virtual(facts) {
        false => Verdict::ok("no hypervisor around this host"),
        true => Verdict::advice(
            "this host is itself a virtual machine: guests are slower, and what protects them is the business of the \
             host around, too",
            "use a machine of its own, or make sure that this page is true of the host around",
        ),
    })
}

pub(super) fn microcode(facts: &Facts) -> Verdict {
    let said = match &facts.vulnerabilities {
        Seen::Is(said) => said,
        _ => &Default::default(),
    };
    let wanted: Vec<_> = said
        .iter()
        .filter(|(name, text)| {
            text.to_lowercase().contains("no microcode")
                || (name.as_str() == OLD_MICROCODE && text.starts_with("Vulnerable"))
        })
        .map(|(name, _)| name.as_str())
        .collect();
    if !wanted.is_empty() {
        return Verdict::failure(
            format!("the kernel misses newer microcode for {}", wanted.join(", ")),
            UPDATE,
        );
    }
    if_known(&facts.processors, "which processor it has", SYSFS, |found| {
        let revisions = found.microcode.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match found.microcode.len() {
            0 => Verdict::unknown("the kernel does not say the revision of the microcode", SYSFS),
            _ if is_virtual(facts) => Verdict::advice(
                format!("revision {revisions}, which is what the hypervisor around shows"),
                "make sure that the host around has the newest microcode",
            ),
            1 => Verdict::ok(format!("revision {revisions}; the kernel misses nothing newer")),
            _ => Verdict::failure(format!("the processors have different revisions: {revisions}"), UPDATE),
        }
    })
}

/// What the kernel says of threads that share a core, in lower case; of them, `smt` tells.
const OF_THREADS: [&str; 3] = ["smt vulnerable", "vmx: smt vulnerable", "smt host state unknown"];

/// How one line of the kernel on one weakness comes out. It is made of parts, and each may be the bad one.
fn weakness(text: &str) -> Outcome {
    let parts = text.split([';', ',']).map(|part| part.trim().to_lowercase());
    let mut outcome = Outcome::Ok;
    for part in parts {
        if OF_THREADS.contains(&part.as_str()) {
            continue;
        }
        if part.contains("vulnerable") || part.contains("no mitigations") {
            return Outcome::Failure;
        }
        if part.starts_with("unknown") {
            outcome = Outcome::Unknown;
        }
    }
    outcome
}

pub(super) fn vulnerabilities(facts: &Facts) -> Verdict {
    const REMEDY: &str = "boot a kernel with all security updates and mitigations on, with the newest microcode; for \
                          what the processor cannot do, see https://docs.kernel.org/admin-guide/hw-vuln/";
    if_known(&facts.vulnerabilities, "what its processor leaks", REMEDY, |said| {
        let those = |wanted: Outcome| {
            let all =
                said.iter().filter(|(name, text)| name.as_str() != OLD_MICROCODE && weakness(text) == wanted);
            all.map(|(name, text)| format!("{name} ({text})")).collect::<Vec<_>>()
        };
        let (open, unknown) = (those(Outcome::Failure), those(Outcome::Unknown));
        match (open.is_empty(), unknown.is_empty()) {
            (false, _) => Verdict::failure(format!("vulnerable: {}", open.join(", ")), REMEDY),
            (true, false) => Verdict::unknown(format!("not known: {}", unknown.join(", ")), REMEDY),
            (true, true) if said.is_empty() => {
                Verdict::unknown("the kernel names no weakness that it has looked for", REMEDY)
            }
            (true, true) => Verdict::ok(format!("none of the {} that the kernel knows", said.len())),
        }
    })
}

pub(super) fn mitigations(facts: &Facts) -> Verdict {
    if_known(&facts.command_line, "what it was started with", "mount /proc", |line| {
        let weakens = |(name, value): (&str, &str)| {
            let mut parts = value.split(',');
            match name {
                // Together with what threads of a core leak, it is what guests need.
                "mitigations" => parts.any(|part| part == "off" || NEEDED_BY_GUESTS.contains(&part)),
                _ if PROTECTIONS.contains(&name.replace("kvm_intel", "kvm-intel").as_str()) => {
                    parts.any(|part| OFF.contains(&part))
                }
                _ => value.is_empty() && TURNED_OFF.contains(&name),
            }
        };
        let words = parse::words(line).into_iter().filter(|word| weakens(*word));
        let words: Vec<_> = words
            .map(|(name, value)| if value.is_empty() { name.to_owned() } else { format!("{name}={value}") })
            .collect();
        match words.is_empty() {
            true => Verdict::ok("the kernel was not told to leave any out"),
            false => {
                Verdict::failure(format!("the kernel was started with {}", words.join(" ")), COMMAND_LINE)
            }
        }
    })
}

pub(super) fn smt(facts: &Facts) -> Verdict {
    const REMEDY: &str = "turn it off in the firmware, or boot with `nosmt`: sandboxes of different tenants would share \
                          cores, and read from each other through them";
    if_known(&facts.smt, "whether cores run several threads", REMEDY, |smt| {
        let unknown = |text: &String| text.to_lowercase().contains("smt host state unknown");
        let hides = matches!(&facts.vulnerabilities, Seen::Is(said) if said.values().any(unknown));
        match (smt.is_active, hides) {
            (true, _) => {
                Verdict::failure(format!("each core runs several threads ({})", smt.control), REMEDY)
            }
            (false, true) => Verdict::unknown(
                "the hypervisor around does not say whether cores run several threads",
                REMEDY,
            ),
            (false, false) => {
                let who = if is_virtual(facts) { ", as the hypervisor around shows it" } else { "" };
                Verdict::ok(format!("each core runs one thread ({}){who}", smt.control))
            }
        }
    })
}
