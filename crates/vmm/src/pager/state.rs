//! What a pager has to tell whoever saves the machine: a file in the machine's directory, which the pager maps.
//!
//! ```text
//!  words   0 magic   1 phase   2 busy   3 pages   4 page size   5 regions   6… their addresses, sizes, offsets
//!         20 descriptors of base and pages in the pager         24 how many pages were served, and how
//!         32… one bit for each page: it was taken away, and is zero from then on
//! ```
//!
//! All is made at the beginning and has its size for ever. A reader takes it from the file, so that nothing the
//! pager does harms it.
//!
//! Whether a page *is* there the kernel knows (`pagemap`). What it does not know is what a page is that is not
//! there: as the source has it, or zero, if it was taken away. The event of that is read before the page goes, so whoever looks
//! while nothing is `busy` misses none.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    sync::atomic::{AtomicU64, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FallocateFlags, fallocate};
use wrenn_host_linux::shared_words::SharedWords;

use super::regions::{LIMIT, Region, Regions};
use crate::{
    VmmResult,
    files::{cannot, remove_stale},
};

/// Its name in the machine's directory.
pub(super) const NAME: &str = "pager.state";
const MAGIC: u64 = u64::from_le_bytes(*b"WRNPAGR1");
const WORD: usize = size_of::<u64>();
const BITS: u64 = u64::BITS as u64;

/// Where things are.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const PHASE: usize = 1;
    pub(super) const BUSY: usize = 2;
    pub(super) const PAGES: usize = 3;
    pub(super) const PAGE_BYTES: usize = 4;
    pub(super) const REGIONS: usize = 5;
    pub(super) const FIRST_REGION: usize = 6;
    pub(super) const BASE: usize = 20;
    pub(super) const SAVED: usize = 21;
    pub(super) const FAULTS: usize = 24;
    pub(super) const AHEAD: usize = 25;
    pub(super) const REMOVALS: usize = 26;
    pub(super) const HEADER: usize = 32;
}

/// How long a reader waits for a pager to have done what it does.
const BUSY_BOUND: Duration = Duration::from_secs(10);
/// How often it looks.
const BUSY_PAUSE: Duration = Duration::from_micros(200);

/// What a pager does. As long as it has no memory, it is none of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Faults are served.
    Serving = 1,
    /// Its VMM is gone, and so it goes.
    Done = 2,
}

/// What a pager has done until now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// How often somebody waited for a page.
    pub faults: u64,
    /// How many pages were placed before anybody asked for them.
    pub ahead: u64,
    /// How often pages were taken away.
    pub removals: u64,
}

/// How long the file is for a memory of so many bytes.
pub(super) fn file_bytes(memory_bytes: u64) -> u64 {
    words(memory_bytes / rustix::param::page_size() as u64) * WORD as u64
}

fn words(pages: u64) -> u64 {
    at::HEADER as u64 + pages.div_ceil(BITS)
}

/// The pager's side, which alone changes it.
#[derive(Debug)]
pub(super) struct State(SharedWords);

impl State {
    /// Makes the file, with room on the disk, in the place of one of an earlier life.
    pub(super) fn create(path: &Utf8Path, pages: u64, page_bytes: u64) -> VmmResult<Self> {
        remove_stale(path)?;
        let words = words(pages);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(cannot("create", path))?;
        let mapped = fallocate(&file, FallocateFlags::empty(), 0, words * WORD as u64);
        let count = usize::try_from(words).unwrap_or(usize::MAX);
        let mapped = mapped.map_err(io::Error::from).and_then(|()| SharedWords::map(&file, count));
        let state = Self(mapped.map_err(cannot("size", path))?);
        for (place, value) in [(at::PAGES, pages), (at::PAGE_BYTES, page_bytes), (at::MAGIC, MAGIC)] {
            state.word(place).store(value, Ordering::Release);
        }
        Ok(state)
    }

    /// Says where a reader finds the files, which may have no name any more.
    pub(super) fn set_descriptors(&self, base: i32, saved: Option<i32>) {
        for (place, descriptor) in [(at::BASE, Some(base)), (at::SAVED, saved)] {
            let number = descriptor.and_then(|number| u64::try_from(number + 1).ok());
            self.word(place).store(number.unwrap_or_default(), Ordering::Release);
        }
    }

    /// Says where the memory is, and that it is served from now on.
    pub(super) fn serve(&self, regions: &Regions) {
        let list = regions.list();
        for (at, region) in list.iter().enumerate() {
            let first = at::FIRST_REGION + 3 * at;
            for (place, value) in (first..).zip([region.address, region.bytes, region.offset]) {
                self.word(place).store(value, Ordering::Release);
            }
        }
        self.word(at::REGIONS).store(list.len() as u64, Ordering::Release);
        self.set_phase(Phase::Serving);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.word(at::PHASE).store(phase as u64, Ordering::SeqCst);
    }

    /// Between these two, events may have been read of which nothing is said here.
    pub(super) fn begin(&self) {
        self.word(at::BUSY).store(1, Ordering::SeqCst);
    }

    pub(super) fn end(&self) {
        self.word(at::BUSY).store(0, Ordering::SeqCst);
    }

    pub(super) fn count_fault(&self) {
        self.word(at::FAULTS).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_ahead(&self, pages: u64) {
        self.word(at::AHEAD).fetch_add(pages, Ordering::Relaxed);
    }

    /// The pages from `first` to `end` are zero from now on.
    pub(super) fn remove(&self, first: u64, end: u64) {
        self.word(at::REMOVALS).fetch_add(1, Ordering::Relaxed);
        for_each_word(first, end, |word, mask| {
            if let Some(word) = self.removed().get(word) {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        });
    }

    pub(super) fn is_removed(&self, page: u64) -> bool {
        let word = usize::try_from(page / BITS).ok().and_then(|word| self.removed().get(word));
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % BITS) & 1 == 1)
    }

    fn removed(&self) -> &[AtomicU64] {
        &self.0.as_slice()[at::HEADER..]
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.0.as_slice()[at]
    }
}

/// The words of a bitmap that have bits from `first` to `end`, and which. Pure.
fn for_each_word(first: u64, end: u64, mut take: impl FnMut(usize, u64)) {
    let mut page = first;
    while page < end {
        let bit = page % BITS;
        let count = (BITS - bit).min(end - page);
        let ones = if count == BITS { u64::MAX } else { (1 << count) - 1 };
        take(usize::try_from(page / BITS).unwrap_or(usize::MAX), ones << bit);
        page += count;
    }
}

/// Pages of which something was said: a bit for each.
#[derive(Debug)]
pub(super) struct Marks(Vec<u64>);

impl Marks {
    pub(super) fn new(pages: u64) -> Self {
        Self(vec![0; usize::try_from(pages.div_ceil(BITS)).unwrap_or_default()])
    }

    pub(super) fn is_set(&self, page: u64) -> bool {
        let word = usize::try_from(page / BITS).ok().and_then(|word| self.0.get(word));
        word.is_some_and(|word| word >> (page % BITS) & 1 == 1)
    }

    /// Whether it was not set.
    pub(super) fn set(&mut self, page: u64) -> bool {
        let word = usize::try_from(page / BITS).ok().and_then(|word| self.0.get_mut(word));
        let bit = 1 << (page % BITS);
        word.is_some_and(|word| {
            let was_set = *word & bit != 0;
            *word |= bit;
            !was_set
        })
    }
}

/// What the pager of a machine in this directory has done until now, or until it ended.
///
/// # Errors
/// There is none.
pub fn counts(run_dir: &Utf8Path) -> VmmResult<Counts> {
    StateReader::open(run_dir)?.counts()
}

/// A reader's side: it believes nothing that it has not checked, because the pager listens to a VMM.
#[derive(Debug)]
pub(super) struct StateReader {
    file: File,
    path: Utf8PathBuf,
}

impl StateReader {
    pub(super) fn open(run_dir: &Utf8Path) -> VmmResult<Self> {
        let path = run_dir.join(NAME);
        let file = File::open(&path).map_err(cannot("open", &path))?;
        let reader = Self { file, path };
        match reader.word(at::MAGIC)? {
            MAGIC => Ok(reader),
            _ => Err(reader.invalid("its beginning is another one")),
        }
    }

    pub(super) fn is_done(&self) -> VmmResult<bool> {
        Ok(self.word(at::PHASE)? == Phase::Done as u64)
    }

    pub(super) fn counts(&self) -> VmmResult<Counts> {
        let [faults, ahead, removals] = [at::FAULTS, at::AHEAD, at::REMOVALS].map(|at| self.word(at));
        Ok(Counts { faults: faults?, ahead: ahead?, removals: removals? })
    }

    /// Where the memory is, which has so many bytes.
    pub(super) fn regions(&self, bytes: u64) -> VmmResult<Regions> {
        let count = usize::try_from(self.word(at::REGIONS)?).ok().filter(|count| *count <= LIMIT);
        let count = count.ok_or_else(|| self.invalid("it has too many regions"))?;
        let region = |index| -> VmmResult<Region> {
            let [address, bytes, offset] =
                [0, 1, 2].map(|part| self.word(at::FIRST_REGION + 3 * index + part));
            Ok(Region { address: address?, bytes: bytes?, offset: offset? })
        };
        let list = (0..count).map(region).collect::<VmmResult<Vec<_>>>()?;
        let page_bytes = rustix::param::page_size() as u64;
        if self.word(at::PAGE_BYTES)? != page_bytes || self.word(at::PAGES)? != bytes / page_bytes {
            return Err(self.invalid("it is of another memory"));
        }
        Regions::new(list, bytes, page_bytes).map_err(|error| self.invalid(error))
    }

    /// The numbers of the descriptors of base and pages in the pager.
    pub(super) fn descriptors(&self) -> VmmResult<(u64, Option<u64>)> {
        let base = self.word(at::BASE)?.checked_sub(1);
        let base = base.ok_or_else(|| self.invalid("it does not say where the base is"))?;
        Ok((base, self.word(at::SAVED)?.checked_sub(1)))
    }

    /// Waits until everything that the pager has read of is said here. The guest is paused, so that nothing more comes.
    pub(super) fn settle(&self) -> VmmResult<()> {
        let begin = Instant::now();
        while self.word(at::BUSY)? != 0 {
            if begin.elapsed() > BUSY_BOUND {
                return Err(cannot("wait for", &self.path)(io::ErrorKind::TimedOut.into()));
            }
            #[expect(clippy::disallowed_methods, reason = "a pager does not know that somebody waits")]
            sleep(BUSY_PAUSE);
        }
        Ok(())
    }

    /// The bits of the pages from `first` on, which is the first of a word, for so many words.
    pub(super) fn removed(&self, first: u64, words: &mut [u64]) -> VmmResult<()> {
        let mut bytes = vec![0; words.len() * WORD];
        let place = (at::HEADER as u64 + first / BITS) * WORD as u64;
        self.file.read_exact_at(&mut bytes, place).map_err(cannot("read", &self.path))?;
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<WORD>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        Ok(())
    }

    fn word(&self, at: usize) -> VmmResult<u64> {
        let mut bytes = [0; WORD];
        let read = self.file.read_exact_at(&mut bytes, (at * WORD) as u64);
        read.map_err(cannot("read", &self.path))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn invalid(&self, problem: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> crate::VmmError {
        cannot("use", &self.path)(io::Error::new(io::ErrorKind::InvalidData, problem))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().to_owned();
        (directory, path)
    }

    #[test]
    fn what_a_pager_says_is_read() {
        let (_directory, path) = directory();
        let page = rustix::param::page_size() as u64;
        let state = State::create(&path.join(NAME), PAGES, page).unwrap();
        let reader = StateReader::open(&path).unwrap();
        assert!(reader.regions(PAGES * page).is_err() && reader.descriptors().is_err());
        state.set_descriptors(0, None);
        assert_eq!(reader.descriptors().unwrap(), (0, None));
        state.set_descriptors(7, Some(9));
        assert_eq!(reader.descriptors().unwrap(), (7, Some(9)));
        let list = vec![
            Region { address: 10 * page, bytes: 100 * page, offset: 0 },
            Region { address: 200 * page, bytes: 200 * page, offset: 100 * page },
        ];
        let regions = Regions::new(list, PAGES * page, page).unwrap();
        state.serve(&regions);
        assert_eq!(reader.regions(PAGES * page).unwrap(), regions);
        assert!(reader.regions((PAGES - 1) * page).is_err());
        state.count_fault();
        state.count_ahead(5);
        state.remove(3, 9);
        assert_eq!(reader.counts().unwrap(), Counts { faults: 1, ahead: 5, removals: 1 });
        reader.settle().unwrap();
        assert!(!reader.is_done().unwrap());
        state.set_phase(Phase::Done);
        drop(state);
        assert!(reader.is_done().unwrap());
        std::fs::write(path.join(NAME), "something else").unwrap();
        assert!(StateReader::open(&path).is_err());
    }

    #[test]
    fn a_reader_waits_for_what_is_being_done() {
        let (_directory, path) = directory();
        let state = State::create(&path.join(NAME), PAGES, 4096).unwrap();
        let reader = StateReader::open(&path).unwrap();
        state.begin();
        let waits = std::thread::spawn(move || {
            reader.settle().unwrap();
            let mut words = [0; 5];
            reader.removed(0, &mut words).unwrap();
            words
        });
        state.remove(0, 1);
        state.remove(64, 65);
        state.end();
        assert_eq!(waits.join().unwrap(), [1, 1, 0, 0, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_bits_are_the_pages(removed in prop::collection::vec((0..PAGES, 0_u64..150), 0..6)) {
            let (_directory, path) = directory();
            let state = State::create(&path.join(NAME), PAGES, 4096).unwrap();
            let mut model = std::collections::BTreeSet::new();
            for (first, count) in removed {
                let end = (first + count).min(PAGES);
                state.remove(first, end);
                model.extend(first..end);
            }
            let mut words = [0; 5];
            StateReader::open(&path).unwrap().removed(0, &mut words).unwrap();
            for page in 0..PAGES {
                let is_set = words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
                prop_assert_eq!((is_set, state.is_removed(page)), (model.contains(&page), model.contains(&page)));
            }
            prop_assert!(!state.is_removed(5 * 64));
        }

        #[test]
        fn marks_are_a_set(pages in prop::collection::vec(0..PAGES, 0..100)) {
            let mut marks = Marks::new(PAGES);
            let mut model = std::collections::BTreeSet::new();
            for page in pages {
                prop_assert_eq!(marks.set(page), model.insert(page));
            }
            prop_assert!((0..PAGES + 100).all(|page| marks.is_set(page) == model.contains(&page)));
            prop_assert!(!marks.set(10_000));
        }
    }
}
