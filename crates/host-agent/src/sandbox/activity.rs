//! The inactivity clock of one sandbox.
//!
//! Whoever carries bytes to or from the guest *touches* the clock; the driver waits for it to run out.
//! Touching is one relaxed store, so that a busy tunnel pays nothing for it: no waiter is woken, and the
//! waiter looks again when the time it knew of has come.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

/// When something last happened. Owned by the sandbox's handle, moved by anyone.
#[derive(Debug)]
pub struct Activity {
    origin: Instant,
    origin_wall: SystemTime,
    last_millis: AtomicU64,
}

impl Activity {
    /// A clock that was touched now.
    #[must_use]
    pub fn new() -> Self {
        Self { origin: Instant::now(), origin_wall: SystemTime::now(), last_millis: AtomicU64::new(0) }
    }

    /// Something happened.
    pub fn touch(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_millis.fetch_max(now, Ordering::Relaxed);
    }

    /// When something last happened, as wall time.
    #[must_use]
    pub fn last_wall(&self) -> SystemTime {
        self.origin_wall + Duration::from_millis(self.last_millis.load(Ordering::Relaxed))
    }

    fn last(&self) -> Instant {
        self.origin + Duration::from_millis(self.last_millis.load(Ordering::Relaxed))
    }

    /// Waits until nothing has happened for `bound`; for ever when there is no bound.
    pub async fn expired(&self, bound: Option<Duration>) {
        let Some(bound) = bound else { return std::future::pending().await };
        loop {
            let deadline = self.last() + bound;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_touch_moves_the_end() {
        let activity = Activity::new();
        let begin = Instant::now();
        tokio::join!(activity.expired(Some(Duration::from_secs(10))), async {
            tokio::time::sleep(Duration::from_secs(7)).await;
            activity.touch();
        });
        assert_eq!(begin.elapsed().as_secs(), 17);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_bound_it_never_runs_out() {
        let activity = Activity::new();
        let waited = tokio::time::timeout(Duration::from_secs(1_000_000), activity.expired(None)).await;
        assert!(waited.is_err());
    }
}
