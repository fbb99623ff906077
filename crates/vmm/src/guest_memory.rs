//! The memory of a restored guest, seen from outside: a private mapping of the snapshot's memory file in
//! another process, whose pages are the file's until the guest writes them.
//!
//! ```text
//! /proc/PID/maps      where the mapping of the file is, known by the file's device and inode; or by path and
//!                     inode, on file systems whose files do not tell the device that is shown there
//! /proc/PID/pagemap   which of its pages are private: present or swapped out, and not the file's
//! /proc/PID/mem       their content, to be read and written
//! ```
//!
//! A page is private from the first time on that it is written, also when zeros are written, so that a page
//! that became zero is among those that are saved, unless all of the file is a hole. A page that is not private is the file's page now, and will
//! be it again when the file is mapped the next time.
//!
//! All of it blocks. Whoever does not wait for it any more tells so by `given_up`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::atomic::AtomicBool,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{major, minor};
use wrenn_host_linux::process::Process;

use crate::{
    SnapshotStatistics, VmmError, VmmResult,
    files::cannot,
    pages::{PagesWriter, SavedPages, Zeros},
    process::unless_given_up,
};

/// How much of a guest's memory is read at once.
const CHUNK: usize = 1 << 20;
/// How many pages are looked up at once.
const ENTRIES: usize = 1 << 16;
const ENTRY: usize = size_of::<u64>();
/// In what pieces a VMM's own writes are told from the file's content.
const WORD: usize = size_of::<u64>();

/// The path of the file to a process in a jail of ours.
const IN_JAIL: &str = "/memory";

/// The mapping of a memory file in a process that was alive after it was opened. Should the process end, its
/// memory is gone, and another process of the same number has another one.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    process: Utf8PathBuf,
    memory: File,
    pagemap: File,
    base: File,
    base_path: Utf8PathBuf,
    zeros: Zeros,
    /// They follow each other in the file, and are all of it.
    pieces: Vec<Piece>,
    bytes: u64,
}

/// Words that a VMM wrote into a memory while it mapped and loaded it: see [`GuestMemory::own_words`].
#[derive(Debug, Default)]
pub(crate) struct OwnWords(Vec<(u64, [u8; WORD])>);

impl GuestMemory {
    /// Finds where `process` maps `file`; none when it does not map all of it, privately.
    pub(crate) fn open(process: &Process, file: &Utf8Path) -> VmmResult<Option<Self>> {
        let of_process = Utf8PathBuf::from(format!("/proc/{}", process.pid()));
        let (maps, memory) = (of_process.join("maps"), of_process.join("mem"));
        let pagemap = of_process.join("pagemap");
        let base = File::open(file).map_err(cannot("open", file))?;
        let metadata = base.metadata().map_err(cannot("open", file))?;
        let wanted = Wanted {
            device: (major(metadata.dev()), minor(metadata.dev())),
            inode: metadata.ino(),
            bytes: metadata.len(),
            path: file.canonicalize_utf8().map_err(cannot("find", file))?,
        };
        let text = fs::read_to_string(&maps).map_err(cannot("read", &maps))?;
        let opened = File::options().read(true).write(true).open(&memory);
        let memory = opened.map_err(cannot("open", &memory))?;
        let pagemap = File::open(&pagemap).map_err(cannot("open", &pagemap))?;
        // A process that lives now has had its number all the time.
        if !process.is_alive().map_err(cannot("examine", &of_process))? {
            return Err(cannot("examine", &of_process)(io::ErrorKind::NotFound.into()));
        }
        let pieces = wanted.find(&text);
        let (bytes, zeros) = (wanted.bytes, Zeros::over(file)?);
        let base_path = file.to_owned();
        let process = of_process;
        Ok(pieces.map(|pieces| Self { process, memory, pagemap, base, base_path, zeros, pieces, bytes }))
    }

    /// The mapping of a file that has to be there for an operation.
    pub(crate) fn of(process: &Process, file: &Utf8Path, operation: &'static str) -> VmmResult<Self> {
        Self::open(process, file)?.ok_or_else(|| not_mapped(operation))
    }

    /// Writes the private pages to a file.
    pub(crate) fn save(&self, into: &Utf8Path, given_up: &AtomicBool) -> VmmResult<SnapshotStatistics> {
        let page_bytes = rustix::param::page_size();
        let page_bytes_32 = u32::try_from(page_bytes).unwrap_or(u32::MAX);
        let mut writer = PagesWriter::create(into, self.bytes, page_bytes_32, self.zeros)?;
        let mut content = vec![0; CHUNK];
        self.private_pages(CHUNK / page_bytes, |run| {
            check(given_up)?;
            let piece = &mut content[..run.pages * page_bytes];
            self.read(run.address, piece)?;
            writer.push(run.first, piece)
        })?;
        writer.finish()
    }

    /// Writes saved pages into the memory.
    pub(crate) fn load(&self, pages: &SavedPages, given_up: &AtomicBool) -> VmmResult<()> {
        pages.copy_to(|offset, content| {
            check(given_up)?;
            let (mut offset, mut content) = (offset, content);
            // What is written at once may lie in several pieces.
            while let Some((address, length)) = self.place(offset, content.len())
                && length > 0
            {
                let (now, later) = content.split_at(length);
                self.write(address, now)?;
                (offset, content) = (offset + length as u64, later);
            }
            Ok(())
        })
    }

    /// What the process itself has written into a memory that no guest has run in yet: the words in which a page
    /// that is private differs from the file's. A VMM tells its guest in such words that this is another life.
    pub(crate) fn own_words(&self, given_up: &AtomicBool) -> VmmResult<OwnWords> {
        let page_bytes = rustix::param::page_size();
        let (mut now, mut before) = (vec![0; page_bytes], vec![0; page_bytes]);
        let mut words = Vec::new();
        self.private_pages(1, |run| {
            check(given_up)?;
            self.read(run.address, &mut now)?;
            let read = self.base.read_exact_at(&mut before, run.first * page_bytes as u64);
            read.map_err(cannot("read", &self.base_path))?;
            for (at, (now, before)) in (0..).zip(now.chunks_exact(WORD).zip(before.chunks_exact(WORD))) {
                if now != before {
                    let word = std::array::from_fn(|byte| now[byte]);
                    words.push((run.address + at * WORD as u64, word));
                }
            }
            Ok(())
        })?;
        Ok(OwnWords(words))
    }

    /// Writes such words again, over what was loaded in the meantime.
    pub(crate) fn put_back(&self, words: &OwnWords) -> VmmResult<()> {
        words.0.iter().try_for_each(|(address, word)| self.write(*address, word))
    }

    /// Hands out the private pages, from the first to the last, no more than `longest` at once.
    fn private_pages(&self, longest: usize, mut take: impl FnMut(Found) -> VmmResult<()>) -> VmmResult<()> {
        let page_bytes = rustix::param::page_size() as u64;
        for piece in &self.pieces {
            let first_page = piece.offset / page_bytes;
            let mut found = |run: PageRun| {
                let address = piece.address + (run.first - first_page) * page_bytes;
                take(Found { first: run.first, pages: run.pages, address })
            };
            let mut runs = PageRuns::new(longest);
            let pages = usize::try_from(piece.bytes / page_bytes).unwrap_or(usize::MAX);
            let mut entries = vec![0; ENTRIES.min(pages) * ENTRY];
            let first_entry = piece.address / page_bytes;
            for first in (0..pages).step_by(ENTRIES) {
                let entries = &mut entries[..ENTRIES.min(pages - first) * ENTRY];
                let offset = (first_entry + first as u64) * ENTRY as u64;
                let read = self.pagemap.read_exact_at(entries, offset);
                read.map_err(cannot("read the page map of", &self.process))?;
                for (page, entry) in (first_page + first as u64..).zip(entries.chunks_exact(ENTRY)) {
                    let entry = u64::from_ne_bytes(std::array::from_fn(|at| entry[at]));
                    if is_private(entry)
                        && let Some(run) = runs.push(page)
                    {
                        found(run)?;
                    }
                }
            }
            if let Some(run) = runs.end() {
                found(run)?;
            }
        }
        Ok(())
    }

    /// Where a byte of the file is in the process, and how many of the `length` bytes from there on follow it.
    fn place(&self, offset: u64, length: usize) -> Option<(u64, usize)> {
        let piece = self.pieces.iter().find(|piece| (piece.offset..piece.end()).contains(&offset))?;
        let left = usize::try_from(piece.end() - offset).unwrap_or(usize::MAX);
        Some((piece.address + (offset - piece.offset), length.min(left)))
    }

    fn read(&self, address: u64, into: &mut [u8]) -> VmmResult<()> {
        self.memory.read_exact_at(into, address).map_err(cannot("read the memory of", &self.process))
    }

    fn write(&self, address: u64, content: &[u8]) -> VmmResult<()> {
        self.memory.write_all_at(content, address).map_err(cannot("write the memory of", &self.process))
    }
}

/// That a snapshot is to be over another memory than the machine's.
pub(crate) fn not_mapped(operation: &'static str) -> VmmError {
    let problem = "the snapshot's memory is not what it maps";
    VmmError::Unsupported { operation, problem }
}

/// Private pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    first: u64,
    pages: usize,
    address: u64,
}

/// A part of the file, and where it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    bytes: u64,
    address: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

fn check(given_up: &AtomicBool) -> VmmResult<()> {
    unless_given_up(given_up, "pages".into())
}

/// Whether an entry of a page map is of a page that is there, or swapped out.
pub(crate) fn is_there(entry: u64) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    entry & (PRESENT | SWAPPED) != 0
}

/// Whether an entry of a page map is of a page that the process has for itself.
fn is_private(entry: u64) -> bool {
    const OF_A_FILE: u64 = 1 << 61;
    is_there(entry) && entry & OF_A_FILE == 0
}

/// Pages in a row, no more than are read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PageRun {
    first: u64,
    pages: usize,
}

/// Puts pages that follow each other together.
#[derive(Debug)]
struct PageRuns {
    run: Option<PageRun>,
    longest: usize,
}

impl PageRuns {
    fn new(longest: usize) -> Self {
        Self { run: None, longest }
    }

    /// Takes the next page; answers with a run that it does not belong to.
    fn push(&mut self, page: u64) -> Option<PageRun> {
        match &mut self.run {
            Some(run) if run.first + run.pages as u64 == page && run.pages < self.longest => {
                run.pages += 1;
                None
            }
            run => run.replace(PageRun { first: page, pages: 1 }),
        }
    }

    fn end(&mut self) -> Option<PageRun> {
        self.run.take()
    }
}

/// What the mapping that is looked for is of.
#[derive(Debug, Clone)]
struct Wanted {
    device: (u32, u32),
    inode: u64,
    bytes: u64,
    path: Utf8PathBuf,
}

impl Wanted {
    /// Where the file is mapped, in the text of `/proc/PID/maps`: pieces that follow each other in the file, and are all of
    /// it. The kernel may show one mapping as several, and a guest with a hole in its address space has two.
    fn find(&self, maps: &str) -> Option<Vec<Piece>> {
        let is_of_it = |mapping: &Mapping<'_>| {
            let is_known =
                mapping.device == self.device || mapping.path == self.path || mapping.path == IN_JAIL;
            mapping.is_private && mapping.inode == self.inode && is_known
        };
        let pieces = maps.lines().filter_map(Mapping::parse).filter(is_of_it).map(|mapping| {
            let bytes = mapping.end.checked_sub(mapping.start)?;
            Some(Piece { offset: mapping.offset, bytes, address: mapping.start })
        });
        let mut pieces: Vec<Piece> = pieces.collect::<Option<_>>()?;
        pieces.sort_by_key(|piece| piece.offset);
        let mut end = 0;
        for piece in &pieces {
            if piece.offset != end {
                return None;
            }
            end = piece.offset.checked_add(piece.bytes)?;
        }
        (end == self.bytes).then_some(pieces)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping<'a> {
    start: u64,
    end: u64,
    is_private: bool,
    offset: u64,
    device: (u32, u32),
    inode: u64,
    path: &'a str,
}

impl<'a> Mapping<'a> {
    /// `7f0a40000000-7f0a50000000 rw-p 00000000 fe:00 131090  /a/file`
    fn parse(line: &'a str) -> Option<Self> {
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let rights = words.next()?;
        let offset = hex(words.next()?)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let inode = words.next()?.parse().ok()?;
        let is_private = rights.ends_with('p');
        let path = line.find('/').map_or("", |at| &line[at..]);
        Some(Self { start: hex(start)?, end: hex(end)?, is_private, offset, device, inode, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_mapping_is_known_by_device_and_inode() {
        let file = Wanted { device: (0xfe, 0), inode: 131_090, bytes: 0x3000, path: "/a/b d".into() };
        let whole = "55d0-55d1 r--p 00000000 fe:00 77 /usr/bin/qemu\n\
            7f0000-7f3000 rw-p 00000000 fe:00 131090 /a/b c (deleted)\n\
            7fff0-7fff1 rw-p 00000000 00:00 0 [stack]\n";
        let at_once = Some(vec![Piece { offset: 0, bytes: 0x3000, address: 0x7f_0000 }]);
        assert_eq!(file.find(whole), at_once);
        assert_eq!(file.find(&whole.replace("fe:00 131090", "fe:01 131090")), None);
        assert_eq!(file.find(&whole.replace("131090", "131091")), None);
        let by_path = whole.replace("fe:00 131090 /a/b c (deleted)", "fe:01 131090 /a/b d");
        assert_eq!(file.find(&by_path), at_once);
        assert_eq!(file.find(&by_path.replace("131090", "131091")), None, "it is another file by now");
        assert_eq!(file.find(&whole.replace("7f3000 rw-p", "7f3000 rw-s")), None, "it is not private");
        assert_eq!(file.find(&whole.replace("7f3000", "7f2000")), None, "it is not whole");
        let parts = whole.replace(
            "7f0000-7f3000 rw-p 00000000",
            "7f0000-7f1000 rw-p 00000000 fe:00 131090 /a\n7f1000-7f3000 ---p 00001000",
        );
        let two = |address| {
            let first = Piece { offset: 0, bytes: 0x1000, address: 0x7f_0000 };
            Some(vec![first, Piece { offset: 0x1000, bytes: 0x2000, address }])
        };
        assert_eq!(file.find(&parts), two(0x7f_1000));
        let apart = parts.replace("7f1000-7f3000", "6f1000-6f3000");
        assert_eq!(
            file.find(&apart),
            two(0x6f_1000),
            "what follows in the file need not follow in the process"
        );
        assert_eq!(file.find(&parts.replace("00001000", "00002000")), None);
        assert_eq!(file.find(&parts.replace("00001000", "00000000")), None, "it is there twice");
        assert_eq!(file.find(""), None);
    }

    #[test]
    fn a_page_is_private_when_it_is_there_and_not_the_files() {
        assert!(is_private(1 << 63) && is_private(1 << 62) && is_private(1 << 63 | 1 << 55));
        assert!(!is_private(0) && !is_private(1 << 63 | 1 << 61) && !is_private(1 << 55));
        assert!(!is_private(1 << 62 | 1 << 61));
    }

    proptest! {
        #[test]
        fn runs_are_the_pages(pages in prop::collection::btree_set(0_u64..200, 0..150), longest in 1_usize..9) {
            let mut runs = PageRuns::new(longest);
            let mut found: Vec<PageRun> = pages.iter().filter_map(|page| runs.push(*page)).collect();
            found.extend(runs.end());
            prop_assert!(found.iter().all(|run| run.pages <= longest));
            let again = found.iter().flat_map(|run| run.first..run.first + run.pages as u64);
            prop_assert!(again.eq(pages.iter().copied()));
            let needless = found.windows(2).any(|pair| {
                pair[0].pages < longest && pair[0].first + pair[0].pages as u64 == pair[1].first
            });
            prop_assert!(!needless, "what follows is together");
        }

        #[test]
        fn no_line_makes_the_parser_panic(line in "[0-9a-f:p \\-]{0,60}") {
            Mapping::parse(&line);
        }
    }
}
