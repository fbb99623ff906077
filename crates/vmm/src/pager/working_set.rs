//! The pages that a guest wants first after a restore, in their order: recorded, and had ready at the next restore.
//!
//! ```text
//!  0 magic   8 version   12 pages   16 pages of the memory   24 digest   56 is it whole   60 numbers of pages, 4 bytes each
//! ```
//!
//! It is whole when its guest was watched for as long as one is beginning, or no more is recorded. Until then the next restore
//! goes on with it: the first guest of a snapshot may have lived for a moment.
//!
//! It is a hint, and nothing depends on it: what is damaged, of another memory or of another version is as if it were not
//! there. All numbers are little-endian. Pure.

use sha2::{Digest as _, Sha256};

use super::state::Marks;

/// How many pages are recorded, and had ready: 64 MiB of them.
pub(super) const LIMIT: usize = 16 << 10;
const MAGIC: [u8; 8] = *b"WRNWRKST";
const VERSION: u32 = 2;
const DIGEST: usize = 24;
const AFTER_DIGEST: usize = 56;
const HEADER: usize = 60;
/// How long the file can be.
pub(super) const LONGEST: usize = HEADER + LIMIT * size_of::<u32>();

/// What was recorded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct WorkingSet {
    /// In the order in which they were asked for.
    pub(super) pages: Vec<u32>,
    /// Whether nothing is to be recorded any more.
    pub(super) is_whole: bool,
}

/// Pages as they were asked for. It never has more than [`LIMIT`], for which there is room from the beginning.
#[derive(Debug)]
pub(super) struct Recorder {
    pages: Vec<u32>,
    known: Marks,
    memory_pages: u64,
}

impl Recorder {
    /// Goes on after these pages, of a memory that has so many.
    pub(super) fn after(pages: &[u32], memory_pages: u64) -> Self {
        let (room, known) = (Vec::with_capacity(LIMIT), Marks::new(memory_pages));
        let mut recorder = Self { pages: room, known, memory_pages };
        pages.iter().for_each(|page| recorder.push(u64::from(*page)));
        recorder
    }

    /// Takes the next page, if it is none that it has.
    pub(super) fn push(&mut self, page: u64) {
        if let Ok(number) = u32::try_from(page)
            && page < self.memory_pages
            && self.pages.len() < LIMIT
            && self.known.set(page)
        {
            self.pages.push(number);
        }
    }

    /// The bytes of a file; of one that is whole where there is no more room.
    pub(super) fn encode(&self, is_whole: bool) -> Vec<u8> {
        encode(&self.pages, is_whole || self.pages.len() == LIMIT, self.memory_pages)
    }
}

fn encode(pages: &[u32], is_whole: bool, memory_pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&u32::try_from(pages.len()).unwrap_or_default().to_le_bytes());
    bytes[16..24].copy_from_slice(&memory_pages.to_le_bytes());
    bytes[AFTER_DIGEST..HEADER].copy_from_slice(&u32::from(is_whole).to_le_bytes());
    bytes.extend(pages.iter().flat_map(|page| page.to_le_bytes()));
    let digest = digest(&bytes);
    bytes[DIGEST..AFTER_DIGEST].copy_from_slice(&digest);
    bytes
}

/// The pages that a file names, of a memory that has so many; none if it is no such file. What follows them is
/// not looked at.
pub(super) fn decode(bytes: &[u8], memory_pages: u64) -> Option<WorkingSet> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let count = usize::try_from(word(12)?).ok().filter(|count| *count <= LIMIT)?;
    let bytes = bytes.get(..HEADER + count * size_of::<u32>())?;
    let is_of_it = bytes[16..24] == memory_pages.to_le_bytes();
    let is_damaged = bytes[DIGEST..AFTER_DIGEST] != digest(bytes);
    if bytes[..8] != MAGIC || word(8)? != VERSION || !is_of_it || is_damaged {
        return None;
    }
    let pages = bytes[HEADER..].as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let pages: Option<_> = pages.map(|page| (u64::from(page) < memory_pages).then_some(page)).collect();
    Some(WorkingSet { pages: pages?, is_whole: word(AFTER_DIGEST)? != 0 })
}

/// Over everything but itself.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&bytes[..DIGEST]);
    hash.update(&bytes[AFTER_DIGEST..]);
    hash.finalize().into()
}

/// Pages that are to be had ready, in runs of those that follow each other.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    pages: Vec<u32>,
    next: usize,
}

impl Ahead {
    pub(super) fn new(pages: Vec<u32>) -> Self {
        Self { pages, next: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.next == self.pages.len()
    }

    /// The next pages in a row: the first, and how many, which are no more than `longest`.
    pub(super) fn next(&mut self, longest: u64) -> Option<(u64, u64)> {
        let rest = &self.pages[self.next..];
        let first = u64::from(*rest.first()?);
        let follow =
            rest.iter().zip(first..first + longest).take_while(|(page, wanted)| u64::from(**page) == *wanted);
        let count = follow.count();
        self.next += count;
        Some((first, count as u64))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_more_is_recorded_than_there_is_room_for() {
        let mut recorder = Recorder::after(&[], 1 << 20);
        let room = recorder.pages.capacity();
        for page in 0..3 * LIMIT as u64 {
            recorder.push(page);
        }
        recorder.push(u64::MAX);
        assert_eq!((recorder.pages.len(), recorder.pages.capacity()), (LIMIT, room));
        let bytes = recorder.encode(false);
        assert_eq!(bytes.len(), LONGEST);
        let found = decode(&bytes, 1 << 20).unwrap();
        assert!(found.pages.len() == LIMIT && found.is_whole, "nothing more is recorded");
    }

    proptest! {
        #[test]
        fn what_was_recorded_is_read(pages in prop::collection::vec(0_u32..1000, 0..200), is_whole: bool, rest in prop::collection::vec(any::<u8>(), 0..9)) {
            let mut bytes = encode(&pages, is_whole, 1000);
            bytes.extend(rest);
            prop_assert_eq!(decode(&bytes, 1000), Some(WorkingSet { pages, is_whole }));
            prop_assert_eq!(decode(&bytes, 1001), None);
        }

        #[test]
        fn each_page_is_recorded_once(before in prop::collection::vec(0_u32..50, 0..30), pages in prop::collection::vec(0_u32..60, 0..90)) {
            let mut recorder = Recorder::after(&before, 50);
            pages.iter().for_each(|page| recorder.push(u64::from(*page)));
            let recorded = decode(&recorder.encode(false), 50).unwrap().pages;
            let mut expected = Vec::new();
            for page in before.into_iter().chain(pages) {
                if page < 50 && !expected.contains(&page) {
                    expected.push(page);
                }
            }
            prop_assert_eq!(recorded, expected);
        }

        #[test]
        fn what_is_damaged_is_not_there(pages in prop::collection::vec(0_u32..1000, 1..50), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let whole = encode(&pages, false, 1000);
            let mut damaged = whole.clone();
            damaged[at.index(whole.len())] ^= 1 << bit;
            prop_assert_eq!(decode(&damaged, 1000), None);
            prop_assert_eq!(decode(&whole[..at.index(whole.len())], 1000), None);
        }

        #[test]
        fn a_page_beyond_the_memory_is_none(page in 1000_u32..) {
            prop_assert_eq!(decode(&encode(&[1, page], true, 1000), 1000), None);
        }

        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decode(&bytes, 1000), None);
        }

        #[test]
        fn all_pages_are_had_ready_in_their_order(pages in prop::collection::vec(0_u32..50, 0..100), longest in 1_u64..9) {
            let mut ahead = Ahead::new(pages.clone());
            let mut found = Vec::new();
            while let Some((first, count)) = ahead.next(longest) {
                prop_assert!((1..=longest).contains(&count));
                found.extend(first..first + count);
            }
            prop_assert!(ahead.is_done());
            prop_assert!(found.into_iter().eq(pages.into_iter().map(u64::from)));
        }
    }
}
