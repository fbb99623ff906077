//! The way of a sandbox between running and paused: intents, what became of them, and changed settings.
//!
//! An intent names the row that it was decided on, by state and generation, and takes the next generation. What
//! a host says is written where no newer intent has been.

use jiff::Timestamp;
use sqlx::types::Json;
use wrenn_types::{HostId, SandboxId, SandboxState, TimeoutAction};

use super::{
    SandboxRow, Store, StoreError,
    sandboxes::{action_word, small},
};
use crate::host::{Observed, Settings};

/// What its host says of a sandbox that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The newest intent that the host knows of.
    pub(crate) generation: i64,
    pub(crate) disk_mib: u32,
    pub(crate) timeout_seconds: u32,
    pub(crate) started_at: Timestamp,
    pub(crate) paused_at: Option<Timestamp>,
    /// The deadline that is over. A host knows milliseconds, and it is compared as such: any other one stays.
    pub(crate) deadline_met: Option<Timestamp>,
}

impl From<&Observed> for Seen {
    fn from(observed: &Observed) -> Self {
        Self {
            generation: observed.generation,
            disk_mib: observed.disk_mib,
            timeout_seconds: observed.timeout_seconds,
            started_at: observed.started_at,
            paused_at: observed.paused_at,
            deadline_met: observed.deadline_met,
        }
    }
}

fn words(states: &[SandboxState]) -> Vec<String> {
    states.iter().map(|state| state.as_str().to_owned()).collect()
}

impl Store {
    /// To a state in between, with the next generation, from the row that was decided on; none where somebody
    /// was faster. Not waited for: should it be lost, the host tells what became of it.
    pub(crate) async fn intend(
        &self,
        row: &SandboxRow,
        to: SandboxState,
    ) -> Result<Option<SandboxRow>, StoreError> {
        self.run("note what is to become of a sandbox", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET state = $4, generation = generation + 1, last_updated = now()
                 WHERE id = $1 AND generation = $2 AND state = $3
                 RETURNING *",
                row.id,
                row.generation,
                row.state,
                to.as_str(),
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// To `running`, from one of these states, where no newer intent has been written. Not waited for: as long as
    /// the row itself is durable, its host can tell this again.
    pub(crate) async fn mark_running(
        &self,
        id: &SandboxId,
        generation: i64,
        from: &[SandboxState],
        seen: Seen,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let from = words(from);
        self.run("note that a sandbox runs", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET state = 'running', generation = greatest(generation, $4),
                     disk_size_mb = $5, started_at = coalesce(started_at, $6), paused_at = NULL,
                     timeout_sec = CASE WHEN settings_pending THEN timeout_sec ELSE $7 END,
                     deadline_at = CASE WHEN date_trunc('milliseconds', deadline_at) = $8 THEN NULL
                         ELSE deadline_at END,
                     last_active_at = CASE state WHEN 'running' THEN coalesce(last_active_at, $6)
                         WHEN 'starting' THEN coalesce(last_active_at, $6) ELSE now() END,
                     last_updated = CASE state WHEN 'running' THEN last_updated ELSE now() END
                 WHERE id = $1 AND generation = $2 AND state = ANY($3)
                 RETURNING *",
                id.as_str(),
                generation,
                &from,
                seen.generation,
                small(seen.disk_mib),
                jiff_sqlx::Timestamp::from(seen.started_at) as _,
                small(seen.timeout_seconds),
                seen.deadline_met.map(jiff_sqlx::Timestamp::from) as _,
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// To `pausing`, because its host has begun to, where no newer intent has been written.
    pub(crate) async fn mark_pausing(&self, id: &SandboxId, generation: i64) -> Result<(), StoreError> {
        self.run("note that a sandbox is being paused", || {
            sqlx::query!(
                "UPDATE sandboxes SET state = 'pausing', last_updated = now()
                 WHERE id = $1 AND generation = $2 AND state IN ('running', 'missing')",
                id.as_str(),
                generation,
            )
            .execute(&self.hasty)
        })
        .await
        .map(drop)
    }

    /// To `paused`, from one of these states, where no newer intent has been written. Not waited for: its host can
    /// tell this again.
    pub(crate) async fn mark_paused(
        &self,
        id: &SandboxId,
        generation: i64,
        from: &[SandboxState],
        seen: Seen,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let from = words(from);
        self.run("note that a sandbox is paused", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET state = 'paused', generation = greatest(generation, $4),
                     disk_size_mb = $5, paused_at = coalesce($6, paused_at, now()),
                     deadline_at = CASE WHEN date_trunc('milliseconds', deadline_at) = $7 THEN NULL
                         ELSE deadline_at END,
                     last_updated = CASE state WHEN 'paused' THEN last_updated ELSE now() END
                 WHERE id = $1 AND generation = $2 AND state = ANY($3)
                 RETURNING *",
                id.as_str(),
                generation,
                &from,
                seen.generation,
                small(seen.disk_mib),
                seen.paused_at.map(jiff_sqlx::Timestamp::from) as _,
                seen.deadline_met.map(jiff_sqlx::Timestamp::from) as _,
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// Its deadline is over, where no newer intent has been written. This is one itself: a change of other settings
    /// that was decided on before must not bring the deadline back.
    pub(crate) async fn clear_deadline(
        &self,
        id: &SandboxId,
        generation: i64,
        met: Timestamp,
    ) -> Result<(), StoreError> {
        self.run("note that a deadline is over", || {
            sqlx::query!(
                "UPDATE sandboxes SET deadline_at = NULL, generation = generation + 1
                 WHERE id = $1 AND generation = $2 AND date_trunc('milliseconds', deadline_at) = $3
                     AND state IN ('running', 'paused')",
                id.as_str(),
                generation,
                jiff_sqlx::Timestamp::from(met) as _,
            )
            .execute(&self.hasty)
        })
        .await
        .map(drop)
    }

    /// From `snapshotting` back to what it was, where no newer intent has been written.
    pub(crate) async fn return_to(
        &self,
        id: &SandboxId,
        generation: i64,
        state: SandboxState,
    ) -> Result<Option<SandboxRow>, StoreError> {
        self.run("note that a snapshot was taken", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET state = $3, last_updated = now()
                 WHERE id = $1 AND generation = $2 AND state IN ('snapshotting', 'missing')
                 RETURNING *",
                id.as_str(),
                generation,
                state.as_str(),
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// Other settings, which its host has still to be told of, with the next generation; none where somebody was
    /// faster.
    pub(crate) async fn intend_settings(
        &self,
        row: &SandboxRow,
        settings: &Settings,
        auto_resume: bool,
    ) -> Result<Option<SandboxRow>, StoreError> {
        let Settings { network, timeout, on_timeout, deadline } = settings;
        let deadline_at = deadline.map(|deadline| jiff_sqlx::Timestamp::from(deadline.at));
        let deadline_action = deadline.map_or_else(TimeoutAction::default, |deadline| deadline.action);
        self.run("change the settings of a sandbox", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET generation = generation + 1, settings_pending = true, network = $4,
                     allow_internet_access = $5, timeout_sec = $6, on_timeout = $7, deadline_at = $8,
                     deadline_action = $9, auto_resume = $10
                 WHERE id = $1 AND generation = $2 AND state = $3
                 RETURNING *",
                row.id,
                row.generation,
                row.state,
                Json(network) as _,
                network.internet,
                small(timeout.get()),
                action_word(*on_timeout),
                deadline_at as _,
                action_word(deadline_action),
                auto_resume,
            )
            .fetch_optional(&self.pool)
        })
        .await
    }

    /// Its host knows of the settings of this generation.
    pub(crate) async fn settings_applied(
        &self,
        id: &SandboxId,
        generation: i64,
    ) -> Result<Option<SandboxRow>, StoreError> {
        self.run("note that settings are in force", || {
            sqlx::query_as!(
                SandboxRow,
                "UPDATE sandboxes SET settings_pending = false WHERE id = $1 AND generation = $2 RETURNING *",
                id.as_str(),
                generation,
            )
            .fetch_optional(&self.hasty)
        })
        .await
    }

    /// The sandboxes whose host has still to be told of their settings, where nothing is under way.
    pub(crate) async fn settings_pending(&self, host: &HostId) -> Result<Vec<SandboxRow>, StoreError> {
        self.run("list the settings that are not in force", || {
            sqlx::query_as!(
                SandboxRow,
                "SELECT * FROM sandboxes
                 WHERE host_id = $1 AND settings_pending AND state IN ('running', 'paused') LIMIT 100",
                host.as_str(),
            )
            .fetch_all(&self.pool)
        })
        .await
    }
}
