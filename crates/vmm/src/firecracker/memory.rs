//! The files of a snapshot, and what is between them and the memory of a guest.
//!
//! | the machine | its memory | what is saved |
//! |---|---|---|
//! | booted, to become a base | anonymous | Firecracker's diff, into the base's file: what was never written stays a hole |
//! | booted over zeros | anonymous | Firecracker's diff the first time, all of the memory later; its pages that are not zero |
//! | restored | the base, mapped privately | the pages that the kernel shows as private |
//!
//! Firecracker forgets what was written as soon as it has told it, and knows nothing of pages that somebody else wrote. So its
//! word is taken once, for a machine that booted, and a restored one is looked at from outside (`guest_memory`): each
//! of its snapshots is over its base, however many there were, and whoever was its owner.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::atomic::AtomicBool,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use wrenn_host_linux::process::Process;
use wrenn_types::bounds;

use super::api::COMMAND_BOUND;
use crate::{
    SnapshotStatistics, VmmResult,
    files::{cannot, create_private},
    guest_memory::GuestMemory,
    pager::ServedMemory,
    pages::{PagesWriter, SavedPages, Zeros},
    process::unless_given_up,
};

pub(super) const SNAPSHOT: &str = "snapshot";
/// What any request that moves bytes may take beside that.
const MOVE_BOUND: Duration = Duration::from_secs(50);
/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// How long a request may take that moves so many bytes.
pub(super) fn bound(bytes: u64) -> Duration {
    COMMAND_BOUND + MOVE_BOUND + bounds::moving(bytes)
}

/// The memory of a clone, to be looked at from outside.
#[derive(Debug)]
pub(super) enum CloneMemory {
    Mapped(GuestMemory),
    Served(ServedMemory),
}

impl CloneMemory {
    pub(super) fn save(&self, into: &Utf8Path, given_up: &AtomicBool) -> VmmResult<SnapshotStatistics> {
        match self {
            Self::Mapped(memory) => memory.save(into, given_up),
            Self::Served(memory) => memory.save(into, given_up),
        }
    }
}

/// Writes saved pages over a base in whose mapping no guest has run yet.
///
/// By then Firecracker has told the guest that this is another life, by a number in its memory, which would be overwritten by
/// that of the life that was saved: so its own words are put back.
pub(super) fn load(
    process: &Process,
    base: &Utf8Path,
    pages: &SavedPages,
    given_up: &AtomicBool,
) -> VmmResult<()> {
    let memory = GuestMemory::of(process, base, "restore")?;
    let own = memory.own_words(given_up)?;
    memory.load(pages, given_up)?;
    memory.put_back(&own)
}

/// Makes the files that Firecracker is about to write, which only this user can read then. A memory that is there stays.
pub(super) fn prepare(state: &Utf8Path, memory: &Utf8Path) -> VmmResult<[File; 2]> {
    let made = create_private(state)?;
    let mut options = File::options();
    options.write(true).create(true).truncate(false).mode(0o600);
    Ok([made, options.open(memory).map_err(cannot("create", memory))?])
}

/// A file that is needed for the length of a snapshot.
#[derive(Debug)]
pub(super) struct Scratch(Utf8PathBuf);

impl Scratch {
    /// In the directory of a snapshot's state, where there is room for what is saved; `what` is in it.
    pub(super) fn beside(state: &Utf8Path, what: &str) -> Self {
        let path = Utf8PathBuf::from(format!("{state}.{what}"));
        // One that was left by somebody who was killed would be added to.
        drop(std::fs::remove_file(&path));
        Self(path)
    }

    pub(super) fn path(&self) -> &Utf8Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Keeps of a memory that is a file the pages that are not zero.
pub(super) fn convert(
    memory: &Scratch,
    bytes: u64,
    into: &Utf8Path,
    given_up: &AtomicBool,
) -> VmmResult<SnapshotStatistics> {
    let path = memory.path();
    let page_bytes = rustix::param::page_size();
    let page_bytes_32 = u32::try_from(page_bytes).unwrap_or(u32::MAX);
    let mut writer = PagesWriter::create(into, bytes, page_bytes_32, Zeros::Understood)?;
    let file = File::open(path).map_err(cannot("open", path))?;
    let mut content = vec![0; CHUNK];
    let mut at = 0;
    while let Some(data) = next_data(&file, at).map_err(cannot("read", path))?
        && data < bytes
    {
        unless_given_up(given_up, into)?;
        at = data - data % page_bytes as u64;
        let length = usize::try_from(bytes - at).unwrap_or(CHUNK).min(CHUNK);
        let piece = &mut content[..length];
        file.read_exact_at(piece, at).map_err(cannot("read", path))?;
        writer.push(at / page_bytes as u64, piece)?;
        at += length as u64;
    }
    writer.finish()
}

/// Where the next byte is that is not in a hole.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(from)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 600;

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().to_owned();
        (directory, path)
    }

    #[test]
    fn a_bound_follows_the_bytes() {
        assert_eq!(bound(0), Duration::from_secs(60));
        assert!(bound(8 << 30) > Duration::from_secs(200));
    }

    #[test]
    fn a_scratch_begins_empty_and_goes() {
        let (_directory, path) = directory();
        let state = path.join("state");
        std::fs::write(path.join("state.memory"), "left over").unwrap();
        let scratch = Scratch::beside(&state, "memory");
        assert!(!scratch.path().exists());
        prepare(&state, scratch.path()).unwrap();
        for file in [&state, scratch.path()] {
            let mode =
                std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(file).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600);
        }
        std::fs::write(scratch.path(), "kept").unwrap();
        prepare(&state, scratch.path()).unwrap();
        assert_eq!(std::fs::read(scratch.path()).unwrap(), b"kept");
        let gone = scratch.path().to_owned();
        drop(scratch);
        assert!(!gone.exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn pages_that_are_not_zero_are_kept(
            written in prop::collection::btree_map(0..PAGES, prop_oneof![Just(0_u8), any::<u8>()], 0..80),
        ) {
            let (_directory, path) = directory();
            let scratch = Scratch::beside(&path.join("state"), "memory");
            let file = File::create_new(scratch.path()).unwrap();
            file.set_len(PAGES * PAGE).unwrap();
            for (page, byte) in &written {
                file.write_all_at(&[*byte; 4096], page * PAGE).unwrap();
            }
            let into = path.join("pages");
            let statistics = convert(&scratch, PAGES * PAGE, &into, &AtomicBool::new(false)).unwrap();
            let mut found = std::collections::BTreeMap::new();
            let saved = SavedPages::open(&into, PAGES * PAGE).unwrap();
            saved.copy_to(|offset, content| {
                found.extend((offset / PAGE..).zip(content.chunks(4096).map(|page| page[0])));
                Ok(())
            }).unwrap();
            let kept: std::collections::BTreeMap<_, _> = written.into_iter().filter(|(_, byte)| *byte != 0).collect();
            prop_assert_eq!(statistics.pages, kept.len() as u64);
            prop_assert_eq!(found, kept);
        }
    }
}
