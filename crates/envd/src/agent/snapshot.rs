//! Standing still for a snapshot, and going on as somebody new.
//!
//! ```text
//!         /freeze                      /snapshot/prepare
//!  open ◄─────────► frozen      open, frozen ───────────► prepared ══ snapshot ══ restored, again and again
//!         /unfreeze                ▲                                                   │
//!                                  └──────────────── /init, successful ◄───────────────┘
//! ```
//!
//! `prepare` closes the gate, freezes every process of users, waits until they stand still, and puts the file systems
//! in order. What wakes up from the snapshot, as one machine or as many, is closed and frozen, and stays so until an
//! `/init` has given it randomness, clock and names of its own: no instruction of a user runs on those of another
//! clone. So there is no other way out of `prepared`: who prepared and then took no snapshot calls `/init` too, with
//! fresh entropy, and a failed `/init` leaves everything as still as it was.
//!
//! `prepare` has a bound. When that passes it undoes what it did, answers 503, and the guest goes on as before.
//!
//! The body of `prepare` is a choice of what the snapshot need not hold:
//!
//! | field | absent | meaning |
//! |---|---|---|
//! | `trim` | `true` | tell the disk which blocks are free: the kernel remembers what it has told, so it is dear once |
//! | `dropCaches` | `false` | give up clean page cache: a smaller snapshot, whose clones read their files from disk again |
//! | `limitMs` | 10000 | the bound, at most 120000 |
//!
//! The defaults are for a sandbox that is paused, and for a template, whose page cache is what makes its clones fast.
//! Memory that is free needs no word: the kernel clears what is freed (`init_on_free=1` on its command line), and the
//! host keeps nothing of a page of zeros.
//!
//! # What a clone shares with its siblings nevertheless
//!
//! New programs draw their randomness from the kernel (`getrandom`): Python and OpenSSL do, at their start, and the
//! kernel's generator has a new key by then. A program that ran already keeps in its memory what it drew before; its
//! clones have the same. The kernel's copy for user space (vDSO) is renewed with the generator.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};
use wrenn_guest_linux::trim::{TrimError, trim};

use super::{
    freezer::FreezeError,
    host::{self, HostError},
    state::{Agent, Gate, Place},
};
use crate::console::{chain, say};

/// The most bytes that the body may have.
pub(crate) const MAXIMUM_BODY: usize = 4096;
const LIMIT: Duration = Duration::from_secs(10);
const MAXIMUM_LIMIT: Duration = Duration::from_secs(120);
/// How much of the disk is trimmed between two looks at the clock.
const TRIM_STEP: u64 = 1 << 30;
/// No file system is larger; the end is where the kernel says so.
const TRIM_STEPS: u64 = 1 << 14;

/// What the caller of `prepare` wants.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Body {
    trim: Option<bool>,
    drop_caches: Option<bool>,
    limit_ms: Option<u64>,
}

/// The same, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Order {
    trim: bool,
    drop_caches: bool,
    limit: Duration,
}

/// Why the guest was not stopped, or not let go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("{0}")]
    Host(HostError),
    #[error("the body is not what it must be: {0}")]
    Body(serde_json::Error),
    #[error("the body is not an object")]
    NoObject,
    #[error("limitMs is not between 1 and 120000")]
    Limit,
    #[error("another call has not ended in time")]
    Busy,
    #[error("the guest is closed: only /init opens it")]
    Closed,
    #[error("cannot freeze the processes")]
    Freeze(#[source] FreezeError),
    #[error("cannot thaw the processes")]
    Thaw(#[source] FreezeError),
    #[error("the file systems were not in order in time")]
    Late,
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl SnapshotError {
    /// The HTTP status of this error.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Host(error) => error.status(),
            Self::Body(_) | Self::NoObject | Self::Limit => StatusCode::BAD_REQUEST,
            Self::Closed => StatusCode::CONFLICT,
            Self::Busy | Self::Freeze(_) | Self::Thaw(_) | Self::Late | Self::Thread(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// `POST /snapshot/prepare`.
pub(crate) async fn prepare(
    agent: &Arc<Agent>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), SnapshotError> {
    host::check_token(&agent.identity(), headers, None).map_err(SnapshotError::Host)?;
    let order = Order::parse(body)?;
    let deadline = Instant::now() + order.limit;
    let _one_at_a_time =
        timeout_at(deadline, agent.changing.lock()).await.map_err(|_| SnapshotError::Busy)?;
    let before = agent.identity().gate.clone();
    // First, so that nothing starts any more; what was let in just before is born frozen.
    agent.set_gate(Gate::Prepared);
    let stop = async {
        agent.freeze(deadline).await.map_err(SnapshotError::Freeze)?;
        match agent.place {
            Place::Guest => settle(&agent.settling, order, deadline).await,
            Place::Outside => Ok(()),
        }
    };
    let answer = stop.await;
    if let Err(error) = &answer {
        say(format_args!("not prepared for a snapshot: {}", chain(error)));
        go_back(agent, before);
    }
    answer
}

/// `POST /freeze`: stops the processes, for a short while, of a machine that is not saved.
pub(crate) async fn freeze(agent: &Arc<Agent>, headers: &HeaderMap) -> Result<(), SnapshotError> {
    host::check_token(&agent.identity(), headers, None).map_err(SnapshotError::Host)?;
    let deadline = Instant::now() + LIMIT;
    let _one_at_a_time =
        timeout_at(deadline, agent.changing.lock()).await.map_err(|_| SnapshotError::Busy)?;
    let before = agent.identity().gate.clone();
    match &before {
        Gate::Closed(_) => return Err(SnapshotError::Closed),
        Gate::Prepared => return Ok(()),
        Gate::Open | Gate::Frozen => agent.set_gate(Gate::Frozen),
    }
    let answer = agent.freeze(deadline).await.map_err(SnapshotError::Freeze);
    if answer.is_err() {
        go_back(agent, before);
    }
    answer
}

/// `POST /unfreeze`: undoes `/freeze`, and nothing else.
pub(crate) async fn unfreeze(agent: &Arc<Agent>, headers: &HeaderMap) -> Result<(), SnapshotError> {
    host::check_token(&agent.identity(), headers, None).map_err(SnapshotError::Host)?;
    let deadline = Instant::now() + LIMIT;
    let _one_at_a_time =
        timeout_at(deadline, agent.changing.lock()).await.map_err(|_| SnapshotError::Busy)?;
    match agent.identity().gate {
        Gate::Closed(_) | Gate::Prepared => return Err(SnapshotError::Closed),
        Gate::Open | Gate::Frozen => {}
    }
    agent.thaw().map_err(SnapshotError::Thaw)?;
    agent.set_gate(Gate::Open);
    Ok(())
}

/// Undoes a failed stop. What stood still before still does.
fn go_back(agent: &Agent, before: Gate) {
    if before == Gate::Open
        && let Err(error) = agent.thaw()
    {
        say(format_args!("cannot thaw the processes: {}", chain(&error)));
        return agent.set_gate(Gate::Closed("the processes cannot be thawed".to_owned()));
    }
    agent.set_gate(before);
}

/// Puts the file systems in order, on a thread of its own: the threads of the runtime may all be waiting for processes
/// that are born frozen. One that is still at it when the bound has passed keeps the next one waiting.
async fn settle(settling: &Arc<Semaphore>, order: Order, deadline: Instant) -> Result<(), SnapshotError> {
    let turn = timeout_at(deadline, Arc::clone(settling).acquire_owned()).await;
    let Ok(Ok(turn)) = turn else { return Err(SnapshotError::Busy) };
    let (done, wait) = oneshot::channel();
    std::thread::Builder::new()
        .name("envd-settle".to_owned())
        .spawn(move || {
            put_in_order(turn, order, deadline.into_std());
            // Nobody waits any more if the bound has passed.
            let _ = done.send(());
        })
        .map_err(SnapshotError::Thread)?;
    match timeout_at(deadline, wait).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(SnapshotError::Late),
    }
}

fn put_in_order(turn: OwnedSemaphorePermit, order: Order, deadline: std::time::Instant) {
    rustix::fs::sync();
    if order.trim {
        // Not all of the time that is left: what is not trimmed is no reason to fail.
        let now = std::time::Instant::now();
        trim_root(Path::new("/"), now + deadline.saturating_duration_since(now) / 2);
    }
    if order.drop_caches
        && let Err(error) = fs::write("/proc/sys/vm/drop_caches", "1")
    {
        say(format_args!("cannot drop caches: {error}"));
    }
    drop(turn);
}

/// Trims what there is time for: a snapshot whose free blocks are not trimmed is larger, and no less right.
fn trim_root(root: &Path, deadline: std::time::Instant) {
    for step in 0..TRIM_STEPS {
        if std::time::Instant::now() >= deadline {
            return;
        }
        match trim(root, step * TRIM_STEP, TRIM_STEP) {
            Ok(Some(_)) => {}
            Ok(None) | Err(TrimError::Unsupported) => return,
            Err(error) => return say(format_args!("{}", chain(&error))),
        }
    }
}

impl Order {
    fn parse(text: &[u8]) -> Result<Self, SnapshotError> {
        let body: Body = match text.trim_ascii() {
            b"" => Body::default(),
            [b'[', ..] => return Err(SnapshotError::NoObject),
            text => serde_json::from_slice(text).map_err(SnapshotError::Body)?,
        };
        let limit = body.limit_ms.map_or(LIMIT, Duration::from_millis);
        if limit.is_zero() || limit > MAXIMUM_LIMIT {
            return Err(SnapshotError::Limit);
        }
        Ok(Self { trim: body.trim.unwrap_or(true), drop_caches: body.drop_caches.unwrap_or(false), limit })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_absent_has_a_default() {
        let default = Order { trim: true, drop_caches: false, limit: LIMIT };
        assert_eq!(Order::parse(b"").unwrap(), default);
        assert_eq!(Order::parse(b" {} ").unwrap(), default);
        let other = Order { trim: false, drop_caches: true, limit: Duration::from_millis(250) };
        let text = br#"{"trim":false,"dropCaches":true,"limitMs":250,"other":1}"#;
        assert_eq!(Order::parse(text).unwrap(), other);
        for text in ["[]", "{", "7", r#"{"trim":1}"#, r#"{"limitMs":0}"#, r#"{"limitMs":120001}"#] {
            assert_eq!(
                Order::parse(text.as_bytes()).unwrap_err().status(),
                StatusCode::BAD_REQUEST,
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_body_has_a_bound(text in prop::collection::vec(any::<u8>(), 0..100), limit in any::<u64>()) {
            let _ = Order::parse(&text);
            if let Ok(order) = Order::parse(format!(r#"{{"limitMs":{limit}}}"#).as_bytes()) {
                prop_assert!(!order.limit.is_zero() && order.limit <= MAXIMUM_LIMIT);
            }
        }
    }
}
