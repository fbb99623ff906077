//! Machines that outlive their owner.

use std::{fs::File, time::Duration};

use super::{BOOT_BOUND, BOUND, Bench, bounded, counted, counts, ended};
use crate::{AdoptedMachine, BootMemory, DiskFormat, DiskSpec, ExitReason, SnapshotFiles, VmmError};

/// What is in the directory of a machine that ended without an owner is nobody's but the directory's owner's.
fn forget(bench: &Bench<'_>, name: &str) {
    std::fs::remove_dir_all(bench.path(name)).unwrap();
}

pub(super) async fn a_released_machine_goes_on_and_is_adopted(bench: &Bench<'_>) {
    let known = bench.adopted("a");
    let nobody = bounded(bench.vmm().adopt(known.clone())).await.map(drop);
    assert!(matches!(&nobody, Err(VmmError::NotThere { name }) if *name == known.name), "{nobody:?}");
    let nameless = AdoptedMachine { name: String::new(), ..known.clone() };
    let nameless = bounded(bench.vmm().adopt(nameless)).await.map(drop);
    assert!(matches!(nameless, Err(VmmError::Spec { field: "name", .. })), "{nameless:?}");

    let mut vm = bench.boot("a").await;
    let exit = vm.exit();
    let before = counts(vm.as_mut(), 3, BOOT_BOUND).await;
    let pid = vm.pid();
    bounded(vm.release()).await;
    // A hint that is wrong is only a hint.
    let known = AdoptedMachine { pid_hint: Some(1), ..known };
    let mut vm = bounded(bench.vmm().adopt(known.clone())).await.unwrap();
    assert_eq!(vm.pid(), pid);
    let after = counts(vm.as_mut(), before.ticks.len() + 3, BOUND).await;
    assert_eq!(after.token, before.token);
    assert!(after.ticks.starts_with(&before.ticks), "its console goes on where the other owner was");

    // It stays paused when it was.
    bounded(vm.pause()).await.unwrap();
    let paused = counted(&vm.console().await).unwrap();
    bounded(vm.release()).await;
    let known = AdoptedMachine { pid_hint: pid, ..known };
    let mut vm = bounded(bench.vmm().adopt(known.clone())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(counted(&vm.console().await).unwrap(), paused);
    bounded(vm.pause()).await.unwrap();
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), paused.ticks.len() + 3, BOUND).await;
    assert_eq!(*exit.borrow(), None);
    assert_eq!(bounded(vm.stop()).await.unwrap(), ExitReason::Stopped);
    assert!(!bench.runs("a"));
    let gone = bounded(bench.vmm().adopt(known)).await.map(drop);
    assert!(matches!(gone, Err(VmmError::NotThere { .. })), "{gone:?}");
}

pub(super) async fn an_adopted_machine_is_saved_and_has_its_disk(bench: &Bench<'_>) {
    let disk = DiskSpec { path: bench.path("disk"), format: DiskFormat::Raw };
    File::create_new(&disk.path).unwrap().set_len(16 << 20).unwrap();
    let with_disk = |name| {
        let mut spec = bench.spec(name);
        spec.disk = Some(disk.clone());
        spec
    };
    let base = bench.snapshot_files();
    let mut template =
        bounded(bench.vmm().boot(with_disk("template"), BootMemory::Shared(&base.memory))).await.unwrap();
    counts(template.as_mut(), 3, BOOT_BOUND).await;
    bounded(template.pause()).await.unwrap();
    bounded(template.snapshot(&base)).await.unwrap();
    bounded(template.release()).await;
    let saved = bounded(bench.vmm().adopt(bench.adopted("template"))).await.map(drop);
    assert!(matches!(saved, Err(VmmError::WrongState { operation: "adopt", .. })), "{saved:?}");
    // It was left as it is, and still holds its disk.
    bench.subject.kill_by_name(&bench.full_name("template")).await;
    forget(bench, "template");

    let mut vm = bounded(bench.vmm().restore(with_disk("a"), &base)).await.unwrap();
    bounded(vm.resume()).await.unwrap();
    counts(vm.as_mut(), 3, BOUND).await;
    bounded(vm.release()).await;
    let memory = Some(base.memory.clone());
    let known = AdoptedMachine { has_disk: true, memory, ..bench.adopted("a") };
    let mut vm = bounded(bench.vmm().adopt(known)).await.unwrap();
    assert_eq!(bounded(vm.disk_chain()).await.unwrap(), std::slice::from_ref(&disk.path));
    bounded(vm.resize_disk(32 << 20)).await.unwrap();
    bounded(vm.pause()).await.unwrap();
    let was = counted(&vm.console().await).unwrap();
    let files = SnapshotFiles { memory: base.memory.clone(), ..bench.diff_files("a") };
    assert!(bounded(vm.snapshot(&files)).await.unwrap().zero_pages > 0);
    bounded(vm.stop()).await.unwrap();

    let mut vm = bounded(bench.vmm().restore(with_disk("b"), &files)).await.unwrap();
    bounded(vm.resume()).await.unwrap();
    let goes_on = counts(vm.as_mut(), 3, BOUND).await;
    assert!((was.last() + 1..=was.last() + 2).contains(&goes_on.ticks[0]), "{was:?} {goes_on:?}");
    bounded(vm.stop()).await.unwrap();
}

pub(super) async fn the_end_of_an_adopted_machine_is_noticed(bench: &Bench<'_>) {
    let vm = bench.boot("a").await;
    bounded(vm.release()).await;
    let vm = bounded(bench.vmm().adopt(bench.adopted("a"))).await.unwrap();
    bench.subject.kill(vm.as_ref(), &bench.full_name("a")).await;
    let reason = ended(vm.as_ref(), BOUND).await;
    assert!(matches!(reason, ExitReason::VmmFailed { code: -1, .. }), "it is no child: {reason:?}");
    drop(vm);

    // Killed while nobody had it.
    bounded(bench.boot("b").await.release()).await;
    bench.subject.kill_by_name(&bench.full_name("b")).await;
    forget(bench, "b");
    let gone = bounded(bench.vmm().adopt(bench.adopted("b"))).await.map(drop);
    assert!(matches!(gone, Err(VmmError::NotThere { .. })), "{gone:?}");

    // Ended by its guest, whether somebody has it by then or not.
    for (name, does, reason) in
        [("c", "poweroff", ExitReason::GuestShutdown), ("d", "panic", ExitReason::GuestPanic)]
    {
        let mut spec = bench.spec(name);
        spec.kernel_arguments.push(format!("conformance={does}"));
        let vm = bounded(bench.vmm().boot(spec, BootMemory::Anonymous)).await.unwrap();
        bounded(vm.release()).await;
        let vm = bounded(bench.vmm().adopt(bench.adopted(name))).await.unwrap();
        assert_eq!(ended(vm.as_ref(), BOOT_BOUND).await, reason);
    }

    // Dropped by who adopted it.
    bounded(bench.boot("e").await.release()).await;
    let vm = bounded(bench.vmm().adopt(bench.adopted("e"))).await.unwrap();
    let mut exit = vm.exit();
    drop(vm);
    let reason = bounded(exit.wait_for(Option::is_some)).await.unwrap().clone();
    assert_eq!(reason, Some(ExitReason::Stopped));
}
