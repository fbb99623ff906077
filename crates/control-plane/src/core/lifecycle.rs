//! Create, list, get, delete, ping. What is between create and delete is in [`super::persist`].
//!
//! ```text
//! create:  row `starting` ──► host creates ──► row `running` ──► 201     (the row reaches the disk
//!              │                   │ fails          │                    while the host works)
//!              │                   │                │ cannot be written, or was deleted meanwhile
//!              │                   ▼                ▼
//!              └─ row removed ◄────┴─ host destroys ┘
//!
//! delete:  row `stopping`, generation + 1 ──► host destroys ──► row `stopped` ──► 204
//! ```
//!
//! Creates and deletes run as tasks of their own: a caller that goes away does not leave half of one
//! behind. A caller that waits longer than the bound is told the transitional state, and the task goes on.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::time::timeout;
use wrenn_api::Sandbox;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, HostId, MemoryMib, SandboxId, SandboxState, TeamId, Vcpus,
};

use super::{Caller, Core, CoreError, busy::Busy, spec::Spec};
use crate::{
    host::{self, CreateCommand, Phase, Source},
    store::{self, Cursor, ListFilter, NewSandbox, SandboxRow, Seen},
};

/// How often a new id may turn out to be taken.
const ID_ATTEMPTS: usize = 8;

/// What became of a create.
#[derive(Debug)]
pub(crate) enum Creation {
    Running {
        sandbox: Sandbox,
        phases: Vec<Phase>,
        database: Duration,
    },
    /// It goes on.
    Starting {
        sandbox: Sandbox,
    },
}

/// What became of a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletion {
    Done,
    /// It goes on.
    Stopping,
}

/// Which sandboxes to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listed {
    pub(crate) states: Vec<SandboxState>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) after: Option<Cursor>,
    pub(crate) limit: Option<u32>,
}

/// A part of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) sandboxes: Vec<Sandbox>,
    pub(crate) next: Option<Cursor>,
}

/// Who decides what becomes of the row of a create that fails: while the caller waits, the error is the
/// answer and the row goes; once the caller was told `starting`, the row must say it.
#[derive(Debug, Default)]
pub(super) struct Audience(AtomicU8);

impl Audience {
    const WAITING: u8 = 0;
    const GONE: u8 = 1;
    const TOLD: u8 = 2;

    fn claim(&self, by: u8) -> bool {
        self.0.compare_exchange(Self::WAITING, by, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The caller stops waiting; false when an answer is about to come.
    pub(super) fn leave(&self) -> bool {
        self.claim(Self::GONE)
    }

    /// The create tells the caller; false when nobody waits any more.
    fn tell(&self) -> bool {
        self.claim(Self::TOLD)
    }
}

/// What a new sandbox is made from, once the names are known.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) host: HostId,
    pub(super) source: Source,
    /// What the row says it was made from.
    pub(super) template: String,
    pub(super) vcpus: Vcpus,
    pub(super) memory: MemoryMib,
    pub(super) disk: Option<DiskMib>,
}

pub(super) struct Created {
    pub(super) row: SandboxRow,
    phases: Vec<Phase>,
    database: Duration,
}

impl Core {
    /// A new sandbox, running or on its way.
    pub(crate) async fn create(self: &Arc<Self>, caller: &Caller, spec: Spec) -> Result<Creation, CoreError> {
        let metadata = json!({
            "template": spec.template, "vcpus": spec.vcpus, "memory_mb": spec.memory,
        });
        let mut act = self.act(caller, "", "create", metadata)?;
        let audience = Arc::new(Audience::default());
        let written = Arc::new(OnceLock::new());
        let task = {
            let (core, caller) = (Arc::clone(self), caller.clone());
            let (audience, written) = (Arc::clone(&audience), Arc::clone(&written));
            self.tasks.spawn(async move {
                let outcome = match core.origin(caller.team, &spec).await {
                    Ok(origin) => core.bring_up(caller.team, spec, origin, &audience, &written).await,
                    Err(error) => Err(error),
                };
                act.to(written.get().map_or("", |row: &SandboxRow| row.id.as_str()));
                act.done(&outcome);
                outcome
            })
        };
        tokio::pin!(task);
        if let Ok(done) = timeout(self.bounds.lifecycle_answer, &mut task).await {
            return done.map_err(CoreError::Task)?.and_then(running);
        }
        match written.get() {
            Some(row) if audience.leave() => Ok(Creation::Starting { sandbox: public(row)? }),
            // The answer is a moment away: it is known already, or not even the row has been written yet.
            _ => task.await.map_err(CoreError::Task)?.and_then(running),
        }
    }

    /// Writes the row of a new sandbox, has it made, and writes that it runs.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        team: TeamId,
        spec: Spec,
        origin: Origin,
        audience: &Audience,
        written: &OnceLock<SandboxRow>,
    ) -> Result<Created, CoreError> {
        let begin = std::time::Instant::now();
        let (row, busy) = self.write_start(team, &spec, &origin).await?;
        let before = begin.elapsed();
        let token = AccessToken::from_stored(row.access_token.clone());
        let generation = row.generation;
        let id = busy.id().clone();
        let bound = self.bounds.bring_up(row.size());
        let _ = written.set(row);

        let command = CreateCommand {
            id: id.clone(),
            generation,
            source: origin.source,
            vcpus: origin.vcpus,
            memory: origin.memory,
            disk: origin.disk,
            access_token: token.clone(),
            environment: spec.environment,
            settings: spec.settings,
        };
        // The row becomes durable while the host works, so that nobody waits for the disk.
        let patient = self.store.with_bound(self.bounds.database_patient);
        let (created, flushed) = tokio::join!(self.host.create(command, bound), patient.flush());
        let (observed, phases) = match created {
            Ok(created) => created,
            Err(error) => {
                self.undo_start(&id, generation, &error, audience).await;
                // A host breaks off what is destroyed on its way, and then it is no failure of the host.
                return match self.store.sandbox_of_host(&id).await {
                    Ok(Some(row)) if row.generation > generation => Err(CoreError::Destroyed(id)),
                    _ => Err(error.into()),
                };
            }
        };
        let (begin, moment) = (std::time::Instant::now(), self.routes.moment());
        let marked = match flushed {
            Ok(()) => {
                use SandboxState::{Missing, Running, Starting};
                let from = [Starting, Running, Missing];
                patient.mark_running(&id, generation, &from, Seen::from(&observed)).await
            }
            Err(error) => Err(error),
        };
        match marked {
            Ok(Some(row)) => {
                self.remember_route(moment, team, &id, &row);
                Ok(Created { row, phases, database: before + begin.elapsed() })
            }
            Ok(None) => {
                self.destroy_unwanted(&id, generation + 1).await;
                Err(CoreError::Destroyed(id))
            }
            Err(error) => {
                // Nobody would ever find it: it goes, and the row is called an error by a later comparison.
                self.destroy_unwanted(&id, generation + 1).await;
                Err(error.into())
            }
        }
    }

    async fn write_start(
        self: &Arc<Self>,
        team: TeamId,
        spec: &Spec,
        origin: &Origin,
    ) -> Result<(SandboxRow, Busy), CoreError> {
        for _ in 0..ID_ATTEMPTS {
            let busy = Busy::begin(self, SandboxId::random());
            let new = NewSandbox {
                id: busy.id().clone(),
                team,
                host: origin.host.clone(),
                template: origin.template.clone(),
                vcpus: origin.vcpus,
                memory: origin.memory,
                disk: origin.disk,
                metadata: spec.metadata.clone(),
                access_token: AccessToken::random(),
                settings: spec.settings.clone(),
                auto_resume: spec.auto_resume,
                source_snapshot: match &origin.source {
                    Source::Snapshot(id) => Some(id.clone()),
                    Source::Template(_) => None,
                },
            };
            if let Some(row) = self.store.insert_sandbox(&new).await? {
                return Ok((row, busy));
            }
        }
        Err(CoreError::TooMany("no free sandbox id was found"))
    }

    /// After a create that its host did not do.
    async fn undo_start(
        self: &Arc<Self>,
        id: &SandboxId,
        generation: i64,
        error: &host::HostError,
        audience: &Audience,
    ) {
        // A host that refuses has made nothing. One that has failed or has not answered may have.
        if !matches!(error, host::HostError::Refused { .. }) {
            self.destroy_unwanted(id, generation + 1).await;
        }
        let store = self.store.with_bound(self.bounds.database_patient);
        let settled = if audience.tell() {
            store.forget_start(id, generation).await
        } else {
            let (state, reason) = (SandboxState::Error, EndReason::StartFailed);
            store.mark_ended(id, generation, state, reason, &error.to_string()).await.map(drop)
        };
        if let Err(error) = settled {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "failed create not written");
        }
    }

    /// Destroys what has no row to be found by. If the host cannot be reached now, the comparison after the
    /// next connection finds that nobody knows it.
    pub(super) async fn destroy_unwanted(&self, id: &SandboxId, generation: i64) {
        if let Err(error) = self.host.destroy(id, generation, self.bounds.destroy).await {
            tracing::warn!(%id, error = &error as &dyn std::error::Error, "unwanted sandbox not destroyed");
        }
    }

    /// The sandboxes of a team, newest first.
    pub(crate) async fn list(&self, caller: &Caller, listed: Listed) -> Result<Page, CoreError> {
        let filter = ListFilter {
            states: listed.states,
            metadata: listed.metadata,
            after: listed.after,
            // One more than asked for tells whether there is a next page.
            limit: listed.limit.map(|limit| i64::from(limit) + 1),
        };
        let mut rows = self.store.sandboxes(caller.team, &filter).await?;
        let mut next = None;
        if let Some(limit) = listed.limit
            && rows.len() > limit as usize
        {
            rows.truncate(limit as usize);
            next = rows.last().map(cursor).transpose()?;
        }
        let sandboxes = rows.iter().map(public).collect::<Result<_, _>>()?;
        Ok(Page { sandboxes, next })
    }

    /// One sandbox, with what its host knows of it now.
    pub(crate) async fn get(&self, caller: &Caller, id: &SandboxId) -> Result<Sandbox, CoreError> {
        let row = self.row(caller.team, id).await?;
        let mut sandbox = public(&row)?;
        if matches!(row.state(), SandboxState::Running | SandboxState::Paused | SandboxState::Snapshotting)
            // Without its host's answer the rest is still right.
            && let Ok(Some(observed)) = self.host.sandbox(id).await
        {
            let bytes = observed.paused_bytes.or(observed.disk_used_bytes);
            sandbox.disk_used_mb = bytes.map(|bytes| bytes.div_ceil(1 << 20));
            sandbox.last_active_at = observed.last_active_at.max(sandbox.last_active_at);
            sandbox.last_failure = Some(observed.last_failure).filter(|failure| !failure.is_empty());
        }
        Ok(sandbox)
    }

    /// Destroys a sandbox, or finds it gone.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
    ) -> Result<Deletion, CoreError> {
        let task = {
            let (core, caller, id) = (Arc::clone(self), caller.clone(), id.clone());
            self.tasks.spawn(async move {
                core.audited(&caller, &id, "delete", json!({}), core.take_down(caller.team, &id)).await
            })
        };
        match timeout(self.bounds.lifecycle_answer, task).await {
            Ok(done) => done.map_err(CoreError::Task)?.map(|()| Deletion::Done),
            Err(_) => Ok(Deletion::Stopping),
        }
    }

    pub(super) async fn take_down(&self, team: TeamId, id: &SandboxId) -> Result<(), CoreError> {
        let row = self.store.mark_stopping(team, id).await?;
        let row = row.ok_or_else(|| CoreError::NoSuchSandbox(id.to_string()))?;
        if row.state().is_final() {
            return Ok(());
        }
        self.routes.forget(id);
        self.host.destroy(id, row.generation, self.bounds.destroy).await?;
        let store = self.store.with_bound(self.bounds.database_patient);
        store.mark_ended(id, row.generation, SandboxState::Stopped, EndReason::Requested, "").await?;
        Ok(())
    }

    /// Moves the inactivity clock of a sandbox to now.
    pub(crate) async fn ping(&self, caller: &Caller, id: &SandboxId) -> Result<(), CoreError> {
        // What is known of it is enough: its host says whether it still runs. This resumes nothing.
        if self.routes.find(caller.team, id).is_none() {
            self.live_row(caller, id).await?;
        }
        match self.host.ping(id).await {
            Ok(()) => {
                self.recorder.sandbox_used(id, jiff::Timestamp::now());
                Ok(())
            }
            Err(host::HostError::Refused { message, .. }) => {
                self.routes.forget(id);
                let state = match self.host.sandbox(id).await? {
                    Some(observed) => observed.stage.state(),
                    None => SandboxState::Stopped,
                };
                Err(CoreError::NotRunning { id: id.clone(), state, reason: Some(message) })
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn running(created: Created) -> Result<Creation, CoreError> {
    let Created { row, phases, database } = created;
    Ok(Creation::Running { sandbox: public(&row)?, phases, database })
}

pub(super) fn malformed(error: impl std::error::Error + Send + Sync + 'static) -> CoreError {
    // The table's checks and our own writing keep this from happening.
    CoreError::Store(store::StoreError::Malformed(Box::new(error)))
}

fn cursor(row: &SandboxRow) -> Result<Cursor, CoreError> {
    Ok(Cursor { created_at: row.created_at.to_jiff(), id: row.id.parse().map_err(malformed)? })
}

/// A row as its owner sees it.
pub(super) fn public(row: &SandboxRow) -> Result<Sandbox, CoreError> {
    let positive = |number: i32| u32::try_from(number).map_err(malformed);
    let settings = row.settings();
    Ok(Sandbox {
        id: row.id.parse().map_err(malformed)?,
        status: row.state().into(),
        template: row.template.clone(),
        source_snapshot: row.source_snapshot.as_deref().map(str::parse).transpose().map_err(malformed)?,
        vcpus: positive(row.vcpus)?,
        memory_mb: positive(row.memory_mb)?,
        disk_size_mb: row.disk_size_mb.map(positive).transpose()?,
        disk_used_mb: None,
        timeout_sec: positive(row.timeout_sec)?,
        on_timeout: settings.on_timeout,
        deadline: settings.deadline.map(|deadline| deadline.at),
        deadline_action: settings.deadline.map(|deadline| deadline.action),
        auto_resume: row.auto_resume,
        allow_internet_access: row.allow_internet_access,
        metadata: row.metadata.0.clone(),
        created_at: row.created_at.to_jiff(),
        started_at: row.started_at.map(jiff_sqlx::Timestamp::to_jiff),
        paused_at: row.paused_at.map(jiff_sqlx::Timestamp::to_jiff),
        last_active_at: row.last_active_at.map(jiff_sqlx::Timestamp::to_jiff),
        last_updated: row.last_updated.to_jiff(),
        end_reason: row.end_reason(),
        end_message: row.end_message.clone(),
        last_failure: None,
    })
}
