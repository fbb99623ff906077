//! What process 1 does with its child, whatever the child does: the same code, around other programs, not as process 1.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

use std::{
    fs,
    io::{BufRead, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
};

/// How often a program may run within a minute: once, and five times again.
const RUNS: usize = 6;

struct Supervisor {
    child: Child,
    /// Closed at the end; whatever still reads from it ends then.
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Supervisor {
    fn start(script: &str, argument: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["supervise", "/bin/sh", "-c", script])
            .arg(argument)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { input: child.stdin.take(), child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Its children that nobody has reaped.
    fn zombies(&self) -> usize {
        let own = self.child.id().to_string();
        let stat = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("stat")).ok();
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(stat)
            .filter(|stat| {
                let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
                fields.next() == Some("Z") && fields.next() == Some(&own)
            })
            .count()
    }
}

#[test]
fn a_child_that_dies_of_anything_is_started_again_but_not_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    for (index, death) in
        ["exit 0", "exit 3", "kill -ABRT $$", "kill -SEGV $$", "kill -KILL $$"].iter().enumerate()
    {
        let file = directory.path().join(index.to_string());
        let mut supervisor = Supervisor::start(&format!("echo run >> \"$0\"; {death}"), &file);
        assert!(supervisor.wait().success(), "{death}: it gives up by itself");
        assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), RUNS, "{death}");
    }
}

#[test]
fn a_program_that_is_not_there_is_tried_and_given_up() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
        .args(["supervise", "/nothing/here"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    let none = Command::new(env!("CARGO_BIN_EXE_envd")).arg("supervise").status().unwrap();
    assert_eq!(none.code(), Some(2));
}

#[test]
fn orphans_are_reaped_while_the_child_lives() {
    let directory = tempfile::tempdir().unwrap();
    // Grandchildren whose parents end first, a hundred of them; each says when it is about to end.
    let script = "for n in $(seq 100); do sh -c 'sh -c \"echo orphan\" & exit 0'; done; echo done; exec cat";
    let mut supervisor = Supervisor::start(script, directory.path());
    let mut orphans = 0;
    let mut done = false;
    while orphans < 100 || !done {
        match supervisor.line().as_str() {
            "orphan" => orphans += 1,
            _ => done = true,
        }
    }
    // They end a moment after they said so; a zombie that stays is waited for in vain.
    while supervisor.zombies() > 0 {
        std::thread::yield_now();
    }
    assert!(supervisor.child.try_wait().unwrap().is_none(), "the child lives, and so does who watches it");
    supervisor.signal("-TERM");
    assert!(supervisor.wait().success());
    drop(supervisor.input.take());
}

#[test]
fn signals_of_others_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut supervisor = Supervisor::start("echo up; exec cat", directory.path());
    assert_eq!(supervisor.line(), "up");
    for _ in 0..50 {
        supervisor.signal("-CHLD");
    }
    assert!(supervisor.child.try_wait().unwrap().is_none());
    supervisor.signal("-PWR");
    assert!(supervisor.wait().success());
}
