//! `wrenn sandbox metrics`: what a sandbox has used.

use jiff::Timestamp;
use wrenn_api::{MetricsPoint, MetricsRange};
use wrenn_types::SandboxId;

use super::{
    failure::Failure,
    output::{Output, table},
};
use crate::client::Client;

/// The most rows that a person is shown: they fit on a screen, and a program asks for JSON.
const ROWS: usize = 40;

/// Flags of `sandbox metrics`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// How far back: 5m, 10m, 1h, 2h, 6h, 12h or 24h
    #[arg(long, value_name = "RANGE", default_value = "10m")]
    range: MetricsRange,
}

impl Arguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let metrics = client.metrics(&self.id, self.range).await?;
        if output.is_json() {
            output.json(&metrics)?;
            return Ok(0);
        }
        let rows = thinned(&metrics.points, ROWS).into_iter().map(row);
        output.line(&table(["TIME", "CPU", "MEMORY", "DISK", "SENT", "RECEIVED"], rows))?;
        if metrics.points.is_empty() {
            output.note("it did not run in this time; --range 24h looks further back");
        }
        Ok(0)
    }
}

/// At most so many of them, evenly, the last one always.
fn thinned(points: &[MetricsPoint], most: usize) -> Vec<&MetricsPoint> {
    let step = points.len().div_ceil(most.max(1)).max(1);
    let mut kept: Vec<_> = points.iter().rev().step_by(step).collect();
    kept.reverse();
    kept
}

fn row(point: &MetricsPoint) -> [String; 6] {
    let time =
        Timestamp::from_second(point.timestamp_unix).map_or_else(|_| "-".to_owned(), |at| at.to_string());
    [
        time,
        format!("{:.1} %", point.cpu_pct),
        size(point.mem_bytes),
        size(point.disk_bytes),
        format!("{}/s", size(point.net_sent_bytes_per_sec)),
        format!("{}/s", size(point.net_received_bytes_per_sec)),
    ]
}

/// A number of at most four digits and a unit.
fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=10_238_975 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (9_999, "9999 B"),
            (10_240, "10 KiB"),
            (10_238_975, "9998 KiB"),
            (10 << 20, "10 MiB"),
            (3 << 30, "3072 MiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_screen_shows_the_newest_and_some_of_the_others() {
        let point = |second| MetricsPoint {
            timestamp_unix: second,
            timestamp_unix_ms: second * 1000,
            cpu_pct: 0.0,
            mem_bytes: 0,
            disk_bytes: 0,
            net_sent_bytes_per_sec: 0,
            net_received_bytes_per_sec: 0,
        };
        for length in [0, 1, 39, 40, 41, 80, 81, 1200] {
            let points: Vec<_> = (0..length).map(point).collect();
            let kept = thinned(&points, 40);
            assert!(kept.len() <= 40 && kept.len() >= points.len().min(20), "{length} became {}", kept.len());
            assert_eq!(kept.last().copied(), points.last());
            assert!(kept.is_sorted_by_key(|point| point.timestamp_unix));
        }
    }
}
