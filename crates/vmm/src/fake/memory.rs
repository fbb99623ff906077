//! The memory of a guest that is not there: the pages that somebody wrote, over a base.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use camino::{Utf8Path, Utf8PathBuf};

use super::cannot;
use crate::{
    SnapshotStatistics, VmmResult,
    pages::{PagesWriter, SavedPages, Zeros},
};

const PAGE: u64 = 4096;
const PAGE_BYTES: u32 = 4096;

/// A page is one number again and again.
pub(super) type Word = u64;

#[derive(Debug)]
pub(super) struct Memory {
    bytes: u64,
    pub(super) backing: Backing,
    written: BTreeMap<u64, Word>,
}

/// What is under the pages that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backing {
    /// Nothing: what was not written is zero.
    Anonymous,
    /// The file is the memory.
    Shared(Utf8PathBuf),
    /// The file is what the memory began as.
    Private(Utf8PathBuf),
}

impl Memory {
    pub(super) fn new(bytes: u64, backing: Backing) -> Self {
        Self { bytes, backing, written: BTreeMap::new() }
    }

    /// The memory of a machine that is restored.
    pub(super) fn restored(bytes: u64, base: &Utf8Path, pages: Option<&Utf8Path>) -> VmmResult<Self> {
        let mut memory = Self::new(bytes, Backing::Private(base.to_owned()));
        if let Some(pages) = pages {
            SavedPages::open(pages, bytes)?.copy_to(|offset, content| {
                for (page, at) in (offset / PAGE..).zip((0..content.len()).step_by(PAGE_BYTES as usize)) {
                    memory.write(page, Word::from_le_bytes(std::array::from_fn(|byte| content[at + byte])));
                }
                Ok(())
            })?;
        }
        Ok(memory)
    }

    pub(super) fn has(&self, page: u64) -> bool {
        page < self.bytes / PAGE
    }

    pub(super) fn write(&mut self, page: u64, word: Word) {
        self.written.insert(page, word);
    }

    pub(super) fn read(&self, page: u64) -> Word {
        if let Some(word) = self.written.get(&page) {
            return *word;
        }
        let Backing::Private(base) = &self.backing else { return 0 };
        let mut word = [0; 8];
        let read = File::open(base).and_then(|file| file.read_exact_at(&mut word, page * PAGE));
        read.map_or(0, |()| Word::from_le_bytes(word))
    }

    /// Makes the file what the memory is.
    pub(super) fn give_away(&self, file: &Utf8Path) -> VmmResult<()> {
        let wrote = File::options().write(true).open(file).and_then(|file| {
            let each = |(page, word): (&u64, &Word)| file.write_all_at(&content(*word), page * PAGE);
            self.written.iter().try_for_each(each)
        });
        wrote.map_err(cannot("write", file))
    }

    /// Saves what differs from the base.
    pub(super) fn save(&self, pages: &Utf8Path) -> VmmResult<SnapshotStatistics> {
        let zeros = match &self.backing {
            Backing::Private(base) => Zeros::over(base)?,
            Backing::Anonymous | Backing::Shared(_) => Zeros::Told,
        };
        let mut writer = PagesWriter::create(pages, self.bytes, PAGE_BYTES, zeros)?;
        for (page, word) in &self.written {
            writer.push(*page, &mut content(*word))?;
        }
        writer.finish()
    }
}

fn content(word: Word) -> Vec<u8> {
    word.to_le_bytes().repeat(PAGE_BYTES as usize / 8)
}
