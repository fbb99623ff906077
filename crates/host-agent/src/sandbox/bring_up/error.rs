//! Why a sandbox did not come up.

use std::{io, time::Duration};

use camino::Utf8PathBuf;
use wrenn_types::EndReason;
use wrenn_vmm::{ExitReason, VmmError};

use crate::{
    guest::GuestError,
    network::{PolicyError, SlotError},
    rootfs::RootfsError,
    sandbox::{record::RecordError, source::SourceError},
};

/// Why a sandbox did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BringUpError {
    /// It was destroyed while it was being made.
    #[error("it was destroyed while it was being made")]
    Cancelled(EndReason),
    /// What it was to be made from cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The record could not be written.
    #[error("the sandbox could not be recorded")]
    Record(#[source] RecordError),
    /// The disk could not be made.
    #[error("the root disk could not be made")]
    Disk(#[source] RootfsError),
    /// No network slot could be had.
    #[error("no network slot could be had")]
    Slot(#[source] SlotError),
    /// The network policy cannot be.
    #[error("the network policy cannot be put in force")]
    PolicyRefused(#[source] PolicyError),
    /// The network policy could not be put in force.
    #[error("the network policy could not be put in force")]
    Policy(#[source] SlotError),
    /// The machine could not be restored.
    #[error("the machine could not be restored")]
    Restore(#[source] VmmError),
    /// The machine could not be booted.
    #[error("the machine could not be booted")]
    Boot(#[source] VmmError),
    /// Its guest booted, and did not come up.
    #[error("the guest did not come up after its machine was booted")]
    NotUp(#[source] GuestError),
    /// No control group could be made for the machine.
    #[error("the machine could not be limited")]
    Limits(#[source] io::Error),
    /// The guest could not become itself.
    #[error("the guest could not take its identity")]
    Identity(#[source] GuestError),
    /// The machine ended while it was being brought up.
    #[error("the machine ended while it was being brought up: {0:?}")]
    Exited(ExitReason),
    /// A directory could not be made.
    #[error("could not make {path}")]
    RunDir {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A step took too long.
    #[error("{step} took longer than {bound:?}")]
    Timeout {
        /// The step.
        step: &'static str,
        /// How long it may take.
        bound: Duration,
    },
}

impl BringUpError {
    /// Whether the step was not waited for to its end.
    pub(super) fn is_broken_off(&self) -> bool {
        matches!(self, Self::Cancelled(_) | Self::Timeout { .. })
    }

    /// Whether the host's disk is full: the caller may come back when it is not.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Record(error) => error.is_no_space(),
            Self::Disk(error) => error.is_no_space(),
            Self::Source(error) => error.is_no_space(),
            Self::RunDir { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}
