//! `wrenn doctor`: whether a host has what production needs, item by item, and what to do where it does not.
//!
//! ```text
//!  files of the host, programs ─► Facts ─► every check (pure) ─► Report ─► table or JSON, an exit code
//!   [`tree`], [`programs`]       [`facts`]   [`checks`]            │
//!                                   ▲                              └─► `--fix`: what is safe is changed [`fix`]
//!                                   └──────────────────────────────────────┘ and everything is looked at again
//! ```
//!
//! A check that production *requires* refuses it when it fails, and when what it needs to know cannot be known. All
//! others advise. [`require`] is what `wrenn agent --production` does before anything else.
//!
//! # Firecracker's guide for production hosts
//!
//! | its item | here |
//! |---|---|
//! | KVM; kernel and microcode up to date | `kvm`, `kernel`, `microcode` |
//! | seccomp, serial device, log files, signal handlers | the driver's: default filters, FIFOs that are bounded, an owner that ends what does not answer |
//! | quiet console of the host | `console` |
//! | jailer: trusted paths, its version, a user for each machine | `paths`, `jailer`, `confinement`, `uids` |
//! | limits of disk, memory and processors | `cgroups`, `open-files`, `kernel-limits`; how long a machine's files may become is the driver's |
//! | `kvm-pit` | `kvm-timer` |
//! | flooding networks, filtering what guests send | `nftables`: the slots' rules and rate limits; `connections` |
//! | swap | `swap` |
//! | side channels: SMT, mitigations, samepage merging, Rowhammer | `smt`, `vulnerabilities`, `mitigations`, `ksm`, `memory-errors` |
//! | Linux 6.1 boot times | `machine-creation` |
//! | physical counter of ARM | none: only x86-64 is supported |
//!
//! Ours beside it: `privileges`, `bare-metal`, `clock-source`, `vmm`, `tun`, `device-mapper`, `data-disk`, `reflink`,
//! `forwarding`, `ports`.
//!
//! # JSON
//!
//! `{"schema": 1, "production": true or false, "findings": […], "fixes": […]}`. A finding has a `name`, which stays the
//! same from version to version, an `outcome` (`ok`, `advice`, `failure`, `unknown`), whether it `blocks` production,
//! what was `seen`, a `remedy` where there is one, and `can_fix`. A fix has the `name` of its finding, the `change`,
//! how to `undo` it where it was done, and an `error` where it was not.

pub mod checks;
pub mod facts;
pub mod fix;
pub mod parse;
pub mod programs;
pub mod tree;

use camino::Utf8PathBuf;
use serde::Serialize;

pub use self::{
    facts::{Facts, GatherError},
    fix::{Fix, Fixed},
    parse::{IdRange, NotARange},
    tree::Tree,
};
use crate::{
    config::{Config, DiskDriver, VmmDriver},
    metrics::endpoint::MetricsAddress,
    network::SlotNumber,
};

/// The user ids that machines get when nobody says: one for each slot that there can be, above those of people and of
/// containers.
pub const UIDS: IdRange = IdRange { first: 2_000_000, last: 2_032_767 };

/// What is to run on a host.
#[derive(Debug, Clone)]
pub struct Target {
    /// The virtual machine monitor.
    pub vmm: VmmDriver,
    /// How root disks are kept; none: as is usual for the virtual machine monitor.
    pub disks: Option<DiskDriver>,
    /// The directory of the data, which need not be there yet.
    pub data_dir: Utf8PathBuf,
    /// The Firecracker, instead of the one on the `PATH`.
    pub firecracker: Option<Utf8PathBuf>,
    /// Its jailer, instead of the one beside it or on the `PATH`.
    pub jailer: Option<Utf8PathBuf>,
    /// The user ids of machines.
    pub uids: IdRange,
    /// The most machines that there can be at a time.
    pub machines: u64,
    /// Whether each machine is confined as a user of its own.
    pub is_confined: bool,
    /// TCP ports that are wanted.
    pub ports: Vec<u16>,
}

impl Target {
    /// A host of a data directory and a virtual machine monitor, with what is usual for all else.
    #[must_use]
    pub fn new(vmm: VmmDriver, data_dir: Utf8PathBuf) -> Self {
        Self {
            vmm,
            disks: None,
            data_dir: std::path::absolute(&data_dir)
                .ok()
                .and_then(|path| Utf8PathBuf::from_path_buf(path).ok())
                .unwrap_or(data_dir),
            firecracker: None,
            jailer: None,
            uids: UIDS,
            machines: u64::from(SlotNumber::LAST.get()),
            is_confined: true,
            ports: Vec::new(),
        }
    }

    /// What an agent is told to run.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let port = match &config.metrics {
            Some(MetricsAddress::Loopback(address)) if address.port() != 0 => Some(address.port()),
            _ => None,
        };
        Self {
            disks: config.disks,
            firecracker: config.firecracker.clone(),
            jailer: config.jailer.clone(),
            uids: config.uids.unwrap_or(UIDS),
            is_confined: config.production || config.uids.is_some(),
            ports: port.into_iter().collect(),
            ..Self::new(config.vmm, config.dir.clone())
        }
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It could be better.
    Advice,
    /// Production must not start.
    Failure,
    /// It cannot be known.
    Unknown,
}

impl Outcome {
    /// As it is written.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Advice => "advice",
            Self::Failure => "failure",
            Self::Unknown => "unknown",
        }
    }
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The check; it stays the same from version to version.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// Whether production must not start because of it.
    pub blocks: bool,
    /// What was seen.
    pub seen: String,
    /// What to do about it.
    pub remedy: Option<String>,
    /// What `--fix` would do.
    pub fixes: Vec<Fix>,
}

impl Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut fields = serializer.serialize_struct("Finding", 6)?;
        fields.serialize_field("name", self.name)?;
        fields.serialize_field("outcome", &self.outcome)?;
        fields.serialize_field("blocks", &self.blocks)?;
        fields.serialize_field("seen", &self.seen)?;
        fields.serialize_field("remedy", &self.remedy)?;
        fields.serialize_field("can_fix", &!self.fixes.is_empty())?;
        fields.end()
    }
}

/// What all checks found, and what was changed before.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The version of this form.
    pub schema: u32,
    /// Whether production may start.
    pub production: bool,
    /// One for each check, always all of them and in the same order.
    pub findings: Vec<Finding>,
    /// What was changed, or could not be.
    pub fixes: Vec<Fixed>,
}

impl Report {
    /// Judges a host. Pure.
    #[must_use]
    pub fn of(facts: &Facts) -> Self {
        let findings = checks::all(facts);
        let production = !findings.iter().any(|finding| finding.blocks);
        Self { schema: 1, production, findings, fixes: Vec::new() }
    }

    /// Those findings because of which production must not start.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.blocks)
    }
}

/// A host on which production must not start.
#[derive(Debug, thiserror::Error)]
pub enum NotFit {
    /// Nothing is known of it.
    #[error("the host could not be examined")]
    Unexamined(#[source] GatherError),
    /// It lacks what production needs.
    #[error("production must not start here (`wrenn doctor` says what to do): {}", list(findings))]
    Findings {
        /// All that it lacks.
        findings: Vec<Finding>,
    },
}

fn list(findings: &[Finding]) -> String {
    let each = findings.iter().map(|finding| format!("{}: {}", finding.name, finding.seen));
    each.collect::<Vec<_>>().join("; ")
}

/// Looks at a host.
///
/// # Errors
/// Its files cannot be read to the end.
pub async fn examine(tree: &Tree, target: &Target) -> Result<Report, GatherError> {
    Ok(Report::of(&facts::gather(tree, target).await?))
}

/// Looks at a host, changes what is safe to change, and looks again.
///
/// # Errors
/// As [`examine`]. What could not be changed is in the report.
pub async fn examine_and_fix(tree: &Tree, target: &Target) -> Result<Report, GatherError> {
    let before = examine(tree, target).await?;
    let mut fixes = Vec::new();
    for finding in &before.findings {
        for fix in &finding.fixes {
            fixes.push(fix.apply(tree, finding.name).await);
        }
    }
    Ok(Report { fixes, ..examine(tree, target).await? })
}

/// Whether production may start.
///
/// # Errors
/// It must not, and why.
pub async fn require(tree: &Tree, target: &Target) -> Result<Report, NotFit> {
    let report = examine(tree, target).await.map_err(NotFit::Unexamined)?;
    match report.production {
        true => Ok(report),
        false => Err(NotFit::Findings { findings: report.blocking().cloned().collect() }),
    }
}

#[cfg(test)]
mod tests;
