//! Writing and reading the file. All of it blocks.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{SeekFrom as Position, seek},
    io::Errno,
};

use super::format::{FormatError, HEADER, Header, Kind, Run, Runs};
use crate::{SnapshotStatistics, VmmError, VmmResult};

/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// Whether a page that is zero has to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// It may be something else in the base.
    Told,
    /// It is zero in the base too.
    Understood,
}

impl Zeros {
    /// What goes for pages over this base: one that is a single hole is zero everywhere.
    pub(crate) fn over(base: &Utf8Path) -> VmmResult<Self> {
        let first = File::open(base).and_then(|file| match seek(&file, Position::Data(0)) {
            Ok(_) => Ok(Self::Told),
            Err(Errno::NXIO) => Ok(Self::Understood),
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Self::Told),
            Err(error) => Err(error.into()),
        });
        first.map_err(cannot("examine", base))
    }
}

/// Writes the pages of a machine, from the first to the last.
#[derive(Debug)]
pub(crate) struct PagesWriter {
    path: Utf8PathBuf,
    zeros: Zeros,
    file: File,
    memory_bytes: u64,
    page_bytes: u32,
    zero_page: Vec<u8>,
    runs: Runs,
}

impl PagesWriter {
    /// Makes the file, or empties the one that is there.
    pub(crate) fn create(
        path: &Utf8Path,
        memory_bytes: u64,
        page_bytes: u32,
        zeros: Zeros,
    ) -> VmmResult<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(path);
        let begun = file.and_then(|mut file| {
            file.seek(SeekFrom::Start(u64::from(page_bytes)))?;
            Ok(file)
        });
        Ok(Self {
            file: begun.map_err(cannot("create", path))?,
            path: path.to_owned(),
            zeros,
            memory_bytes,
            page_bytes,
            zero_page: vec![0; page_bytes as usize],
            runs: Runs::default(),
        })
    }

    /// Takes pages in a row that differ from the base, the first of which has this number. The numbers only
    /// go up. What is in `pages` afterwards is of no use.
    pub(crate) fn push(&mut self, first: u64, pages: &mut [u8]) -> VmmResult<()> {
        let page_bytes = self.page_bytes as usize;
        // Those with content are moved together, so that they are written at once.
        let mut content = 0;
        for (number, at) in (first..).zip((0..pages.len()).step_by(page_bytes)) {
            let page = at..at + page_bytes;
            if pages[page.clone()] == self.zero_page {
                if self.zeros == Zeros::Told {
                    self.runs.push(number, Kind::Zero);
                }
                continue;
            }
            self.runs.push(number, Kind::Content);
            if content < at {
                pages.copy_within(page, content);
            }
            content += page_bytes;
        }
        self.file.write_all(&pages[..content]).map_err(cannot("write", &self.path))
    }

    /// Makes the file whole.
    pub(crate) fn finish(mut self) -> VmmResult<SnapshotStatistics> {
        let (header, table) = self.runs.encode(self.memory_bytes, self.page_bytes);
        let content = self.runs.content_pages * u64::from(self.page_bytes);
        let length = u64::from(self.page_bytes) + content + table.len() as u64;
        let wrote = self.file.write_all(&table).and_then(|()| {
            // With no page at all, nothing has been written behind the header's place.
            self.file.set_len(length)?;
            self.file.write_all_at(&header, 0)
        });
        wrote.map_err(cannot("write", &self.path))?;
        Ok(SnapshotStatistics {
            pages: self.runs.content_pages + self.runs.zero_pages,
            zero_pages: self.runs.zero_pages,
            bytes_written: content + (table.len() + header.len()) as u64,
        })
    }
}

/// Pages that were saved, with a table that is whole and in itself right.
#[derive(Debug)]
pub(crate) struct SavedPages {
    path: Utf8PathBuf,
    file: File,
    page_bytes: u32,
    memory_bytes: u64,
    runs: Vec<Run>,
    /// Of each run, how many pages with content there are before it.
    content_before: Vec<u64>,
}

/// Pages in a row that come from one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) pages: u64,
    pub(crate) origin: Origin,
}

/// Where the content of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// They are as the base has them.
    Base,
    Zero,
    /// In the file, from this byte on.
    Saved(u64),
}

impl SavedPages {
    /// Opens the pages of a memory of this size.
    pub(crate) fn open(path: &Utf8Path, memory_bytes: u64) -> VmmResult<Self> {
        Self::of(File::open(path).map_err(cannot("open", path))?, path, memory_bytes)
    }

    /// The same of a file that was opened, and is at its beginning.
    pub(crate) fn of(mut file: File, path: &Utf8Path, memory_bytes: u64) -> VmmResult<Self> {
        let unusable =
            |error: FormatError| cannot("use", path)(io::Error::new(io::ErrorKind::InvalidData, error));
        let length = file.metadata().map_err(cannot("read", path))?.len();
        let mut start = [0; HEADER];
        match file.read_exact(&mut start) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(unusable(FormatError::Magic));
            }
            other => other.map_err(cannot("read", path))?,
        }
        let header = Header::decode(&start, length).map_err(unusable)?;
        if header.memory_bytes != memory_bytes {
            let (found, wanted) = (header.memory_bytes, memory_bytes);
            return Err(unusable(FormatError::OtherMemory { found, wanted }));
        }
        let (offset, bytes) = header.table();
        // It is within the file, whose length was compared.
        let mut table = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut table, offset).map_err(cannot("read", path))?;
        let runs = header.runs(&table).map_err(unusable)?;
        let content_before = runs.iter().scan(0, |content, run| {
            let before = *content;
            *content += if run.kind == Kind::Content { u64::from(run.pages) } else { 0 };
            Some(before)
        });
        let (content_before, page_bytes) = (content_before.collect(), header.page_bytes);
        Ok(Self { path: path.to_owned(), file, page_bytes, memory_bytes, runs, content_before })
    }

    /// Where this page comes from, and those that follow it there.
    pub(crate) fn stretch(&self, page: u64) -> Stretch {
        let after = self.runs.partition_point(|run| run.first <= page);
        if let Some(at) = after.checked_sub(1) {
            let (run, into) = (self.runs[at], page - self.runs[at].first);
            if into < u64::from(run.pages) {
                // The first page of the file is the header's.
                let content = || (1 + self.content_before[at] + into) * u64::from(self.page_bytes);
                let origin = match run.kind {
                    Kind::Zero => Origin::Zero,
                    Kind::Content => Origin::Saved(content()),
                };
                return Stretch { pages: u64::from(run.pages) - into, origin };
            }
        }
        let memory_pages = self.memory_bytes / u64::from(self.page_bytes);
        let end = self.runs.get(after).map_or(memory_pages, |run| run.first);
        Stretch { pages: end.saturating_sub(page), origin: Origin::Base }
    }

    /// Reads bytes of its file: those of [`Origin::Saved`].
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> VmmResult<()> {
        self.file.read_exact_at(into, at).map_err(cannot("read", &self.path))
    }

    /// How long a page is.
    pub(crate) fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    /// Its open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Hands out all bytes that differ, from the first to the last, each piece with its place in the memory.
    pub(crate) fn copy_to(&self, mut take: impl FnMut(u64, &[u8]) -> VmmResult<()>) -> VmmResult<()> {
        let page_bytes = u64::from(self.page_bytes);
        let (mut content, zeros) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut source = page_bytes;
        for run in &self.runs {
            let (mut at, end) = (run.first * page_bytes, (run.first + u64::from(run.pages)) * page_bytes);
            while at < end {
                let length = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
                match run.kind {
                    Kind::Zero => take(at, &zeros[..length])?,
                    Kind::Content => {
                        let piece = &mut content[..length];
                        self.file.read_exact_at(piece, source).map_err(cannot("read", &self.path))?;
                        source += length as u64;
                        take(at, piece)?;
                    }
                }
                at += length as u64;
            }
        }
        Ok(())
    }
}

fn cannot(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { operation, path, source }
}
