//! The hosts that sandboxes run on: one, until there are more.

use wrenn_api::Host;

use super::{Core, CoreError};

impl Core {
    /// What each host's agent says of itself.
    pub(crate) async fn hosts(&self) -> Result<Vec<Host>, CoreError> {
        let facts = self.host.facts().await?;
        Ok(vec![Host {
            id: facts.id.to_string(),
            status: "online".to_owned(),
            version: facts.version,
            vmm: facts.vmm,
            vmm_version: facts.vmm_version,
            accelerator: facts.accelerator,
            limits: facts.limits,
            unlimited: facts.unlimited,
        }])
    }
}
