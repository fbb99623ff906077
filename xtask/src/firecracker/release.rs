//! A release of Firecracker for who has none: `setup/firecracker.txt` says which, and what its archive has to be.
//!
//! ```text
//!  url ──curl──► archive ──SHA-256 is the pinned one──► firecracker, jailer ──► the cache's firecracker/vVERSION-DIGEST
//! ```
//!
//! Nothing is unpacked before the archive is known to be the right one, and the directory is there with both programs or
//! not at all.

use std::{
    collections::BTreeMap,
    env::consts::ARCH,
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::NAMES;
use crate::{
    cache::{self, Cache},
    packages,
    repository::Repository,
    step,
};

const KIND: &str = "firecracker";
/// The architecture of the release.
const OF_RELEASE: &str = "x86_64";
/// What downloads. Nothing else here needs them, so `setup/packages.txt` does not have them.
const PACKAGES: [&str; 2] = ["ca-certificates", "curl"];
/// Redirections included.
const PROTOCOL: &str = "=https";
/// In seconds. The archive has 8 MB.
const CONNECT_BOUND: &str = "20";
const BOUND: &str = "300";
/// For what passes, such as a name server that does not answer.
const RETRIES: &str = "2";
/// In bytes. What is so large is something else.
const LIMIT: &str = "67108864";

/// A release, and its archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Release {
    version: String,
    url: String,
    sha256: String,
}

/// The command: sees to it that the pinned release is in the cache, and says where.
pub(crate) fn download(repository: &Repository) -> Result<()> {
    let release = Release::read(repository)?;
    let cache = Cache::open()?;
    let Release { version, .. } = &release;
    let place = release.place(&cache);
    if place.is_dir() {
        println!("Firecracker {version} and its jailer are there already: {}", place.display());
        return Ok(());
    }
    release.fits(ARCH)?;
    packages::install(repository, &PACKAGES)?;
    let place = release.get(&cache, &repository.log("firecracker"), PROTOCOL)?;
    println!("Firecracker {version} and its jailer are now in {}", place.display());
    println!("`make` takes them where no others are named or on the PATH; for `wrenn` itself:");
    println!("export WRENN_FIRECRACKER={}", place.join(NAMES[0]).display());
    Ok(())
}

impl Release {
    /// The one that is pinned.
    pub(super) fn read(repository: &Repository) -> Result<Self> {
        let path = repository.path("setup/firecracker.txt");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} names no release", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
            let [name, value] = line.split_whitespace().collect::<Vec<_>>()[..] else {
                bail!("this is no name and a value: {line}");
            };
            ensure!(values.insert(name, value).is_none(), "{name} is said twice");
        }
        let mut take =
            |name| values.remove(name).map(str::to_owned).with_context(|| format!("{name} is missing"));
        let (version, url, sha256) = (take("version")?, take("url")?, take("sha256")?);
        if let Some(name) = values.keys().next() {
            bail!("{name} is of no meaning");
        }
        let is_version = version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        ensure!(is_version, "{version} is no version");
        let is_digest = sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        ensure!(sha256.len() == 64 && is_digest, "{sha256} is no SHA-256");
        Ok(Self { version, url, sha256 })
    }

    /// Where its programs are when they were downloaded.
    pub(super) fn place(&self, cache: &Cache) -> PathBuf {
        cache.place(KIND).join(self.name())
    }

    fn name(&self) -> String {
        let (digits, _) = self.sha256.split_at(16);
        format!("v{}-{digits}", self.version)
    }

    fn fits(&self, architecture: &str) -> Result<()> {
        let Self { version, .. } = self;
        ensure!(
            architecture == OF_RELEASE,
            "the release of Firecracker {version} that is known here is for {OF_RELEASE}, and this is {architecture}: get one \
             that fits, and name it with WRENN_FIRECRACKER"
        );
        Ok(())
    }

    /// Its programs, from the cache or by way of a protocol that curl knows.
    fn get(&self, cache: &Cache, log: &Path, protocol: &str) -> Result<PathBuf> {
        let Self { version, url, .. } = self;
        let make = |directory: &Path| self.make(directory, log, protocol);
        cache.get_or_make(KIND, &self.name(), make).with_context(|| {
            format!(
                "Firecracker {version} could not be downloaded, and nothing of it is kept (where there is no internet, name \
                 one that you bring with WRENN_FIRECRACKER): {url}"
            )
        })
    }

    fn make(&self, directory: &Path, log: &Path, protocol: &str) -> Result<()> {
        let archive = directory.join("archive.tgz");
        step::quiet(
            &format!("downloading Firecracker {}", self.version),
            log,
            Command::new("curl")
                .args(["--fail", "--silent", "--show-error", "--location", "--proto", protocol])
                .args(["--connect-timeout", CONNECT_BOUND, "--max-time", BOUND, "--max-filesize", LIMIT])
                .args(["--retry", RETRIES, "--retry-max-time", BOUND])
                .arg("--output")
                .arg(&archive)
                .args(["--", &self.url]),
        )?;
        let found = cache::sha256_of_file(&archive)?;
        ensure!(
            found == self.sha256,
            "what came from there is not that release: its SHA-256 is {found}, and {} was expected",
            self.sha256
        );
        for name in NAMES {
            self.unpack(&archive, name, &directory.join(name))?;
        }
        cache::remove(&archive)
    }

    /// Unpacks one program under its plain name. By way of a file of ours: what else the archive says of it, such as a place,
    /// an owner or a kind of file, is not asked for.
    fn unpack(&self, archive: &Path, name: &str, to: &Path) -> Result<()> {
        let Self { version, .. } = self;
        let member = format!("release-v{version}-{OF_RELEASE}/{name}-v{version}-{OF_RELEASE}");
        let file = File::create_new(to).with_context(|| format!("making {}", to.display()))?;
        let output = Command::new("tar")
            .args(["--extract", "--gzip", "--to-stdout", "--file"])
            .arg(archive)
            .args(["--", &member])
            .stdin(Stdio::null())
            .stdout(file)
            .output()
            .context("starting tar")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "its archive does not give {member}: {}", said.trim());
        ensure!(fs::metadata(to)?.len() > 0, "in its archive {member} holds nothing");
        fs::set_permissions(to, Permissions::from_mode(0o755))
            .with_context(|| format!("making {} a program", to.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;

    const OF_TESTS: &str = "=file";

    /// A cache, and an archive that has these programs and a file more.
    struct Bench {
        home: tempfile::TempDir,
        cache: Cache,
        release: Release,
    }

    impl Bench {
        /// Nothing where there is no curl.
        fn with(programs: &[(&str, &str)]) -> Option<Self> {
            if host::on_path("curl", &std::env::var_os("PATH").unwrap(), host::is_program).is_none() {
                println!("skipped: curl is not on the PATH");
                return None;
            }
            let home = tempfile::tempdir().unwrap();
            let tree = home.path().join("release-v9.8.7-x86_64");
            fs::create_dir(&tree).unwrap();
            fs::write(tree.join("LICENSE"), "text").unwrap();
            for (name, content) in programs {
                fs::write(tree.join(name), content).unwrap();
            }
            let archive = home.path().join("firecracker.tgz");
            step::output(
                Command::new("tar")
                    .args(["--create", "--gzip", "--file"])
                    .arg(&archive)
                    .arg("--directory")
                    .arg(home.path())
                    .arg("release-v9.8.7-x86_64"),
            )
            .unwrap();
            let release = Release {
                version: "9.8.7".to_owned(),
                url: format!("file://{}", archive.display()),
                sha256: cache::sha256_of_file(&archive).unwrap(),
            };
            let cache = Cache::at(home.path().join("wrenn")).unwrap();
            Some(Self { home, cache, release })
        }

        fn get(&self, protocol: &str) -> Result<PathBuf> {
            self.release.get(&self.cache, &self.home.path().join("log"), protocol)
        }

        /// Gets it in vain, and gives what was said about it.
        fn fail(&self, protocol: &str) -> String {
            let error = format!("{:#}", self.get(protocol).unwrap_err());
            assert!(error.contains("Firecracker 9.8.7") && error.contains("WRENN_FIRECRACKER"), "{error}");
            let left = fs::read_dir(self.home.path().join("wrenn/tmp")).unwrap().count();
            assert!(left == 0 && !self.cache.place(KIND).exists(), "something is left in the cache");
            error
        }
    }

    const WHOLE: [(&str, &str); 2] =
        [("firecracker-v9.8.7-x86_64", "runs guests"), ("jailer-v9.8.7-x86_64", "confines it")];

    #[test]
    fn the_programs_of_the_right_archive_are_kept_under_plain_names() {
        let Some(bench) = Bench::with(&WHOLE) else { return };
        let place = bench.get(OF_TESTS).unwrap();
        assert_eq!(place, bench.release.place(&bench.cache));
        let mut found: Vec<_> =
            fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, NAMES);
        for (name, (_, content)) in NAMES.into_iter().zip(WHOLE) {
            let program = place.join(name);
            assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o7777, 0o755);
            assert_eq!(fs::read_to_string(program).unwrap(), content);
        }
        fs::remove_file(bench.home.path().join("firecracker.tgz")).unwrap();
        assert_eq!(bench.get(OF_TESTS).unwrap(), place, "what is there is not downloaded");
    }

    #[test]
    fn another_archive_is_not_unpacked() {
        let Some(mut bench) = Bench::with(&WHOLE) else { return };
        let right = std::mem::replace(&mut bench.release.sha256, "0".repeat(64));
        let error = bench.fail(OF_TESTS);
        assert!(error.contains(&right) && error.contains(&"0".repeat(64)), "{error}");
    }

    #[test]
    fn an_archive_without_the_programs_is_refused() {
        for programs in [&WHOLE[..1], &[WHOLE[0], (WHOLE[1].0, "")]] {
            let Some(bench) = Bench::with(programs) else { return };
            let error = bench.fail(OF_TESTS);
            assert!(error.contains("release-v9.8.7-x86_64/jailer-v9.8.7-x86_64"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_downloaded_is_said() {
        let Some(mut bench) = Bench::with(&WHOLE) else { return };
        // It is there, but not by way of the protocol that releases come by.
        assert!(bench.fail(PROTOCOL).contains("curl"));
        bench.release.url.push_str(".elsewhere");
        assert!(bench.fail(OF_TESTS).contains("curl"));
        // A port that was free a moment ago: nobody listens.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        bench.release.url = format!("http://127.0.0.1:{port}/firecracker.tgz");
        assert!(bench.fail("=http").contains("curl"));
    }

    #[test]
    fn one_release_is_pinned() {
        let release = Release::parse(include_str!("../../../setup/firecracker.txt")).unwrap();
        let Release { version, url, .. } = &release;
        let file = format!("/v{version}/firecracker-v{version}-x86_64.tgz");
        assert!(url.starts_with("https://") && url.ends_with(&file), "{url}");
        release.fits("x86_64").unwrap();
        assert!(release.fits("aarch64").unwrap_err().to_string().contains("WRENN_FIRECRACKER"));

        let digest = "a".repeat(64);
        let whole = format!("# what\nversion 1.2\nurl https://x\n\nsha256 {digest}\n");
        assert_eq!(Release::parse(&whole).unwrap().name(), "v1.2-aaaaaaaaaaaaaaaa");
        for broken in [
            String::new(),
            whole.replace("version 1.2\n", ""),
            whole.replace("1.2", "../1"),
            whole.replace(&digest, &digest[1..]),
            whole.replace(&digest, &digest.to_uppercase()),
            whole.replace("url https://x", "url https://x twice"),
            format!("{whole}version 1.3\n"),
            format!("{whole}size 7\n"),
        ] {
            assert!(Release::parse(&broken).is_err(), "{broken}");
        }
    }
}
