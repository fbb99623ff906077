//! Looks after what lies on disk and is not used: reads it against its digests, slowly, and makes digests that are
//! missing.
//!
//! ```text
//!  now and then ─► what is there (snapshots, bases, layers) ─► plan: what is due ─► read, a piece at a time ─┬─► whole
//!                                                                 (pure)                                     └─► damaged: said,
//!                                                                                      counted, refused where it is used next
//!  a pause or a snapshot is done ─► a moment later ─┬─► layers without a digest that no machine writes to ─► digest
//!  found without one in a pass ─────────────────────┘
//! ```
//!
//! Each thing is read once in an interval, a day by default, counted from when it was made or last looked at; that is
//! kept in a file, so an agent that is started anew goes on where the last one was. One thing is read at a time, at
//! [`RATE`] at most, and nothing waits for it: neither a pause, nor a resume, nor a collection. What is used or deleted
//! in the middle is used or deleted.
//!
//! A digest is taken of layers only of which two things are true: a manifest names them, or they are below the top of a
//! sandbox's disk; and no machine has them open for writing. From then on they never change. The second is asked of the
//! kernel, because a machine may outlive what is recorded of it, for one in the middle of a pause.
//!
//! Damage is mended by nobody. Who uses the damaged thing next is refused with the name of the file. A template's warm
//! snapshot shares its files with a base: it is read again at the next create, and made anew if it is damaged.

pub mod plan;
#[cfg(test)]
mod tests;
mod writers;

use std::{
    collections::BTreeSet,
    fs, io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};
use wrenn_types::LayerId;

use self::{
    plan::{Looks, pause_after},
    writers::Written,
};
use crate::{
    rootfs::RootfsStore,
    sandbox::record,
    snapshot_store::{SnapshotStore, SnapshotStoreError, SnapshotStoreResult},
    snapshots::{Look, Part, Progress, SealProgress, Snapshots},
    warm::blocking,
};

/// How many bytes are read in a second, at most.
pub const RATE: u64 = 32 << 20;
/// How many bytes are read at once, and so for how long a thread is held.
const PIECE: u64 = 4 << 20;
/// How often it is looked at what is due.
const LOOK: Duration = Duration::from_secs(600);
/// How long a layer lies before its digest is taken: what is resumed and gone within seconds is not read at all.
const SETTLE: Duration = Duration::from_secs(5);
/// How often the moments of the looks are written, at most. What is lost is read once more.
const SAVE: Duration = Duration::from_secs(60);

/// What was done, since the agent was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// How many things were read to their end.
    pub looked: u64,
    /// How many bytes were read.
    pub read_bytes: u64,
    /// How often a file was found that is not as it was made.
    pub damaged: u64,
    /// How many layers got their digest.
    pub digests: u64,
}

/// What others ask of the scrub, and what they are told of it.
#[derive(Debug, Default)]
pub struct Scrub {
    /// Layers that were frozen just now, and are to have a digest. Emptied by the scrubber.
    frozen: Mutex<BTreeSet<LayerId>>,
    asked: Notify,
    looked: AtomicU64,
    read_bytes: AtomicU64,
    damaged: AtomicU64,
    digests: AtomicU64,
}

impl Scrub {
    /// Asks for the digests of layers that were frozen, in a moment. It waits for nothing. Those that have one, that a
    /// machine still writes to, or that are gone by then are left out.
    pub fn seal_soon(&self, layers: &[LayerId]) {
        self.frozen().extend(layers.iter().cloned());
        self.asked.notify_one();
    }

    /// What was done.
    #[must_use]
    pub fn counted(&self) -> Counted {
        Counted {
            looked: self.looked.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            digests: self.digests.load(Relaxed),
        }
    }

    fn frozen(&self) -> std::sync::MutexGuard<'_, BTreeSet<LayerId>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Relaxed);
    }
}

/// What a scrubber works with.
#[derive(Debug)]
pub struct Parts {
    /// What it looks after.
    pub snapshots: Snapshots,
    /// The root disks.
    pub disks: Arc<dyn RootfsStore>,
    /// The warm snapshots, some of which are the same files as bases.
    pub store: SnapshotStore,
    /// The parent of the sandboxes' directories.
    pub sandboxes_dir: Utf8PathBuf,
    /// What an argument of every machine of this host begins with.
    pub mark: String,
    /// Where it is kept when what was looked at.
    pub looks: Utf8PathBuf,
    /// How long after a look there is another one; none for never.
    pub every: Option<Duration>,
    /// What it is asked, and where it counts.
    pub scrub: Arc<Scrub>,
}

/// What is to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// What was not for as long as the interval.
    Due,
    /// Everything.
    All,
}

/// What came of one pass.
#[derive(Debug, Default)]
pub struct Pass {
    /// What was read to its end and is whole.
    pub whole: Vec<Part>,
    /// What is not as it was made, with the name of the file.
    pub damaged: Vec<(Part, SnapshotStoreError)>,
    /// Layers that had no digest and have one now.
    pub sealed: Vec<LayerId>,
}

/// The one who reads, one thing at a time.
#[derive(Debug)]
pub struct Scrubber {
    parts: Parts,
    looks: Looks,
    saved: Instant,
}

impl Scrubber {
    /// One that goes on where another one was.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        // What cannot be read says nothing: then everything counts as looked at now.
        let looks = fs::read(&parts.looks).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { parts, looks: looks.unwrap_or_default(), saved: Instant::now() }
    }

    /// Works until the future is dropped.
    pub async fn run(mut self) {
        let scrub = Arc::clone(&self.parts.scrub);
        let every = self.parts.every.map(|every| every.min(LOOK));
        let mut next = Instant::now() + every.unwrap_or(LOOK);
        loop {
            tokio::select! {
                () = scrub.asked.notified() => {
                    sleep(SETTLE).await;
                    self.seal_frozen().await;
                }
                () = sleep_until(next), if every.is_some() => {
                    let pass = self.pass(Which::Due, Timestamp::now()).await;
                    if !(pass.whole.is_empty() && pass.damaged.is_empty()) {
                        tracing::info!(whole = pass.whole.len(), damaged = pass.damaged.len(), "looked after what is on disk");
                    }
                    next = Instant::now() + every.unwrap_or(LOOK);
                }
            }
        }
    }

    /// Makes the digests that are missing, and reads what is to be read. `now` is what a wall clock says.
    pub async fn pass(&mut self, which: Which, now: Timestamp) -> Pass {
        let mut pass = Pass::default();
        match self.without_digest().await {
            Ok(layers) => {
                for layer in self.seal(layers).await {
                    tracing::info!(%layer, "a layer that was left without a digest has one now");
                    pass.sealed.push(layer);
                }
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "layers without a digest could not be looked for"
                );
            }
        }
        let snapshots = self.parts.snapshots.clone();
        let there = match blocking(move || snapshots.parts()).await {
            Ok(there) => there,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "nothing can be looked after");
                return pass;
            }
        };
        let now = now.as_second();
        self.looks.meet(there.iter().map(ToString::to_string).collect(), now);
        let every = match (which, self.parts.every) {
            (Which::All, _) => Some(0),
            (Which::Due, every) => every.map(|every| i64::try_from(every.as_secs()).unwrap_or(i64::MAX)),
        };
        let due = every.map(|every| self.looks.due(now, every)).unwrap_or_default();
        for name in due {
            let Some(part) = there.iter().find(|part| part.to_string() == name) else { continue };
            // Nobody who was just paused waits for the end of a pass.
            self.seal_frozen().await;
            match self.look(part).await {
                Ok(true) => {
                    Scrub::count(&self.parts.scrub.looked, 1);
                    pass.whole.push(part.clone());
                }
                Ok(false) => {}
                Err(error) if error.is_unusable() => {
                    Scrub::count(&self.parts.scrub.damaged, 1);
                    tracing::error!(%part, error = &error as &dyn std::error::Error, "damage was found; what needs this file is refused");
                    self.doubt(part).await;
                    pass.damaged.push((part.clone(), error));
                }
                Err(error) => {
                    tracing::warn!(%part, error = &error as &dyn std::error::Error, "could not be looked at");
                }
            }
            self.looks.looked(&name, now);
            if self.saved.elapsed() >= SAVE {
                self.save().await;
            }
        }
        self.save().await;
        pass
    }

    /// Reads one thing to its end; whether it was there and stayed as it was.
    async fn look(&self, part: &Part) -> SnapshotStoreResult<bool> {
        let (snapshots, wanted) = (self.parts.snapshots.clone(), part.clone());
        let mut reading = match blocking(move || snapshots.look(&wanted)).await? {
            Look::Nothing => return Ok(false),
            Look::Small => return Ok(true),
            Look::Contents(reading) => reading,
        };
        loop {
            let begun = Instant::now();
            let (progress, back) = blocking(move || (reading.read(PIECE), reading)).await;
            reading = back;
            match progress? {
                Progress::More(bytes) => self.rest(bytes, begun).await,
                Progress::Whole(bytes) => {
                    self.rest(bytes, begun).await;
                    return Ok(true);
                }
                Progress::Changed => return Ok(false),
            }
        }
    }

    async fn rest(&self, bytes: u64, begun: Instant) {
        Scrub::count(&self.parts.scrub.read_bytes, bytes);
        sleep(pause_after(bytes, begun.elapsed(), RATE)).await;
    }

    /// A base is the same files as a warm snapshot, which is not to be taken for verified any more.
    async fn doubt(&self, part: &Part) {
        let Part::Base(key) = part else { return };
        let Some(key) = key.warm() else { return };
        let store = self.parts.store.clone();
        blocking(move || store.forget_verified(&key)).await;
    }

    /// Layers that will not change, and have no digest. Those that a machine is put on are not among them.
    async fn without_digest(&self) -> SnapshotStoreResult<BTreeSet<LayerId>> {
        let (snapshots, sandboxes) = (self.parts.snapshots.clone(), self.parts.sandboxes_dir.clone());
        blocking(move || snapshots.layers_without_digest(below_tops(&sandboxes)?)).await
    }

    /// Takes the digests that were asked for.
    async fn seal_frozen(&self) {
        let layers = std::mem::take(&mut *self.parts.scrub.frozen());
        for layer in self.seal(layers).await {
            tracing::debug!(%layer, "a layer has a digest");
        }
    }

    /// Takes the digests of layers; answers with those that have one since.
    async fn seal(&self, layers: BTreeSet<LayerId>) -> Vec<LayerId> {
        if layers.is_empty() {
            return Vec::new();
        }
        let mark = self.parts.mark.clone();
        let written = match blocking(move || Written::by(&mark)).await {
            Ok(written) => written,
            Err(error) => {
                tracing::warn!(%error, "no digest is made: it is not known who writes to which layer");
                return Vec::new();
            }
        };
        let mut sealed = Vec::new();
        for layer in layers {
            let path = self.parts.snapshots.layer_path(&layer);
            if written.contains(&path) || self.is_open(path).await {
                tracing::debug!(%layer, "a machine may write to this layer; it gets its digest later");
                continue;
            }
            match self.seal_one(&layer).await {
                Ok(true) => {
                    Scrub::count(&self.parts.scrub.digests, 1);
                    sealed.push(layer);
                }
                Ok(false) => {}
                // The next pass tries again.
                Err(error) => {
                    tracing::warn!(%layer, error = &error as &dyn std::error::Error, "a layer has no digest yet");
                }
            }
        }
        sealed
    }

    /// Whether a machine may write to a disk by way of a device. One of which that cannot be told is taken for such.
    async fn is_open(&self, path: Utf8PathBuf) -> bool {
        let disks = Arc::clone(&self.parts.disks);
        blocking(move || disks.is_open(&path)).await.unwrap_or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "it is not known whether a disk is open"
            );
            true
        })
    }

    /// Takes the digest of a layer; whether it has one since.
    async fn seal_one(&self, layer: &LayerId) -> SnapshotStoreResult<bool> {
        let (snapshots, wanted) = (self.parts.snapshots.clone(), layer.clone());
        let Some(mut sealing) = blocking(move || snapshots.begin_seal(&wanted)).await? else {
            return Ok(false);
        };
        loop {
            let (snapshots, begun) = (self.parts.snapshots.clone(), Instant::now());
            let (progress, back) = blocking(move || (snapshots.seal(&mut sealing, PIECE), sealing)).await;
            sealing = back;
            match progress? {
                SealProgress::More(bytes) => self.rest(bytes, begun).await,
                SealProgress::Sealed(bytes) => {
                    self.rest(bytes, begun).await;
                    return Ok(true);
                }
                SealProgress::Changed => return Ok(false),
            }
        }
    }

    /// Keeps when what was looked at.
    async fn save(&mut self) {
        self.saved = Instant::now();
        let (path, looks) = (self.parts.looks.clone(), self.looks.clone());
        if let Err(error) = blocking(move || write(&path, &looks)).await {
            tracing::warn!(path = %self.parts.looks, %error, "it could not be kept what was looked at");
        }
    }
}

/// The layers below the top ones of all disks whose records say for certain which these are.
pub(crate) fn below_tops(sandboxes: &Utf8Path) -> SnapshotStoreResult<BTreeSet<LayerId>> {
    let left = record::left_behind(sandboxes).map_err(|error| {
        SnapshotStoreError::file("read the records in", sandboxes, io::Error::other(error))
    })?;
    let records = left
        .into_iter()
        .filter_map(|left| left.record.ok().flatten())
        .filter(|record| record.capture.is_none());
    Ok(records.flat_map(|record| record.layers.into_iter().skip(1)).collect())
}

/// Not made durable: what is lost is read once more.
fn write(path: &Utf8Path, looks: &Looks) -> io::Result<()> {
    let half = path.with_extension("new");
    fs::write(&half, serde_json::to_vec(looks)?)?;
    fs::rename(&half, path)
}
