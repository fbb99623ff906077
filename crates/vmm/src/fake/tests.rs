use camino::Utf8PathBuf;
use wrenn_types::{MemoryMib, Shape, Vcpus};

use super::*;
use crate::{DiskRate, DiskSpec, GuestBundle, SnapshotStatistics};

fn spec(directory: &tempfile::TempDir, name: &str) -> MachineSpec {
    let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
    let guest =
        GuestBundle { id: "g".to_owned(), kernel: root.join("kernel"), initramfs: root.join("initramfs") };
    std::fs::write(&guest.kernel, "").unwrap();
    std::fs::write(&guest.initramfs, "").unwrap();
    MachineSpec {
        name: name.to_owned(),
        run_dir: root,
        shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() },
        guest,
        disk: None,
        disk_bases: Vec::new(),
        disk_rate: DiskRate::default(),
        network: None,
        kernel_arguments: Vec::new(),
        keep_open: Vec::new(),
        control_group: None,
        user: None,
    }
}

#[tokio::test]
async fn faults_come_when_they_were_asked_for_and_once() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.fail_next(Step::Boot);
    let failed = fake.boot(spec(&directory, "a"), BootMemory::Anonymous).await.unwrap_err();
    assert!(matches!(failed, VmmError::Refused { command, .. } if command == "boot"));
    assert!(fake.machines().is_empty(), "a boot that failed leaves nothing");

    let mut vm = fake.boot(spec(&directory, "a"), BootMemory::Anonymous).await.unwrap();
    fake.delay(Step::Pause, Duration::from_millis(70));
    let begin = tokio::time::Instant::now();
    vm.pause().await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(70));

    fake.crash_after(Step::Resume);
    vm.resume().await.unwrap();
    let killed = ExitReason::VmmKilled { signal: 9 };
    assert_eq!(*vm.exit().borrow(), Some(killed.clone()));
    assert!(matches!(vm.pause().await, Err(VmmError::Exited { operation: "pause", .. })));
    assert_eq!(vm.stop().await.unwrap(), killed);
}

#[tokio::test]
async fn a_machine_can_be_ended_from_outside() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let vm = fake.boot(spec(&directory, "a"), BootMemory::Anonymous).await.unwrap();
    assert_eq!(fake.machines(), ["a"]);
    assert!(fake.end("a", ExitReason::GuestPanic));
    assert!(!fake.end("a", ExitReason::GuestPanic));
    assert_eq!(*vm.exit().borrow(), Some(ExitReason::GuestPanic));
}

#[tokio::test]
async fn thousands_cost_little() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let mut machines = Vec::new();
    for number in 0..2000 {
        machines
            .push(fake.boot(spec(&directory, &format!("m{number}")), BootMemory::Anonymous).await.unwrap());
    }
    assert_eq!(fake.machines().len(), 2000);
    drop(machines);
    assert!(fake.machines().is_empty());
}

#[tokio::test]
async fn snapshots_hold_what_was_written_and_what_became_zero() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let path = |name: &str| Utf8PathBuf::from_path_buf(directory.path().join(name)).unwrap();
    let base = SnapshotFiles { memory: path("memory"), state: path("state"), pages: None };
    let mut template =
        fake.boot(spec(&directory, "template"), BootMemory::Shared(&base.memory)).await.unwrap();
    assert!(fake.write_page("template", 7, 70) && fake.write_page("template", 8, 80));
    assert!(!fake.write_page("template", 1 << 40, 1) && !fake.write_page("nobody", 7, 1));
    template.pause().await.unwrap();
    assert_eq!(template.snapshot(&base).await.unwrap(), SnapshotStatistics::default());
    drop(template);

    let mut clone = fake.restore(spec(&directory, "clone"), &base).await.unwrap();
    assert_eq!((fake.read_page("clone", 7), fake.read_page("clone", 9)), (Some(70), Some(0)));
    assert!(fake.write_page("clone", 7, 0) && fake.write_page("clone", 9, 90));
    let diff = SnapshotFiles { pages: Some(path("pages")), state: path("diff-state"), ..base.clone() };
    let statistics = clone.snapshot(&diff).await.unwrap();
    assert_eq!((statistics.pages, statistics.zero_pages), (2, 1));
    assert!(fake.write_page("clone", 8, 81));

    let _again = fake.restore(spec(&directory, "again"), &diff).await.unwrap();
    let pages = [7, 8, 9].map(|page| fake.read_page("again", page));
    assert_eq!(pages, [Some(0), Some(80), Some(90)]);

    let all = std::fs::read(path("pages")).unwrap();
    std::fs::write(path("pages"), &all[..all.len() - 1]).unwrap();
    let refused = fake.restore(spec(&directory, "cut"), &diff).await.map(drop);
    assert!(matches!(refused, Err(VmmError::File { operation: "use", .. })), "{refused:?}");
}

#[tokio::test]
async fn a_machine_outlives_the_process_of_its_owner() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let mut lost = fake.boot(spec(&directory, "a"), BootMemory::Anonymous).await.unwrap();
    let known = AdoptedMachine {
        name: "a".to_owned(),
        run_dir: "/run".into(),
        has_disk: false,
        memory: None,
        pid_hint: None,
    };
    let held = fake.adopt(known.clone()).await.map(drop);
    assert!(matches!(held, Err(VmmError::Timeout { operation: "adopt", .. })), "{held:?}");
    fake.lose_owners();
    assert!(matches!(lost.pause().await, Err(VmmError::Connection { .. })));
    let mut adopted = fake.adopt(known.clone()).await.unwrap();
    drop(lost);
    assert_eq!(fake.machines(), ["a"], "who lost it does not end it");
    adopted.pause().await.unwrap();
    adopted.release().await;
    assert_eq!(fake.machines(), ["a"]);
    drop(fake.adopt(known.clone()).await.unwrap());
    assert!(fake.machines().is_empty(), "who adopted it does");
    let gone = fake.adopt(known).await.map(drop);
    assert!(matches!(&gone, Err(VmmError::NotThere { name }) if name == "a"), "{gone:?}");
}

#[tokio::test]
async fn what_a_guest_wrote_to_its_disk_is_read_through_the_layers() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let path = |name: &str| Utf8PathBuf::from_path_buf(directory.path().join(name)).unwrap();
    let overlay = |name: &str, on: &str| {
        let on = if on.is_empty() { String::new() } else { path(on).into_string() };
        let mut header = vec![0; 112];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[15] = 112;
        header[19] = u8::try_from(on.len()).unwrap();
        header[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        header.extend(on.as_bytes());
        // A name that is longer takes its place later.
        header.resize(2048, 0);
        std::fs::write(path(name), header).unwrap();
        DiskSpec { path: path(name), format: crate::DiskFormat::Qcow2 }
    };
    overlay("base", "");
    let first = overlay("first", "base");
    let mut vm = fake
        .boot(MachineSpec { disk: Some(first), ..spec(&directory, "a") }, BootMemory::Anonymous)
        .await
        .unwrap();
    assert_eq!(fake.read_disk("a"), Some(0));
    assert!(fake.write_disk("a", 7));
    vm.pivot_disk(&overlay("second", "first")).await.unwrap();
    assert_eq!(fake.read_disk("a"), Some(7));
    vm.pivot_disk(&overlay("third", "second")).await.unwrap();
    vm.stream_disk(&path("base")).await.unwrap();
    std::fs::remove_file(path("first")).unwrap();
    assert_eq!((fake.read_disk("a"), fake.disk_files("a").len()), (Some(7), 2));
    assert!(fake.write_disk("a", 8));
    assert_eq!(fake.read_disk("a"), Some(8));
    assert_eq!((fake.read_disk("b"), fake.is_running("a"), fake.is_running("b")), (None, Some(true), None));
}

#[tokio::test]
async fn a_step_can_be_stopped_before_it_and_its_answer_lost_after_it() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let mut vm = fake.boot(spec(&directory, "a"), BootMemory::Anonymous).await.unwrap();
    fake.observe(|step| step != Step::Pause);
    vm.resume().await.unwrap();
    let paused = tokio::time::timeout(Duration::from_millis(20), vm.pause()).await;
    assert!(paused.is_err() && fake.is_running("a") == Some(true));
    fake.observe(|_| true);
    fake.lose_answer(Step::Pause);
    assert!(matches!(vm.pause().await, Err(VmmError::Connection { .. })));
    assert_eq!(fake.is_running("a"), Some(false));
    fake.fail_next(Step::Resume);
    fake.calm();
    vm.resume().await.unwrap();
}
