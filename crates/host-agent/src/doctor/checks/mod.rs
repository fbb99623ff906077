//! The checks: each is a pure function of [`Facts`], and all of them are in one table.

mod host;
mod kernel;
mod memory;
mod processor;
mod programs;
#[cfg(test)]
mod tests;

use super::{Facts, Finding, Fix, Outcome, tree::Seen};

/// A check.
struct Check {
    name: &'static str,
    need: Need,
    judge: fn(&Facts) -> Verdict,
}

/// What a check is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Production must not start without knowing that it is well.
    Required,
    /// It advises, or also refuses what is surely wrong.
    Advised,
}

/// What a check says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    outcome: Outcome,
    seen: String,
    remedy: Option<String>,
    fixes: Vec<Fix>,
}

impl Verdict {
    fn ok(seen: impl Into<String>) -> Self {
        Self { outcome: Outcome::Ok, seen: seen.into(), remedy: None, fixes: Vec::new() }
    }

    fn bad(outcome: Outcome, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { outcome, seen: seen.into(), remedy: Some(remedy.into()), fixes: Vec::new() }
    }

    fn advice(seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(Outcome::Advice, seen, remedy)
    }

    fn failure(seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(Outcome::Failure, seen, remedy)
    }

    fn unknown(seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(Outcome::Unknown, seen, remedy)
    }

    fn fixed_by(mut self, fixes: impl IntoIterator<Item = Fix>) -> Self {
        self.fixes.extend(fixes);
        self
    }
}

/// Judges what is there; what is not is unknown, and `what` says which it is.
fn if_known<T>(seen: &Seen<T>, what: &str, remedy: &str, judge: impl FnOnce(&T) -> Verdict) -> Verdict {
    match seen {
        Seen::Is(value) => judge(value),
        Seen::Absent => Verdict::unknown(format!("the kernel does not say {what}"), remedy),
        Seen::Unreadable(why) => Verdict::unknown(format!("{what} cannot be read: {why}"), remedy),
    }
}

const fn required(name: &'static str, judge: fn(&Facts) -> Verdict) -> Check {
    Check { name, need: Need::Required, judge }
}

const fn advised(name: &'static str, judge: fn(&Facts) -> Verdict) -> Check {
    Check { name, need: Need::Advised, judge }
}

/// All of them, in the order in which they are told. A name is never given another meaning.
const CHECKS: &[Check] = &[
    required("privileges", host::privileges),
    required("kvm", processor::kvm),
    advised("bare-metal", processor::bare_metal),
    required("kernel", kernel::kernel),
    required("microcode", processor::microcode),
    required("vulnerabilities", processor::vulnerabilities),
    required("mitigations", processor::mitigations),
    required("smt", processor::smt),
    required("ksm", memory::ksm),
    required("swap", memory::swap),
    advised("memory-errors", memory::errors),
    required("clock-source", kernel::clock_source),
    advised("kvm-timer", kernel::kvm_timer),
    advised("machine-creation", kernel::machine_creation),
    advised("console", kernel::console),
    required("cgroups", kernel::cgroups),
    required("vmm", programs::vmm),
    required("jailer", programs::jailer),
    required("confinement", programs::confinement),
    required("uids", host::uids),
    required("paths", host::paths),
    required("nftables", programs::nftables),
    required("tun", host::tun),
    advised("device-mapper", host::device_mapper),
    required("data-disk", host::data_disk),
    advised("reflink", host::reflink),
    advised("open-files", host::open_files),
    advised("kernel-limits", host::kernel_limits),
    advised("forwarding", host::forwarding),
    advised("connections", host::connections),
    advised("ports", host::ports),
];

/// One finding for each check.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let finding = |check: &Check| {
        let Verdict { outcome, seen, remedy, fixes } = (check.judge)(facts);
        let blocks = match outcome {
            Outcome::Ok | Outcome::Advice => false,
            Outcome::Failure => true,
            Outcome::Unknown => check.need == Need::Required,
        };
        Finding { name: check.name, outcome, blocks, seen, remedy, fixes }
    };
    CHECKS.iter().map(finding).collect()
}
