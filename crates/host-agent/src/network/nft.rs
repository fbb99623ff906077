//! Loads rules: one text, one run of `nft`, one transaction.

use std::{
    io,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};
use wrenn_host_linux::netns::NetworkNamespace;

/// How long one transaction may take. It is milliseconds, unless the machine is in trouble.
const BOUND: Duration = Duration::from_secs(10);

/// Where Debian has it. A login without root's PATH does not find it by its name.
const PROGRAM: &str = "/usr/sbin/nft";

/// Rules that were not loaded. Those that were there before are in force.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program is not there.
    #[error("there is no nft; install the package nftables")]
    Missing,
    /// It could not be started in the namespace.
    #[error("could not run nft")]
    Run(#[source] io::Error),
    /// It refused.
    #[error("nft refused the rules ({status}): {message}")]
    Refused {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        message: String,
    },
    /// It did not end in time, and was ended.
    #[error("nft did not end within {BOUND:?}")]
    TimedOut,
}

impl NftError {
    /// Whether the rules are those that were there before, for sure. One that was ended may have loaded some.
    pub(super) fn changed_nothing(&self) -> bool {
        match self {
            Self::Missing => true,
            Self::Refused { status, .. } => status.code().is_some(),
            Self::Run(_) | Self::TimedOut => false,
        }
    }
}

/// Loads `rules` in a namespace: all of them, or none.
///
/// # Errors
/// [`NftError`] with what `nft` said.
pub(super) async fn load(namespace: &NetworkNamespace, rules: String) -> Result<(), NftError> {
    run(namespace, &["-f", "-"], rules).await
}

/// Loads nothing, but says whether the rules could be.
#[cfg(test)]
pub(super) async fn check(namespace: &NetworkNamespace, rules: String) -> Result<(), NftError> {
    run(namespace, &["-c", "-f", "-"], rules).await
}

async fn run(
    namespace: &NetworkNamespace,
    arguments: &'static [&'static str],
    rules: String,
) -> Result<(), NftError> {
    // A child process is in the namespace of the thread that starts it.
    let started = namespace.run(move || {
        let program = if Path::new(PROGRAM).exists() { PROGRAM } else { "nft" };
        Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    });
    let conversation = async {
        let mut child = match started.await.and_then(|spawned| spawned) {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NftError::Missing),
            Err(error) => return Err(NftError::Run(error)),
        };
        if let Some(mut input) = child.stdin.take() {
            // It reads all of its input before it does or says anything. If it dies before, it says why.
            let _ = input.write_all(rules.as_bytes()).await;
        }
        let output = child.wait_with_output().await.map_err(NftError::Run)?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(NftError::Refused { status: output.status, message })
    };
    timeout(BOUND, conversation).await.unwrap_or(Err(NftError::TimedOut))
}
