//! The guest's kernel: Debian's cloud kernel, downloaded and unpacked but not installed, or one of your own.
//!
//! Which version is used is decided once and noted in the cache, so that set-up needs no network later and
//! every clone on a machine agrees; `cargo xtask images --refresh` decides anew.
//!
//! `WRENN_KERNEL` names another kernel image. `WRENN_KERNEL_MODULES` then names its modules directory
//! (`…/lib/modules/VERSION`); without it the kernel must have what `guest/kernel/modules.txt` lists built in.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    cache::{self, Cache},
    debian::{self, Package},
    elf::Elf,
    host, packages,
    repository::Repository,
};

/// The metapackage that stands for Debian's newest kernel for virtual machines.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
/// Changes when what is kept of a kernel package changes.
const FORMAT: &str = "1";
/// The note of the kernel in use.
const NOTE: &str = "kernel";

/// A kernel with the modules that guests need.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// As the kernel calls itself.
    pub(crate) version: String,
    pub(crate) image: PathBuf,
    /// Name and content, in load order.
    pub(crate) modules: Vec<(String, Vec<u8>)>,
}

/// Finds or fetches the kernel.
pub(crate) fn find(repository: &Repository, cache: &Cache, refresh: bool) -> Result<Kernel> {
    let list = repository.path("guest/kernel/modules.txt");
    let list = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let wanted = packages::names(&list);
    if let Some(image) = env::var_os("WRENN_KERNEL") {
        let image = PathBuf::from(image);
        let modules = match env::var_os("WRENN_KERNEL_MODULES") {
            Some(directory) => Modules::scan(Path::new(&directory))?.in_load_order(&wanted)?,
            None => Vec::new(),
        };
        let version =
            version(&fs::read(&image).with_context(|| format!("reading WRENN_KERNEL {}", image.display()))?);
        return Ok(Kernel { version, image, modules });
    }

    let package = choose(repository, cache, refresh)?;
    let name = format!(
        "{}-{}",
        package.name,
        cache::digest_of(format!("{FORMAT}\n{}\n{}\n", package.version, wanted.join(" ")).as_bytes())?
    );
    let directory = cache
        .get_or_make("kernels", &name, |directory| fetch(repository, &package, &wanted, directory))
        .context("fetching the guest's kernel")?;
    read(&directory)
}

/// The package of the note, or the newest if there is no note or a newer one is asked for.
pub(crate) fn choose(repository: &Repository, cache: &Cache, refresh: bool) -> Result<Package> {
    let note = cache.note(NOTE);
    if !refresh
        && let Ok(text) = fs::read_to_string(&note)
        && let Some((name, version)) = text.trim().split_once(' ')
    {
        return Ok(Package { name: name.to_owned(), version: version.to_owned() });
    }
    if refresh || !debian::has_lists() {
        host::require_root("looking for the newest guest kernel (apt-get update)")?;
        debian::update(repository)?;
    }
    let package = debian::behind_metapackage(METAPACKAGE)?;
    write_note(&note, &package)?;
    Ok(package)
}

fn write_note(note: &Path, package: &Package) -> Result<()> {
    let temporary = note.with_extension(std::process::id().to_string());
    fs::write(&temporary, format!("{} {}\n", package.name, package.version))?;
    fs::rename(&temporary, note).with_context(|| format!("writing {}", note.display()))
}

fn fetch(repository: &Repository, package: &Package, wanted: &[&str], directory: &Path) -> Result<()> {
    let unpacked = unpack(repository, package, "the guest's kernel", directory)?;
    keep(&unpacked, wanted, directory)?;
    cache::remove(&unpacked)
}

/// Downloads the kernel's package and unpacks it into a new directory in the given one.
pub(crate) fn unpack(
    repository: &Repository,
    package: &Package,
    what: &str,
    directory: &Path,
) -> Result<PathBuf> {
    let unpacked = directory.join("package");
    fs::create_dir(&unpacked)?;
    if debian::download_and_unpack(repository, package, what, &unpacked).is_err() {
        // The archive keeps only the newest versions, and the lists may be older than it.
        host::require_root("updating the lists of Debian packages")?;
        debian::update(repository)?;
        debian::download_and_unpack(repository, package, what, &unpacked).with_context(|| {
            format!(
                "{} {} is no longer to be had: `cargo xtask images --refresh` chooses a newer one",
                package.name, package.version
            )
        })?;
    }
    Ok(unpacked)
}

/// Keeps of an unpacked package what [`read`] reads.
pub(crate) fn keep(unpacked: &Path, wanted: &[&str], directory: &Path) -> Result<()> {
    let image = only_entry(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    fs::copy(&image, directory.join("vmlinuz"))?;
    let modules = Modules::scan(&modules_directory(unpacked)?)?.in_load_order(wanted)?;
    fs::create_dir(directory.join("modules"))?;
    let mut order = String::new();
    for (name, content) in modules {
        fs::write(directory.join("modules").join(&name), content)?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(directory.join("modules/order"), order)?;
    Ok(())
}

/// Where an unpacked package has its modules; the directory's name is the kernel's version.
pub(crate) fn modules_directory(unpacked: &Path) -> Result<PathBuf> {
    only_entry(&unpacked.join("lib/modules"), |_| true)
}

/// Reads what was kept in a directory of the cache.
pub(crate) fn read(directory: &Path) -> Result<Kernel> {
    let image = directory.join("vmlinuz");
    let version = version(&fs::read(&image).with_context(|| format!("reading {}", image.display()))?);
    let order = directory.join("modules/order");
    let order = fs::read_to_string(&order).with_context(|| format!("reading {}", order.display()))?;
    let modules = order
        .lines()
        .map(|name| {
            let path = directory.join("modules").join(name);
            Ok((name.to_owned(), fs::read(&path).with_context(|| format!("reading {}", path.display()))?))
        })
        .collect::<Result<_>>()?;
    Ok(Kernel { version, image, modules })
}

fn only_entry(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => bail!("expected one kernel in {}, found {}", directory.display(), found.len()),
    }
}

/// The version that a bzImage carries in its header, else the one in its text.
fn version(image: &[u8]) -> String {
    let in_header = || {
        if image.get(0x202..0x206)? != b"HdrS" {
            return None;
        }
        let pointer = u16::from_le_bytes([*image.get(0x20e)?, *image.get(0x20f)?]);
        image.get(0x200 + usize::from(pointer)..)
    };
    let in_text = || {
        const MARK: &[u8] = b"Linux version ";
        let at = image.windows(MARK.len()).position(|window| window == MARK)?;
        image.get(at + MARK.len()..)
    };
    in_header()
        .or_else(in_text)
        .and_then(|text| text.split(|byte| matches!(byte, b' ' | 0)).next())
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// A modules directory: which file holds a module, and which modules need none.
#[derive(Debug, Default)]
struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
}

impl Modules {
    fn scan(directory: &Path) -> Result<Self> {
        let mut modules = Self::default();
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in
                fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    directories.push(entry.path());
                } else if let Some(name) = module_name(&entry.file_name().to_string_lossy()) {
                    modules.files.insert(name, entry.path());
                }
            }
        }
        // Absent where everything is a module.
        let built_in = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        modules.built_in =
            built_in.lines().filter_map(|path| module_name(path.rsplit('/').next()?)).collect();
        Ok(modules)
    }

    /// The wanted modules and all that they depend on, dependencies first.
    fn in_load_order(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order = Vec::new();
        let mut on_the_way = Vec::new();
        for module in wanted {
            self.add(&normal(module), &mut order, &mut on_the_way)?;
        }
        Ok(order.into_iter().map(|(name, content)| (format!("{name}.ko"), content)).collect())
    }

    fn add(
        &self,
        module: &str,
        order: &mut Vec<(String, Vec<u8>)>,
        on_the_way: &mut Vec<String>,
    ) -> Result<()> {
        if self.built_in.iter().any(|name| name == module) || order.iter().any(|(name, _)| name == module) {
            return Ok(());
        }
        ensure!(
            !on_the_way.iter().any(|name| name == module),
            "the kernel module {module} depends on itself"
        );
        let Some(path) = self.files.get(module) else {
            bail!("the kernel has no module {module}, and does not have it built in either");
        };
        let content = content(path)?;
        let depends = Elf::parse(&content)
            .and_then(|elf| elf.module_info("depends"))
            .with_context(|| format!("reading the kernel module {}", path.display()))?
            .unwrap_or_default()
            .to_owned();
        on_the_way.push(module.to_owned());
        for dependency in depends.split(',').filter(|name| !name.is_empty()) {
            self.add(&normal(dependency), order, on_the_way)?;
        }
        on_the_way.pop();
        order.push((module.to_owned(), content));
        Ok(())
    }
}

/// `virtio-rng.ko.xz` holds the module `virtio_rng`.
fn module_name(file: &str) -> Option<String> {
    let name = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    Some(normal(name))
}

fn normal(module: &str) -> String {
    module.replace('-', "_")
}

/// A module's content, decompressed. Debian 12's are plain; other kernels' need a program that is named.
fn content(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => "gzip",
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("reading {}", path.display())),
    };
    let output = Command::new(program)
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .with_context(|| format!("starting {program}, to decompress {}", path.display()))?;
    ensure!(output.status.success(), "{program} cannot decompress {}", path.display());
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_files_have_names() {
        assert_eq!(module_name("virtio-rng.ko").as_deref(), Some("virtio_rng"));
        assert_eq!(module_name("overlay.ko.xz").as_deref(), Some("overlay"));
        assert_eq!(module_name("modules.dep"), None);
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error_and_a_built_in_one_is_not() {
        let modules = Modules { built_in: vec!["ext4".to_owned()], ..Modules::default() };
        assert_eq!(modules.in_load_order(&["ext4"]).unwrap(), []);
        let error = modules.in_load_order(&["overlay"]).unwrap_err().to_string();
        assert!(error.contains("overlay"), "{error}");
    }

    #[test]
    fn the_version_is_in_the_header_or_in_the_text() {
        let mut image = vec![0; 0x200];
        image.extend_from_slice(b"\0\0HdrS\0\0\0\0\0\0\0\0\x20\0");
        image.resize(0x220, 0);
        image.splice(0x20e..0x210, [0x20, 0]);
        image.extend_from_slice(b"6.1.0-9-cloud-amd64 (builder@host) #1\0");
        assert_eq!(version(&image), "6.1.0-9-cloud-amd64");
        assert_eq!(version(b"\x7fELF.....Linux version 6.6.1 (gcc)"), "6.6.1");
        assert_eq!(version(b""), "unknown");
    }
}
