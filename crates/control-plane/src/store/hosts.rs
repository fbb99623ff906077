//! Hosts, as they described themselves when they were last connected to.

use wrenn_types::HostId;

use super::{Store, StoreError};

/// What a host says of itself.
#[derive(Debug, Clone)]
pub(crate) struct HostRow {
    pub(crate) id: HostId,
    pub(crate) version: String,
    pub(crate) vmm: String,
    pub(crate) vmm_version: String,
    pub(crate) accelerator: String,
}

impl Store {
    /// Remembers a host, or what is new about it.
    pub(crate) async fn upsert_host(&self, host: &HostRow) -> Result<(), StoreError> {
        self.run("remember a host", || {
            sqlx::query!(
                "INSERT INTO hosts (id, version, vmm, vmm_version, accelerator) VALUES ($1, $2, $3, $4, $5)
                 ON CONFLICT (id) DO UPDATE SET version = $2, vmm = $3, vmm_version = $4, accelerator = $5,
                     last_seen_at = now()",
                host.id.as_str(),
                host.version,
                host.vmm,
                host.vmm_version,
                host.accelerator,
            )
            .execute(&self.pool)
        })
        .await
        .map(drop)
    }
}
