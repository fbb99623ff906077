//! What a restored memory began as: the pages of its snapshot, over the base.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use camino::{Utf8Path, Utf8PathBuf};

use crate::{
    VmmResult,
    files::cannot,
    pages::{Origin, SavedPages, Stretch},
};

/// The layers, opened.
#[derive(Debug)]
pub(super) struct Source {
    base: File,
    base_path: Utf8PathBuf,
    saved: Option<SavedPages>,
    pages: u64,
    page_bytes: u64,
}

impl Source {
    /// Opens a base of this many bytes, and what was saved over it.
    pub(super) fn open(base: &Utf8Path, saved: Option<&Utf8Path>, bytes: u64) -> VmmResult<Self> {
        let saved = saved.map(|saved| SavedPages::open(saved, bytes)).transpose()?;
        Self::of(File::open(base).map_err(cannot("open", base))?, base, saved, bytes)
    }

    /// The same of what is open.
    pub(super) fn of(base: File, path: &Utf8Path, saved: Option<SavedPages>, bytes: u64) -> VmmResult<Self> {
        let invalid =
            |problem: String| cannot("use", path)(io::Error::new(io::ErrorKind::InvalidData, problem));
        let found = base.metadata().map_err(cannot("examine", path))?.len();
        if found != bytes {
            return Err(invalid(format!("it has {found} bytes, and the memory {bytes}")));
        }
        let page_bytes = rustix::param::page_size() as u64;
        if let Some(other) =
            saved.as_ref().map(SavedPages::page_bytes).filter(|b| u64::from(*b) != page_bytes)
        {
            return Err(invalid(format!("what was saved over it has pages of {other} bytes")));
        }
        let base_path = path.to_owned();
        Ok(Self { base, base_path, saved, pages: bytes / page_bytes, page_bytes })
    }

    pub(super) fn base(&self) -> &File {
        &self.base
    }

    pub(super) fn saved(&self) -> Option<&SavedPages> {
        self.saved.as_ref()
    }

    /// Where a page comes from, and those that follow it there.
    pub(super) fn stretch(&self, page: u64) -> Stretch {
        let all = Stretch { pages: self.pages.saturating_sub(page), origin: Origin::Base };
        self.saved.as_ref().map_or(all, |saved| saved.stretch(page))
    }

    /// Reads pages in a row, wherever they come from.
    pub(super) fn read(&self, mut page: u64, mut into: &mut [u8]) -> VmmResult<()> {
        while !into.is_empty() {
            let stretch = self.stretch(page);
            let wanted = into.len() as u64 / self.page_bytes;
            let pages = stretch.pages.min(wanted).max(1);
            let (now, later) = into.split_at_mut(length(pages, self.page_bytes));
            match (stretch.origin, &self.saved) {
                (Origin::Zero, _) => now.fill(0),
                (Origin::Saved(at), Some(saved)) => saved.read(at, now)?,
                _ => self.read_base(page, now)?,
            }
            (page, into) = (page + pages, later);
        }
        Ok(())
    }

    /// Reads pages of the base.
    pub(super) fn read_base(&self, page: u64, into: &mut [u8]) -> VmmResult<()> {
        let read = self.base.read_exact_at(into, page * self.page_bytes);
        read.map_err(cannot("read", &self.base_path))
    }
}

/// How long a piece is that is in memory.
fn length(pages: u64, page_bytes: u64) -> usize {
    usize::try_from(pages * page_bytes).unwrap_or(usize::MAX)
}
