use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    time::Instant,
};

use super::*;

const BOUND: Duration = Duration::from_secs(10);

/// What a shell script says on standard output, started as `make` says.
async fn output(script: &str, make: impl FnOnce(Spawn) -> Spawn) -> String {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let spawn = Spawn::new("/bin/sh").args(["-c", script]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut child = make(spawn.stdout(write)).start().unwrap();
    let said = tokio::task::spawn_blocking(move || {
        let mut said = String::new();
        File::from(read).read_to_string(&mut said).unwrap();
        said
    });
    let said = tokio::time::timeout(BOUND, said).await.unwrap().unwrap();
    assert_eq!(tokio::time::timeout(BOUND, child.wait()).await.unwrap().unwrap(), Exit::Code(0), "{script}");
    said
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[allow(clippy::print_stderr)]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

#[tokio::test]
async fn a_child_ends_with_its_code_or_its_signal() {
    let mut child = Spawn::new("sh").args(["-c", "exit 7"]).start().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(7));
    assert_eq!(child.wait().await.unwrap(), Exit::Code(7), "a second wait gives the same");
    assert_eq!(child.try_wait().unwrap(), Some(Exit::Code(7)));
    child.kill().unwrap();

    let mut child = Spawn::new("sleep").arg("60").start().unwrap();
    assert_eq!(child.try_wait().unwrap(), None);
    assert!(child.process().is_alive().unwrap());
    child.kill().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    assert!(!child.process().is_alive().unwrap());
}

#[tokio::test]
async fn the_child_gets_what_it_is_given_and_nothing_else() {
    let leaked = File::open("/etc/passwd").unwrap();
    // As if somebody had forgotten the flag: it must not reach the child all the same.
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let mut kept = tempfile::tempfile().unwrap();
    kept.write_all(b"kept").unwrap();
    let number = kept.as_raw_fd();
    let script = format!(
        "env; pwd; cat /proc/self/oom_score_adj; for f in /proc/$$/fd/*; do echo \"${{f##*/}}\"; done; \
         tr '\\0' '\\n' < /proc/$$/fd/{number}; echo; cat /proc/self/status /proc/self/limits"
    );
    let said = output(&script, |spawn| {
        spawn
            .env("A", "1")
            .env("A", "2")
            .current_dir("/usr")
            .oom_score_adj(500)
            .no_core_dump()
            .keep_open(kept)
    })
    .await;
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.contains(&"A=2") && !lines.contains(&"A=1"), "{said}");
    assert!(!said.contains("CARGO"), "the environment is not inherited: {said}");
    assert!(lines.contains(&"/usr") && lines.contains(&"500"), "{said}");
    let core = lines.iter().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
    let descriptors: Vec<&str> = lines.iter().copied().filter(|l| l.parse::<u32>().is_ok()).collect();
    let own = number.to_string();
    assert!(descriptors.contains(&own.as_str()), "{said}");
    assert!(!descriptors.contains(&leaked.as_raw_fd().to_string().as_str()), "{said}");
    for set in ["SigBlk:", "SigIgn:", "SigCgt:"] {
        let signals = lines.iter().find_map(|line| line.strip_prefix(set)).unwrap().trim();
        // 32 and 33 are the C library's own; what it does with them is its affair.
        let signals = u64::from_str_radix(signals, 16).unwrap() & !(0b11 << 31);
        assert_eq!(signals, 0, "{set}");
    }
}

#[tokio::test]
async fn a_new_session_has_its_own_leader() {
    let said = output("cut -d' ' -f1,6 /proc/$$/stat", Spawn::new_session).await;
    let (pid, session) = said.trim().split_once(' ').unwrap();
    assert_eq!(pid, session);
}

#[tokio::test]
async fn user_and_private_mounts() {
    if !is_root() {
        return skipped("needs root");
    }
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    for path in [&from, &to] {
        std::fs::create_dir(path).unwrap();
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(from.join("file"), "here").unwrap();
    let script = format!("id -u; id -g; id -G; cat {}/file", to.display());
    let said = output(&script, |spawn| spawn.user(65534, 65533).private_bind_mount(&from, &to)).await;
    assert_eq!(said, "65534\n65533\n65533\nhere");
    assert!(!to.join("file").exists(), "nobody else sees the mount");
    let dumpable = rustix::process::dumpable_behavior().unwrap();
    assert_eq!(dumpable, rustix::process::DumpableBehavior::Dumpable, "the parent stays as it was");
}

#[tokio::test]
async fn a_network_namespace_is_entered() {
    if !is_root() {
        return skipped("needs root");
    }
    // A namespace that only a process of ours holds: its interfaces are lo alone.
    let mut holder = match Spawn::new("unshare").args(["-n", "sleep", "60"]).start() {
        Ok(holder) => holder,
        Err(error) => return skipped(&format!("no unshare: {error}")),
    };
    let path = PathBuf::from(format!("/proc/{}/ns/net", holder.pid()));
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let made = async {
        loop {
            if std::fs::read_link(&path).unwrap() != own {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(BOUND, made).await.unwrap();
    let theirs = std::fs::read_link(&path).unwrap();
    let said = output("readlink /proc/self/ns/net", |spawn| spawn.network_namespace(&path)).await;
    assert_eq!(PathBuf::from(said.trim()), theirs);
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), own, "we stay where we were");
    holder.kill().unwrap();
    holder.wait().await.unwrap();
}

#[tokio::test]
async fn failures_name_their_step() {
    let step = |spawn: Spawn| match spawn.start().unwrap_err() {
        SpawnError::Step { step, source, .. } => (step, source.raw_os_error().unwrap()),
        other => panic!("{other:?}"),
    };
    let missing = rustix::io::Errno::NOENT.raw_os_error();
    assert_eq!(step(Spawn::new("/nowhere/at/all")), (Step::Execute, missing));
    assert_eq!(step(Spawn::new("/bin/true").current_dir("/nowhere")), (Step::ChangeDirectory, missing));
    if is_root() {
        let (found, _) = step(Spawn::new("/bin/true").private_bind_mount("/nowhere", "/tmp"));
        assert_eq!(found, Step::BindMount);
        let found = step(Spawn::new("/bin/true").user(1, 1).current_dir("/nowhere"));
        assert_eq!(found, (Step::ChangeDirectory, missing), "the report crosses a copied memory too");
    }
    let not_a_namespace = step(Spawn::new("/bin/true").network_namespace("/dev/null"));
    assert_eq!(not_a_namespace.0, Step::EnterNetworkNamespace);
    assert!(matches!(Spawn::new("no-such-program").start(), Err(SpawnError::NoProgram(_))));
    assert!(matches!(Spawn::new("/bin/true").arg("a\0b").start(), Err(SpawnError::Nul(_))));
    let namespace = Spawn::new("/bin/true").network_namespace("/run/netns/no-such-one").start();
    assert!(matches!(namespace, Err(SpawnError::Open { .. })));
}

#[tokio::test]
async fn terminate_asks_first_and_then_kills() {
    let mut child = Spawn::new("sleep").arg("60").start().unwrap();
    assert_eq!(child.terminate(BOUND).await.unwrap(), Exit::Signal(15));

    // It says when it has set its trap, so that the signal cannot come before.
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let script = "trap '' TERM; echo ready; while :; do sleep 60; done";
    let mut child = Spawn::new("sh").args(["-c", script]).stdout(write).new_session().start().unwrap();
    let mut byte = [0; 1];
    File::from(read).read_exact(&mut byte).unwrap();
    let exit = child.terminate(Duration::from_millis(50)).await.unwrap();
    assert_eq!(exit, Exit::Signal(9));
}

#[tokio::test]
async fn strays_are_found_by_their_mark_and_killed() {
    let mark = format!("mark-{}-", std::process::id());
    assert!(find_by_argument(&mark).unwrap().is_empty());
    // The inner one is a child's child: not ours to reap, but ours to kill. It ends with the pipe.
    let script = format!("exec 3<&0; sh -c 'read line; :' {mark}inner <&3 & wait");
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut child = Spawn::new("sh").args(["-c", &script]).stdin(read).start().unwrap();
    let found = async {
        loop {
            match find_by_argument(&mark).unwrap() {
                found if found.is_empty() => tokio::task::yield_now().await,
                found => return found,
            }
        }
    };
    let found = tokio::time::timeout(BOUND, found).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].argument, format!("{mark}inner"));
    assert_ne!(found[0].process.pid(), child.pid());
    let pid = found[0].process.pid();
    assert_eq!(argument_of(pid, &mark).unwrap().unwrap().argument, found[0].argument);
    assert!(argument_of(child.pid(), &mark).unwrap().is_none());
    found[0].process.kill_and_wait().await.unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    assert!(find_by_argument(&mark).unwrap().is_empty());
    assert!(argument_of(pid, &mark).unwrap().is_none(), "nobody has the number now, or somebody else");
    drop(write);
}

#[tokio::test]
async fn a_child_dies_with_its_parent_but_not_with_the_thread_that_asked() {
    let (tied, untied) = std::thread::spawn(|| {
        let sleep = || Spawn::new("sleep").arg("60");
        (sleep().die_with_parent().start().unwrap(), sleep().start().unwrap())
    })
    .join()
    .unwrap();
    for mut child in [tied, untied] {
        let ended = tokio::time::timeout(Duration::from_millis(50), child.wait()).await;
        assert!(ended.is_err(), "{ended:?}");
        child.kill().unwrap();
        child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn a_large_parent_does_not_slow_a_start() {
    // Not a timed test: it only says what the module's documentation claims, for whoever runs it.
    let ballast = vec![1_u8; 256 << 20];
    let mut ours = Duration::MAX;
    let mut copied = Duration::MAX;
    for _ in 0..5 {
        let begin = Instant::now();
        let mut child = Spawn::new("/bin/true").start().unwrap();
        ours = ours.min(begin.elapsed());
        child.wait().await.unwrap();
        let begin = Instant::now();
        let user = rustix::process::getuid().as_raw();
        if let Ok(mut child) = Spawn::new("/bin/true").user(user, user).start() {
            copied = copied.min(begin.elapsed());
            child.wait().await.unwrap();
        }
    }
    assert_eq!(ballast[ballast.len() - 1], 1);
    skipped(&format!("no assertion: borrowed memory {ours:?}, copied memory {copied:?}"));
}
