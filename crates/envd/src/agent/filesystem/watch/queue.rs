//! Events that wait to be taken.
//!
//! What a client does not take in time takes memory of the guest, so there is a limit, for each watch and for all of them.
//! Beyond it events are dropped, and the client finds that out in the place where they would have been:
//!
//! ```text
//!  event  event  event  LOSS      then, once the loss was told, events again
//! ```

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;
use wrenn_proto::filesystem::{EntryInfo, EventType, FilesystemEvent};

use super::follower::Loss;

/// How many events of one watch may wait.
pub(super) const MAXIMUM_EVENTS: usize = 262_144;
/// How many bytes all events of all watches may take, about.
const MAXIMUM_BYTES: usize = 64 << 20;
/// What an event takes beside its texts.
const EVENT: usize = size_of::<Event>();

/// An event that waits. Small, because there may be many; a wire message has room for an entry, whether it has one or not.
#[derive(Debug, PartialEq)]
pub(super) struct Event {
    pub(super) name: Box<str>,
    pub(super) kind: EventType,
    pub(super) entry: Option<Box<EntryInfo>>,
}

/// What all queues take together.
#[derive(Debug, Default)]
pub(super) struct Budget(AtomicUsize);

/// What comes next.
#[derive(Debug)]
pub(super) enum Item {
    Event(Event),
    Lost(Loss),
    Ended,
}

#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
    budget: Arc<Budget>,
    maximum: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    bytes: usize,
    loss: Option<Loss>,
    ended: bool,
}

impl Queue {
    pub(super) fn new(budget: Arc<Budget>, maximum: usize) -> Self {
        Self { waiting: Mutex::default(), changed: Notify::new(), budget, maximum }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: Event) {
        let mut waiting = self.waiting();
        if waiting.loss.is_some() || waiting.ended {
            return;
        }
        let bytes = size(&event);
        let all = self.budget.0.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if waiting.events.len() >= self.maximum || all > MAXIMUM_BYTES {
            self.budget.0.fetch_sub(bytes, Ordering::Relaxed);
            waiting.loss = Some(Loss::Slow);
        } else {
            waiting.bytes += bytes;
            waiting.events.push_back(event);
        }
        self.changed.notify_one();
    }

    pub(super) fn lose(&self, loss: Loss) {
        let mut waiting = self.waiting();
        if !waiting.ended {
            waiting.loss.get_or_insert(loss);
            self.changed.notify_one();
        }
    }

    pub(super) fn end(&self) {
        self.waiting().ended = true;
        self.changed.notify_one();
    }

    /// Takes every event up to a loss; with none before it, the loss.
    pub(super) fn take_all(&self) -> Result<VecDeque<Event>, Loss> {
        let mut waiting = self.waiting();
        if waiting.events.is_empty()
            && let Some(loss) = waiting.loss.take()
        {
            return Err(loss);
        }
        self.budget.0.fetch_sub(std::mem::take(&mut waiting.bytes), Ordering::Relaxed);
        Ok(std::mem::take(&mut waiting.events))
    }

    /// Waits for what comes next. Only one may wait.
    pub(super) async fn next(&self) -> Item {
        loop {
            let changed = self.changed.notified();
            if let Some(item) = self.pop() {
                return item;
            }
            changed.await;
        }
    }

    fn pop(&self) -> Option<Item> {
        let mut waiting = self.waiting();
        if let Some(event) = waiting.events.pop_front() {
            let bytes = size(&event);
            waiting.bytes -= bytes;
            self.budget.0.fetch_sub(bytes, Ordering::Relaxed);
            return Some(Item::Event(event));
        }
        match waiting.loss.take() {
            Some(loss) => Some(Item::Lost(loss)),
            None => waiting.ended.then_some(Item::Ended),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.waiting().bytes, Ordering::Relaxed);
    }
}

/// About how much memory an event takes.
fn size(event: &Event) -> usize {
    let entry = event.entry.as_ref().map_or(0, |entry| {
        let texts = [&entry.name, &entry.path, &entry.permissions, &entry.owner, &entry.group];
        let metadata: usize = entry.metadata.iter().map(|(key, value)| 64 + key.len() + value.len()).sum();
        size_of::<EntryInfo>() + texts.map(String::len).iter().sum::<usize>() + metadata
    });
    EVENT + event.name.len() + entry
}

impl From<Event> for FilesystemEvent {
    fn from(event: Event) -> Self {
        Self {
            name: event.name.into(),
            r#type: event.kind.into(),
            entry: event.entry.map(|entry| *entry).into(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(number: usize) -> Event {
        Event { name: number.to_string().into(), kind: EventType::EVENT_TYPE_WRITE, entry: None }
    }

    #[test]
    fn all_watches_share_one_budget() {
        let budget = Arc::new(Budget::default());
        let (one, other) = (Queue::new(Arc::clone(&budget), 10), Queue::new(Arc::clone(&budget), 10));
        budget.0.store(MAXIMUM_BYTES - EVENT - 1, Ordering::Relaxed);
        one.push(event(1));
        other.push(event(2));
        assert_eq!(other.take_all(), Err(Loss::Slow));
        assert_eq!(one.take_all().unwrap().len(), 1);
        other.push(event(3));
        assert_eq!(other.take_all().unwrap().len(), 1);
        one.push(event(4));
        drop((one, other));
        assert_eq!(budget.0.load(Ordering::Relaxed), MAXIMUM_BYTES - EVENT - 1);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push,
        Lose,
        TakeAll,
        Pop,
    }

    proptest! {
        /// Events are taken in the order in which they were put, and between two that do not follow each other a loss is told.
        #[test]
        fn no_gap_is_silent(steps in prop::collection::vec(prop_oneof![
            6 => Just(Step::Push), 1 => Just(Step::Lose), 1 => Just(Step::TakeAll), 2 => Just(Step::Pop)
        ], 0..100)) {
            let budget = Arc::new(Budget::default());
            let queue = Queue::new(Arc::clone(&budget), 5);
            let (mut pushed, mut next, mut told) = (0, 0, false);
            let mut seen = |item: Item| {
                match item {
                    Item::Event(event) => {
                        let number: usize = event.name.parse().unwrap();
                        assert!(number == next || (told && number > next), "{number} after {next}");
                        (next, told) = (number + 1, false);
                    }
                    Item::Lost(_) => told = true,
                    Item::Ended => unreachable!(),
                }
            };
            for step in steps {
                match step {
                    Step::Push => {
                        queue.push(event(pushed));
                        pushed += 1;
                    }
                    Step::Lose => queue.lose(Loss::Kernel),
                    Step::TakeAll => match queue.take_all() {
                        Ok(events) => events.into_iter().map(Item::Event).for_each(&mut seen),
                        Err(loss) => seen(Item::Lost(loss)),
                    },
                    Step::Pop => if let Some(item) = queue.pop() { seen(item) },
                }
                prop_assert!(queue.waiting().events.len() <= 5);
            }
            drop(queue);
            prop_assert_eq!(budget.0.load(Ordering::Relaxed), 0);
        }
    }
}
