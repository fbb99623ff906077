//! What no driver takes, and what it takes only at another time.

use camino::Utf8PathBuf;
use wrenn_types::{MemoryMib, Shape};

use super::{Bench, bounded};
use crate::{BootMemory, DiskFormat, DiskSpec, MachineSpec, NetworkSpec, SnapshotFiles, VmmError, VmmResult};

async fn boot_error(bench: &Bench<'_>, spec: MachineSpec) -> VmmError {
    bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.map(|_| "a machine").unwrap_err()
}

pub(super) async fn impossible_machines_are_refused(bench: &Bench<'_>) {
    type Change = fn(&mut MachineSpec);
    let changes: [(&str, Change); 8] = [
        ("name", |spec| spec.name = String::new()),
        ("name", |spec| spec.name = "a,debug-threads=on".to_owned()),
        ("name", |spec| spec.name = "../../x".to_owned()),
        ("run_dir", |spec| spec.run_dir = Utf8PathBuf::from("relative")),
        ("run_dir", |spec| spec.run_dir = Utf8PathBuf::from(format!("/{}", "a".repeat(100)))),
        ("kernel_arguments", |spec| spec.kernel_arguments = vec!["a b".to_owned()]),
        ("kernel_arguments", |spec| spec.kernel_arguments = vec!["a".repeat(4000)]),
        ("tap", |spec| {
            let namespace = "/proc/self/ns/net".into();
            spec.network = Some(NetworkSpec { namespace, tap: "tap0,script=/bin/sh".to_owned() });
        }),
    ];
    for (wanted, change) in changes {
        let mut spec = bench.spec("a");
        change(&mut spec);
        let error = boot_error(bench, spec).await;
        assert!(matches!(error, VmmError::Spec { field, .. } if field == wanted), "{wanted}: {error:?}");
    }
    assert!(!bench.runs("a"));
}

pub(super) async fn missing_files_are_named(bench: &Bench<'_>) {
    let missing = bench.path("missing");
    let names = |error: VmmError| matches!(error, VmmError::File { path, .. } if path == missing);
    let mut spec = bench.spec("a");
    spec.guest.kernel.clone_from(&missing);
    assert!(names(boot_error(bench, spec).await));
    let mut spec = bench.spec("a");
    spec.guest.initramfs.clone_from(&missing);
    assert!(names(boot_error(bench, spec).await));
    let mut spec = bench.spec("a");
    spec.disk = Some(DiskSpec { path: missing.clone(), format: DiskFormat::Raw });
    assert!(names(boot_error(bench, spec).await));

    // It is there, and it is no disk.
    let file = bench.path("file of a snapshot");
    std::fs::write(&file, [0; 4096]).unwrap();
    let mut spec = bench.spec("a");
    spec.disk = Some(DiskSpec { path: file, format: DiskFormat::DmSnapshot });
    assert!(matches!(boot_error(bench, spec).await, VmmError::Unsupported { .. }));

    // The memory file is made by the driver: one that is there already is somebody else's.
    let taken = bench.path("taken");
    std::fs::write(&taken, "somebody's").unwrap();
    let error =
        bounded(bench.vmm().boot(bench.spec("a"), BootMemory::Shared(&taken))).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, VmmError::File { path, .. } if path == taken));
    assert_eq!(std::fs::read_to_string(bench.path("taken")).unwrap(), "somebody's");

    // A boot that fails after it made the memory file takes it away again.
    let mut spec = bench.spec("a");
    spec.disk = Some(DiskSpec { path: missing.clone(), format: DiskFormat::Raw });
    let memory = bench.path("memory");
    assert!(bounded(bench.vmm().boot(spec, BootMemory::Shared(&memory))).await.is_err());
    assert!(!memory.exists());

    let files = SnapshotFiles { memory: missing.clone(), state: missing.clone(), pages: None };
    let error = bounded(bench.vmm().restore(bench.spec("a"), &files)).await.map(|_| ()).unwrap_err();
    assert!(names(error));
    assert!(!bench.runs("a"));
}

pub(super) async fn what_is_not_possible_now_is_refused(bench: &Bench<'_>) {
    fn wrong_state<T>(result: VmmResult<T>) -> bool {
        matches!(result, Err(VmmError::WrongState { .. }))
    }
    let files = bench.snapshot_files();
    let mut vm = bounded(bench.vmm().boot(bench.spec("a"), BootMemory::Shared(&files.memory))).await.unwrap();
    assert!(wrong_state(bounded(vm.snapshot(&files)).await), "a running machine has no moment to save");
    let resized = bounded(vm.resize_disk(1 << 30)).await;
    assert!(matches!(resized, Err(VmmError::Spec { field: "disk", .. })), "there is no disk: {resized:?}");

    bounded(vm.pause()).await.unwrap();
    let elsewhere = SnapshotFiles { memory: bench.path("elsewhere"), ..files.clone() };
    let saved = bounded(vm.snapshot(&elsewhere)).await;
    assert!(matches!(saved, Err(VmmError::Unsupported { operation: "snapshot", .. })), "{saved:?}");

    bounded(vm.snapshot(&files)).await.unwrap();
    bounded(vm.snapshot(&files)).await.unwrap();
    bounded(vm.pause()).await.unwrap();
    assert!(wrong_state(bounded(vm.resume()).await), "its memory is the snapshot's now");
    let again = SnapshotFiles { state: bench.path("again"), ..files.clone() };
    assert!(wrong_state(bounded(vm.snapshot(&again)).await));
    bounded(vm.stop()).await.unwrap();

    for (operation, result) in [
        ("pause", bounded(vm.pause()).await),
        ("resume", bounded(vm.resume()).await),
        ("snapshot", bounded(vm.snapshot(&files)).await.map(drop)),
        ("resize_disk", bounded(vm.resize_disk(1 << 30)).await),
    ] {
        let told = matches!(&result, Err(VmmError::Exited { operation: at, .. }) if *at == operation);
        assert!(told, "{operation}: {result:?}");
    }

    let mut other = bench.spec("b");
    other.shape = Shape { memory: MemoryMib::new(256).unwrap(), ..other.shape };
    let restored = bounded(bench.vmm().restore(other, &files)).await.map(|_| ());
    assert!(matches!(restored, Err(VmmError::Spec { field: "memory", .. })), "{restored:?}");
}
