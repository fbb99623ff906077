//! Bodies that are read to their end even when their reader is satisfied earlier.
//!
//! A stream of events is over for its reader with the last event, and a request may be refused before its
//! body is looked at. But a connection can be used again only once the end of a body has been read, and to
//! close one with unread bytes resets it, which can take the answer with it. So what is left of an
//! abandoned body is read and thrown away, within bounds.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

/// How much and how long an abandoned body is read for its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) bytes: usize,
    pub(crate) time: Duration,
}

/// A body that is read to its end.
#[derive(Debug)]
pub(crate) struct Lingering {
    body: Option<Incoming>,
    patience: Patience,
}

impl Lingering {
    pub(crate) fn new(body: Incoming, patience: Patience) -> Self {
        Self { body: Some(body), patience }
    }
}

impl Body for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        // Without a runtime the process is ending, and its connections with it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let Patience { bytes, time } = self.patience;
        runtime.spawn(tokio::time::timeout(time, async move {
            let mut left = bytes;
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(rest) = left.checked_sub(length) else { break };
                left = rest;
            }
        }));
    }
}
