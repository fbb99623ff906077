//! Waiting no longer than a bound for a thread that waits for the disk, and that cannot be called back.
//!
//! What only looks, or does what does no harm when it is done later, is waited for with [`within`]: the thread goes on,
//! and what it answers is nobody's. What is to be done or not, and then stays so, has a [`Fate`]:
//!
//! ```text
//!  thread:  … all that takes time ─► may it? ──► done: the last step, which takes none
//!  waiter:  … bound ──► given up? ─► the thread takes away what it has made, or leaves it as it was
//! ```
//!
//! Whichever asks first decides. So nobody is told that something was not done who finds it done later.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;

use crate::warm::blocking;

const OPEN: u8 = 0;
const KEPT: u8 = 1;
const GIVEN_UP: u8 = 2;

/// Whether something that a thread does is to be. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fate(Arc<AtomicU8>);

impl Fate {
    /// Asked by the thread before the last step: whether it may.
    pub(crate) fn keep(&self) -> bool {
        self.decide(KEPT)
    }

    /// Asked by who waits no longer: whether it is given up now.
    pub(crate) fn give_up(&self) -> bool {
        self.decide(GIVEN_UP)
    }

    fn decide(&self, fate: u8) -> bool {
        match self.0.compare_exchange(OPEN, fate, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(decided) => decided == fate,
        }
    }
}

/// It took longer than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overdue(pub(crate) Duration);

/// Runs `work` on a thread that may wait for the disk.
///
/// # Errors
/// It is under way, and its answer will be dropped.
pub(crate) async fn within<T: Send + 'static>(
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Overdue> {
    timeout(bound, blocking(work)).await.map_err(|_| Overdue(bound))
}

/// The same, where `work` asks `fate` before its last step.
///
/// # Errors
/// It is given up, and `work` will find that.
pub(crate) async fn decided_within<T: Send + 'static>(
    bound: Duration,
    fate: &Fate,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Overdue> {
    let mut done = std::pin::pin!(blocking(work));
    match timeout(bound, &mut done).await {
        Ok(done) => Ok(done),
        Err(_) if fate.give_up() => Err(Overdue(bound)),
        // It was decided a moment ago.
        Err(_) => Ok(done.await),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);

    proptest! {
        /// Whoever asks first decides, and everybody is told the same.
        #[test]
        fn one_decides(asks in prop::collection::vec(prop::sample::select(vec![KEPT, GIVEN_UP]), 1..6)) {
            let fate = Fate::default();
            for ask in &asks {
                prop_assert_eq!(fate.clone().decide(*ask), *ask == asks[0]);
            }
        }
    }

    #[tokio::test]
    async fn what_is_given_up_is_told_so_and_what_was_decided_is_waited_for() {
        let fate = Fate::default();
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let asks = fate.clone();
        let done = decided_within(MOMENT, &fate, move || {
            released.recv().unwrap();
            tell.send(asks.keep()).unwrap();
        });
        assert_eq!(done.await, Err(Overdue(MOMENT)));
        release.send(()).unwrap();
        assert!(!told.recv().unwrap(), "the thread may not any more");

        let fate = Fate::default();
        assert!(fate.keep());
        let (release, released) = mpsc::channel::<()>();
        let waits = decided_within(MOMENT, &fate, move || released.recv().is_ok());
        let lets_go = async {
            tokio::time::sleep(2 * MOMENT).await;
            release.send(()).unwrap();
        };
        assert_eq!(tokio::join!(waits, lets_go).0, Ok(true));
    }

    #[tokio::test]
    async fn what_only_looks_is_waited_for_no_longer_than_its_bound() {
        let (release, released) = mpsc::channel::<()>();
        assert_eq!(within(MOMENT, move || released.recv().is_ok()).await, Err(Overdue(MOMENT)));
        release.send(()).unwrap();
        assert_eq!(within(Duration::from_secs(60), || 7).await, Ok(7));
    }
}
