//! Compiled dependencies, shared by the clones on this machine.
//!
//! ```text
//!  a new clone's target/PROFILE  ◄── links ──  the cache's dependencies/PROFILE      before its first build
//!  target/PROFILE                ── links ──►  the cache's dependencies/PROFILE      after a build
//!                                              .fingerprint/NAME-HASH   deps/*-HASH*   build/NAME-HASH
//! ```
//!
//! A crate from a registry never changes, and the hash in cargo's names for it covers all else: version,
//! features, profile, compiler, flags. So what one clone compiled is what another would compile. If cargo
//! thinks otherwise, it compiles again; nothing here can make it take a wrong file for a right one.
//!
//! Why not one cargo build directory for all clones: cargo names the workspace's own crates by their path
//! *inside* of the workspace and then trusts file times, so that one clone takes another's programs for its
//! own. That was tried, and seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    cache::{self, Cache},
    repository::Repository,
};

/// Where cargo puts things for each kind of build that xtask starts, below `target/`.
const PROFILES: [&str; 4] = ["debug", "release", "guest/guest", "guest/x86_64-unknown-linux-gnu/guest"];
/// Crates whose compiled form names the directory it was compiled in, and reads from there when it runs.
const TIED_TO_THEIR_PLACE: [&str; 2] = ["rust-embed", "utoipa-swagger-ui"];
/// Held while links are made in either direction.
const LOCK: &str = "dependencies";

/// Links what is in the cache into the places where this clone has built nothing yet.
pub(crate) fn take(repository: &Repository, cache: &Cache) -> Result<()> {
    let _lock = cache.lock(LOCK)?;
    for profile in PROFILES {
        let (pool, target) = (cache.place(LOCK).join(profile), repository.target().join(profile));
        if pool.is_dir() && !target.join(".fingerprint").exists() {
            link_units(&pool, &target, &|_| true)
                .with_context(|| format!("linking from {}", pool.display()))?;
        }
    }
    Ok(())
}

/// Links what this clone has compiled of its dependencies into the cache.
pub(crate) fn give(repository: &Repository, cache: &Cache) -> Result<()> {
    let lock_file = repository.path("Cargo.lock");
    let text = fs::read_to_string(&lock_file).with_context(|| format!("reading {}", lock_file.display()))?;
    let shared = shared_packages(&text);
    let _lock = cache.lock(LOCK)?;
    for profile in PROFILES {
        let (pool, target) = (cache.place(LOCK).join(profile), repository.target().join(profile));
        if target.join(".fingerprint").is_dir() {
            link_units(&target, &pool, &|package| shared.contains(package))
                .with_context(|| format!("linking into {}", pool.display()))?;
        }
    }
    Ok(())
}

/// The packages of a lock file that come from a registry.
fn shared_packages(lock_file: &str) -> BTreeSet<String> {
    let mut packages = BTreeSet::new();
    for package in lock_file.split("[[package]]") {
        let field = |name: &str| {
            package.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \"")?.strip_suffix('"'))
        };
        if let (Some(name), Some(source)) = (field("name"), field("source"))
            && source.starts_with("registry+")
            && !TIED_TO_THEIR_PLACE.contains(&name)
        {
            packages.insert(name.to_owned());
        }
    }
    packages
}

/// Makes the units of some packages in `from` be in `to` as well, those that are not there yet.
fn link_units(from: &Path, to: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
    for directory in [".fingerprint", "deps", "build"] {
        fs::create_dir_all(to.join(directory))?;
    }
    let mut compiled: BTreeMap<String, Vec<OsString>> = BTreeMap::new();
    for entry in fs::read_dir(from.join("deps"))? {
        let name = entry?.file_name();
        if let Some(hash) = hash(&name.to_string_lossy()) {
            compiled.entry(hash.to_owned()).or_default().push(name);
        }
    }
    for entry in fs::read_dir(from.join(".fingerprint"))? {
        let entry = entry?;
        let unit = entry.file_name().to_string_lossy().into_owned();
        let Some((package, hash)) = unit.rsplit_once('-') else { continue };
        let marker = to.join(".fingerprint").join(&unit);
        if !wanted(package) || marker.exists() || !is_complete(&entry.path())? {
            continue;
        }
        for name in compiled.get(hash).into_iter().flatten() {
            link(&from.join("deps").join(name), &to.join("deps").join(name))?;
        }
        let build = from.join("build").join(&unit);
        if build.is_dir() {
            link_tree(&build, &to.join("build").join(&unit))?;
        }
        // Last, and at once: what has a fingerprint is complete.
        let temporary = to.join(".fingerprint").join(format!("{unit}.new"));
        cache::remove(&temporary)?;
        link_tree(&entry.path(), &temporary)?;
        fs::rename(&temporary, &marker)?;
    }
    Ok(())
}

/// Cargo writes the description of a unit, in JSON, when it has compiled it.
fn is_complete(fingerprint: &Path) -> Result<bool> {
    for entry in fs::read_dir(fingerprint)? {
        if entry?.path().extension().is_some_and(|extension| extension == "json") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `libserde-0123456789abcdef.rlib` has the hash `0123456789abcdef`.
fn hash(name: &str) -> Option<&str> {
    let stem = name.split('.').next()?;
    let (_, hash) = stem.rsplit_once('-')?;
    (hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(hash)
}

fn link_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            link_tree(&source, &target)?;
        } else {
            link(&source, &target)?;
        }
    }
    Ok(())
}

/// One file with two names where that is possible, else a copy with the same time, which cargo looks at.
fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            fs::copy(from, to)?;
            let modified = fs::metadata(from)?.modified()?;
            fs::File::options().append(true).open(to)?.set_modified(modified)?;
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result.with_context(|| format!("linking {}", PathBuf::from(from).display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_at_the_end_of_names() {
        assert_eq!(hash("libserde_json-0123456789abcdef.rlib"), Some("0123456789abcdef"));
        assert_eq!(hash("serde-0123456789abcdef.d"), Some("0123456789abcdef"));
        assert_eq!(hash("build_script_build-0123456789abcdef"), Some("0123456789abcdef"));
        assert_eq!(hash("serde_json.d"), None);
        assert_eq!(hash("some-crate.d"), None);
    }

    #[test]
    fn only_what_a_registry_gave_is_shared() {
        let text = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\
                    source = \"registry+index\"\n\n[[package]]\nname = \"wrenn\"\nversion = \"0.1.0\"\n\n\
                    [[package]]\nname = \"rust-embed\"\nversion = \"1.0.0\"\nsource = \"registry+index\"\n";
        assert_eq!(shared_packages(text), BTreeSet::from(["a".to_owned()]));
    }

    #[test]
    fn complete_units_of_wanted_packages_are_linked() {
        const HASH: &str = "0123456789abcdef";
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        for (package, complete) in [("some-crate", true), ("half-made", false), ("ours", true)] {
            let fingerprint = from.join(format!(".fingerprint/{package}-{HASH}"));
            fs::create_dir_all(&fingerprint).unwrap();
            fs::write(fingerprint.join(if complete { "lib-x.json" } else { "invoked.timestamp" }), "")
                .unwrap();
            fs::create_dir_all(from.join(format!("build/{package}-{HASH}/out"))).unwrap();
            fs::write(from.join(format!("build/{package}-{HASH}/out/generated")), "x").unwrap();
        }
        fs::create_dir_all(from.join("deps")).unwrap();
        fs::write(from.join(format!("deps/libsome_crate-{HASH}.rlib")), "x").unwrap();
        link_units(&from, &to, &|package| package != "ours").unwrap();
        let units: Vec<_> =
            fs::read_dir(to.join(".fingerprint")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(units, [OsString::from(format!("some-crate-{HASH}"))]);
        assert!(to.join(format!("deps/libsome_crate-{HASH}.rlib")).exists());
        assert!(to.join(format!("build/some-crate-{HASH}/out/generated")).exists());
        // Again, with everything there.
        link_units(&from, &to, &|package| package != "ours").unwrap();
    }
}
