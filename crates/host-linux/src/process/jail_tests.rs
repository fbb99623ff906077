//! Jails with real processes: what they show, and what their opens are answered with.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::super::{Child, Exit, Spawn, SpawnError, Step, find_program};
use super::*;

const BOUND: Duration = Duration::from_secs(10);
const USER: u32 = 2_099_999;

#[allow(clippy::print_stderr)]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

/// A jail with a shell that needs nothing else.
fn with_shell(place: &Path) -> Option<(Jail, std::path::PathBuf)> {
    let shell = find_program("busybox");
    match shell {
        Some(shell) if rustix::process::geteuid().is_root() => {
            Some((Jail::new(place, USER).show(&shell), shell))
        }
        _ => {
            skipped("a jail needs root, and this test busybox-static");
            None
        }
    }
}

fn read_all(file: OwnedFd) -> String {
    let mut said = String::new();
    File::from(file).read_to_string(&mut said).unwrap();
    said
}

async fn ended(mut child: Child) -> Exit {
    tokio::time::timeout(BOUND, child.wait()).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_jail_has_what_is_shown_and_no_rights() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("place");
    let (shown, link) = (directory.path().join("shown"), directory.path().join("link"));
    fs::create_dir(&place).unwrap();
    fs::create_dir(&shown).unwrap();
    fs::write(shown.join("file"), "content").unwrap();
    fs::set_permissions(&shown, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("shown/file", &link).unwrap();
    let secret = directory.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let Some((jail, shell)) = with_shell(&place) else { return };
    let script = format!(
        "set -e; b={}; $b cat {}; $b id -u; $b id -G; ! $b touch /x; ! $b touch {}; ! $b rm {}
         $b ls /; for i in {} /etc/passwd /proc /sys /dev/kmsg; do [ ! -e $i ]; done; $b ls -l /dev/zero >&2
         $b head -c 1 /dev/zero >&2; $b pwd; read line",
        shell.display(),
        link.display(),
        shown.join("file").display(),
        link.display(),
        secret.display(),
    );
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (input, holds) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let jail = jail.show(&shown).show(shown.join("file")).show(&link).device("/dev/zero");
    let spawn = Spawn::new(&shell).args(["sh", "-c", &script]).stdin(input).stdout(theirs).jail(jail);
    let mut child = spawn.start().unwrap();
    assert!(child.take_opens().is_none());
    // It waits for a line: until then it can be looked at.
    let status = fs::read_to_string(format!("/proc/{}/status", child.pid())).unwrap();
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let user = USER.to_string();
    let user = user.as_str();
    assert_eq!(line("Uid:"), [user; 4]);
    assert_eq!(line("Gid:"), [user; 4]);
    assert!(line("Groups:").is_empty());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(line(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), ["1"]);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", child.pid())).unwrap();
    assert_eq!(mounts.lines().count(), 3, "the root, the shell and a directory: {mounts}");
    assert!(
        mounts.lines().all(|mount| mount.split(' ').nth(5).unwrap().starts_with("ro,nosuid")),
        "{mounts}"
    );
    File::from(holds).write_all(b"\n").unwrap();
    assert_eq!(ended(child).await, Exit::Code(0));
    let said = tokio::task::spawn_blocking(|| read_all(ours)).await.unwrap();
    let (content, rest) = said.split_at("content".len());
    assert_eq!(content, "content");
    let lines: Vec<&str> = rest.lines().collect();
    assert_eq!(lines[..2], [user; 2]);
    assert!(!lines.contains(&"etc") && lines.contains(&"usr") && lines.last() == Some(&"/"), "{lines:?}");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "nothing of it is on the host");
    assert_eq!(fs::metadata("/dev/zero").unwrap().uid(), 0, "the host's node is as it was");
}

#[tokio::test]
async fn what_is_not_there_or_no_path_cannot_be_shown() {
    let directory = tempfile::tempdir().unwrap();
    let Some((jail, shell)) = with_shell(directory.path()) else { return };
    let missing = directory.path().join("missing");
    let failed = Spawn::new(&shell).jail(jail.show(&missing)).start().unwrap_err();
    assert!(matches!(&failed, SpawnError::Open { path, .. } if *path == missing), "{failed:?}");
    for bad in ["/", "usr", "/usr/../etc"] {
        let (jail, _) = with_shell(directory.path()).unwrap();
        let failed = Spawn::new(&shell).jail(jail.show(bad)).start().unwrap_err();
        assert!(matches!(&failed, SpawnError::Open { .. }), "{bad}: {failed:?}");
    }
    let (jail, _) = with_shell(&missing).unwrap();
    let failed = Spawn::new(&shell).jail(jail).start().unwrap_err();
    assert!(matches!(&failed, SpawnError::Step { step: Step::EnterJail, .. }), "{failed:?}");
}

/// Names the file that this process is to open, when it is the child of the test below.
const OPENED: &str = "WRENN_TEST_OPENED";

#[tokio::test]
async fn what_is_opened_for_writing_is_given_by_somebody_else() {
    if let Some(path) = std::env::var_os(OPENED) {
        // As a program in C calls it, and with its flags.
        let open = |path: &Path, more| open(path, OFlag::O_RDWR | more, Mode::empty());
        let (null, exactly) = (Path::new("/dev/null"), OFlag::empty());
        let opened = open(Path::new(&path), exactly).unwrap();
        let mut opened = File::from(opened);
        let mut content = String::new();
        opened.read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        assert!(opened.write_all(b"x").is_err(), "it was given for reading");
        // The kernel opens what is not answered with a file, and nothing once nobody answers.
        open(null, exactly).unwrap();
        assert_eq!(open(null, exactly).unwrap_err(), Errno::ENOSYS);
        open(null, OFlag::O_CLOEXEC).unwrap();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "content").unwrap();
    if !rustix::process::geteuid().is_root() {
        return skipped("holding the opens of a process needs root");
    }
    let spawn = Spawn::new(std::env::current_exe().unwrap())
        .args(["--exact", "process::jail::tests::what_is_opened_for_writing_is_given_by_somebody_else"])
        .env(OPENED, "/not/there")
        .hold_opens();
    let mut child = spawn.start().unwrap();
    let opens = child.take_opens().unwrap();
    let answered = tokio::task::spawn_blocking(move || {
        let open = opens.next(BOUND).unwrap().unwrap();
        assert_eq!(open.path().unwrap(), Path::new("/not/there"));
        open.give(File::open(&file).unwrap()).unwrap();
        opens.next(BOUND).unwrap().unwrap().go_on().unwrap();
    });
    answered.await.unwrap();
    assert_eq!(ended(child).await, Exit::Code(0));
}

#[tokio::test]
async fn nobody_waits_for_the_opens_of_a_process_that_is_gone() {
    if !rustix::process::geteuid().is_root() {
        return skipped("holding the opens of a process needs root");
    }
    let mut child = Spawn::new("true").hold_opens().start().unwrap();
    let opens = child.take_opens().unwrap();
    assert_eq!(ended(child).await, Exit::Code(0));
    assert!(opens.next(BOUND).unwrap().is_none());
    let mut child = Spawn::new("sleep").arg("60").hold_opens().start().unwrap();
    assert!(child.take_opens().unwrap().next(Duration::from_millis(1)).unwrap().is_none());
    child.kill().unwrap();
    ended(child).await;
}
