//! What the kernel records of a disk behind our block: which chunks were written, and where they are.
//!
//! ```text
//!  chunk 0      'SnAp', whether it is valid, version 1, sectors of a chunk
//!        1      records: (chunk of the disk, chunk here), up to the first one that is zero
//!        2 …    content, as many chunks as there are records in one
//!        …      the next records, and so on
//! ```
//!
//! It is read here where the content of a disk is needed and no machine has it: nothing of it needs the kernel then.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::description::{BLOCK, Description};

/// `SnAp`, as a number.
const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;

/// One chunk of a disk that is not as it is in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Written {
    /// Which one of the disk.
    pub(super) disk_chunk: u64,
    /// Where it is in the file, from behind our block on.
    pub(super) file_chunk: u64,
}

/// What the kernel's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The disk was never opened: nothing was written.
    New,
    /// Everything that was written is recorded.
    Valid,
    /// The kernel has given it up, because something could not be written.
    GivenUp,
}

/// Why the records cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file could not be read.
    #[error("it could not be read")]
    Read(#[source] io::Error),
    /// There is something else where the records should be.
    #[error("what the kernel records in it is not understood: {0}")]
    Form(&'static str),
}

/// Reads the kernel's header.
pub(super) fn standing(file: &File, description: &Description) -> Result<Standing, RecordsError> {
    let mut header = [0; 16];
    file.read_exact_at(&mut header, BLOCK).map_err(RecordsError::Read)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    match (word(0), word(4)) {
        (0, _) => Ok(Standing::New),
        (MAGIC, _) if word(8) != VERSION => Err(RecordsError::Form("another version")),
        (MAGIC, _) if word(12) != description.chunk_sectors => Err(RecordsError::Form("other chunks")),
        (MAGIC, 0) => Ok(Standing::GivenUp),
        (MAGIC, _) => Ok(Standing::Valid),
        _ => Err(RecordsError::Form("another header")),
    }
}

/// Every chunk that was written, in the order of the disk. What the records say is checked: none is outside of the disk
/// or of the file, and no chunk is there twice.
pub(super) fn read(file: &File, description: &Description) -> Result<Vec<Written>, RecordsError> {
    match standing(file, description)? {
        Standing::New => return Ok(Vec::new()),
        Standing::GivenUp => return Err(RecordsError::Form("it was given up")),
        Standing::Valid => {}
    }
    let chunk = description.chunk_bytes();
    let disk_chunks = description.disk_bytes.div_ceil(chunk);
    let file_chunks = file.metadata().map_err(RecordsError::Read)?.len().saturating_sub(BLOCK) / chunk;
    let mut written = Vec::new();
    let mut area = vec![0; usize::try_from(chunk).unwrap_or_default()];
    let mut at = 1;
    while at < file_chunks {
        file.read_exact_at(&mut area, BLOCK + at * chunk).map_err(RecordsError::Read)?;
        for record in area.chunks_exact(16) {
            let half = |from: usize| record[from..from + 8].try_into().map(u64::from_le_bytes);
            let (Ok(disk_chunk), Ok(file_chunk)) = (half(0), half(8)) else { continue };
            if file_chunk == 0 {
                return sorted(written);
            }
            // An area has a place of its own for records, where no content can be.
            let is_area = (file_chunk - 1) % (description.records_per_area() + 1) == 0;
            if disk_chunk >= disk_chunks || file_chunk >= file_chunks || is_area {
                return Err(RecordsError::Form("a chunk is where none can be"));
            }
            written.push(Written { disk_chunk, file_chunk });
        }
        at += description.records_per_area() + 1;
    }
    sorted(written)
}

fn sorted(mut written: Vec<Written>) -> Result<Vec<Written>, RecordsError> {
    written.sort_unstable();
    let twice = written.windows(2).any(|pair| pair[0].disk_chunk == pair[1].disk_chunk);
    if twice { Err(RecordsError::Form("a chunk is there twice")) } else { Ok(written) }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::btree_map, prelude::*};

    use super::*;

    /// Writes what the kernel would, for chunks in the order in which they come.
    pub(in crate::rootfs::dm_snapshot) fn write_as_the_kernel(
        file: &File,
        description: &Description,
        chunks: &[(u64, u8)],
    ) {
        let chunk = description.chunk_bytes();
        let header = [MAGIC, 1, VERSION, description.chunk_sectors].map(u32::to_le_bytes).concat();
        file.write_all_at(&header, BLOCK).unwrap();
        let (mut area, mut slot) = (1, 0);
        for (number, (disk_chunk, byte)) in (0..).zip(chunks) {
            if number > 0 && number % description.records_per_area() == 0 {
                (area, slot) = (area + description.records_per_area() + 1, 0);
            }
            let file_chunk = area + 1 + slot;
            let record = [disk_chunk.to_le_bytes(), file_chunk.to_le_bytes()].concat();
            file.write_all_at(&record, BLOCK + area * chunk + slot * 16).unwrap();
            let content = vec![*byte; usize::try_from(chunk).unwrap()];
            file.write_all_at(&content, BLOCK + file_chunk * chunk).unwrap();
            slot += 1;
        }
    }

    fn file(description: &Description) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(description.file_bytes()).unwrap();
        file
    }

    fn description() -> Description {
        Description::new("/i".into(), 4096, 16 << 20, 8).unwrap()
    }

    #[test]
    fn a_header_says_how_it_stands() {
        let (description, file) = (description(), file(&description()));
        assert_eq!(standing(&file, &description).unwrap(), Standing::New);
        assert!(read(&file, &description).unwrap().is_empty());
        write_as_the_kernel(&file, &description, &[]);
        assert_eq!(standing(&file, &description).unwrap(), Standing::Valid);
        assert!(read(&file, &description).unwrap().is_empty());
        file.write_all_at(&[0], BLOCK + 4).unwrap();
        assert_eq!(standing(&file, &description).unwrap(), Standing::GivenUp);
        for (at, byte) in [(0, 1), (8, 2), (12, 16)] {
            write_as_the_kernel(&file, &description, &[]);
            file.write_all_at(&[byte], BLOCK + at).unwrap();
            assert!(standing(&file, &description).is_err(), "{at}");
        }
    }

    #[test]
    fn records_of_what_cannot_be_are_refused() {
        let description = description();
        for (disk_chunk, file_chunk) in [(4096_u64, 2_u64), (0, 1), (0, 258), (0, 1 << 40)] {
            let file = file(&description);
            write_as_the_kernel(&file, &description, &[(1, 1)]);
            let record = [disk_chunk.to_le_bytes(), file_chunk.to_le_bytes()].concat();
            file.write_all_at(&record, BLOCK + 4096 + 16).unwrap();
            assert!(read(&file, &description).is_err(), "{disk_chunk} at {file_chunk}");
        }
        let file = file(&description);
        write_as_the_kernel(&file, &description, &[(7, 1), (7, 2)]);
        assert!(read(&file, &description).is_err());
    }

    proptest! {
        #[test]
        fn what_the_kernel_writes_is_what_is_read(
            chunks in btree_map(0_u64..4096, 1_u8..9, 0..700),
            rotate in 0_usize..700,
        ) {
            let description = description();
            let file = file(&description);
            let mut order: Vec<(u64, u8)> = chunks.iter().map(|(chunk, byte)| (*chunk, *byte)).collect();
            let middle = rotate.min(order.len());
            order.rotate_left(middle);
            write_as_the_kernel(&file, &description, &order);
            let read = read(&file, &description).unwrap();
            let mut found = BTreeMap::new();
            for Written { disk_chunk, file_chunk } in read {
                let mut byte = [0];
                file.read_exact_at(&mut byte, BLOCK + file_chunk * 4096 + 4095).unwrap();
                found.insert(disk_chunk, byte[0]);
            }
            prop_assert_eq!(found, chunks);
        }
    }
}
