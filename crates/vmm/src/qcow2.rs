//! What a qcow2 file says about itself: its size, and what it stands on.
//!
//! The header is written by the host and out of reach of a guest; only the clusters behind it are a guest's.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use camino::{Utf8Path, Utf8PathBuf};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// How much of the start of a file holds the fields that are read here.
const FIELDS: usize = 32;
/// The longest name of a backing file.
const LONGEST_NAME: u32 = 1023;

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
    let mut file = File::open(path)?;
    let mut start = [0; FIELDS];
    match file.read_exact(&mut start) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let Some(fields) = Fields::of(&start) else { return Ok(None) };
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

/// Names another file as the one on which a file stands, as a VMM does that has copied what lies between.
/// There is room for it up to the end of the cluster, because the name is the last thing in it.
pub(crate) fn set_backing_file(path: &Utf8Path, name: &Utf8Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut start = [0; FIELDS];
    file.read_exact_at(&mut start, 0)?;
    let length = u32::try_from(name.as_str().len()).ok().filter(|length| *length <= LONGEST_NAME);
    let (Some(fields), Some(length)) = (Fields::of(&start), length) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    file.write_all_at(name.as_str().as_bytes(), fields.name_offset)?;
    file.write_all_at(&length.to_be_bytes(), 16)
}

/// Where the header says what. The numbers are of big-endian bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fields {
    name_offset: u64,
    name_length: u32,
    virtual_bytes: u64,
}

impl Fields {
    fn of(start: &[u8; FIELDS]) -> Option<Self> {
        let fields = Self {
            name_offset: u64::from_be_bytes(part(start, 8)),
            name_length: u32::from_be_bytes(part(start, 16)),
            virtual_bytes: u64::from_be_bytes(part(start, 24)),
        };
        (start.starts_with(&MAGIC) && fields.name_length <= LONGEST_NAME).then_some(fields)
    }
}

fn part<const N: usize>(bytes: &[u8; FIELDS], offset: usize) -> [u8; N] {
    std::array::from_fn(|at| bytes[offset + at])
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
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), FIELDS..200)) {
            let mut start: [u8; FIELDS] = std::array::from_fn(|at| bytes[at]);
            start[..4].copy_from_slice(&MAGIC);
            if let Some(fields) = Fields::of(&start) {
                prop_assert!(fields.name_length <= LONGEST_NAME);
            }
        }
    }
}
