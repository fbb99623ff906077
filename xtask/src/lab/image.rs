//! What every lab starts from: a kernel, all of its modules, and a root disk that is made of Debian packages.
//!
//! ```text
//!  the kernel's package ─► kernel and the modules of the initramfs
//!                       └► all modules ─┐
//!  lab/recipe ─► mmdebstrap ────────────┴► depmod ─► mke2fs -d ─► image.ext4
//! ```
//!
//! It is made once and kept in the cache, named by the recipe and by the kernel that guests have too: which is chosen
//! once, and anew by `cargo xtask images --refresh`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    cache::{self, Cache},
    debian::{self, Package},
    host,
    kernel::{self, Kernel},
    packages,
    recipe::{self, Recipe},
    repository::Repository,
    step, template,
};

/// Changes when the same recipe and kernel give another image.
const FORMAT: &str = "1";
const KIND: &str = "labs";
/// The name by which steps and logs call it.
const NAME: &str = "lab";
const DISK: &str = "image.ext4";
/// How many are kept: that of this clone, and that of one with another recipe.
const KEPT: usize = 2;
/// What the first process needs before it has a root disk: the bus, the disks, the port to the host.
const FIRST_MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_console"];

/// An image, ready to be started from.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: Kernel,
    pub(super) disk: PathBuf,
    /// What is loaded before the first program.
    pub(super) modules: Vec<String>,
}

/// Finds or makes it.
pub(super) fn find_or_make(repository: &Repository, cache: &Cache) -> Result<Image> {
    let read = |name: &str| {
        let path = repository.path("lab").join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let (text, modules) = (read("recipe")?, read("modules.txt")?);
    let recipe = recipe::parse(&text).context("reading lab/recipe")?;
    let package = kernel::choose(repository, cache, false)?;
    let key = key(&package, &text)?;
    let directory = cache
        .get_or_make(KIND, &key, |directory| make(repository, &recipe, &package, &key, directory))
        .context("making the root disk of the lab")?;
    let disk = directory.join(DISK);
    cache::mark_used(&disk)?;
    cache.forget_old(KIND, DISK, KEPT)?;
    let modules = packages::names(&modules).into_iter().map(str::to_owned).collect();
    Ok(Image { kernel: kernel::read(&directory)?, disk, modules })
}

fn key(package: &Package, recipe: &str) -> Result<String> {
    let first = FIRST_MODULES.join(" ");
    cache::digest_of(format!("{FORMAT}\n{}\n{}\n{first}\n{recipe}", package.name, package.version).as_bytes())
}

fn make(
    repository: &Repository,
    recipe: &Recipe,
    package: &Package,
    key: &str,
    directory: &Path,
) -> Result<()> {
    host::require_root("making the root disk of the lab (its files belong to several users)")?;
    if !debian::has_lists() {
        debian::update(repository)?;
    }
    let unpacked = kernel::unpack(repository, package, "the kernel of the lab", directory)?;
    kernel::keep(&unpacked, &FIRST_MODULES, directory)?;
    let root = directory.join("root");
    template::unpack_packages(repository, NAME, recipe, &root)?;
    add_modules(&kernel::modules_directory(&unpacked)?, &root)?;
    cache::remove(&unpacked)?;
    template::finish(repository, NAME, recipe, &root, key, &directory.join(DISK))?;
    Ok(())
}

/// Moves the modules of a kernel into the tree, and lets the tree's own program write what `modprobe` reads.
fn add_modules(modules: &Path, root: &Path) -> Result<()> {
    let version = modules.file_name().context("a directory of modules has a name")?;
    let all = root.join("lib/modules");
    fs::create_dir_all(&all).with_context(|| format!("making {}", all.display()))?;
    fs::rename(modules, all.join(version)).context("moving the kernel's modules to the root disk")?;
    step::output(Command::new("chroot").arg(root).arg("/sbin/depmod").arg(version)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_kernel_or_another_recipe_is_another_image() {
        let package = |version: &str| Package { name: "linux".to_owned(), version: version.to_owned() };
        let keys = [("1", "a"), ("2", "a"), ("1", "b")]
            .map(|(version, recipe)| key(&package(version), recipe).unwrap());
        assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[1] != keys[2], "{keys:?}");
        assert_eq!(keys[0], key(&package("1"), "a").unwrap());
    }

    #[test]
    fn the_recipe_has_what_tests_call() {
        let recipe = recipe::parse(include_str!("../../../lab/recipe")).unwrap();
        for package in ["btrfs-progs", "dmsetup", "iproute2", "kmod", "nftables", "postgresql", "xfsprogs"] {
            assert!(recipe.packages.iter().any(|name| name == package), "{package}");
        }
        let modules = packages::names(include_str!("../../../lab/modules.txt"));
        for module in ["kvm_amd", "dm_snapshot", "loop", "tun", "veth", "nf_tables", "xfs"] {
            assert!(modules.contains(&module), "{module}");
        }
    }
}
