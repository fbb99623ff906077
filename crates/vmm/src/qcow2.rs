//! What a qcow2 file of version 3 says about itself: its size, how it was closed, and what it stands on. After QEMU's
//! `docs/interop/qcow2.txt`.
//!
//! The header is written by the host and out of reach of a guest; only the clusters behind it are a guest's.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use camino::{Utf8Path, Utf8PathBuf};

use crate::{DiskSpec, validate::same_file};

/// What such a file begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The only version that is read here, and that QEMU has made for as long as it has run such machines.
pub const VERSION: u32 = 3;
/// How many bytes of the start of a file hold the fields that are read here.
pub const HEADER_LENGTH: u32 = 104;
/// The longest name of a file below that QEMU reads, in bytes.
pub const LONGEST_NAME: usize = 1023;

/// What is read of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// The size that a guest sees.
    pub(crate) virtual_bytes: u64,
    /// What it stands on, as an absolute path when the file's own path is one.
    pub(crate) backing_file: Option<Utf8PathBuf>,
}

/// Reads the header of a file; none when it is no qcow2 file.
pub(crate) fn header(path: &Utf8Path) -> io::Result<Option<Header>> {
    let file = File::open(path)?;
    let Ok(fields) = Fields::parse(&start_of(&file)?) else { return Ok(None) };
    let mut name = vec![0; fields.name_length as usize];
    file.read_exact_at(&mut name, fields.name_offset)?;
    let name = String::from_utf8(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let backing_file = (!name.is_empty()).then(|| match path.parent() {
        // A relative name is one beside the file.
        Some(directory) => directory.join(&name),
        None => Utf8PathBuf::from(&name),
    });
    Ok(Some(Header { virtual_bytes: fields.virtual_bytes, backing_file }))
}

/// The one of these files that a header names, if it is one of them; a header may have another name for it than they have.
/// It is to be opened as it is called here: whoever wrote the file may have written its header, too.
#[must_use]
pub fn named<'a>(bases: &'a [DiskSpec], name: &Utf8Path) -> Option<&'a DiskSpec> {
    bases.iter().find(|base| base.path == name || same_file(&base.path, name).unwrap_or(false))
}

/// As much of the start of a file as [`Fields::parse`] needs, or all of a shorter one.
///
/// # Errors
/// It cannot be read.
pub fn start_of(file: &File) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(HEADER_LENGTH as usize);
    file.take(HEADER_LENGTH.into()).read_to_end(&mut start)?;
    Ok(start)
}

/// Names another file as the one on which a file stands, as a VMM does that has copied what lies between.
/// There is room for it up to the end of the cluster, because the name is the last thing in it.
pub(crate) fn set_backing_file(path: &Utf8Path, name: &Utf8Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let length = Some(name.as_str().len()).filter(|length| *length <= LONGEST_NAME);
    let length = length.and_then(|length| u32::try_from(length).ok());
    let (Ok(fields), Some(length)) = (Fields::parse(&start_of(&file)?), length) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    file.write_all_at(name.as_str().as_bytes(), fields.name_offset)?;
    file.write_all_at(&length.to_be_bytes(), 16)
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields {
    /// The size that a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// The features without which the file cannot be understood; none are set in one that was closed cleanly and uses
    /// nothing special.
    pub features: u64,
    name_offset: u64,
    name_length: u32,
}

/// The start of a file is no header that is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoHeader {
    /// It ends before the header does.
    #[error("it ends within the header")]
    Short,
    /// It does not begin as such a file does.
    #[error("it is not a qcow2 file of version {VERSION}")]
    Format,
}

impl Fields {
    /// Reads the fields in the start of a file. The numbers are of big-endian bytes.
    ///
    /// # Errors
    /// It is too short, of another version, or something else.
    pub fn parse(start: &[u8]) -> Result<Self, NoHeader> {
        if part::<4>(start, 0)? != MAGIC || u32::from_be_bytes(part(start, 4)?) != VERSION {
            return Err(NoHeader::Format);
        }
        let fields = Self {
            name_offset: u64::from_be_bytes(part(start, 8)?),
            name_length: u32::from_be_bytes(part(start, 16)?),
            virtual_bytes: u64::from_be_bytes(part(start, 24)?),
            features: u64::from_be_bytes(part(start, 72)?),
        };
        if fields.name_length as usize > LONGEST_NAME {
            return Err(NoHeader::Format);
        }
        Ok(fields)
    }
}

fn part<const N: usize>(start: &[u8], offset: usize) -> Result<[u8; N], NoHeader> {
    let bytes = start.get(offset..offset + N).ok_or(NoHeader::Short)?;
    bytes.try_into().map_err(|_| NoHeader::Short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_names_what_the_file_stands_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().join("disk");
        let mut bytes = vec![0; 200];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[15] = 112;
        bytes[24..32].copy_from_slice(&(3_u64 << 30).to_be_bytes());
        for (name, wanted) in [
            ("", None),
            ("/a/base", Some(Utf8PathBuf::from("/a/base"))),
            ("base", Some(path.with_file_name("base"))),
        ] {
            bytes[19] = u8::try_from(name.len()).unwrap();
            bytes[112..112 + name.len()].copy_from_slice(name.as_bytes());
            std::fs::write(&path, &bytes).unwrap();
            let wanted = Header { virtual_bytes: 3 << 30, backing_file: wanted };
            assert_eq!(header(&path).unwrap(), Some(wanted));
        }
        set_backing_file(&path, "/another/base".into()).unwrap();
        assert_eq!(header(&path).unwrap().unwrap().backing_file, Some("/another/base".into()));
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert_eq!(header(&path).unwrap(), None, "it is too short to be one");
        bytes[0] = 0;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(header(&path).unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Fields::parse(&bytes).is_err() || bytes.len() >= 80);
            let mut marked = [&MAGIC[..], &VERSION.to_be_bytes()].concat();
            marked.extend(bytes);
            if let Ok(fields) = Fields::parse(&marked) {
                prop_assert!(fields.name_length as usize <= LONGEST_NAME);
            }
        }
    }
}
