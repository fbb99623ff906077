//! The hosts that sandboxes run on.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A host, as its agent describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The id.
    pub id: String,
    /// Always `online`: one whose agent does not answer is not described.
    #[schema(example = "online")]
    pub status: String,
    /// The version of its agent.
    pub version: String,
    /// The driver of its machines.
    #[schema(example = "qemu")]
    pub vmm: String,
    /// The version of the program behind it.
    pub vmm_version: String,
    /// What runs the instructions of guests.
    #[schema(example = "kvm")]
    pub accelerator: String,
    /// What limits each machine on the host, and what does not and why, as one sentence.
    pub limits: String,
    /// By what no machine is limited there, of `cpu`, `memory`, `pids` and `io`: the kernel has no control groups of version
    /// 2 for it, or nobody has said how much a machine may have.
    #[schema(example = json!(["io"]))]
    pub unlimited: Vec<String>,
}
