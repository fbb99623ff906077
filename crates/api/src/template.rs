//! What a sandbox starts from.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_types::{SandboxId, SnapshotId};

/// Whether a template is an image or a frozen sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateKind {
    /// An image of a root disk.
    Base,
    /// An image and a memory.
    Snapshot,
}

/// One name that `template` of a create request can have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// The name.
    #[schema(example = "base")]
    pub name: String,
    /// Image or snapshot.
    #[serde(rename = "type")]
    pub kind: TemplateKind,
    /// The id of a snapshot, which can be used in place of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "sn-0a1b2c3d")]
    pub id: Option<SnapshotId>,
    /// The sandbox that a snapshot was taken of, which may have gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "sb-0a1b2c3d")]
    pub sandbox_id: Option<SandboxId>,
    /// What that sandbox was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The virtual CPUs of what is made from a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Its memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Whether the memory is in a snapshot, so that what is made from it goes on where that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_memory: Option<bool>,
    /// The name of the template that this is another name of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<String>,
    /// The user that commands run as unless they say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// The directory that commands start in unless they say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// Bytes in use on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The smallest `disk_size_mb` that it fits on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_disk_mb: Option<u32>,
    /// Absent for what came with the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// Whether it belongs to the platform and not to a team.
    #[serde(default)]
    pub platform: bool,
}
