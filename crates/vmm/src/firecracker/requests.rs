//! The requests that are made of Firecracker, and what it answers: plain data, written by hand for the calls that we make.
//!
//! The names are those of its published description (`src/firecracker/swagger/firecracker.yaml` in its repository), with
//! which a test compares all of this.

use std::num::NonZeroU64;

use camino::Utf8Path;
use serde::{Deserialize, Serialize};

use crate::DiskRate;

/// The name of the root disk, in its request's path and in saved states.
pub(super) const DISK: &str = "root";
/// The name of the network device.
pub(super) const NETWORK: &str = "eth0";

/// A request with a body: one method and one path for each type.
pub(super) trait Request: Serialize {
    /// Method and path, as the first line of the request has them.
    const LINE: &'static str;
}

macro_rules! requests {
    ($($name:ty => $line:literal),* $(,)?) => {
        $(impl Request for $name {
            const LINE: &'static str = $line;
        })*
    };
}

requests! {
    MachineConfiguration => "PUT /machine-config",
    BootSource<'_> => "PUT /boot-source",
    SerialDevice<'_> => "PUT /serial",
    Drive<'_> => "PUT /drives/root",
    PartialDrive<'_> => "PATCH /drives/root",
    DriveRate => "PATCH /drives/root",
    NetworkInterface<'_> => "PUT /network-interfaces/eth0",
    InstanceActionInfo => "PUT /actions",
    Vm => "PATCH /vm",
    SnapshotCreateParams<'_> => "PUT /snapshot/create",
    SnapshotLoadParams<'_> => "PUT /snapshot/load",
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct MachineConfiguration {
    pub(super) vcpu_count: u32,
    pub(super) mem_size_mib: u64,
    pub(super) smt: bool,
    pub(super) track_dirty_pages: bool,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct BootSource<'a> {
    pub(super) kernel_image_path: &'a Utf8Path,
    pub(super) initrd_path: &'a Utf8Path,
    pub(super) boot_args: &'a str,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct SerialDevice<'a> {
    pub(super) serial_out_path: &'a str,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Drive<'a> {
    pub(super) drive_id: &'a str,
    pub(super) path_on_host: &'a str,
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    pub(super) cache_type: CacheType,
    pub(super) rate_limiter: RateLimiter,
}

/// Whether what a guest has flushed is on the host's disk.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum CacheType {
    Writeback,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct PartialDrive<'a> {
    pub(super) drive_id: &'a str,
    pub(super) path_on_host: &'a str,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct DriveRate {
    pub(super) drive_id: &'static str,
    pub(super) rate_limiter: RateLimiter,
}

/// Both are always said: what is left out of a change stays as it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct RateLimiter {
    pub(super) bandwidth: TokenBucket,
    pub(super) ops: TokenBucket,
}

/// So many tokens for each time, in milliseconds; 0 of them are no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct TokenBucket {
    pub(super) size: u64,
    pub(super) refill_time: u64,
}

impl From<DiskRate> for RateLimiter {
    fn from(rate: DiskRate) -> Self {
        let bucket = |bound: Option<NonZeroU64>| {
            let size = bound.map_or(0, NonZeroU64::get);
            TokenBucket { size, refill_time: if size == 0 { 0 } else { 1000 } }
        };
        Self { bandwidth: bucket(rate.bytes), ops: bucket(rate.operations) }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct NetworkInterface<'a> {
    pub(super) iface_id: &'a str,
    pub(super) guest_mac: &'a str,
    pub(super) host_dev_name: &'a str,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct InstanceActionInfo {
    pub(super) action_type: Action,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum Action {
    InstanceStart,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Vm {
    pub(super) state: VmState,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum VmState {
    Paused,
    Resumed,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct SnapshotCreateParams<'a> {
    pub(super) snapshot_type: SnapshotType,
    pub(super) snapshot_path: &'a Utf8Path,
    pub(super) mem_file_path: &'a Utf8Path,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum SnapshotType {
    /// All of the memory.
    Full,
    /// The pages that were written since the boot, the load or the last snapshot, over what the file holds.
    Diff,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SnapshotLoadParams<'a> {
    pub(super) snapshot_path: &'a Utf8Path,
    pub(super) mem_backend: MemoryBackend<'a>,
    pub(super) track_dirty_pages: bool,
    pub(super) resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) network_overrides: Vec<NetworkOverride<'a>>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct MemoryBackend<'a> {
    pub(super) backend_type: BackendType,
    pub(super) backend_path: &'a Utf8Path,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum BackendType {
    File,
    Uffd,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct NetworkOverride<'a> {
    pub(super) iface_id: &'a str,
    pub(super) host_dev_name: &'a str,
}

/// Who it is and what it does: the answer to `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct InstanceInfo {
    pub(super) id: String,
    pub(super) state: InstanceState,
}

impl InstanceInfo {
    pub(super) const LINE: &'static str = "GET /";
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// Why it refuses something.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Fault {
    pub(super) fault_message: String,
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
