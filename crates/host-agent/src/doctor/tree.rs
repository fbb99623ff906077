//! The files that a host tells of itself in: below `/`, or below a directory that a test has filled.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
};

use camino::{Utf8Path, Utf8PathBuf};

/// How much of a file is read. The largest is the list of a kernel's modules, with less than one MiB.
const LIMIT: u64 = 8 << 20;

/// What was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen<T> {
    /// It is there.
    Is(T),
    /// There is no such thing.
    Absent,
    /// It cannot be known, and why.
    Unreadable(String),
}

impl<T> Seen<T> {
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Seen<U> {
        match self {
            Self::Is(value) => Seen::Is(change(value)),
            Self::Absent => Seen::Absent,
            Self::Unreadable(why) => Seen::Unreadable(why),
        }
    }

    /// The same where `change` understands the value; else it is unreadable.
    pub(super) fn parse<U>(self, change: impl FnOnce(&T) -> Option<U>) -> Seen<U>
    where
        T: std::fmt::Debug,
    {
        match self {
            Self::Is(value) => {
                change(&value).map_or_else(|| Seen::Unreadable(format!("it holds {value:?}")), Seen::Is)
            }
            Self::Absent => Seen::Absent,
            Self::Unreadable(why) => Seen::Unreadable(why),
        }
    }

    pub(super) fn of(result: io::Result<T>) -> Self {
        match result {
            Ok(value) => Self::Is(value),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Absent,
            Err(error) => Self::Unreadable(error.to_string()),
        }
    }
}

/// A tree of files.
#[derive(Debug, Clone)]
pub struct Tree {
    root: Utf8PathBuf,
}

impl Tree {
    /// That of this host.
    #[must_use]
    pub fn host() -> Self {
        Self::below("/")
    }

    /// One whose root is a directory.
    #[must_use]
    pub fn below(root: impl Into<Utf8PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where an absolute path of the tree really is.
    pub(super) fn place(&self, path: impl AsRef<Utf8Path>) -> Utf8PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A path of the tree with all links resolved, if it is there.
    pub(super) fn real(&self, path: &Utf8Path) -> Utf8PathBuf {
        let root = self.root.canonicalize_utf8().unwrap_or_else(|_| self.root.clone());
        let real = self.place(path).canonicalize_utf8().ok();
        let inside = real.and_then(|real| Some(Utf8Path::new("/").join(real.strip_prefix(root).ok()?)));
        inside.unwrap_or_else(|| path.to_owned())
    }

    pub(super) fn exists(&self, path: impl AsRef<Utf8Path>) -> bool {
        self.place(path).exists()
    }

    /// The text of a file, without white space at its ends.
    pub(super) fn text(&self, path: impl AsRef<Utf8Path>) -> Seen<String> {
        let read = || {
            let mut text = Vec::new();
            File::open(self.place(path))?.take(LIMIT).read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).trim().to_owned())
        };
        Seen::of(read())
    }

    pub(super) fn number(&self, path: impl AsRef<Utf8Path>) -> Seen<u64> {
        self.text(path).parse(|text| text.split_ascii_whitespace().next()?.parse().ok())
    }

    /// Writes a setting of the kernel, which must be there.
    pub(super) fn write(&self, path: impl AsRef<Utf8Path>, value: &str) -> io::Result<()> {
        OpenOptions::new().write(true).truncate(true).open(self.place(path))?.write_all(value.as_bytes())
    }

    /// The names in a directory, in order.
    pub(super) fn names(&self, path: impl AsRef<Utf8Path>) -> Seen<Vec<String>> {
        let read = || {
            let names = fs::read_dir(self.place(path))?.map(|entry| Ok(entry?.file_name()));
            let mut names: Vec<_> = names.collect::<io::Result<_>>()?;
            names.sort();
            Ok(names.iter().map(|name| name.to_string_lossy().into_owned()).collect())
        };
        Seen::of(read())
    }

    /// Whether a device can be opened for reading and writing.
    pub(super) fn opens(&self, path: impl AsRef<Utf8Path>) -> Seen<()> {
        Seen::of(OpenOptions::new().read(true).write(true).open(self.place(path)).map(drop))
    }

    /// The path itself if it is there, else the nearest directory above it that is.
    pub(super) fn nearest(&self, path: &Utf8Path) -> Utf8PathBuf {
        let found = path.ancestors().find(|above| self.exists(above));
        found.unwrap_or_else(|| Utf8Path::new("/")).to_owned()
    }

    /// Those of a path and the directories above it that somebody other than root may change. What is not there yet is
    /// nobody's.
    pub(super) fn changeable_by_others(&self, path: &Utf8Path) -> Seen<Vec<Utf8PathBuf>> {
        let mut found = Vec::new();
        // Links are resolved: what counts is what they lead to, and who can change that.
        let real = self.place(self.nearest(path)).canonicalize_utf8();
        let root = self.root.canonicalize_utf8();
        let (real, root) = match (real, root) {
            (Ok(real), Ok(root)) => (real, root),
            (Err(error), _) | (_, Err(error)) => return Seen::Unreadable(error.to_string()),
        };
        for above in real.ancestors().take_while(|above| above.starts_with(&root)) {
            match fs::metadata(above) {
                Ok(file) => {
                    if file.uid() != 0 || file.mode() & 0o022 != 0 {
                        found.push(Utf8Path::new("/").join(above.strip_prefix(&root).unwrap_or(above)));
                    }
                }
                Err(error) => return Seen::Unreadable(format!("{above}: {error}")),
            }
        }
        Seen::Is(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn files_are_there_or_not_or_cannot_be_understood() {
        let place = tempfile::tempdir().unwrap();
        let tree = Tree::below(Utf8Path::from_path(place.path()).unwrap());
        fs::create_dir(place.path().join("proc")).unwrap();
        fs::write(place.path().join("proc/four"), "4 7\n").unwrap();
        fs::write(place.path().join("proc/word"), "word\n").unwrap();
        assert_eq!(tree.number("/proc/four"), Seen::Is(4));
        assert_eq!(tree.number("/proc/none"), Seen::Absent);
        assert_eq!(tree.number("/proc/word"), Seen::Unreadable("it holds \"word\"".to_owned()));
        assert!(matches!(tree.text("/proc"), Seen::Unreadable(_)));
        assert_eq!(tree.names("/proc"), Seen::Is(vec!["four".to_owned(), "word".to_owned()]));
        assert_eq!(tree.nearest("/proc/a/b".into()), "/proc");
        assert!(tree.write("/proc/none", "1").is_err(), "settings are never made");
        tree.write("/proc/four", "5").unwrap();
        assert_eq!(tree.number("/proc/four"), Seen::Is(5));
    }

    #[test]
    fn what_others_may_change_is_found_behind_links_too() {
        let place = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(place.path()).unwrap();
        let tree = Tree::below(root);
        for (name, mode) in [("open", 0o1777), ("open/below", 0o755), ("closed", 0o755)] {
            fs::create_dir(root.join(name)).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink(root.join("open/below"), root.join("closed/link")).unwrap();
        assert_eq!(tree.changeable_by_others("/closed".into()), Seen::Is(vec![]));
        assert_eq!(tree.changeable_by_others("/closed/not/yet".into()), Seen::Is(vec![]));
        for path in ["/open/below", "/closed/link", "/open/below/not/yet"] {
            let found = tree.changeable_by_others(path.into());
            assert_eq!(found, Seen::Is(vec!["/open".into()]), "{path}");
        }
    }
}
