//! Asking apt, through the sources that this machine already has.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::{repository::Repository, step};

/// `apt-get` that asks nothing and does not change to a user who cannot enter our directories.
pub(crate) fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8").args([
        "--quiet",
        "--option",
        "APT::Sandbox::User=root",
        "--option",
        "Acquire::Retries=3",
    ]);
    command
}

/// Fetches the package lists.
pub(crate) fn update(repository: &Repository) -> Result<()> {
    step::quiet(
        "updating the lists of Debian packages",
        &repository.log("apt-update"),
        apt_get().arg("update"),
    )
}

/// Whether the package lists were ever fetched.
pub(crate) fn has_lists() -> bool {
    let Ok(lists) = fs::read_dir("/var/lib/apt/lists") else { return false };
    lists.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
}

/// The machine's own sources of a Debian release, as lines of a sources.list: for an image of the same release.
pub(crate) fn sources(suite: &str) -> Result<Vec<String>> {
    let format = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
    let targets = step::output(apt_get().args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
        "Origin: Debian",
    ]))?;
    let sources = source_lines(&targets, suite);
    if sources.is_empty() {
        bail!("this machine has no apt source of Debian's {suite}, from which images are made");
    }
    Ok(sources)
}

fn source_lines(targets: &str, suite: &str) -> Vec<String> {
    let mut lines = BTreeSet::new();
    for target in targets.lines() {
        let [origin, uri, release, component] = target.split('|').collect::<Vec<_>>()[..] else { continue };
        let of_suite = release == suite
            || release.strip_prefix(suite).is_some_and(|rest| matches!(rest, "-updates" | "-security"));
        if origin == "Debian" && of_suite {
            lines.insert(format!("deb {uri} {release} {component}"));
        }
    }
    lines.into_iter().collect()
}

/// The hosts that this machine takes packages from. None where nobody can say.
pub(crate) fn source_hosts() -> Vec<String> {
    let targets =
        step::output(apt_get().args(["indextargets", "--format", "$(REPO_URI)"])).unwrap_or_default();
    let hosts: BTreeSet<&str> = targets
        .lines()
        .filter_map(|uri| uri.split_once("://")?.1.split('/').next())
        .filter(|host| host.contains('.'))
        .collect();
    hosts.into_iter().map(str::to_owned).collect()
}

/// How this machine reaches its sources (proxies and the like), as lines of an apt.conf.
pub(crate) fn acquire_options() -> Result<Vec<String>> {
    let configuration = step::output(Command::new("apt-config").arg("dump"))?;
    Ok(configuration
        .lines()
        .filter(|line| {
            ["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"]
                .iter()
                .any(|prefix| line.starts_with(prefix))
                && !line.ends_with("\"\";")
        })
        .map(str::to_owned)
        .collect())
}

/// A package as the archive has it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// The package that a metapackage stands for: the one it depends on in exactly one version.
pub(crate) fn behind_metapackage(metapackage: &str) -> Result<Package> {
    let record = step::output(Command::new("apt-cache").args(["show", "--no-all-versions", metapackage]))?;
    exact_dependency(&record)
        .ok_or_else(|| anyhow::anyhow!("apt does not say which package {metapackage} stands for:\n{record}"))
}

fn exact_dependency(record: &str) -> Option<Package> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    depends.split(',').find_map(|dependency| {
        let (name, version) = dependency.trim().split_once(" (= ")?;
        Some(Package { name: name.to_owned(), version: version.strip_suffix(')')?.to_owned() })
    })
}

/// Downloads a package into a directory and unpacks it there, without installing it.
pub(crate) fn download_and_unpack(
    repository: &Repository,
    package: &Package,
    what: &str,
    directory: &Path,
) -> Result<()> {
    let Package { name, version } = package;
    step::quiet(
        &format!("downloading {what} ({name} {version})"),
        &repository.log("download"),
        apt_get().current_dir(directory).arg("download").arg(format!("{name}={version}")),
    )?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            step::output(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(directory))?;
            fs::remove_file(path)?;
            return Ok(());
        }
    }
    bail!("apt-get download {name} left no package in {}", directory.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_sources_of_one_release() {
        let targets = "Debian|http://mirror.test/debian/|bookworm|main\n\
                       Debian|http://mirror.test/debian/|bookworm-updates|main\n\
                       Debian|http://mirror.test/debian-security/|bookworm-security|main\n\
                       Debian|http://mirror.test/debian/|bookworm-backports|main\n\
                       Debian|http://mirror.test/debian/|trixie|main\n\
                       Somebody|http://elsewhere.test/|bookworm|main\n";
        assert_eq!(
            source_lines(targets, "bookworm"),
            [
                "deb http://mirror.test/debian-security/ bookworm-security main",
                "deb http://mirror.test/debian/ bookworm main",
                "deb http://mirror.test/debian/ bookworm-updates main",
            ]
        );
    }

    #[test]
    fn finds_the_package_behind_a_metapackage() {
        let record = "Package: linux-image-cloud-amd64\nDepends: linux-base, linux-image-6.1.0-9-cloud-amd64 (= 6.1.90-1)\n";
        let expected =
            Package { name: "linux-image-6.1.0-9-cloud-amd64".to_owned(), version: "6.1.90-1".to_owned() };
        assert_eq!(exact_dependency(record), Some(expected));
        assert_eq!(exact_dependency("Depends: linux-base\n"), None);
    }
}
