//! What a process is given of the machine, and what is said when there is not enough of it.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod harness;

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use harness::{Agent, run, run_as, shell};

/// A cgroup with little memory, removed at the end.
struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    const LIMIT: &str = "16777216";

    /// In whichever hierarchy this machine has, or why there is none.
    fn make() -> Result<Self, String> {
        let name = format!("wrenn-test-{}", std::process::id());
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"];
        let mut problem = "no memory cgroups".to_owned();
        for root in roots.map(Path::new) {
            let directory = root.join(&name);
            if let Err(error) = fs::create_dir(&directory) {
                problem = format!("cannot make {}: {error}", directory.display());
                continue;
            }
            let cgroup = Self { directory };
            // Written, not made: what looks like a hierarchy may be an ordinary directory.
            let set = |name, value: &str| {
                let file = OpenOptions::new().write(true).open(cgroup.directory.join(name));
                file.is_ok_and(|mut file| file.write_all(value.as_bytes()).is_ok())
            };
            if set("memory.max", Self::LIMIT) || set("memory.limit_in_bytes", Self::LIMIT) {
                set("memory.swap.max", "0");
                return Ok(cgroup);
            }
            problem = format!("no limit of memory in {}", root.display());
        }
        Err(problem)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.directory);
    }
}

#[tokio::test]
#[allow(clippy::print_stdout, reason = "that is how a test says that it cannot run")]
async fn an_end_for_want_of_memory_says_so() {
    let cgroup = match Cgroup::make() {
        Ok(cgroup) => cgroup,
        Err(problem) => return println!("skipped: {problem}"),
    };
    let agent = Agent::start();
    let client = agent.processes();
    let enter = format!("echo $$ > {}/cgroup.procs || exit 1", cgroup.directory.display());
    let hog = "dd if=/dev/zero of=/dev/null bs=256M count=1";
    let itself = run(&client, shell(&format!("{enter}; exec {hog}"))).await;
    let end = itself.end();
    assert_eq!((end.exit_code, end.exited, end.status.as_str()), (-1, false, "signal: killed"));
    let said = end.error.as_deref().unwrap();
    // In a container the kernel's log has other process numbers, or cannot be read.
    if container() {
        assert_eq!(said, "signal: killed (possibly out of memory)");
    } else {
        assert_eq!(said, "signal: killed (out of memory)");
    }
    let child = run(&client, shell(&format!("{enter}; {hog}; exit $?"))).await;
    let end = child.end();
    assert_eq!((end.exit_code, end.exited, end.status.as_str()), (137, true, "exit status 137"));
    assert_eq!(end.error.as_deref(), Some("exit status 137 (possibly out of memory)"));
    // A kill by somebody else, afterwards, is not for want of memory.
    let killed = run(&client, shell("kill -KILL $$")).await;
    assert_eq!(killed.end().error.as_deref(), Some("signal: killed"));
}

/// Whether process numbers here are not the kernel's own, or its log is not for us.
fn container() -> bool {
    const FIRST: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").is_ok_and(|namespace| namespace != Path::new(FIRST))
        || fs::File::open("/dev/kmsg").is_err()
}

#[tokio::test]
async fn a_program_has_the_usual_priorities_whatever_the_agent_has() {
    let script = "cat /proc/self/oom_score_adj; nice; ionice";
    let agent = Agent::start();
    let pid = agent.pid().to_string();
    for words in [["renice", "-n", "5", "-p", &pid].as_slice(), &["ionice", "-c", "3", "-p", &pid]] {
        let changed = Command::new(words[0]).args(&words[1..]).stdout(Stdio::null()).status().unwrap();
        assert!(changed.success());
    }
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap();
        let changed = Command::new("renice").args(["-n", "5", "-p", &task]).stdout(Stdio::null()).status();
        assert!(changed.unwrap().success());
    }
    for user in ["root", "nobody"] {
        let seen = run_as(&agent.processes(), shell(script), harness::as_user(user)).await.unwrap();
        assert_eq!(seen.text(), "100\n0\nbest-effort: prio 4\n", "{user}");
    }
}

#[tokio::test]
async fn a_program_ignores_no_signal_whatever_the_agent_was_started_with() {
    let mut command = Command::new("/bin/sh");
    let script = "trap '' HUP INT QUIT TERM USR1 TSTP; exec \"$0\" agent --listen 127.0.0.1:0";
    command.args(["-c", script, env!("CARGO_BIN_EXE_envd")]);
    let agent = Agent::start_command(command);
    let seen = run(&agent.processes(), shell("grep -E '^Sig(Ign|Blk)' /proc/self/status")).await;
    assert_eq!(seen.text(), "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    let seen = run(&agent.processes(), shell("kill -INT $$")).await;
    assert_eq!(seen.end().status, "signal: interrupt");
}
