use super::*;

#[test]
fn versions() {
    let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c)\n";
    assert_eq!(parse_version(debian).as_deref(), Some("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"));
    assert_eq!(parse_version("curl 8.0\n"), None);
    assert_eq!(parse_version(""), None);
}

fn bundle() -> GuestBundle {
    GuestBundle { id: "0123456789abcdef".to_owned(), kernel: "/k".into(), initramfs: "/i".into() }
}

#[test]
fn an_outcome_holds_for_what_it_was_found_with() {
    let directory = tempfile::tempdir().unwrap();
    let file = Utf8Path::from_path(directory.path()).unwrap().join("deep/probe.json");
    let key = Key::new("/usr/bin/qemu".into(), "7.2", &bundle());
    let decision = Decision { accelerator: Accelerator::Tcg, reason: "because".to_owned() };
    assert_eq!(recall(&file, &key), None);
    remember(&file, key.clone(), &decision).unwrap();
    assert_eq!(recall(&file, &key), Some(decision));
    assert_eq!(recall(&file, &Key { version: "7.3".to_owned(), ..key.clone() }), None);
    assert_eq!(recall(&file, &Key { boot_id: "another".to_owned(), ..key.clone() }), None);
    std::fs::write(&file, "{").unwrap();
    assert_eq!(recall(&file, &key), None);
}

#[tokio::test]
async fn what_is_no_qemu_is_refused_with_a_remedy() {
    for (program, problem) in
        [("/nowhere/qemu", "no such program"), ("/bin/true", "does not say"), ("/bin/false", "ended")]
    {
        let options = QemuOptions { program: Some(program.into()), ..QemuOptions::default() };
        let error = Qemu::detect(options).await.unwrap_err();
        assert!(matches!(error, VmmError::Unavailable { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(problem) && text.contains("WRENN_QEMU"), "{text}");
    }
}

#[tokio::test]
async fn an_accelerator_that_was_asked_for_is_not_probed() {
    let tcg =
        QemuOptions { accelerator: AcceleratorChoice::Always(Accelerator::Tcg), ..QemuOptions::default() };
    let decision = decide("/nowhere".into(), "7.2", &tcg).await.unwrap();
    assert_eq!(decision.accelerator, Accelerator::Tcg);
    let decision = decide("/nowhere".into(), "7.2", &QemuOptions::default()).await.unwrap();
    assert_eq!(decision.accelerator, Accelerator::Tcg, "without a guest nothing is proven");
}

#[tokio::test]
async fn a_probe_that_ends_or_says_nothing_is_no_proof() {
    // Programs that stand in for a QEMU whose machine dies, and for one whose machine hangs.
    let directory = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        let path = Utf8Path::from_path(directory.path()).unwrap().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path
    };
    let dies = script("dies", "echo 'ioctl(KVM_CREATE_VM) failed' >&2; exit 1");
    let decision = probe(&dies, &bundle(), Duration::from_secs(10)).await.unwrap();
    assert_eq!(decision.accelerator, Accelerator::Tcg);
    assert!(decision.reason.ends_with("ioctl(KVM_CREATE_VM) failed"), "{}", decision.reason);
    let hangs = script("hangs", "while :; do read line || :; done");
    let decision = probe(&hangs, &bundle(), Duration::from_millis(100)).await.unwrap();
    assert_eq!(decision.accelerator, Accelerator::Tcg);
    assert!(decision.reason.contains("not up within 100ms"), "{}", decision.reason);
}
