//! Digests of files. A small file's is its SHA-256, as `sha256sum` prints it. A large file's is made of
//! its blocks that are not zero, so that neither holes nor zeros cost anything:
//!
//! ```text
//! SHA-256( for each block of 64 KiB that has a byte other than zero: its number, its bytes ; the file's length )
//! ```
//!
//! Numbers are 8 bytes, little endian. The last block may be shorter. The digest is the same whether zeros
//! are stored or are holes, so it survives a copy of the file.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{SnapshotStoreError, SnapshotStoreResult, files::next_block_with_data};

const BLOCK: usize = 64 << 10;

/// 64 hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// The text is not a digest.
#[derive(Debug, thiserror::Error)]
#[error("a digest is 64 lower-case hexadecimal digits")]
pub struct ParseDigestError;

impl Digest {
    fn of(hasher: Sha256) -> Self {
        Self(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Of a few bytes in memory.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self::of(Sha256::new_with_prefix(bytes))
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseDigestError;

    fn try_from(text: String) -> Result<Self, ParseDigestError> {
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text))
        } else {
            Err(ParseDigestError)
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The SHA-256 of a file that is read whole; of one that is longer than `bound`, of its first bytes.
pub(crate) fn of_small_file(path: &Utf8Path, bound: u64) -> SnapshotStoreResult<Digest> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(bound).read_to_end(&mut bytes))
        .map_err(|source| SnapshotStoreError::file("read", path, source))?;
    Ok(Digest::of_bytes(&bytes))
}

/// How the digest of a file is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Of all bytes.
    Plain,
    /// Of the blocks that are not zero.
    Blocks,
}

/// The SHA-256 of a file of any length, in pieces.
pub(crate) fn of_file(path: &Utf8Path) -> SnapshotStoreResult<Digest> {
    Hashing::open(path, Form::Plain)?.finish()
}

/// The digest of a file's blocks that are not zero.
pub(crate) fn of_large_file(path: &Utf8Path) -> SnapshotStoreResult<Digest> {
    Hashing::open(path, Form::Blocks)?.finish()
}

/// A digest in the making, for who reads a file a piece at a time and does other things in between.
#[derive(Debug)]
pub(crate) struct Hashing {
    path: Utf8PathBuf,
    file: File,
    form: Form,
    /// What the file had when it was opened.
    length: u64,
    position: u64,
    hasher: Sha256,
}

/// What came of reading a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes were read, and there are more.
    More(u64),
    /// The file was read to its end.
    Last(u64, Digest),
}

impl Hashing {
    /// Opens a file. One that is removed meanwhile is read to its end all the same.
    pub(crate) fn open(path: &Utf8Path, form: Form) -> SnapshotStoreResult<Self> {
        let opened = File::open(path).and_then(|file| Self::of(path, file, form));
        opened.map_err(|source| SnapshotStoreError::file("read", path, source))
    }

    fn of(path: &Utf8Path, file: File, form: Form) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, form, length, position: 0, hasher: Sha256::new() })
    }

    /// Reads at most so many bytes, rounded up to whole blocks. Holes are no bytes.
    pub(crate) fn read(&mut self, at_most: u64) -> SnapshotStoreResult<Piece> {
        let read = match self.form {
            Form::Plain => self.read_plain(at_most),
            Form::Blocks => self.read_blocks(at_most),
        };
        read.map_err(|source| SnapshotStoreError::file("read", &self.path, source))
    }

    fn finish(mut self) -> SnapshotStoreResult<Digest> {
        match self.read(u64::MAX)? {
            Piece::Last(_, digest) => Ok(digest),
            Piece::More(_) => {
                let source = io::Error::other("it has more bytes than can be counted");
                Err(SnapshotStoreError::file("read", &self.path, source))
            }
        }
    }

    fn digest(&self) -> Digest {
        Digest::of(self.hasher.clone())
    }

    fn read_plain(&mut self, at_most: u64) -> io::Result<Piece> {
        let mut buffer = vec![0_u8; 4 * BLOCK];
        let mut total = 0;
        while total < at_most {
            match self.file.read_at(&mut buffer, self.position) {
                Ok(0) => return Ok(Piece::Last(total, self.digest())),
                Ok(read) => {
                    self.hasher.update(&buffer[..read]);
                    self.position += read as u64;
                    total += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Piece::More(total))
    }

    fn read_blocks(&mut self, at_most: u64) -> io::Result<Piece> {
        let zeros = [0_u8; BLOCK];
        let mut buffer = vec![0_u8; BLOCK];
        let mut total = 0;
        while total < at_most {
            let next = next_block_with_data(&self.file, self.position, self.length, BLOCK as u64)?;
            let Some(block) = next else {
                self.hasher.update(self.length.to_le_bytes());
                return Ok(Piece::Last(total, self.digest()));
            };
            let wanted = usize::try_from(self.length - block).map_or(BLOCK, |left| left.min(BLOCK));
            let bytes = &mut buffer[..wanted];
            self.file.read_exact_at(bytes, block)?;
            if *bytes != zeros[..wanted] {
                self.hasher.update((block / BLOCK as u64).to_le_bytes());
                self.hasher.update(&*bytes);
            }
            self.position = block + BLOCK as u64;
            total += wanted as u64;
        }
        Ok(Piece::More(total))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest_blocks(file: &File) -> io::Result<Digest> {
        let hashing = Hashing::of(Utf8Path::new("a file"), file.try_clone()?, Form::Blocks)?;
        hashing.finish().map_err(io::Error::other)
    }

    fn file_of(length: u64, writes: &[(u64, u8)], store_zeros: bool) -> File {
        let file = tempfile::tempfile().unwrap();
        if store_zeros {
            file.write_all_at(&vec![0; usize::try_from(length).unwrap()], 0).unwrap();
        }
        file.set_len(length).unwrap();
        for (at, byte) in writes {
            file.write_all_at(&[*byte], at % length).unwrap();
        }
        file
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn holes_do_not_matter_and_bytes_do(
            length in 1_u64..1_000_000,
            writes in proptest::collection::vec((any::<u64>(), 1_u8..), 0..6),
            flip in any::<u64>(),
        ) {
            let sparse = digest_blocks(&file_of(length, &writes, false)).unwrap();
            prop_assert_eq!(&sparse, &digest_blocks(&file_of(length, &writes, true)).unwrap());

            let flipped = file_of(length, &writes, false);
            let mut byte = [0];
            flipped.read_exact_at(&mut byte, flip % length).unwrap();
            flipped.write_all_at(&[byte[0] ^ 1], flip % length).unwrap();
            prop_assert_ne!(&sparse, &digest_blocks(&flipped).unwrap());

            let longer = file_of(length, &writes, false);
            longer.set_len(length + 1).unwrap();
            prop_assert_ne!(&sparse, &digest_blocks(&longer).unwrap());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pieces_of_any_size_make_the_same_digest(
            length in 0_u64..1_000_000,
            writes in proptest::collection::vec((any::<u64>(), any::<u8>()), 0..6),
            pieces in proptest::collection::vec(1_u64..400_000, 1..8),
            plain in any::<bool>(),
        ) {
            let file = file_of(length.max(1), &writes, false);
            file.set_len(length).unwrap();
            let form = if plain { Form::Plain } else { Form::Blocks };
            let hashing = || Hashing::of(Utf8Path::new("a file"), file.try_clone().unwrap(), form).unwrap();
            let (mut piecewise, mut sizes) = (hashing(), pieces.iter().cycle());
            let digest = loop {
                let at_most = *sizes.next().unwrap();
                let (read, digest) = match piecewise.read(at_most).unwrap() {
                    Piece::More(read) => (read, None),
                    Piece::Last(read, digest) => (read, Some(digest)),
                };
                prop_assert!(read < at_most + 4 * BLOCK as u64, "{} bytes of {}", read, at_most);
                if let Some(digest) = digest {
                    break digest;
                }
            };
            prop_assert_eq!(digest, hashing().finish().unwrap());
        }
    }

    #[test]
    fn a_hole_of_any_size_costs_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(&[1], 1 << 39).unwrap();
        let digest = digest_blocks(&file).unwrap();
        file.write_all_at(&[2], 1 << 39).unwrap();
        assert_ne!(digest, digest_blocks(&file).unwrap());
    }

    #[test]
    fn a_small_file_has_the_digest_that_everyone_prints() {
        assert_eq!(
            Digest::of_bytes(b"abc").as_str(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_file_that_is_read_in_pieces_has_the_same_digest() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().join("file");
        for length in [0, 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1, 11 * BLOCK] {
            let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(of_file(&path).unwrap(), Digest::of_bytes(&bytes), "{length} bytes");
        }
    }
}
