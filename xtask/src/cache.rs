//! The user's cache: results that cost time, each in a directory named by everything it was made from.
//!
//! ```text
//!  $XDG_CACHE_HOME/wrenn        (~/.cache/wrenn)
//!   ├── kernels/<package>-<digest>/       vmlinuz, modules and their load order
//!   ├── guests/<content digest>/          vmlinuz, vmlinux, initramfs.img, manifest.json
//!   ├── vmlinux/<digest of the image>/    vmlinux: what is compressed in it, see [`crate::vmlinux`]
//!   ├── templates/<name>-<digest>/        image.ext4, template.json
//!   ├── labs/<digest>/                    root disk, kernel and modules of the lab, see [`crate::lab`]
//!   ├── programs/<name>-<digest>/         programs of this workspace, see [`crate::programs`]
//!   ├── tools/<tool>-<version>/           programs of the checks
//!   ├── firecracker/<version>-<digest>/   firecracker, jailer: a release that was asked for, see [`crate::firecracker`]
//!   ├── dependencies/                     compiled dependencies, see [`crate::dependencies`]
//!   ├── tmp/<kind>-<name>/                one of the above while it is being made
//!   └── locks/<kind>-<name>               held by its maker
//! ```
//!
//! **A directory that is there is complete**: it is made below `tmp/`, synced, then renamed. Its maker holds
//! its lock, so of two clones that want the same thing one makes it and the other waits and finds it. What
//! is found in `tmp/` with a free lock was left by a maker that died, and is removed.

use std::{
    env,
    fs::{self, File, TryLockError},
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};

use crate::step;

/// How many hexadecimal digits of a SHA-256 name a content.
const DIGITS: usize = 16;
/// How many there are.
const SHA256_DIGITS: usize = 64;

/// The cache directory.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the user's cache and removes what dead makers left.
    pub(crate) fn open() -> Result<Self> {
        let home = |variable, below: &str| {
            env::var_os(variable).map(|home| Path::new(&home).join(below)).filter(|path| path.is_absolute())
        };
        let Some(root) = home("XDG_CACHE_HOME", "wrenn").or_else(|| home("HOME", ".cache/wrenn")) else {
            bail!("neither XDG_CACHE_HOME nor HOME is set: there is no place to keep downloads and images");
        };
        Self::at(root)
    }

    /// Opens the cache in that directory.
    pub(crate) fn at(root: PathBuf) -> Result<Self> {
        for directory in ["tmp", "locks"] {
            let directory = root.join(directory);
            fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let cache = Self { root };
        cache.collect()?;
        Ok(cache)
    }

    /// A file that remembers a choice, such as which kernel is used until a newer one is asked for.
    pub(crate) fn note(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A directory that is not made in one step, and looks after itself.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The directory `kind/name`, made by `make` if it is not there. `make` gets an empty directory to fill.
    pub(crate) fn get_or_make(
        &self,
        kind: &str,
        name: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = self.root.join(kind).join(name);
        if place.is_dir() {
            return Ok(place);
        }
        let lock_name = format!("{kind}-{name}");
        let _lock = self.lock(&lock_name)?;
        if place.is_dir() {
            return Ok(place);
        }
        let temporary = self.root.join("tmp").join(&lock_name);
        remove(&temporary)?;
        fs::create_dir(&temporary).with_context(|| format!("making {}", temporary.display()))?;
        if let Err(error) = make(&temporary) {
            remove(&temporary)?;
            return Err(error);
        }
        publish(&temporary, &place)?;
        Ok(place)
    }

    /// An empty directory for this run alone, which goes with the value. What a killed run left is collected by the
    /// next command.
    pub(crate) fn scratch(&self, kind: &str) -> Result<Scratch> {
        let name = format!("{kind}-of-{}", std::process::id());
        let lock = self.lock(&name)?;
        let path = self.root.join("tmp").join(&name);
        remove(&path)?;
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Scratch { path, lock_path: self.root.join("locks").join(name), _lock: lock })
    }

    /// Waits for the lock of that name. The kernel frees it with its holder, so a dead maker blocks nobody.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join("locks").join(name);
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                step::announce(&format!("waiting: another process is making {name}"));
                file.lock().with_context(|| format!("locking {}", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
        Ok(file)
    }

    /// Keeps those results of a kind that were of use last, as the times of the file `marker` in each tell. Only
    /// results that have such a file are counted.
    pub(crate) fn forget_old(&self, kind: &str, marker: &str, kept: usize) -> Result<()> {
        let mut results: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(self.root.join(kind))? {
            let path = entry?.path();
            if let Ok(metadata) = fs::metadata(path.join(marker)) {
                results.push((metadata.modified()?, path));
            }
        }
        results.sort();
        for (_, path) in results.iter().rev().skip(kept) {
            remove(path)?;
        }
        Ok(())
    }

    fn collect(&self) -> Result<()> {
        let directory = self.root.join("tmp");
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
            let entry = entry?;
            let lock = File::create(self.root.join("locks").join(entry.file_name()))?;
            if lock.try_lock().is_ok() {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// A directory that goes with this value.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is collected by the next command.
        for path in [&self.path, &self.lock_path] {
            let _ = remove(path);
        }
    }
}

/// Notes on a file of a result that the result is of use now.
pub(crate) fn mark_used(marker: &Path) -> Result<()> {
    let noted = File::open(marker).and_then(|file| file.set_modified(SystemTime::now()));
    noted.with_context(|| format!("noting the use of {}", marker.display()))
}

/// Syncs a finished directory and moves it to its place.
fn publish(temporary: &Path, place: &Path) -> Result<()> {
    let mut directories = vec![temporary.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                File::open(entry.path())?
                    .sync_all()
                    .with_context(|| format!("syncing {}", entry.path().display()))?;
            }
        }
        File::open(&directory)?.sync_all()?;
    }
    let Some(parent) = place.parent() else { bail!("{} has no parent", place.display()) };
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    fs::rename(temporary, place).with_context(|| format!("moving a result to {}", place.display()))?;
    File::open(parent)?.sync_all()?;
    Ok(())
}

/// Removes a file, or a directory and everything in it; it may be absent.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The name of a file's content.
pub(crate) fn digest_of_file(path: &Path) -> Result<String> {
    let mut digits = sha256_of_file(path)?;
    digits.truncate(DIGITS);
    Ok(digits)
}

/// The whole SHA-256 of a file, in hexadecimal digits.
pub(crate) fn sha256_of_file(path: &Path) -> Result<String> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    // The system's own program, because xtask is built unoptimized and images are large.
    let output = Command::new("sha256sum").stdin(file).output().context("starting sha256sum")?;
    first_digits(&output.stdout, SHA256_DIGITS).with_context(|| format!("hashing {}", path.display()))
}

/// The name of a content in memory.
pub(crate) fn digest_of(content: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting sha256sum")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(content).context("writing to sha256sum")?;
    }
    first_digits(&child.wait_with_output()?.stdout, DIGITS)
}

fn first_digits(output: &[u8], count: usize) -> Result<String> {
    match output.get(..count).map(str::from_utf8) {
        Some(Ok(digits)) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(digits.to_owned()),
        _ => bail!("sha256sum did not print a digest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_once_and_then_finds() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("wrenn")).unwrap();
        let make = |directory: &Path| Ok(fs::write(directory.join("result"), "1")?);
        let made = cache.get_or_make("things", "one", make).unwrap();
        assert_eq!(fs::read_to_string(made.join("result")).unwrap(), "1");
        let found = cache.get_or_make("things", "one", |_| bail!("made twice")).unwrap();
        assert_eq!(found, made);
    }

    #[test]
    fn a_failed_maker_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("wrenn")).unwrap();
        let result = cache.get_or_make("things", "one", |directory| {
            fs::write(directory.join("half"), "")?;
            bail!("no more")
        });
        assert!(result.is_err());
        assert_eq!(fs::read_dir(home.path().join("wrenn/tmp")).unwrap().count(), 0);
        assert!(!home.path().join("wrenn/things").exists());
    }

    #[test]
    fn what_a_dead_maker_left_is_collected_and_what_a_living_one_makes_is_not() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("wrenn");
        let cache = Cache::at(root.clone()).unwrap();
        fs::create_dir_all(root.join("tmp/things-dead/sub")).unwrap();
        fs::create_dir_all(root.join("tmp/things-living")).unwrap();
        let _lock = cache.lock("things-living").unwrap();
        Cache::at(root.clone()).unwrap();
        assert!(!root.join("tmp/things-dead").exists());
        assert!(root.join("tmp/things-living").exists());
    }

    #[test]
    fn a_scratch_directory_goes_with_its_value() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("wrenn");
        let cache = Cache::at(root.clone()).unwrap();
        let scratch = cache.scratch("lab").unwrap();
        fs::write(scratch.path().join("file"), "1").unwrap();
        Cache::at(root.clone()).unwrap();
        assert!(scratch.path().join("file").exists(), "it is in use");
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(root.join("locks")).unwrap().count(), 0);
    }

    #[test]
    fn names_contents() {
        // The well-known digests of nothing and of "abc".
        assert_eq!(digest_of(b"").unwrap(), "e3b0c44298fc1c14");
        assert_eq!(digest_of(b"abc").unwrap(), "ba7816bf8f01cfea");
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("abc");
        fs::write(&file, "abc").unwrap();
        assert_eq!(digest_of_file(&file).unwrap(), "ba7816bf8f01cfea");
        let whole = sha256_of_file(&file).unwrap();
        assert_eq!(whole, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn the_results_of_use_last_are_kept() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("wrenn")).unwrap();
        for age in 0..9_u64 {
            let result = cache.place("programs").join(format!("wrenn-{age}"));
            fs::create_dir_all(&result).unwrap();
            let file = File::create(result.join("wrenn")).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 - age)).unwrap();
        }
        cache.forget_old("programs", "wrenn", 6).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(cache.place("programs")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(
            left,
            (0..6).map(|age| format!("wrenn-{age}").into()).collect::<Vec<std::ffi::OsString>>()
        );
    }
}
