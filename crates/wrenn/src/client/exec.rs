//! A command whose output streams.

use bytes::Bytes;
use wrenn_api::{
    Encoding,
    stream::{ExecClientFrame, ExecServerFrame, StartExec},
};
use wrenn_types::SandboxId;

use super::{
    Client, ClientError, http, path_of,
    socket::{Outgoing, Received, Socket},
};

/// A running command. It belongs to the connection: dropping this kills it.
#[derive(Debug)]
pub struct ExecStream {
    socket: Socket,
}

/// What happened to a running command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs, with this process id in the guest.
    Started(u32),
    /// It wrote to its standard output.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It has ended; nothing follows.
    Exited {
        /// Its exit code; -1 when a signal ended it.
        code: i32,
        /// How it ended in words, unless the code is 0.
        status: Option<String>,
    },
}

/// The way to a running command.
#[derive(Debug, Clone)]
pub struct ExecInput {
    outgoing: Outgoing,
}

impl Client {
    /// Starts a command and follows it. Its output comes as it is, whether or not it is UTF-8.
    ///
    /// # Errors
    /// No connection. That the command cannot be run is told by [`ExecStream::next`].
    pub async fn exec_stream(&self, id: &SandboxId, start: StartExec) -> Result<ExecStream, ClientError> {
        let socket = Socket::open(&self.transport.endpoint, &path_of(id, "/exec/stream")).await?;
        let start = StartExec { encoding: Some(Encoding::Base64), ..start };
        socket.outgoing().frame(&ExecClientFrame::Start(start)).await?;
        Ok(ExecStream { socket })
    }
}

impl ExecStream {
    /// What happens next.
    ///
    /// # Errors
    /// The command could not be run, or the connection broke.
    pub async fn next(&mut self) -> Result<ExecEvent, ClientError> {
        let bytes = |data: &str| {
            let decoded = Encoding::Base64.decode(data).map_err(|error| ClientError::Unexpected {
                call: "the stream of a command".to_owned(),
                status: 101,
                source: Some(error.into()),
            });
            decoded.map(Bytes::from)
        };
        loop {
            let frame = match self.socket.next().await? {
                Some(Received::Frame(frame)) => frame,
                Some(Received::Bytes(_)) => continue,
                None => return Err(ClientError::Closed),
            };
            return match frame {
                ExecServerFrame::Start { pid } => Ok(ExecEvent::Started(pid)),
                ExecServerFrame::Stdout { data } => bytes(&data).map(ExecEvent::Stdout),
                ExecServerFrame::Stderr { data } => bytes(&data).map(ExecEvent::Stderr),
                ExecServerFrame::Exit { exit_code, status } => {
                    Ok(ExecEvent::Exited { code: exit_code, status })
                }
                ExecServerFrame::Error { data, code } => Err(http::refusal_of_frame(data, code)),
            };
        }
    }

    /// The way to the command.
    #[must_use]
    pub fn input(&self) -> ExecInput {
        ExecInput { outgoing: self.socket.outgoing() }
    }
}

impl ExecInput {
    /// Writes to its standard input, which [`StartExec::stdin`] must have asked for.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ClientError> {
        let data = Encoding::Base64.encode(bytes);
        self.outgoing.frame(&ExecClientFrame::Stdin { data, encoding: Some(Encoding::Base64) }).await
    }

    /// Ends its standard input.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn close(&self) -> Result<(), ClientError> {
        self.outgoing.frame(&ExecClientFrame::StdinClose).await
    }

    /// Asks it to end.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn stop(&self) -> Result<(), ClientError> {
        self.outgoing.frame(&ExecClientFrame::Stop).await
    }
}
