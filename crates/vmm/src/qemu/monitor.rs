//! The task that owns a QEMU process: it alone waits for its end, and tells once why it ended.
//!
//! ```text
//!  process runs ──guest shuts down──► QEMU stands still ─► console read ─► quit ─┐
//!       │                                                                        ├─► reaped ─► reason told
//!       └──────────────── stop(), a crash, a signal ─────────────────────────────┘
//! ```
//!
//! A process that is let go is watched no more; one that was our child is still reaped, for as long as we live.
//!
//! QEMU is told to stand still when the guest powers off or resets (`shutdown=pause`), because a panic is
//! known only from the last words on the console, which are gone with the process.

use std::{io, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use camino::Utf8PathBuf;
use serde_json::{Value, json};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    sync::{Mutex, watch},
    task::JoinHandle,
    time::timeout,
};
use wrenn_host_linux::process::{Exit, Signal};

use super::{
    arguments::{CONSOLE, CONSOLE_BYTES},
    facts::{Facts, Shutdown},
    qmp::Qmp,
};
use crate::{
    ExitReason,
    files::SocketFile,
    last_words,
    process::{Held, Watched},
    tail::Tail,
};

/// How long QEMU may take to end by itself once it was told to, before it is killed.
pub(super) const QUIT_BOUND: Duration = Duration::from_secs(1);
/// How long the console may take to be read.
const CONSOLE_BOUND: Duration = Duration::from_secs(2);
/// How long the rest of the error messages may take once the process is gone.
const ERRORS_BOUND: Duration = Duration::from_millis(200);
/// How much of the error messages is kept.
const ERRORS_LIMIT: usize = 4096;

/// The end of what the guest printed, fetched from QEMU's ring when somebody asks.
#[derive(Debug)]
pub(super) struct ConsoleTail {
    qmp: Arc<Qmp>,
    file: Utf8PathBuf,
    tail: Mutex<Tail>,
}

impl ConsoleTail {
    pub(super) fn new(qmp: Arc<Qmp>, run_dir: Utf8PathBuf) -> Self {
        Self { qmp, file: run_dir.join("console.log"), tail: Mutex::new(Tail::new(CONSOLE_BYTES)) }
    }

    /// That of a machine which had another owner, as far as they kept it.
    pub(super) async fn continued(qmp: Arc<Qmp>, run_dir: Utf8PathBuf) -> Self {
        let console = Self::new(qmp, run_dir);
        if let Ok(kept) = tokio::fs::read(&console.file).await {
            console.tail.lock().await.push(&kept);
        }
        console
    }

    /// Everything up to now, bounded. Reading takes it out of the ring, so it is kept here and in
    /// `console.log`.
    pub(super) async fn read(&self) -> String {
        let mut tail = self.tail.lock().await;
        // In base64: what a guest prints need not be text.
        let arguments = json!({"device": CONSOLE, "size": CONSOLE_BYTES, "format": "base64"});
        if let Ok(Value::String(encoded)) = self.qmp.execute("ringbuf-read", arguments, CONSOLE_BOUND).await
            && let Ok(bytes) = STANDARD.decode(encoded)
            && !bytes.is_empty()
        {
            tail.push(&bytes);
            // Only a convenience for a person: the directory may be gone or full.
            drop(tokio::fs::write(&self.file, tail.text()).await);
        }
        tail.text()
    }
}

/// Everything that the task needs but the process itself.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) qmp: Arc<Qmp>,
    pub(super) console: Arc<ConsoleTail>,
    /// What a child says on its standard error.
    pub(super) errors: Option<pipe::Receiver>,
    pub(super) socket: SocketFile,
}

impl Monitor {
    pub(super) async fn run(self, mut process: Watched, mut held: Held) {
        let errors = self.errors.map(|errors| tokio::spawn(last_errors(errors)));
        let mut facts = self.qmp.facts();
        let shutdown = tokio::select! {
            // What is let go is not ended any more, whatever its guest did at the same moment.
            biased;
            // Whether it could be waited for is seen below.
            _ = process.wait() => None,
            () = held.let_go() => {
                self.socket.leave();
                drop((self.qmp, self.console));
                if let Some(errors) = errors {
                    errors.abort();
                }
                // Whoever asked this owner for the exit sees the channel close when the process is gone.
                drop(process.wait().await);
                return;
            }
            shutdown = guest_shutdown(&mut facts) => Some(shutdown),
        };
        let by_guest = match shutdown {
            Some(shutdown) => {
                let reason = verdict(shutdown, &self.console.read().await);
                quit_or_kill(&self.qmp, &mut process).await;
                Some(reason)
            }
            None => None,
        };
        let exit = process.wait().await;
        let reason = match by_guest {
            Some(reason) => reason,
            None if held.is_end_wished() => ExitReason::Stopped,
            None => {
                let shutdown = facts.borrow().shutdown;
                unexpected(exit, shutdown, errors).await
            }
        };
        tracing::debug!(pid = process.process().pid(), ?reason, "a QEMU is gone");
        held.tell(reason);
    }
}

/// Waits until the guest has shut down by itself; for ever if it does not.
async fn guest_shutdown(facts: &mut watch::Receiver<Facts>) -> Shutdown {
    loop {
        let found = facts.wait_for(|facts| facts.shutdown.is_some() || facts.disconnected).await;
        match found.map(|facts| facts.shutdown) {
            Ok(Some(shutdown @ (Shutdown::PoweredOff | Shutdown::Reset | Shutdown::Unseen))) => {
                return shutdown;
            }
            _ => std::future::pending::<()>().await,
        }
    }
}

async fn quit_or_kill(qmp: &Qmp, process: &mut Watched) {
    let quit = async {
        // The answer may be lost with the process; its end is what counts.
        drop(qmp.execute("quit", Value::Null, QUIT_BOUND).await);
        drop(process.wait().await);
    };
    if timeout(QUIT_BOUND, quit).await.is_err() {
        drop(process.process().kill());
    }
}

/// What a shutdown by the guest was. A kernel that panics prints so and resets the machine (`panic=-1`), and
/// one that reboots prints that. A guest can pretend either, about itself.
fn verdict(shutdown: Shutdown, console: &str) -> ExitReason {
    match shutdown {
        Shutdown::Reset | Shutdown::Unseen if last_words::is_panic(console) => ExitReason::GuestPanic,
        _ => ExitReason::GuestShutdown,
    }
}

/// Why a process ended that nobody of us ended.
async fn unexpected(
    exit: io::Result<Option<Exit>>,
    shutdown: Option<Shutdown>,
    errors: Option<JoinHandle<String>>,
) -> ExitReason {
    let stderr = match errors {
        Some(errors) => match timeout(ERRORS_BOUND, errors).await {
            Ok(Ok(stderr)) => stderr.trim_end().to_owned(),
            _ => String::new(),
        },
        None => String::new(),
    };
    match exit {
        Ok(Some(Exit::Signal(signal))) => ExitReason::VmmKilled { signal },
        // It was asked to end by a signal, and did so in good order.
        Ok(Some(Exit::Code(0)) | None) if shutdown == Some(Shutdown::Host) => {
            ExitReason::VmmKilled { signal: Signal::TERM.as_raw() }
        }
        Ok(Some(Exit::Code(code))) => ExitReason::VmmFailed { code, stderr },
        Ok(None) => ExitReason::of_unknown_cause(),
        Err(error) => {
            ExitReason::VmmFailed { code: -1, stderr: format!("{stderr}\nnot waited for: {error}") }
        }
    }
}

/// The end of what the process says on its standard error, until it closes it.
async fn last_errors(mut errors: pipe::Receiver) -> String {
    let mut tail = Tail::new(ERRORS_LIMIT);
    let mut chunk = [0; 1024];
    while let Ok(count @ 1..) = errors.read(&mut chunk).await {
        tracing::debug!(said = %String::from_utf8_lossy(&chunk[..count]).trim_end(), "QEMU");
        tail.push(&chunk[..count]);
    }
    tail.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_a_reboot_by_the_last_words() {
        let panic = "[    1.7] Kernel panic - not syncing: Attempted to kill init!\r\n[    1.8] Kernel Offset: 0x2\r\n";
        let reboot = "[    2.0] reboot: Restarting system\r\n[    2.0] reboot: machine restart\r\n";
        assert_eq!(verdict(Shutdown::Reset, panic), ExitReason::GuestPanic);
        assert_eq!(verdict(Shutdown::Reset, reboot), ExitReason::GuestShutdown);
        assert_eq!(verdict(Shutdown::Reset, &[panic, reboot].concat()), ExitReason::GuestShutdown);
        assert_eq!(verdict(Shutdown::Reset, ""), ExitReason::GuestShutdown, "a triple fault says nothing");
        assert_eq!(verdict(Shutdown::Unseen, panic), ExitReason::GuestPanic);
        assert_eq!(verdict(Shutdown::Unseen, reboot), ExitReason::GuestShutdown);
        assert_eq!(verdict(Shutdown::PoweredOff, panic), ExitReason::GuestShutdown);
    }
}
