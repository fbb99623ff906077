//! Bodies that pass through: pieces from one side become pieces to the other, one at a time.
//!
//! A piece that does not come within its bound, or a side that breaks, ends the body with an error. The
//! HTTP connection that carries it is then cut, so that half a file is never taken for a whole one.

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::Mutex,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use connectrpc::{ConnectError, client::ClientBody};
use futures::Stream;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::time::{Instant, Sleep};

/// The pieces of a body, each within a bound.
pub(crate) struct Pieces<B> {
    body: B,
    bound: Duration,
    /// Runs only while a piece is waited for: a side that takes its time to take one is not the other's fault.
    alarm: Pin<Box<Sleep>>,
    waiting: bool,
}

impl<B> std::fmt::Debug for Pieces<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pieces").field("bound", &self.bound).finish_non_exhaustive()
    }
}

impl<B> Pieces<B> {
    pub(crate) fn new(body: B, bound: Duration) -> Self {
        Self { body, bound, alarm: Box::pin(tokio::time::sleep(bound)), waiting: false }
    }
}

impl<B> Stream for Pieces<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Poll::Ready(next) = Pin::new(&mut self.body).poll_frame(context) else { break };
            self.waiting = false;
            match next {
                Some(Ok(frame)) => {
                    // Trailers mean nothing here.
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                None => return Poll::Ready(None),
            }
        }
        if !self.waiting {
            self.waiting = true;
            let end = Instant::now() + self.bound;
            self.alarm.as_mut().reset(end);
        }
        self.alarm.as_mut().poll(context).map(|()| {
            let message = format!("no data for {:?}", self.bound);
            Some(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
        })
    }
}

/// A stream of pieces as the body of a request to a guest. With a length, the guest is told it, and a
/// stream that is shorter or longer breaks the request.
pub(crate) fn upload_body<S>(pieces: S, length: Option<u64>) -> ClientBody
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
{
    Upload { pieces: Mutex::new(pieces), left: length }
        .map_err(|error| ConnectError::canceled("the upload was broken off").with_source(error))
        .boxed()
}

struct Upload<S> {
    /// Never locked: the client wants bodies that can be shared between threads, and a stream that only one
    /// owner ever touches becomes such a thing inside a mutex.
    pieces: Mutex<S>,
    left: Option<u64>,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Body for Upload<S> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        let pieces = this.pieces.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let next = match Pin::new(pieces).poll_next(context) {
            Poll::Ready(next) => next,
            Poll::Pending => return Poll::Pending,
        };
        match next {
            Some(Ok(data)) => {
                if let Some(left) = &mut this.left {
                    let length = data.len() as u64;
                    let Some(rest) = left.checked_sub(length) else {
                        return Poll::Ready(Some(Err(io::Error::other("more data than announced"))));
                    };
                    *left = rest;
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error))),
            None if this.left.is_some_and(|left| left > 0) => {
                this.left = None;
                Poll::Ready(Some(Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "less data than announced",
                ))))
            }
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
