//! Asks programs what they say of themselves, and never for long.

use std::{io, process::Stdio, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
    time::timeout,
};
use wrenn_host_linux::process::find_program;

/// How long one program may take.
const BOUND: Duration = Duration::from_secs(10);
/// How much of what it says is read.
const LIMIT: u64 = 64 << 10;

/// A program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// It did what it was asked.
    Answers {
        /// Which one it is.
        path: Utf8PathBuf,
        /// What it said.
        said: String,
    },
    /// There is none.
    Missing,
    /// It is there, and did not do it.
    Fails {
        /// Which one it is.
        path: Utf8PathBuf,
        /// What happened.
        problem: String,
    },
}

impl Program {
    /// Where it is, if it is there.
    #[must_use]
    pub fn path(&self) -> Option<&Utf8Path> {
        match self {
            Self::Answers { path, .. } | Self::Fails { path, .. } => Some(path),
            Self::Missing => None,
        }
    }
}

/// Runs a program, named by its path or found on the `PATH`.
pub(super) async fn ask(program: &Utf8Path, arguments: &[&str]) -> Program {
    let found = find_program(program).and_then(|found| std::path::absolute(found).ok());
    let Some(path) = found.and_then(|found| Utf8PathBuf::from_path_buf(found).ok()) else {
        return Program::Missing;
    };
    match timeout(BOUND, run(&path, arguments)).await {
        Ok(Ok((said, _, true))) => Program::Answers { path, said },
        Ok(Ok((_, complaint, false))) => {
            let first = complaint.lines().next().unwrap_or_default();
            Program::Fails { path, problem: format!("it failed: {first}") }
        }
        Ok(Err(error)) => Program::Fails { path, problem: error.to_string() },
        Err(_) => Program::Fails { path, problem: format!("it did not answer within {BOUND:?}") },
    }
}

/// Both of its outputs, and whether it succeeded. Whoever stops waiting ends it.
async fn run(path: &Utf8Path, arguments: &[&str]) -> io::Result<(String, String, bool)> {
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (said, complaint, status) = tokio::join!(all(stdout), all(stderr), child.wait());
    Ok((said?, complaint?, status?.success()))
}

async fn all(stream: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let mut text = Vec::new();
    if let Some(stream) = stream {
        // What is beyond the limit is not wanted, and whoever writes it is told so by its pipe.
        stream.take(LIMIT).read_to_end(&mut text).await?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn programs_answer_or_fail_or_are_not_there() {
        let Program::Answers { said, .. } = ask("sh".into(), &["-c", "echo yes"]).await else { panic!() };
        assert_eq!(said, "yes\n");
        let failed = ask("/bin/sh".into(), &["-c", "echo no >&2; exit 3"]).await;
        assert_eq!(failed, Program::Fails { path: "/bin/sh".into(), problem: "it failed: no".to_owned() });
        assert_eq!(ask("/nowhere/program".into(), &[]).await, Program::Missing);
    }

    #[tokio::test]
    async fn who_says_too_much_is_not_read_for_ever() {
        let found = ask("/bin/sh".into(), &["-c", "while :; do echo yes; done"]).await;
        assert!(matches!(found, Program::Fails { .. }), "{found:?}");
    }
}
