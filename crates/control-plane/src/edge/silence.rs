//! How long both ends of a connection may say nothing.
//!
//! A long poll, a stream of events and an upload last as long as they last, so their time has no bound. What has one is
//! the time in which no byte moves in either direction: each piece sets the clock back.

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

type BoxError = Box<dyn StdError + Send + Sync>;

/// Why the body of an answer breaks off. Its reader sees a connection that ends too soon.
#[derive(Debug, thiserror::Error)]
enum BrokenOff {
    #[error("nothing was said for {0:?}")]
    Silence(Duration),
    #[error("the sandbox has ended")]
    SandboxGone,
}

/// The clock of one exchange, shared by those who carry its bytes.
#[derive(Debug, Clone)]
pub(super) struct Silence {
    // A plain mutex: it is held for one assignment.
    last: Arc<Mutex<Instant>>,
    bound: Duration,
}

impl Silence {
    pub(super) fn new(bound: Duration) -> Self {
        Self { last: Arc::new(Mutex::new(Instant::now())), bound }
    }

    /// Something was said.
    pub(super) fn broken(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn end(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) + self.bound
    }

    /// Returns when nothing was said for the bound.
    pub(super) async fn too_long(&self) {
        loop {
            let end = self.end();
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    }
}

/// The body of a request on its way to a guest.
#[derive(Debug)]
pub(super) struct Upload<B> {
    pub(super) body: B,
    pub(super) silence: Silence,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Upload<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.silence.broken();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How the end of an answer is known.
pub(super) enum Ending {
    /// By its length or its last chunk.
    Framed,
    /// By the end of the connection, which a sandbox that is killed or paused ends as well: whether it still runs is
    /// asked for before the end is believed.
    Connection(BoxFuture<'static, bool>),
}

/// The body of an answer on its way to a caller. It breaks off rather than to end well without being complete.
pub(super) struct Answer<B> {
    body: B,
    ending: Ending,
    silence: Silence,
    sleep: Pin<Box<Sleep>>,
}

impl<B> Answer<B> {
    pub(super) fn new(body: B, ending: Ending, silence: Silence) -> Self {
        let sleep = Box::pin(sleep_until(silence.end()));
        Self { body, ending, silence, sleep }
    }
}

impl<B> Body for Answer<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(frame)) => {
                this.silence.broken();
                return Poll::Ready(Some(frame.map_err(Into::into)));
            }
            Poll::Ready(None) => {
                let Ending::Connection(runs) = &mut this.ending else { return Poll::Ready(None) };
                let runs = ready!(runs.as_mut().poll(context));
                this.ending = Ending::Framed;
                return Poll::Ready((!runs).then(|| Err(BrokenOff::SandboxGone.into())));
            }
            Poll::Pending => {}
        }
        loop {
            ready!(this.sleep.as_mut().poll(context));
            let end = this.silence.end();
            if end <= Instant::now() {
                return Poll::Ready(Some(Err(BrokenOff::Silence(this.silence.bound).into())));
            }
            this.sleep.as_mut().reset(end);
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.ending, Ending::Framed) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt as _, stream};
    use http_body_util::{BodyExt as _, Full, StreamBody};

    use super::*;

    const BOUND: Duration = Duration::from_secs(60);

    /// Pieces with so many seconds between them.
    fn pieces(seconds: &'static [u64]) -> impl Body<Data = Bytes, Error = Infallible> + Unpin {
        let pieces = stream::iter(seconds).then(|seconds| async {
            tokio::time::sleep(Duration::from_secs(*seconds)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x")))
        });
        StreamBody::new(Box::pin(pieces))
    }

    async fn length(body: impl Body<Data = Bytes, Error = BoxError>) -> Result<usize, String> {
        body.collect().await.map(|whole| whole.to_bytes().len()).map_err(|error| error.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_set_the_clock_back_and_silence_ends_it() {
        let answer = |seconds| Answer::new(pieces(seconds), Ending::Framed, Silence::new(BOUND));
        assert_eq!(length(answer(&[50, 50, 50, 50])).await, Ok(4));
        assert!(length(answer(&[50, 61])).await.unwrap_err().contains("60s"));

        // What is said in the other direction counts, too.
        let silence = Silence::new(BOUND);
        let upload = Upload { body: pieces(&[40, 40, 40]), silence: silence.clone() };
        let answer = Answer::new(pieces(&[130]), Ending::Framed, silence.clone());
        let (sent, got) = tokio::join!(upload.collect(), length(answer));
        assert_eq!((sent.unwrap().to_bytes().len(), got), (3, Ok(1)));
        let started = Instant::now();
        silence.too_long().await;
        assert_eq!(started.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_connection_is_the_end_of_an_answer_only_if_the_sandbox_runs() {
        for runs in [true, false] {
            let ending = Ending::Connection(Box::pin(std::future::ready(runs)));
            let body = Full::new(Bytes::from_static(b"all"));
            let answer = Answer::new(body, ending, Silence::new(BOUND));
            assert!(!answer.is_end_stream());
            assert_eq!(length(answer).await.ok(), runs.then_some(3));
        }
    }
}
