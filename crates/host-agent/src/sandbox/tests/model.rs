//! What may come of what is asked: pure.
//!
//! A sandbox is nothing, up with some content, or paused with some content. An answer of the agent says which
//! of two things is true: it was done, or it was not and all is as before. Without an answer, because the agent
//! was killed, either is.

use std::collections::{BTreeMap, BTreeSet};

use wrenn_types::{SandboxId, SnapshotId};

use crate::{
    sandbox::{Update, queue::WAITING_LIMIT},
    snapshots::Extent,
};

/// What was written last, as far as it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Content {
    /// Nought after a boot.
    pub(super) memory: u64,
    pub(super) disk: u64,
}

/// What a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    /// It is not there.
    Absent,
    /// It runs, and its memory and disk hold this.
    Up(Content),
    /// It is saved, and what is saved holds this.
    Paused(Content),
    /// Its disk alone is saved, and holds this.
    PausedDisk(u64),
}

impl State {
    /// What it holds once it runs; none where nothing is there.
    fn once_up(self) -> Option<Content> {
        match self {
            Self::Absent => None,
            Self::Up(content) | Self::Paused(content) => Some(content),
            Self::PausedDisk(disk) => Some(Content { memory: 0, disk }),
        }
    }
}

/// What is asked of one sandbox, in the order of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ask {
    Create,
    CreateFrom(SnapshotId),
    Pause(Extent),
    Resume,
    Snapshot(SnapshotId),
    Rollback(SnapshotId),
    Update(Box<Update>),
    Destroy,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    Done,
    Failed,
    /// It was not begun.
    Denied,
    /// The agent was killed.
    Nothing,
    /// It is not done after the time in which it has to be.
    Late,
}

/// A snapshot that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Saved {
    pub(super) content: Content,
    /// Whether it is known to be there: it is not when the agent was killed while it was made or deleted.
    pub(super) certain: bool,
}

/// What there may be.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) sandboxes: BTreeMap<SandboxId, BTreeSet<State>>,
    pub(super) snapshots: BTreeMap<SnapshotId, (SandboxId, Saved)>,
}

/// What goes wrong while something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Trouble {
    /// Something may fail.
    pub(super) any: bool,
    /// A machine may end.
    pub(super) deadly: bool,
}

impl Model {
    /// What is asked of a sandbox, one after the other, and what was told. `deleted` are the snapshots of which
    /// the end is asked for at the same time.
    pub(super) fn answered(
        &mut self,
        id: &SandboxId,
        asked: &[(Ask, Told)],
        trouble: Trouble,
        deleted: &BTreeSet<SnapshotId>,
    ) -> Result<(), String> {
        let mut states = self.sandboxes.get(id).cloned().unwrap_or_else(|| [State::Absent].into());
        // More than so many may be refused, whatever they are.
        let many = asked.len() > WAITING_LIMIT;
        let destroyed = asked.iter().any(|(ask, _)| *ask == Ask::Destroy);
        for (ask, told) in asked {
            let mut next = BTreeSet::new();
            for state in &states {
                let done = self.done(id, ask, *state, deleted);
                let excused = trouble.any || destroyed || (many && *told == Told::Denied);
                match told {
                    Told::Done => next.extend(done),
                    // What was asked for in vain changes nothing, and has a reason.
                    Told::Failed | Told::Denied if done.is_none() || excused => next.extend([*state]),
                    Told::Failed | Told::Denied if self.depends_on(ask, deleted) => next.extend([*state]),
                    Told::Failed | Told::Denied => {}
                    Told::Nothing => next.extend(done.into_iter().chain([*state])),
                    Told::Late => {}
                }
                // A create that did not come up is not there, and what has ended can be asked for nothing.
                if *told == Told::Denied && trouble.deadly {
                    next.insert(State::Absent);
                }
            }
            if let (Ask::Snapshot(into), Some(State::Up(content) | State::Paused(content))) =
                (ask, states.first())
            {
                let saved = Saved { content: *content, certain: *told == Told::Done };
                match told {
                    Told::Done | Told::Nothing => {
                        self.snapshots.insert(into.clone(), (id.clone(), saved));
                    }
                    Told::Failed | Told::Denied | Told::Late => {}
                }
            }
            if next.is_empty() {
                return Err(format!("{id} was {states:?}: {ask:?} cannot be {told:?}"));
            }
            states = next;
        }
        if trouble.deadly && states.iter().any(|state| matches!(state, State::Up(_))) {
            states.insert(State::Absent);
        }
        self.sandboxes.insert(id.clone(), states);
        Ok(())
    }

    /// What a sandbox is when it is done; none where it cannot be.
    fn done(&self, id: &SandboxId, ask: &Ask, state: State, deleted: &BTreeSet<SnapshotId>) -> Option<State> {
        let content = |of: Option<&SandboxId>, snapshot: &SnapshotId| {
            let (whose, saved) = self.snapshots.get(snapshot)?;
            let there = saved.certain || deleted.contains(snapshot);
            (there && of.is_none_or(|of| of == whose)).then_some(saved.content)
        };
        match (ask, state) {
            (Ask::Destroy, _) => Some(State::Absent),
            (Ask::Create, State::Absent) => Some(State::Up(Content::default())),
            (Ask::CreateFrom(from), State::Absent) => content(None, from).map(State::Up),
            (_, State::Absent) | (Ask::Create | Ask::CreateFrom(_), _) => None,
            (Ask::Pause(Extent::Machine), State::Up(content)) => Some(State::Paused(content)),
            (Ask::Pause(Extent::Disk), State::Up(content)) => Some(State::PausedDisk(content.disk)),
            // What is paused is so already, as whatever it was saved.
            (Ask::Pause(_), state) => Some(state),
            (Ask::Resume, state) => state.once_up().map(State::Up),
            (Ask::Rollback(to), _) => content(Some(id), to).map(State::Up),
            // What starts from a snapshot goes on: there is none of a disk alone.
            (Ask::Snapshot(_), State::PausedDisk(_)) => None,
            (Ask::Snapshot(_) | Ask::Update(_), state) => Some(state),
        }
    }

    /// Whether it needs a snapshot that may be gone by the time at which it is done.
    fn depends_on(&self, ask: &Ask, deleted: &BTreeSet<SnapshotId>) -> bool {
        matches!(ask, Ask::CreateFrom(of) | Ask::Rollback(of) if deleted.contains(of))
    }

    /// What was seen of a sandbox when nothing was under way: the content only of one that runs, and of one that is
    /// paused not as how much of it.
    pub(super) fn seen(&mut self, id: &SandboxId, seen: State) -> Result<(), String> {
        let states = self.sandboxes.get_mut(id).ok_or("nobody made it")?;
        let before = states.clone();
        states.retain(|state| match (state, seen) {
            (State::Paused(_) | State::PausedDisk(_), State::Paused(_)) => true,
            (state, seen) => *state == seen,
        });
        if states.is_empty() { Err(format!("{id} is {seen:?} and may be one of {before:?}")) } else { Ok(()) }
    }

    /// A long time in which nobody asks for anything: what each may be then.
    pub(super) fn slept(&mut self, then: impl Fn(&SandboxId, State) -> Vec<State>) {
        for (id, states) in &mut self.sandboxes {
            *states = states.iter().flat_map(|state| then(id, *state)).collect();
        }
    }
}
