//! What may be asked of a sandbox, and when: a pure policy without any synchronisation of its own.
//!
//! A request is *enqueued*, *joined* to one that asks for the same and is not done yet, or *denied* with a
//! reason that a person can read. [`admit`] does the same for a create of an id that may exist.
//!
//! ```text
//!  put ──► waiting … waiting ──take──► under way ──done──► its replies
//!   │                  ▲                   │ same request again: joins
//!   └── destroy ───────┴─ overtakes all; what waits is moot, what is under way is told to stop
//! ```
//!
//! The queue does not judge whether a request makes sense in the state in which it will be taken: that is not
//! known before. The driver does, when it takes it: a pause of what is paused is done at once.
//!
//! `R` is whatever an answer is given to; the queue only keeps it.

use std::collections::VecDeque;

use wrenn_types::{EndReason, InactivityTimeout, SnapshotId};

use super::{Stage, Update};
use crate::snapshots::Extent;

/// How many requests may wait. People and programs that ask for more at once have lost count.
pub const WAITING_LIMIT: usize = 16;

/// What can be asked of a sandbox that exists, but its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verb {
    /// Save it, or so much of it, and end its machine.
    Pause(Extent),
    /// Bring it back.
    Resume {
        /// A new bound of its inactivity, if any.
        timeout: Option<InactivityTimeout>,
    },
    /// Save it, and let it go on.
    Snapshot {
        /// The name of what is saved.
        into: SnapshotId,
    },
    /// Put it back to what was saved.
    Rollback {
        /// The name of what was saved.
        to: SnapshotId,
    },
    /// Change what it is allowed or when it ends.
    Update(Box<Update>),
}

/// What became of a request that was not denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// The driver will do it.
    Enqueued,
    /// It is answered with one that was asked for before.
    Joined,
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
    /// The sandbox has ended, or is about to.
    #[error("the sandbox has ended")]
    Ended,
    /// Too much waits already.
    #[error("{WAITING_LIMIT} requests wait already; ask again when they are done")]
    Busy,
}

/// What the driver is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Take it down.
    End(EndReason),
    /// Let go of it as it is: the next agent takes it over.
    Leave,
    /// Do this, and say [`RequestQueue::done`].
    Do(Verb),
}

#[derive(Debug)]
struct Operation<R> {
    verb: Verb,
    replies: Vec<R>,
}

/// The requests of one sandbox.
#[derive(Debug)]
pub struct RequestQueue<R> {
    generation: u64,
    ending: bool,
    end: Option<EndReason>,
    leaving: bool,
    waiting: VecDeque<Operation<R>>,
    under_way: Option<Operation<R>>,
}

impl<R> RequestQueue<R> {
    /// The queue of a sandbox of this generation.
    #[must_use]
    pub fn new(generation: u64) -> Self {
        Self {
            generation,
            ending: false,
            end: None,
            leaving: false,
            waiting: VecDeque::new(),
            under_way: None,
        }
    }

    /// The newest generation that was accepted.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn accept(&mut self, asked: Option<u64>) -> Result<(), Denied> {
        match asked {
            Some(asked) if asked < self.generation => Err(Denied::Stale { asked, current: self.generation }),
            Some(asked) => {
                self.generation = asked;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Decides about a request; `generation` is none for the agent's own. The reply comes back with a denial.
    ///
    /// # Errors
    /// [`Denied::Stale`] when the asker's generation is older than the sandbox's.
    pub fn put(&mut self, verb: Verb, generation: Option<u64>, reply: R) -> Result<Queued, (Denied, R)> {
        if self.ending {
            return Err((Denied::Ended, reply));
        }
        if let Err(denied) = self.accept(generation) {
            return Err((denied, reply));
        }
        // Only the last one may be joined: what comes after another would happen before it.
        let last = self.waiting.back_mut().or(self.under_way.as_mut());
        if let Some(last) = last
            && last.verb == verb
        {
            last.replies.push(reply);
            return Ok(Queued::Joined);
        }
        if self.waiting.len() >= WAITING_LIMIT {
            return Err((Denied::Busy, reply));
        }
        self.waiting.push_back(Operation { verb, replies: vec![reply] });
        Ok(Queued::Enqueued)
    }

    /// Asks for the end. What waits is moot: its replies come back.
    ///
    /// # Errors
    /// [`Denied::Stale`] when the asker's generation is older than the sandbox's.
    pub fn destroy(&mut self, reason: EndReason, generation: Option<u64>) -> Result<Vec<R>, Denied> {
        self.accept(generation)?;
        if !self.ending {
            self.ending = true;
            self.end = Some(reason);
        }
        Ok(self.waiting.drain(..).flat_map(|operation| operation.replies).collect())
    }

    /// The agent is about to end, and the sandbox is not: what is under way is done, and nothing after it. What
    /// waits is moot: its replies come back.
    pub fn leave(&mut self) -> Vec<R> {
        self.leaving = true;
        self.ending = true;
        self.waiting.drain(..).flat_map(|operation| operation.replies).collect()
    }

    /// The end that was asked for and has not been taken yet.
    #[must_use]
    pub fn end_wanted(&self) -> Option<EndReason> {
        self.end
    }

    /// The next thing for the driver. Nothing is taken while something is under way, but the end.
    pub fn take(&mut self) -> Option<Next> {
        if let Some(reason) = self.end.take() {
            return Some(Next::End(reason));
        }
        if self.under_way.is_some() {
            return None;
        }
        if self.leaving {
            return Some(Next::Leave);
        }
        let operation = self.waiting.pop_front()?;
        let verb = operation.verb.clone();
        self.under_way = Some(operation);
        Some(Next::Do(verb))
    }

    /// Whether a snapshot of this id is being made, or is to be made.
    #[must_use]
    pub fn makes(&self, id: &SnapshotId) -> bool {
        self.under_way
            .iter()
            .chain(&self.waiting)
            .any(|operation| matches!(&operation.verb, Verb::Snapshot { into } if into == id))
    }

    /// What was under way is over: those who wait for its outcome.
    pub fn done(&mut self) -> Vec<R> {
        self.under_way.take().map(|operation| operation.replies).unwrap_or_default()
    }

    /// The sandbox is ending by itself: whatever waits is moot, and nothing more is accepted. All replies come
    /// back.
    pub fn ended(&mut self) -> Vec<R> {
        self.ending = true;
        self.end = None;
        let mut replies = self.done();
        replies.extend(self.waiting.drain(..).flat_map(|operation| operation.replies));
        replies
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

    #[test]
    fn a_destroy_is_done_once_and_overtakes() {
        let mut queue = RequestQueue::new(1);
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), Some(1), 'a'), Ok(Queued::Enqueued));
        assert_eq!(queue.take(), Some(Next::Do(Verb::Pause(Extent::Machine))));
        assert_eq!(queue.put(Verb::Resume { timeout: None }, Some(2), 'b'), Ok(Queued::Enqueued));
        assert_eq!(queue.destroy(EndReason::Requested, Some(3)), Ok(vec!['b']));
        assert_eq!(queue.destroy(EndReason::Requested, Some(3)), Ok(vec![]));
        assert_eq!(queue.end_wanted(), Some(EndReason::Requested));
        assert_eq!(queue.take(), Some(Next::End(EndReason::Requested)));
        assert_eq!(queue.take(), None);
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), Some(4), 'c'), Err((Denied::Ended, 'c')));
        assert_eq!(queue.done(), vec!['a']);
    }

    #[test]
    fn the_same_again_is_joined_but_never_past_another() {
        let mut queue = RequestQueue::new(1);
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), None, 1), Ok(Queued::Enqueued));
        assert_eq!(queue.take(), Some(Next::Do(Verb::Pause(Extent::Machine))));
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), None, 2), Ok(Queued::Joined));
        assert_eq!(queue.put(Verb::Resume { timeout: None }, None, 3), Ok(Queued::Enqueued));
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), None, 4), Ok(Queued::Enqueued));
        assert_eq!(queue.take(), None, "one at a time");
        assert_eq!(queue.done(), vec![1, 2]);
    }

    #[test]
    fn what_is_under_way_is_done_before_the_agent_leaves() {
        let mut queue = RequestQueue::new(1);
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), None, 1), Ok(Queued::Enqueued));
        assert_eq!(queue.take(), Some(Next::Do(Verb::Pause(Extent::Machine))));
        assert_eq!(queue.leave(), Vec::<i32>::new());
        assert_eq!(queue.put(Verb::Resume { timeout: None }, None, 2), Err((Denied::Ended, 2)));
        assert_eq!(queue.take(), None);
        assert_eq!(queue.done(), vec![1]);
        assert_eq!(queue.take(), Some(Next::Leave));
    }

    #[test]
    fn an_older_generation_is_refused() {
        let mut queue = RequestQueue::new(5);
        let stale = Denied::Stale { asked: 4, current: 5 };
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), Some(4), ()), Err((stale, ())));
        assert_eq!(queue.destroy(EndReason::Requested, Some(4)), Err(stale));
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), Some(7), ()), Ok(Queued::Enqueued));
        assert_eq!(queue.generation(), 7);
    }

    #[test]
    fn what_is_to_be_made_is_known_until_it_is() {
        let mut queue = RequestQueue::new(1);
        let id = SnapshotId::random();
        assert!(!queue.makes(&id));
        assert_eq!(queue.put(Verb::Snapshot { into: id.clone() }, None, ()), Ok(Queued::Enqueued));
        assert!(queue.makes(&id) && !queue.makes(&SnapshotId::random()));
        assert!(queue.take().is_some() && queue.makes(&id));
        queue.done();
        assert!(!queue.makes(&id));
    }

    #[test]
    fn only_so_many_wait() {
        let mut queue = RequestQueue::new(1);
        for number in 0..WAITING_LIMIT {
            let verb = Verb::Snapshot { into: SnapshotId::random() };
            assert_eq!(queue.put(verb, None, number), Ok(Queued::Enqueued));
        }
        assert_eq!(queue.put(Verb::Pause(Extent::Machine), None, 99), Err((Denied::Busy, 99)));
        assert_eq!(queue.ended(), (0..WAITING_LIMIT).collect::<Vec<_>>());
    }

    #[test]
    fn creates() {
        assert_eq!(admit(None, 1), Ok(Admission::Start));
        assert_eq!(admit(Some((1, Stage::Starting)), 1), Ok(Admission::Join));
        assert_eq!(admit(Some((1, Stage::Paused)), 1), Ok(Admission::Join));
        assert_eq!(admit(Some((1, Stage::Stopped)), 1), Err(Denied::Ended));
        assert_eq!(admit(Some((1, Stage::Stopped)), 2), Ok(Admission::Replace));
        assert_eq!(admit(Some((2, Stage::Stopped)), 1), Err(Denied::Stale { asked: 1, current: 2 }));
        assert_eq!(admit(Some((1, Stage::Running)), 2), Err(Denied::Stale { asked: 2, current: 1 }));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(Verb, Option<u64>),
        Destroy(Option<u64>),
        Take,
        Done,
        Ended,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let verb = prop_oneof![Just(Verb::Pause(Extent::Machine)), Just(Verb::Resume { timeout: None })];
        let generation = proptest::option::of(0_u64..4);
        let step = prop_oneof![
            6 => (verb, generation.clone()).prop_map(|(verb, generation)| Step::Put(verb, generation)),
            1 => generation.prop_map(Step::Destroy),
            4 => Just(Step::Take),
            4 => Just(Step::Done),
            1 => Just(Step::Ended),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        /// Every reply that was accepted comes back exactly once, verbs are done in the order in which they were
        /// enqueued, one at a time, and nothing is handed out after the end.
        #[test]
        fn every_request_is_answered_once(steps in steps()) {
            let mut queue = RequestQueue::new(2);
            let (mut given, mut back) = (Vec::new(), Vec::new());
            let (mut enqueued, mut taken) = (Vec::new(), Vec::new());
            let (mut under_way, mut over) = (false, false);
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Put(verb, generation) => match queue.put(verb.clone(), generation, number) {
                        Ok(queued) => {
                            prop_assert!(!over);
                            given.push(number);
                            if queued == Queued::Enqueued {
                                enqueued.push(verb);
                            }
                        }
                        Err((denied, reply)) => {
                            prop_assert_eq!(reply, number);
                            prop_assert!(over || denied != Denied::Ended);
                        }
                    },
                    Step::Destroy(generation) => if let Ok(moot) = queue.destroy(EndReason::Requested, generation) {
                        over = true;
                        back.extend(moot);
                    },
                    Step::Take => match queue.take() {
                        Some(Next::Do(verb)) => {
                            prop_assert!(!under_way && !over);
                            under_way = true;
                            taken.push(verb);
                        }
                        Some(Next::End(_) | Next::Leave) => prop_assert!(over),
                        None => {}
                    },
                    Step::Done => {
                        back.extend(queue.done());
                        under_way = false;
                    }
                    Step::Ended => {
                        back.extend(queue.ended());
                        (over, under_way) = (true, false);
                    }
                }
            }
            back.extend(queue.ended());
            back.sort_unstable();
            prop_assert_eq!(back, given);
            prop_assert!(enqueued.starts_with(&taken));
        }
    }
}
