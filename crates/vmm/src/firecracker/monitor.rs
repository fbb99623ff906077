//! The task that owns a Firecracker process: it alone waits for its end, and tells once why it ended.
//!
//! ```text
//!  process runs ──guest restarts, or panics──► Firecracker ends, with 0 ─► console read ─┐
//!       │ ──────────guest halts──────────────► its console says so ─► killed ────────────┼─► reaped ─► reason told
//!       └──────────────── stop(), a crash, a signal, its pager's end ────────────────────┘
//! ```
//!
//! Firecracker has no way for a guest to power off: its kernel halts instead, which nobody is told, but for a line on the
//! console. A guest that writes this line itself is ended as if it had halted, which is its own affair.
//!
//! A process that is let go is watched no more; one that was our child is still reaped, for as long as we live.

use std::{io, sync::Arc};

use wrenn_host_linux::process::Exit;

use super::spool::Spool;
use crate::{
    ExitReason,
    files::SocketFile,
    last_words,
    pager::PagerWatch,
    process::{Held, Watched},
};

/// Everything that the task needs but the process itself.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) console: Arc<Spool>,
    /// What Firecracker says itself.
    pub(super) log: Arc<Spool>,
    pub(super) socket: SocketFile,
    /// What serves its memory, if something does.
    pub(super) pager: Option<PagerWatch>,
}

impl Monitor {
    pub(super) async fn run(self, mut process: Watched, mut held: Held) {
        let (mut has_halted, mut has_pager) = (false, self.pager.is_some());
        loop {
            tokio::select! {
                // What is let go is not ended any more, whatever its guest did at the same moment.
                biased;
                // Whether it could be waited for is seen below.
                _ = process.wait() => break,
                () = held.let_go() => {
                    self.socket.leave();
                    drop((self.console, self.log));
                    // Whoever asked this owner for the exit sees the channel close when the process is gone.
                    drop(process.wait().await);
                    return;
                }
                () = self.console.follow() => {
                    if !has_halted && last_words::has_halted(&self.console.end(last_words::END)) {
                        has_halted = true;
                        // It is waited for above, whether it can be killed or not.
                        drop(process.process().kill());
                    }
                }
                () = self.log.follow() => {}
                () = ended(self.pager.as_ref()), if has_pager => {
                    has_pager = false;
                    // The kernel has done so already.
                    drop(process.process().kill());
                }
            }
        }
        let exit = process.wait().await;
        let reason = match (has_halted, held.is_end_wished()) {
            (true, _) => ExitReason::GuestShutdown,
            (false, true) => ExitReason::Stopped,
            (false, false) => match verdict(self.pager.as_ref()).await {
                Some(reason) => reason,
                None => unexpected(exit, &self.console.text(), &self.log.text()),
            },
        };
        tracing::debug!(pid = process.process().pid(), ?reason, "a Firecracker is gone");
        // Whoever is told finds nothing of it.
        drop(self.socket);
        held.tell(reason);
    }
}

async fn ended(pager: Option<&PagerWatch>) {
    match pager {
        Some(pager) => pager.ended().await,
        None => std::future::pending().await,
    }
}

/// Whether it was its pager that ended it.
async fn verdict(pager: Option<&PagerWatch>) -> Option<ExitReason> {
    pager?.verdict().await
}

/// Why a process ended that nobody of us ended.
fn unexpected(exit: io::Result<Option<Exit>>, console: &str, log: &str) -> ExitReason {
    let by_guest = || match last_words::is_panic(console) {
        true => ExitReason::GuestPanic,
        false => ExitReason::GuestShutdown,
    };
    let stderr = log.trim_end();
    match exit {
        Ok(Some(Exit::Signal(signal))) => ExitReason::VmmKilled { signal },
        // Nothing but its guest ends it in good order.
        Ok(Some(Exit::Code(0))) => by_guest(),
        Ok(Some(Exit::Code(code))) => ExitReason::VmmFailed { code, stderr: stderr.to_owned() },
        // Nobody says how. The last words do, unless it was lost a moment after them.
        Ok(None) if last_words::is_end(console) => by_guest(),
        Ok(None) => ExitReason::of_unknown_cause(),
        Err(error) => {
            ExitReason::VmmFailed { code: -1, stderr: format!("{stderr}\nnot waited for: {error}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_by_the_exit_and_the_last_words() {
        let panic = "[ 1.0] Kernel panic - not syncing: x\n";
        let restart = "[ 1.0] reboot: Restarting system\n";
        let code = |code| Ok(Some(Exit::Code(code)));
        assert_eq!(unexpected(code(0), panic, ""), ExitReason::GuestPanic);
        assert_eq!(unexpected(code(0), restart, ""), ExitReason::GuestShutdown);
        assert_eq!(unexpected(code(0), "", ""), ExitReason::GuestShutdown);
        let failed = ExitReason::VmmFailed { code: 148, stderr: "why".to_owned() };
        assert_eq!(unexpected(code(148), panic, "why\n"), failed, "it was not its guest that ended it");
        assert_eq!(unexpected(Ok(Some(Exit::Signal(9))), panic, ""), ExitReason::VmmKilled { signal: 9 });
        assert_eq!(unexpected(Ok(None), panic, ""), ExitReason::GuestPanic);
        assert_eq!(unexpected(Ok(None), restart, ""), ExitReason::GuestShutdown);
        assert_eq!(unexpected(Ok(None), "tick\n", "x"), ExitReason::of_unknown_cause());
    }
}
