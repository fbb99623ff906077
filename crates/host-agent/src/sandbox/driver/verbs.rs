//! What each verb does: an order of captures and bring-ups, and what is left when one of them fails.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use wrenn_types::{InactivityTimeout, SnapshotId};
use wrenn_vmm::VmmError;

use super::{Driver, OperationError, Paused, RETRY, Residence};
use crate::{
    network::Policy,
    sandbox::{
        Outcome, Stage, Update, bounds,
        bring_up::{Persona, Recording, Up},
        capture::{self, CaptureError, Captured, Kind},
        deadline,
        keeping::Keeping,
        machine::Machine,
        queue::Verb,
        record::{Ledger, PausedRecord, Record},
        source::{From, SourceError},
        within::{Overdue, within},
    },
    snapshot_store::SnapshotStoreError,
    snapshots::{About, Extent, Kept, KeptMemory},
};

/// How many layers a disk may have before the next capture waits until they are one.
const LAYERS_LIMIT: usize = 32;

impl Driver {
    /// Does one thing. The sandbox is what it was before if it fails.
    pub(super) async fn perform(
        &self,
        residence: Residence,
        verb: Verb,
    ) -> (Residence, Result<Outcome, OperationError>) {
        match (residence, verb) {
            (Residence::Up(up), Verb::Pause(extent)) => self.pause(up, extent).await,
            (paused @ Residence::Paused(_), Verb::Pause(_)) => (paused, Ok(Outcome::Done)),
            (Residence::Paused(paused), Verb::Resume { timeout }) => {
                let snapshot = paused.snapshot.clone();
                let (next, outcome) = self.bring_back(paused, snapshot).await;
                if outcome.is_ok() { self.retime(next, timeout).await } else { (next, outcome) }
            }
            (up @ Residence::Up(_), Verb::Resume { timeout }) => self.retime(up, timeout).await,
            (Residence::Up(up), Verb::Snapshot { into }) => self.snapshot(up, &into).await,
            (Residence::Paused(paused), Verb::Snapshot { into }) => {
                let copied = self.copy_snapshot(&paused.snapshot, into).await;
                (Residence::Paused(paused), copied)
            }
            (residence, Verb::Rollback { to }) => self.rollback(residence, to).await,
            (residence, Verb::Update(update)) => self.update(residence, &update).await,
        }
    }

    async fn pause(&self, mut up: Box<Up>, extent: Extent) -> (Residence, Result<Outcome, OperationError>) {
        self.publish(|status| status.stage = Stage::Pausing);
        let snapshot = SnapshotId::random();
        let kept = match self.capture(&mut up, &snapshot, Kind::Pause(extent)).await {
            Some(Ok(captured)) => captured.kept,
            Some(Err(error)) => return self.still_up(up, OperationError::Capture(error)),
            None => return (Residence::Up(up), Err(OperationError::Ended)),
        };
        let at = (self.host.now)();
        let saved = PausedRecord { snapshot: snapshot.clone(), at };
        let recorded = up.ledger.change(|record| {
            record.paused = Some(saved.clone());
            record.capture = None;
            record.machine = None;
            record.meet_deadline(at);
        });
        if let Err(error) = recorded.await {
            self.forget_snapshot(snapshot).await;
            self.go_on(&mut up).await;
            return self.still_up(up, OperationError::Record(error));
        }
        let Up { machine, ledger, .. } = *up;
        self.leave(machine).await;
        self.host.scrub.seal_soon(&kept.about.layers);
        self.rest(&saved, self.host.snapshot_bytes(&kept).await, &ledger.record());
        (Residence::Paused(Paused { ledger, snapshot }), Ok(Outcome::Done))
    }

    /// Saves a machine, unless the end of the sandbox is asked for first: then it is left as it is in that moment.
    async fn capture(
        &self,
        up: &mut Up,
        into: &SnapshotId,
        kind: Kind,
    ) -> Option<Result<Captured, CaptureError>> {
        let keeping = Keeping::default();
        let mut captured = Box::pin(async {
            self.bound_layers(up).await;
            capture::capture(&self.host, up, into, kind, &keeping).await
        });
        match self.unless_overtaken(&mut captured).await {
            // What is a snapshot already stays one, and there is nothing more to wait for.
            None if !keeping.give_up() => Some(captured.await),
            None => {
                drop(captured);
                keeping.written().await;
                None
            }
            captured => captured,
        }
    }

    /// Lets a machine run and its guest open. The first request of a user finds the way into the guest.
    pub(super) async fn go_on(&self, up: &mut Up) {
        let record = up.ledger.record();
        // What is not done is noted as such by what is dropped.
        let _ = self.unless_overtaken(capture::go_on(&self.host, up, &record)).await;
        if let Some(guest) = self.handle.inner.guest().as_mut()
            && let Some(idle) = up.idle.take()
        {
            guest.idle = Some(idle);
        }
    }

    /// After an operation that left the machine where it was.
    fn still_up(&self, up: Box<Up>, error: OperationError) -> (Residence, Result<Outcome, OperationError>) {
        self.publish(|status| status.stage = Stage::Running);
        (Residence::Up(up), Err(error))
    }

    /// Closes the way to a machine's guest and ends it. It is the sandbox no more.
    pub(super) async fn leave(&self, machine: Machine) {
        // A socket that is left keeps the namespace that it was made in.
        *self.handle.inner.guest() = None;
        let id = machine.id.clone();
        if let Err(error) = machine.end(&self.host).await {
            tracing::error!(%id, error = &error as &dyn std::error::Error, "a machine did not end; it is left to be collected");
        }
    }

    /// From what was saved to a machine that runs.
    async fn bring_back(
        &self,
        paused: Paused,
        snapshot: SnapshotId,
    ) -> (Residence, Result<Outcome, OperationError>) {
        self.meet_deadline(&paused.ledger).await;
        self.publish(|status| status.stage = Stage::Resuming);
        let since = self.status.borrow().paused.clone();
        match self.machine_of(&paused.ledger, snapshot).await {
            Ok(mut up) => {
                if self.forget_snapshot(paused.snapshot).await
                    && let Err(error) = up.ledger.note(|record| record.obsolete = None)
                {
                    let id = &self.handle.spec().id;
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record still tells of a snapshot that is gone");
                }
                // A copy does not stand on what it was made from.
                if !self.host.has_layers() {
                    self.host.collect_soon();
                }
                self.enter(&mut up);
                (Residence::Up(Box::new(up)), Ok(Outcome::Done))
            }
            Err(error) => {
                self.publish(|status| {
                    status.stage = Stage::Paused;
                    status.paused = since;
                });
                (Residence::Paused(paused), Err(error))
            }
        }
    }

    /// A machine of this very sandbox from a snapshot, recorded as the one that it is now.
    async fn machine_of(&self, ledger: &Arc<Ledger>, snapshot: SnapshotId) -> Result<Up, OperationError> {
        let former = ledger.record();
        let persona = Persona { access_token: former.access_token.clone(), is_new: false };
        let recording = Recording::Change(Arc::clone(ledger));
        let up = self.bring_up(recording, persona, From::Itself(snapshot)).await;
        let up = up.map_err(OperationError::BringUp)?;
        // From here on the machine is the sandbox. If this cannot be written, the next agent goes back to what
        // was saved, so it must not be removed.
        if let Err(error) = up.ledger.change(Record::settle).await {
            let Up { machine, ledger, .. } = up;
            // Not the machine that was the sandbox: the way to the guest of that one stays open.
            if let Err(error) = machine.end(&self.host).await {
                let id = &self.handle.spec().id;
                tracing::error!(%id, error = &error as &dyn std::error::Error, "the machine did not stop; it is left to be collected");
            }
            ledger.put_back(former).await;
            return Err(OperationError::Record(error));
        }
        Ok(up)
    }

    async fn snapshot(
        &self,
        mut up: Box<Up>,
        into: &SnapshotId,
    ) -> (Residence, Result<Outcome, OperationError>) {
        self.publish(|status| status.stage = Stage::Snapshotting);
        let Some(captured) = self.capture(&mut up, into, Kind::Live).await else {
            return (Residence::Up(up), Err(OperationError::Ended));
        };
        if let Some(guest) = self.handle.inner.guest().as_mut() {
            guest.idle = up.idle.take();
        }
        self.publish(|status| status.stage = Stage::Running);
        if let Ok(captured) = &captured {
            self.host.scrub.seal_soon(&captured.kept.about.layers);
        }
        let outcome = captured
            .map_err(OperationError::Capture)
            .map(|captured| Outcome::Saved { snapshot: Box::new(captured.kept), stopped: captured.stopped });
        (Residence::Up(up), outcome)
    }

    /// A snapshot of a paused sandbox is the one that it is saved as, under another name. What is started from a
    /// snapshot goes on where that was, so there is none of a disk alone.
    async fn copy_snapshot(&self, of: &SnapshotId, into: SnapshotId) -> Result<Outcome, OperationError> {
        let Some(found) = self.unless_overtaken(self.find_snapshot(of)).await else {
            return Err(OperationError::Ended);
        };
        let kept = found?;
        let Some(KeptMemory { state, pages }) = kept.memory() else {
            return Err(OperationError::DiskOnly);
        };
        let (state, pages) = (state.to_owned(), pages.to_owned());
        if !kept.about.prepared {
            let error = SourceError::Unprepared(kept.id);
            return Err(OperationError::BringUp(error.into()));
        }
        let bound = bounds::commit(kept.about.shape.memory, kept.pages_bytes);
        let snapshots = self.host.snapshots.clone();
        let copy = move || {
            let making = snapshots.begin(into)?;
            for (from, to) in [(&state, making.state()), (&pages, making.pages())] {
                let linked = std::fs::hard_link(from, &to);
                linked.map_err(|source| SnapshotStoreError::file("link", &to, source))?;
            }
            let about = About { created_at: Timestamp::now(), ..kept.about.clone() };
            making.commit_copy(&kept, about)
        };
        let keeping = Keeping::default();
        let mut copied = Box::pin(keeping.keep(&self.host.snapshots, bound, copy));
        let copied = match self.unless_overtaken(&mut copied).await {
            Some(copied) => copied,
            None if keeping.give_up() => return Err(OperationError::Ended),
            None => copied.await,
        };
        let kept = copied.map_err(OperationError::Capture)?;
        Ok(Outcome::Saved { snapshot: Box::new(kept), stopped: Duration::ZERO })
    }

    /// A snapshot that is there, verified.
    async fn find_snapshot(&self, id: &SnapshotId) -> Result<Kept, OperationError> {
        let (snapshots, wanted) = (self.host.snapshots.clone(), id.clone());
        let bound = bounds::find(self.handle.spec().shape.memory);
        let found = within(bound, move || snapshots.get(&wanted)).await;
        let late = |Overdue(bound)| OperationError::Timeout { step: "finding the snapshot", bound };
        let found = found.map_err(late)?.map_err(OperationError::Snapshot)?;
        found.ok_or_else(|| OperationError::NoSuchSnapshot(id.clone()))
    }

    async fn rollback(
        &self,
        residence: Residence,
        to: SnapshotId,
    ) -> (Residence, Result<Outcome, OperationError>) {
        let problem = match self.unless_overtaken(self.find_snapshot(&to)).await {
            Some(Ok(kept)) if kept.about.sandbox == self.handle.spec().id => None,
            Some(Ok(_)) => Some(OperationError::NotItsOwn(to.clone())),
            Some(Err(error)) => Some(error),
            None => Some(OperationError::Ended),
        };
        if let Some(problem) = problem {
            return (residence, Err(problem));
        }
        let mut up = match residence {
            Residence::Paused(paused) => return self.bring_back(paused, to).await,
            Residence::Up(up) => up,
        };
        self.publish(|status| status.stage = Stage::Resuming);
        // It stands still, so that nothing that it does meanwhile is lost unseen, and it can go on if this fails.
        let stood = match self.unless_overtaken(up.machine.vm.pause()).await {
            Some(stood) => stood,
            None => return (Residence::Up(up), Err(OperationError::Ended)),
        };
        if let Err(error) = stood {
            // It may stand still all the same.
            self.go_on(&mut up).await;
            return self.still_up(up, OperationError::Stop(error));
        }
        match self.machine_of(&up.ledger, to).await {
            Ok(mut new) => {
                let Up { machine, .. } = *up;
                self.leave(machine).await;
                // Its top layer, which is all of its disk where there are no layers.
                self.host.collect_soon();
                self.enter(&mut new);
                (Residence::Up(Box::new(new)), Ok(Outcome::Done))
            }
            Err(error) if error.is_end() => (Residence::Up(up), Err(error)),
            Err(error) => {
                self.go_on(&mut up).await;
                self.still_up(up, error)
            }
        }
    }

    async fn retime(
        &self,
        residence: Residence,
        timeout: Option<InactivityTimeout>,
    ) -> (Residence, Result<Outcome, OperationError>) {
        self.handle.activity().touch();
        match timeout {
            None => (residence, Ok(Outcome::Done)),
            Some(_) => self.update(residence, &Update { timeout, ..Update::default() }).await,
        }
    }

    async fn update(
        &self,
        mut residence: Residence,
        update: &Update,
    ) -> (Residence, Result<Outcome, OperationError>) {
        let (former, mut settings, met) = {
            let status = self.status.borrow();
            (status.settings.network.clone(), status.settings.with(update), status.deadline_met)
        };
        let met = deadline::after_change(&mut settings, met);
        let changed = async {
            let policy = Policy::resolve(&settings.network, &self.host.dns_servers);
            let policy = policy.map_err(OperationError::Policy)?;
            let ledger = match &mut residence {
                Residence::Paused(paused) => &paused.ledger,
                Residence::Up(up) => {
                    up.machine.slot.apply(&policy).await.map_err(OperationError::Network)?;
                    &up.ledger
                }
            };
            let generation = self.handle.generation();
            let settings = settings.clone();
            let recorded = ledger.change(|record| {
                record.settings = settings;
                record.deadline_met = met;
                record.generation = generation;
            });
            recorded.await.map_err(OperationError::Record)
        };
        let outcome = changed.await.map(|()| Outcome::Done);
        if let (Err(OperationError::Record(_)), Residence::Up(up)) = (&outcome, &mut residence) {
            // What is in force is what is recorded.
            let id = &self.handle.spec().id;
            if let Ok(former) = Policy::resolve(&former, &self.host.dns_servers)
                && let Err(error) = up.machine.slot.apply(&former).await
            {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "the former network policy is not in force again");
            }
        }
        if outcome.is_ok() {
            self.handle.activity().touch();
            self.publish(|status| {
                status.settings = settings;
                status.deadline_met = met;
                status.deadline_again = None;
            });
        }
        (residence, outcome)
    }

    /// Waits until the disk has not too many layers; a capture would add one more.
    async fn bound_layers(&self, up: &mut Up) {
        if up.ledger.record().layers.len() <= LAYERS_LIMIT {
            return;
        }
        let base = up.machine.base_disk.clone();
        let until = sleep_until(Instant::now() + bounds::STREAM);
        let done = tokio::select! {
            done = up.machine.vm.stream_disk(&base) => done,
            () = until => return,
        };
        self.merged(up, done).await;
    }

    /// The layers below the top one are in it now, or that was not possible.
    pub(super) async fn merged(&self, up: &mut Up, done: Result<(), VmmError>) {
        let id = &self.handle.spec().id;
        match done {
            Ok(()) => {
                let shortened = up.ledger.change(|record| record.layers.truncate(1)).await;
                self.host.collect_soon();
                if let Err(error) = shortened {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record still tells of layers that are not needed");
                    up.stream_after = Instant::now() + RETRY;
                }
            }
            Err(error) => {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "the layers of the disk could not be made one");
                // A machine that is gone is noticed by its exit.
                up.stream_after = Instant::now() + RETRY;
            }
        }
    }
}
