//! What keeps a sandbox: pause, resume, fork, rollback and snapshot; and what it may reach, and when its time
//! is over. Bodies of which every field may be left out may be left out themselves.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_types::{SandboxId, TimeoutAction};

/// How a sandbox is paused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PauseRequest {
    /// Whether its memory, and with it every process, is kept; true when absent. Without it the sandbox takes less of
    /// the host's disk, and boots from its own when it is resumed: files, token and environment stay. It cannot be
    /// forked or made a snapshot of until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// How a sandbox is resumed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ResumeRequest {
    /// Seconds without activity from now on after which `on_timeout` is done; as before when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2_592_000)]
    pub timeout_sec: Option<i64>,
}

/// What the children of a sandbox should be. What is left out is as it is for the parent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ForkRequest {
    /// How many children, 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 20, example = 1)]
    pub count: Option<i64>,
    /// Names and values of the children.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every command in the children, beside that of the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// Seconds without activity after which `on_timeout` is done; 0 means never.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2_592_000)]
    pub timeout_sec: Option<i64>,
    /// What becomes of a child after `timeout_sec` seconds without activity: `pause` or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "pause")]
    pub on_timeout: Option<TimeoutAction>,
    /// Whether a request that needs a child running resumes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
}

/// What a sandbox is put back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RollbackRequest {
    /// The name or the id of a snapshot with the same `vcpus` and `memory_mb`.
    #[schema(example = "before-upgrade")]
    pub snapshot: String,
}

/// What to take a snapshot of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotRequest {
    /// A sandbox that is running or paused, and goes on as it was.
    #[schema(example = "sb-0a1b2c3d")]
    pub sandbox_id: String,
    /// The name of the snapshot; its id when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "before-upgrade")]
    pub name: Option<String>,
}

impl SnapshotRequest {
    /// A snapshot of this sandbox.
    #[must_use]
    pub fn of(sandbox: &SandboxId, name: Option<String>) -> Self {
        Self { sandbox_id: sandbox.to_string(), name }
    }
}

/// When the time of a sandbox is over. What is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TimeoutRequest {
    /// Seconds without activity after which `on_timeout` is done; 0 means never.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2_592_000)]
    pub timeout_sec: Option<i64>,
    /// What becomes of it after `timeout_sec` seconds without activity: `pause` or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "pause")]
    pub on_timeout: Option<TimeoutAction>,
    /// A time that activity does not move, in RFC 3339, or the word `never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2030-01-01T00:00:00Z")]
    pub deadline: Option<String>,
    /// What becomes of it at its deadline: `pause` or `kill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "kill")]
    pub deadline_action: Option<TimeoutAction>,
    /// Whether a request that needs it running resumes it when it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
}

/// What a sandbox may reach. With an allow list of networks, of domains or of both, nothing that is on none of
/// them is reached; a deny list is stronger than an allow list. The host, other sandboxes, private networks and
/// metadata services are never reached, whatever is said here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Network {
    /// Whether it reaches anything at all; true when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// IPv4 networks that it may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = json!(["203.0.113.0/24"]))]
    pub allow_cidrs: Option<Vec<String>>,
    /// IPv4 networks that it may not reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny_cidrs: Option<Vec<String>>,
    /// Names that it may reach, on TCP ports 80 and 443; `*.example.com` means every name below. A connection has
    /// to name one of them (in the `Host` header, or as the server name of TLS).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = json!(["pypi.org", "*.pythonhosted.org"]))]
    pub allow_domains: Option<Vec<String>>,
    /// Names that are not resolved for it, and that no connection to ports 80 and 443 may name. With any, what is
    /// neither TLS nor HTTP, or names nothing, is refused on these ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny_domains: Option<Vec<String>>,
    /// Up to three addresses that are asked for names; the host's choice when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns_servers: Option<Vec<String>>,
    /// Millions of bits per second that it may send; 0, the default, means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 100_000)]
    pub egress_mbps: Option<i64>,
    /// Millions of bits per second that it may receive; 0, the default, means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 100_000)]
    pub ingress_mbps: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_body_that_can_be_empty_is() {
        assert_eq!(serde_json::from_str::<PauseRequest>("{}").unwrap(), PauseRequest::default());
        assert_eq!(serde_json::from_str::<ForkRequest>(r#"{"count":null}"#).unwrap(), ForkRequest::default());
        assert_eq!(serde_json::to_string(&Network::default()).unwrap(), "{}");
        let request: TimeoutRequest = serde_json::from_str(r#"{"on_timeout":"kill"}"#).unwrap();
        assert_eq!(request.on_timeout, Some(TimeoutAction::Kill));
        assert!(serde_json::from_str::<TimeoutRequest>(r#"{"on_timeout":"explode"}"#).is_err());
    }
}
