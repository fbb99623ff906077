//! `make check`: what can be said about the repository without running it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{cache::Cache, dependencies, repository::Repository, step, tidy};

/// Not a library of ours, so it is not in the lock file: its version is chosen here.
const CARGO_DENY: &str = "0.20.2";

pub(crate) fn run(repository: &Repository) -> Result<()> {
    step::announce("rules of this repository");
    tidy::run(repository)?;
    let cache = Cache::open()?;
    dependencies::take(repository, &cache)?;
    step::loud("format", repository.cargo().args(["fmt", "--all", "--check"]))?;
    step::loud(
        "lints",
        repository.cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]),
    )?;
    step::loud(
        "documentation",
        repository
            .cargo()
            .args(["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"])
            // Private items are documented too, so a link to one leads somewhere.
            .env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private-intra-doc-links"),
    )?;
    dependencies::give(repository, &cache)?;
    let deny = cargo_deny(repository, &cache)?;
    step::loud(
        "dependencies",
        Command::new(deny).current_dir(repository.root()).args(["check", "bans", "licenses", "sources"]),
    )
}

/// The program on the PATH, else one in the cache, which is built the first time.
fn cargo_deny(repository: &Repository, cache: &Cache) -> Result<PathBuf> {
    let on_path = env::var_os("PATH").and_then(|path| {
        env::split_paths(&path)
            .map(|directory| directory.join("cargo-deny"))
            .find(|program| program.is_file())
    });
    if let Some(program) = on_path {
        return Ok(program);
    }
    let directory = cache.get_or_make("tools", &format!("cargo-deny-{CARGO_DENY}"), |directory| {
        install(repository, directory)
    })?;
    Ok(directory.join("bin/cargo-deny"))
}

fn install(repository: &Repository, directory: &Path) -> Result<()> {
    let mut command = repository.cargo();
    command
        .args(["install", "cargo-deny", "--locked", "--version", CARGO_DENY, "--root"])
        .arg(directory)
        .arg("--target-dir")
        .arg(directory.join("target"));
    step::quiet("building cargo-deny, once (about 3 minutes)", &repository.log("cargo-deny"), &mut command)?;
    crate::cache::remove(&directory.join("target"))
}
