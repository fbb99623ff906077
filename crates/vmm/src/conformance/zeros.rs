//! Machines that boot over a file of zeros, and are to the host what restored machines are.

use std::fs::File;

use camino::{Utf8Path, Utf8PathBuf};

use super::{BOOT_BOUND, BOUND, Bench, bounded, counted, counts};
use crate::{AdoptedMachine, BootMemory, ExitReason, SnapshotFiles, VmmError};

/// A file that is one hole.
fn hole(path: &Utf8Path, bytes: u64) {
    File::create_new(path).unwrap().set_len(bytes).unwrap();
}

fn files(bench: &Bench<'_>, zeros: &Utf8Path, name: &str) -> SnapshotFiles {
    SnapshotFiles { memory: zeros.to_owned(), ..bench.diff_files(name) }
}

pub(super) async fn a_machine_boots_over_zeros_and_is_saved_like_any_other(bench: &Bench<'_>) {
    let zeros = bench.path("zeros");
    let memory_bytes = bench.spec("a").shape.memory.bytes();
    hole(&zeros, memory_bytes);
    let mut vm = bounded(bench.vmm().boot(bench.spec("a"), BootMemory::Zeros(&zeros))).await.unwrap();
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    bounded(vm.pause()).await.unwrap();
    let at_first = counted(&vm.console().await).unwrap();
    let first = files(bench, &zeros, "first");
    let statistics = bounded(vm.snapshot(&first)).await.unwrap();
    // Its kernel has cleared all of its memory, which is not what it holds.
    let pages = memory_bytes / 4096;
    assert!(statistics.pages > 0 && statistics.pages < pages / 2, "{statistics:?} of {pages}");
    assert_eq!(statistics.zero_pages, 0);

    // It goes on, also with another owner, and is saved again.
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), at_first.ticks.len() + 2, BOUND).await;
    bounded(vm.release()).await;
    let known = AdoptedMachine { memory: Some(zeros.clone()), ..bench.adopted("a") };
    let mut vm = bounded(bench.vmm().adopt(known)).await.unwrap();
    bounded(vm.pause()).await.unwrap();
    let at_second = counted(&vm.console().await).unwrap();
    let second = files(bench, &zeros, "second");
    bounded(vm.snapshot(&second)).await.unwrap();
    assert_eq!(bounded(vm.stop()).await.unwrap(), ExitReason::Stopped);

    // Each goes on where it was, and so does what is saved of those.
    let third = files(bench, &zeros, "third");
    for (name, from, was) in [("b", &first, &at_first), ("c", &second, &at_second)] {
        let mut vm = bench.restore(name, from).await;
        bounded(vm.resume()).await.unwrap();
        let goes_on = counts(vm.as_mut(), 3, BOUND).await;
        assert_eq!(goes_on.token, was.token);
        assert!((was.last() + 1..=was.last() + 2).contains(&goes_on.ticks[0]), "{was:?} {goes_on:?}");
        bounded(vm.pause()).await.unwrap();
        bounded(vm.snapshot(&third)).await.unwrap();
        bounded(vm.stop()).await.unwrap();
    }
    let mut vm = bench.restore("d", &third).await;
    bounded(vm.resume()).await.unwrap();
    assert_eq!(counts(vm.as_mut(), 3, BOUND).await.token, at_second.token);
    bounded(vm.stop()).await.unwrap();
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut File::open(&zeros).unwrap(), &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0) && content.len() as u64 == memory_bytes);
}

pub(super) async fn what_is_not_as_long_as_the_memory_is_refused(bench: &Bench<'_>) {
    let refused = async |file: &Utf8PathBuf| {
        bounded(bench.vmm().boot(bench.spec("a"), BootMemory::Zeros(file))).await.map(drop)
    };
    let missing = refused(&bench.path("missing")).await;
    assert!(matches!(missing, Err(VmmError::File { .. })), "{missing:?}");
    let short = bench.path("short");
    hole(&short, 1 << 20);
    let short = refused(&short).await;
    assert!(matches!(short, Err(VmmError::Spec { field: "memory", .. })), "{short:?}");
    assert!(!bench.runs("a"));
}
