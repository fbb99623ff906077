//! What may be asked of a sandbox, and when: a pure policy without any synchronisation of its own.
//!
//! A request is *enqueued*, *ignored* because it asks for what is already under way, or *denied* with a
//! reason that a person can read. [`admit`] does the same for a create of an id that may exist.
//!
//! The driver takes requests out one at a time and tells the queue what became true.

use wrenn_types::EndReason;

use super::Stage;

/// What can be asked of a sandbox that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Take it down. A bring-up that is under way is cancelled.
    Destroy {
        /// Why.
        reason: EndReason,
        /// The generation of the asker; none for the agent itself.
        generation: Option<u64>,
    },
}

/// What became of a request that was not denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// The driver will do it.
    Enqueued,
    /// It is already being done, or is done.
    Ignored,
}

/// Why a request was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The asker has an older view of the sandbox than the agent.
    #[error("the request is of generation {asked}, and the sandbox is of generation {current}")]
    Stale {
        /// The generation of the request.
        asked: u64,
        /// The generation that the agent knows.
        current: u64,
    },
    /// The id is taken by a sandbox that has ended.
    #[error("a sandbox of this id has already ended")]
    Ended,
}

/// The requests of one sandbox. At most one is ever waiting: the only request ends the sandbox.
#[derive(Debug)]
pub struct RequestQueue {
    generation: u64,
    ending: bool,
    waiting: Option<EndReason>,
}

impl RequestQueue {
    /// The queue of a sandbox that is being brought up.
    #[must_use]
    pub fn new(generation: u64) -> Self {
        Self { generation, ending: false, waiting: None }
    }

    /// Decides about a request.
    ///
    /// # Errors
    /// [`Denied::Stale`] when the asker's generation is older than the sandbox's.
    pub fn put(&mut self, request: Request) -> Result<Queued, Denied> {
        let Request::Destroy { reason, generation } = request;
        if let Some(asked) = generation
            && asked < self.generation
        {
            return Err(Denied::Stale { asked, current: self.generation });
        }
        if self.ending {
            return Ok(Queued::Ignored);
        }
        self.ending = true;
        self.waiting = Some(reason);
        Ok(Queued::Enqueued)
    }

    /// The next request for the driver.
    pub fn take(&mut self) -> Option<EndReason> {
        self.waiting.take()
    }

    /// The sandbox is ending by itself: whatever waits is moot, and what comes is ignored.
    pub fn ended(&mut self) {
        self.ending = true;
        self.waiting = None;
    }
}

/// What to do with a create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Make it.
    Start,
    /// It exists, or is being made: answer with that one.
    Join,
    /// The record of an ended one may make way.
    Replace,
}

/// Decides about a create of `asked` generation, given what exists of that id.
///
/// # Errors
/// [`Denied::Stale`] for an older generation, [`Denied::Ended`] for the same generation of a sandbox that
/// has ended: a repeated create must not bring back what was destroyed.
pub fn admit(existing: Option<(u64, Stage)>, asked: u64) -> Result<Admission, Denied> {
    match existing {
        None => Ok(Admission::Start),
        Some((current, _)) if asked < current => Err(Denied::Stale { asked, current }),
        Some((current, Stage::Stopped)) if asked > current => Ok(Admission::Replace),
        Some((_, Stage::Stopped | Stage::Stopping)) => Err(Denied::Ended),
        Some((current, _)) if asked == current => Ok(Admission::Join),
        Some((current, _)) => Err(Denied::Stale { asked, current }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn destroy(generation: u64) -> Request {
        Request::Destroy { reason: EndReason::Requested, generation: Some(generation) }
    }

    #[test]
    fn a_destroy_is_done_once() {
        let mut queue = RequestQueue::new(1);
        assert_eq!(queue.put(destroy(1)), Ok(Queued::Enqueued));
        assert_eq!(queue.put(destroy(1)), Ok(Queued::Ignored));
        assert_eq!(queue.take(), Some(EndReason::Requested));
        assert_eq!(queue.take(), None);
        assert_eq!(queue.put(destroy(2)), Ok(Queued::Ignored));
    }

    #[test]
    fn an_older_generation_is_refused() {
        let mut queue = RequestQueue::new(5);
        assert_eq!(queue.put(destroy(4)), Err(Denied::Stale { asked: 4, current: 5 }));
        assert_eq!(queue.take(), None);
    }

    #[test]
    fn creates() {
        assert_eq!(admit(None, 1), Ok(Admission::Start));
        assert_eq!(admit(Some((1, Stage::Starting)), 1), Ok(Admission::Join));
        assert_eq!(admit(Some((1, Stage::Running)), 1), Ok(Admission::Join));
        assert_eq!(admit(Some((1, Stage::Stopped)), 1), Err(Denied::Ended));
        assert_eq!(admit(Some((1, Stage::Stopped)), 2), Ok(Admission::Replace));
        assert_eq!(admit(Some((2, Stage::Stopped)), 1), Err(Denied::Stale { asked: 1, current: 2 }));
        assert_eq!(admit(Some((1, Stage::Running)), 2), Err(Denied::Stale { asked: 2, current: 1 }));
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Put(Option<u64>),
        Take,
        Ended,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            proptest::option::of(0_u64..4).prop_map(Step::Put),
            Just(Step::Take),
            Just(Step::Ended),
        ];
        proptest::collection::vec(step, 0..40)
    }

    proptest! {
        /// Against the smallest model there is: at most one request is ever handed to the driver, it is one
        /// that was enqueued, and nothing is handed out after the end.
        #[test]
        fn at_most_one_request_reaches_the_driver(steps in steps()) {
            let mut queue = RequestQueue::new(2);
            let (mut enqueued, mut taken, mut ended) = (0, 0, false);
            for step in steps {
                match step {
                    Step::Put(generation) => {
                        let verdict = queue.put(Request::Destroy { reason: EndReason::Requested, generation });
                        let stale = generation.is_some_and(|generation| generation < 2);
                        prop_assert_eq!(verdict.is_err(), stale);
                        if verdict == Ok(Queued::Enqueued) {
                            prop_assert!(!ended && enqueued == 0);
                            enqueued += 1;
                        }
                    }
                    Step::Take => {
                        if queue.take().is_some() {
                            prop_assert!(!ended);
                            taken += 1;
                        }
                    }
                    Step::Ended => {
                        queue.ended();
                        ended = true;
                    }
                }
                prop_assert!(taken <= enqueued && enqueued <= 1);
            }
        }
    }
}
