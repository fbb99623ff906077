//! What a lab is made of, and how long its programs may take.

use std::time::Duration;

use anyhow::Result;

use crate::{firecracker, repository::Repository};

/// As said on the command line, or [`Capacity::usual`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u8,
    /// All programs together.
    pub(crate) bound: Duration,
}

impl Capacity {
    /// What is enough, unless somebody says otherwise.
    pub(crate) fn usual(repository: &Repository) -> Result<Self> {
        firecracker::is_there(repository).map(Self::of)
    }

    /// With a Firecracker there are machines in the machine. They need room, and take their time. And there is one
    /// processor: under QEMU 7.2 the lab's own kernel panicked, or waited for one of two for ever, in every long run.
    fn of(has_firecracker: bool) -> Self {
        match has_firecracker {
            false => Self { memory_mib: 2048, cpus: 2, bound: Duration::from_secs(2400) },
            true => Self { memory_mib: 6144, cpus: 1, bound: Duration::from_secs(7200) },
        }
    }
}
