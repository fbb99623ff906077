//! Sandboxes: rows that change by compare-and-set. What happens between running and paused is in
//! [`super::persist`].

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::types::Json;
use uuid::Uuid;
use wrenn_types::{
    AccessToken, DiskMib, EndReason, HostId, InactivityTimeout, MemoryMib, SandboxId, SandboxState,
    SnapshotId, TeamId, TimeoutAction, Vcpus,
};

use super::{Metadata, Policy, Store, StoreError};
use crate::{
    config::Size,
    host::{Deadline, Settings},
};

/// A row as the database has it.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "the columns of the table, whether or not something reads them yet")]
pub(crate) struct SandboxRow {
    pub(crate) id: String,
    pub(crate) team_id: Uuid,
    pub(crate) host_id: String,
    pub(crate) template: String,
    pub(crate) state: String,
    pub(crate) generation: i64,
    pub(crate) vcpus: i32,
    pub(crate) memory_mb: i32,
    pub(crate) disk_size_mb: Option<i32>,
    pub(crate) timeout_sec: i32,
    pub(crate) metadata: Metadata,
    pub(crate) allow_internet_access: bool,
    pub(crate) access_token: String,
    pub(crate) end_reason: Option<String>,
    pub(crate) end_message: Option<String>,
    pub(crate) created_at: jiff_sqlx::Timestamp,
    pub(crate) started_at: Option<jiff_sqlx::Timestamp>,
    pub(crate) last_active_at: Option<jiff_sqlx::Timestamp>,
    pub(crate) last_updated: jiff_sqlx::Timestamp,
    pub(crate) network: Policy,
    pub(crate) on_timeout: String,
    pub(crate) deadline_at: Option<jiff_sqlx::Timestamp>,
    pub(crate) deadline_action: String,
    pub(crate) auto_resume: bool,
    pub(crate) paused_at: Option<jiff_sqlx::Timestamp>,
    pub(crate) source_snapshot: Option<String>,
    pub(crate) settings_pending: bool,
}

/// The word of an action, as it is stored.
pub(super) fn action_word(action: TimeoutAction) -> &'static str {
    match action {
        TimeoutAction::Pause => "pause",
        TimeoutAction::Kill => "kill",
    }
}

fn action(word: &str) -> TimeoutAction {
    // The table's own check admits no third word.
    if word == "kill" { TimeoutAction::Kill } else { TimeoutAction::Pause }
}

impl SandboxRow {
    /// The state; the table's own check admits no other words.
    pub(crate) fn state(&self) -> SandboxState {
        SandboxState::from_word(&self.state).unwrap_or(SandboxState::Error)
    }

    /// What decides how long things take with it.
    pub(crate) fn size(&self) -> Size {
        Size::of(self.memory_mb, self.disk_size_mb)
    }

    /// How long it may be idle; the table's own check admits no number out of bounds.
    pub(crate) fn timeout(&self) -> InactivityTimeout {
        InactivityTimeout::new(self.timeout_sec.into()).unwrap_or_default()
    }

    /// What of it can be changed while it is there.
    pub(crate) fn settings(&self) -> Settings {
        let action_at = action(&self.deadline_action);
        let deadline = self.deadline_at.map(|at| Deadline { at: at.to_jiff(), action: action_at });
        Settings {
            network: self.network.0.clone(),
            timeout: self.timeout(),
            on_timeout: action(&self.on_timeout),
            deadline,
        }
    }

    /// Why it ended.
    pub(crate) fn end_reason(&self) -> Option<EndReason> {
        let word = self.end_reason.clone()?;
        serde_json::from_value(word.into()).ok()
    }
}

/// The word of a reason, as it is stored and shown.
fn reason_word(reason: EndReason) -> String {
    match serde_json::to_value(reason) {
        Ok(serde_json::Value::String(word)) => word,
        _ => reason.to_string(),
    }
}

/// What is known of a sandbox before its host has heard of it.
#[derive(Debug, Clone)]
pub(crate) struct NewSandbox {
    pub(crate) id: SandboxId,
    pub(crate) team: TeamId,
    pub(crate) host: HostId,
    pub(crate) template: String,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MemoryMib,
    pub(crate) disk: Option<DiskMib>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) access_token: AccessToken,
    pub(crate) settings: Settings,
    pub(crate) auto_resume: bool,
    pub(crate) source_snapshot: Option<SnapshotId>,
}

/// Where a page of a list begins: after the sandbox that has these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) created_at: Timestamp,
    pub(crate) id: SandboxId,
}

/// Which sandboxes to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListFilter {
    /// Only these states; none named means all that are neither stopped nor in error.
    pub(crate) states: Vec<SandboxState>,
    /// Only those that have all of these.
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) after: Option<Cursor>,
    pub(crate) limit: Option<i64>,
}

pub(super) fn small(number: u32) -> i32 {
    // Every bound of the resources is far below.
    i32::try_from(number).unwrap_or(i32::MAX)
}

impl Store {
    /// Writes a new sandbox in state `starting`, or says that its id is taken. Durable after a flush.
    pub(crate) async fn insert_sandbox(&self, new: &NewSandbox) -> Result<Option<SandboxRow>, StoreError> {
        let Settings { network, timeout, on_timeout, deadline } = &new.settings;
        let deadline_at = deadline.map(|deadline| jiff_sqlx::Timestamp::from(deadline.at));
        let deadline_action = deadline.map_or_else(TimeoutAction::default, |deadline| deadline.action);
        self.run("write a sandbox", || {
            sqlx::query_as!(
                SandboxRow,
                "INSERT INTO sandboxes (id, team_id, host_id, template, state, generation, vcpus, memory_mb,
                     disk_size_mb, timeout_sec, metadata, allow_internet_access, access_token, network,
                     on_timeout, deadline_at, deadline_action, auto_resume, source_snapshot)
                 VALUES ($1, $2, $3, $4, 'starting', 1, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,
                     $17)
                 ON CONFLICT (id) DO NOTHING
                 RETURNING *",
                new.id.as_str(),
                new.team.0,
                new.host.as_str(),
                new.template,
                small(new.vcpus.get()),
                small(new.memory.get()),
                new.disk.map(|disk| small(disk.get())),
                small(timeout.get()),
                Json(&new.metadata) as _,
                network.internet,
                new.access_token.expose(),
                Json(network) as _,
                action_word(*on_timeout),
                deadline_at as _,
                action_word(deadline_action),
                new.auto_resume,
                new.source_snapshot.as_ref().map(SnapshotId::as_str),
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// One sandbox of a team.
    pub(crate) async fn sandbox(
        &self,
        team: TeamId,
        id: &SandboxId,
    ) -> Result<Option<SandboxRow>, StoreError> {
        self.run("read a sandbox", || {
            sqlx::query_as!(
                SandboxRow,
                "SELECT * FROM sandboxes WHERE id = $1 AND team_id = $2",
                id.as_str(),
                team.0
            )
            .fetch_optional(&self.pool)
        })
        .await
    }

    /// One sandbox of any team: for what a host says, never for what a caller asks.
    pub(crate) async fn sandbox_of_host(&self, id: &SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        self.run("read a sandbox of a host", || {
            sqlx::query_as!(SandboxRow, "SELECT * FROM sandboxes WHERE id = $1", id.as_str())
                .fetch_optional(&self.pool)
        })
        .await
    }

    /// Sandboxes of a team, newest first.
    pub(crate) async fn sandboxes(
        &self,
        team: TeamId,
        filter: &ListFilter,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        let metadata = (!filter.metadata.is_empty()).then_some(Json(&filter.metadata));
        let after = filter.after.as_ref();
        let after_time = after.map(|cursor| jiff_sqlx::Timestamp::from(cursor.created_at));
        let after_id = after.map(|cursor| cursor.id.as_str());
        if filter.states.is_empty() {
            // A statement of its own, so that the planner sees the condition of the partial index.
            return self
                .run("list sandboxes", || {
                    sqlx::query_as!(
                        SandboxRow,
                        "SELECT * FROM sandboxes
                         WHERE team_id = $1 AND state NOT IN ('stopped', 'error')
                             AND ($2::jsonb IS NULL OR metadata @> $2)
                             AND ($3::timestamptz IS NULL OR (created_at, id) < ($3, $4))
                         ORDER BY created_at DESC, id DESC LIMIT $5",
                        team.0,
                        metadata as _,
                        after_time as _,
                        after_id,
                        filter.limit,
                    )
                    .fetch_all(&self.pool)
                })
                .await;
        }
        let states: Vec<String> = filter.states.iter().map(|state| state.as_str().to_owned()).collect();
        self.run("list sandboxes by state", || {
            sqlx::query_as!(
                SandboxRow,
                "SELECT * FROM sandboxes
                 WHERE team_id = $1 AND state = ANY($2)
                     AND ($3::jsonb IS NULL OR metadata @> $3)
                     AND ($4::timestamptz IS NULL OR (created_at, id) < ($4, $5))
                 ORDER BY created_at DESC, id DESC LIMIT $6",
                team.0,
                &states,
                metadata as _,
                after_time as _,
                after_id,
                filter.limit,
            )
            .fetch_all(&self.pool)
        })
        .await
    }

    /// Everything of a host that has not ended, as far as the database knows.
    pub(crate) async fn live_on_host(&self, host: &HostId) -> Result<Vec<SandboxRow>, StoreError> {
        self.run("list the sandboxes of a host", || {
            sqlx::query_as!(
                SandboxRow,
                "SELECT * FROM sandboxes WHERE host_id = $1 AND state NOT IN ('stopped', 'error')",
                host.as_str()
            )
            .fetch_all(&self.pool)
        })
        .await
    }

    /// To `stopping` with the next generation, from any state that has not ended; answers the row as it is
    /// then, whoever changed it. Not waited for: should it be lost, the sandbox is found gone from its host.
    pub(crate) async fn mark_stopping(
        &self,
        team: TeamId,
        id: &SandboxId,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let changed = self
            .run("note that a sandbox is to stop", || {
                sqlx::query_as!(
                    SandboxRow,
                    "UPDATE sandboxes SET state = 'stopping', generation = generation + 1,
                         last_updated = now()
                     WHERE id = $1 AND team_id = $2 AND state NOT IN ('stopping', 'stopped', 'error')
                     RETURNING *",
                    id.as_str(),
                    team.0,
                )
                .fetch_optional(&self.hasty)
            })
            .await?;
        match changed {
            Some(row) => Ok(Some(row)),
            None => self.sandbox(team, id).await,
        }
    }

    /// To a final state, if no newer intent has been written. What was asked to stop has stopped by
    /// request, whatever its host says.
    pub(crate) async fn mark_ended(
        &self,
        id: &SandboxId,
        generation: i64,
        state: SandboxState,
        reason: EndReason,
        message: &str,
    ) -> Result<bool, StoreError> {
        debug_assert!(state.is_final());
        self.run("note that a sandbox has ended", || {
            sqlx::query!(
                "UPDATE sandboxes SET
                     state = CASE state WHEN 'stopping' THEN 'stopped' ELSE $3 END,
                     end_reason = CASE state WHEN 'stopping' THEN 'requested' ELSE $4 END,
                     end_message = CASE state WHEN 'stopping' THEN NULL ELSE nullif($5, '') END,
                     last_updated = now()
                 WHERE id = $1 AND state NOT IN ('stopped', 'error')
                     AND (generation = $2 OR state = 'stopping')",
                id.as_str(),
                generation,
                state.as_str(),
                reason_word(reason),
                message,
            )
            .execute(&self.pool)
        })
        .await
        .map(|done| done.rows_affected() > 0)
    }

    /// Removes the row of a create that was refused, as if it had never been asked for.
    pub(crate) async fn forget_start(&self, id: &SandboxId, generation: i64) -> Result<(), StoreError> {
        self.run("remove a sandbox that did not start", || {
            sqlx::query!(
                "DELETE FROM sandboxes WHERE id = $1 AND generation = $2
                     AND state IN ('starting', 'stopped', 'error')",
                id.as_str(),
                generation
            )
            .execute(&self.pool)
        })
        .await
        .map(drop)
    }

    /// What runs on a host that has not been heard of is missing, and so is what was on its way. What is paused
    /// stays so: nothing can have happened to it.
    pub(crate) async fn mark_missing(&self, host: &HostId) -> Result<u64, StoreError> {
        self.run("note that a host is missing", || {
            sqlx::query!(
                "UPDATE sandboxes SET state = 'missing', last_updated = now()
                 WHERE host_id = $1 AND state IN ('running', 'pausing', 'resuming', 'snapshotting')",
                host.as_str()
            )
            .execute(&self.pool)
        })
        .await
        .map(|done| done.rows_affected())
    }

    /// Moves the time of the last activity of these sandboxes forward.
    pub(crate) async fn touch_sandboxes(&self, touched: &[(SandboxId, Timestamp)]) -> Result<(), StoreError> {
        let ids: Vec<String> = touched.iter().map(|(id, _)| id.as_str().to_owned()).collect();
        let times: Vec<jiff_sqlx::Timestamp> = touched.iter().map(|(_, at)| (*at).into()).collect();
        self.run("note the activity of sandboxes", || {
            sqlx::query!(
                "UPDATE sandboxes SET last_active_at = greatest(last_active_at, touched.at)
                 FROM unnest($1::text[], $2::timestamptz[]) AS touched (id, at)
                 WHERE sandboxes.id = touched.id",
                &ids,
                &times as &[jiff_sqlx::Timestamp],
            )
            .execute(&self.hasty)
        })
        .await
        .map(drop)
    }
}
