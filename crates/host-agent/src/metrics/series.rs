//! The measurements of one sandbox over the last day, in three resolutions. Pure: time is a number that its
//! caller gives.
//!
//! ```text
//!  every 500 ms ──► fine: 10 min
//!              ├──► a bucket of 30 s ── full ──► middle: 2 h
//!              └──► a bucket of 5 min ── full ─► coarse: 24 h
//! ```
//!
//! Time is a line of milliseconds of which only the direction counts: it never goes back, whatever somebody does to
//! the clock on the wall. What the wall says is put on a point when it is read or saved, as a distance from now
//! ([`Series::saved`], [`Series::restored`]), so that points are in order and as old as they say after a jump too.
//!
//! A gap is a gap: nothing is made up for a time in which nothing was measured. A bucket that is not full yet is
//! answered with what is in it.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// How far apart two measurements are, in milliseconds.
pub const SAMPLE_MS: i64 = 500;

/// What was measured over one interval.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Values {
    /// Of the time that all of its CPUs have together, in percent. A little more than 100 is possible: the VMM has
    /// work of its own.
    pub cpu_percent: f32,
    /// Memory that is only this machine's, in KiB.
    pub memory_kib: u32,
    /// What its disk takes of the host's, in KiB.
    pub disk_kib: u32,
    /// Bytes per second that it sent.
    pub sent_per_second: f32,
    /// Bytes per second that it received.
    pub received_per_second: f32,
}

impl Values {
    const COUNT: usize = 5;

    fn numbers(self) -> [f64; Self::COUNT] {
        [
            self.cpu_percent.into(),
            self.memory_kib.into(),
            self.disk_kib.into(),
            self.sent_per_second.into(),
            self.received_per_second.into(),
        ]
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "means of what had these types"
    )]
    fn of_numbers([cpu, memory, disk, sent, received]: [f64; Self::COUNT]) -> Self {
        Self {
            cpu_percent: cpu as f32,
            memory_kib: memory.round() as u32,
            disk_kib: disk.round() as u32,
            sent_per_second: sent as f32,
            received_per_second: received as f32,
        }
    }

    /// Whether it can have been measured; what is read from a file may say anything.
    fn is_sound(self) -> bool {
        let rates = [self.cpu_percent, self.sent_per_second, self.received_per_second];
        rates.iter().all(|rate| rate.is_finite() && *rate >= 0.0)
    }
}

/// What was measured, and when the interval ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "(i64, f32, u32, u32, f32, f32)", into = "(i64, f32, u32, u32, f32, f32)")]
pub struct Point {
    /// In milliseconds.
    pub at: i64,
    /// What.
    pub values: Values,
}

impl From<(i64, f32, u32, u32, f32, f32)> for Point {
    fn from(
        (at, cpu_percent, memory_kib, disk_kib, sent_per_second, received_per_second): (
            i64,
            f32,
            u32,
            u32,
            f32,
            f32,
        ),
    ) -> Self {
        Self {
            at,
            values: Values { cpu_percent, memory_kib, disk_kib, sent_per_second, received_per_second },
        }
    }
}

impl From<Point> for (i64, f32, u32, u32, f32, f32) {
    fn from(Point { at, values }: Point) -> Self {
        let Values { cpu_percent, memory_kib, disk_kib, sent_per_second, received_per_second } = values;
        (at, cpu_percent, memory_kib, disk_kib, sent_per_second, received_per_second)
    }
}

/// How finely time is divided, and how long what is so divided is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// Every measurement, for ten minutes.
    Fine,
    /// Means over 30 seconds, for two hours.
    Middle,
    /// Means over five minutes, for a day.
    Coarse,
}

impl Resolution {
    /// The length of an interval, in milliseconds.
    #[must_use]
    pub const fn step(self) -> i64 {
        match self {
            Self::Fine => SAMPLE_MS,
            Self::Middle => 30_000,
            Self::Coarse => 300_000,
        }
    }

    /// For how many milliseconds a point is kept.
    #[must_use]
    pub const fn kept(self) -> i64 {
        match self {
            Self::Fine => 600_000,
            Self::Middle => 7_200_000,
            Self::Coarse => 86_400_000,
        }
    }

    /// The finest in which so many milliseconds are kept; the coarsest for more than there is.
    #[must_use]
    pub fn of_range(range: i64) -> Self {
        let fits = |resolution: &Self| range <= resolution.kept();
        [Self::Fine, Self::Middle].into_iter().find(fits).unwrap_or(Self::Coarse)
    }

    fn capacity(self) -> usize {
        usize::try_from(self.kept() / self.step()).unwrap_or_default()
    }
}

/// The newest points of one resolution.
#[derive(Debug, Clone)]
struct Ring {
    resolution: Resolution,
    points: VecDeque<Point>,
}

impl Ring {
    fn new(resolution: Resolution) -> Self {
        Self { resolution, points: VecDeque::new() }
    }

    fn push(&mut self, point: Point) {
        if self.points.len() >= self.resolution.capacity() {
            self.points.pop_front();
        }
        // Most sandboxes do not live for a day: room is made as it is needed, and never more than all of it.
        if self.points.len() == self.points.capacity() {
            let missing = self.resolution.capacity().saturating_sub(self.points.len());
            self.points.reserve_exact(missing.min(64));
        }
        self.points.push_back(point);
    }

    fn prune(&mut self, now: i64) {
        let oldest = now.saturating_sub(self.resolution.kept());
        while self.points.front().is_some_and(|point| point.at <= oldest) {
            self.points.pop_front();
        }
        if self.points.is_empty() {
            self.points = VecDeque::new();
        }
    }
}

/// An interval of which the end has not been seen.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    number: i64,
    last: i64,
    weight: f64,
    sums: [f64; Values::COUNT],
}

impl Bucket {
    fn mean(&self) -> Point {
        Point { at: self.last, values: Values::of_numbers(self.sums.map(|sum| sum / self.weight)) }
    }
}

/// Means over longer intervals.
#[derive(Debug, Clone)]
struct Means {
    ring: Ring,
    open: Option<Bucket>,
}

impl Means {
    fn new(resolution: Resolution) -> Self {
        Self { ring: Ring::new(resolution), open: None }
    }

    fn push(&mut self, point: Point, length: i64) {
        let step = self.ring.resolution.step();
        // What ends with a bucket is in it.
        let number = (point.at - 1).div_euclid(step);
        if let Some(full) = self.open.take_if(|bucket| bucket.number != number) {
            self.ring.push(full.mean());
        }
        let fresh = Bucket { number, last: point.at, weight: 0.0, sums: [0.0; Values::COUNT] };
        let bucket = self.open.get_or_insert(fresh);
        // A measurement that was late counts for more, but never for more than a bucket.
        #[expect(clippy::cast_precision_loss, reason = "at most five minutes")]
        let weight = length.clamp(1, step) as f64;
        bucket.last = point.at;
        bucket.weight += weight;
        for (sum, number) in bucket.sums.iter_mut().zip(point.values.numbers()) {
            *sum += number * weight;
        }
    }

    fn prune(&mut self, now: i64) {
        self.ring.prune(now);
        let oldest = now.saturating_sub(self.ring.resolution.kept());
        self.open.take_if(|bucket| bucket.last <= oldest);
    }

    fn points(&self) -> impl Iterator<Item = Point> {
        self.ring.points.iter().copied().chain(self.open.as_ref().map(Bucket::mean))
    }
}

/// The measurements of one sandbox.
#[derive(Debug, Clone)]
pub struct Series {
    fine: Ring,
    middle: Means,
    coarse: Means,
    last: Option<i64>,
}

/// What of a series outlives its agent: times are those of the clock on the wall, in milliseconds since the Unix
/// epoch, as it was when this was made.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Saved {
    /// Means over 30 seconds.
    pub middle: Vec<Point>,
    /// Means over five minutes.
    pub coarse: Vec<Point>,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            fine: Ring::new(Resolution::Fine),
            middle: Means::new(Resolution::Middle),
            coarse: Means::new(Resolution::Coarse),
            last: None,
        }
    }
}

impl Series {
    /// Adds what was measured over the `length` milliseconds that ended at `point.at`. What is not after all that is
    /// there is left out.
    pub fn push(&mut self, point: Point, length: i64) {
        if self.last.is_some_and(|last| point.at <= last) || !point.values.is_sound() {
            return;
        }
        self.last = Some(point.at);
        self.fine.push(point);
        self.middle.push(point, length);
        self.coarse.push(point, length);
    }

    /// Lets go of what is too old.
    pub fn prune(&mut self, now: i64) {
        self.fine.prune(now);
        self.middle.prune(now);
        self.coarse.prune(now);
    }

    /// The points of the last `range` milliseconds, the oldest first, in the finest resolution in which there are so
    /// many.
    #[must_use]
    pub fn points(&self, now: i64, range: i64) -> Vec<Point> {
        let after = now.saturating_sub(range);
        let is_in = |point: &Point| point.at > after;
        match Resolution::of_range(range) {
            Resolution::Fine => self.fine.points.iter().copied().filter(is_in).collect(),
            Resolution::Middle => self.middle.points().filter(is_in).collect(),
            Resolution::Coarse => self.coarse.points().filter(is_in).collect(),
        }
    }

    /// What is to outlive the agent. The wall says `now + wall` at the time `now`.
    #[must_use]
    pub fn saved(&self, wall: i64) -> Saved {
        let labelled = |means: &Means| {
            means.points().map(|point| Point { at: point.at.saturating_add(wall), ..point }).collect()
        };
        Saved { middle: labelled(&self.middle), coarse: labelled(&self.coarse) }
    }

    /// A series that goes on from what was saved, whatever has become of the clock on the wall since.
    #[must_use]
    pub fn restored(saved: &Saved, now: i64, wall: i64) -> Self {
        let mut series = Self::default();
        for (means, points) in [(&mut series.middle, &saved.middle), (&mut series.coarse, &saved.coarse)] {
            let last = points.last().map_or(now, |point| point.at.saturating_sub(wall));
            // The wall was set back: what is known is that all of it has been.
            let ahead = last.saturating_sub(now).max(0);
            let mut former = i64::MIN;
            for point in points {
                let at = point.at.saturating_sub(wall).saturating_sub(ahead);
                if at > former && at <= now && point.values.is_sound() {
                    means.ring.push(Point { at, ..*point });
                    former = at;
                }
            }
            means.ring.prune(now);
        }
        let newest =
            [&series.middle, &series.coarse].map(|means| means.ring.points.back().map(|point| point.at));
        series.last = newest.into_iter().flatten().max();
        series
    }
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
