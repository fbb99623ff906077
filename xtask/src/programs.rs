//! Programs of this workspace, built once for each content of its sources.
//!
//! A program's name in the cache is a digest of everything that can be in it: the sources that git tracks or
//! would track, the compiler, and flags from the environment. A clone that has the same finds it and compiles
//! nothing; after any change cargo decides what to compile, as always.

use std::{env, ffi::OsString, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    cache::{self, Cache},
    repository::Repository,
    step,
};

const KIND: &str = "programs";
/// How many builds of one program are kept: a person's last few, and those of other clones.
const KEPT: usize = 6;
/// What no program is made of: documents and tools.
const NOT_IN_PROGRAMS: [&str; 10] = [
    ".ci/",
    "bench/",
    "deny.toml",
    "docs/",
    "guest/",
    "lab/",
    "Makefile",
    "rustfmt.toml",
    "setup/",
    "xtask/",
];
/// What in the environment changes what cargo builds.
const FLAGS: [&str; 4] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"];

/// Makes `program` be there: from the cache, else by `build`, which is to leave it at that place.
pub(crate) fn find_or_build(
    repository: &Repository,
    cache: &Cache,
    program: &Path,
    build: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Not a git clone, or no git: then cargo alone knows what is up to date.
    let Ok(digest) = digest_of_sources(repository) else { return build() };
    let kept = cache.place(KIND).join(format!("{name}-{digest}")).join(&name);
    if kept.is_file() {
        cache::mark_used(&kept)?;
        return install(&kept, program);
    }
    build()?;
    // Sources that were changed meanwhile are partly in the program: then it has no name.
    if digest_of_sources(repository)? != digest {
        return Ok(());
    }
    cache.get_or_make(KIND, &format!("{name}-{digest}"), |directory| {
        fs::copy(program, directory.join(&name)).with_context(|| format!("copying {}", program.display()))?;
        Ok(())
    })?;
    cache.forget_old(KIND, &name, KEPT)
}

fn digest_of_sources(repository: &Repository) -> Result<String> {
    let files = repository.files()?;
    let mut hash = Command::new("sha256sum");
    hash.current_dir(repository.root()).arg("--");
    for path in files.split_terminator('\0').filter(|path| is_source(path)) {
        // One that git tracks and that was removed is not there to be hashed, which is also a difference.
        if repository.path(path).is_file() {
            hash.arg(path);
        }
    }
    let mut everything = step::output(&mut hash)?;
    everything.push_str(&step::output(Command::new("rustc").arg("-vV").current_dir(repository.root()))?);
    let mut flags: Vec<(OsString, OsString)> = env::vars_os()
        .filter(|(name, _)| FLAGS.iter().any(|flag| name.to_string_lossy().starts_with(flag)))
        .collect();
    flags.sort();
    everything.push_str(&format!("{flags:?}"));
    cache::digest_of(everything.as_bytes())
}

fn is_source(path: &str) -> bool {
    !path.ends_with(".md") && !NOT_IN_PROGRAMS.iter().any(|start| path.starts_with(start))
}

/// Puts a program of the cache in its place, in one step: another one may be running from there.
fn install(kept: &Path, program: &Path) -> Result<()> {
    if is_same(kept, program)? {
        return Ok(());
    }
    if let Some(parent) = program.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    let temporary = program.with_extension("new");
    fs::copy(kept, &temporary)
        .and_then(|_| fs::rename(&temporary, program))
        .with_context(|| format!("copying {} to {}", kept.display(), program.display()))
}

fn is_same(kept: &Path, program: &Path) -> Result<bool> {
    let Ok(there) = fs::metadata(program) else { return Ok(false) };
    Ok(there.len() == fs::metadata(kept)?.len()
        && cache::digest_of_file(kept)? == cache::digest_of_file(program)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_what_can_be_in_a_program() {
        for path in
            ["Cargo.lock", "crates/types/src/lib.rs", "migrations/0001.sql", "proto/a.proto", ".sqlx/q.json"]
        {
            assert!(is_source(path), "{path}");
        }
        for path in ["README.md", "xtask/src/main.rs", "guest/templates/base/recipe", "bench/src/main.rs"] {
            assert!(!is_source(path), "{path}");
        }
    }
}
