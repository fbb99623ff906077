//! Snapshots, and what comes out of them.

use std::{os::unix::fs::MetadataExt, time::Duration};

use super::{BOOT_BOUND, BOUND, Bench, bounded, counted, counts};
use crate::{BootMemory, ExitReason, SnapshotFiles, VmmError};

/// What changes when a file is written, also through a mapping; its blocks change whenever the kernel likes.
pub(super) fn stamp(files: &SnapshotFiles) -> Vec<(i64, i64, u64)> {
    let stamp = |path| {
        let file = std::fs::metadata(path).unwrap();
        (file.mtime(), file.mtime_nsec(), file.len())
    };
    vec![stamp(&files.memory), stamp(&files.state)]
}

pub(super) async fn a_restored_guest_goes_on_where_it_was(bench: &Bench<'_>) {
    let files = bench.snapshot_files();
    let mut template =
        bounded(bench.vmm().boot(bench.spec("template"), BootMemory::Shared(&files.memory))).await.unwrap();
    counts(template.as_mut(), 3, BOOT_BOUND).await;
    bounded(template.pause()).await.unwrap();
    let saved = counted(&template.console().await).unwrap();
    bounded(template.snapshot(&files)).await.unwrap();
    assert_eq!(bounded(template.stop()).await.unwrap(), ExitReason::Stopped);
    let stamped = stamp(&files);

    // Two at once, each with a memory of its own.
    let restore = |name| bounded(bench.vmm().restore(bench.spec(name), &files));
    let (one, two) = tokio::join!(restore("one"), restore("two"));
    let (mut one, mut two) = (one.unwrap(), two.unwrap());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(counted(&one.console().await), None, "it stands still until it is resumed");
    bounded(one.resume()).await.unwrap();
    let first = counts(one.as_mut(), 5, BOUND).await;
    assert_eq!(first.token, saved.token, "it is the same guest, not one that booted");
    // A tick may have been counted and not printed yet.
    assert!((saved.last() + 1..=saved.last() + 2).contains(&first.ticks[0]), "{saved:?} {first:?}");
    assert_eq!(counted(&two.console().await), None, "the other one is another one");
    bounded(two.resume()).await.unwrap();
    let second = counts(two.as_mut(), 3, BOUND).await;
    assert_eq!((&second.token, second.ticks[0]), (&first.token, first.ticks[0]));

    bench.subject.kill(one.as_ref(), &bench.full_name("one")).await;
    counts(two.as_mut(), second.ticks.len() + 4, BOUND).await;
    assert_eq!(bounded(two.stop()).await.unwrap(), ExitReason::Stopped);

    // Neither has left a trace in the files.
    let mut third = restore("three").await.unwrap();
    bounded(third.resume()).await.unwrap();
    assert_eq!(counts(third.as_mut(), 3, BOUND).await.ticks[0], first.ticks[0]);
    assert_eq!(bounded(third.stop()).await.unwrap(), ExitReason::Stopped);
    assert_eq!(stamp(&files), stamped, "a snapshot is only read");
}

pub(super) async fn damaged_snapshots_are_refused(bench: &Bench<'_>) {
    let files = bench.snapshot_files();
    let mut template =
        bounded(bench.vmm().boot(bench.spec("a"), BootMemory::Shared(&files.memory))).await.unwrap();
    bounded(template.pause()).await.unwrap();
    bounded(template.snapshot(&files)).await.unwrap();
    bounded(template.stop()).await.unwrap();
    let state = std::fs::read(&files.state).unwrap();
    for damaged in [Vec::new(), b"no state at all".to_vec(), state[..state.len() / 2].to_vec()] {
        std::fs::write(&files.state, &damaged).unwrap();
        let restored = bounded(bench.vmm().restore(bench.spec("b"), &files)).await.map(|_| ());
        let refused = matches!(restored, Err(VmmError::Exited { .. } | VmmError::Refused { .. }));
        assert!(refused, "{} bytes: {restored:?}", damaged.len());
        assert!(!bench.runs("b"), "what failed is gone");
    }
}
