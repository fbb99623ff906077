//! Files that are either the old ones or the new ones, never half of each; and the last lines of a log.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
};

use camino::Utf8Path;

/// Only its owner may read it: it holds a secret.
pub(super) const PRIVATE: u32 = 0o600;

/// Replaces a file: written beside it, made durable, then renamed over it.
pub(super) fn write_atomically(path: &Utf8Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
    };
    let beside = directory.join(format!(".{name}.new"));
    // A file of an interrupted write may be there with another mode: only a new one has the mode asked for.
    remove_if_there(&beside)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(directory)?.sync_all()
}

/// Removes a file; one that is not there is no error.
pub(super) fn remove_if_there(path: &Utf8Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The size of a log before something is started that writes to it.
pub(super) fn length(path: &Utf8Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The last lines that were written to a log since it had the given length.
/// A log that cannot be read gives none: its tail is a help beside an error, never an error itself.
pub(super) fn tail_since(path: &Utf8Path, since: u64) -> Vec<String> {
    const LINES: usize = 20;
    const BYTES: u64 = 16 * 1024;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(since.max(end.saturating_sub(BYTES)).min(end)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].iter().map(|line| (*line).to_owned()).collect()
}

/// Opens a log for appending. One that has grown large becomes `.old` first, so that two of them bound the disk used.
pub(super) fn open_log(path: &Utf8Path) -> io::Result<File> {
    const LARGE: u64 = 16 * 1024 * 1024;
    if length(path) > LARGE {
        fs::rename(path, format!("{path}.old"))?;
    }
    OpenOptions::new().append(true).create(true).mode(PRIVATE).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn directory() -> (tempfile::TempDir, camino::Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = camino::Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        (directory, path)
    }

    #[test]
    fn a_replaced_file_has_its_content_and_mode() {
        let (_guard, directory) = directory();
        let path = directory.join("env");
        fs::write(&path, "old").unwrap();
        fs::write(directory.join(".env.new"), "of an interrupted write").unwrap();
        write_atomically(&path, PRIVATE, b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, PRIVATE);
        assert!(!directory.join(".env.new").exists());
    }

    #[test]
    fn the_tail_holds_only_what_is_new() {
        let (_guard, directory) = directory();
        let path = directory.join("log");
        assert!(tail_since(&path, 0).is_empty());
        fs::write(&path, "earlier\n").unwrap();
        let since = length(&path);
        assert!(tail_since(&path, since).is_empty());
        let mut log = open_log(&path).unwrap();
        for number in 0..30 {
            writeln!(log, "line {number}").unwrap();
        }
        let tail = tail_since(&path, since);
        assert_eq!((tail.len(), tail[0].as_str(), tail[19].as_str()), (20, "line 10", "line 29"));
        assert_eq!(tail_since(&path, 1 << 40), Vec::<String>::new());
    }
}
