//! New files that are whole or not there, and copies that share or skip what they can.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{CWD, RenameFlags, SeekFrom},
    io::Errno,
};

use super::{RootfsError, RootfsResult};

/// A file in the making: removed again unless it is kept.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: Option<Utf8PathBuf>,
    file: File,
}

impl Unfinished {
    /// Makes the file, which must not exist; only its owner may read it.
    pub(super) fn create(path: &Utf8Path) -> RootfsResult<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| RootfsError::file("make", path, error))?;
        Ok(Self { path: Some(path.to_owned()), file })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The file is whole: it stays.
    pub(super) fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%path, %error, "could not remove a half-made disk");
        }
    }
}

/// How the bytes came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Both files name the same blocks; writing to either makes its own.
    Shared,
    /// Every block that is not a hole was copied.
    Bytes,
}

/// Gives `to`, which is empty, the content of `from`, in the cheapest way that the filesystem offers.
pub(crate) fn copy_content(from: &File, to: &File) -> io::Result<Copied> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(Copied::Shared),
        // What filesystems answer that cannot, or that are not the same one.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            copy_sparse(from, to)?;
            Ok(Copied::Bytes)
        }
        Err(error) => Err(error.into()),
    }
}

/// Copies what is not a hole. A filesystem that knows no holes calls all of it data.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // There is only a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start, end)?;
        position = end;
    }
    Ok(())
}

/// Copies one range inside the kernel, or through a buffer where the kernel cannot.
fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut position = start;
    while position < end {
        let (mut source, mut target) = (position, position);
        let wanted = usize::try_from(end - position).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), wanted) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => position += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return copy_through_buffer(from, to, position, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_buffer(from: &File, to: &File, mut position: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while position < end {
        let wanted = usize::try_from(end - position).map_or(buffer.len(), |left| left.min(buffer.len()));
        let chunk = &mut buffer[..wanted];
        from.read_exact_at(chunk, position)?;
        to.write_all_at(chunk, position)?;
        position += chunk.len() as u64;
    }
    Ok(())
}

/// Moves a file to a name that must be free; between filesystems by a copy that is durable before the
/// old file goes.
pub(super) fn move_file(from: &Utf8Path, to: &Utf8Path) -> RootfsResult<()> {
    match rustix::fs::renameat_with(CWD, from.as_str(), CWD, to.as_str(), RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::XDEV) => copy_then_remove(from, to),
        Err(Errno::EXIST) => Err(RootfsError::Exists { path: to.to_owned() }),
        Err(error) => Err(RootfsError::file("move", from, error.into())),
    }
}

fn copy_then_remove(from: &Utf8Path, to: &Utf8Path) -> RootfsResult<()> {
    let source = File::open(from).map_err(|error| RootfsError::file("open", from, error))?;
    let target = Unfinished::create(to)?;
    let copied = copy_content(&source, target.file())
        .and_then(|_| target.file().set_permissions(source.metadata()?.permissions()))
        .and_then(|()| target.file().sync_all());
    copied.map_err(|error| RootfsError::file("write", to, error))?;
    target.keep();
    fs::remove_file(from).map_err(|error| RootfsError::file("remove", from, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::own_filesystem::{self, Kind};

    const MIB: u64 = 1 << 20;

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        (directory, path)
    }

    /// Data at both ends of a hole, and a hole at the end.
    fn write_sparse(path: &Utf8Path) {
        let file = File::create(path).unwrap();
        file.write_all_at(&[1; 5000], 0).unwrap();
        file.write_all_at(&[2; 70_000], 3 * MIB + 17).unwrap();
        file.set_len(8 * MIB).unwrap();
    }

    fn used(path: &Utf8Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(path).unwrap().blocks() * 512
    }

    #[test]
    fn a_sparse_copy_has_the_bytes_and_the_holes() {
        let (_guard, at) = directory();
        write_sparse(&at.join("from"));
        let to = File::create(at.join("to")).unwrap();
        copy_sparse(&File::open(at.join("from")).unwrap(), &to).unwrap();
        assert_eq!(fs::read(at.join("from")).unwrap(), fs::read(at.join("to")).unwrap());
        to.sync_all().unwrap();
        assert!(used(&at.join("to")) < MIB, "{} bytes in use", used(&at.join("to")));
    }

    #[test]
    fn the_buffer_copies_exactly_the_range() {
        let (_guard, at) = directory();
        write_sparse(&at.join("from"));
        let to = File::options().read(true).write(true).create_new(true).open(at.join("to")).unwrap();
        copy_through_buffer(&File::open(at.join("from")).unwrap(), &to, 100, 4 * MIB).unwrap();
        let (from, to) = (fs::read(at.join("from")).unwrap(), fs::read(at.join("to")).unwrap());
        assert_eq!(to.len() as u64, 4 * MIB);
        assert!(to[..100].iter().all(|byte| *byte == 0));
        assert!(to[100..] == from[100..4 << 20]);
    }

    #[test]
    fn blocks_are_shared_where_the_filesystem_can() {
        let made = own_filesystem::with(Kind::Btrfs, 128 * MIB, |at| {
            write_sparse(&at.join("from"));
            let to = File::create_new(at.join("to")).unwrap();
            let copied = copy_content(&File::open(at.join("from")).unwrap(), &to).unwrap();
            assert_eq!(copied, Copied::Shared);
            assert_eq!(fs::read(at.join("from")).unwrap(), fs::read(at.join("to")).unwrap());
        });
        made.or_say_skipped("sharing blocks between files");
    }

    #[test]
    fn a_move_between_filesystems_is_a_copy() {
        let (_guard, at) = directory();
        write_sparse(&at.join("from"));
        let bytes = fs::read(at.join("from")).unwrap();
        let moved = own_filesystem::with(Kind::Tmpfs, 16 * MIB, move |other| {
            move_file(&at.join("from"), &other.join("to")).unwrap();
            assert!(!at.join("from").exists());
            assert!(fs::read(other.join("to")).unwrap() == bytes);
        });
        moved.or_say_skipped("moving between filesystems");
    }

    #[test]
    fn a_move_replaces_nothing() {
        let (_guard, at) = directory();
        fs::write(at.join("from"), "new").unwrap();
        fs::write(at.join("to"), "old").unwrap();
        let error = move_file(&at.join("from"), &at.join("to")).unwrap_err();
        assert!(matches!(error, RootfsError::Exists { .. }), "{error:?}");
        assert_eq!(fs::read_to_string(at.join("to")).unwrap(), "old");
        assert_eq!(fs::read_to_string(at.join("from")).unwrap(), "new");
    }
}
