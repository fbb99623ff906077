//! The driver: the one task that owns a sandbox from its first file to its last.
//!
//! It begins with a bring-up, or with what an earlier agent left, be it under control or not ([`astray`]). Then it waits for the first of: the machine's
//! end, a request, one of the two clocks, the time to try again what did not go on. The machine's end comes first when several are true at once, because a
//! sandbox that is gone must not be reported as destroyed by request. Each is worked off before the next is looked
//! at; only a destroy is seen while something is under way. It breaks off all that may take long: a bring-up at the step
//! that it is in, a capture and the streaming of layers where they are, because what they leave is taken down anyway.
//!
//! What cannot be done leaves the sandbox as it was. Whatever ends it, everything is taken down, and the end is
//! published after nothing is left.

mod astray;
mod counted;
mod error;
mod verbs;

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use astray::Found;
pub use error::OperationError;
use jiff::Timestamp;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::TaskTracker;
use wrenn_types::{EndReason, SnapshotId, TimeoutAction};
use wrenn_vmm::{ExitReason, VmmError};

use super::{
    Deadline, End, Footing, Guest, Handle, Outcome, PausedStatus, SandboxSpec, Shared, Stage, Status,
    activity::Activity,
    bounds,
    bring_up::{self, BringUpError, Cancel, Persona, Recording, Up},
    deadline,
    host::Host,
    machine::gone,
    queue::{Next, RequestQueue, Verb},
    record::{Ledger, PausedRecord, Record},
    regain::RegainError,
    source::From,
    within::{Overdue, within},
};
use crate::{
    metrics::operations::Operation,
    snapshots::{Extent, Kept},
};

/// How long after a clock's action failed it is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Wall clocks are set: a deadline is looked at anew at least this often.
const DEADLINE_LOOK: Duration = Duration::from_secs(30);
/// How many layers a disk may have before they are streamed into one while the machine runs.
const LAYERS: usize = 8;

/// What a driver begins with.
#[derive(Debug)]
pub enum Beginning {
    /// Nothing: it is to be made.
    Create,
    /// A machine that an earlier agent started.
    Adopted(Box<Up>),
    /// A machine that lives, and why it could not be taken over.
    Astray(Arc<Ledger>, RegainError),
    /// A sandbox that is saved, and what was read of that, or why it cannot be.
    Paused(Arc<Ledger>, PausedRecord, Result<Box<Kept>, String>),
}

/// Starts the driver of a sandbox. `published` is called after every publication, by the driver.
pub fn start(
    host: Arc<Host>,
    spec: SandboxSpec,
    beginning: Beginning,
    tracker: &TaskTracker,
    published: impl Fn(&Handle) + Send + Sync + 'static,
) -> Handle {
    let (sender, receiver) = watch::channel(Status {
        stage: Stage::Starting,
        generation: spec.generation,
        started_at: None,
        phases: Vec::new(),
        incarnation: 0,
        settings: spec.settings.clone(),
        deadline_met: None,
        deadline_again: None,
        paused: None,
        last_failure: None,
        end: None,
    });
    let handle = Handle {
        inner: Arc::new(Shared {
            requests: std::sync::Mutex::new(RequestQueue::new(spec.generation)),
            spec,
            requested: Notify::new(),
            status: receiver,
            activity: Activity::new(),
            guest: std::sync::Mutex::new(None),
        }),
    };
    let driver = Driver { host, handle: handle.clone(), status: sender, published: Box::new(published) };
    tracker.spawn(driver.drive(beginning));
    handle
}

/// What there is of a sandbox between two operations.
#[derive(Debug)]
enum Residence {
    /// A machine that runs.
    Up(Box<Up>),
    /// What was saved.
    Paused(Paused),
}

impl Residence {
    fn ledger(&self) -> &Arc<Ledger> {
        match self {
            Self::Up(up) => &up.ledger,
            Self::Paused(paused) => &paused.ledger,
        }
    }
}

#[derive(Debug)]
struct Paused {
    ledger: Arc<Ledger>,
    snapshot: SnapshotId,
}

/// What the driver waits for.
#[derive(Debug)]
enum Event {
    Exited(ExitReason),
    Asked(Next),
    Idle,
    Deadline(TimeoutAction),
    /// A machine or a guest that did not go on is to be told so again.
    GoOn,
    /// The layers of the disk are one, or could not be made one.
    Streamed(Result<(), VmmError>),
}

struct Driver {
    host: Arc<Host>,
    handle: Handle,
    status: watch::Sender<Status>,
    published: Box<dyn Fn(&Handle) + Send + Sync>,
}

impl Driver {
    fn publish(&self, change: impl FnOnce(&mut Status)) {
        let generation = self.handle.generation();
        self.status.send_modify(|status| {
            status.generation = generation;
            change(status);
        });
        (self.published)(&self.handle);
    }

    async fn drive(self, beginning: Beginning) {
        (self.published)(&self.handle);
        let end = match beginning {
            Beginning::Create => {
                let begun = Instant::now();
                let created = self.create().await;
                // One that was destroyed on its way is neither done nor failed.
                if !matches!(created, Err(BringUpError::Cancelled(_))) {
                    self.count(Operation::Create, begun, created.is_ok());
                }
                match created {
                    Ok(up) => self.live(Residence::Up(Box::new(up))).await,
                    Err(error) => Some(self.failed(error)),
                }
            }
            Beginning::Adopted(mut up) => {
                self.enter(&mut up);
                self.live(Residence::Up(up)).await
            }
            Beginning::Astray(ledger, error) => match self.find(&ledger, error).await {
                Found::Up(mut up) => {
                    self.enter(&mut up);
                    self.live(Residence::Up(up)).await
                }
                Found::Ended(end) => Some(end),
                Found::Left => None,
            },
            Beginning::Paused(ledger, saved, kept) => {
                let bytes = match kept {
                    Ok(kept) => self.host.snapshot_bytes(&kept).await,
                    Err(error) => {
                        self.status.send_modify(|status| status.last_failure = Some(error));
                        0
                    }
                };
                self.rest(&saved, bytes, &ledger.record());
                self.live(Residence::Paused(Paused { ledger, snapshot: saved.snapshot })).await
            }
        };
        let id = &self.handle.spec().id;
        // Of one that goes on, nothing is published any more.
        let Some(end) = end else { return tracing::info!(%id, "sandbox left as it is") };
        tracing::info!(%id, reason = ?end.reason, message = end.message, "sandbox stopped");
        self.publish(|status| {
            status.stage = Stage::Stopped;
            status.end = Some(end);
        });
    }

    async fn create(&self) -> Result<Up, BringUpError> {
        let spec = self.handle.spec();
        let (user, workdir) = (spec.default_user.clone(), spec.default_workdir.clone());
        let from = match &spec.snapshot {
            Some(id) => From::Snapshot { id: id.clone(), user, workdir },
            None => From::Template { name: spec.template.clone(), user, workdir },
        };
        let persona = Persona { access_token: spec.access_token.clone(), is_new: true };
        let mut up = self.bring_up(Recording::New(Box::new(spec.clone())), persona, from).await?;
        let now = SystemTime::now();
        self.status.send_modify(|status| status.started_at = Some(now));
        self.enter(&mut up);
        Ok(up)
    }

    /// A bring-up that a destroy breaks off. Its steps are published with whatever is published next.
    async fn bring_up(&self, recording: Recording, persona: Persona, from: From) -> Result<Up, BringUpError> {
        let cancel = Cancel::default();
        let host = Arc::clone(&self.host);
        // Boxed: it is large, and would make the future of every sandbox as large for all of its life.
        let mut bring_up = Box::pin(bring_up::bring_up(host, recording, persona, cancel.clone(), from));
        loop {
            tokio::select! {
                biased;
                outcome = &mut bring_up => {
                    let mut up = outcome?;
                    let phases = std::mem::take(&mut up.phases);
                    tracing::info!(id = %up.machine.id, phases = ?PhaseList(&phases), "sandbox running");
                    self.status.send_modify(|status| status.phases = phases);
                    return Ok(up);
                }
                reason = self.end_wanted(), if !cancel.is_cancelled() => cancel.cancel(reason),
            }
        }
    }

    /// Opens the way to a machine's guest, and publishes that it runs.
    fn enter(&self, up: &mut Up) {
        let shared = &self.handle.inner;
        let footing = Footing {
            pid: up.machine.vm.pid(),
            slot: up.machine.slot.number(),
            ledger: Arc::clone(&up.ledger),
        };
        let (connector, idle) = (up.machine.connector(), up.idle.take());
        *shared.guest() = Some(Guest { connector, idle, footing });
        shared.activity.touch();
        let Record { started_at, deadline_met, .. } = up.ledger.record();
        self.publish(|status| {
            status.stage = Stage::Running;
            status.deadline_met = deadline_met;
            status.started_at = status.started_at.or_else(|| started_at.map(Into::into));
            status.incarnation += 1;
            status.paused = None;
        });
    }

    /// Publishes that it is saved, and what of its deadline is left.
    fn rest(&self, saved: &PausedRecord, bytes: u64, record: &Record) {
        self.publish(|status| {
            status.stage = Stage::Paused;
            status.settings.deadline = record.settings.deadline;
            status.deadline_met = record.deadline_met;
            status.deadline_again = None;
            status.paused =
                Some(PausedStatus { snapshot: saved.snapshot.clone(), at: saved.at.into(), bytes });
        });
    }

    /// An end that waits for nothing. That of the agent waits for a capture: what is saved outlives it. Cancel-safe.
    async fn overtaken(&self) {
        loop {
            let end = self.handle.inner.requests().end_wanted();
            if end.is_some_and(|reason| reason != EndReason::AgentStopped) {
                return;
            }
            // No permit is lost, as below.
            self.handle.inner.requested.notified().await;
        }
    }

    /// Does what may be dropped halfway if the sandbox ends after that; nothing once its end is asked for.
    async fn unless_overtaken<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.overtaken() => None,
            outcome = work => Some(outcome),
        }
    }

    /// The end that is asked for. Cancel-safe: it stays asked for.
    async fn end_wanted(&self) -> EndReason {
        loop {
            // `notify_one` keeps a permit when nobody waits, so a request put between the look and the
            // wait is not lost. The permit of another request is not either: its taker looks before it waits.
            if let Some(reason) = self.handle.inner.requests().end_wanted() {
                return reason;
            }
            self.handle.inner.requested.notified().await;
        }
    }

    /// The next request. Cancel-safe: a request is taken out only when it is answered.
    async fn next_request(&self) -> Next {
        loop {
            let taken = self.handle.inner.requests().take();
            if let Some(next) = taken {
                return next;
            }
            self.handle.inner.requested.notified().await;
        }
    }

    /// Waits until its deadline has passed, and until it is to be tried again; for ever when there is none.
    async fn deadline(&self, deadline: Option<Deadline>, again: Option<Timestamp>) -> TimeoutAction {
        let Some(Deadline { at, action }) = deadline else { return pending().await };
        let at = again.map_or(at, |again| again.max(at));
        loop {
            match Duration::try_from(at.duration_since((self.host.now)())) {
                Ok(left) if !left.is_zero() => sleep(left.min(DEADLINE_LOOK)).await,
                _ => return action,
            }
        }
    }

    async fn next_event(&self, residence: &mut Residence) -> Event {
        let (settings, again) = {
            let status = self.status.borrow();
            (status.settings.clone(), status.deadline_again)
        };
        match residence {
            Residence::Up(up) => {
                let (stream_after, go_on_at) = (up.stream_after, up.go_on_at);
                let Up { machine, ledger, .. } = up.as_mut();
                let mut exit = machine.vm.exit();
                let base = machine.base_disk.clone();
                let too_deep = ledger.record().layers.len() > LAYERS;
                let stream = async {
                    sleep_until(stream_after).await;
                    machine.vm.stream_disk(&base).await
                };
                tokio::select! {
                    biased;
                    reason = gone(&mut exit) => Event::Exited(reason),
                    next = self.next_request() => Event::Asked(next),
                    () = self.handle.inner.activity.expired(settings.timeout.duration()) => Event::Idle,
                    action = self.deadline(settings.deadline, again) => Event::Deadline(action),
                    () = sleep_until(go_on_at.unwrap_or_else(Instant::now)), if go_on_at.is_some() => Event::GoOn,
                    done = stream, if too_deep => Event::Streamed(done),
                }
            }
            Residence::Paused(_) => {
                tokio::select! {
                    biased;
                    next = self.next_request() => Event::Asked(next),
                    action = self.deadline(settings.deadline, None) => Event::Deadline(action),
                }
            }
        }
    }

    /// None when the sandbox goes on without this agent.
    async fn live(&self, mut residence: Residence) -> Option<End> {
        loop {
            let (next, reply) = match self.next_event(&mut residence).await {
                Event::Exited(reason) => {
                    let is_oom = match &residence {
                        Residence::Up(up) => {
                            let machine = &up.machine;
                            self.host.limits.was_out_of_memory(&machine.id, &machine.name)
                        }
                        Residence::Paused(_) => false,
                    };
                    return Some(self.take_down(residence, exited(&reason, is_oom)).await);
                }
                // What is saved outlives its agent.
                Event::Asked(Next::End(EndReason::AgentStopped))
                    if matches!(residence, Residence::Paused(_)) =>
                {
                    return None;
                }
                Event::Asked(Next::Leave) => {
                    if let Residence::Up(up) = residence {
                        *self.handle.inner.guest() = None;
                        up.machine.release().await;
                    }
                    return None;
                }
                Event::Asked(Next::End(reason)) => {
                    return Some(self.take_down(residence, ended(reason)).await);
                }
                Event::Idle => {
                    if self.status.borrow().settings.on_timeout == TimeoutAction::Kill {
                        return Some(self.take_down(residence, ended(EndReason::Inactivity)).await);
                    }
                    self.by_itself(residence, None).await
                }
                Event::Deadline(TimeoutAction::Kill) => {
                    return Some(self.take_down(residence, ended(EndReason::Deadline)).await);
                }
                Event::Deadline(TimeoutAction::Pause) => self.by_itself(residence, Some(RETRY)).await,
                Event::GoOn => {
                    if let Residence::Up(up) = &mut residence {
                        self.go_on(up).await;
                    }
                    (residence, None)
                }
                Event::Streamed(done) => {
                    if let Residence::Up(up) = &mut residence {
                        self.merged(up, done).await;
                    }
                    (residence, None)
                }
                Event::Asked(Next::Do(verb)) => {
                    self.note_generation(residence.ledger()).await;
                    let (next, outcome) = self.perform_counted(residence, verb).await;
                    (next, Some(outcome))
                }
            };
            residence = next;
            if let Some(outcome) = reply {
                let outcome = outcome.map_err(Arc::new);
                if let Err(error) = &outcome {
                    let id = &self.handle.spec().id;
                    tracing::warn!(%id, error = error.as_ref() as &dyn std::error::Error, "not done");
                }
                for reply in self.handle.inner.requests().done() {
                    // Whoever asked may be gone.
                    let _ = reply.send(outcome.clone());
                }
            }
        }
    }

    /// Keeps the generation that was accepted: after a crash in the middle of what it asks for, the next agent tells
    /// with it that the order was seen.
    async fn note_generation(&self, ledger: &Arc<Ledger>) {
        let generation = self.handle.generation();
        if let Err(error) = ledger.keep(|record| record.generation = generation).await {
            tracing::warn!(id = %self.handle.spec().id, error = &error as &dyn std::error::Error, "the record has an older generation");
        }
    }

    /// A pause that one of the clocks asks for. One that fails leaves the sandbox running, and is tried again: by the
    /// clock of its inactivity when it has been idle for as long once more, by its deadline after `again`.
    async fn by_itself(
        &self,
        residence: Residence,
        again: Option<Duration>,
    ) -> (Residence, Option<Result<Outcome, OperationError>>) {
        let (next, outcome) = match residence {
            Residence::Paused(paused) => {
                // It is what its deadline asks for already.
                self.meet_deadline(&paused.ledger).await;
                return (Residence::Paused(paused), None);
            }
            up @ Residence::Up(_) => self.perform_counted(up, Verb::Pause(Extent::Machine)).await,
        };
        if outcome.as_ref().is_err_and(OperationError::is_end) {
            return (next, None);
        }
        let failure = outcome.err().map(|error| chain(&error));
        if let Some(failure) = &failure {
            tracing::warn!(id = %self.handle.spec().id, failure, "a pause that a clock asked for failed; the sandbox runs");
            self.handle.activity().touch();
        }
        self.publish(|status| {
            if let (Some(_), Some(again)) = (&failure, again) {
                status.deadline_again = Some((self.host.now)() + again);
            }
            status.last_failure = failure;
        });
        (next, None)
    }

    /// A deadline that asks for a pause is over for a sandbox that is paused: it must not pause it again at its resume.
    pub(super) async fn meet_deadline(&self, ledger: &Arc<Ledger>) {
        let now = (self.host.now)();
        if deadline::met_by_pause(self.status.borrow().settings.deadline, now).is_none() {
            return;
        }
        if let Err(error) = ledger.change(|record| record.meet_deadline(now)).await {
            // The next agent finds the same: it is paused, and the moment has passed.
            tracing::warn!(id = %self.handle.spec().id, error = &error as &dyn std::error::Error, "the record still tells of a deadline that was met");
        }
        self.publish(|status| deadline::meet(&mut status.settings, &mut status.deadline_met, now));
    }

    /// Deletes what a sandbox was saved as; whether that is gone.
    async fn forget_snapshot(&self, snapshot: SnapshotId) -> bool {
        let (snapshots, id) = (self.host.snapshots.clone(), snapshot.clone());
        match within(bounds::REMOVE, move || snapshots.delete(&id)).await {
            Ok(Ok(_)) => return true,
            Ok(Err(error)) => {
                tracing::warn!(%snapshot, error = &error as &dyn std::error::Error, "a snapshot that is not needed stays until the next start");
            }
            // It goes a moment later, or when the next agent starts.
            Err(Overdue(bound)) => {
                tracing::warn!(%snapshot, ?bound, "a snapshot that is not needed stays for now");
            }
        }
        false
    }

    /// Whether a snapshot is there, as far as can be said.
    async fn has_snapshot(&self, id: SnapshotId) -> bool {
        let snapshots = self.host.snapshots.clone();
        let found = within(bounds::LOOK, move || snapshots.find(&id)).await;
        !matches!(found, Ok(Ok(None)))
    }

    /// Takes everything of a sandbox down: the machine, the way to it, what it was saved as, its layers, its record.
    async fn take_down(&self, residence: Residence, end: End) -> End {
        let moot = self.handle.inner.requests().ended();
        drop(moot);
        self.publish(|status| {
            status.stage = Stage::Stopping;
            status.end = Some(end.clone());
        });
        let (ledger, own) = match residence {
            Residence::Up(up) => {
                let Up { machine, ledger, .. } = *up;
                self.leave(machine).await;
                let record = ledger.record();
                // Of a capture that was broken off. A copy may be part of a snapshot by now.
                let next = record.capture.filter(|_| self.host.has_layers()).and_then(|it| it.next_layer);
                // The top of a machine that runs was never frozen, so nobody else stands on it.
                let own: Vec<_> = next.into_iter().chain(record.layers.into_iter().next()).collect();
                (ledger, own)
            }
            Residence::Paused(Paused { ledger, .. }) => {
                // From here on the next agent deletes it too, whatever of it is gone by then.
                if let Err(error) = ledger.change(Record::give_up).await {
                    let id = &self.handle.spec().id;
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record tells of no end that is under way");
                }
                (ledger, Vec::new())
            }
        };
        let id = &self.handle.spec().id;
        let record = ledger.record();
        let saved = record.obsolete.or_else(|| record.paused.map(|paused| paused.snapshot));
        let is_forgotten = match saved {
            // What has no manifest any more is collected.
            Some(saved) => self.forget_snapshot(saved.clone()).await || !self.has_snapshot(saved).await,
            None => true,
        };
        if !is_forgotten {
            tracing::warn!(%id, "the record stays until what it names is deleted, at the next start");
        } else if let Err(error) = ledger.remove().await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "the record stays until the next start");
        }
        // What lies below may be somebody else's too; and a layer may be made a moment after it was given up.
        let is_more = own.len() != 1 || ledger.record().layers.len() > 1;
        for layer in own {
            self.host.remove_layer(&layer).await;
        }
        if is_more {
            self.host.collect_soon();
        }
        end
    }

    fn failed(&self, error: BringUpError) -> End {
        drop(self.handle.inner.requests().ended());
        if let BringUpError::Cancelled(reason) = error {
            return ended(reason);
        }
        let id = &self.handle.spec().id;
        tracing::warn!(%id, error = &error as &dyn std::error::Error, "sandbox did not come up");
        let message = chain(&error);
        End { reason: EndReason::StartFailed, message, error: Some(Arc::new(error)) }
    }
}

fn ended(reason: EndReason) -> End {
    End { reason, message: reason.to_string(), error: None }
}

/// An error and its sources as one sentence.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// Why a sandbox has ended whose machine has; `is_oom` where the kernel killed that for its memory, of which the
/// machine's own end does not tell.
pub(super) fn exited(reason: &ExitReason, is_oom: bool) -> End {
    let (word, message) = match reason {
        _ if is_oom => return ended(EndReason::Oom),
        ExitReason::GuestShutdown => (EndReason::GuestShutdown, EndReason::GuestShutdown.to_string()),
        ExitReason::GuestPanic => (EndReason::GuestPanic, EndReason::GuestPanic.to_string()),
        ExitReason::VmmFailed { code, stderr } => {
            (EndReason::VmmCrash, format!("the virtual machine monitor ended with code {code}: {stderr}"))
        }
        ExitReason::VmmKilled { signal } => {
            (EndReason::VmmCrash, format!("the virtual machine monitor was killed by signal {signal}"))
        }
        ExitReason::Pager { said } => {
            (EndReason::VmmCrash, format!("the process that serves its memory ended: {said}"))
        }
        ExitReason::Stopped => (EndReason::VmmCrash, "the virtual machine monitor was stopped".to_owned()),
    };
    End { reason: word, message, error: None }
}

/// Phases as `name=1.2ms`.
struct PhaseList<'a>(&'a [super::Phase]);

impl std::fmt::Debug for PhaseList<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, phase) in self.0.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            let micros = phase.duration_micros;
            write!(f, "{space}{}={}.{}ms", phase.name, micros / 1000, micros % 1000 / 100)?;
        }
        Ok(())
    }
}
