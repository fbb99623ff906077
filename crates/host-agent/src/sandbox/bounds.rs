//! How long the steps that move many bytes may take: what a small sandbox needs, and the time in which a slow disk
//! moves the bytes. Pure.
//!
//! | step | moves |
//! |---|---|
//! | find a snapshot, unverified since the host booted | its pages and the memory of its base, read |
//! | clone a disk that shares nothing with its base | what is in the base, read and written |
//! | restore | pages, read, and the memory of the base below each of them |
//! | save | the memory, looked through and written; the copy of a disk that has no layers |
//! | commit | pages and layers, made durable; pages, read for their digest |
//!
//! What moves next to nothing has a bound that does not depend on anything: [`RECORD`], [`LOOK`], [`REMOVE`].
//!
//! A bound that is too long costs patience on a disk that hangs, and a destroy waits for none of these steps. One that
//! is too short makes a large sandbox that cannot be saved or brought back.

use std::time::Duration;

use wrenn_types::MemoryMib;

/// What the slowest disk moves in a second, in bytes: one that turns, shared by several.
pub(crate) const SLOW_DISK: u64 = 50 << 20;

/// To find and verify a snapshot, after those that are verified before it, and what little its base has of a disk.
const FIND: Duration = Duration::from_secs(600);
/// To clone a disk that is an overlay.
const CLONE: Duration = Duration::from_secs(60);
/// To restore a machine without pages of its own.
const RESTORE: Duration = Duration::from_secs(30);
/// To save a machine, and again for each GiB of its memory.
const SAVE: Duration = Duration::from_secs(60);
/// To make a small snapshot durable on a disk that is busy.
const COMMIT: Duration = Duration::from_secs(60);

/// To write a record of a few KiB on a disk that is busy.
pub(crate) const RECORD: Duration = Duration::from_secs(60);
/// To look at small files: manifests, devices, and the sizes of the others.
pub(crate) const LOOK: Duration = Duration::from_secs(60);
/// To remove a snapshot, a layer or what there is of a sandbox. No content is read, and little is written.
pub(crate) const REMOVE: Duration = Duration::from_secs(60);

/// How long a slow disk takes for so many bytes.
pub(crate) fn moving(bytes: u64) -> Duration {
    Duration::from_secs(bytes.div_ceil(SLOW_DISK))
}

/// For finding what a machine of so much memory is made from, if that is there.
pub(crate) fn find(memory: MemoryMib) -> Duration {
    FIND + moving(memory.bytes()) * 2
}

/// For the clone of a disk for which so many bytes are copied.
pub(super) fn clone_disk(copied: u64) -> Duration {
    CLONE + moving(copied) * 2
}

/// For a machine that is restored with so many bytes of pages.
pub(super) fn restore(pages: u64) -> Duration {
    RESTORE + moving(pages) * 2
}

/// For saving a machine of so much memory, and copying so many bytes of its disk meanwhile.
pub(super) fn save(memory: MemoryMib, copied: u64) -> Duration {
    SAVE * memory.get().div_ceil(1024).saturating_add(1) + moving(copied) * 2
}

/// For making a snapshot of what was saved: so much memory at most, and so many bytes of layers.
pub(super) fn commit(memory: MemoryMib, layers: u64) -> Duration {
    COMMIT + moving(memory.bytes()) * 2 + moving(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMUM: u32 = 128;
    const MAXIMUM: u32 = 65_536;

    fn all() -> impl Iterator<Item = MemoryMib> {
        (MINIMUM..=MAXIMUM).map(|mib| MemoryMib::new(mib.into()).unwrap())
    }

    /// The seconds in which a disk that is as slow as it may be has moved so much, so many times.
    fn seconds(memory: MemoryMib, times: u32) -> f64 {
        f64::from(memory.get()) * f64::from(times) / 50.0
    }

    #[test]
    fn whatever_the_memory_a_slow_disk_has_the_time_that_it_needs() {
        assert!(
            MemoryMib::new((MINIMUM - 1).into()).is_err() && MemoryMib::new((MAXIMUM + 1).into()).is_err()
        );
        for memory in all() {
            for (bound, times) in [
                (find(memory), 2),
                // All of its memory may differ from its base.
                (restore(memory.bytes()), 2),
                (save(memory, 0), 1),
                (commit(memory, 0), 2),
            ] {
                let needed = seconds(memory, times) + 20.0;
                assert!(bound.as_secs_f64() >= needed, "{memory:?}: {bound:?} for {needed} s");
            }
        }
    }

    #[test]
    fn more_never_has_less_time() {
        for (less, more) in all().zip(all().skip(1)) {
            assert!(find(less) <= find(more) && restore(less.bytes()) <= restore(more.bytes()));
            assert!(save(less, 0) <= save(more, 0) && commit(less, 0) <= commit(more, 0));
            let (less, more) = (less.bytes(), more.bytes());
            assert!(clone_disk(less) <= clone_disk(more));
        }
        assert!(moving(u64::MAX) > moving(u64::MAX / 2), "no number is too large");
    }

    #[test]
    fn what_moves_nothing_has_what_a_small_sandbox_needs() {
        assert_eq!((clone_disk(0), restore(0)), (CLONE, RESTORE));
        let smallest = MemoryMib::new(MINIMUM.into()).unwrap();
        assert!(find(smallest) < FIND * 2 && commit(smallest, 0) < COMMIT * 2);
        assert!(save(smallest, 0) <= SAVE * 2);
    }
}
