//! The snapshot from which every create of a template is restored.
//!
//! ```text
//!  get ──► open: there, verified ──────────────────────────────► snapshot
//!           │ none, or damaged
//!           ▼
//!          begin (one builder on the machine; others wait for it)
//!           │
//!           ▼
//!          clone the image's disk ─► slot ─► boot, memory in the snapshot's file ─► envd answers
//!           ─► /init: grow the file system ─► run a few programs ─► /snapshot/prepare ─► pause ─► save devices ─► stop ─► freeze the disk
//!           ─► give back zeros ─► commit
//! ```
//!
//! Disk size is not part of what a snapshot fixes, with one exception: a root file system does not shrink.
//! So there are two bases per shape: one of the host's default size, which nearly every create uses as it
//! is, and one of the template's smallest, which is grown to what was asked for.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use camino::Utf8PathBuf;
use wrenn_types::{
    DiskMib, InstanceId, ResourceError, Shape, TemplateName,
    bounds::{boot, build},
};
use wrenn_vmm::{BootMemory, DiskRate, DiskSpec, GuestBundle, MachineSpec, NetworkSpec, Vm, Vmm, VmmError};

use crate::{
    guest::{self, GuestError, Identity},
    images::Resolved,
    network::{Policy, Slot, SlotError, SlotPool},
    rootfs::{RootfsError, RootfsStore},
    sandbox::host::Host,
    snapshot_store::{Begin, Building, SnapshotStore, SnapshotStoreError, Subject, WarmSnapshot},
    users::Users,
};

/// How long it may take to grow its file system.
const GROW_BOUND: Duration = Duration::from_secs(60);
/// How long it may take to stand still.
const PREPARE_BOUND: Duration = Duration::from_secs(30);

/// What is run in a template before it is saved, so that the first command of a clone finds programs,
/// libraries and the agent's own paths in memory and does not read them from its disk. A template without
/// one of them is none the worse.
const EXERCISES: [&[&str]; 3] = [
    &["/bin/true"],
    &["/bin/bash", "-l", "-c", "exec /bin/sh -c 'id; env; ls'"],
    &["python3", "-c", "import json, os, sys"],
];
/// What is run last: in the second in which the template is idle the kernel does what it puts off, once instead
/// of in every clone.
const SETTLING: &[&str] = &["sleep", "1"];
/// How often each of the exercises is run. After the first, the disk is not read any more; the second and third settle what
/// the kernel and the agent allocate once.
const EXERCISE_ROUNDS: usize = 3;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The store failed.
    #[error("the snapshot store failed")]
    Store(#[source] SnapshotStoreError),
    /// The template's disk could not be made or frozen.
    #[error("the template's disk could not be made")]
    Disk(#[source] RootfsError),
    /// No slot could be had.
    #[error("no network slot could be had for the template")]
    Slot(#[source] SlotError),
    /// The template did not boot, or could not be saved.
    #[error("could not {operation} the template's machine")]
    Machine {
        /// What was to be done.
        operation: &'static str,
        /// Why.
        #[source]
        source: VmmError,
    },
    /// The template's guest did not come up.
    #[error("the template's guest did not come up; its console ends with: {console}")]
    Guest {
        /// The end of what the guest printed.
        console: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// A directory could not be made.
    #[error("could not make {path}")]
    RunDir {
        /// The directory.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl WarmError {
    /// Whether the host's disk is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Store(error) => error.is_no_space(),
            Self::Disk(error) => error.is_no_space(),
            Self::RunDir { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Self::Slot(_) | Self::Machine { .. } | Self::Guest { .. } => false,
        }
    }
}

/// Which snapshot is wanted.
#[derive(Debug, Clone)]
pub struct WarmRequest {
    template: TemplateName,
    image: DiskSpec,
    image_id: String,
    default_user: String,
    default_workdir: String,
    shape: Shape,
    /// The size of the snapshot's disk; never larger than what was asked for.
    pub disk: DiskMib,
}

impl WarmRequest {
    /// The snapshot that a sandbox with a disk of `asked` is restored from.
    ///
    /// # Errors
    /// When the template does not fit on such a disk.
    pub fn for_disk(
        template: &Resolved<'_>,
        shape: Shape,
        asked: DiskMib,
        default: DiskMib,
    ) -> Result<Self, ResourceError> {
        let Resolved { template, default_user, default_workdir } = template;
        let disk = base_disk(template.minimum_disk, asked, default)?;
        Ok(Self {
            template: template.name.clone(),
            image: template.disk(),
            image_id: template.image_id.as_str().to_owned(),
            default_user: default_user.as_str().to_owned(),
            default_workdir: default_workdir.as_str().to_owned(),
            shape,
            disk,
        })
    }
}

/// The larger of the two bases that fits into what was asked for.
fn base_disk(minimum: DiskMib, asked: DiskMib, default: DiskMib) -> Result<DiskMib, ResourceError> {
    if asked < minimum {
        return Err(ResourceError {
            field: "disk_size_mb",
            minimum: minimum.get(),
            maximum: DiskMib::MAXIMUM,
            given: asked.into(),
        });
    }
    let usual = default.max(minimum);
    Ok(if asked >= usual { usual } else { minimum })
}

/// What snapshots are made with.
#[derive(Debug)]
pub struct Parts {
    /// Whose machines these are.
    pub instance: InstanceId,
    /// The driver.
    pub vmm: Arc<dyn Vmm>,
    /// Kernel and initramfs.
    pub guest: GuestBundle,
    /// Root disks.
    pub disks: Arc<dyn RootfsStore>,
    /// Network slots.
    pub slots: SlotPool,
    /// Where snapshots are kept.
    pub store: SnapshotStore,
    /// The parent of the machines' short-pathed directories.
    pub machines_dir: Utf8PathBuf,
    /// Whose rights each machine has.
    pub users: Users,
}

/// The template snapshots of this host.
#[derive(Debug)]
pub struct Warm {
    parts: Parts,
}

impl Warm {
    /// The snapshots that are made with these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self { parts }
    }

    fn subject(&self, request: &WarmRequest) -> Subject {
        Subject {
            guest: self.parts.guest.id.clone(),
            image: request.image_id.clone(),
            vmm: self.parts.vmm.identity().clone(),
            shape: request.shape,
            disk: request.disk,
            disk_format: self.parts.disks.flat_format(),
        }
    }

    /// Whether the snapshot is there already.
    #[must_use]
    pub fn is_there(&self, request: &WarmRequest) -> bool {
        matches!(self.parts.store.open(&self.subject(request)), Ok(Some(_)))
    }

    /// The snapshot, verified; made first if it is not there.
    ///
    /// # Errors
    /// Why there is none; nothing is left of the attempt.
    pub async fn get(&self, request: &WarmRequest) -> Result<WarmSnapshot, WarmError> {
        let subject = self.subject(request);
        let store = self.parts.store.clone();
        let wanted = subject.clone();
        let found = blocking(move || {
            let Some(snapshot) = store.open(&wanted)? else { return Ok(None) };
            store.verify_contents_once(&snapshot)?;
            Ok(Some(snapshot))
        })
        .await;
        match found {
            Ok(Some(snapshot)) => return Ok(snapshot),
            Ok(None) => {}
            Err(error) if SnapshotStoreError::is_unusable(&error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the template's snapshot is made anew"
                );
            }
            Err(error) => return Err(WarmError::Store(error)),
        }
        match self.parts.store.begin(&subject, build(request.shape.memory)).await.map_err(WarmError::Store)? {
            Begin::Ready(snapshot) => {
                let store = self.parts.store.clone();
                blocking(move || store.verify_contents_once(&snapshot).map(|_| *snapshot))
                    .await
                    .map_err(WarmError::Store)
            }
            // Boxed: it is rare and large, and would make every create's future as large.
            Begin::Building(building) => Box::pin(self.build(request, building)).await,
        }
    }

    /// The snapshot, made anew: what is kept of the present one cannot be used.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn replace(
        &self,
        request: &WarmRequest,
        present: WarmSnapshot,
    ) -> Result<WarmSnapshot, WarmError> {
        let store = self.parts.store.clone();
        blocking(move || store.condemn(&present)).await;
        self.get(request).await
    }

    async fn build(&self, request: &WarmRequest, building: Building) -> Result<WarmSnapshot, WarmError> {
        let begin = tokio::time::Instant::now();
        tracing::info!(template = %request.template, shape = ?request.shape, "making the template's snapshot");
        let files = building.files();
        let disk_path = building.disk();
        let working = Utf8PathBuf::from(format!("{disk_path}.working"));
        let disks = Arc::clone(&self.parts.disks);
        let (image, size, path) = (request.image.clone(), request.disk, working);
        let bases = [image.clone()];
        let disk = blocking(move || disks.clone_disk(&image, &path, size)).await.map_err(WarmError::Disk)?;
        let opened = OpenDisk::open(&self.parts.disks, &disk).await?;
        let mut slot = self.parts.slots.take().await.map_err(WarmError::Slot)?;
        let saved = self.boot_and_save(request, &opened.device, &mut slot, &files).await;
        self.parts.slots.release(slot).await;
        saved?;
        let disks = Arc::clone(&self.parts.disks);
        let snapshot = blocking(move || {
            drop(opened);
            // What stands on it outlives the template's image, which may be replaced or removed.
            disks.flatten(&disk, &bases, &disk_path).map_err(WarmError::Disk)?;
            building.commit().map_err(WarmError::Store)
        })
        .await?;
        tracing::info!(template = %request.template, elapsed = ?begin.elapsed(), dir = %snapshot.dir, "the template's snapshot is there");
        Ok(snapshot)
    }

    async fn boot_and_save(
        &self,
        request: &WarmRequest,
        disk: &DiskSpec,
        slot: &mut Slot,
        files: &wrenn_vmm::SnapshotFiles,
    ) -> Result<(), WarmError> {
        // The template reaches nothing while it boots: it runs no user's code, and needs nothing.
        let policy = Policy::offline();
        slot.apply(&policy).await.map_err(WarmError::Slot)?;
        let name = format!("warm-{}", slot.number());
        let run_dir = self.parts.machines_dir.join(&name);
        std::fs::create_dir_all(&run_dir)
            .map_err(|source| WarmError::RunDir { path: run_dir.clone(), source })?;
        let machine = MachineSpec {
            name: format!("{}{name}", Host::machine_mark(&self.parts.instance)),
            run_dir: run_dir.clone(),
            shape: request.shape,
            guest: self.parts.guest.clone(),
            disk: Some(disk.clone()),
            disk_bases: vec![request.image.clone()],
            disk_rate: DiskRate::default(),
            network: Some(NetworkSpec {
                namespace: slot.netns_path().to_owned(),
                tap: slot.tap().to_owned(),
            }),
            kernel_arguments: Vec::new(),
            keep_open: vec![slot.lock().map_err(WarmError::Slot)?],
            control_group: None,
            user: self.parts.users.in_slot(slot.number()),
        };
        let failed = |operation| move |source| WarmError::Machine { operation, source };
        let outcome = match self
            .parts
            .vmm
            .boot(machine, BootMemory::Shared(&files.memory))
            .await
            .map_err(failed("boot"))
        {
            Ok(mut vm) => {
                let saved = self.save(request, slot, vm.as_mut(), files).await;
                // Stopped whatever became of it; the first error is the one to tell.
                let stopped = vm.stop().await.map_err(failed("stop"));
                match saved {
                    Ok(()) => stopped.map(drop),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        // What is left of it is collected at the next start.
        let _ = std::fs::remove_dir_all(&run_dir);
        outcome
    }

    async fn save(
        &self,
        request: &WarmRequest,
        slot: &Slot,
        vm: &mut dyn Vm,
        files: &wrenn_vmm::SnapshotFiles,
    ) -> Result<(), WarmError> {
        let connector = slot.connector();
        let identity = Identity {
            hostname: None,
            restored: false,
            entropy: Identity::fresh_entropy(),
            machine_id: None,
            access_token: None,
            env_vars: BTreeMap::new(),
            default_user: &request.default_user,
            default_workdir: &request.default_workdir,
            dns_servers: &[],
            disk_bytes: Some(request.disk.bytes()),
        };
        let up = async {
            guest::wait_until_healthy(&connector, boot(request.shape.memory)).await?;
            guest::initialise(&connector, &identity, None, GROW_BOUND).await?;
            for program in EXERCISES {
                for _ in 0..EXERCISE_ROUNDS {
                    guest::exercise(&connector, &request.default_user, program, GROW_BOUND).await?;
                }
            }
            guest::exercise(&connector, &request.default_user, SETTLING, GROW_BOUND).await?;
            guest::prepare(&connector, None, PREPARE_BOUND).await
        };
        if let Err(source) = up.await {
            return Err(WarmError::Guest { console: vm.console().await, source });
        }
        let failed = |operation| move |source| WarmError::Machine { operation, source };
        vm.pause().await.map_err(failed("pause"))?;
        vm.snapshot(files).await.map(drop).map_err(failed("save"))
    }
}

/// The disk of a template's machine, closed when this is dropped: at once, or when the machine is gone.
#[derive(Debug)]
struct OpenDisk {
    disks: Arc<dyn RootfsStore>,
    path: Utf8PathBuf,
    /// What the machine is given.
    device: DiskSpec,
}

impl OpenDisk {
    async fn open(disks: &Arc<dyn RootfsStore>, disk: &DiskSpec) -> Result<Self, WarmError> {
        let (disks, disk) = (Arc::clone(disks), disk.clone());
        let open = move || {
            let device = disks.open(&disk)?;
            Ok(Self { disks, path: disk.path, device })
        };
        blocking(open).await.map_err(WarmError::Disk)
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        if let Err(error) = self.disks.close(&self.path) {
            let path = &self.path;
            tracing::warn!(%path, error = &error as &dyn std::error::Error, "a disk stays open until the next start");
        }
    }
}

/// Runs what may wait for the disk on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wrenn_types::MemoryMib;

    fn disk(mib: u32) -> DiskMib {
        DiskMib::new(mib.into()).unwrap()
    }

    #[test]
    fn the_usual_disk_is_used_as_it_is() {
        let (minimum, default) = (disk(1024), disk(20_480));
        assert_eq!(base_disk(minimum, default, default), Ok(default));
        assert_eq!(base_disk(minimum, disk(50_000), default), Ok(default));
        assert_eq!(base_disk(minimum, disk(2048), default), Ok(minimum));
        assert_eq!(base_disk(minimum, disk(512), default).unwrap_err().field, "disk_size_mb");
    }

    /// The boot alone of a large template took longer than the making of its snapshot was allowed to.
    #[test]
    fn whatever_the_memory_a_template_may_boot_and_be_written() {
        for mib in 128..=65_536_u32 {
            let memory = MemoryMib::new(mib.into()).unwrap();
            let slow_disk = Duration::from_secs_f64(f64::from(mib) * 3.0 / 50.0);
            assert!(build(memory) >= boot(memory) + slow_disk + GROW_BOUND, "{mib} MiB");
        }
    }

    proptest! {
        /// A base never has to shrink, and never is smaller than the template.
        #[test]
        fn a_base_fits(minimum in 512_u32..9000, asked in 512_u32..90_000, default in 512_u32..30_000) {
            if let Ok(base) = base_disk(disk(minimum), disk(asked), disk(default)) {
                prop_assert!(base <= disk(asked) && base >= disk(minimum));
            } else {
                prop_assert!(asked < minimum);
            }
        }
    }
}
