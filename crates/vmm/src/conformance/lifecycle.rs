//! How machines live and end.

use std::{fs::File, time::Duration};

use super::{BOOT_BOUND, BOUND, Bench, bounded, counted, counts, ended, until};
use crate::{BootMemory, DiskFormat, DiskSpec, ExitReason, VmmError};

pub(super) async fn pause_and_resume_are_idempotent(bench: &Bench<'_>) {
    let mut vm = bench.boot("a").await;
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    assert!(vm.console().await.contains("wrenn-guest ready"));
    bounded(vm.resume()).await.unwrap();
    bounded(vm.pause()).await.unwrap();
    bounded(vm.pause()).await.unwrap();
    let before = counted(&vm.console().await).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(counted(&vm.console().await).unwrap(), before, "a paused guest does nothing");
    bounded(vm.resume()).await.unwrap();
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), before.ticks.len() + 3, BOUND).await;
    assert_eq!(*vm.exit().borrow(), None);
    assert_eq!(bounded(vm.stop()).await.unwrap(), ExitReason::Stopped);
}

pub(super) async fn stop_works_in_every_state(bench: &Bench<'_>) {
    let files = bench.snapshot_files();
    let mut running = bench.boot("a").await;
    assert_eq!(bounded(running.stop()).await.unwrap(), ExitReason::Stopped);
    assert!(!bench.runs("a"), "it is gone when stop says so");
    assert_eq!(bounded(running.stop()).await.unwrap(), ExitReason::Stopped, "and stays stopped");
    assert_eq!(*running.exit().borrow(), Some(ExitReason::Stopped));

    let mut paused = bench.boot("b").await;
    bounded(paused.pause()).await.unwrap();
    assert_eq!(bounded(paused.stop()).await.unwrap(), ExitReason::Stopped);

    let mut saved =
        bounded(bench.vmm().boot(bench.spec("c"), BootMemory::Shared(&files.memory))).await.unwrap();
    bounded(saved.pause()).await.unwrap();
    bounded(saved.snapshot(&files)).await.unwrap();
    assert_eq!(bounded(saved.stop()).await.unwrap(), ExitReason::Stopped);

    let mut restored = bounded(bench.vmm().restore(bench.spec("d"), &files)).await.unwrap();
    assert_eq!(bounded(restored.stop()).await.unwrap(), ExitReason::Stopped);
    assert!(!bench.runs("d"));
}

pub(super) async fn a_dropped_machine_is_gone(bench: &Bench<'_>) {
    let vm = bench.boot("a").await;
    let mut exit = vm.exit();
    drop(vm);
    let reason = bounded(exit.wait_for(Option::is_some)).await.unwrap().clone();
    assert_eq!(reason, Some(ExitReason::Stopped));
    until(|| !bench.runs("a")).await;
}

pub(super) async fn an_abandoned_start_leaves_nothing(bench: &Bench<'_>) {
    for wait in [0, 1, 5, 20] {
        let boot = bench.vmm().boot(bench.spec("a"), BootMemory::Anonymous);
        let abandoned = tokio::time::timeout(Duration::from_millis(wait), boot).await;
        drop(abandoned);
        until(|| !bench.runs("a")).await;
    }
    let memory = bench.path("memory");
    let boot = bench.vmm().boot(bench.spec("a"), BootMemory::Shared(&memory));
    if tokio::time::timeout(Duration::from_millis(5), boot).await.is_err() {
        assert!(!memory.exists(), "a file that was made for it goes with it");
    }
}

pub(super) async fn a_killed_machine_says_so_at_once(bench: &Bench<'_>) {
    let mut vm = bench.boot("a").await;
    let mut exit = vm.exit();
    assert_eq!(*exit.borrow_and_update(), None);
    bench.subject.kill(vm.as_ref(), &bench.full_name("a")).await;
    let killed = ExitReason::VmmKilled { signal: 9 };
    assert_eq!(ended(vm.as_ref(), BOUND).await, killed);
    assert!(
        matches!(vm.pause().await, Err(VmmError::Exited { operation: "pause", reason }) if reason == killed)
    );
    assert_eq!(bounded(vm.stop()).await.unwrap(), killed, "it was gone before");
    exit.changed().await.unwrap();
    exit.borrow_and_update();
    let again = tokio::time::timeout(Duration::from_millis(50), exit.changed()).await;
    assert!(!matches!(again, Ok(Ok(()))), "it is told once");
}

pub(super) async fn files_are_kept_open_as_long_as_it_lives(bench: &Bench<'_>) {
    let path = bench.path("lock");
    std::fs::write(&path, "").unwrap();
    let lock = File::open(&path).unwrap();
    lock.try_lock().unwrap();
    let mut spec = bench.spec("a");
    spec.keep_open.push(lock.into());
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    let other = File::open(&path).unwrap();
    assert!(other.try_lock().is_err(), "the machine holds it");
    bounded(vm.stop()).await.unwrap();
    other.try_lock().unwrap();
}

pub(super) async fn a_disk_only_grows(bench: &Bench<'_>) {
    let mut spec = bench.spec("a");
    // Beside what the driver makes there: the directory is the machine's, and its disk may be in it.
    let path = spec.run_dir.join("disk");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    spec.disk = Some(DiskSpec { path: path.clone(), format: DiskFormat::Raw });
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    let length = || std::fs::metadata(&path).unwrap().len();
    bounded(vm.resize_disk(128 << 20)).await.unwrap();
    assert_eq!(length(), 128 << 20);
    bounded(vm.resize_disk(128 << 20)).await.unwrap();
    let shrunk = bounded(vm.resize_disk(64 << 20)).await;
    assert!(matches!(shrunk, Err(VmmError::Spec { field: "disk", .. })), "{shrunk:?}");
    assert_eq!(length(), 128 << 20);
    bounded(vm.pause()).await.unwrap();
    bounded(vm.resize_disk(256 << 20)).await.unwrap();
    assert_eq!(length(), 256 << 20);
    bounded(vm.stop()).await.unwrap();
}

async fn end_of_guest_that(bench: &Bench<'_>, does: &str) -> ExitReason {
    let mut spec = bench.spec("a");
    spec.kernel_arguments.push(format!("conformance={does}"));
    let vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    let reason = ended(vm.as_ref(), BOOT_BOUND).await;
    assert!(!bench.runs("a"), "it is gone when its end is told");
    reason
}

pub(super) async fn a_guest_that_powers_off_has_shut_down(bench: &Bench<'_>) {
    assert_eq!(end_of_guest_that(bench, "poweroff").await, ExitReason::GuestShutdown);
}

pub(super) async fn a_guest_that_reboots_has_shut_down(bench: &Bench<'_>) {
    assert_eq!(end_of_guest_that(bench, "reboot").await, ExitReason::GuestShutdown);
}

pub(super) async fn a_guest_that_panics_is_known(bench: &Bench<'_>) {
    assert_eq!(end_of_guest_that(bench, "panic").await, ExitReason::GuestPanic);
}
