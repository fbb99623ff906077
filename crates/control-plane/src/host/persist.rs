//! The commands of sandboxes that persist. Each is answered when it is done, is idempotent, and carries the
//! generation of the intent behind it: an agent refuses an older one.

use std::{num::NonZeroU64, time::Duration};

use connectrpc::{ErrorCode, client::CallOptions};
use jiff::Timestamp;
use wrenn_proto::hostagent::v1 as proto;
use wrenn_types::{InactivityTimeout, NetworkPolicy, SandboxId, SnapshotId, TimeoutAction};

use super::{HostClient, HostError, Observed, Phase, observed, timed, wire_generation};

/// A moment that activity does not move, and what is done then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deadline {
    pub(crate) at: Timestamp,
    pub(crate) action: TimeoutAction,
}

/// What of a sandbox can be changed while it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) network: NetworkPolicy,
    pub(crate) timeout: InactivityTimeout,
    pub(crate) on_timeout: TimeoutAction,
    pub(crate) deadline: Option<Deadline>,
}

/// What a host says of a snapshot that it has made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Captured {
    pub(crate) disk_mib: u32,
    pub(crate) size_bytes: u64,
    pub(crate) has_memory: bool,
    /// How long the sandbox stood still.
    pub(crate) stopped: Duration,
}

pub(super) fn action(action: TimeoutAction) -> proto::TimeoutAction {
    match action {
        TimeoutAction::Pause => proto::TimeoutAction::TIMEOUT_ACTION_PAUSE,
        TimeoutAction::Kill => proto::TimeoutAction::TIMEOUT_ACTION_KILL,
    }
}

/// A deadline on the wire, where zero is never.
pub(super) fn deadline(deadline: Option<Deadline>) -> proto::Deadline {
    proto::Deadline {
        at_ms: deadline.map_or(0, |deadline| deadline.at.as_millisecond()),
        action: action(deadline.map_or_else(TimeoutAction::default, |deadline| deadline.action)).into(),
        ..Default::default()
    }
}

pub(super) fn network(policy: &NetworkPolicy) -> proto::NetworkPolicy {
    fn texts<T: ToString>(entries: &[T]) -> Vec<String> {
        entries.iter().map(T::to_string).collect()
    }
    proto::NetworkPolicy {
        internet: policy.internet,
        allow_cidrs: texts(&policy.allow_cidrs),
        deny_cidrs: texts(&policy.deny_cidrs),
        allow_domains: texts(&policy.allow_domains),
        deny_domains: texts(&policy.deny_domains),
        dns_servers: texts(&policy.dns_servers),
        egress_bits_per_second: policy.egress_bits_per_second.map_or(0, NonZeroU64::get),
        ingress_bits_per_second: policy.ingress_bits_per_second.map_or(0, NonZeroU64::get),
        ..Default::default()
    }
}

impl HostClient {
    /// Saves a running sandbox and ends its machine.
    pub(crate) async fn pause(
        &self,
        id: &SandboxId,
        generation: i64,
        disk_only: bool,
        bound: Duration,
    ) -> Result<Observed, HostError> {
        let request = proto::PauseSandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            disk_only,
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        let answer = self.rpc.pause_sandbox_with_options(request, options).await?.into_owned();
        observed(answer.sandbox.into_option().ok_or(HostError::Malformed { what: "no sandbox" })?)
    }

    /// Brings a paused sandbox back, and says how long each step took.
    pub(crate) async fn resume(
        &self,
        id: &SandboxId,
        generation: i64,
        timeout: Option<InactivityTimeout>,
        bound: Duration,
    ) -> Result<(Observed, Vec<Phase>), HostError> {
        let request = proto::ResumeSandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            timeout_seconds: timeout.map(InactivityTimeout::get),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        let answer = self.rpc.resume_sandbox_with_options(request, options).await?.into_owned();
        let sandbox = answer.sandbox.into_option().ok_or(HostError::Malformed { what: "no sandbox" })?;
        Ok((observed(sandbox)?, timed(answer.phases)))
    }

    /// Puts a sandbox back to a snapshot, in place.
    pub(crate) async fn rollback(
        &self,
        id: &SandboxId,
        generation: i64,
        snapshot: &SnapshotId,
        bound: Duration,
    ) -> Result<(Observed, Vec<Phase>), HostError> {
        let request = proto::RollbackSandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            snapshot_id: snapshot.to_string(),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        let answer = self.rpc.rollback_sandbox_with_options(request, options).await?.into_owned();
        let sandbox = answer.sandbox.into_option().ok_or(HostError::Malformed { what: "no sandbox" })?;
        Ok((observed(sandbox)?, timed(answer.phases)))
    }

    /// Makes a snapshot of a sandbox that is running or paused and goes on as it was.
    pub(crate) async fn snapshot(
        &self,
        id: &SandboxId,
        generation: i64,
        snapshot: &SnapshotId,
        bound: Duration,
    ) -> Result<Captured, HostError> {
        let request = proto::SnapshotSandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            snapshot_id: snapshot.to_string(),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(bound);
        let answer = self.rpc.snapshot_sandbox_with_options(request, options).await?.into_owned();
        let made = answer.snapshot.into_option().ok_or(HostError::Malformed { what: "no snapshot" })?;
        Ok(Captured {
            disk_mib: made.disk_mib,
            size_bytes: made.size_bytes,
            has_memory: made.has_memory,
            stopped: Duration::from_micros(answer.stopped_micros),
        })
    }

    /// Tells a host what a sandbox may reach and when its time is over.
    pub(crate) async fn update(
        &self,
        id: &SandboxId,
        generation: i64,
        settings: &Settings,
    ) -> Result<(), HostError> {
        let request = proto::UpdateSandboxRequest {
            sandbox_id: id.to_string(),
            generation: wire_generation(generation),
            network: network(&settings.network).into(),
            timeout_seconds: Some(settings.timeout.get()),
            on_timeout: Some(action(settings.on_timeout).into()),
            deadline: deadline(settings.deadline).into(),
            ..Default::default()
        };
        self.rpc.update_sandbox_with_options(request, self.question()).await?;
        Ok(())
    }

    /// Takes a snapshot from its host, or finds it gone.
    pub(crate) async fn delete_snapshot(&self, id: &SnapshotId, bound: Duration) -> Result<(), HostError> {
        let request = proto::DeleteSnapshotRequest { snapshot_id: id.to_string(), ..Default::default() };
        let options = CallOptions::default().with_timeout(bound);
        match self.rpc.delete_snapshot_with_options(request, options).await {
            Ok(_) => Ok(()),
            Err(error) if error.code == ErrorCode::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
