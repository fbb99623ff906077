//! Snapshots: named ones, which are templates of their team, and those between a sandbox and its forks.
//!
//! ```text
//! creating ──► ready ──► deleting ──► (no row)      deleting is an order to the host that outlives who gave it
//!     └── too old, or failed ──▲
//! ```

use jiff::Timestamp;
use uuid::Uuid;
use wrenn_types::{HostId, SnapshotId, TeamId, TemplateName};

use super::{SandboxRow, Store, StoreError};
use crate::host::Captured;

/// A row as the database has it.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "the columns of the table, whether or not something reads them yet")]
pub(crate) struct SnapshotRow {
    pub(crate) id: String,
    pub(crate) team_id: Uuid,
    pub(crate) host_id: String,
    pub(crate) name: Option<String>,
    pub(crate) sandbox_id: String,
    pub(crate) template: String,
    pub(crate) vcpus: i32,
    pub(crate) memory_mb: i32,
    pub(crate) disk_size_mb: i32,
    pub(crate) size_bytes: i64,
    pub(crate) has_memory: bool,
    pub(crate) state: String,
    pub(crate) created_at: jiff_sqlx::Timestamp,
}

/// What is known of a snapshot before its host has heard of it.
#[derive(Debug)]
pub(crate) struct NewSnapshot<'a> {
    pub(crate) id: &'a SnapshotId,
    /// What it is taken of.
    pub(crate) sandbox: &'a SandboxRow,
}

/// What became of giving a snapshot its name.
#[derive(Debug)]
pub(crate) enum Made {
    /// It has it. The snapshot that had it before is to go.
    Named { row: Box<SnapshotRow>, replaced: Option<String> },
    /// Another one has that name and keeps it.
    Taken,
    /// It is not there any more.
    Gone,
}

impl Store {
    /// Writes a snapshot that is about to be made, or says that its id is taken.
    pub(crate) async fn insert_snapshot(&self, new: &NewSnapshot<'_>) -> Result<bool, StoreError> {
        self.run("write a snapshot", || {
            sqlx::query!(
                "INSERT INTO snapshots (id, team_id, host_id, sandbox_id, template, vcpus, memory_mb,
                     disk_size_mb, state)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 'creating')
                 ON CONFLICT (id) DO NOTHING",
                new.id.as_str(),
                new.sandbox.team_id,
                new.sandbox.host_id,
                new.sandbox.id,
                new.sandbox.template,
                new.sandbox.vcpus,
                new.sandbox.memory_mb,
                new.sandbox.disk_size_mb.unwrap_or(0),
            )
            .execute(&self.pool)
        })
        .await
        .map(|done| done.rows_affected() == 1)
    }

    /// Gives a snapshot that has been made its name, in one transaction with taking it from the one that had it
    /// before, if it may be taken.
    pub(crate) async fn name_snapshot(
        &self,
        team: TeamId,
        id: &SnapshotId,
        name: &TemplateName,
        captured: Captured,
        overwrite: bool,
    ) -> Result<Made, StoreError> {
        let attempt = async || {
            let mut transaction = self.pool.begin().await?;
            let mut replaced = None;
            if overwrite {
                replaced = sqlx::query_scalar!(
                    "UPDATE snapshots SET state = 'deleting', name = NULL
                     WHERE team_id = $1 AND name = $2 AND id <> $3 RETURNING id",
                    team.0,
                    name.as_str(),
                    id.as_str(),
                )
                .fetch_optional(&mut *transaction)
                .await?;
            }
            let row = sqlx::query_as!(
                SnapshotRow,
                "UPDATE snapshots SET state = 'ready', name = $3, disk_size_mb = $4, size_bytes = $5,
                     has_memory = $6
                 WHERE id = $1 AND team_id = $2 AND state IN ('creating', 'ready') RETURNING *",
                id.as_str(),
                team.0,
                name.as_str(),
                super::sandboxes::small(captured.disk_mib),
                i64::try_from(captured.size_bytes).unwrap_or(i64::MAX),
                captured.has_memory,
            )
            .fetch_optional(&mut *transaction)
            .await;
            let row = match row {
                Err(sqlx::Error::Database(error)) if error.is_unique_violation() => return Ok(Made::Taken),
                row => row?,
            };
            transaction.commit().await?;
            Ok(row.map_or(Made::Gone, |row| Made::Named { row: Box::new(row), replaced }))
        };
        self.run("name a snapshot", attempt).await
    }

    /// A snapshot of a team that is ready, by its name or its id.
    pub(crate) async fn snapshot(&self, team: TeamId, name: &str) -> Result<Option<SnapshotRow>, StoreError> {
        self.run("read a snapshot", || {
            sqlx::query_as!(
                SnapshotRow,
                "SELECT * FROM snapshots WHERE team_id = $1 AND (name = $2 OR id = $2) AND state = 'ready'",
                team.0,
                name,
            )
            .fetch_optional(&self.pool)
        })
        .await
    }

    /// The snapshots of a team that are ready, newest first.
    pub(crate) async fn snapshots(&self, team: TeamId) -> Result<Vec<SnapshotRow>, StoreError> {
        self.run("list snapshots", || {
            sqlx::query_as!(
                SnapshotRow,
                "SELECT * FROM snapshots WHERE team_id = $1 AND state = 'ready'
                 ORDER BY created_at DESC, id DESC",
                team.0,
            )
            .fetch_all(&self.pool)
        })
        .await
    }

    /// Orders that a snapshot goes; false when there is no such.
    pub(crate) async fn doom_snapshot(&self, team: TeamId, id: &SnapshotId) -> Result<bool, StoreError> {
        self.run("order the end of a snapshot", || {
            sqlx::query!(
                "UPDATE snapshots SET state = 'deleting', name = NULL WHERE id = $1 AND team_id = $2",
                id.as_str(),
                team.0,
            )
            .execute(&self.pool)
        })
        .await
        .map(|done| done.rows_affected() == 1)
    }

    /// Orders the end of what has been on its way since before then: who made it has gone.
    pub(crate) async fn doom_unfinished(&self, host: &HostId, before: Timestamp) -> Result<u64, StoreError> {
        self.run("order the end of unfinished snapshots", || {
            sqlx::query!(
                "UPDATE snapshots SET state = 'deleting'
                 WHERE host_id = $1 AND state = 'creating' AND created_at < $2",
                host.as_str(),
                jiff_sqlx::Timestamp::from(before) as _,
            )
            .execute(&self.pool)
        })
        .await
        .map(|done| done.rows_affected())
    }

    /// The snapshots that a host has been ordered to delete and may still have.
    pub(crate) async fn doomed_snapshots(&self, host: &HostId) -> Result<Vec<String>, StoreError> {
        self.run("list the snapshots that are to go", || {
            sqlx::query_scalar!(
                "SELECT id FROM snapshots WHERE host_id = $1 AND state = 'deleting' LIMIT 100",
                host.as_str(),
            )
            .fetch_all(&self.pool)
        })
        .await
    }

    /// Removes the row of a snapshot that its host does not have any more.
    pub(crate) async fn forget_snapshot(&self, id: &SnapshotId) -> Result<(), StoreError> {
        self.run("remove a snapshot", || {
            sqlx::query!("DELETE FROM snapshots WHERE id = $1 AND state = 'deleting'", id.as_str())
                .execute(&self.pool)
        })
        .await
        .map(drop)
    }
}
