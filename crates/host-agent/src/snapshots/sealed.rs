//! Manifests that notice every change of their text: what is recorded, and the digest of it.
//!
//! A manifest is written in one way only, so the text that is read must be the text that would be written.
//! A flipped bit in any value, in a name, in the digest or in white space is damage.

use std::{fs, io};

use camino::Utf8Path;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::SnapshotsResult;
use crate::snapshot_store::{Damage, Digest, SnapshotStoreError};

/// The format that this program writes and reads.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Sealed<T> {
    format: u32,
    digest: Digest,
    content: T,
}

/// What every format has.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// The text of a manifest that is to be at `path`.
pub(super) fn to_text<T: Serialize>(content: &T, path: &Utf8Path) -> SnapshotsResult<Vec<u8>> {
    let invalid = |source| SnapshotStoreError::Manifest { path: path.to_owned(), source };
    let digest = Digest::of_bytes(&serde_json::to_vec(&(FORMAT, content)).map_err(invalid)?);
    let mut text = serde_json::to_vec_pretty(&Sealed { format: FORMAT, digest, content }).map_err(invalid)?;
    text.push(b'\n');
    Ok(text)
}

/// What the manifest at `path` records; none when it is not there.
pub(super) fn read<T: Serialize + DeserializeOwned>(path: &Utf8Path) -> SnapshotsResult<Option<T>> {
    match fs::read(path) {
        Ok(text) => parse(&text, path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SnapshotStoreError::file("read", path, source)),
    }
}

fn parse<T: Serialize + DeserializeOwned>(text: &[u8], path: &Utf8Path) -> SnapshotsResult<T> {
    let invalid = |source| SnapshotStoreError::Manifest { path: path.to_owned(), source };
    let found = serde_json::from_slice::<AnyFormat>(text).map_err(invalid)?.format;
    if found != FORMAT {
        return Err(SnapshotStoreError::Format { path: path.to_owned(), found, known: FORMAT });
    }
    let sealed: Sealed<T> = serde_json::from_slice(text).map_err(invalid)?;
    // The digest is one of the things that would be written.
    if to_text(&sealed.content, path)? == text {
        Ok(sealed.content)
    } else {
        Err(SnapshotStoreError::Damaged { path: path.to_owned(), damage: Damage::Content })
    }
}
