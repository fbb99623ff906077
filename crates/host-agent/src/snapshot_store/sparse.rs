//! Files that take no more of the disk than what is in them.
//!
//! A guest's memory comes from a file that was written all over: the kernel clears what is free. What reads
//! as zero is given back here, and reads as zero still.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use camino::Utf8Path;
use rustix::fs::{FallocateFlags, fallocate};

use super::{SnapshotStoreError, SnapshotStoreResult, files::next_block_with_data};

const PAGE: usize = 4 << 10;
/// How much is read at once.
const CHUNK: usize = 1 << 20;
/// A shorter row of zeros stays: a hole takes room in the file system's own tables.
const SHORTEST_HOLE: u64 = 64 << 10;

/// Gives back the blocks of the file at `path` that hold only zeros. Blocks until it is done. Where the file
/// system knows no holes, nothing happens.
pub(super) fn punch_zeros(path: &Utf8Path) -> SnapshotStoreResult<()> {
    let punch = || {
        let file = File::options().read(true).write(true).open(path)?;
        match punch(&file) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    };
    punch().map_err(|source| SnapshotStoreError::file("make holes in", path, source))
}

fn punch(file: &File) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    let mut zeros = Zeros::default();
    let mut position = 0;
    while let Some(data) = next_block_with_data(file, position, length, PAGE as u64)? {
        if data > position
            && let Some(hole) = zeros.end()
        {
            punch_hole(file, hole)?;
        }
        position = data;
        let wanted = usize::try_from(length - position).map_or(CHUNK, |left| left.min(CHUNK));
        file.read_exact_at(&mut buffer[..wanted], position)?;
        for page in buffer[..wanted].chunks(PAGE) {
            if let Some(hole) = zeros.push(position, page) {
                punch_hole(file, hole)?;
            }
            position += page.len() as u64;
        }
    }
    zeros.end().map_or(Ok(()), |hole| punch_hole(file, hole))
}

/// A row of zeros, and where in the file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hole {
    start: u64,
    bytes: u64,
}

/// The row of zeros that is being read.
#[derive(Debug, Default)]
struct Zeros {
    row: Option<Hole>,
}

impl Zeros {
    /// Takes the next page. Returns the row of zeros that has ended with it, if it is worth a hole.
    fn push(&mut self, at: u64, page: &[u8]) -> Option<Hole> {
        // A page against itself, one byte on: all are as the first, which is zero.
        let is_zero = page.first() == Some(&0) && page[1..] == page[..page.len() - 1];
        if !is_zero {
            return self.end();
        }
        let bytes = page.len() as u64;
        match &mut self.row {
            Some(row) => row.bytes += bytes,
            None => self.row = Some(Hole { start: at, bytes }),
        }
        None
    }

    fn end(&mut self) -> Option<Hole> {
        self.row.take().filter(|row| row.bytes >= SHORTEST_HOLE)
    }
}

fn punch_hole(file: &File, hole: Hole) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| fallocate(file, flags, hole.start, hole.bytes))?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write as _,
        os::unix::fs::{FileExt as _, MetadataExt as _},
    };

    use camino::Utf8PathBuf;
    use proptest::prelude::*;

    use super::*;

    fn path_in(directory: &tempfile::TempDir) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(directory.path().join("memory")).unwrap()
    }

    #[test]
    fn zeros_that_were_written_are_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_in(&directory);
        let mut file = File::create(&path).unwrap();
        file.write_all(&vec![0; 8 << 20]).unwrap();
        file.write_all_at(b"here", (3 << 20) + 5).unwrap();
        file.sync_all().unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 >= 8 << 20);
        punch_zeros(&path).unwrap();
        let metadata = file.metadata().unwrap();
        assert!(metadata.blocks() * 512 <= 64 << 10, "{} blocks are left", metadata.blocks());
        assert_eq!(metadata.len(), 8 << 20);
        let mut expected = vec![0; 8 << 20];
        expected[(3 << 20) + 5..][..4].copy_from_slice(b"here");
        assert!(fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = punch_zeros(Utf8Path::new("/nothing/here")).unwrap_err();
        assert!(error.to_string().contains("/nothing/here"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn content_is_as_before(
            length in 1_u64..3_000_000,
            writes in prop::collection::vec((0_u64..3_000_000, 0_usize..200_000, 0_u8..3), 0..12),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = path_in(&directory);
            let file = File::create(&path).unwrap();
            for (at, bytes, value) in writes {
                file.write_all_at(&vec![value; bytes], at).unwrap();
            }
            file.set_len(length).unwrap();
            let before = fs::read(&path).unwrap();
            punch_zeros(&path).unwrap();
            prop_assert!(fs::read(&path).unwrap() == before);
            // Again, over its own holes.
            punch_zeros(&path).unwrap();
            prop_assert!(fs::read(&path).unwrap() == before);
        }
    }
}
