//! The floor: a bare program that has Firecracker load a snapshot and go on, with nothing of the driver's.
//!
//! ```text
//!  a thread enters the namespace ─► firecracker --api-sock ─► its socket ─► PUT /snapshot/load ─► PATCH /vm Resumed
//! ```
//!
//! It asks for what the driver asks for: the file of the memory is mapped, what the guest writes is tracked, the network is another
//! one. What the guest prints is thrown away, and no lock, log or mark is kept.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::oneshot,
};
use wrenn_vmm::SnapshotFiles;

/// Its socket, in the directory in which it works.
const SOCKET: &str = "api.sock";
/// How long after a refusal the socket is tried again.
const PAUSE: Duration = Duration::from_millis(1);
/// The name of the disk in the saved state, from the directory in which Firecracker works: the driver's.
const DISK: &str = "disk.link";
/// How much of an answer is read.
const ANSWER_LIMIT: usize = 16 * 1024;

/// What a bare program restores with.
#[derive(Debug, Clone)]
pub(crate) struct Plain {
    pub(crate) program: Utf8PathBuf,
    pub(crate) namespace: Utf8PathBuf,
    pub(crate) tap: String,
}

/// A process, killed when this is dropped.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A machine, ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    _process: Process,
    api: UnixStream,
}

impl Machine {
    /// Lets it run.
    pub(crate) async fn resume(&mut self) -> Result<()> {
        tell_it(&mut self.api, "PATCH /vm", &json!({ "state": "Resumed" })).await
    }
}

impl Plain {
    /// Puts what a machine needs into its directory, before the clock starts.
    pub(crate) fn prepare(directory: &Utf8Path, disk: &Utf8Path) -> io::Result<()> {
        std::os::unix::fs::symlink(disk, directory.join(DISK))
    }

    /// Restores a machine, which stands still then.
    pub(crate) async fn restore(&self, directory: &Utf8Path, from: &SnapshotFiles) -> Result<Machine> {
        let (tell, told) = oneshot::channel();
        let (plain, works_in) = (self.clone(), directory.to_owned());
        // Of its own: it stays in the namespace.
        std::thread::spawn(move || drop(tell.send(plain.start(&works_in))));
        let process = told.await.context("start a thread")?.context("start Firecracker")?;
        let mut api = connect(&directory.join(SOCKET)).await.context("connect to Firecracker")?;
        let load = json!({
            "snapshot_path": from.state,
            "mem_backend": { "backend_type": "File", "backend_path": from.memory },
            "track_dirty_pages": true,
            "resume_vm": false,
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": self.tap }],
        });
        tell_it(&mut api, "PUT /snapshot/load", &load).await?;
        Ok(Machine { _process: process, api })
    }

    fn start(&self, directory: &Utf8Path) -> io::Result<Process> {
        let namespace = File::open(&self.namespace)?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let mut command = Command::new(&self.program);
        command.args(["--api-sock", SOCKET]).current_dir(directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Process)
    }
}

/// The caller keeps the bound.
async fn connect(socket: &Utf8Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn tell_it(api: &mut UnixStream, line: &str, body: &Value) -> Result<()> {
    let body = body.to_string();
    let head = "Host: localhost\r\nAccept: application/json\r\nContent-Type: application/json";
    let request = format!("{line} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    api.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    // What is well has no body.
    while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
        ensure!(
            answer.len() < ANSWER_LIMIT && api.read_buf(&mut answer).await? > 0,
            "{line}: there is no answer"
        );
    }
    ensure!(is_well(&answer), "{line}: {}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn is_well(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 204 ")
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answered_with(answer: &'static str) -> Result<String> {
        let directory = tempfile::tempdir().unwrap();
        let socket = Utf8Path::from_path(directory.path()).unwrap().join(SOCKET);
        let client = async {
            let mut api = connect(&socket).await?;
            tell_it(&mut api, "PATCH /vm", &json!({ "state": "Resumed" })).await
        };
        let server = async {
            // Not there yet when the client begins.
            tokio::task::yield_now().await;
            let (mut stream, _) = UnixListener::bind(&socket)?.accept().await?;
            let mut asked = Vec::new();
            while !asked.ends_with(b"}") {
                ensure!(stream.read_buf(&mut asked).await? > 0, "the client is gone");
            }
            stream.write_all(answer.as_bytes()).await?;
            Ok(String::from_utf8(asked)?)
        };
        let (told, asked) = tokio::join!(client, server);
        told.and(asked)
    }

    #[tokio::test]
    async fn what_is_told_is_answered() {
        let asked = answered_with("HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n").await.unwrap();
        assert!(asked.starts_with("PATCH /vm HTTP/1.1\r\n"), "{asked}");
        assert!(asked.ends_with("Content-Length: 19\r\n\r\n{\"state\":\"Resumed\"}"), "{asked}");
    }

    #[tokio::test]
    async fn a_refusal_is_told() {
        let refused = answered_with("HTTP/1.1 400 \r\nContent-Length: 2\r\n\r\nno").await.unwrap_err();
        assert!(refused.to_string().starts_with("PATCH /vm: HTTP/1.1 400"), "{refused}");
        assert!(answered_with("").await.is_err());
    }
}
