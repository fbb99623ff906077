//! Signals that ask this program to end, while it still has something to clean up.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals of Ctrl-C, of `kill`, and of a terminal that goes away.
#[derive(Debug)]
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

/// That a signal asked this program to end; its exit code is made of the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interrupted(u8);

impl Interrupted {
    /// The exit code that a shell gives to a process which this signal ended.
    pub(super) fn exit_code(self) -> u8 {
        128 + self.0
    }
}

impl Interrupts {
    /// From now on the signals are seen here and end nothing by themselves.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    pub(super) async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted(2),
            _ = self.terminate.recv() => Interrupted(15),
            _ = self.hang_up.recv() => Interrupted(1),
        }
    }
}
