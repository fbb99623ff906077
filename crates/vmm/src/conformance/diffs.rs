//! Snapshots of restored machines: what differs from the memory that they share.

use std::time::Duration;

use super::{BOUND, Bench, bounded, counted, counts, snapshots::stamp, until};
use crate::{BootMemory, ExitReason, SnapshotFiles, VmmError};

pub(super) async fn a_restored_guest_is_saved_and_goes_on(bench: &Bench<'_>) {
    assert!(bench.vmm().capabilities().supports_diff);
    let base = bench.template().await;
    let stamped = stamp(&base);
    let mut vm = bench.restore("a", &base).await;
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), 4, BOUND).await;
    bounded(vm.pause()).await.unwrap();
    let at_first = counted(&vm.console().await).unwrap();
    let first = bench.diff_files("first");
    let statistics = bounded(vm.snapshot(&first)).await.unwrap();
    // What became zero is not what was not written.
    assert!(statistics.zero_pages > 0 && statistics.pages > statistics.zero_pages, "{statistics:?}");
    assert!(statistics.bytes_written > (statistics.pages - statistics.zero_pages) * 4096);
    let again = bounded(vm.snapshot(&first)).await.unwrap();
    assert_eq!((again.pages, again.zero_pages), (statistics.pages, statistics.zero_pages));

    // It goes on, and is saved again.
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), at_first.ticks.len() + 3, BOUND).await;
    bounded(vm.pause()).await.unwrap();
    let at_second = counted(&vm.console().await).unwrap();
    let second = bench.diff_files("second");
    bounded(vm.snapshot(&second)).await.unwrap();
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), at_second.ticks.len() + 2, BOUND).await;
    assert_eq!(bounded(vm.stop()).await.unwrap(), ExitReason::Stopped);

    // Two of one snapshot at once, and one of the other: each goes on where it was.
    let (one, two, three) = tokio::join!(
        bench.restore("one", &first),
        bench.restore("two", &first),
        bench.restore("three", &second)
    );
    for (mut vm, was) in [(one, &at_first), (two, &at_first), (three, &at_second)] {
        assert_eq!(counted(&vm.console().await), None, "it stands still until it is resumed");
        bounded(vm.resume()).await.unwrap();
        let goes_on = counts(vm.as_mut(), 3, BOUND).await;
        assert_eq!(goes_on.token, was.token);
        // A tick may have been counted and not printed yet.
        assert!((was.last() + 1..=was.last() + 2).contains(&goes_on.ticks[0]), "{was:?} {goes_on:?}");
        assert_eq!(bounded(vm.stop()).await.unwrap(), ExitReason::Stopped);
    }
    assert_eq!(stamp(&base), stamped, "the memory that they share is only read");
}

pub(super) async fn ten_generations_keep_what_each_has_written(bench: &Bench<'_>) {
    let base = bench.template().await;
    let stamped = stamp(&base);
    let mut files = base.clone();
    let mut last = None;
    for generation in 0..10 {
        let mut vm = bench.restore("a", &files).await;
        bounded(vm.resume()).await.unwrap();
        // The guest says at each tick whether its memory is what it should be.
        counts(vm.as_mut(), 3, BOUND).await;
        bounded(vm.pause()).await.unwrap();
        let counted = counted(&vm.console().await).unwrap();
        if let Some((token, tick)) = last {
            assert_eq!(counted.token, token);
            assert!((tick + 1..=tick + 2).contains(&counted.ticks[0]), "{tick} {counted:?}");
        }
        last = Some((counted.token.clone(), counted.last()));
        let next = bench.diff_files(&generation.to_string());
        bounded(vm.snapshot(&next)).await.unwrap();
        bounded(vm.stop()).await.unwrap();
        if let Some(pages) = &files.pages {
            // Each stands on the base alone.
            std::fs::remove_file(&files.state).unwrap();
            std::fs::remove_file(pages).unwrap();
        }
        files = next;
    }
    assert_eq!(stamp(&base), stamped);
}

pub(super) async fn what_cannot_be_saved_is_refused(bench: &Bench<'_>) {
    let base = bench.template().await;
    let mut vm = bench.restore("a", &base).await;
    let files = bench.diff_files("a");
    bounded(vm.resume()).await.unwrap();
    let running = bounded(vm.snapshot(&files)).await;
    assert!(matches!(running, Err(VmmError::WrongState { operation: "snapshot", .. })), "{running:?}");
    counts(vm.as_mut(), 2, BOUND).await;
    bounded(vm.pause()).await.unwrap();

    let without = bounded(vm.snapshot(&base)).await;
    assert!(matches!(without, Err(VmmError::Spec { field: "pages", .. })), "{without:?}");
    let other = SnapshotFiles { memory: bench.path("other"), ..files.clone() };
    std::fs::copy(&base.memory, &other.memory).unwrap();
    let other = bounded(vm.snapshot(&other)).await;
    assert!(matches!(other, Err(VmmError::Unsupported { operation: "snapshot", .. })), "{other:?}");
    let full = SnapshotFiles { pages: Some("/dev/full".into()), ..files.clone() };
    let full = bounded(vm.snapshot(&full)).await;
    let told = matches!(&full, Err(VmmError::File { path, .. }) if path == "/dev/full");
    assert!(told, "{full:?}");

    // Another name of the file is the file.
    let linked = SnapshotFiles { memory: bench.path("linked"), ..files.clone() };
    std::fs::hard_link(&base.memory, &linked.memory).unwrap();
    bounded(vm.snapshot(&linked)).await.unwrap();

    // None of it did the machine any harm.
    bounded(vm.snapshot(&files)).await.unwrap();
    let counted = counted(&vm.console().await).unwrap();
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), counted.ticks.len() + 2, BOUND).await;
    bounded(vm.stop()).await.unwrap();

    // And one that has its memory in the file has no pages.
    let shared = SnapshotFiles { memory: bench.path("shared"), ..files };
    let mut booted =
        bounded(bench.vmm().boot(bench.spec("b"), BootMemory::Shared(&shared.memory))).await.unwrap();
    bounded(booted.pause()).await.unwrap();
    let with = bounded(booted.snapshot(&shared)).await;
    assert!(matches!(with, Err(VmmError::Spec { field: "pages", .. })), "{with:?}");
    bounded(booted.stop()).await.unwrap();
}

pub(super) async fn damaged_pages_are_refused(bench: &Bench<'_>) {
    let base = bench.template().await;
    let mut vm = bench.restore("a", &base).await;
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), 2, BOUND).await;
    bounded(vm.pause()).await.unwrap();
    let files = bench.diff_files("a");
    bounded(vm.snapshot(&files)).await.unwrap();
    bounded(vm.stop()).await.unwrap();

    let pages = files.pages.clone().unwrap();
    let whole = std::fs::read(&pages).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&[], &whole[..whole.len() / 2], &whole[..whole.len() - 1], flipped.as_slice()] {
        std::fs::write(&pages, damaged).unwrap();
        let restored = bounded(bench.vmm().restore(bench.spec("b"), &files)).await.map(|_| ());
        let named = matches!(&restored, Err(VmmError::File { path, .. }) if *path == pages);
        assert!(named && !bench.runs("b"), "{} bytes: {restored:?}", damaged.len());
    }
    std::fs::write(&pages, &whole).unwrap();
    for wait in [1, 10, 30, 60] {
        let restore = bench.vmm().restore(bench.spec("b"), &files);
        drop(tokio::time::timeout(Duration::from_millis(wait), restore).await);
        until(|| !bench.runs("b")).await;
    }
    bounded(bench.restore("b", &files).await.stop()).await.unwrap();
}
