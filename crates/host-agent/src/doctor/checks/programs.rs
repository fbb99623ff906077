//! Firecracker, its jailer, and the packet filter.

use wrenn_vmm::firecracker;

use super::{
    super::{Facts, programs::Program, tree::Seen},
    Verdict,
};
use crate::config::VmmDriver;

/// A version in what a program says first: `Firecracker v1.17.0`, `Jailer v1.17.0`.
fn version<'a>(said: &'a str, name: &str) -> Option<&'a str> {
    said.lines().next()?.strip_prefix(name)?.trim().strip_prefix('v')
}

pub(super) fn vmm(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "install Firecracker 1.14 to 1.17, or name the program (--firecracker, WRENN_FIRECRACKER)";
    if facts.target.vmm == VmmDriver::Qemu {
        return Verdict::failure("QEMU is for development", "run Firecracker: --vmm firecracker");
    }
    match &facts.firecracker {
        Program::Missing => Verdict::failure("there is no Firecracker", REMEDY),
        Program::Fails { path, problem } => Verdict::failure(format!("{path}: {problem}"), REMEDY),
        Program::Answers { path, said } => match version(said, "Firecracker ") {
            None => Verdict::failure(format!("{path} does not say that it is Firecracker"), REMEDY),
            Some(version) if firecracker::is_known(version) => {
                Verdict::ok(format!("{path} is Firecracker {version}"))
            }
            Some(version) => {
                Verdict::failure(format!("{path} is Firecracker {version}, which is not known"), REMEDY)
            }
        },
    }
}

pub(super) fn jailer(facts: &Facts) -> Verdict {
    const REMEDY: &str =
        "install the jailer of the same release as Firecracker, or name it (--jailer, WRENN_JAILER)";
    let firecracker = match &facts.firecracker {
        Program::Answers { said, .. } => version(said, "Firecracker "),
        _ => None,
    };
    match &facts.jailer {
        Program::Missing => Verdict::failure("there is no jailer", REMEDY),
        Program::Fails { path, problem } => Verdict::failure(format!("{path}: {problem}"), REMEDY),
        Program::Answers { path, said } => match (version(said, "Jailer "), firecracker) {
            (None, _) => {
                Verdict::failure(format!("{path} does not say that it is Firecracker's jailer"), REMEDY)
            }
            (Some(version), None) => Verdict::failure(
                format!("{path} is jailer {version}, and Firecracker's version is not known"),
                REMEDY,
            ),
            (Some(version), Some(other)) if version == other => {
                Verdict::ok(format!("{path} is jailer {version}"))
            }
            (Some(version), Some(other)) => {
                Verdict::failure(format!("{path} is jailer {version}, and Firecracker is {other}"), REMEDY)
            }
        },
    }
}

pub(super) fn confinement(facts: &Facts) -> Verdict {
    match facts.target.is_confined {
        true => Verdict::ok("each machine runs in a jail, as a user of its own"),
        false => Verdict::failure(
            "machines run as the agent's user, and see the host's files",
            "give the agent a range of user ids (--uids FIRST-LAST)",
        ),
    }
}

pub(super) fn nftables(facts: &Facts) -> Verdict {
    match &facts.nft {
        Program::Missing => Verdict::failure("there is no nft", "install the package nftables"),
        Program::Answers { path, .. } => Verdict::ok(format!("{path} reads the kernel's rules")),
        // Without the capability it cannot be known whether the kernel would take rules.
        Program::Fails { path, problem } => {
            let is_root = matches!(&facts.capabilities, Seen::Is(held) if held & super::host::NET_ADMIN != 0);
            let seen = format!("{path}: {problem}");
            let remedy = "run as root on a kernel with nf_tables";
            if is_root { Verdict::failure(seen, remedy) } else { Verdict::unknown(seen, remedy) }
        }
    }
}
