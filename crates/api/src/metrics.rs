//! What a sandbox has used, over time.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_types::SandboxId;

/// How far back measurements go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
pub enum MetricsRange {
    /// Five minutes; every measurement, twice a second.
    #[serde(rename = "5m")]
    FiveMinutes,
    /// Ten minutes; every measurement, twice a second.
    #[default]
    #[serde(rename = "10m")]
    TenMinutes,
    /// An hour; means over 30 seconds.
    #[serde(rename = "1h")]
    OneHour,
    /// Two hours; means over 30 seconds.
    #[serde(rename = "2h")]
    TwoHours,
    /// Six hours; means over five minutes.
    #[serde(rename = "6h")]
    SixHours,
    /// Twelve hours; means over five minutes.
    #[serde(rename = "12h")]
    TwelveHours,
    /// A day; means over five minutes.
    #[serde(rename = "24h")]
    Day,
}

/// The text is no range of measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotARange;

impl fmt::Display for NotARange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("range is one of 5m, 10m, 1h, 2h, 6h, 12h and 24h")
    }
}

impl std::error::Error for NotARange {}

impl MetricsRange {
    /// All of them, the shortest first.
    pub const ALL: [Self; 7] = [
        Self::FiveMinutes,
        Self::TenMinutes,
        Self::OneHour,
        Self::TwoHours,
        Self::SixHours,
        Self::TwelveHours,
        Self::Day,
    ];

    /// The public word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FiveMinutes => "5m",
            Self::TenMinutes => "10m",
            Self::OneHour => "1h",
            Self::TwoHours => "2h",
            Self::SixHours => "6h",
            Self::TwelveHours => "12h",
            Self::Day => "24h",
        }
    }

    /// How many seconds it is long.
    #[must_use]
    pub fn seconds(self) -> u32 {
        match self {
            Self::FiveMinutes => 300,
            Self::TenMinutes => 600,
            Self::OneHour => 3_600,
            Self::TwoHours => 7_200,
            Self::SixHours => 21_600,
            Self::TwelveHours => 43_200,
            Self::Day => 86_400,
        }
    }
}

impl FromStr for MetricsRange {
    type Err = NotARange;

    fn from_str(text: &str) -> Result<Self, NotARange> {
        Self::ALL.into_iter().find(|range| range.as_str() == text).ok_or(NotARange)
    }
}

/// What was measured over one interval. There is none for a time in which the sandbox did not run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricsPoint {
    /// The end of the interval, in whole seconds since the Unix epoch; several points may be in one second.
    pub timestamp_unix: i64,
    /// The same in milliseconds.
    pub timestamp_unix_ms: i64,
    /// Of the time that all of its virtual CPUs have together, in percent. The work that the host does for the
    /// sandbox is in it, so that it can be a little more than 100.
    pub cpu_pct: f64,
    /// Memory of the host that is only this sandbox's.
    pub mem_bytes: u64,
    /// What its root disk takes of the host's disk.
    pub disk_bytes: u64,
    /// Bytes that it sent to the outside, per second.
    pub net_sent_bytes_per_sec: u64,
    /// Bytes that it received from the outside, per second.
    pub net_received_bytes_per_sec: u64,
}

/// What a sandbox has used, over time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// The sandbox.
    #[schema(value_type = String, example = "sb-0a1b2c3d")]
    pub sandbox_id: SandboxId,
    /// How far back the points go.
    pub range: MetricsRange,
    /// The oldest first.
    pub points: Vec<MetricsPoint>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_same_everywhere() {
        for range in MetricsRange::ALL {
            assert_eq!(range.as_str().parse(), Ok(range));
            assert_eq!(serde_json::to_value(range).unwrap(), range.as_str());
        }
        for wrong in ["", "5M", "10", "3h", "24h ", "-5m"] {
            assert_eq!(wrong.parse::<MetricsRange>(), Err(NotARange), "{wrong:?}");
        }
        assert!(MetricsRange::ALL.is_sorted_by_key(|range| range.seconds()));
    }
}
