//! The processes that run, and for a while those that have ended.
//!
//! A client that connects a moment after the end still gets `start` and `end`, so ended processes are kept, the
//! last [`KEPT`] of them and none longer than [`KEPT_FOR`]. The kernel uses process numbers again, so a number
//! means the process that runs with it, else the one that ended last with it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{memory::Kills, running::Process};

/// How many processes may run at once.
pub(crate) const MAXIMUM: usize = 4096;
const KEPT: usize = 256;
const KEPT_FOR: Duration = Duration::from_secs(60);

/// How a client names a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selector {
    Pid(u32),
    Tag(String),
}

impl std::fmt::Display for Selector {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(formatter, "process with pid {pid}"),
            Self::Tag(tag) => write!(formatter, "process with tag {tag}"),
        }
    }
}

/// All processes.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    tables: Mutex<Tables>,
    pub(crate) kills: Kills,
}

#[derive(Debug, Default)]
struct Tables {
    running: HashMap<u32, Arc<Process>>,
    ended: VecDeque<(Instant, Arc<Process>)>,
}

impl Registry {
    /// Whether one more may start.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().running.len() < MAXIMUM
    }

    /// Leaves no room, as so many processes would.
    #[cfg(test)]
    pub(super) fn fill(&self, process: &Arc<Process>) {
        // Numbers that no process has.
        let numbers = (1 << 31)..;
        let mut tables = self.lock();
        for number in numbers.take(MAXIMUM - tables.running.len()) {
            tables.running.insert(number, Arc::clone(process));
        }
    }

    pub(crate) fn add(&self, process: &Arc<Process>) {
        self.lock().running.insert(process.pid(), Arc::clone(process));
    }

    /// Moves a process to the ended ones. Its number may belong to another one by now.
    pub(crate) fn end(&self, process: &Arc<Process>) {
        let mut tables = self.lock();
        let pid = process.pid();
        if tables.running.get(&pid).is_some_and(|running| Arc::ptr_eq(running, process)) {
            tables.running.remove(&pid);
        }
        let now = Instant::now();
        tables.ended.push_back((now, Arc::clone(process)));
        let too_old = |at: Instant| now.saturating_duration_since(at) > KEPT_FOR;
        while tables.ended.len() > KEPT || tables.ended.front().is_some_and(|(at, _)| too_old(*at)) {
            tables.ended.pop_front();
        }
    }

    /// The process that runs and is named so; the newest one, if a tag was used twice.
    pub(crate) fn running(&self, selector: &Selector) -> Option<Arc<Process>> {
        let tables = self.lock();
        match selector {
            Selector::Pid(pid) => tables.running.get(pid).cloned(),
            Selector::Tag(tag) => {
                let named = tables.running.values().filter(|process| process.tag() == Some(tag));
                named.max_by_key(|process| process.started()).cloned()
            }
        }
    }

    /// As [`Registry::running`], and also those that ended a short while ago.
    pub(crate) fn any(&self, selector: &Selector) -> Option<Arc<Process>> {
        self.running(selector).or_else(|| {
            let tables = self.lock();
            let named = |process: &Process| match selector {
                Selector::Pid(pid) => process.pid() == *pid,
                Selector::Tag(tag) => process.tag() == Some(tag),
            };
            let fresh = tables.ended.iter().rev().filter(|(at, _)| at.elapsed() <= KEPT_FOR);
            fresh.map(|(_, process)| process).find(|process| named(process)).cloned()
        })
    }

    /// Everything that runs, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<Process>> {
        let mut list: Vec<_> = self.lock().running.values().cloned().collect();
        list.sort_by_key(|process| process.started());
        list
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
