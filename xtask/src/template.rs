//! Templates: a recipe becomes an ext4 image.
//!
//! ```text
//!  recipe ─► mmdebstrap ─► a directory ─► users, files ─► mke2fs -d ─► image.ext4 (sparse, shrunk)
//! ```
//!
//! Nothing is mounted and nothing of the guest is run but its packages' own set-up scripts, in a chroot.
//! Packages come through the machine's own apt sources, which are therefore the guest's, too.
//!
//! The directory in the cache is named by the recipe, the image by its content: an image that was made anew
//! from newer packages is another image, and no snapshot of the older one is used with it.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    cache::{self, Cache},
    debian, host,
    recipe::{self, Alias, Change, Recipe},
    repository::Repository,
    root_tree::{BLOCK, RootTree, Size},
    step,
};

/// Changes when the same recipe gives another image.
const FORMAT: &str = "1";
const MIB: u64 = 1 << 20;
/// A disk for each inode of that size, as mke2fs does by default, also after the disk has grown.
const BYTES_PER_INODE: u64 = 16384;
const INODE_BYTES: u64 = 256;
const JOURNAL_MIB: u64 = 32;
/// How far an image can grow while it is in use, in blocks: to 1 TiB. Costs half a MiB per copy of the table.
const MAX_BLOCKS: u64 = (1 << 40) / BLOCK;

/// Finds or makes the template whose recipe is in `guest/templates/NAME`.
pub(crate) fn make(repository: &Repository, cache: &Cache, name: &str, refresh: bool) -> Result<PathBuf> {
    let path = repository.path("guest/templates").join(name).join("recipe");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let recipe = recipe::parse(&text).with_context(|| format!("reading {}", path.display()))?;
    // A refreshed template keeps its name until the recipe changes; the note tells them apart.
    let note = cache.note(&format!("template-{name}"));
    if refresh {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        fs::write(&note, now.to_string())?;
    }
    let refreshed = fs::read_to_string(&note).unwrap_or_default();
    let key = cache::digest_of(format!("{FORMAT}\n{refreshed}\n{name}\n{text}").as_bytes())?;
    cache
        .get_or_make("templates", &format!("{name}-{key}"), |directory| {
            build(repository, name, &recipe, &key, directory)
        })
        .with_context(|| format!("making the template {name}"))
}

/// Makes the image of a tree in which a recipe's packages are, and removes the tree. Gives the image's size in MiB.
pub(crate) fn finish(
    repository: &Repository,
    name: &str,
    recipe: &Recipe,
    root: &Path,
    key: &str,
    image: &Path,
) -> Result<u64> {
    let tree = RootTree::at(root);
    tree.remove_traces()?;
    tree.add_users(&recipe.users)?;
    for change in &recipe.changes {
        tree.change(change)?;
    }
    let mib = image_mib(tree.size()?, recipe.free_mib);
    make_filesystem(repository, name, root, key, mib, image)?;
    cache::remove(root)?;
    Ok(mib)
}

fn build(repository: &Repository, name: &str, recipe: &Recipe, key: &str, directory: &Path) -> Result<()> {
    host::require_root(&format!("making the template `{name}` (its files belong to several users)"))?;
    if !debian::has_lists() {
        debian::update(repository)?;
    }
    let root = directory.join("root");
    unpack_packages(repository, name, recipe, &root)?;
    let image = directory.join("image.ext4");
    let mib = finish(repository, name, recipe, &root, key, &image)?;

    let image_id = cache::digest_of_file(&image)?;
    let manifest = manifest(name, recipe, &image_id, mib);
    fs::write(directory.join("template.json"), format!("{manifest:#}\n"))?;
    Ok(())
}

/// Unpacks a recipe's packages into a new directory.
pub(crate) fn unpack_packages(
    repository: &Repository,
    name: &str,
    recipe: &Recipe,
    root: &Path,
) -> Result<()> {
    // The name's ending tells apt the format, and the name is the one in the guest.
    let sources = root.with_file_name("debian.list");
    let apt = root.with_file_name("apt.conf");
    let dpkg = root.with_file_name("dpkg.conf");
    write_lines(&sources, &debian::sources(&recipe.suite)?)?;
    write_lines(&apt, &debian::acquire_options()?)?;
    write_lines(&dpkg, &dpkg_options(recipe))?;
    let mut command = Command::new("mmdebstrap");
    command
        // In a directory that the caller chose, as root, without a look at the caller's environment.
        .env("LC_ALL", "C.UTF-8")
        .env_remove("TMPDIR")
        .args(["--mode=root", "--variant=apt", "--format=directory"])
        .arg(format!("--include={}", recipe.packages.join(",")))
        .arg(format!("--aptopt={}", apt.display()))
        .arg(format!("--dpkgopt={}", dpkg.display()))
        .arg(&recipe.suite)
        .arg(root)
        .arg(&sources);
    let what =
        format!("making the template `{name}`: unpacking Debian packages (usually less than a minute)");
    step::quiet(&what, &repository.log(&format!("template-{name}")), &mut command)?;
    for file in [sources, apt, dpkg] {
        cache::remove(&file)?;
    }
    Ok(())
}

/// What the image tells its own dpkg also holds while it is made.
fn dpkg_options(recipe: &Recipe) -> Vec<String> {
    recipe
        .changes
        .iter()
        .filter_map(|change| match change {
            Change::File { path, content, .. } if path.starts_with("etc/dpkg/dpkg.cfg.d/") => {
                Some(content.lines())
            }
            _ => None,
        })
        .flatten()
        .map(str::to_owned)
        .collect()
}

fn write_lines(path: &Path, lines: &[String]) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    Ok(())
}

/// The size of an image with that content: the content, what ext4 needs for itself, and free space.
fn image_mib(size: Size, free_mib: u64) -> u64 {
    // Directories, extents and block maps beyond what the sizes of files tell.
    let content = size.blocks + size.blocks / 32;
    let wanted = content * BLOCK / MIB + free_mib + JOURNAL_MIB;
    // Inode tables, two bitmaps in each group of 128 MiB, and the tables of groups with room to grow.
    let tables = wanted * MIB / BYTES_PER_INODE * INODE_BYTES / MIB + 4;
    (wanted + tables).next_multiple_of(64)
}

fn make_filesystem(
    repository: &Repository,
    name: &str,
    root: &Path,
    key: &str,
    mib: u64,
    image: &Path,
) -> Result<()> {
    File::create_new(image)?.set_len(mib * MIB)?;
    let identity = uuid(key);
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-b", &BLOCK.to_string(), "-m", "0", "-L", name, "-U", &identity])
        .args(["-I", &INODE_BYTES.to_string(), "-i", &BYTES_PER_INODE.to_string(), "-J", &format!("size={JOURNAL_MIB}")])
        // The image is a fresh sparse file: what was never written is zero, and must not be written to say so.
        .args(["-E", &format!("assume_storage_prezeroed=1,lazy_itable_init=1,nodiscard,hash_seed={identity},resize={MAX_BLOCKS}")])
        .arg("-d")
        .arg(root)
        .arg(image);
    step::quiet(
        &format!("making the template `{name}`: image of {mib} MiB"),
        &repository.log("mke2fs"),
        &mut make,
    )?;
    // The same holds for what is added when the disk grows: without this option, the guest's kernel writes
    // 2 MiB of zeros for each 128 MiB in the background, into every sandbox's own disk.
    step::output(Command::new("tune2fs").args(["-E", "mount_opts=noinit_itable"]).arg(image))?;
    let check = Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().context("starting e2fsck")?;
    ensure!(check.status.success(), "the image is damaged: {}", String::from_utf8_lossy(&check.stdout));
    Ok(())
}

/// An identity for the filesystem that the same recipe gives again.
fn uuid(key: &str) -> String {
    let digits: String = key.chars().cycle().take(32).collect();
    format!("{}-{}-4{}-8{}-{}", &digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..])
}

fn manifest(name: &str, recipe: &Recipe, image_id: &str, mib: u64) -> serde_json::Value {
    let aliases: Vec<_> = recipe
        .aliases
        .iter()
        .map(|Alias { name, identity }| {
            json!({"name": name, "default_user": identity.user, "default_workdir": identity.directory})
        })
        .collect();
    json!({
        "format": 1,
        "name": name,
        "aliases": aliases,
        "default_user": recipe.default.user,
        "default_workdir": recipe.default.directory,
        "image": "image.ext4",
        "image_id": image_id,
        "minimum_disk_mib": mib,
    })
}

/// The names of all templates that have a recipe here.
pub(crate) fn names(repository: &Repository) -> Result<Vec<String>> {
    let directory = repository.path("guest/templates");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if entry.path().join("recipe").is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_room_for_its_content_and_more() {
        let size = Size { blocks: 200 * MIB / BLOCK, inodes: 7000 };
        let mib = image_mib(size, 300);
        assert!(mib >= 200 + 300 + JOURNAL_MIB, "{mib}");
        assert!(mib < 700, "{mib}");
        assert_eq!(mib % 64, 0);
    }

    #[test]
    fn identities_are_of_the_usual_form() {
        assert_eq!(uuid("0123456789abcdef"), "01234567-89ab-4def-8123-456789abcdef");
    }

    #[test]
    fn dpkg_options_come_from_the_recipe() {
        let recipe = recipe::parse(include_str!("../../guest/templates/base/recipe")).unwrap();
        assert!(dpkg_options(&recipe).contains(&"force-unsafe-io".to_owned()));
    }
}
