//! What is written without anybody waiting for it: the audit log, and the times of last use.
//!
//! Entries of the audit log go through a bounded queue and are appended in batches, some milliseconds
//! later. Room is reserved *before* an operation begins: when the database has been away for so long that
//! the queue is full, operations that must be audited are refused, and none goes unrecorded. What a crash
//! of this process can lose is what was in the queue.
//!
//! Times of last use are coalesced: however often a key or a sandbox is used, it is one row of one
//! statement per [`TOUCH_INTERVAL`].

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use wrenn_types::SandboxId;

use super::CoreError;
use crate::store::{AuditEntry, Store};

/// Entries that can wait.
const QUEUE: usize = 8192;
/// Entries of one statement.
const BATCH: usize = 512;
/// How long an entry waits for others to share its statement.
const BATCH_WAIT: Duration = Duration::from_millis(50);
/// How often times of last use are written.
const TOUCH_INTERVAL: Duration = Duration::from_secs(10);
/// The pause after the database did not take a batch.
const PAUSE: Duration = Duration::from_millis(500);

/// A place in the queue for one entry.
pub(crate) type Place = mpsc::OwnedPermit<AuditEntry>;

#[derive(Debug, Default)]
struct Touched {
    keys: HashSet<Uuid>,
    sandboxes: HashMap<SandboxId, Timestamp>,
}

/// A handle to the task that writes.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    entries: mpsc::Sender<AuditEntry>,
    touched: Arc<Mutex<Touched>>,
}

impl Recorder {
    /// A recorder and the task behind it, which ends when it is told to and the queue is empty.
    pub(crate) fn new(store: Store, stop: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let (entries, queue) = mpsc::channel(QUEUE);
        let touched = Arc::new(Mutex::new(Touched::default()));
        let task = write(store, queue, Arc::clone(&touched), stop);
        (Self { entries, touched }, task)
    }

    /// Room for one entry, before what it will say has happened.
    pub(crate) fn reserve(&self) -> Result<Place, CoreError> {
        self.entries.clone().try_reserve_owned().map_err(|_| CoreError::AuditFull)
    }

    /// Notes that a key was used.
    pub(crate) fn key_used(&self, key: Uuid) {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner).keys.insert(key);
    }

    /// Notes when something last happened in a sandbox.
    pub(crate) fn sandbox_used(&self, id: &SandboxId, at: Timestamp) {
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        match touched.sandboxes.get_mut(id) {
            Some(last) => *last = at.max(*last),
            None => drop(touched.sandboxes.insert(id.clone(), at)),
        }
    }
}

async fn write(
    store: Store,
    mut queue: mpsc::Receiver<AuditEntry>,
    touched: Arc<Mutex<Touched>>,
    stop: CancellationToken,
) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut touch = tokio::time::interval(TOUCH_INTERVAL);
    touch.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let more = tokio::select! {
            taken = queue.recv_many(&mut batch, BATCH) => taken > 0,
            _ = touch.tick() => {
                write_touched(&store, &touched).await;
                continue;
            }
            () = stop.cancelled() => {
                // Nobody gets a new place; those that were handed out may still be used.
                queue.close();
                queue.recv_many(&mut batch, BATCH).await > 0
            }
        };
        if !more {
            break;
        }
        if batch.len() < BATCH && !stop.is_cancelled() {
            let _ = tokio::time::timeout(BATCH_WAIT, async {
                while batch.len() < BATCH && queue.recv_many(&mut batch, BATCH).await > 0 {}
            })
            .await;
        }
        for entries in batch.chunks(BATCH) {
            while let Err(error) = store.append_audit(entries).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    waiting = entries.len(),
                    "audit entries not written"
                );
                // While stopping, one failure of a bounded statement is enough waiting.
                if stop.is_cancelled() {
                    break;
                }
                let _ = stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
            }
        }
        batch.clear();
    }
    write_touched(&store, &touched).await;
}

async fn write_touched(store: &Store, touched: &Mutex<Touched>) {
    let taken = std::mem::take(&mut *touched.lock().unwrap_or_else(PoisonError::into_inner));
    let keys: Vec<Uuid> = taken.keys.into_iter().collect();
    let sandboxes: Vec<(SandboxId, Timestamp)> = taken.sandboxes.into_iter().collect();
    let mut failure = None;
    if !keys.is_empty() {
        failure = store.touch_keys(&keys).await.err();
    }
    if !sandboxes.is_empty() && failure.is_none() {
        failure = store.touch_sandboxes(&sandboxes).await.err();
    }
    if let Some(error) = failure {
        // The next use writes a later time anyway.
        tracing::debug!(error = &error as &dyn std::error::Error, "times of last use not written");
    }
}
