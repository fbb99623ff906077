use std::{collections::BTreeMap, fs, io::ErrorKind};

use camino::{Utf8Path, Utf8PathBuf};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::{
    Origin, PagesWriter, SavedPages, Stretch, Zeros,
    format::{FormatError, HEADER, Header, Kind, Run, Runs},
};
use crate::{SnapshotStatistics, VmmError};

const PAGE: u32 = 4096;
const PAGE_LENGTH: usize = PAGE as usize;

/// The simplest thing that says what differs: each page's number, and the byte that fills it.
type Model = BTreeMap<u64, u8>;

const MEMORY_PAGES: u64 = 600;
const MEMORY: u64 = MEMORY_PAGES * PAGE as u64;

fn model() -> impl Strategy<Value = Model> {
    // Runs of pages, so that there are long ones beside single ones, with many zeros.
    let run = (0..MEMORY_PAGES, 1_u64..300, prop_oneof![Just(0_u8), any::<u8>()]);
    prop::collection::vec(run, 0..12).prop_map(|runs| {
        let mut pages = Model::new();
        for (first, length, byte) in runs {
            pages.extend((first..(first + length).min(MEMORY_PAGES)).map(|page| (page, byte)));
        }
        pages
    })
}

fn write(path: &Utf8Path, model: &Model, at_once: usize) -> SnapshotStatistics {
    let mut writer = PagesWriter::create(path, MEMORY, PAGE, Zeros::Told).unwrap();
    let mut pending: Vec<u8> = Vec::new();
    let mut first = 0;
    for (page, byte) in model {
        let follows = first + (pending.len() / PAGE_LENGTH) as u64 == *page;
        if !follows || pending.len() >= at_once * PAGE_LENGTH {
            writer.push(first, &mut pending).unwrap();
            pending.clear();
            first = *page;
        }
        pending.resize(pending.len() + PAGE_LENGTH, *byte);
    }
    writer.push(first, &mut pending).unwrap();
    writer.finish().unwrap()
}

fn read(path: &Utf8Path) -> Model {
    let mut found = Model::new();
    let saved = SavedPages::open(path, MEMORY).unwrap();
    saved
        .copy_to(|offset, bytes| {
            assert_eq!(offset % u64::from(PAGE), 0);
            for (page, content) in (offset / u64::from(PAGE)..).zip(bytes.chunks(PAGE_LENGTH)) {
                assert!(content.iter().all(|byte| *byte == content[0]) && content.len() == PAGE_LENGTH);
                assert_eq!(found.insert(page, content[0]), None, "no page comes twice");
            }
            Ok(())
        })
        .unwrap();
    found
}

fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(directory.path().join("pages")).unwrap();
    (directory, path)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_was_written_is_read(model in model(), at_once in 1_usize..300) {
        let (_directory, path) = directory();
        let statistics = write(&path, &model, at_once);
        prop_assert_eq!(read(&path), model.clone());
        let zero_pages = model.values().filter(|byte| **byte == 0).count() as u64;
        prop_assert_eq!((statistics.pages, statistics.zero_pages), (model.len() as u64, zero_pages));
        let file = fs::metadata(&path).unwrap().len();
        prop_assert_eq!(statistics.bytes_written, file - u64::from(PAGE) + HEADER as u64);
    }

    #[test]
    fn every_page_has_a_place_that_it_comes_from(model in model()) {
        let (_directory, path) = directory();
        write(&path, &model, 7);
        let saved = SavedPages::open(&path, MEMORY).unwrap();
        for page in 0..MEMORY_PAGES {
            let Stretch { pages, origin } = saved.stretch(page);
            prop_assert!(pages >= 1 && page + pages <= MEMORY_PAGES);
            for more in 0..pages {
                let found = match origin {
                    Origin::Base => None,
                    Origin::Zero => Some(0),
                    Origin::Saved(at) => {
                        let mut content = [0; PAGE_LENGTH];
                        saved.read(at + more * u64::from(PAGE), &mut content).unwrap();
                        Some(content[PAGE_LENGTH - 1])
                    }
                };
                prop_assert_eq!(found, model.get(&(page + more)).copied(), "{}", page + more);
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_or_changed_is_refused(
        model in model(), cut in any::<prop::sample::Index>(), flip in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        let (_directory, path) = directory();
        write(&path, &model, 64);
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let error = SavedPages::open(&path, MEMORY).unwrap_err();
            matches!(error, VmmError::File { path: named, source, .. }
                if named == path && source.kind() == ErrorKind::InvalidData)
        };
        prop_assert!(refused(&whole[..cut.index(whole.len())]), "cut");
        prop_assert!(refused(&[whole.as_slice(), b"x"].concat()), "longer");
        // Of header and table every bit counts.
        let content = model.values().filter(|byte| **byte != 0).count();
        let table = PAGE_LENGTH * (content + 1);
        let place = flip.index(HEADER + whole.len() - table);
        let place = if place < HEADER { place } else { table + place - HEADER };
        let mut changed = whole;
        changed[place] ^= 1 << bit;
        prop_assert!(refused(&changed), "byte {place} changed");
    }

    #[test]
    fn no_header_makes_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), HEADER), file in any::<u64>()) {
        let mut header: [u8; HEADER] = bytes.try_into().unwrap();
        header[..8].copy_from_slice(b"WRNPAGES");
        header[8..12].copy_from_slice(&1_u32.to_le_bytes());
        prop_assert!(Header::decode(&header, file).is_err());
        header[12..16].copy_from_slice(&PAGE.to_le_bytes());
        prop_assert!(Header::decode(&header, file).is_err());
    }
}

/// A file as somebody would write it who knows the format and gets it wrong, with a digest that is right.
fn forged(runs: &[(u64, u32, u32)], content_pages: u64) -> Result<Vec<Run>, FormatError> {
    let (mut header, _) = Runs::default().encode(MEMORY, PAGE);
    let mut table = Vec::new();
    for (first, pages, kind) in runs {
        table.extend(first.to_le_bytes());
        table.extend(pages.to_le_bytes());
        table.extend(kind.to_le_bytes());
    }
    header[24..32].copy_from_slice(&(runs.len() as u64).to_le_bytes());
    header[32..40].copy_from_slice(&content_pages.to_le_bytes());
    let digest = Sha256::new().chain_update(&header[..40]).chain_update(&table).finalize();
    header[40..].copy_from_slice(&digest);
    let length = u64::from(PAGE) * (content_pages + 1) + table.len() as u64;
    Header::decode(&header, length)?.runs(&table)
}

#[test]
fn what_is_inconsistent_is_refused_by_name() {
    let good = Run { first: 3, pages: 2, kind: Kind::Content };
    assert_eq!(forged(&[(3, 2, 1)], 2), Ok(vec![good]));
    assert_eq!(forged(&[(3, 2, 1)], 1), Err(FormatError::ContentPages { found: 2, wanted: 1 }));
    assert_eq!(forged(&[(3, 2, 0), (4, 1, 0)], 0), Err(FormatError::Overlap(1)));
    assert_eq!(forged(&[(9, 2, 0), (4, 1, 0)], 0), Err(FormatError::Overlap(1)));
    assert_eq!(forged(&[(3, 0, 0)], 0), Err(FormatError::EmptyRun(0)));
    assert_eq!(forged(&[(3, 2, 7)], 0), Err(FormatError::Kind { run: 0, kind: 7 }));
    assert_eq!(forged(&[(MEMORY_PAGES - 1, 2, 0)], 0), Err(FormatError::OutOfRange(0)));
    assert_eq!(forged(&[(u64::MAX, 2, 0)], 0), Err(FormatError::OutOfRange(0)));

    let (whole, _) = Runs::default().encode(MEMORY, PAGE);
    let decoded = |change: fn(&mut [u8; HEADER])| {
        let mut header = whole;
        change(&mut header);
        Header::decode(&header, u64::from(PAGE)).map(drop)
    };
    assert_eq!(decoded(|_| {}), Ok(()));
    assert_eq!(decoded(|header| header[0] = 0), Err(FormatError::Magic));
    assert_eq!(decoded(|header| header[8] = 2), Err(FormatError::Version(2)));
    assert_eq!(decoded(|header| header[13] = 0), Err(FormatError::PageSize(0)));
    assert_eq!(decoded(|header| header[16] = 1), Err(FormatError::MemorySize(MEMORY + 1)));
    let length = FormatError::Length { found: u64::from(PAGE), wanted: u64::MAX };
    assert_eq!(decoded(|header| header[24..40].fill(0xff)), Err(length));
}

#[test]
fn pages_of_another_memory_and_unfinished_ones_are_refused() {
    let (_directory, path) = directory();
    write(&path, &Model::from([(1, 7)]), 1);
    let error = SavedPages::open(&path, MEMORY * 2).unwrap_err();
    assert!(matches!(&error, VmmError::File { source, .. } if source.to_string().contains("the base has")));

    let mut unfinished = PagesWriter::create(&path, MEMORY, PAGE, Zeros::Told).unwrap();
    unfinished.push(3, &mut vec![1; PAGE_LENGTH * 4]).unwrap();
    drop(unfinished);
    let error = SavedPages::open(&path, MEMORY).unwrap_err();
    assert!(matches!(&error, VmmError::File { source, .. } if source.to_string().contains("not finished")));
}

#[test]
fn a_full_disk_is_told_with_the_path() {
    let path = Utf8Path::new("/dev/full");
    let mut writer = PagesWriter::create(path, MEMORY, PAGE, Zeros::Told).unwrap();
    let error = writer.push(0, &mut vec![1; PAGE_LENGTH]).unwrap_err();
    assert!(matches!(&error, VmmError::File { operation: "write", path: named, source }
        if named == path && source.kind() == ErrorKind::StorageFull));
}

#[test]
fn over_a_hole_zeros_go_without_saying() {
    let directory = tempfile::tempdir().unwrap();
    let directory = Utf8Path::from_path(directory.path()).unwrap();
    let (base, path) = (directory.join("base"), directory.join("pages"));
    let file = std::fs::File::create_new(&base).unwrap();
    file.set_len(MEMORY).unwrap();
    let zeros = Zeros::over(&base).unwrap();
    assert_eq!(zeros, Zeros::Understood);
    let mut writer = PagesWriter::create(&path, MEMORY, PAGE, zeros).unwrap();
    let mut pages = vec![0; 3 * PAGE_LENGTH];
    pages[PAGE_LENGTH] = 7;
    writer.push(1, &mut pages).unwrap();
    let statistics = writer.finish().unwrap();
    assert_eq!((statistics.pages, statistics.zero_pages), (1, 0));
    let mut found = Vec::new();
    let saved = SavedPages::open(&path, MEMORY).unwrap();
    saved
        .copy_to(|at, content| {
            found.push((at, content.len(), content[0]));
            Ok(())
        })
        .unwrap();
    assert_eq!(found, [(2 * PAGE_LENGTH as u64, PAGE_LENGTH, 7)]);
    std::os::unix::fs::FileExt::write_all_at(&file, &[0], MEMORY - 1).unwrap();
    assert_eq!(Zeros::over(&base).unwrap(), Zeros::Told, "what is no hole is not looked at");
    assert!(Zeros::over(&directory.join("missing")).is_err());
}
