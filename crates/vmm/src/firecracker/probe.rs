//! Which Firecracker there is, and whether it can run here.

use std::{fs::OpenOptions, ops::RangeInclusive};

use camino::{Utf8Path, Utf8PathBuf};

use super::{Firecracker, Programs};
use crate::{Accelerator, VmmError, VmmIdentity, VmmResult, host_cpu, pager::PagerProgram, program};

const DEFAULT_PROGRAM: &str = "firecracker";
const DEFAULT_JAILER: &str = "jailer";
const JAILER_REMEDY: &str =
    "install the jailer of the same release as Firecracker, or set WRENN_JAILER to the program";
const REMEDY: &str = "install Firecracker 1.14 to 1.17, or set WRENN_FIRECRACKER to the program";
const KVM: &str = "/dev/kvm";
const KVM_REMEDY: &str = "enable virtualisation and load kvm_intel or kvm_amd; QEMU runs without";
/// The versions whose API is known. 1.14 is the first whose console can be a FIFO.
const KNOWN: RangeInclusive<(u32, u32)> = (1, 14)..=(1, 17);
/// How devices are presented to the guest.
const TRANSPORT: &str = "mmio";

/// Where the memory of a machine that is restored comes from.
#[derive(Debug, Clone, Default)]
pub enum MemoryBackend {
    /// The base's file is mapped, and what was saved over it is written into the mapping before the guest runs.
    #[default]
    File,
    /// A [`pager`](crate::pager) serves both, page by page, when they are wanted.
    Uffd(PagerProgram),
}

/// How to look for Firecracker, and how it is to be used.
#[derive(Debug, Clone, Default)]
pub struct FirecrackerOptions {
    /// The program; else `firecracker` on the `PATH`.
    pub program: Option<Utf8PathBuf>,
    /// Where the memory of machines that are restored comes from.
    pub memory: MemoryBackend,
    /// Whether machines may have users of their own: then there has to be a jailer of the same version.
    pub is_jailed: bool,
    /// The jailer; else the one beside Firecracker, or `jailer` on the `PATH`.
    pub jailer: Option<Utf8PathBuf>,
}

impl FirecrackerOptions {
    /// What the environment asks for: `WRENN_FIRECRACKER` names the program, `WRENN_JAILER` its jailer.
    #[must_use]
    pub fn from_environment() -> Self {
        let named = |name| std::env::var(name).ok().filter(|program| !program.is_empty()).map(Into::into);
        Self {
            program: named("WRENN_FIRECRACKER"),
            memory: MemoryBackend::File,
            is_jailed: false,
            jailer: named("WRENN_JAILER"),
        }
    }
}

impl Firecracker {
    /// Finds Firecracker, and makes sure that it and the host are such that it can be driven.
    ///
    /// # Errors
    /// [`VmmError::Unavailable`] says what is missing and how to get it: the program, a version that is known, KVM.
    pub async fn detect(options: FirecrackerOptions) -> VmmResult<Self> {
        let wanted = options.program.as_deref().unwrap_or_else(|| Utf8Path::new(DEFAULT_PROGRAM));
        let program = program::find(wanted, REMEDY)?;
        let unusable = |problem: String| program::unusable(&program, problem, REMEDY);
        let (version, format) = tokio::try_join!(
            program::ask(&program, "--version", REMEDY),
            program::ask(&program, "--snapshot-version", REMEDY)
        )?;
        let version =
            parse_version(&version).ok_or_else(|| unusable("it does not say its version".to_owned()))?;
        if !is_known(&version) {
            let ((a, b), (c, d)) = (*KNOWN.start(), *KNOWN.end());
            return Err(unusable(format!("it is version {version}, and {a}.{b} to {c}.{d} are known")));
        }
        let jailer = match options.is_jailed {
            true => Some(jailer(options.jailer, &program, &version).await?),
            false => None,
        };
        let format = parse_format(&format)
            .ok_or_else(|| unusable("it does not say the format of its snapshots".to_owned()))?;
        if let Err(error) = OpenOptions::new().read(true).write(true).open(KVM) {
            let problem = format!("it cannot be opened: {error}");
            return Err(VmmError::Unavailable { program: KVM.to_owned(), problem, remedy: KVM_REMEDY });
        }
        let identity = VmmIdentity {
            name: "firecracker".to_owned(),
            version,
            machine: format!("{TRANSPORT}, snapshots {format}"),
            cpu_model: format!("host {}", host_cpu::seen()?),
            accelerator: Accelerator::Kvm,
        };
        let programs = Programs { firecracker: program, jailer };
        Ok(Self { programs, identity, memory: options.memory })
    }
}

/// The jailer, of the version of the Firecracker that it is to start.
async fn jailer(named: Option<Utf8PathBuf>, program: &Utf8Path, version: &str) -> VmmResult<Utf8PathBuf> {
    let beside = program.with_file_name(DEFAULT_JAILER);
    let named = named.or_else(|| beside.exists().then_some(beside));
    let jailer = program::find(named.as_deref().unwrap_or_else(|| DEFAULT_JAILER.into()), JAILER_REMEDY)?;
    let said = program::ask(&jailer, "--version", JAILER_REMEDY).await?;
    match said.lines().next().and_then(|line| line.strip_prefix("Jailer v")) {
        Some(found) if found.trim() == version => Ok(jailer),
        Some(found) => {
            let problem = format!("it is version {}, and Firecracker is {version}", found.trim());
            Err(program::unusable(&jailer, problem, JAILER_REMEDY))
        }
        None => Err(program::unusable(&jailer, "it does not say its version".to_owned(), JAILER_REMEDY)),
    }
}

/// `Firecracker v1.17.0-dev`, and then its log.
fn parse_version(said: &str) -> Option<String> {
    let version = said.lines().next()?.strip_prefix("Firecracker v")?.trim();
    (!version.is_empty()).then(|| version.to_owned())
}

/// `v11.0.0`, and then its log.
fn parse_format(said: &str) -> Option<&str> {
    let line = said.lines().next()?.trim();
    line.strip_prefix('v').filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))?;
    Some(line)
}

/// Whether a version, such as `1.17.0`, is one that the driver knows.
#[must_use]
pub fn is_known(version: &str) -> bool {
    let mut parts = version.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => KNOWN.contains(&(major, minor)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_known_or_not() {
        let said = "Firecracker v1.17.0-dev\n\n2026-11-23T00:12:27.0 [anonymous-instance:main] exiting\n";
        assert_eq!(parse_version(said).as_deref(), Some("1.17.0-dev"));
        assert_eq!(parse_version("QEMU emulator version 7.2\n"), None);
        for known in ["1.14.0", "1.16.1", "1.17.0-dev"] {
            assert!(is_known(known), "{known}");
        }
        for unknown in ["1.13.2", "1.18.0", "2.0.0", "0.25", "1", "", "x.y"] {
            assert!(!is_known(unknown), "{unknown}");
        }
        assert_eq!(parse_format("v11.0.0\nlog\n"), Some("v11.0.0"));
        assert_eq!(parse_format("version 11\n"), None);
    }

    #[tokio::test]
    async fn what_is_no_firecracker_or_an_unknown_one_is_refused_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let played = Utf8Path::from_path(directory.path()).unwrap().join("firecracker");
        std::fs::write(&played, "#!/bin/sh\necho Firecracker v9.1.0\n").unwrap();
        std::fs::set_permissions(&played, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        for (program, problem) in [
            ("/nowhere/firecracker", "no such program"),
            ("/bin/true", "does not say"),
            ("/bin/false", "ended"),
            (played.as_str(), "it is version 9.1.0, and 1.14 to 1.17 are known"),
        ] {
            let options = FirecrackerOptions { program: Some(program.into()), ..Default::default() };
            let error = Firecracker::detect(options).await.unwrap_err();
            assert!(matches!(error, VmmError::Unavailable { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(problem) && text.contains("WRENN_FIRECRACKER"), "{text}");
        }
    }
}
