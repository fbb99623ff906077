//! A client that costs as little as one can: a blocking socket, requests that are made before the clock starts,
//! answers that are counted where they lie.
//!
//! An ordinary HTTP client copies what it reads several times and wakes tasks for it; an agent that is as fast as
//! this machine would be measured as slow as its client.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::framing::{Chunks, Head, Length};

/// How long nothing may happen on a connection.
const PATIENCE: Duration = Duration::from_secs(120);
/// How much is read at once.
const BUFFER: usize = 512 << 10;
/// How much of an answer that should be another one is shown.
const SHOWN: usize = 300;

/// A connection that is kept.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// What has been read and not been used.
    from: usize,
    to: usize,
}

impl Connection {
    /// Makes one of a socket that blocks.
    ///
    /// # Errors
    /// Those of the socket.
    pub(crate) fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, buffer: vec![0; BUFFER], from: 0, to: 0 })
    }

    /// Sends bytes of a request.
    ///
    /// # Errors
    /// Those of the socket.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("send")
    }

    /// Reads one answer to its end. Its body goes to `sink` in pieces as they come.
    ///
    /// # Errors
    /// Another status than the `expected` one, with what the agent said; those of the socket and of `sink`.
    pub(crate) fn answer(
        &mut self,
        expected: u16,
        mut sink: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Head> {
        let head = self.head()?;
        if head.status == expected {
            self.body(head.body, &mut sink)?;
            return Ok(head);
        }
        let mut said = Vec::new();
        self.body(head.body, &mut |bytes| {
            said.extend_from_slice(&bytes[..bytes.len().min(SHOWN.saturating_sub(said.len()))]);
            Ok(())
        })?;
        bail!("the answer was {}: {}", head.status, String::from_utf8_lossy(&said))
    }

    fn head(&mut self) -> Result<Head> {
        loop {
            if let Some((head, length)) = Head::parse(&self.buffer[self.from..self.to])? {
                self.from += length;
                return Ok(head);
            }
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
            ensure!(self.to < BUFFER, "the head of an answer is too long");
            let read = self.stream.read(&mut self.buffer[self.to..]).context("read the head of an answer")?;
            ensure!(read > 0, "the agent hung up");
            self.to += read;
        }
    }

    fn body(&mut self, length: Length, sink: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match length {
            Length::Known(mut left) => {
                while left > 0 {
                    self.fill()?;
                    let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.to - self.from);
                    sink(&self.buffer[self.from..self.from + most])?;
                    self.from += most;
                    left -= most as u64;
                }
            }
            Length::Chunked => {
                let mut chunks = Chunks::default();
                while !chunks.is_over() {
                    self.fill()?;
                    self.from += chunks.take(&self.buffer[self.from..self.to], &mut *sink)?;
                }
            }
        }
        Ok(())
    }

    /// Reads if there is nothing.
    fn fill(&mut self) -> Result<()> {
        if self.from == self.to {
            let read = self.stream.read(&mut self.buffer).context("read an answer")?;
            ensure!(read > 0, "the agent hung up within an answer");
            (self.from, self.to) = (0, read);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn answers_follow_each_other_on_one_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .write_all(
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n\
                      HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nxyzHTTP/1.1 204 No Content\r\n\r\n\
                      HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno",
                )
                .unwrap();
        });
        let mut connection = Connection::new(TcpStream::connect(address).unwrap()).unwrap();
        let mut body = Vec::new();
        for expected in [200, 200, 204] {
            connection
                .answer(expected, |bytes| {
                    body.extend_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(body, b"abcdexyz");
        let error = connection.answer(200, |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "the answer was 404: no");
        assert!(connection.answer(200, |_| Ok(())).is_err());
        server.join().unwrap();
    }
}
