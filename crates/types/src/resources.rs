//! What a sandbox is given, each within its bounds.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number outside of what a sandbox can be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} must be between {minimum} and {maximum}, not {given}")]
pub struct ResourceError {
    /// The public name of the field.
    pub field: &'static str,
    /// The smallest value that is taken.
    pub minimum: u32,
    /// The largest value that is taken.
    pub maximum: u32,
    /// What was asked for.
    pub given: i64,
}

macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident, $field:literal, $minimum:expr, $maximum:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "i64", into = "i64")]
        pub struct $name(u32);

        impl $name {
            /// The smallest value.
            pub const MINIMUM: u32 = $minimum;
            /// The largest value.
            pub const MAXIMUM: u32 = $maximum;
            /// The same, as one of these.
            pub const LARGEST: Self = Self($maximum);

            /// The value, if it is within the bounds.
            ///
            /// # Errors
            /// [`ResourceError`] names the field, the bounds and what was given.
            pub fn new(given: i64) -> Result<Self, ResourceError> {
                match u32::try_from(given) {
                    Ok(value) if (Self::MINIMUM..=Self::MAXIMUM).contains(&value) => Ok(Self(value)),
                    _ => Err(ResourceError {
                        field: $field,
                        minimum: Self::MINIMUM,
                        maximum: Self::MAXIMUM,
                        given,
                    }),
                }
            }

            /// The number.
            #[must_use]
            pub fn get(self) -> u32 {
                self.0
            }
        }

        impl TryFrom<i64> for $name {
            type Error = ResourceError;

            fn try_from(given: i64) -> Result<Self, ResourceError> {
                Self::new(given)
            }
        }

        impl From<$name> for i64 {
            fn from(value: $name) -> Self {
                Self::from(value.0)
            }
        }
    };
}

bounded!(
    /// Virtual CPUs of a sandbox.
    Vcpus, "vcpus", 1, 16
);
bounded!(
    /// Memory of a sandbox in MiB.
    MemoryMib, "memory_mb", 128, 65_536
);
bounded!(
    /// Size of the root disk in MiB. The default is the host's, 20 GiB if not configured.
    DiskMib, "disk_size_mb", 512, 1_048_576
);
bounded!(
    /// Seconds without activity until a sandbox is destroyed; 0, the default, means never.
    #[derive(Default)]
    InactivityTimeout, "timeout_sec", 0, 2_592_000
);

impl Default for Vcpus {
    fn default() -> Self {
        Self(1)
    }
}

impl Default for MemoryMib {
    fn default() -> Self {
        Self(512)
    }
}

/// What a host gives where nobody says how much, unless it is configured otherwise.
impl Default for DiskMib {
    fn default() -> Self {
        Self(20 * 1024)
    }
}

impl MemoryMib {
    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }
}

impl DiskMib {
    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }
}

impl InactivityTimeout {
    /// The bound as a duration, or none where there is no bound. Never less than two seconds: a command that somebody waits
    /// for shows itself once a second at most, and must not be taken for silence.
    #[must_use]
    pub fn duration(self) -> Option<Duration> {
        (self.0 > 0).then(|| Duration::from_secs(u64::from(self.0.max(2))))
    }
}

/// What a warm snapshot fixes: its virtual CPUs and its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: Vcpus,
    /// Memory.
    pub memory: MemoryMib,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_and_name_the_field() {
        assert_eq!(Vcpus::new(1).unwrap().get(), 1);
        for given in [0, -1, 17, i64::MAX, i64::MIN] {
            let error = Vcpus::new(given).unwrap_err();
            assert_eq!((error.field, error.given), ("vcpus", given));
        }
        assert!(MemoryMib::new(127).is_err());
        assert!(DiskMib::new(511).is_err());
        assert_eq!(InactivityTimeout::new(0).unwrap().duration(), None);
        for (given, seconds) in [(1, 2), (2, 2), (3, 3), (600, 600)] {
            let timeout = InactivityTimeout::new(given).unwrap();
            assert_eq!(timeout.duration(), Some(Duration::from_secs(seconds)));
        }
    }

    #[test]
    fn the_bounds_hold_in_serde_too() {
        assert!(serde_json::from_str::<Vcpus>("0").is_err());
        assert_eq!(serde_json::from_str::<Vcpus>("2").unwrap().get(), 2);
    }
}
