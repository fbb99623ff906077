//! The driver of the floor: the one that made the snapshot.

use std::sync::Arc;

use anyhow::{Result, bail};
use camino::Utf8Path;
use wrenn_vmm::Vmm;

/// The driver whose snapshot is in `directory`.
///
/// # Errors
/// There is none like it here.
pub async fn same_as(directory: &Utf8Path) -> Result<Arc<dyn Vmm>> {
    bail!("no driver for {directory}")
}
