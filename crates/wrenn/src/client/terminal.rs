//! A terminal in a sandbox.

use bytes::Bytes;
use wrenn_api::stream::{StartTerminal, TerminalClientFrame, TerminalServerFrame};
use wrenn_types::SandboxId;

use super::{
    Client, ClientError, http, path_of,
    socket::{Outgoing, Received, Socket},
};

/// A terminal. Its process survives the connection and is found again by its tag.
#[derive(Debug)]
pub struct Terminal {
    socket: Socket,
}

/// What happened in a terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TerminalEvent {
    /// It runs.
    Started {
        /// The name to connect to again.
        tag: String,
        /// The process id in the guest.
        pid: u32,
    },
    /// It shows this.
    Output(Bytes),
    /// Its process has ended; nothing follows.
    Exited(i32),
    /// Something went wrong that does not end it.
    Warning(String),
}

/// The way to a terminal.
#[derive(Debug, Clone)]
pub struct TerminalInput {
    outgoing: Outgoing,
}

impl Client {
    /// Starts a process with a terminal.
    ///
    /// # Errors
    /// No connection. That it cannot be run is told by [`Terminal::next`].
    pub async fn terminal(&self, id: &SandboxId, start: StartTerminal) -> Result<Terminal, ClientError> {
        self.open_terminal(id, &TerminalClientFrame::Start(start)).await
    }

    /// Finds a terminal that runs already.
    ///
    /// # Errors
    /// No connection. That there is none is told by [`Terminal::next`].
    pub async fn connect_terminal(&self, id: &SandboxId, tag: &str) -> Result<Terminal, ClientError> {
        self.open_terminal(id, &TerminalClientFrame::Connect { tag: tag.to_owned() }).await
    }

    async fn open_terminal(
        &self,
        id: &SandboxId,
        first: &TerminalClientFrame,
    ) -> Result<Terminal, ClientError> {
        let socket = Socket::open(&self.transport.endpoint, &path_of(id, "/terminal")).await?;
        socket.outgoing().frame(first).await?;
        Ok(Terminal { socket })
    }
}

impl Terminal {
    /// What happens next.
    ///
    /// # Errors
    /// It could not be run, or the connection broke.
    pub async fn next(&mut self) -> Result<TerminalEvent, ClientError> {
        loop {
            let frame = match self.socket.next().await? {
                Some(Received::Bytes(bytes)) => return Ok(TerminalEvent::Output(bytes)),
                Some(Received::Frame(frame)) => frame,
                None => return Err(ClientError::Closed),
            };
            return match frame {
                TerminalServerFrame::Started { tag, pid } => Ok(TerminalEvent::Started { tag, pid }),
                TerminalServerFrame::Exit { exit_code } => Ok(TerminalEvent::Exited(exit_code)),
                TerminalServerFrame::Error { data, fatal: false, .. } => Ok(TerminalEvent::Warning(data)),
                TerminalServerFrame::Error { data, code, .. } => Err(http::refusal_of_frame(data, code)),
                TerminalServerFrame::Ping => {
                    self.socket.outgoing().frame(&TerminalClientFrame::Pong).await?;
                    continue;
                }
                // The older dialect, which this client never asks for.
                TerminalServerFrame::Output { .. } => continue,
            };
        }
    }

    /// The way to the terminal.
    #[must_use]
    pub fn input(&self) -> TerminalInput {
        TerminalInput { outgoing: self.socket.outgoing() }
    }
}

impl TerminalInput {
    /// Types.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ClientError> {
        self.outgoing.bytes(bytes.to_vec()).await
    }

    /// Changes the size.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn resize(&self, cols: u32, rows: u32) -> Result<(), ClientError> {
        self.outgoing.frame(&TerminalClientFrame::Resize { cols, rows }).await
    }
}
