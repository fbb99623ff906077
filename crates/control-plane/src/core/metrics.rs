//! What sandboxes have used. It is measured and kept by the host that has the sandbox, running or paused.

use wrenn_api::{Metrics, MetricsPoint, MetricsRange};
use wrenn_proto::hostagent::v1 as proto;
use wrenn_types::{SandboxId, SandboxState};

use super::{Caller, Core, CoreError};

impl Core {
    /// What a sandbox has used.
    pub(crate) async fn metrics(
        &self,
        caller: &Caller,
        id: &SandboxId,
        range: MetricsRange,
    ) -> Result<Metrics, CoreError> {
        use SandboxState::{Missing, Paused, Pausing, Resuming, Running, Snapshotting};
        let row = self.row(caller.team, id).await?;
        // A host that is away says so itself, by not answering.
        if !matches!(row.state(), Running | Pausing | Paused | Resuming | Snapshotting | Missing) {
            return Err(CoreError::NoMetrics(id.clone(), row.state()));
        }
        let points = self.host.metrics(id, range.seconds()).await?;
        Ok(Metrics { sandbox_id: id.clone(), range, points: points.iter().map(point).collect() })
    }
}

fn point(point: &proto::MetricsPoint) -> MetricsPoint {
    MetricsPoint {
        timestamp_unix: point.at_ms.div_euclid(1000),
        timestamp_unix_ms: point.at_ms,
        cpu_pct: (point.cpu_percent * 100.0).round() / 100.0,
        mem_bytes: point.memory_bytes,
        disk_bytes: point.disk_bytes,
        net_sent_bytes_per_sec: point.sent_bytes_per_second,
        net_received_bytes_per_sec: point.received_bytes_per_second,
    }
}
