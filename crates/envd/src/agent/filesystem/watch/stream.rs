//! What the client of a `WatchDir` sees: `start`, events, keepalives while nothing happens.

use std::time::Duration;

use connectrpc::ConnectError;
use futures::stream::{self, Stream};
use tokio::time::{Instant, sleep_until};
use wrenn_proto::filesystem::{
    FilesystemEvent, WatchDirResponse,
    watch_dir_response::{KeepAlive, StartEvent},
};

use super::{Watch, WatchError, queue::Item};

struct State {
    watch: Watch,
    keepalive: Duration,
    deadline: Option<Instant>,
    next: Next,
}

enum Next {
    Start,
    Events,
    Nothing,
}

/// The events of a watch for its client. The watch ends with the stream.
pub(in super::super) fn events(
    watch: Watch,
    keepalive: Duration,
    deadline: Option<Instant>,
) -> impl Stream<Item = Result<WatchDirResponse, ConnectError>> + Send + 'static {
    let state = State { watch, keepalive, deadline, next: Next::Start };
    stream::unfold(state, async |mut state| {
        let item = state.advance().await?;
        Some((item, state))
    })
}

impl State {
    async fn advance(&mut self) -> Option<Result<WatchDirResponse, ConnectError>> {
        match self.next {
            Next::Nothing => return None,
            Next::Start => {
                self.next = Next::Events;
                return Some(Ok(response(StartEvent::default())));
            }
            Next::Events => {}
        }
        let quiet = Instant::now() + self.keepalive;
        let wake = self.deadline.map_or(quiet, |deadline| deadline.min(quiet));
        let item = tokio::select! {
            biased;
            () = sleep_until(wake) => {
                if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    self.next = Next::Nothing;
                    return Some(Err(ConnectError::deadline_exceeded("the time limit of this watch has passed")));
                }
                return Some(Ok(response(KeepAlive::default())));
            }
            item = self.watch.shared.queue.next() => item,
        };
        match item {
            Item::Event(event) => Some(Ok(response(FilesystemEvent::from(event)))),
            Item::Lost(loss) => {
                self.next = Next::Nothing;
                Some(Err(WatchError::Lost(loss).into()))
            }
            Item::Ended => None,
        }
    }
}

fn response<E>(event: E) -> WatchDirResponse
where
    Option<wrenn_proto::filesystem::__buffa::oneof::watch_dir_response::Event>: From<E>,
{
    WatchDirResponse { event: event.into(), ..WatchDirResponse::default() }
}
