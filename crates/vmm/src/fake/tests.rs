use camino::Utf8PathBuf;
use wrenn_types::{MemoryMib, Shape, Vcpus};

use super::*;
use crate::GuestBundle;

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
        network: None,
        kernel_arguments: Vec::new(),
        keep_open: Vec::new(),
    }
}

#[tokio::test]
async fn faults_come_when_they_were_asked_for_and_once() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.fail_next(Step::Boot);
    let failed = fake.boot(spec(&directory, "a"), None).await.unwrap_err();
    assert!(matches!(failed, VmmError::Refused { command, .. } if command == "boot"));
    assert!(fake.machines().is_empty(), "a boot that failed leaves nothing");

    let mut vm = fake.boot(spec(&directory, "a"), None).await.unwrap();
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
    let vm = fake.boot(spec(&directory, "a"), None).await.unwrap();
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
        machines.push(fake.boot(spec(&directory, &format!("m{number}")), None).await.unwrap());
    }
    assert_eq!(fake.machines().len(), 2000);
    drop(machines);
    assert!(fake.machines().is_empty());
}
