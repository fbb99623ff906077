//! Follows a host: what it pushes is applied as it comes, and what was missed is found by comparison.
//!
//! ```text
//! connect ─► read the database ─► open the watch ─► all there is ─► in sync ─► compare ─► each change
//!    ▲                                                                             │
//!    └───────── bounded backoff ◄── the stream ends, or the host does not answer ──┘
//! ```
//!
//! A host that was there and is gone is tried again after a few milliseconds, because an agent that has died is
//! followed by one that has adopted its sandboxes before it listens. What was commanded of the one that died is
//! settled as soon as the next one is in sync ([`settle_when_back`]).
//!
//! The database is read *before* the host is asked, so that a sandbox that comes up in between is not taken
//! for one that the host has lost. Every change is a compare-and-set, so several control planes can follow
//! the same host. Nobody's request waits for any of this.

use std::{
    collections::HashMap,
    error::Error as _,
    sync::{Arc, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use wrenn_types::{SandboxId, SandboxState};

use super::{
    Core, CoreError,
    plan::{Action, Known, absent, compare, settle},
};
use crate::{
    host::{HostEvent, HostWatch, Loss, Observed},
    store::{HostRow, SandboxRow, Store},
};

/// The pause after a connection that was in sync; a socket that nobody listens on costs nothing to try.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// All states but those of a sandbox that is to end, or has: what a host says of one that is there counts there.
const THERE: [SandboxState; 7] = [
    SandboxState::Starting,
    SandboxState::Running,
    SandboxState::Missing,
    SandboxState::Pausing,
    SandboxState::Paused,
    SandboxState::Resuming,
    SandboxState::Snapshotting,
];
/// How long a host may take to say all that it has.
const SNAPSHOT: Duration = Duration::from_secs(15);

/// What is known of the connection to a host. Owned by the task that follows it.
#[derive(Debug)]
struct Contact {
    /// When it was last in sync.
    last: Instant,
    /// Whether the last connection came as far as that.
    in_sync: bool,
    /// Its sandboxes were called missing since.
    called_missing: bool,
}

/// Follows the host until the control plane stops.
pub(crate) async fn follow_host(core: Arc<Core>) {
    let stop = core.stop.clone();
    let mut pause = FIRST_PAUSE;
    let mut contact = Contact { last: Instant::now(), in_sync: true, called_missing: false };
    while !stop.is_cancelled() {
        let is_news = std::mem::take(&mut contact.in_sync);
        let outcome = stop.run_until_cancelled(follow_once(&core, &mut contact)).await;
        let Some(outcome) = outcome else { break };
        if contact.in_sync {
            contact.last = Instant::now();
            pause = FIRST_PAUSE;
        }
        match &outcome {
            Ok(()) => tracing::info!("the host agent ended the watch"),
            // Once for each absence.
            Err(error) if is_news || contact.in_sync => tracing::info!(
                error = error as &dyn std::error::Error,
                cause = error.source(),
                "the host agent is not connected"
            ),
            Err(error) => tracing::debug!(
                error = error as &dyn std::error::Error,
                cause = error.source(),
                "the host agent is still not connected"
            ),
        }
        if !contact.called_missing && contact.last.elapsed() > core.bounds.host_missing {
            contact.called_missing = call_missing(&core).await;
        }
        let _ = stop.run_until_cancelled(sleep(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn call_missing(core: &Core) -> bool {
    let Some(host) = core.host_id.borrow().clone() else { return false };
    match core.store.mark_missing(&host).await {
        Ok(number) => {
            if number > 0 {
                tracing::warn!(%host, number, "the host has not been heard of: its sandboxes are missing");
            }
            true
        }
        Err(_) => false,
    }
}

/// One connection to the host, from its beginning to its end.
async fn follow_once(core: &Arc<Core>, contact: &mut Contact) -> Result<(), CoreError> {
    let facts = core.host.facts().await?;
    let host = facts.id.clone();
    let row = HostRow {
        id: facts.id,
        version: facts.version,
        vmm: facts.vmm,
        vmm_version: facts.vmm_version,
        accelerator: facts.accelerator,
    };
    core.store.upsert_host(&row).await?;
    if let Err(error) = core.platform_templates().await {
        // A host without them still has its sandboxes.
        tracing::warn!(error = &error as &dyn std::error::Error, "the host does not tell its templates");
    }

    let known = read_known(core, &host).await?;
    let mut watch = core.host.watch().await?;
    let seen = timeout(SNAPSHOT, snapshot(core, &mut watch)).await.map_err(|_| {
        CoreError::Host(crate::host::HostError::Malformed { what: "the watch did not come into sync" })
    })??;
    apply_all(core, &known, &seen).await?;
    // Wakes who waits for the host to be back, too.
    core.host_id.send_replace(Some(host.clone()));
    (contact.in_sync, contact.called_missing) = (true, false);
    tracing::info!(%host, sandboxes = seen.len(), "following the host");

    // What was too young to be judged just now is not when its grace is over.
    let first = core.bounds.start_grace.min(core.bounds.sweep);
    let mut sweep = tokio::time::interval_at(Instant::now() + first, core.bounds.sweep);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Not waited for: what happens on the host is told meanwhile.
    let mut orders: JoinHandle<()> = core.tasks.spawn(Arc::clone(core).sweep(host.clone()));
    loop {
        tokio::select! {
            event = watch.next_or(&core.stop) => match event? {
                Some(HostEvent::Sandbox(observed)) => apply_one(core, &observed).await?,
                Some(HostEvent::InSync) => {}
                Some(HostEvent::Loss(loss)) => tell_loss(core, &loss),
                None => return Ok(()),
            },
            _ = sweep.tick() => {
                let known = read_known(core, &host).await?;
                let seen = core.host.sandboxes().await?;
                let seen = seen.into_iter().map(|observed| (observed.id.clone(), observed)).collect();
                apply_all(core, &known, &seen).await?;
                if orders.is_finished() {
                    orders = core.tasks.spawn(Arc::clone(core).sweep(host.clone()));
                }
            }
        }
    }
}

async fn snapshot(core: &Core, watch: &mut HostWatch) -> Result<HashMap<SandboxId, Observed>, CoreError> {
    let mut seen = HashMap::new();
    while let Some(event) = watch.next().await? {
        match event {
            HostEvent::Sandbox(observed) => drop(seen.insert(observed.id.clone(), observed)),
            HostEvent::InSync => return Ok(seen),
            HostEvent::Loss(loss) => tell_loss(core, &loss),
        }
    }
    Err(CoreError::Host(crate::host::HostError::Malformed { what: "the watch ended before it was in sync" }))
}

/// Says, once, what a host did while no control plane was there. What it paused is found by the comparison.
fn tell_loss(core: &Core, loss: &Loss) {
    if core.loss_told.lock().unwrap_or_else(PoisonError::into_inner).replace(loss.lost_at)
        == Some(loss.lost_at)
    {
        return;
    }
    let Loss { away_since, lost_at, pause, running, paused, failed } = loss;
    let policy = if *pause { "pause" } else { "keep" };
    tracing::warn!(
        %away_since,
        %lost_at,
        policy,
        running,
        paused = ?paused,
        failed = ?failed,
        "the host was without a control plane for longer than its bound"
    );
}

fn known(row: &SandboxRow) -> Option<Known> {
    Some(Known {
        id: row.id.parse().ok()?,
        state: row.state(),
        generation: row.generation,
        since: row.last_updated.to_jiff(),
        deadline: row.deadline_at.map(jiff_sqlx::Timestamp::to_jiff),
    })
}

async fn read_known(core: &Core, host: &wrenn_types::HostId) -> Result<Vec<Known>, CoreError> {
    Ok(core.store.live_on_host(host).await?.iter().filter_map(known).collect())
}

/// The time after which an intent may still be on its way to the host.
fn young_since(core: &Core) -> Timestamp {
    let grace = SignedDuration::try_from(core.bounds.start_grace).unwrap_or(SignedDuration::ZERO);
    Timestamp::now().checked_sub(grace).unwrap_or(Timestamp::MIN)
}

async fn apply_all(
    core: &Core,
    known: &[Known],
    seen: &HashMap<SandboxId, Observed>,
) -> Result<(), CoreError> {
    for action in compare(known, seen, &core.busy.now(), young_since(core)) {
        apply(core, action).await?;
    }
    Ok(())
}

async fn apply_one(core: &Core, observed: &Observed) -> Result<(), CoreError> {
    if let Some(at) = observed.last_active_at {
        core.recorder.sandbox_used(&observed.id, at);
    }
    if core.busy.contains(&observed.id) {
        return Ok(());
    }
    let row = patient(core).sandbox_of_host(&observed.id).await?;
    let Some(row) = row.as_ref().and_then(known).filter(|row| !row.state.is_final()) else { return Ok(()) };
    match settle(&row, observed, young_since(core)) {
        // An event can be older than the row. What the host says now is not.
        Some(
            Action::Run { .. } | Action::Pausing { .. } | Action::Pause { .. } | Action::ClearDeadline { .. },
        ) => {
            if let Some(observed) = core.host.sandbox(&row.id).await?
                && let Some(action) = settle(&row, &observed, young_since(core))
            {
                apply(core, action).await?;
            }
            Ok(())
        }
        Some(action) => apply(core, action).await,
        None => Ok(()),
    }
}

/// Asks the host about one sandbox and writes what it says: what was to become of it has failed, so nothing is on
/// its way any more. A row that was intended otherwise since is left alone.
pub(super) async fn settle_now(core: &Core, id: &SandboxId, generation: i64) -> Result<(), CoreError> {
    let row = patient(core).sandbox_of_host(id).await?;
    let row = row.as_ref().and_then(known);
    let Some(row) = row.filter(|row| !row.state.is_final() && row.generation == generation) else {
        return Ok(());
    };
    let action = match core.host.sandbox(id).await? {
        Some(observed) => settle(&row, &observed, Timestamp::MAX),
        None => absent(&row, Timestamp::MAX),
    };
    match action {
        Some(action) => apply(core, action).await,
        None => Ok(()),
    }
}

/// Does [`settle_now`], and if the host is away, does it again when it is back. Returns before that: a task goes on,
/// for as long as a comparison would take the intent for one that is on its way; after that, comparisons settle it.
pub(super) async fn settle_when_back(core: &Arc<Core>, id: &SandboxId, generation: i64) {
    // From before the first attempt on, so that no return in between is missed.
    let mut host = core.host_id.subscribe();
    let Err(error) = settle_now(core, id, generation).await else { return };
    tracing::info!(
        %id,
        error = &error as &dyn std::error::Error,
        "what became of a sandbox is found out when its host is back"
    );
    let (core, id) = (Arc::clone(core), id.clone());
    let tasks = core.tasks.clone();
    tasks.spawn(async move {
        let settled = async {
            while host.changed().await.is_ok() {
                match settle_now(&core, &id, generation).await {
                    Ok(()) => break,
                    Err(error) => tracing::info!(
                        %id, error = &error as &dyn std::error::Error, "a sandbox is not settled yet"
                    ),
                }
            }
            core.moved.notify_waiters();
        };
        let _ = core.stop.run_until_cancelled(timeout(core.bounds.start_grace, settled)).await;
    });
}

/// What a host says is said once: its writing can wait for a database that is away for a moment, and if it
/// stays away, the next connection compares everything.
fn patient(core: &Core) -> Store {
    core.store.with_bound(core.bounds.database_patient)
}

async fn apply(core: &Core, action: Action) -> Result<(), CoreError> {
    tracing::debug!(?action, "the host and the database disagree");
    let store = patient(core);
    match action {
        Action::Run { id, generation, seen } => {
            store.mark_running(&id, generation, &THERE, seen).await?;
            core.moved.notify_waiters();
        }
        Action::Pausing { id, generation } => {
            core.routes.forget(&id);
            store.mark_pausing(&id, generation).await?;
        }
        Action::Pause { id, generation, seen } => {
            core.routes.forget(&id);
            if store.mark_paused(&id, generation, &THERE, seen).await?.is_some() {
                tracing::info!(%id, "a sandbox is paused");
            }
            core.moved.notify_waiters();
        }
        Action::ClearDeadline { id, generation, met } => store.clear_deadline(&id, generation, met).await?,
        Action::End { id, generation, state, reason, message } => {
            core.routes.forget(&id);
            core.moved.notify_waiters();
            if store.mark_ended(&id, generation, state, reason, &message).await? {
                tracing::info!(%id, %state, ?reason, message, "a sandbox has ended by itself");
            }
        }
        Action::Destroy { id, generation } => {
            core.host.destroy(&id, generation, core.bounds.destroy).await?;
            let (state, reason) = (SandboxState::Stopped, wrenn_types::EndReason::Requested);
            store.mark_ended(&id, generation, state, reason, "").await?;
        }
        Action::DestroyUnknown { id, generation } => {
            let row = store.sandbox_of_host(&id).await?;
            let live = row.as_ref().is_some_and(|row| !row.state().is_final());
            if !live && !core.busy.contains(&id) {
                tracing::warn!(%id, "the host has a sandbox that nobody knows: it is destroyed");
                let generation = row.map_or(generation, |row| generation.max(row.generation));
                core.host.destroy(&id, generation, core.bounds.destroy).await?;
            }
        }
    }
    Ok(())
}
