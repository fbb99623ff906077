//! The guest that is not there: it counts the time in which it was not paused.

use std::{
    fmt::Write as _,
    hash::{DefaultHasher, Hash, Hasher},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use wrenn_types::Shape;

use super::memory::{Memory, Word};
use crate::ExitReason;

/// The pages in which it keeps what it looks after.
pub(super) const GUEST_PAGES: [u64; 2] = [1, 2];
const TICK: Duration = Duration::from_millis(10);
/// How many lines of the console are kept.
const LINES: u64 = 500;

/// What a snapshot holds of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) token: String,
    pub(super) ticks: u64,
    pub(super) shape: Shape,
    pub(super) guest: String,
}

#[derive(Debug)]
pub(super) struct Guest {
    token: String,
    /// The ticks up to the last pause.
    ticks: u64,
    running_since: Option<Instant>,
    /// The first tick that this machine's console shows.
    first_tick: u64,
    announces: bool,
    /// Whether its memory held what it had written there whenever it looked.
    intact: bool,
}

impl Guest {
    pub(super) fn booted() -> Self {
        static BOOTS: AtomicU64 = AtomicU64::new(0);
        let boot = BOOTS.fetch_add(1, Ordering::Relaxed);
        Self {
            token: format!("{}x{boot}", std::process::id()),
            ticks: 0,
            running_since: Some(Instant::now()),
            first_tick: 1,
            announces: true,
            intact: true,
        }
    }

    /// It looks at once whether its memory is what it was when it was saved.
    pub(super) fn restored(saved: &Saved, memory: &Memory) -> Self {
        let mut guest = Self {
            token: saved.token.clone(),
            ticks: saved.ticks,
            running_since: None,
            first_tick: saved.ticks + 1,
            announces: false,
            intact: true,
        };
        guest.intact = guest.held().iter().all(|(page, word)| memory.read(*page) == *word);
        guest
    }

    /// Stops it, with all in memory that it has written.
    pub(super) fn pause(&mut self, memory: &mut Memory) {
        if self.running_since.is_some() {
            self.ticks = self.now();
            self.running_since = None;
            self.held().iter().for_each(|(page, word)| memory.write(*page, *word));
        }
    }

    /// What it has in memory: at each tick one of its two pages is new, and the other one becomes zero.
    fn held(&self) -> [(u64, Word); 2] {
        let mut hash = DefaultHasher::new();
        (&self.token, self.ticks).hash(&mut hash);
        let word = hash.finish() | 1;
        let [first, second] = GUEST_PAGES;
        if self.ticks.is_multiple_of(2) { [(first, word), (second, 0)] } else { [(first, 0), (second, word)] }
    }

    pub(super) fn resume(&mut self) {
        self.running_since.get_or_insert_with(Instant::now);
    }

    pub(super) fn is_running(&self) -> bool {
        self.running_since.is_some()
    }

    pub(super) fn save(&self, shape: Shape, guest: String) -> Saved {
        Saved { token: self.token.clone(), ticks: self.now(), shape, guest }
    }

    fn now(&self) -> u64 {
        let since = self.running_since.map(|since| since.elapsed()).unwrap_or_default();
        self.ticks + u64::try_from(since.as_nanos() / TICK.as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn console(&self) -> String {
        let mut text = String::new();
        if self.announces {
            text.push_str("wrenn-guest ready\n");
        }
        let now = self.now();
        for tick in self.first_tick.max(now.saturating_sub(LINES))..=now {
            // Writing into a string does not fail.
            let _ = writeln!(text, "tick {} {tick} {}", self.token, if self.intact { "ok" } else { "BAD" });
        }
        text
    }
}

/// How a guest with these kernel arguments ends by itself, if it does.
pub(super) fn own_end(kernel_arguments: &[String]) -> Option<ExitReason> {
    kernel_arguments.iter().find_map(|word| match word.strip_prefix("conformance=")? {
        "poweroff" | "reboot" => Some(ExitReason::GuestShutdown),
        "panic" => Some(ExitReason::GuestPanic),
        _ => None,
    })
}
