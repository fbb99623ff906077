//! Metadata of files: what a client attaches to a file in `X-Metadata-*` headers, kept in extended attributes.
//!
//! | header | attribute | in answers |
//! |---|---|---|
//! | `X-Metadata-Author: me` | `user.e2b.author` | `"metadata": {"author": "me"}` |
//!
//! Each upload says all there is: what it does not name is cleared. Programs in the guest may set such attributes too,
//! so what is read is not trusted to be text or short. Links are followed: the metadata is that of the file.

use std::{collections::BTreeMap, io, os::fd::AsFd, path::Path};

use http::HeaderMap;
use rustix::{
    fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, listxattr},
    io::Errno,
};

/// What the attributes' names begin with.
const PREFIX: &str = "user.e2b.";
const HEADER_PREFIX: &str = "x-metadata-";
/// The longest key: the kernel takes names of 255 bytes.
const MAXIMUM_KEY: usize = 255 - PREFIX.len();
/// The most that one file has, names with their prefix and values together: about what ext4 can hold.
const MAXIMUM_TOTAL: usize = 4096;
/// The most that is read of one file, should a program have set more on a file system that can hold it.
const MAXIMUM_READ: usize = 16 * 1024;
/// The most that the kernel lists of a file, and the longest value.
const KERNEL_MAXIMUM: usize = 64 * 1024;

/// What a client attached to a file.
pub(crate) type Metadata = BTreeMap<String, String>;

/// Why the metadata of a request cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MetadataError {
    #[error("metadata key {0:?} exceeds {MAXIMUM_KEY} bytes")]
    Key(String),
    #[error("metadata key {0:?} contains non-printable-ASCII bytes")]
    KeyByte(String),
    #[error(
        "metadata value for key {key:?} contains non-printable-ASCII byte 0x{byte:02x} at offset {offset}"
    )]
    ValueByte { key: String, byte: u8, offset: usize },
    #[error("total metadata size {0} exceeds {MAXIMUM_TOTAL} bytes")]
    Total(usize),
}

/// Reads and checks the metadata headers of a request. Of one that comes twice the first counts.
pub(crate) fn from_headers(headers: &HeaderMap) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::new();
    let mut total = 0;
    for name in headers.keys() {
        // Names of headers are in lower case already.
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX).filter(|key| !key.is_empty()) else {
            continue;
        };
        let Some(value) = headers.get(name) else { continue };
        if key.len() > MAXIMUM_KEY {
            return Err(MetadataError::Key(key.to_owned()));
        }
        if !key.bytes().all(printable) {
            return Err(MetadataError::KeyByte(key.to_owned()));
        }
        let value = value.as_bytes();
        if let Some((offset, &byte)) = value.iter().enumerate().find(|(_, byte)| !printable(**byte)) {
            return Err(MetadataError::ValueByte { key: key.to_owned(), byte, offset });
        }
        total += PREFIX.len() + key.len() + value.len();
        metadata.insert(key.to_owned(), String::from_utf8_lossy(value).into_owned());
    }
    if total > MAXIMUM_TOTAL { Err(MetadataError::Total(total)) } else { Ok(metadata) }
}

fn printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}

/// The metadata of a file. A file that has none, or may not have any, or is not there, has none.
pub(crate) fn read(path: &Path) -> Metadata {
    collect(|buffer| listxattr(path, buffer), |name, buffer| getxattr(path, name, buffer))
}

/// The metadata of an open file.
pub(crate) fn read_open(file: impl AsFd) -> Metadata {
    let file = file.as_fd();
    collect(|buffer| flistxattr(file, buffer), |name, buffer| fgetxattr(file, name, buffer))
}

/// Makes `metadata` all that a file has. On a file system without extended attributes nothing happens.
pub(crate) fn replace(file: impl AsFd, metadata: &Metadata) -> io::Result<()> {
    let file = file.as_fd();
    let existing = match names(|buffer| flistxattr(file, buffer)) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        other => other?,
    };
    for name in existing.iter().filter(|name| !metadata.contains_key(&name[PREFIX.len()..])) {
        match fremovexattr(file, name.as_str()) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (key, value) in metadata {
        match fsetxattr(file, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty()) {
            Ok(()) => {}
            // Some file systems list attributes, of the system for example, and take none from users.
            Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn collect(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&str, &mut [u8]) -> Result<usize, Errno>,
) -> Metadata {
    let mut metadata = Metadata::new();
    let mut total = 0;
    for name in names(list).unwrap_or_default() {
        // Whatever cannot be read, or is no text and so cannot be sent, is left out.
        let Ok(value) = grow(|buffer| get(&name, buffer)) else { continue };
        let Ok(value) = String::from_utf8(value) else { continue };
        total += name.len() + value.len();
        if total > MAXIMUM_READ {
            break;
        }
        metadata.insert(name[PREFIX.len()..].to_owned(), value);
    }
    metadata
}

/// The whole names of those attributes that are metadata, with their prefix.
fn names(list: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<String>, Errno> {
    let list = grow(list)?;
    let texts = list.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok());
    Ok(texts
        .filter(|name| name.len() > PREFIX.len() && name.starts_with(PREFIX))
        .map(str::to_owned)
        .collect())
}

/// Asks with little room, which is enough nearly always, and then with as much as can be needed.
fn grow(ask: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut small = [0; 512];
    match ask(&mut small) {
        Ok(length) => Ok(small[..length].to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; KERNEL_MAXIMUM];
            let length = ask(&mut large)?;
            large.truncate(length);
            Ok(large)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;
    use rustix::fs::setxattr;

    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Metadata {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn headers(pairs: &[(&str, &[u8])]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| {
                (name.parse::<HeaderName>().unwrap(), HeaderValue::from_bytes(value).unwrap())
            })
            .collect()
    }

    #[test]
    #[allow(clippy::print_stdout, reason = "who runs the tests is told what was skipped")]
    fn what_is_set_is_read_and_what_is_not_named_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        let set = |name: &str, value: &[u8]| setxattr(&path, name, value, XattrFlags::empty());
        if set("user.other", b"kept") == Err(Errno::OPNOTSUPP) {
            println!("skipped: this file system has no extended attributes");
            return;
        }
        let long = "x".repeat(3000);
        let first = map(&[("author", "me"), ("empty", ""), ("long", &long)]);
        replace(&file, &first).unwrap();
        assert_eq!(read(&path), first);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(read(&link), first, "links are followed");
        let second = map(&[("author", "you"), ("new", "1")]);
        replace(&file, &second).unwrap();
        set("user.e2b.binary", b"\xff\xfe").unwrap();
        assert_eq!((read(&path), read_open(&file)), (second.clone(), second));
        replace(&file, &Metadata::new()).unwrap();
        assert_eq!(read(&path), Metadata::new());
        let mut value = [0; 8];
        assert_eq!(getxattr(&path, "user.other", &mut value).unwrap(), 4);
    }

    #[test]
    fn what_cannot_have_metadata_has_none() {
        assert_eq!(read(Path::new("/proc/self/status")), Metadata::new());
        assert_eq!(read(Path::new("/nowhere")), Metadata::new());
        assert_eq!(read(Path::new("/dev/null")), Metadata::new());
        let kernel_file = fs::File::open("/proc/self/status").unwrap();
        replace(&kernel_file, &map(&[("a", "b")])).unwrap();
    }

    #[test]
    fn headers_are_checked() {
        let given = headers(&[
            ("X-Metadata-Author", b"me"),
            ("x-metadata-AUTHOR", b"you"),
            ("x-metadata-", b"nameless"),
            ("x-metadat", b"other"),
            ("x-metadata-empty", b""),
        ]);
        assert_eq!(from_headers(&given), Ok(map(&[("author", "me"), ("empty", "")])));
        let refused = |name: &str, value: &[u8]| from_headers(&headers(&[(name, value)])).unwrap_err();
        assert_eq!(
            refused("x-metadata-a", b"x\ty").to_string(),
            "metadata value for key \"a\" contains non-printable-ASCII byte 0x09 at offset 1"
        );
        assert!(matches!(refused("x-metadata-a", b"\xc3\xa9"), MetadataError::ValueByte { byte: 0xc3, .. }));
        let name = |length: usize| format!("x-metadata-{}", "k".repeat(length));
        assert!(matches!(refused(&name(247), b"v"), MetadataError::Key(_)));
        assert!(from_headers(&headers(&[(&name(246), b"v")])).is_ok());
        let value = |length: usize| "v".repeat(length).into_bytes();
        assert!(from_headers(&headers(&[("x-metadata-a", &value(4086))])).is_ok());
        assert_eq!(refused("x-metadata-a", &value(4087)), MetadataError::Total(4097));
    }

    proptest! {
        #[test]
        fn accepted_metadata_can_be_kept(
            names in prop::collection::vec("[A-Za-z0-9!#$%&'*+.^_`|~-]{0,260}", 0..4),
            values in prop::collection::vec("[\t -~\u{80}-\u{ff}]{0,1500}", 4),
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in names.iter().zip(&values) {
                let name = HeaderName::try_from(format!("x-metadata-{name}")).unwrap();
                headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            if let Ok(metadata) = from_headers(&headers) {
                let sizes = metadata.iter().map(|(key, value)| PREFIX.len() + key.len() + value.len());
                prop_assert!(sizes.sum::<usize>() <= MAXIMUM_TOTAL);
                for (key, value) in &metadata {
                    prop_assert!(!key.is_empty() && key.len() <= MAXIMUM_KEY);
                    prop_assert!(!key.bytes().any(|byte| byte.is_ascii_uppercase()));
                    prop_assert!(key.bytes().chain(value.bytes()).all(printable));
                }
            }
        }
    }
}
