//! How long the host's steps may take, by the size of a sandbox: what a small one needs, and the time in which a slow disk
//! moves the bytes. Pure.
//!
//! | step | moves |
//! |---|---|
//! | find a snapshot, unverified since the host booted | its pages and the memory of its base, read |
//! | build the snapshot of a template | the memory, written, and read twice |
//! | clone a disk that shares nothing with its base | what is in the base, read and written |
//! | restore | pages, read, and the memory of the base below each of them |
//! | boot | the memory, cleared by the guest's kernel |
//! | save | the memory, looked through and written, twice under Firecracker; the copy of a disk that has no layers |
//! | commit | pages and layers, made durable; pages, read for their digest |
//!
//! What moves next to nothing has a bound that does not depend on anything: [`RECORD`], [`LOOK`], [`REMOVE`].
//!
//! A bound that is too long costs patience on a disk that hangs, and a destroy waits for none of these steps. One that
//! is too short makes a large sandbox that cannot be saved or brought back.
//!
//! The host agent bounds each step by what it finds. The control plane knows only how large a sandbox is, and waits for
//! all of the steps together, [`bring_up`] and [`capture`], so that it gives up on nothing that the agent still does.

use std::time::Duration;

use crate::{DiskMib, MemoryMib};

/// What the slowest disk moves in a second, in bytes: one that turns, shared by several.
pub const SLOW_DISK: u64 = 50 << 20;

/// To get a network slot, and again to put its policy in force.
pub const SLOT: Duration = Duration::from_secs(20);
/// For a machine to begin to boot, and for one that is there until its CPUs run and its disk has its size.
pub const RUN: Duration = Duration::from_secs(30);
/// For a guest to become itself.
pub const IDENTITY: Duration = Duration::from_secs(20);
/// For a guest to stand still.
pub const PREPARE: Duration = Duration::from_secs(3);
/// For it to write all that is to be on its disk, where only that is saved.
pub const WRITE: Duration = Duration::from_secs(30);
/// For a guest to open again.
pub const THAW: Duration = Duration::from_secs(20);
/// For the layers of a disk to become one, where there are too many of them to add another.
pub const STREAM: Duration = Duration::from_secs(600);
/// To write a record of a few KiB on a disk that is busy.
pub const RECORD: Duration = Duration::from_secs(60);
/// To look at small files: manifests, devices, and the sizes of the others.
pub const LOOK: Duration = Duration::from_secs(60);
/// To remove a snapshot, a layer or what there is of a sandbox. No content is read, and little is written.
pub const REMOVE: Duration = Duration::from_secs(60);
/// For the records that are written between the steps, and what else is not bounded by itself.
const BETWEEN: Duration = Duration::from_secs(240);

/// To find and verify a snapshot, after those that are verified before it, and what little its base has of a disk.
const FIND: Duration = Duration::from_secs(600);
/// Until a small snapshot is there, made by us or by another stack.
const BUILD: Duration = Duration::from_secs(600);
/// For a guest to boot until its agent answers, and for each GiB of its memory, which its kernel clears before
/// anything else.
const BOOT: Duration = Duration::from_secs(120);
const BOOT_PER_GIB: Duration = Duration::from_secs(30);
/// To clone a disk that is an overlay.
const CLONE: Duration = Duration::from_secs(60);
/// To restore a machine without pages of its own.
const RESTORE: Duration = Duration::from_secs(30);
/// To save a machine, and again for each GiB of its memory.
const SAVE: Duration = Duration::from_secs(60);
/// To make a small snapshot durable on a disk that is busy.
const COMMIT: Duration = Duration::from_secs(60);

/// How long a slow disk takes for so many bytes.
#[must_use]
pub fn moving(bytes: u64) -> Duration {
    Duration::from_secs(bytes.div_ceil(SLOW_DISK))
}

/// For finding what a machine of so much memory is made from, if that is there.
#[must_use]
pub fn find(memory: MemoryMib) -> Duration {
    FIND + moving(memory.bytes()) * 2
}

/// For a guest with so much memory to boot until its agent answers.
#[must_use]
pub fn boot(memory: MemoryMib) -> Duration {
    BOOT + BOOT_PER_GIB * memory.get().div_ceil(1024)
}

/// Until a template's snapshot of so much memory is there, made by us or by another stack: it boots, and its memory is
/// written, read for its digest, and read once more by whoever did not make it.
#[must_use]
pub fn build(memory: MemoryMib) -> Duration {
    BUILD + boot(memory) + moving(memory.bytes()) * 3
}

/// For the clone of a disk for which so many bytes are copied.
#[must_use]
pub fn clone_disk(copied: u64) -> Duration {
    CLONE + moving(copied) * 2
}

/// For a machine that is restored with so many bytes of pages.
#[must_use]
pub fn restore(pages: u64) -> Duration {
    RESTORE + moving(pages) * 2
}

/// For saving a machine of so much memory, and copying so many bytes of its disk meanwhile.
#[must_use]
pub fn save(memory: MemoryMib, copied: u64) -> Duration {
    SAVE * memory.get().div_ceil(1024).saturating_add(1) + moving(copied) * 2
}

/// For making a snapshot of what was saved: so much memory at most, and so many bytes of layers.
#[must_use]
pub fn commit(memory: MemoryMib, layers: u64) -> Duration {
    COMMIT + moving(memory.bytes()) * 2 + moving(layers)
}

/// For all steps of a create, a resume or a rollback of a sandbox of that size, whatever it is made from.
#[must_use]
pub fn bring_up(memory: MemoryMib, disk: DiskMib) -> Duration {
    let source = build(memory).max(find(memory));
    let machine = restore(memory.bytes()).max(RUN);
    source + clone_disk(disk.bytes()) + SLOT * 2 + machine + RUN + boot(memory) + IDENTITY + BETWEEN
}

/// For all steps of a pause or a snapshot of a sandbox of that size, whose layers hold its disk twice at most. Where they
/// hold more on the slowest disk, a capture may end after whoever waited for it has given up, and is found then.
#[must_use]
pub fn capture(memory: MemoryMib, disk: DiskMib) -> Duration {
    let saved = save(memory, disk.bytes()) + commit(memory, disk.bytes() * 2);
    STREAM + WRITE.max(PREPARE) + saved + THAW + BETWEEN
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
                (save(memory, 0), 2),
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

    proptest! {
        /// Whoever waits for all of it waits for every way in which a host may do it, step after step.
        #[test]
        fn the_whole_has_the_time_of_its_steps(
            memory in i64::from(MINIMUM)..=i64::from(MAXIMUM),
            disk in 512_i64..=1_048_576,
            part in 0.0..=1.0,
        ) {
            let (memory, disk) = (MemoryMib::new(memory).unwrap(), DiskMib::new(disk).unwrap());
            let some = |bytes: u64| Duration::from_secs_f64(moving(bytes).as_secs_f64() * part);
            let slot = SLOT + SLOT;
            let cloned = CLONE + some(disk.bytes()) * 2;
            // From a template, from a snapshot, and from a disk alone.
            let create = build(memory) + cloned + slot + RESTORE + RUN + IDENTITY;
            let resume = find(memory) + cloned + slot + RESTORE + some(memory.bytes()) * 2 + RUN + IDENTITY;
            let cold = find(memory) + cloned + slot + RUN * 2 + boot(memory) + IDENTITY;
            for steps in [create, resume, cold] {
                prop_assert!(steps < bring_up(memory, disk), "{steps:?}");
            }
            let layers = some(disk.bytes()) * 2;
            for prepare in [PREPARE, WRITE] {
                let pause = STREAM + prepare + save(memory, 0) + commit(memory, 0) + layers + THAW;
                prop_assert!(pause < capture(memory, disk), "{pause:?}");
            }
        }
    }
}
