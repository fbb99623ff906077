//! Measurements, as they go over the wire.

use wrenn_proto::hostagent::v1 as wire;

use crate::metrics::series::Point;

/// A rate as a whole number.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
fn whole(rate: f32) -> u64 {
    rate.round() as u64
}

pub(super) fn point(point: &Point) -> wire::MetricsPoint {
    let values = point.values;
    wire::MetricsPoint {
        at_ms: point.at,
        cpu_percent: values.cpu_percent.into(),
        memory_bytes: u64::from(values.memory_kib) * 1024,
        disk_bytes: u64::from(values.disk_kib) * 1024,
        sent_bytes_per_second: whole(values.sent_per_second),
        received_bytes_per_second: whole(values.received_per_second),
        ..Default::default()
    }
}
