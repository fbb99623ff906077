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

use camino::Utf8Path;
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

/// The SHA-256 of a file of any length, in pieces.
pub(crate) fn of_file(path: &Utf8Path) -> SnapshotStoreResult<Digest> {
    let digest = || {
        let mut file = File::open(path)?;
        let mut buffer = vec![0_u8; 4 * BLOCK];
        let mut hasher = Sha256::new();
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(Digest::of(hasher)),
                Ok(read) => hasher.update(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    };
    digest().map_err(|source| SnapshotStoreError::file("read", path, source))
}

/// The digest of a file's blocks that are not zero.
pub(crate) fn of_large_file(path: &Utf8Path) -> SnapshotStoreResult<Digest> {
    File::open(path)
        .and_then(|file| digest_blocks(&file))
        .map_err(|source| SnapshotStoreError::file("read", path, source))
}

fn digest_blocks(file: &File) -> io::Result<Digest> {
    let zeros = [0_u8; BLOCK];
    let mut buffer = vec![0_u8; BLOCK];
    let mut hasher = Sha256::new();
    let length = file.metadata()?.len();
    let mut position = 0;
    while let Some(block) = next_block_with_data(file, position, length, BLOCK as u64)? {
        position = block;
        let wanted = usize::try_from(length - position).map_or(BLOCK, |left| left.min(BLOCK));
        let bytes = &mut buffer[..wanted];
        file.read_exact_at(bytes, position)?;
        if *bytes != zeros[..wanted] {
            hasher.update((position / BLOCK as u64).to_le_bytes());
            hasher.update(&*bytes);
        }
        position += BLOCK as u64;
    }
    hasher.update(length.to_le_bytes());
    Ok(Digest::of(hasher))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
