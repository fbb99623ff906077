//! Which Firecracker there is, for the lab and for tests: one that somebody names, or has, or let [`release`] download.
//!
//! ```text
//!  WRENN_FIRECRACKER ─► `firecracker` on the PATH ─► the release in the user's cache ─► none: its tests are skipped
//!  WRENN_JAILER ─► `jailer` beside that Firecracker ─► `jailer` on the PATH ─► none
//! ```
//!
//! What is named is taken as it is: a name of nothing is an error where it is used, and no reason to take another one.
//! The driver looks in the same order, but knows nothing of the cache, so what starts tests tells them by the variables.

mod release;

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::Result;

use self::release::Release;
pub(crate) use self::release::download;
use crate::{cache::Cache, host, repository::Repository};

/// Names the program that runs guests.
const PROGRAM: &str = "WRENN_FIRECRACKER";
/// Names what confines it.
const JAILER: &str = "WRENN_JAILER";
/// The variables by which programs find them.
pub(crate) const VARIABLES: [&str; 2] = [PROGRAM, JAILER];
/// What to do where there is none.
pub(crate) const REMEDY: &str = "there is no Firecracker: name one with WRENN_FIRECRACKER, put it on the PATH, or let \
                                 `make setup ARGS=--firecracker` download a release";

/// What the programs are called, on a `PATH` and beside each other.
const NAMES: [&str; 2] = ["firecracker", "jailer"];

/// Programs of one release.
#[derive(Debug, PartialEq, Eq)]
struct Firecracker {
    program: PathBuf,
    jailer: Option<PathBuf>,
}

impl Firecracker {
    /// Looks for it on this machine.
    fn find(repository: &Repository) -> Result<Option<Self>> {
        let downloaded = Release::read(repository)?.place(&Cache::open()?);
        Ok(Self::choose(|name| env::var_os(name), host::is_program, &downloaded))
    }

    /// Decides which. Pure. `downloaded` is the directory where those of the release are, if they are.
    fn choose(
        variables: impl Fn(&str) -> Option<OsString>,
        is_program: impl Fn(&Path) -> bool,
        downloaded: &Path,
    ) -> Option<Self> {
        let named = |name| variables(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let is_there = |place: &PathBuf| is_program(place);
        let path = variables("PATH").unwrap_or_default();
        let [firecracker, jailer] = NAMES;
        let program = named(PROGRAM)
            .or_else(|| host::on_path(firecracker, &path, &is_program))
            .or_else(|| Some(downloaded.join(firecracker)).filter(is_there))?;
        let jailer = named(JAILER)
            .or_else(|| Some(program.with_file_name(jailer)).filter(is_there))
            .or_else(|| host::on_path(jailer, &path, &is_program));
        Some(Self { program, jailer })
    }
}

/// Whether there is one.
pub(crate) fn is_there(repository: &Repository) -> Result<bool> {
    Ok(Firecracker::find(repository)?.is_some())
}

/// The variables of this process; those of [`VARIABLES`] name what there is.
pub(crate) fn variables(repository: &Repository) -> Result<impl Fn(&str) -> Option<OsString>> {
    let (program, jailer) = match Firecracker::find(repository)? {
        Some(Firecracker { program, jailer }) => (Some(program), jailer),
        None => (None, None),
    };
    Ok(move |name: &str| match name {
        PROGRAM => program.clone().map(Into::into),
        JAILER => jailer.clone().map(Into::into),
        other => env::var_os(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen with those variables where those files are programs.
    fn chosen(variables: &[(&str, &str)], programs: &[&str]) -> Option<(String, Option<String>)> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        let is_program = |path: &Path| programs.iter().any(|program| Path::new(program) == path);
        let text = |path: PathBuf| path.into_os_string().into_string().unwrap();
        Firecracker::choose(variable, is_program, Path::new("/cache/v1"))
            .map(|Firecracker { program, jailer }| (text(program), jailer.map(text)))
    }

    fn both(program: &str, jailer: &str) -> Option<(String, Option<String>)> {
        Some((program.to_owned(), Some(jailer.to_owned())))
    }

    #[test]
    fn what_is_named_comes_before_what_is_found_and_that_before_what_was_downloaded() {
        let path = ("PATH", "/bin:/opt/fc");
        let cached = ["/cache/v1/firecracker", "/cache/v1/jailer"];
        let all = [&["/opt/fc/firecracker", "/opt/fc/jailer"][..], &cached].concat();
        let named = [path, (PROGRAM, "/named/fc"), (JAILER, "/named/j")];
        assert_eq!(chosen(&named, &all), both("/named/fc", "/named/j"));
        assert_eq!(chosen(&[path], &all), both("/opt/fc/firecracker", "/opt/fc/jailer"));
        let empty = [path, (PROGRAM, ""), (JAILER, "")];
        assert_eq!(chosen(&empty, &all), both("/opt/fc/firecracker", "/opt/fc/jailer"));
        assert_eq!(chosen(&[path], &cached), both("/cache/v1/firecracker", "/cache/v1/jailer"));
        assert_eq!(chosen(&[path], &[]), None);
        assert_eq!(chosen(&[], &[]), None);
    }

    #[test]
    fn a_jailer_is_that_beside_it_before_that_on_the_path() {
        let variables = [("PATH", "/bin"), (PROGRAM, "/named/fc")];
        let programs = ["/bin/jailer", "/named/jailer"];
        assert_eq!(chosen(&variables, &programs), both("/named/fc", "/named/jailer"));
        assert_eq!(chosen(&variables, &programs[..1]), both("/named/fc", "/bin/jailer"));
        // Nothing is looked up in the place of what is named, which may be no file.
        assert_eq!(chosen(&variables, &[]), Some(("/named/fc".to_owned(), None)));
        let alone = [("PATH", "/bin"), (JAILER, "/named/jailer")];
        assert_eq!(chosen(&alone, &["/named/jailer"]), None, "a jailer without a Firecracker is of no use");
    }
}
