//! A root disk of which nothing is ours: the agent serves it, and asks nothing of it.
//!
//! It holds one static program, and no Bash, no Python, no users but root, no directories to mount things on. In the
//! barest of all there is not even `/etc`.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wrenn_host_agent::guest::{self, ENVD_PORT};
use wrenn_vmm::{DiskFormat, DiskSpec};

use crate::{BOUND, Lab, Machine, Who, become_itself};

/// Where Debian's `busybox-static` puts its program.
const PROGRAM: &str = "/bin/busybox";
const ROOT: Who<'_> = Who { name: "foreign", user: "root", directory: "/" };
/// What a program finds that the agent started: each line is one thing that it needs, or the reason why it failed.
const QUESTIONS: &str = "
exec > /answers 2>&1
test $$ -gt 1 && echo process
test \"$(cat /proc/1/comm)\" = init && echo init
echo x > /dev/null && head -c 8 /dev/urandom | wc -c
echo y > /dev/shm/file && cat /dev/shm/file
test -c /dev/ptmx && test -d /dev/pts && echo terminals
echo z > /tmp/file && stat -c %a /tmp
cat /etc/hostname
id -u && pwd && echo $HOME
";
const ANSWERS: &str = "process\ninit\n8\ny\nterminals\n1777\nforeign\n0\n/\n/root\n";

/// Why there is no program to put on such a disk.
pub(crate) fn cannot_run() -> Option<String> {
    // Whether it needs a loader, which it says by naming one.
    let linked = fs::read(PROGRAM).map(|bytes| bytes.windows(15).any(|window| window == b"/lib64/ld-linux"));
    match linked {
        Ok(false) => None,
        Ok(true) => Some(format!("{PROGRAM} is not static: busybox-static is needed")),
        Err(error) => Some(format!("{PROGRAM}, of busybox-static: {error}")),
    }
}

/// Makes a disk with the program, a shell by that name, and what `more` adds.
fn disk(lab: &Lab, name: &str, more: impl FnOnce(&Path) -> Result<()>) -> Result<DiskSpec> {
    let (tree, image) = (lab.path(&format!("{name}-tree")), lab.path(&format!("{name}-image")));
    fs::create_dir_all(tree.join("bin"))?;
    fs::copy(PROGRAM, tree.join("bin/busybox"))?;
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for applet in ["sh", "cat", "echo", "head", "id", "pwd", "stat", "test", "true", "wc"] {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    more(tree.as_std_path())?;
    // Its file system is what `mke2fs` makes of itself, and small: nothing of ours is in its options.
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &image]).arg("24M").output()?;
    ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    Ok(DiskSpec { path: image, format: DiskFormat::Raw })
}

pub(crate) async fn root_of_somebody_else(lab: Arc<Lab>) -> Result<()> {
    let disk = disk(&lab, "foreign", |tree| {
        fs::create_dir(tree.join("etc"))?;
        Ok(fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n")?)
    })?;
    let machine = lab.start("foreign", &disk, None).await?;
    become_itself(&machine.connector, &ROOT, guest::Identity::fresh_entropy()).await?;
    serves(&machine).await?;
    // Nobody has that name, and then nothing runs, as whomever else.
    exercise(&machine, "user", "echo ran > /tmp/by-user").await?;
    ensure!(file(&machine, "/tmp/by-user").await?.0 == 404, "a program of nobody ran");

    // It is saved and restored as any other.
    guest::prepare(&machine.connector, None, BOUND).await?;
    let disk = lab.save(machine, "foreign").await?;
    let clone = lab.start("foreign-clone", &disk, Some("foreign")).await?;
    become_itself(&clone.connector, &ROOT, guest::Identity::fresh_entropy()).await?;
    ensure!(file(&clone, "/answers").await? == (200, ANSWERS.to_owned()), "what was written is there");
    serves(&clone).await?;
    lab.stop(clone).await
}

pub(crate) async fn root_with_nothing(lab: Arc<Lab>) -> Result<()> {
    let disk = disk(&lab, "bare", |_| Ok(()))?;
    let machine = lab.start("bare", &disk, None).await?;
    become_itself(&machine.connector, &ROOT, guest::Identity::fresh_entropy()).await?;
    serves(&machine).await?;
    lab.stop(machine).await
}

/// Programs and files.
async fn serves(machine: &Machine) -> Result<()> {
    exercise(machine, "root", QUESTIONS).await?;
    let answers = file(machine, "/answers").await?;
    ensure!(answers == (200, ANSWERS.to_owned()), "a program found: {answers:?}");

    let path = "/made/by/agent";
    let (status, said) = ask(machine, &format!("POST /files?path={path}"), "content").await?;
    ensure!(status == 200, "{status}: {said}");
    ensure!(file(machine, path).await? == (200, "content".to_owned()));
    exercise(machine, "root", "cat /made/by/agent > /copied; stat -c %u:%a /made/by/agent >> /copied")
        .await?;
    let copied = file(machine, "/copied").await?;
    ensure!(copied == (200, "content0:644\n".to_owned()), "{copied:?}");
    ensure!(file(machine, "/nowhere").await?.0 == 404);
    Ok(())
}

async fn exercise(machine: &Machine, user: &str, script: &str) -> Result<()> {
    let program = ["/bin/sh", "-c", script];
    Ok(guest::exercise(&machine.connector, user, &program, BOUND).await?)
}

async fn file(machine: &Machine, path: &str) -> Result<(u16, String)> {
    ask(machine, &format!("GET /files?path={path}"), "").await
}

/// Asks the agent for something, and gives the status and the body of its answer.
async fn ask(machine: &Machine, what: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = machine.connector.connect(ENVD_PORT).await?;
    let length = body.len();
    let head = format!("{what} HTTP/1.1\r\nhost: guest\r\nconnection: close\r\ncontent-length: {length}\r\n");
    stream
        .write_all(format!("{head}content-type: application/octet-stream\r\n\r\n{body}").as_bytes())
        .await?;
    let mut answer = String::new();
    tokio::time::timeout(BOUND, stream.read_to_string(&mut answer)).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
