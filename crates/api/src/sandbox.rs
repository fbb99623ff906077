//! Create, list and get. What comes after is in [`crate::persist`].

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_types::{EndReason, SandboxId, SandboxState, SnapshotId, TimeoutAction};

use crate::persist::Network;

/// What a new sandbox should be. Every field may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CreateSandbox {
    /// The name of a template, or the name or id of a snapshot; `base` when absent. A snapshot fixes `vcpus`
    /// and `memory_mb`, and `disk_size_mb` cannot be below that of the snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "base")]
    pub template: Option<String>,
    /// Virtual CPUs, 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16, example = 1)]
    pub vcpus: Option<i64>,
    /// Memory in MiB, 512 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 128, maximum = 65_536, example = 512)]
    pub memory_mb: Option<i64>,
    /// Size of the root disk in MiB; the host's default (20 GiB) when absent. It takes space as it fills.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 512, maximum = 1_048_576, example = 20_480)]
    pub disk_size_mb: Option<i64>,
    /// Seconds without activity after which `on_timeout` is done; 0, the default, means never, and 1 is taken for 2.
    ///
    /// Activity is whatever is carried to or from the sandbox: every request about its commands, processes and files, a
    /// command whose end somebody waits for, and every open stream or terminal, also while it is silent; and `ping`. A
    /// process in the background that nobody follows is none, whatever it does, and neither is a question about the
    /// sandbox itself, such as a get, a list or its metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2_592_000, example = 0)]
    pub timeout_sec: Option<i64>,
    /// What becomes of it after `timeout_sec` seconds without activity: `pause`, the default, or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "pause")]
    pub on_timeout: Option<TimeoutAction>,
    /// A time that activity does not move, in RFC 3339, at which `deadline_action` is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2030-01-01T00:00:00Z")]
    pub deadline: Option<String>,
    /// What becomes of it at its deadline: `pause`, the default, or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "kill")]
    pub deadline_action: Option<TimeoutAction>,
    /// Whether a request that needs it running (a command, a file, a terminal, traffic to a port of it) resumes it when it
    /// is paused, instead of being refused; false when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
    /// Up to 20 names and values of your own, to find sandboxes by. Names are letters, digits, dots,
    /// underscores and dashes, names and values at most 64 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every command in the sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// Whether the sandbox may reach the internet; true when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// What it may reach, in more detail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// The public words of a sandbox's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// Accepted, not yet given to a host.
    Pending,
    /// A host is bringing it up.
    Starting,
    /// It answers.
    Running,
    /// Its memory and disk are being saved.
    Pausing,
    /// Saved, and not running.
    Paused,
    /// Being saved while it stays.
    Snapshotting,
    /// Coming back from paused.
    Resuming,
    /// Being destroyed.
    Stopping,
    /// Paused, with its layers in object storage.
    Hibernated,
    /// Gone, by request or by itself.
    Stopped,
    /// Its host has not been heard of.
    Missing,
    /// It never came up, or cannot be brought back.
    Error,
}

impl From<SandboxState> for SandboxStatus {
    fn from(state: SandboxState) -> Self {
        match state {
            SandboxState::Pending => Self::Pending,
            SandboxState::Starting => Self::Starting,
            SandboxState::Running => Self::Running,
            SandboxState::Pausing => Self::Pausing,
            SandboxState::Paused => Self::Paused,
            SandboxState::Snapshotting => Self::Snapshotting,
            SandboxState::Resuming => Self::Resuming,
            SandboxState::Hibernated => Self::Hibernated,
            SandboxState::Stopping => Self::Stopping,
            SandboxState::Stopped => Self::Stopped,
            SandboxState::Missing => Self::Missing,
            SandboxState::Error => Self::Error,
        }
    }
}

impl SandboxStatus {
    /// The public word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Snapshotting => "snapshotting",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Hibernated => "hibernated",
            Self::Stopped => "stopped",
            Self::Missing => "missing",
            Self::Error => "error",
        }
    }
}

/// One sandbox, as far as its owner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// Its id.
    #[schema(value_type = String, example = "sb-0a1b2c3d")]
    pub id: SandboxId,
    /// Its state.
    pub status: SandboxStatus,
    /// The template or snapshot that was asked for.
    pub template: String,
    /// The snapshot that it was made from; absent for one that was made from a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "sn-0a1b2c3d")]
    pub source_snapshot: Option<SnapshotId>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Size of the root disk in MiB; absent until a host has chosen it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// MiB of the host's disk that the root disk takes, or all that is saved of a paused sandbox. Only in the
    /// answer about one sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_used_mb: Option<u64>,
    /// Seconds without activity after which `on_timeout` is done; 0 means never.
    pub timeout_sec: u32,
    /// What becomes of it after `timeout_sec` seconds without activity.
    #[serde(default)]
    #[schema(value_type = String, example = "pause")]
    pub on_timeout: TimeoutAction,
    /// The time at which `deadline_action` is done, whatever happens in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// What becomes of it at its deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "kill")]
    pub deadline_action: Option<TimeoutAction>,
    /// Whether a request that needs it running resumes it.
    #[serde(default)]
    pub auto_resume: bool,
    /// Whether it may reach the internet.
    pub allow_internet_access: bool,
    /// The names and values it was created with.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it first answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it was paused; absent while it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_at: Option<Timestamp>,
    /// When something last happened in it, to within half a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active_at: Option<Timestamp>,
    /// When its state last changed.
    pub last_updated: Timestamp,
    /// Why it is not there any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "requested")]
    pub end_reason: Option<EndReason>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_message: Option<String>,
    /// Why the last thing that its host did to it by itself, such as pausing it after its timeout, failed. Only
    /// in the answer about one sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_null_fields_are_tolerated() {
        let request: CreateSandbox =
            serde_json::from_str(r#"{"template":null,"vcpus":2,"colour":"green"}"#).unwrap();
        assert_eq!(request, CreateSandbox { vcpus: Some(2), ..CreateSandbox::default() });
        assert_eq!(serde_json::to_string(&CreateSandbox::default()).unwrap(), "{}");
    }

    #[test]
    fn the_words_are_those_of_the_types() {
        for state in SandboxState::ALL {
            let status = SandboxStatus::from(state);
            assert_eq!(status.as_str(), state.as_str());
            assert_eq!(serde_json::to_value(status).unwrap(), state.as_str());
        }
    }
}
