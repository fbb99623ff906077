//! The record of a sandbox that is there: what it says, and how it is changed by one who waits no longer than a bound.
//!
//! A change is written to a new file by a thread that cannot be called back, and then gets its name: that is its last
//! step, and it takes it only if nobody has given up meanwhile ([`Fate`]). So a change that came too late is never found
//! later. The file that such a thread may still be writing is touched by nobody else.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::LayerId;

use super::{FILE, Record, RecordError, SandboxDir, failed};
use crate::sandbox::{
    bounds,
    within::{Fate, Overdue, decided_within, within},
};

/// The record of a sandbox that is there, on disk and in memory. Changed by its driver only, one change at a time.
#[derive(Debug)]
pub struct Ledger {
    dir: SandboxDir,
    record: Mutex<Record>,
}

impl Ledger {
    /// The record that is on disk in `dir`.
    #[must_use]
    pub fn new(dir: SandboxDir, record: Record) -> Self {
        Self { dir, record: Mutex::new(record) }
    }

    /// What it says now.
    #[must_use]
    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The layers of its disk, top first.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerId> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).layers.clone()
    }

    /// The directory and the record of a sandbox that is new, durably, within the bound of a record.
    ///
    /// # Errors
    /// As [`SandboxDir::create`]; of what took too long nothing is left in a moment.
    pub async fn create(parent: &Utf8Path, record: Record) -> Result<Self, RecordError> {
        let path = parent.join(record.id.as_str());
        let (parent, fate) = (parent.to_owned(), Fate::default());
        let asks = fate.clone();
        let made = decided_within(bounds::RECORD, &fate, move || {
            let dir = SandboxDir::create(&parent, &record)?;
            if !asks.keep() {
                dir.remove()?;
            }
            Ok(Self::new(dir, record))
        });
        made.await.unwrap_or_else(|late| Err(overdue("make", path, late)))
    }

    /// Puts another record in the place of the present one, durably. Blocks on the disk.
    ///
    /// # Errors
    /// The former one is there then.
    pub fn put(&self, record: Record) -> Result<(), RecordError> {
        self.put_if(record, || true)
    }

    /// The same, if that may be once it is written; else the former one stays.
    fn put_if(&self, record: Record, may: impl FnOnce() -> bool) -> Result<(), RecordError> {
        let fresh = self.dir.write_fresh(&record, true)?;
        if may() {
            fresh.put_in_place()?;
            *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
            return Ok(());
        }
        fs::remove_file(&fresh.path).map_err(failed("remove", &fresh.path))
    }

    /// Puts another record in the place of the present one, durably and in time, or not at all.
    async fn put_within(self: &Arc<Self>, record: Record, bound: Duration) -> Result<(), RecordError> {
        let (ledger, fate) = (Arc::clone(self), Fate::default());
        let asks = fate.clone();
        let put = decided_within(bound, &fate, move || ledger.put_if(record, || asks.keep()));
        put.await.unwrap_or_else(|late| {
            self.dir.given_up.fetch_add(1, Ordering::SeqCst);
            Err(overdue("write", self.dir.path.join(FILE), late))
        })
    }

    /// Changes the record, durably. It is not broken off by a drop of the future: the thread goes on.
    ///
    /// # Errors
    /// The former one is there then, also where the disk took too long.
    pub async fn change(self: &Arc<Self>, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        let mut record = self.record();
        change(&mut record);
        self.put_within(record, bounds::RECORD).await
    }

    /// Makes the record what it was, whether or not that can be written: what is done next follows from it. Where it
    /// cannot, the next agent finds the one before this, and puts it right.
    pub async fn put_back(self: &Arc<Self>, former: Record) {
        let id = former.id.clone();
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = former.clone();
        if let Err(error) = self.put_within(former, bounds::RECORD).await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record is put right at the next start");
        }
    }

    /// Notes what has happened to a machine, for an agent that is started after this one. It is not durable, because
    /// machines do not survive their host, and so it waits for no disk. What is paused survives its host: of that,
    /// every change is a [`Self::change`].
    ///
    /// # Errors
    /// On disk is the former one; it has happened all the same, and what this agent does next follows from it.
    pub fn note(&self, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        let mut record = self.record();
        change(&mut record);
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record.clone();
        self.dir.replace(&record, false)
    }

    /// Keeps what the next agent is to know of a sandbox for as long as there is something of it: a [`Self::change`] of
    /// one that is paused, as it is until its resume is done, and a [`Self::note`] of any other.
    ///
    /// # Errors
    /// As those.
    pub async fn keep(self: &Arc<Self>, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        if self.record().paused.is_some() { self.change(change).await } else { self.note(change) }
    }

    /// Removes the directory with the record, and all that is in it.
    ///
    /// # Errors
    /// Why something is still there, or may be for a moment.
    pub async fn remove(self: &Arc<Self>) -> Result<(), RecordError> {
        let ledger = Arc::clone(self);
        let removed = within(bounds::REMOVE, move || ledger.dir.remove()).await;
        removed.unwrap_or_else(|late| Err(overdue("remove", self.dir.path.clone(), late)))
    }
}

fn overdue(operation: &'static str, path: Utf8PathBuf, Overdue(bound): Overdue) -> RecordError {
    RecordError::Timeout { operation, path, bound }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{FRESH, read, tests::record},
        *,
    };

    const MOMENT: Duration = Duration::from_millis(20);

    fn name_a_change(record: &Record) -> Record {
        Record { default_user: "somebody-else".to_owned(), ..record.clone() }
    }

    /// What hangs here is the opening of the new file: it is a pipe that nobody reads.
    #[tokio::test]
    async fn a_change_that_the_disk_keeps_is_given_up_and_never_found_later() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let before = record();
        let ledger = Arc::new(Ledger::create(parent, before.clone()).await.unwrap());
        let pipe = parent.join(before.id.as_str()).join(FRESH);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, pipe.as_str(), rustix::fs::FileType::Fifo, mode, 0).unwrap();

        let error = ledger.put_within(name_a_change(&before), MOMENT).await.unwrap_err();
        assert!(matches!(error, RecordError::Timeout { bound: MOMENT, .. }), "{error:?}");
        assert!(!error.is_no_space());
        assert_eq!((ledger.record(), read(parent, &before.id)), (before.clone(), Some(before.clone())));

        // The next change does not meet the one that hangs, which goes nowhere when it goes on.
        let after = Record { default_workdir: "/elsewhere".to_owned(), ..before.clone() };
        ledger.change(|record| record.default_workdir = "/elsewhere".to_owned()).await.unwrap();
        let text = fs::read(&pipe).unwrap();
        assert_eq!(serde_json::from_slice::<Record>(&text).unwrap(), name_a_change(&before));
        assert_eq!((ledger.record(), read(parent, &before.id)), (after.clone(), Some(after)));
    }

    #[test]
    fn what_may_not_be_once_it_is_written_leaves_the_former_one() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let before = record();
        let ledger = Ledger::new(SandboxDir::create(parent, &before).unwrap(), before.clone());
        ledger.put_if(name_a_change(&before), || false).unwrap();
        assert_eq!((ledger.record(), read(parent, &before.id)), (before.clone(), Some(before.clone())));
        let files = parent.join(before.id.as_str()).read_dir_utf8().unwrap();
        assert_eq!(files.map(|file| file.unwrap().file_name().to_owned()).collect::<Vec<_>>(), [FILE]);
    }
}
