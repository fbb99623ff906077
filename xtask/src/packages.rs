//! The Debian packages that the host needs: `setup/packages.txt`, and what of it is missing.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{debian, host, repository::Repository, step};

/// Installs what of the list is missing, with one `apt-get update` if apt's lists are absent or out of date.
pub(crate) fn install_missing(repository: &Repository) -> Result<()> {
    let list = repository.path("setup/packages.txt");
    let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    install(repository, &names(&text))
}

/// Installs what of these is missing.
pub(crate) fn install(repository: &Repository, wanted: &[&str]) -> Result<()> {
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "these packages are missing and this is not Debian, so they cannot be installed for you: {}",
            missing.join(" ")
        );
    }
    host::require_root(&format!("installing Debian packages ({})", missing.join(" ")))?;
    if !debian::has_lists() {
        debian::update(repository)?;
    }
    let what = format!("installing {} Debian packages: {}", missing.len(), missing.join(" "));
    let install = || {
        let mut command = debian::apt_get();
        command.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
        step::quiet(&what, &repository.log("packages"), &mut command)
    };
    if install().is_err() {
        // Lists that are older than the archive name versions that are no longer there.
        debian::update(repository)?;
        install()?;
    }
    Ok(())
}

/// The first word of each line that is neither empty nor a comment. Shared with `guest/kernel/modules.txt`.
pub(crate) fn names(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut command = Command::new("dpkg-query");
    command.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"]).args(wanted);
    // It fails when it does not know a package, which is one of the answers looked for.
    let output = command.output().context("asking dpkg-query what is installed: is this Debian?")?;
    let output = String::from_utf8_lossy(&output.stdout);
    let installed: BTreeSet<&str> =
        output.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(wanted.iter().copied().filter(|package| !installed.contains(package)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_names_with_reasons() {
        let text = include_str!("../../setup/packages.txt");
        let names = names(text);
        assert!(names.contains(&"qemu-system-x86"), "{names:?}");
        assert!(names.is_sorted(), "{names:?}");
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            assert!(line.split_whitespace().count() > 3, "no reason: {line}");
        }
    }

    #[test]
    fn what_dpkg_does_not_know_is_missing() {
        if !Path::new("/usr/bin/dpkg-query").exists() {
            println!("skipped: this is not Debian");
            return;
        }
        assert_eq!(missing(&["dpkg", "wrenn-no-such-package"]).unwrap(), ["wrenn-no-such-package"]);
    }
}
