//! Writer of the `newc` archive that the kernel unpacks as its first root filesystem.
//!
//! Each entry is a header of fixed-width hexadecimal numbers, a name and the data, all padded to four bytes.
//! Times and owners are zero, so the same content gives the same bytes. The archive is not compressed: under
//! emulation that boots as fast as the best of the compressions, and memory holds it only until it is unpacked.

use anyhow::{Result, ensure};

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_REGULAR: u32 = 0o100_000;
const TYPE_CHARACTER: u32 = 0o020_000;

/// What kind of entry, with what belongs to it.
enum Entry<'a> {
    Directory,
    File { data: &'a [u8] },
    CharacterDevice { major: u32, minor: u32 },
}

/// An archive under construction. Parents come before what is in them.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        self.entry(name, mode, &Entry::Directory)
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(name, mode, &Entry::File { data })
    }

    pub(crate) fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.entry(name, mode, &Entry::CharacterDevice { major, minor })
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.header("TRAILER!!!", 0, 0, (0, 0), 1)?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, entry: &Entry<'_>) -> Result<()> {
        ensure!(!name.starts_with('/') && !name.is_empty(), "the name of an entry is relative: {name:?}");
        let (kind, data, device): (u32, &[u8], _) = match *entry {
            Entry::Directory => (TYPE_DIRECTORY, &[], (0, 0)),
            Entry::File { data } => (TYPE_REGULAR, data, (0, 0)),
            Entry::CharacterDevice { major, minor } => (TYPE_CHARACTER, &[], (major, minor)),
        };
        let links = if matches!(entry, Entry::Directory) { 2 } else { 1 };
        self.header(name, kind | mode, u32::try_from(data.len())?, device, links)?;
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn header(&mut self, name: &str, mode: u32, size: u32, device: (u32, u32), links: u32) -> Result<()> {
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1)?;
        let inode = if mode == 0 { 0 } else { self.entries };
        // Owner, group, time, and the device that the archive was on are zero.
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0, /* no checksum */
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, data and device.
    type Read = (String, u32, Vec<u8>, (u32, u32));

    /// The kernel's reading of the format, as far as we use it.
    fn read(mut bytes: &[u8]) -> Vec<Read> {
        let mut entries = Vec::new();
        let whole = bytes.len();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                u32::from_str_radix(str::from_utf8(&bytes[6 + 8 * n..][..8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = str::from_utf8(&bytes[110..110 + name_size - 1]).unwrap().to_owned();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data_at = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), data_at);
                return entries;
            }
            entries.push((name, mode, bytes[data_at..data_at + size].to_vec(), device));
            bytes = &bytes[(data_at + size).next_multiple_of(4)..];
            assert_eq!((whole - bytes.len()) % 4, 0);
        }
    }

    #[test]
    fn reads_back() {
        let mut archive = Archive::default();
        archive.directory("dev", 0o755).unwrap();
        archive.character_device("dev/console", 0o600, 5, 1).unwrap();
        for length in 0..6 {
            archive.file(&format!("f{length}"), 0o755, &vec![7; length]).unwrap();
        }
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries.len(), 8);
        assert_eq!(entries[0], ("dev".to_owned(), 0o040_755, vec![], (0, 0)));
        assert_eq!(entries[1], ("dev/console".to_owned(), 0o020_600, vec![], (5, 1)));
        for (length, (name, mode, data, _)) in entries[2..].iter().enumerate() {
            assert_eq!((name, mode, data), (&format!("f{length}"), &0o100_755, &vec![7; length]));
        }
    }

    #[test]
    fn refuses_absolute_names() {
        assert!(Archive::default().file("/init", 0o755, b"").is_err());
    }
}
