//! What sandboxes use of their host, over time.
//!
//! ```text
//!  sampler: one task for all, every 500 ms
//!    │  /proc/PID of the VMM · /proc/net/dev of the uplink · blocks of the layers (every 10 s)
//!    ▼
//!  meter (counters ─► rates) ─► series (three resolutions) ─► GetSandboxMetrics
//!                         │                  └─ files: every 5 min, at a pause, at the agent's end
//!                         └─► totals ─► exposition (`GET /metrics` on a socket of its own)
//! ```
//!
//! - [`series`], [`meter`]: pure.
//! - [`sampler`]: the task, which is the only writer of what is here and of the files.
//! - [`operations`]: how many creates, pauses, … there were, and how long they took.
//! - [`exposition`], [`endpoint`]: all of it as text, for Prometheus.
//!
//! Everything is measured from the outside. A guest is not asked: it may say anything, and to ask a thousand guests
//! twice a second would cost more than they do themselves.
//!
//! A paused sandbox keeps its series, and there are no points for the time in which it did not run. With a sandbox
//! its series goes.

pub mod endpoint;
pub mod exposition;
mod files;
pub mod meter;
pub mod operations;
pub mod sampler;
pub mod series;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use jiff::Timestamp;
use wrenn_types::SandboxId;

use self::{
    meter::{Counters, Measured},
    series::{Point, Saved, Series},
};

/// The measurements of all sandboxes. Written by the sampler, read by whoever asks.
#[derive(Debug)]
pub struct Metrics {
    begin: Instant,
    tracks: Mutex<BTreeMap<SandboxId, Track>>,
}

/// What there is of one sandbox.
#[derive(Debug, Default)]
struct Track {
    series: Series,
    /// The counters added up over all its machines since this agent has known it, with the disk of the last look, and
    /// the memory that its machine has now.
    totals: Counters,
    /// Whether there are points that are in no file.
    unsaved: bool,
    /// When it was last written to a file, or first seen.
    saved_at: i64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { begin: Instant::now(), tracks: Mutex::default() }
    }
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Track>> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds on a line of this agent's own, which nobody sets.
    fn now(&self) -> i64 {
        i64::try_from(self.begin.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// What has to be added to a time on that line to say it as the wall would now.
    fn wall(&self) -> i64 {
        Timestamp::now().as_millisecond() - self.now()
    }

    /// The points of the last `range` milliseconds, the oldest first, with times as the wall says them now: milliseconds
    /// since the Unix epoch. Empty for a sandbox that nothing is known of.
    #[must_use]
    pub fn points(&self, id: &SandboxId, range: i64) -> Vec<Point> {
        let (now, wall) = (self.now(), self.wall());
        let mut points = self.lock().get(id).map_or_else(Vec::new, |track| track.series.points(now, range));
        points.iter_mut().for_each(|point| point.at += wall);
        points
    }

    /// What every sandbox has used, by id.
    #[must_use]
    pub fn totals(&self) -> Vec<(SandboxId, Counters)> {
        self.lock().iter().map(|(id, track)| (id.clone(), track.totals)).collect()
    }

    fn begin_with(&self, id: &SandboxId, saved: &Saved) {
        let (now, wall) = (self.now(), self.wall());
        let series = Series::restored(saved, now, wall);
        self.lock().insert(id.clone(), Track { series, saved_at: now, ..Track::default() });
    }

    fn add(&self, at: i64, measured: impl IntoIterator<Item = (SandboxId, Measured)>) {
        let mut tracks = self.lock();
        for track in tracks.values_mut() {
            // Only those that have a machine are measured.
            track.totals.memory_bytes = 0;
        }
        for (id, Measured { values, length, counted }) in measured {
            let track = tracks.entry(id).or_insert_with(|| Track { saved_at: at, ..Track::default() });
            track.series.push(Point { at, values }, length);
            track.unsaved = true;
            let sum = track.totals;
            track.totals = Counters {
                cpu_micros: sum.cpu_micros.saturating_add(counted.cpu_micros),
                sent_bytes: sum.sent_bytes.saturating_add(counted.sent_bytes),
                received_bytes: sum.received_bytes.saturating_add(counted.received_bytes),
                ..counted
            };
        }
    }

    /// Of whom something is to be written now: whoever `is_due`, or waits for longer than `every`. It counts as
    /// written.
    fn take_unsaved(&self, every: i64, is_due: impl Fn(&SandboxId) -> bool) -> Vec<(SandboxId, Saved)> {
        let (now, wall) = (self.now(), self.wall());
        let mut taken = Vec::new();
        for (id, track) in self.lock().iter_mut() {
            if track.unsaved && (now - track.saved_at >= every || is_due(id)) {
                track.unsaved = false;
                track.saved_at = now;
                taken.push((id.clone(), track.series.saved(wall)));
            }
        }
        taken
    }

    /// Lets go of points that are too old, and of those sandboxes that are not known; answers with the latter.
    fn prune(&self, is_known: impl Fn(&SandboxId) -> bool) -> Vec<SandboxId> {
        let now = self.now();
        let mut gone = Vec::new();
        self.lock().retain(|id, track| {
            track.series.prune(now);
            let known = is_known(id);
            if !known {
                gone.push(id.clone());
            }
            known
        });
        gone
    }
}
