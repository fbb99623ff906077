//! What an agent is told at its start. One struct, from flags and environment.

use std::{net::Ipv4Addr, num::NonZeroU64};

use camino::Utf8PathBuf;
use wrenn_vmm::DiskRate;

use crate::{doctor::IdRange, metrics::endpoint::MetricsAddress, network::NamespaceName};

/// Flags of `wrenn agent`.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Directory of this stack: records, disks and the instance id are in it.
    #[arg(long, env = "WRENN_DIR", default_value = "/var/lib/wrenn")]
    pub dir: Utf8PathBuf,

    /// Directory with the guest bundle and the templates (`make images` builds one).
    #[arg(long, env = "WRENN_IMAGES", default_value = "/var/lib/wrenn/images")]
    pub images: Utf8PathBuf,

    /// Directory of the warm template snapshots; several stacks may share it.
    #[arg(long, env = "WRENN_SNAPSHOTS", default_value = "/var/cache/wrenn/snapshots")]
    pub snapshots: Utf8PathBuf,

    /// Unix socket to serve; `/run/wrenn/INSTANCE/agent.sock` when not given.
    #[arg(long)]
    pub socket: Option<Utf8PathBuf>,

    /// Network namespaces to keep ready.
    #[arg(long, default_value_t = 8)]
    pub ready_slots: usize,

    /// Named network namespace that sandboxes reach the outside through, instead of the host's own.
    #[arg(long)]
    pub uplink_netns: Option<NamespaceName>,

    /// Name servers of the guests; nothing else is asked for names.
    #[arg(long, value_delimiter = ',', default_value = "1.1.1.1,8.8.8.8")]
    pub dns_servers: Vec<Ipv4Addr>,

    /// Size of a root disk when a create names none, in MiB.
    #[arg(long, default_value_t = wrenn_types::DiskMib::default().get())]
    pub default_disk_mib: u32,

    /// The virtual machine monitor.
    #[arg(long, env = "WRENN_VMM", value_enum, default_value_t = VmmDriver::Qemu)]
    pub vmm: VmmDriver,

    /// The Firecracker to run instead of the one on the PATH.
    #[arg(long, env = "WRENN_FIRECRACKER")]
    pub firecracker: Option<Utf8PathBuf>,

    /// Where Firecracker has the memory of machines that are restored from: the snapshot's files, mapped, or a process
    /// beside each machine that serves it page by page.
    #[arg(long, env = "WRENN_MEMORY_BACKEND", value_enum, default_value_t = MemoryBackendFlag::File)]
    pub memory_backend: MemoryBackendFlag,

    /// Refuse to start unless the host has all that production needs, which `wrenn doctor` tells of.
    #[arg(long)]
    pub production: bool,

    /// Firecracker's jailer, in which machines run that have users of their own; when not given, the one beside Firecracker or on
    /// the PATH.
    #[arg(long, env = "WRENN_JAILER")]
    pub jailer: Option<Utf8PathBuf>,

    /// User ids that nobody else has, FIRST-LAST, 32768 or more: each machine is confined as one of them. When not given,
    /// 2000000-2032767 with `--production`; without, machines run as the agent does, which is for development.
    #[arg(long, env = "WRENN_UIDS", value_name = "RANGE")]
    pub uids: Option<IdRange>,

    /// What runs guests under QEMU; Firecracker always runs them under KVM.
    #[arg(long, env = "WRENN_ACCEL", value_enum, default_value_t = AcceleratorFlag::Auto)]
    pub accelerator: AcceleratorFlag,

    /// The QEMU to run instead of the one on the PATH.
    #[arg(long, env = "WRENN_QEMU")]
    pub qemu: Option<Utf8PathBuf>,

    /// How root disks are kept; when not given, `qcow2` under QEMU and `file` under Firecracker. `dm-snapshot` is for
    /// Firecracker, as `qcow2` is for QEMU.
    #[arg(long, env = "WRENN_DISKS", value_enum)]
    pub disks: Option<DiskDriver>,

    /// Where `GET /metrics` is served for Prometheus: a loopback address such as 127.0.0.1:9464, which every user
    /// of the host can read, an absolute path of a Unix socket, or `off`; when not given, the socket
    /// `metrics.sock` beside that of the agent, which only its owner can use.
    #[arg(long, env = "WRENN_AGENT_METRICS")]
    pub metrics: Option<MetricsAddress>,

    /// What each machine may read of the disk that the directory is on, and what it may write, in MiB per second;
    /// 0 is no limit. Where the host has no controller for that, its own disk is limited, reads and writes together.
    #[arg(long, env = "WRENN_MACHINE_IO_MIB", value_name = "MIB", default_value_t = 1024)]
    pub machine_io_mib: u32,

    /// The same in operations per second.
    #[arg(long, env = "WRENN_MACHINE_IO_OPERATIONS", value_name = "COUNT", default_value_t = 100_000)]
    pub machine_io_operations: u32,

    /// What becomes of running sandboxes when the agent is stopped; paused ones stay in any case.
    #[arg(long, value_enum, default_value_t = OnStop::Leave)]
    pub on_stop: OnStop,

    /// What becomes of running sandboxes when no control plane has been connected for a while.
    #[arg(long, env = "WRENN_ON_CONTROL_PLANE_LOSS", value_enum, default_value_t = OnControlPlaneLoss::Keep)]
    pub on_control_plane_loss: OnControlPlaneLoss,

    /// How long that while is.
    #[arg(
        long,
        env = "WRENN_CONTROL_PLANE_LOSS_AFTER",
        value_name = "SECONDS",
        default_value_t = CONTROL_PLANE_LOSS_AFTER,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub control_plane_loss_after: u32,

    /// How many seconds after it was made or last read a file on disk is read against its digest; 0 for never.
    #[arg(long, env = "WRENN_SCRUB_INTERVAL", value_name = "SECONDS", default_value_t = SCRUB_INTERVAL)]
    pub scrub_interval: u32,
}

impl Config {
    /// How root disks are kept under the virtual machine monitor that was chosen; none where it takes no such disks.
    #[must_use]
    pub fn disk_driver(&self) -> Option<DiskDriver> {
        disk_driver(self.vmm, self.disks)
    }

    /// The two limits of I/O.
    #[must_use]
    pub fn machine_io(&self) -> DiskRate {
        DiskRate {
            bytes: NonZeroU64::new(u64::from(self.machine_io_mib) << 20),
            operations: NonZeroU64::new(self.machine_io_operations.into()),
        }
    }
}

fn disk_driver(vmm: VmmDriver, wanted: Option<DiskDriver>) -> Option<DiskDriver> {
    match (vmm, wanted) {
        (VmmDriver::Qemu, None | Some(DiskDriver::Qcow2)) => Some(DiskDriver::Qcow2),
        (_, Some(DiskDriver::File)) | (VmmDriver::Firecracker, None) => Some(DiskDriver::File),
        (VmmDriver::Firecracker, Some(DiskDriver::DmSnapshot)) => Some(DiskDriver::DmSnapshot),
        (VmmDriver::Qemu, Some(DiskDriver::DmSnapshot))
        | (VmmDriver::Firecracker, Some(DiskDriver::Qcow2)) => None,
    }
}

/// A day, in seconds: how often everything on disk is read when nobody says.
pub const SCRUB_INTERVAL: u32 = 24 * 60 * 60;

/// How many seconds without a control plane are a loss, when nobody says. One that is started anew is back before.
pub const CONTROL_PLANE_LOSS_AFTER: u32 = 90;

/// What becomes of running sandboxes when the agent is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnStop {
    /// They go on, and the next agent takes them over.
    Leave,
    /// They are destroyed.
    Destroy,
}

/// What becomes of running sandboxes when no control plane has been connected for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnControlPlaneLoss {
    /// They go on.
    Keep,
    /// They are paused. One whose pause fails goes on.
    Pause,
}

/// Which virtual machine monitor runs the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum VmmDriver {
    /// QEMU's `microvm`, with KVM or without.
    Qemu,
    /// Firecracker, on KVM.
    Firecracker,
}

/// Where the memory of machines that are restored comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MemoryBackendFlag {
    /// The snapshot's files, mapped.
    File,
    /// A process beside each machine that serves its page faults; for Firecracker.
    Uffd,
}

/// How root disks are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DiskDriver {
    /// A qcow2 overlay per sandbox; for QEMU.
    Qcow2,
    /// A plain file per sandbox: shared blocks where the file system can, a sparse copy elsewhere.
    File,
    /// A snapshot of the device mapper per sandbox, over one device per image; for Firecracker.
    DmSnapshot,
}

/// What runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum AcceleratorFlag {
    /// KVM where a guest has come up on it, else TCG.
    Auto,
    /// The processor, through the kernel.
    Kvm,
    /// Translation in software.
    Tcg,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_such_as_the_monitor_takes() {
        for (vmm, wanted, found) in [
            (VmmDriver::Qemu, None, Some(DiskDriver::Qcow2)),
            (VmmDriver::Qemu, Some(DiskDriver::File), Some(DiskDriver::File)),
            (VmmDriver::Firecracker, None, Some(DiskDriver::File)),
            (VmmDriver::Firecracker, Some(DiskDriver::File), Some(DiskDriver::File)),
            (VmmDriver::Firecracker, Some(DiskDriver::DmSnapshot), Some(DiskDriver::DmSnapshot)),
            (VmmDriver::Firecracker, Some(DiskDriver::Qcow2), None),
            (VmmDriver::Qemu, Some(DiskDriver::DmSnapshot), None),
        ] {
            assert_eq!(disk_driver(vmm, wanted), found, "{vmm:?} {wanted:?}");
        }
    }
}
