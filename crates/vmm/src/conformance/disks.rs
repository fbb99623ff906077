//! Files that are put on top of a disk while a guest writes to it.

use std::{fs::File, os::unix::fs::FileExt, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};

use super::{BOOT_BOUND, BOUND, Bench, bounded, counted, counts};
use crate::{BootMemory, DiskFormat, DiskSpec, MachineSpec, Vm, VmmError};

const BYTES: u64 = 16 << 20;
const CLUSTER: u64 = 1 << 16;

/// An empty qcow2 file on another one: header, one block of reference counts, and an empty table.
fn overlay(path: &Utf8Path, base: &DiskSpec, bytes: u64) -> DiskSpec {
    let format: &[u8] = match base.format {
        DiskFormat::Raw | DiskFormat::DmSnapshot => b"raw\0\0\0\0\0",
        DiskFormat::Qcow2 => b"qcow2\0\0\0",
    };
    let format_length = format.iter().position(|byte| *byte == 0).unwrap();
    let name = base.path.as_str().as_bytes();
    let mut header = b"QFI\xfb".to_vec();
    let long = |header: &mut Vec<u8>, number: u64| header.extend(number.to_be_bytes());
    let word = |header: &mut Vec<u8>, number: usize| {
        header.extend(u32::try_from(number).unwrap().to_be_bytes());
    };
    word(&mut header, 3);
    long(&mut header, 128);
    word(&mut header, name.len());
    word(&mut header, 16);
    long(&mut header, bytes);
    word(&mut header, 0);
    word(&mut header, usize::try_from(bytes.div_ceil(CLUSTER / 8 * CLUSTER)).unwrap());
    long(&mut header, 3 * CLUSTER);
    long(&mut header, CLUSTER);
    word(&mut header, 1);
    word(&mut header, 0);
    for zero in [0, 0, 0, 0] {
        long(&mut header, zero);
    }
    word(&mut header, 4);
    word(&mut header, 104);
    word(&mut header, 0xe279_2aca);
    word(&mut header, format_length);
    header.extend(format);
    long(&mut header, 0);
    assert_eq!(header.len(), 128);
    header.extend(name);

    let file = File::create_new(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER).unwrap();
    file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 2 * CLUSTER).unwrap();
    file.set_len(4 * CLUSTER).unwrap();
    DiskSpec { path: path.to_owned(), format: DiskFormat::Qcow2 }
}

/// A machine that writes to a disk of this bench.
fn with_disk(bench: &Bench<'_>) -> (MachineSpec, DiskSpec) {
    let disk = DiskSpec { path: bench.path("base"), format: DiskFormat::Raw };
    File::create_new(&disk.path).unwrap().set_len(BYTES).unwrap();
    let mut spec = bench.spec("a");
    spec.disk = Some(disk.clone());
    (spec, disk)
}

/// Lets a guest count some more, each time with a look at its disk.
async fn goes_on(vm: &mut dyn Vm) {
    let so_far = counted(&vm.console().await).map_or(0, |counted| counted.ticks.len());
    counts(vm, so_far + 3, BOUND).await;
}

async fn chain(vm: &mut dyn Vm) -> Vec<Utf8PathBuf> {
    bounded(vm.disk_chain()).await.unwrap()
}

pub(super) async fn a_disk_goes_on_on_an_overlay(bench: &Bench<'_>) {
    let (spec, base) = with_disk(bench);
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    assert_eq!(chain(vm.as_mut()).await, std::slice::from_ref(&base.path));

    // Running.
    let one = overlay(&bench.path("one"), &base, BYTES);
    bounded(vm.pivot_disk(&one)).await.unwrap();
    let base_content = std::fs::read(&base.path).unwrap();
    assert_eq!(chain(vm.as_mut()).await, [one.path.clone(), base.path.clone()]);
    goes_on(vm.as_mut()).await;

    // Paused.
    bounded(vm.pause()).await.unwrap();
    let two = overlay(&bench.path("two"), &one, BYTES);
    bounded(vm.pivot_disk(&two)).await.unwrap();
    let one_content = std::fs::read(&one.path).unwrap();
    bounded(vm.resume()).await.unwrap();
    goes_on(vm.as_mut()).await;
    let all = [two.path.clone(), one.path.clone(), base.path.clone()];
    assert_eq!(chain(vm.as_mut()).await, all);

    // It is a disk like any other.
    bounded(vm.resize_disk(2 * BYTES)).await.unwrap();
    let shrunk = bounded(vm.resize_disk(BYTES)).await;
    assert!(matches!(shrunk, Err(VmmError::Spec { field: "disk", .. })), "{shrunk:?}");
    let three = overlay(&bench.path("three"), &two, 2 * BYTES);
    bounded(vm.pivot_disk(&three)).await.unwrap();
    goes_on(vm.as_mut()).await;
    bounded(vm.stop()).await.unwrap();
    assert!(std::fs::read(&base.path).unwrap() == base_content, "nothing is written to it any more");
    assert!(std::fs::read(&one.path).unwrap() == one_content, "nor to the next one");

    let mut other = bench.spec("b");
    other.disk = Some(three.clone());
    other.disk_bases = vec![base, two, one];
    let mut vm = bounded(bench.vmm().boot(other, BootMemory::Anonymous)).await.unwrap();
    assert_eq!(chain(vm.as_mut()).await, [&[three.path][..], &all].concat());
    bounded(vm.stop()).await.unwrap();
    let ended = bounded(vm.disk_chain()).await;
    assert!(matches!(ended, Err(VmmError::Exited { operation: "disk_chain", .. })), "{ended:?}");
}

pub(super) async fn overlays_that_do_not_fit_are_refused(bench: &Bench<'_>) {
    let (spec, base) = with_disk(bench);
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    counts(vm.as_mut(), 2, BOOT_BOUND).await;

    let raw = DiskSpec { path: bench.path("raw"), format: DiskFormat::Raw };
    File::create_new(&raw.path).unwrap().set_len(BYTES).unwrap();
    let refused = bounded(vm.pivot_disk(&raw)).await;
    assert!(matches!(refused, Err(VmmError::Unsupported { operation: "pivot_disk", .. })), "{refused:?}");
    let missing = DiskSpec { path: bench.path("missing"), format: DiskFormat::Qcow2 };
    let refused = bounded(vm.pivot_disk(&missing)).await;
    assert!(matches!(&refused, Err(VmmError::File { path, .. }) if *path == missing.path), "{refused:?}");
    for unfit in [
        overlay(&bench.path("larger"), &base, 2 * BYTES),
        overlay(&bench.path("on-another"), &raw, BYTES),
        DiskSpec { path: raw.path.clone(), format: DiskFormat::Qcow2 },
    ] {
        let refused = bounded(vm.pivot_disk(&unfit)).await;
        assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{unfit:?}: {refused:?}");
    }
    for unfit in [&base.path, &raw.path, &missing.path] {
        let refused = bounded(vm.stream_disk(unfit)).await;
        assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{unfit}: {refused:?}");
    }
    assert_eq!(chain(vm.as_mut()).await, [base.path]);
    goes_on(vm.as_mut()).await;
    bounded(vm.stop()).await.unwrap();

    let mut diskless = bench.boot("b").await;
    assert!(chain(diskless.as_mut()).await.is_empty());
    let refused = bounded(diskless.pivot_disk(&raw)).await;
    assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{refused:?}");
    let refused = bounded(diskless.stream_disk(&raw.path)).await;
    assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{refused:?}");
    bounded(diskless.stop()).await.unwrap();
}

pub(super) async fn a_chain_is_copied_into_its_top(bench: &Bench<'_>) {
    let (spec, base) = with_disk(bench);
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    let mut top = base.clone();
    let mut files = vec![base.path.clone()];
    for name in ["one", "two", "three"] {
        top = overlay(&bench.path(name), &top, BYTES);
        bounded(vm.pivot_disk(&top)).await.unwrap();
        files.insert(0, top.path.clone());
        goes_on(vm.as_mut()).await;
    }
    assert_eq!(chain(vm.as_mut()).await, files);

    // One that nobody waits for, and one that is waited for.
    let abandoned = tokio::time::timeout(Duration::from_millis(1), vm.stream_disk(&base.path)).await;
    drop(abandoned);
    goes_on(vm.as_mut()).await;
    bounded(vm.stream_disk(&base.path)).await.unwrap();
    let short = [top.path.clone(), base.path.clone()];
    assert_eq!(chain(vm.as_mut()).await, short);
    bounded(vm.stream_disk(&base.path)).await.unwrap();
    assert_eq!(chain(vm.as_mut()).await, short, "there was nothing to do");

    // What lay between is not needed any more, neither now nor later.
    std::fs::remove_file(bench.path("one")).unwrap();
    std::fs::remove_file(bench.path("two")).unwrap();
    goes_on(vm.as_mut()).await;
    let four = overlay(&bench.path("four"), &top, BYTES);
    bounded(vm.pivot_disk(&four)).await.unwrap();
    goes_on(vm.as_mut()).await;
    bounded(vm.stop()).await.unwrap();

    let mut other = bench.spec("b");
    other.disk = Some(four.clone());
    other.disk_bases = vec![base.clone(), top.clone()];
    let mut vm = bounded(bench.vmm().boot(other, BootMemory::Anonymous)).await.unwrap();
    assert_eq!(chain(vm.as_mut()).await, [four.path, top.path, base.path]);
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    bounded(vm.stop()).await.unwrap();
}

pub(super) async fn a_disk_without_layers_is_one_file(bench: &Bench<'_>) {
    let (spec, base) = with_disk(bench);
    let mut vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
    counts(vm.as_mut(), 3, BOOT_BOUND).await;
    assert_eq!(chain(vm.as_mut()).await, std::slice::from_ref(&base.path));
    let one = overlay(&bench.path("one"), &base, BYTES);
    let pivoted = bounded(vm.pivot_disk(&one)).await;
    assert!(matches!(pivoted, Err(VmmError::Unsupported { operation: "pivot_disk", .. })), "{pivoted:?}");
    let streamed = bounded(vm.stream_disk(&base.path)).await;
    assert!(matches!(streamed, Err(VmmError::Unsupported { operation: "stream_disk", .. })), "{streamed:?}");
    goes_on(vm.as_mut()).await;
    bounded(vm.resize_disk(2 * BYTES)).await.unwrap();
    goes_on(vm.as_mut()).await;
    assert_eq!(chain(vm.as_mut()).await, std::slice::from_ref(&base.path));
    bounded(vm.stop()).await.unwrap();

    let mut other = bench.spec("b");
    other.disk = Some(one);
    let booted = bounded(bench.vmm().boot(other, BootMemory::Anonymous)).await.map(drop);
    assert!(matches!(booted, Err(VmmError::Unsupported { .. })), "{booted:?}");
    assert!(!bench.runs("b"));
    let mut diskless = bench.boot("c").await;
    assert!(chain(diskless.as_mut()).await.is_empty());
    let refused = bounded(diskless.pivot_disk(&base)).await;
    assert!(matches!(refused, Err(VmmError::Spec { field: "disk", .. })), "{refused:?}");
    bounded(diskless.stop()).await.unwrap();
}
