//! The guest bundle: kernel and initramfs, with envd as its `/init`.
//!
//! ```text
//!  /init            envd, static
//!  /modules/*.ko    kernel modules
//!  /modules/order   their names, one a line, in load order
//!  /dev/console     so that init can speak before it has mounted anything
//!  /proc /sys /run /tmp /newroot     empty, to mount on
//! ```
//!
//! The bundle is named by its content. Putting it together takes a moment, so it is done each time.
//!
//! Beside the compressed image of the kernel there is the kernel that is in it, which Firecracker starts: see [`vmlinux`]. It
//! follows from the image, and so is no part of the name.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    cache::{self, Cache},
    cpio::Archive,
    dependencies,
    elf::Elf,
    kernel::Kernel,
    programs,
    repository::Repository,
    step, vmlinux,
};

/// The kind of result that bundles are in the cache, and the file that each has.
const KIND: &str = "guests";
const MANIFEST: &str = "manifest.json";
/// How many bundles are kept: each clone links to the one that it made last.
const KEPT: usize = 12;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What envd may weigh: it is in the memory of every sandbox.
const ENVD_MAX_BYTES: usize = 4_000_000;

/// Finds or builds the static envd. Nothing but the kernel is needed to run it.
pub(crate) fn build_envd(repository: &Repository, cache: &Cache) -> Result<PathBuf> {
    let (envd, content) = build_static(repository, cache, "envd", "envd", "building envd, the guest agent")?;
    ensure!(
        content.len() < ENVD_MAX_BYTES,
        "{} has {} bytes; it must stay below {ENVD_MAX_BYTES}",
        envd.display(),
        content.len()
    );
    Ok(envd)
}

/// Finds or builds a static program of this workspace, and reads it.
pub(crate) fn build_static(
    repository: &Repository,
    cache: &Cache,
    package: &str,
    program: &str,
    what: &str,
) -> Result<(PathBuf, Vec<u8>)> {
    // A target directory of its own and an explicit target: the flags reach the program and what it links, and
    // neither build scripts nor any other crate of the workspace.
    let directory = repository.target().join("guest");
    let path = directory.join(TARGET).join("guest").join(program);
    programs::find_or_build(repository, cache, &path, || {
        let mut command = repository.cargo();
        command
            .args(["build", "--profile", "guest", "--target", TARGET, "--package", package, "--target-dir"])
            .arg(&directory)
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
        step::loud(what, &mut command)?;
        dependencies::give(repository, cache)
    })?;
    let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Elf::parse(&content)
        .and_then(|elf| elf.assert_static())
        .with_context(|| format!("{} is not a static program", path.display()))?;
    Ok((path, content))
}

/// Puts the bundle together and gives its directory.
pub(crate) fn make(cache: &Cache, kernel: &Kernel, envd: &Path) -> Result<PathBuf> {
    let envd_content = fs::read(envd).with_context(|| format!("reading {}", envd.display()))?;
    let archive = initramfs(kernel, &envd_content)?;
    let parts = format!("1\n{}\n{}\n", cache::digest_of_file(&kernel.image)?, cache::digest_of(&archive)?);
    let id = cache::digest_of(parts.as_bytes())?;
    let bundle = cache.get_or_make(KIND, &id, |directory| {
        fs::copy(&kernel.image, directory.join("vmlinuz"))?;
        fs::write(directory.join("initramfs.img"), &archive)?;
        let manifest = json!({
            "format": 1,
            "id": id,
            "kernel_version": kernel.version,
            "envd_version": env!("CARGO_PKG_VERSION"),
            "kernel": "vmlinuz",
            "initramfs": "initramfs.img",
        });
        fs::write(directory.join(MANIFEST), format!("{manifest:#}\n"))?;
        step::announce(&format!(
            "guest bundle {id}: kernel {}, envd {} kB",
            kernel.version,
            envd_content.len() / 1000
        ));
        Ok(())
    })?;
    if let Some(vmlinux) = vmlinux::find_or_make(cache, &kernel.image)? {
        vmlinux::add_to(&bundle, &vmlinux)?;
    }
    cache::mark_used(&bundle.join(MANIFEST))?;
    cache.forget_old(KIND, MANIFEST, KEPT)?;
    Ok(bundle)
}

/// The archive that the kernel starts from: its first process, and its modules.
pub(crate) fn initramfs(kernel: &Kernel, init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "newroot", "proc", "run", "sys", "tmp"] {
        archive.directory(directory, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, init)?;
    let mut order = String::new();
    for (name, content) in &kernel.modules {
        archive.file(&format!("modules/{name}"), 0o644, content)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()
}
