//! The stream that a client sees of a process: `start`, output, keepalives while it is quiet, `end`.

use std::{sync::Arc, time::Duration};

use connectrpc::ConnectError;
use futures::stream::{self, Stream};
use http::HeaderMap;
use tokio::time::{Instant, sleep_until};
use wrenn_proto::process::process_event::{EndEvent, KeepAlive, StartEvent};

use super::{
    message::Event,
    running::{Process, Subscription, TURN_LIMIT},
};

const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);
/// How long a killed process may take to be gone before its client is told all the same.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What the time limit of a request means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// It is the process's: it is killed then.
    Process,
    /// It is this stream's alone: the process goes on.
    Stream,
}

/// How long a stream may be quiet, as its client asks for it in seconds.
pub(crate) fn keepalive(headers: &HeaderMap) -> Duration {
    let asked = headers.get(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    asked
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_KEEPALIVE, |seconds| Duration::from_secs(seconds.into()))
}

/// The error of a process or stream whose time is up.
fn time_is_up() -> ConnectError {
    ConnectError::deadline_exceeded("the time limit of this command has passed")
}

/// The error of a stream whose client held up others.
fn cut_off() -> ConnectError {
    let seconds = TURN_LIMIT.as_secs();
    ConnectError::internal(format!(
        "no output was taken for {seconds} seconds while others waited for theirs"
    ))
}

struct State {
    process: Arc<Process>,
    subscription: Subscription,
    keepalive: Duration,
    deadline: Option<Instant>,
    limit: Limit,
    next: Next,
}

enum Next {
    Start,
    Output,
    Nothing,
}

/// The events of a process for one client.
pub(crate) fn events(
    process: Arc<Process>,
    subscription: Subscription,
    keepalive: Duration,
    deadline: Option<Instant>,
    limit: Limit,
) -> impl Stream<Item = Result<Event, ConnectError>> + Send + 'static {
    let deadline = match limit {
        Limit::Process => deadline.map(|deadline| deadline + KILL_LIMIT),
        Limit::Stream => deadline,
    };
    let state = State { process, subscription, keepalive, deadline, limit, next: Next::Start };
    stream::unfold(state, async |mut state| {
        let item = state.advance().await?;
        Some((item, state))
    })
}

impl State {
    async fn advance(&mut self) -> Option<Result<Event, ConnectError>> {
        match self.next {
            Next::Nothing => None,
            Next::Start => {
                self.next = Next::Output;
                Some(Ok(StartEvent { pid: self.process.pid(), ..StartEvent::default() }.into()))
            }
            Next::Output => Some(self.output().await),
        }
    }

    async fn output(&mut self) -> Result<Event, ConnectError> {
        let quiet = Instant::now() + self.keepalive;
        let wake = self.deadline.map_or(quiet, |deadline| deadline.min(quiet));
        tokio::select! {
            biased;
            received = self.subscription.recv() => match received {
                Some(output) => Ok(Event::Output(output)),
                None => {
                    self.next = Next::Nothing;
                    self.end()
                }
            },
            () = sleep_until(wake) => {
                if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    self.next = Next::Nothing;
                    return Err(time_is_up());
                }
                Ok(KeepAlive::default().into())
            }
        }
    }

    fn end(&self) -> Result<Event, ConnectError> {
        match self.process.end() {
            Some(end) if end.timed_out && self.limit == Limit::Process => Err(time_is_up()),
            Some(end) => Ok(EndEvent::from(end).into()),
            None => Err(cut_off()),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_client_may_ask_for_keepalives() {
        let asked = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(KEEPALIVE_HEADER, HeaderValue::from_static(value));
            keepalive(&headers)
        };
        assert_eq!(asked("50"), Duration::from_secs(50));
        let default = Duration::from_secs(90);
        assert_eq!(asked("0"), default);
        assert_eq!(asked("nonsense"), default);
        assert_eq!(keepalive(&HeaderMap::new()), default);
    }
}
