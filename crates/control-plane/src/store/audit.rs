//! Who did what.

use jiff::Timestamp;
use serde_json::Value;
use uuid::Uuid;

use super::{Store, StoreError};

/// One thing that a key was used for.
#[derive(Debug, Clone)]
pub(crate) struct AuditEntry {
    pub(crate) team: Uuid,
    pub(crate) actor_id: String,
    pub(crate) actor_name: String,
    pub(crate) resource_id: String,
    pub(crate) action: &'static str,
    /// `success`, the code of the error, or `abandoned`.
    pub(crate) status: String,
    pub(crate) metadata: Value,
    pub(crate) at: Timestamp,
}

impl Store {
    /// Appends entries in one statement.
    pub(crate) async fn append_audit(&self, entries: &[AuditEntry]) -> Result<(), StoreError> {
        let column = |of: fn(&AuditEntry) -> String| entries.iter().map(of).collect::<Vec<_>>();
        // The ids are made once, so that a repeated statement appends nothing twice.
        let ids: Vec<Uuid> = entries.iter().map(|_| Uuid::now_v7()).collect();
        let teams: Vec<Uuid> = entries.iter().map(|entry| entry.team).collect();
        let actor_ids = column(|entry| entry.actor_id.clone());
        let actor_names = column(|entry| entry.actor_name.clone());
        let resources = column(|entry| entry.resource_id.clone());
        let actions = column(|entry| entry.action.to_owned());
        let statuses = column(|entry| entry.status.clone());
        // The kind of a resource is in its id.
        let kinds = column(|entry| {
            if entry.resource_id.starts_with("sn-") { "snapshot" } else { "sandbox" }.to_owned()
        });
        let metadata: Vec<Value> = entries.iter().map(|entry| entry.metadata.clone()).collect();
        let times: Vec<jiff_sqlx::Timestamp> = entries.iter().map(|entry| entry.at.into()).collect();
        self.run("append to the audit log", || {
            sqlx::query!(
                "INSERT INTO audit_log (id, team_id, actor_type, actor_id, actor_name, resource_type,
                     resource_id, action, status, metadata, created_at)
                 SELECT id, team_id, 'api_key', actor_id, actor_name, resource_type, resource_id, action, status,
                     metadata, created_at
                 FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
                     $7::text[], $8::jsonb[], $9::timestamptz[], $10::text[])
                     AS entry (id, team_id, actor_id, actor_name, resource_id, action, status, metadata,
                         created_at, resource_type)
                 ON CONFLICT DO NOTHING",
                &ids,
                &teams,
                &actor_ids,
                &actor_names,
                &resources,
                &actions,
                &statuses,
                &metadata,
                &times as &[jiff_sqlx::Timestamp],
                &kinds,
            )
            .execute(&self.pool)
        })
        .await
        .map(drop)
    }
}
