//! Steps of the filesystem that several modules take: each names itself and its file when it fails.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
};

use camino::Utf8Path;
use rustix::{
    fs::{CWD, RenameFlags, SeekFrom, seek},
    io::Errno,
};

use super::{SnapshotStoreError, SnapshotStoreResult};

/// Writes a whole file, and waits until it is on disk. A new one has `mode`.
pub(crate) fn write_durably(path: &Utf8Path, bytes: &[u8], mode: u32) -> SnapshotStoreResult<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        make_durable(&file)
    };
    write().map_err(|source| SnapshotStoreError::file("write", path, source))
}

/// Waits until what was written to a file, or the names in a directory, are on disk.
pub(crate) fn make_durable(file: &File) -> io::Result<()> {
    file.sync_all()?;
    #[cfg(test)]
    DURABLE.with_borrow_mut(|told| {
        if let Some(told) = told {
            told(file);
        }
    });
    Ok(())
}

#[cfg(test)]
type Told = Box<dyn FnMut(&File)>;

#[cfg(test)]
thread_local! {
    /// Who is told of each file that is durable now: a test that plays a crash of the host. It calls nothing of this
    /// module meanwhile.
    pub(crate) static DURABLE: std::cell::RefCell<Option<Told>> = const { std::cell::RefCell::new(None) };
}

/// Makes a file, or the names in a directory, durable.
pub(crate) fn sync(path: &Utf8Path) -> SnapshotStoreResult<()> {
    File::open(path)
        .and_then(|file| make_durable(&file))
        .map_err(|source| SnapshotStoreError::file("write to disk", path, source))
}

/// The apparent size of a file.
pub(crate) fn length(path: &Utf8Path) -> SnapshotStoreResult<u64> {
    fs::metadata(path).map(|it| it.len()).map_err(|source| SnapshotStoreError::file("examine", path, source))
}

/// The start of the first block at or after `position`, itself the start of one, that is not all hole; none when
/// there is only a hole up to the end.
pub(crate) fn next_block_with_data(
    file: &File,
    position: u64,
    length: u64,
    block: u64,
) -> io::Result<Option<u64>> {
    if position >= length {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(position)) {
        Ok(data) if data < length => Ok(Some(data - data % block)),
        // The file was cut meanwhile, or there is only a hole up to the end.
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        // A filesystem that knows no holes: everything is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(position)),
        Err(error) => Err(error.into()),
    }
}

/// Renames with flags. The caller knows what each error means to it.
pub(crate) fn rename(from: &Utf8Path, to: &Utf8Path, flags: RenameFlags) -> Result<(), Errno> {
    rustix::fs::renameat_with(CWD, from.as_str(), CWD, to.as_str(), flags)
}

/// Removes a directory with all that is in it. Idempotent.
pub(crate) fn remove_directory(path: &Utf8Path) -> SnapshotStoreResult<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SnapshotStoreError::file("remove", path, error))
        }
        _ => Ok(()),
    }
}
