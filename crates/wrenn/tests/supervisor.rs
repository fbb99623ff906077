//! `wrenn dev`, `up` and `down` as processes, with a real PostgreSQL and a scripted agent and control plane.
//!
//! They need root and PostgreSQL's programs, as a stack does.
//! The directories are below one that only root may enter, as a clone under `/root` is.
#![allow(clippy::unwrap_used, reason = "the helpers of a test fail as the test does")]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

/// No single wait of these tests is longer, on a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(90);

/// Plays agent and control plane: says that it is ready, then waits for SIGTERM.
/// FAIL names a role that ends at once, DEAF one that ignores SIGTERM.
const CHILD: &str = r#"#!/bin/sh
role=$1
while [ $# -gt 0 ]; do
    case $1 in --first-key-file) key=$2 ;; --socket) socket=$2 ;; --listen) listen=$2 ;; esac
    shift
done
echo "$role: $DATABASE_URL $listen" >&2
[ "$FAIL" = "$role" ] && { echo "the $role has a reason" >&2; exit 3; }
if [ "$DEAF" = "$role" ]; then trap '' TERM; else trap 'echo stopped >&2; exit 0' TERM; fi
case $role in
control-plane)
    [ -f "$key" ] || echo wrn_00112233445566778899aabbccddeeff > "$key"
    case $listen in *:0) listen=127.0.0.1:4444 ;; esac
    echo "{\"ready\":true,\"address\":\"$listen\"}" ;;
agent) echo "{\"ready\":true,\"socket\":\"$socket\"}" ;;
esac
while [ -e "$0" ]; do sleep 1 & wait $!; done
"#;

/// The directory of one stack. A test that fails leaves nothing behind either: its supervisor is killed, the
/// database ends with it, and the script ends when it is not there any more.
struct Place {
    guard: tempfile::TempDir,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(instance) = fs::read_to_string(self.dir().join("instance")) {
            let _ = fs::remove_dir_all(Path::new("/run/wrenn").join(instance.trim()));
        }
    }
}

impl Place {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "a stack needs root, and so do its tests");
        let guard = tempfile::tempdir().unwrap();
        let child = guard.path().join("child");
        fs::write(&child, CHILD).unwrap();
        fs::set_permissions(&child, fs::Permissions::from_mode(0o755)).unwrap();
        Self { guard }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.guard.path().join(name)
    }

    fn dir(&self) -> PathBuf {
        self.path(".wrenn")
    }

    fn wrenn(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command.args(words).arg("--dir").arg(self.dir());
        if words[0] != "down" {
            command.args(["--listen", "127.0.0.1:0", "--executable"]).arg(self.path("child"));
        }
        command.env_remove("DATABASE_URL").env_remove("WRENN_DIR").env("HOME", self.guard.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    async fn dev(&self) -> Dev {
        Dev::start(self.wrenn(&["dev"])).await
    }

    fn children(&self) -> Vec<(String, i32)> {
        let text = fs::read(self.dir().join("children.json")).unwrap();
        let children: serde_json::Map<String, Value> = serde_json::from_slice(&text).unwrap();
        let pid = |value: &Value| i32::try_from(value["pid"].as_i64().unwrap()).unwrap();
        children.iter().map(|(role, value)| (role.clone(), pid(value))).collect()
    }

    fn child(&self, role: &str) -> i32 {
        self.children().into_iter().find(|(found, _)| found == role).unwrap().1
    }

    fn instance(&self) -> String {
        fs::read_to_string(self.dir().join("instance")).unwrap().trim().to_owned()
    }

    fn run_directory(&self) -> PathBuf {
        Path::new("/run/wrenn").join(self.instance())
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir().join("logs").join(name)).unwrap()
    }

    /// One statement in the private database.
    async fn sql(&self, statement: &str) -> Result<String, String> {
        let socket = self.run_directory().join("pg");
        let mut psql = Command::new("psql");
        psql.args(["-XAt", "-U", "wrenn", "-d", "postgres", "-c", statement, "-h"]).arg(socket);
        let output = timeout(BOUND, psql.output()).await.unwrap().unwrap();
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

struct Dev {
    process: Child,
    ready: Value,
}

impl Dev {
    async fn start(mut command: Command) -> Self {
        // What it says goes where the test's own words go.
        let mut process = command.stderr(Stdio::inherit()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.as_mut().unwrap()).lines();
        let line = timeout(BOUND, lines.next_line()).await.unwrap().unwrap().expect("a ready line");
        Self { process, ready: serde_json::from_str(&line).unwrap() }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.process.id().unwrap()).unwrap()
    }

    async fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    async fn ended(&mut self) -> ExitStatus {
        timeout(BOUND, self.process.wait()).await.unwrap().unwrap()
    }

    async fn stop(mut self) {
        self.signal(Signal::INT).await;
        assert!(self.ended().await.success());
    }
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn is_gone(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // A zombie that nobody has reaped yet is gone as well.
        Ok(stat) => stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(BOUND, waiting).await.is_ok(), "never happened: {what}");
}

#[tokio::test]
async fn a_stack_comes_up_and_stops_in_order() {
    let place = Place::new();
    let dev = place.dev().await;
    assert_eq!(dev.ready["ready"], true);
    assert_eq!(dev.ready["base_url"], "http://127.0.0.1:4444");
    assert_eq!(dev.ready["api_key"], "wrn_00112233445566778899aabbccddeeff");
    let env = place.dir().join("env");
    assert_eq!(
        fs::read_to_string(&env).unwrap(),
        "export WRENN_BASE_URL=http://127.0.0.1:4444\nexport WRENN_PROXY_DOMAIN=localhost:4444\n\
         export WRENN_API_KEY=wrn_00112233445566778899aabbccddeeff\n"
    );
    assert_eq!(fs::metadata(&env).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(place.sql("select current_user").await.unwrap(), "wrenn");
    assert_eq!(place.sql("show listen_addresses").await.unwrap(), "");
    assert!(place.log("control-plane.log").contains("/pg 127.0.0.1:0"));

    let children = place.children();
    assert_eq!(children.len(), 3);
    let run = place.run_directory();
    dev.stop().await;
    for (role, pid) in children {
        assert!(is_gone(pid), "{role}");
    }
    assert!(place.log("agent.log").contains("stopped"));
    assert!(!run.exists());

    // What was in the database is there again.
    let dev = place.dev().await;
    place.sql("create table kept (n int)").await.unwrap();
    dev.stop().await;
    let dev = place.dev().await;
    assert_eq!(place.sql("select count(*) from kept").await.unwrap(), "0");
    dev.stop().await;
}

#[tokio::test]
async fn only_root_gets_into_the_database() {
    let place = Place::new();
    let dev = place.dev().await;
    // Even past the permissions of the socket.
    let socket = place.run_directory().join("pg");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(socket.join(".s.PGSQL.5432"), fs::Permissions::from_mode(0o777)).unwrap();
    let mut psql = Command::new("psql");
    psql.args(["-XAt", "-U", "wrenn", "-d", "postgres", "-c", "select 1", "-h"]).arg(&socket);
    let output = psql.uid(65_534).gid(65_534).current_dir("/").output().await.unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Peer authentication failed"), "{said}");
    dev.stop().await;
}

#[tokio::test]
async fn a_second_stack_of_the_same_directory_is_refused() {
    let place = Place::new();
    let dev = place.dev().await;
    let output = timeout(BOUND, place.wrenn(&["dev"]).output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("already runs") && said.contains(&dev.pid().to_string()), "{said}");
    dev.stop().await;
}

#[tokio::test]
async fn two_stacks_run_side_by_side() {
    let (one, two) = (Place::new(), Place::new());
    let (first, second) = (one.dev().await, two.dev().await);
    assert_ne!(one.instance(), two.instance());
    one.sql("create table mine (n int)").await.unwrap();
    two.sql("create table mine (n int)").await.unwrap();

    // One is killed and started again: the other does not notice.
    let others = two.children();
    first.signal(Signal::KILL).await;
    let first = one.dev().await;
    assert_eq!(two.children(), others);
    assert!(others.iter().all(|(_, pid)| !is_gone(*pid)));
    first.stop().await;
    assert!(others.iter().all(|(_, pid)| !is_gone(*pid)));
    assert_eq!(two.sql("select count(*) from mine").await.unwrap(), "0");
    assert!(two.run_directory().exists());
    second.stop().await;
}

#[tokio::test]
async fn what_a_killed_supervisor_leaves_is_collected() {
    let place = Place::new();
    let mut dev = place.dev().await;
    let children = place.children();
    let postgres = place.child("postgres");
    dev.signal(Signal::KILL).await;
    dev.ended().await;
    // The kernel told it, and it ended in order.
    until("the database ends", async || is_gone(postgres)).await;
    assert!(place.log("postgres.log").contains("database system is shut down"));
    // The script of this test asked for no such signal. The next supervisor asks it to stop, and waits.
    assert!(children.iter().any(|(role, pid)| role == "agent" && !is_gone(*pid)));
    let down = timeout(BOUND, place.wrenn(&["down"]).output()).await.unwrap().unwrap();
    assert!(String::from_utf8(down.stderr).unwrap().contains("the next start collects"));
    assert!(!place.log("agent.log").contains("stopped"));
    let instance = place.instance();
    let dev = place.dev().await;
    assert!(children.iter().all(|(_, pid)| is_gone(*pid)));
    assert!(place.log("agent.log").contains("stopped"));
    assert_eq!(place.instance(), instance);
    dev.stop().await;
}

#[tokio::test]
async fn after_a_kill_of_everything_the_next_start_works() {
    let place = Place::new();
    let mut dev = place.dev().await;
    place.sql("create table kept (n int)").await.unwrap();
    place.sql("insert into kept values (1)").await.unwrap();
    // A session of the database is left behind as well.
    let socket = place.run_directory().join("pg");
    let mut session = Command::new("psql");
    session.args(["-XAt", "-U", "wrenn", "-d", "postgres", "-c", "select pg_sleep(600)", "-h"]).arg(socket);
    let mut session = session.stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    until("the session runs", async || {
        let count = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'";
        place.sql(count).await.is_ok_and(|count| count == "1")
    })
    .await;

    let children = place.children();
    dev.signal(Signal::STOP).await;
    for (_, pid) in &children {
        kill(*pid, Signal::KILL);
    }
    dev.signal(Signal::KILL).await;
    dev.ended().await;
    let dev = place.dev().await;
    assert_eq!(place.sql("select count(*) from kept").await.unwrap(), "1");
    assert_eq!(dev.ready["api_key"], "wrn_00112233445566778899aabbccddeeff");
    dev.stop().await;
    session.kill().await.unwrap();
}

#[tokio::test]
async fn a_pid_file_that_names_a_stranger_is_no_obstacle() {
    let place = Place::new();
    place.dev().await.stop().await;
    // As after a crash of the machine: the id in the file has gone to another process of the same user.
    let user = fs::metadata(place.dir().join("pg")).unwrap();
    let (uid, gid) = (std::os::unix::fs::MetadataExt::uid(&user), std::os::unix::fs::MetadataExt::gid(&user));
    let mut stranger = Command::new("sleep");
    let stranger = stranger.arg("600").uid(uid).gid(gid).current_dir("/").kill_on_drop(true).spawn().unwrap();
    let pid = stranger.id().unwrap();
    let pid_file = place.dir().join("pg/postmaster.pid");
    fs::write(&pid_file, format!("{pid}\n/nowhere\n1\n5432\n/nowhere\n\n 1 1\nready\n")).unwrap();
    std::os::unix::fs::chown(&pid_file, Some(uid), Some(gid)).unwrap();

    place.dev().await.stop().await;
    assert!(!is_gone(i32::try_from(pid).unwrap()));
}

#[tokio::test]
async fn what_ends_by_itself_is_started_again() {
    let place = Place::new();
    let dev = place.dev().await;
    for role in ["control-plane", "agent", "postgres"] {
        let before = place.child(role);
        kill(before, Signal::KILL);
        until("it runs again", async || {
            place.children().iter().any(|(found, pid)| found == role && *pid != before)
        })
        .await;
    }
    until("the database answers", async || place.sql("select 1").await.is_ok()).await;
    // The control plane got the same address again.
    until("it was told its address", async || place.log("control-plane.log").contains("/pg 127.0.0.1:4444"))
        .await;
    assert_eq!(place.children().len(), 3);
    dev.stop().await;
}

#[tokio::test]
async fn what_ends_again_and_again_ends_the_stack() {
    let place = Place::new();
    let mut dev = place.dev().await;
    // From now on it cannot start.
    fs::write(place.path("child"), "#!/bin/sh\necho spoiled >&2\nexit 7\n").unwrap();
    let others: Vec<_> = place.children().into_iter().filter(|(role, _)| role != "control-plane").collect();
    kill(place.child("control-plane"), Signal::KILL);
    assert_eq!(dev.ended().await.code(), Some(1));
    assert!(others.iter().all(|(_, pid)| is_gone(*pid)));
    assert!(place.log("control-plane.log").contains("spoiled"));
}

#[tokio::test]
async fn a_child_that_cannot_start_is_told_with_its_reason() {
    for role in ["agent", "control-plane"] {
        let place = Place::new();
        let output = timeout(BOUND, place.wrenn(&["dev"]).env("FAIL", role).output()).await.unwrap().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.contains(&format!("the {role} has a reason")) && said.contains("exit status: 3"),
            "{said}"
        );
        assert!(output.stdout.is_empty());
        assert!(!place.run_directory().exists());
    }
}

#[tokio::test]
async fn a_second_signal_does_not_wait() {
    let place = Place::new();
    let mut command = place.wrenn(&["dev"]);
    command.env("DEAF", "agent");
    let mut dev = Dev::start(command).await;
    let agent = place.child("agent");
    dev.signal(Signal::INT).await;
    until("the control plane is stopped", async || place.children().len() == 2).await;
    assert!(!is_gone(agent));
    dev.signal(Signal::INT).await;
    assert!(dev.ended().await.success());
    assert!(is_gone(agent));
}

#[tokio::test]
async fn up_and_down_may_be_said_twice() {
    let place = Place::new();
    let say = async |words: &[&str]| {
        let output = timeout(BOUND, place.wrenn(words).output()).await.unwrap().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (String::from_utf8(output.stdout).unwrap(), said)
    };
    let (nothing, said) = say(&["down"]).await;
    assert!(nothing.is_empty() && said.contains("nothing runs"), "{said}");

    // Two at once start one stack.
    let ((first, said), (second, _)) = tokio::join!(say(&["up"]), say(&["up"]));
    assert_eq!(first, second);
    assert!(said.contains("wrenn down"), "{said}");
    let ready: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(ready["base_url"], "http://127.0.0.1:4444");
    let children = place.children();
    assert_eq!(say(&["up"]).await.0, first);
    assert_eq!(place.children(), children);
    // It is detached: its own session, and nothing of ours is open in it.
    let supervisor: i32 =
        fs::read_to_string(place.dir().join("lock")).unwrap().split(' ').next().unwrap().parse().unwrap();
    let session = rustix::process::getsid(Pid::from_raw(supervisor)).unwrap();
    assert_eq!(session.as_raw_nonzero().get(), supervisor);

    let (stopped, _) = say(&["down", "--output", "json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&stopped).unwrap()["stopped"], true);
    assert!(is_gone(supervisor) && children.iter().all(|(_, pid)| is_gone(*pid)));
    say(&["down"]).await;
}

#[tokio::test]
async fn a_service_without_its_supervisor_does_not_start() {
    // As when the supervisor was killed between the fork and the first instruction of the child.
    for service in ["agent", "control-plane"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command.args([service, "--supervisor", "1"]).stdin(Stdio::null());
        if service == "control-plane" {
            command.args(["--database-url", "postgres:///", "--agent-socket", "/nonexistent"]);
        }
        let output = timeout(BOUND, command.output()).await.unwrap().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("the supervisor that started this process is gone"), "{said}");
    }
}

#[tokio::test]
async fn up_tells_why_it_failed() {
    let place = Place::new();
    let mut command = place.wrenn(&["up"]);
    let mut up = command.env("FAIL", "agent").spawn().unwrap();
    let mut said = String::new();
    timeout(BOUND, up.stderr.as_mut().unwrap().read_to_string(&mut said)).await.unwrap().unwrap();
    assert_eq!(timeout(BOUND, up.wait()).await.unwrap().unwrap().code(), Some(1));
    assert!(said.contains("the agent has a reason") && said.contains("wrenn.log"), "{said}");
}
