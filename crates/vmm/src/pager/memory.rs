//! The memory of a guest whose faults a pager serves, seen from outside.
//!
//! ```text
//!  the kernel has a page (present, or swapped out) ─► what the process has there, if it differs from the base's
//!  it has none ─ taken away (the pager says) ──────► zero, if the base's is not
//!              └ never asked for ──────────────────► what the snapshot had that the machine came from
//! ```
//!
//! So what is saved differs from the base and from nothing else, whatever the machine was restored from: it stays one layer. And
//! it is only looked at, so that a snapshot which fails costs nothing. The guest is paused meanwhile.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    sync::atomic::AtomicBool,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::OFlags;
use wrenn_host_linux::process::Process;

use super::{regions::Regions, source::Source, state::StateReader};
use crate::{
    SnapshotStatistics, VmmResult,
    files::cannot,
    guest_memory::is_there,
    pages::{Origin, PagesWriter, SavedPages, Zeros},
    process::unless_given_up,
};

/// How many pages are looked at together: those of a number of whole words of the bitmap.
const CHUNK: usize = 256;
const WORD_BITS: usize = u64::BITS as usize;
const ENTRY: usize = size_of::<u64>();

/// A memory that a pager serves, in a process that was alive after it was opened.
#[derive(Debug)]
pub(crate) struct ServedMemory {
    process: Utf8PathBuf,
    memory: File,
    pagemap: File,
    state: StateReader,
    regions: Regions,
    source: Source,
    zeros: Zeros,
    bytes: u64,
    page_bytes: usize,
}

/// Where the content of a page is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Process,
    Source,
    /// Nobody: it is zero.
    Nobody,
}

impl Holder {
    /// By the entry of the page map, and whether it was ever taken away. Pure.
    fn of(entry: u64, is_removed: bool) -> Self {
        match (is_there(entry), is_removed) {
            (true, _) => Self::Process,
            (false, true) => Self::Nobody,
            (false, false) => Self::Source,
        }
    }
}

impl ServedMemory {
    /// Opens the memory of `vmm`, whose directory is `run_dir`, that `pager` serves over `base`.
    pub(crate) fn open(
        vmm: &Process,
        pager: &Process,
        run_dir: &Utf8Path,
        base: &Utf8Path,
    ) -> VmmResult<Self> {
        let process = Utf8PathBuf::from(format!("/proc/{}", vmm.pid()));
        let (memory, pagemap) = (process.join("mem"), process.join("pagemap"));
        let memory = File::open(&memory).map_err(cannot("open", &memory))?;
        let pagemap = File::open(&pagemap).map_err(cannot("open", &pagemap))?;
        let state = StateReader::open(run_dir)?;
        let source = open_source(pager, &state, base)?;
        let bytes = fs::metadata(base).map_err(cannot("examine", base))?.len();
        let regions = state.regions(bytes)?;
        // Processes that live now have had their numbers all the time.
        for (process, is_alive) in [(&process, vmm.is_alive()), (&process, pager.is_alive())] {
            if !is_alive.map_err(cannot("examine", process))? {
                return Err(cannot("examine", process)(io::ErrorKind::NotFound.into()));
            }
        }
        let (zeros, page_bytes) = (Zeros::over(base)?, rustix::param::page_size());
        Ok(Self { process, memory, pagemap, state, regions, source, zeros, bytes, page_bytes })
    }

    /// Writes the pages that differ from the base's to a file.
    pub(crate) fn save(&self, into: &Utf8Path, given_up: &AtomicBool) -> VmmResult<SnapshotStatistics> {
        self.state.settle()?;
        let page_bytes = u32::try_from(self.page_bytes).unwrap_or(u32::MAX);
        let mut saving = Saving {
            memory: self,
            writer: PagesWriter::create(into, self.bytes, page_bytes, self.zeros)?,
            content: vec![0; CHUNK * self.page_bytes],
            base: vec![0; CHUNK * self.page_bytes],
        };
        let (mut entries, mut removed) = ([0; CHUNK * ENTRY], [0; CHUNK / WORD_BITS]);
        let pages = self.regions.pages();
        for first in (0..pages).step_by(CHUNK) {
            unless_given_up(given_up, into)?;
            let count = usize::try_from(pages - first).unwrap_or(CHUNK).min(CHUNK);
            self.entries(first, &mut entries[..count * ENTRY])?;
            self.state.removed(first, &mut removed[..count.div_ceil(WORD_BITS)])?;
            let mut holders = [Holder::Source; CHUNK];
            for (at, (holder, entry)) in holders.iter_mut().zip(entries.as_chunks::<ENTRY>().0).enumerate() {
                let is_removed = removed[at / WORD_BITS] >> (at % WORD_BITS) & 1 == 1;
                *holder = Holder::of(u64::from_ne_bytes(*entry), is_removed);
            }
            saving.chunk(first, &holders[..count])?;
        }
        saving.writer.finish()
    }

    /// Reads the entries of the page map of pages in a row, which may be in several pieces.
    fn entries(&self, first: u64, mut into: &mut [u8]) -> VmmResult<()> {
        let mut page = first;
        while !into.is_empty() {
            let (address, together) = self.address(page)?;
            let count = together.min(into.len() / ENTRY);
            let (now, later) = into.split_at_mut(count * ENTRY);
            let place = address / self.page_bytes as u64 * ENTRY as u64;
            let read = self.pagemap.read_exact_at(now, place);
            read.map_err(cannot("read the page map of", &self.process))?;
            (page, into) = (page + count as u64, later);
        }
        Ok(())
    }

    /// Reads what the process has.
    fn read(&self, first: u64, mut into: &mut [u8]) -> VmmResult<()> {
        let mut page = first;
        while !into.is_empty() {
            let (address, together) = self.address(page)?;
            let count = together.min(into.len() / self.page_bytes);
            let (now, later) = into.split_at_mut(count * self.page_bytes);
            let read = self.memory.read_exact_at(now, address);
            read.map_err(cannot("read the memory of", &self.process))?;
            (page, into) = (page + count as u64, later);
        }
        Ok(())
    }

    fn address(&self, page: u64) -> VmmResult<(u64, usize)> {
        let beyond = || cannot("find a page of", &self.process)(io::ErrorKind::NotFound.into());
        let (address, together) = self.regions.address(page).ok_or_else(beyond)?;
        Ok((address, usize::try_from(together).unwrap_or(usize::MAX)))
    }
}

/// What the machine came from: the pager has it open, whatever has become of its names.
fn open_source(pager: &Process, state: &StateReader, base: &Utf8Path) -> VmmResult<Source> {
    let (has_base, saved) = state.descriptors()?;
    let descriptor = |number| Utf8PathBuf::from(format!("/proc/{}/fd/{number}", pager.pid()));
    let bytes = fs::metadata(base).map_err(cannot("examine", base))?.len();
    let theirs = descriptor(has_base);
    if !crate::validate::same_file(base, &theirs).map_err(cannot("examine", &theirs))? {
        let problem = io::Error::new(io::ErrorKind::InvalidInput, "it is not what the pager serves");
        return Err(cannot("use", base)(problem));
    }
    let saved = saved.map(|number| {
        let path = descriptor(number);
        // Whatever it is, opening it waits for nobody.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let file = File::options().read(true).custom_flags(flags).open(&path);
        let file = file.and_then(|file| match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::ErrorKind::InvalidInput.into()),
        });
        SavedPages::of(file.map_err(cannot("open", &path))?, &path, bytes)
    });
    Source::of(File::open(base).map_err(cannot("open", base))?, base, saved.transpose()?, bytes)
}

/// A file that is being written.
struct Saving<'a> {
    memory: &'a ServedMemory,
    writer: PagesWriter,
    content: Vec<u8>,
    base: Vec<u8>,
}

impl Saving<'_> {
    fn chunk(&mut self, first: u64, holders: &[Holder]) -> VmmResult<()> {
        let mut at = 0;
        for run in holders.chunk_by(|one, other| one == other) {
            let page = first + at as u64;
            match run[0] {
                Holder::Process => {
                    let length = run.len() * self.memory.page_bytes;
                    self.memory.read(page, &mut self.content[..length])?;
                    self.differing(page, run.len())?;
                }
                Holder::Nobody => {
                    self.content[..run.len() * self.memory.page_bytes].fill(0);
                    self.differing(page, run.len())?;
                }
                Holder::Source => self.carried_over(page, run.len())?,
            }
            at += run.len();
        }
        Ok(())
    }

    /// Writes those of the pages in `content` that are not as the base's.
    fn differing(&mut self, first: u64, pages: usize) -> VmmResult<()> {
        let page_bytes = self.memory.page_bytes;
        let length = pages * page_bytes;
        self.memory.source.read_base(first, &mut self.base[..length])?;
        let page = |at: usize| at * page_bytes..(at + 1) * page_bytes;
        let mut at = 0;
        while at < pages {
            let differs = |at: &usize| self.content[page(*at)] != self.base[page(*at)];
            let count = (at..pages).take_while(differs).count();
            if count > 0 {
                self.writer
                    .push(first + at as u64, &mut self.content[at * page_bytes..(at + count) * page_bytes])?;
            }
            // The one that ended it is as the base's.
            at += count + 1;
        }
        Ok(())
    }

    /// Writes those of the pages that the snapshot had from which the machine came.
    fn carried_over(&mut self, first: u64, pages: usize) -> VmmResult<()> {
        let (mut page, end) = (first, first + pages as u64);
        while page < end {
            let stretch = self.memory.source.stretch(page);
            let count = stretch.pages.clamp(1, end - page);
            if stretch.origin != Origin::Base {
                let length = usize::try_from(count).unwrap_or(CHUNK) * self.memory.page_bytes;
                self.memory.source.read(page, &mut self.content[..length])?;
                self.writer.push(page, &mut self.content[..length])?;
            }
            page += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Holder;

    #[test]
    fn a_page_is_where_the_kernel_says_or_where_it_came_from() {
        for entry in [1 << 63, 1 << 62, 1 << 63 | 1 << 61] {
            assert_eq!(Holder::of(entry, false), Holder::Process);
            assert_eq!(Holder::of(entry, true), Holder::Process, "it was asked for again");
        }
        assert_eq!(Holder::of(1 << 55, false), Holder::Source);
        assert_eq!(Holder::of(0, true), Holder::Nobody);
    }
}
