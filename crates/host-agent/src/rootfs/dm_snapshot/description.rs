//! The first block of the file of a disk: which image it stands on, and how large the disk is. What the kernel keeps
//! of it lies behind that block, where no guest can reach the block.

use std::{fs::File, io, os::unix::fs::FileExt};

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

/// Bytes of the block. The kernel's part begins behind it, aligned to the pages of every host.
pub(super) const BLOCK: u64 = 4096;
/// The unit of the kernel's tables.
pub(super) const SECTOR: u64 = 512;
/// Bytes of what the kernel records of one chunk.
const RECORD: u64 = 16;

/// What the block says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    /// What this is a description of.
    format: Format,
    /// The image that the disk differs from, with every symbolic link followed.
    pub(super) image: Utf8PathBuf,
    /// Its length. It never changes.
    pub(super) image_bytes: u64,
    /// The size of the disk as its guest sees it.
    pub(super) disk_bytes: u64,
    /// What is copied when a guest writes to any part of it, in sectors.
    pub(super) chunk_sectors: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    #[serde(rename = "wrenn dm-snapshot 1")]
    One,
}

/// Why a block is no description.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// It says something else.
    #[error("its first block describes no such disk")]
    Content(#[source] serde_json::Error),
    /// It says what cannot be.
    #[error("its first block describes a disk that cannot be: {0}")]
    Sizes(&'static str),
    /// The name of the image does not fit.
    #[error("the path of the image is too long for the first block")]
    TooLong,
}

impl Description {
    pub(super) fn new(
        image: Utf8PathBuf,
        image_bytes: u64,
        disk_bytes: u64,
        chunk_sectors: u32,
    ) -> Result<Self, DescriptionError> {
        let description = Self { format: Format::One, image, image_bytes, disk_bytes, chunk_sectors };
        description.check()?;
        Ok(description)
    }

    /// The same disk with another size.
    pub(super) fn with_size(&self, disk_bytes: u64) -> Result<Self, DescriptionError> {
        Self::new(self.image.clone(), self.image_bytes, disk_bytes, self.chunk_sectors)
    }

    fn check(&self) -> Result<(), DescriptionError> {
        let is_chunk = self.chunk_sectors.is_power_of_two() && (8..=2048).contains(&self.chunk_sectors);
        let problem = match self {
            _ if !is_chunk => "its chunks",
            _ if !self.image_bytes.is_multiple_of(SECTOR) || self.image_bytes == 0 => "its image's length",
            _ if !self.disk_bytes.is_multiple_of(SECTOR) || self.disk_bytes < self.image_bytes => "its size",
            // The sum below must not overflow.
            _ if self.disk_bytes > 1 << 56 => "its size",
            _ => return Ok(()),
        };
        Err(DescriptionError::Sizes(problem))
    }

    /// The block, with all that is not used being zero.
    pub(super) fn encode(&self) -> Result<Vec<u8>, DescriptionError> {
        let mut block = serde_json::to_vec(self).map_err(DescriptionError::Content)?;
        block.push(b'\n');
        if block.len() as u64 > BLOCK {
            return Err(DescriptionError::TooLong);
        }
        block.resize(4096, 0);
        Ok(block)
    }

    pub(super) fn decode(block: &[u8]) -> Result<Self, DescriptionError> {
        let end = block.iter().position(|byte| *byte == 0).unwrap_or(block.len());
        let description: Self = serde_json::from_slice(&block[..end]).map_err(DescriptionError::Content)?;
        description.check()?;
        Ok(description)
    }

    /// Reads it from the beginning of a file.
    pub(super) fn read(file: &File) -> io::Result<Result<Self, DescriptionError>> {
        let mut block = [0; 4096];
        match file.read_exact_at(&mut block, 0) {
            Ok(()) => Ok(Self::decode(&block)),
            // One that is shorter is none.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Self::decode(&[])),
            Err(error) => Err(error),
        }
    }

    pub(super) fn chunk_bytes(&self) -> u64 {
        u64::from(self.chunk_sectors) * SECTOR
    }

    pub(super) fn disk_sectors(&self) -> u64 {
        self.disk_bytes / SECTOR
    }

    pub(super) fn image_sectors(&self) -> u64 {
        self.image_bytes / SECTOR
    }

    /// How many chunks the kernel records in one chunk.
    pub(super) fn records_per_area(&self) -> u64 {
        self.chunk_bytes() / RECORD
    }

    /// How long the file is in which every chunk of the disk has been written: so the kernel never finds it full. It is
    /// a length, not room that is taken.
    pub(super) fn file_bytes(&self) -> u64 {
        let chunks = self.disk_bytes.div_ceil(self.chunk_bytes());
        // The kernel makes the next area of records when one is full, even if it needs no other.
        let areas = chunks / self.records_per_area() + 1;
        BLOCK + (1 + areas + chunks) * self.chunk_bytes()
    }

    /// How many bytes at the beginning are taken from the start, so that a disk that is there can be opened: this
    /// block, the kernel's, and its first area of records.
    pub(super) fn first_bytes(&self) -> u64 {
        BLOCK + 2 * self.chunk_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn of(disk_bytes: u64, chunk_sectors: u32) -> Description {
        Description::new("/images/base".into(), 512 << 20, disk_bytes, chunk_sectors).unwrap()
    }

    #[test]
    fn a_block_says_what_it_was_told_and_nothing_else_is_one() {
        let description = of(20 * GIB, 8);
        let block = description.encode().unwrap();
        assert_eq!(block.len() as u64, BLOCK);
        assert_eq!(Description::decode(&block).unwrap(), description);
        let text = String::from_utf8(block).unwrap();
        assert!(text.starts_with(r#"{"format":"wrenn dm-snapshot 1","image":"/images/base","#), "{text}");
        for bad in [
            String::new(),
            "\0".to_owned(),
            text.replace("snapshot 1", "snapshot 2"),
            text.replace(r#""image""#, r#""other""#),
            text.replace(r#""chunk_sectors":8"#, r#""chunk_sectors":7"#),
            text.replace(r#""chunk_sectors":8"#, r#""chunk_sectors":4096"#),
            text.replace("536870912", "536870913"),
            text.replace("536870912", "0"),
            text.replace("21474836480", "1024"),
            text.replace("21474836480", "18446744073709551104"),
        ] {
            assert!(Description::decode(bad.as_bytes()).is_err(), "{bad}");
        }
        let long = Description::new("x".repeat(4096).into(), 512, 512, 8).unwrap();
        assert!(matches!(long.encode(), Err(DescriptionError::TooLong)));
    }

    proptest! {
        /// As the kernel hands out chunks: the header, then an area of records before each so many chunks of data.
        #[test]
        fn the_last_chunk_of_a_full_disk_fits(sectors in 1_u64..200_000, shift in 3_u32..12) {
            let description = Description::new("/i".into(), 512, sectors * 512, 1 << shift).unwrap();
            let mut next = 2;
            let mut recorded = 0;
            for _ in 0..description.disk_bytes.div_ceil(description.chunk_bytes()) {
                let has_room = BLOCK + (next + 1) * description.chunk_bytes() <= description.file_bytes();
                prop_assert!(has_room, "chunk {next} of {description:?}");
                next += 1;
                recorded += 1;
                if recorded % description.records_per_area() == 0 {
                    // The chunk after the last one of an area is the next area.
                    prop_assert!(BLOCK + (next + 1) * description.chunk_bytes() <= description.file_bytes());
                    next += 1;
                }
            }
            prop_assert!(description.first_bytes() <= description.file_bytes());
        }
    }
}
