//! A connection of which something was read already, and is read again before the rest. What stands for bytes of
//! files is replaced by them where it is written ([`super::outlet`]). Where the agent broke it off ([`super::callers`]) it
//! is reset for its reader, and has no end.

use std::{
    future::Future,
    io::{self, IoSlice},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    task::yield_now,
};

use super::{callers::Seat, outlet::Outlet};

/// How much is sent of files before others have their turn. It is more than what most sockets take at once, and less
/// than what takes long.
pub(super) const TURN: usize = 4 << 20;

/// The connection. What was read of it comes first, then what is still to come.
#[derive(Debug)]
pub(super) struct Connection {
    first: Vec<u8>,
    /// How much of `first` was read again.
    taken: usize,
    stream: TcpStream,
    outlet: Outlet,
    /// How much was sent of files since others had their turn.
    sent: usize,
    seat: Seat,
}

impl Connection {
    pub(super) fn new(first: Vec<u8>, stream: TcpStream, seat: Seat) -> Self {
        Self { first, taken: 0, stream, outlet: Outlet::default(), sent: 0, seat }
    }

    /// Takes promises to send parts of files on this connection.
    pub(super) fn outlet(&self) -> Outlet {
        self.outlet.clone()
    }

    /// Lets its end be a reset, so that the other side does not take it for an end in order.
    pub(super) fn break_off(&self) {
        // Where that fails there is nobody to be told.
        let _ = self.stream.set_zero_linger();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let rest = &this.first[this.taken..];
        if rest.is_empty() {
            let (before, room) = (buffer.filled().len(), buffer.remaining());
            ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
            let at_end = room > 0 && buffer.filled().len() == before;
            return Poll::Ready(if at_end && this.seat.is_broken_off() {
                Err(io::ErrorKind::ConnectionReset.into())
            } else {
                Ok(())
            });
        }
        let length = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..length]);
        this.taken += length;
        if this.taken == this.first.len() {
            (this.first, this.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Some(first) = this.outlet.first(pieces)? else {
            return Pin::new(&mut this.stream).poll_write_vectored(context, pieces);
        };
        if this.sent >= TURN {
            this.sent = 0;
            // Asked once, it wakes this task after the others, which is all that it is for.
            let _ = pin!(yield_now()).poll(context);
            return Poll::Pending;
        }
        loop {
            if this.stream.poll_write_ready(context)?.is_pending() {
                this.sent = 0;
                return Poll::Pending;
            }
            match this.stream.try_io(Interest::WRITABLE, || this.outlet.write(&this.stream, pieces, first)) {
                Ok(written) => {
                    this.sent += written;
                    return Poll::Ready(Ok(written));
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
