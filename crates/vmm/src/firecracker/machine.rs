//! One machine.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::watch;

use super::{
    api::{Api, COMMAND_BOUND},
    jail::{self, Lent},
    launch::{CONSOLE, CONSOLE_LOG, DISK_LINK, Mark},
    memory::{self, CloneMemory, SNAPSHOT},
    requests,
    requests::{
        Action, BackendType, BootSource, CacheType, DISK, Drive, DriveRate, InstanceActionInfo,
        MachineConfiguration, MemoryBackend, NETWORK, NetworkInterface, NetworkOverride, PartialDrive,
        Request, SerialDevice, SnapshotLoadParams, VmState,
    },
    spool::Spool,
};
use crate::{
    DiskRate, DiskSpec, ExitReason, SnapshotFiles, SnapshotStatistics, Vm, VmmError, VmmResult,
    files::{cannot, keep_state},
    guest_memory::GuestMemory,
    launch::GUEST_MAC,
    pager::{Pager, SOCKET, ServedMemory},
    pages::SavedPages,
    process::{Leash, on_thread},
    state::{State, other_memory},
    validate,
};

/// A Firecracker process and what it is doing.
#[derive(Debug)]
pub(super) struct Machine {
    leash: Leash,
    api: Api,
    console: Arc<Spool>,
    run_dir: Utf8PathBuf,
    /// Locked by us: whoever adopts it waits for that.
    owner: File,
    disk: Option<Utf8PathBuf>,
    /// None where it is not jailed.
    user: Option<u32>,
    backing: Backing,
    state: State,
    /// After the process, so that its own end is told as wished for when both are dropped.
    pager: Option<Pager>,
}

/// What the guest's memory is to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backing {
    Anonymous,
    /// Anonymous, to be written to this file, which is a hole until then.
    Promised {
        file: Utf8PathBuf,
        written: Written,
    },
    /// Anonymous, and over this file of zeros to the host.
    Zeros {
        file: Utf8PathBuf,
        written: Written,
    },
    /// The file is mapped, and is what the memory began as.
    Private(Utf8PathBuf),
    /// Anonymous, and served by a pager over this file.
    Served(Utf8PathBuf),
}

/// What Firecracker knows of the pages that a machine has written since it booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// All of them: it was never asked.
    Known,
    /// It forgot them when it told them, or may have been asked by somebody else.
    Forgotten,
}

impl Written {
    /// What has to be asked for to have all of it.
    fn snapshot_type(self) -> requests::SnapshotType {
        match self {
            Self::Known => requests::SnapshotType::Diff,
            Self::Forgotten => requests::SnapshotType::Full,
        }
    }
}

/// What a machine is told before its guest boots.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) vcpus: u32,
    pub(super) memory_mib: u64,
    pub(super) kernel: &'a Utf8Path,
    pub(super) initramfs: &'a Utf8Path,
    pub(super) command_line: &'a str,
    pub(super) tap: Option<&'a str>,
    pub(super) disk_rate: DiskRate,
}

impl Machine {
    pub(super) fn new(
        leash: Leash,
        api: Api,
        console: Arc<Spool>,
        run_dir: Utf8PathBuf,
        owner: File,
        disk: Option<Utf8PathBuf>,
        user: Option<u32>,
    ) -> Self {
        let (backing, state) = (Backing::Anonymous, State::Paused);
        Self { leash, api, console, run_dir, owner, disk, user, backing, state, pager: None }
    }

    pub(super) fn api(&self) -> &Api {
        &self.api
    }

    /// What serves its memory. It goes with the machine, and the machine with it.
    pub(super) fn set_pager(&mut self, pager: Option<Pager>) {
        self.pager = pager;
    }

    pub(super) fn set_backing(&mut self, backing: Backing) {
        self.backing = backing;
    }

    /// What a machine is that was adopted.
    pub(super) fn found(&mut self, backing: Backing, state: State) {
        (self.backing, self.state) = (backing, state);
    }

    /// Tells a new process what it is, and lets its guest run.
    pub(super) async fn boot(&mut self, boot: &Boot<'_>) -> VmmResult<()> {
        const BOOT: &str = "boot";
        let configuration = MachineConfiguration {
            vcpu_count: boot.vcpus,
            mem_size_mib: boot.memory_mib,
            smt: false,
            track_dirty_pages: true,
        };
        self.tell(BOOT, &configuration).await?;
        let kernel_image_path = jail::name(self.user, boot.kernel, jail::KERNEL);
        let initrd_path = jail::name(self.user, boot.initramfs, jail::INITRAMFS);
        let source = BootSource { kernel_image_path, initrd_path, boot_args: boot.command_line };
        self.tell(BOOT, &source).await?;
        self.tell(BOOT, &SerialDevice { serial_out_path: CONSOLE }).await?;
        if self.disk.is_some() {
            let drive = Drive {
                drive_id: DISK,
                path_on_host: DISK_LINK,
                // It would change the kernel's command line. The guest finds its disk without.
                is_root_device: false,
                is_read_only: false,
                cache_type: CacheType::Writeback,
                rate_limiter: boot.disk_rate.into(),
            };
            self.tell(BOOT, &drive).await?;
        }
        if let Some(tap) = boot.tap {
            let network = NetworkInterface { iface_id: NETWORK, guest_mac: GUEST_MAC, host_dev_name: tap };
            self.tell(BOOT, &network).await?;
        }
        // It reads kernel and initramfs into the memory.
        let bound = memory::bound(file_bytes(boot.kernel) + file_bytes(boot.initramfs));
        self.tell_within(BOOT, &InstanceActionInfo { action_type: Action::InstanceStart }, bound).await?;
        self.state = State::Running;
        Mark::Making.clear(&self.run_dir)
    }

    /// Gives a new process a saved state, and waits until it has it.
    pub(super) async fn load(
        &mut self,
        from: &SnapshotFiles,
        pages: Option<SavedPages>,
        tap: Option<&str>,
        disk_rate: DiskRate,
    ) -> VmmResult<()> {
        const RESTORE: &str = "restore";
        self.tell(RESTORE, &SerialDevice { serial_out_path: CONSOLE }).await?;
        let memory = jail::name(self.user, &from.memory, jail::MEMORY);
        let load = SnapshotLoadParams {
            snapshot_path: jail::name(self.user, &from.state, jail::STATE),
            mem_backend: match self.pager {
                None => MemoryBackend { backend_type: BackendType::File, backend_path: memory },
                // It works in the directory where that is.
                Some(_) => {
                    MemoryBackend { backend_type: BackendType::Uffd, backend_path: Utf8Path::new(SOCKET) }
                }
            },
            track_dirty_pages: true,
            resume_vm: false,
            network_overrides: tap
                .map(|tap| NetworkOverride { iface_id: NETWORK, host_dev_name: tap })
                .into_iter()
                .collect(),
        };
        let bound = memory::bound(file_bytes(&from.state));
        self.tell_within(RESTORE, &load, bound).await?;
        if self.disk.is_some() {
            // That of the machine which was saved is in its state.
            self.tell(RESTORE, &DriveRate { drive_id: DISK, rate_limiter: disk_rate.into() }).await?;
        }
        if let Some(pager) = &mut self.pager {
            pager.is_connected();
            self.backing = Backing::Served(from.memory.clone());
            return Mark::Making.clear(&self.run_dir);
        }
        self.backing = Backing::Private(from.memory.clone());
        if let Some(pages) = pages {
            // No guest has run in it yet, and it looks into the memory of its devices only when one does.
            let (process, base) = (self.leash.process().clone(), from.memory.clone());
            let load = move |given_up: &AtomicBool| memory::load(&process, &base, &pages, given_up);
            self.leash.with_memory(RESTORE, load).await?;
        }
        Mark::Making.clear(&self.run_dir)
    }

    async fn tell<R: Request + Sync>(&self, operation: &'static str, request: &R) -> VmmResult<()> {
        self.tell_within(operation, request, COMMAND_BOUND).await
    }

    async fn tell_within<R: Request + Sync>(
        &self,
        operation: &'static str,
        request: &R,
        bound: Duration,
    ) -> VmmResult<()> {
        let answer = self.api.send(request, bound).await;
        self.leash.explain(operation, answer).await
    }

    /// Saves a machine that was restored over `base`. It goes on as if nothing had happened.
    async fn save_clone(&self, base: &Utf8Path, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics> {
        let pages = validate::snapshot_over(base, into, SNAPSHOT)?;
        let (process, base) = (self.leash.process().clone(), base.to_owned());
        let (pager, run_dir) =
            (self.pager.as_ref().map(|pager| pager.process().clone()), self.run_dir.clone());
        let open = move |_: &AtomicBool| match pager {
            None => GuestMemory::of(&process, &base, SNAPSHOT).map(CloneMemory::Mapped),
            Some(pager) => ServedMemory::open(&process, &pager, &run_dir, &base).map(CloneMemory::Served),
        };
        let memory = self.leash.with_memory(SNAPSHOT, open).await?;
        // It cannot write the devices alone. What it takes for the memory is of no use: it knows only what was written
        // since it was asked the last time, and nothing of what we put there ourselves.
        let unused = memory::Scratch::beside(&into.state, "memory");
        let bound = memory::bound(file_bytes(&into.memory));
        self.write_snapshot(requests::SnapshotType::Diff, &into.state, unused.path(), bound).await?;
        drop(unused);
        self.leash.with_memory(SNAPSHOT, move |given_up| memory.save(&pages, given_up)).await
    }

    /// Saves a machine that booted over zeros. It goes on as if nothing had happened.
    async fn save_over_zeros(
        &mut self,
        zeros: &Utf8Path,
        written: Written,
        into: &SnapshotFiles,
    ) -> VmmResult<SnapshotStatistics> {
        let pages = validate::snapshot_over(zeros, into, SNAPSHOT)?;
        let (file, forgotten) = (zeros.to_owned(), Written::Forgotten);
        self.backing = Backing::Zeros { file, written: forgotten };
        let bytes = file_bytes(zeros);
        let memory = memory::Scratch::beside(&into.state, "memory");
        let bound = memory::bound(bytes);
        self.write_snapshot(written.snapshot_type(), &into.state, memory.path(), bound).await?;
        on_thread(SNAPSHOT, move |given_up| memory::convert(&memory, bytes, &pages, given_up)).await
    }

    /// Writes the memory to the file that was promised it.
    async fn save_promised(
        &mut self,
        file: &Utf8Path,
        written: Written,
        into: &SnapshotFiles,
    ) -> VmmResult<()> {
        validate::snapshot_files(into, false)?;
        Mark::Saved.set(&self.run_dir)?;
        let (file, forgotten) = (file.to_owned(), Written::Forgotten);
        self.backing = Backing::Promised { file, written: forgotten };
        // What was never written stays a hole.
        let bound = memory::bound(file_bytes(&into.memory));
        self.write_snapshot(written.snapshot_type(), &into.state, &into.memory, bound).await?;
        self.state = State::Saved(into.clone());
        Ok(())
    }

    /// Has Firecracker write both files. The state that a jailed one writes is copied: it could go on to change what it
    /// has open.
    async fn write_snapshot(
        &self,
        snapshot_type: requests::SnapshotType,
        state: &Utf8Path,
        memory: &Utf8Path,
        bound: Duration,
    ) -> VmmResult<()> {
        let files = requests::SnapshotCreateParams {
            snapshot_type,
            snapshot_path: jail::name(self.user, state, jail::SAVED_STATE),
            mem_file_path: jail::name(self.user, memory, jail::SAVED_MEMORY),
        };
        let Some(user) = self.user else {
            // It would make them readable for others.
            memory::prepare(state, memory)?;
            return self.tell_within(SNAPSHOT, &files, bound).await;
        };
        let written = memory::Scratch::beside(state, "written");
        let [state_file, memory_file] = memory::prepare(written.path(), memory)?;
        let lent = vec![
            (written.path().to_owned(), state_file, jail::SAVED_STATE),
            (memory.to_owned(), memory_file, jail::SAVED_MEMORY),
        ];
        let process = self.leash.process().clone();
        let lend = move |_: &AtomicBool| Lent::lend(&process, user, lent);
        let lent = self.leash.with_memory(SNAPSHOT, lend).await?;
        let told = self.tell_within(SNAPSHOT, &files, bound).await;
        let back = on_thread(SNAPSHOT, move |_| lent.take_back()).await;
        told.and(back)?;
        let state = state.to_owned();
        let keep = move |_: &AtomicBool| {
            let path = written.path();
            keep_state(&File::open(path).map_err(cannot("open", path))?, &state)
        };
        on_thread(SNAPSHOT, keep).await
    }

    /// Fails unless something may be done with its disk now.
    fn may_change_disk(&self, operation: &'static str) -> VmmResult<&Utf8Path> {
        self.leash.alive(operation)?;
        self.state.may_change_disk(operation, self.disk.as_deref())
    }
}

/// How long a file is; 0 where it is not there, which is said by whoever opens it.
fn file_bytes(path: &Utf8Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.len())
}

/// Makes a disk's file as long as that, if it is a file.
fn grow(disk: &Utf8Path, bytes: u64) -> VmmResult<()> {
    let opened = OpenOptions::new().write(true).open(disk);
    let mut file = opened.map_err(cannot("open", disk))?;
    let metadata = file.metadata().map_err(cannot("examine", disk))?;
    // Of a block device the length is where its end is.
    let length = file.seek(SeekFrom::End(0)).map_err(cannot("examine", disk))?;
    if bytes < length || (!metadata.is_file() && bytes > length) {
        let problem = format!("it has {length} bytes, and cannot have {bytes}");
        return Err(VmmError::Spec { field: "disk", problem });
    }
    if metadata.is_file() {
        file.set_len(bytes).map_err(cannot("size", disk))?;
    }
    Ok(())
}

const ONE_DEVICE: &str = "Firecracker has no layers of disks: copies are made below it";

#[async_trait]
impl Vm for Machine {
    fn pid(&self) -> Option<u32> {
        Some(self.leash.process().pid())
    }

    async fn pause(&mut self) -> VmmResult<()> {
        self.leash.alive("pause")?;
        if matches!(self.state, State::Running | State::Stopping) {
            // Before the answer, which may never come: whoever wants it to run then has to tell it so.
            self.state = State::Stopping;
            self.tell("pause", &requests::Vm { state: VmState::Paused }).await?;
            self.state = State::Paused;
        }
        Ok(())
    }

    async fn resume(&mut self) -> VmmResult<()> {
        self.leash.alive("resume")?;
        match &self.state {
            State::Running => Ok(()),
            State::Paused | State::Stopping => {
                self.tell("resume", &requests::Vm { state: VmState::Resumed }).await?;
                self.state = State::Running;
                Ok(())
            }
            State::Saved(_) => Err(self.state.wrong_for("resume")),
        }
    }

    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics> {
        self.leash.alive(SNAPSHOT)?;
        if !self.state.is_to_be_saved(SNAPSHOT, into)? {
            return Ok(SnapshotStatistics::default());
        }
        match self.backing.clone() {
            Backing::Private(base) | Backing::Served(base) => self.save_clone(&base, into).await,
            Backing::Zeros { file, written } => self.save_over_zeros(&file, written, into).await,
            Backing::Promised { file, written } if file == into.memory => {
                let saved = self.save_promised(&file, written, into).await;
                if saved.is_err() {
                    // It has its memory still, and can be taken over.
                    Mark::Saved.clear(&self.run_dir)?;
                }
                saved.map(|()| SnapshotStatistics::default())
            }
            Backing::Promised { .. } | Backing::Anonymous => Err(other_memory(SNAPSHOT)),
        }
    }

    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        const RESIZE: &str = "resize_disk";
        let disk = self.may_change_disk(RESIZE)?.to_owned();
        on_thread(RESIZE, move |_| grow(&disk, bytes)).await?;
        if self.user.is_some() {
            jail::lengthen_files(self.leash.process(), bytes)?;
        }
        // It opens the file again, and tells its guest how long it is.
        self.tell(RESIZE, &PartialDrive { drive_id: DISK, path_on_host: DISK_LINK }).await
    }

    async fn pivot_disk(&mut self, _overlay: &DiskSpec) -> VmmResult<()> {
        self.may_change_disk("pivot_disk")?;
        Err(VmmError::Unsupported { operation: "pivot_disk", problem: ONE_DEVICE })
    }

    async fn disk_chain(&mut self) -> VmmResult<Vec<Utf8PathBuf>> {
        self.leash.alive("disk_chain")?;
        Ok(self.disk.iter().cloned().collect())
    }

    async fn stream_disk(&mut self, _base: &Utf8Path) -> VmmResult<()> {
        self.may_change_disk("stream_disk")?;
        Err(VmmError::Unsupported { operation: "stream_disk", problem: ONE_DEVICE })
    }

    async fn console(&mut self) -> String {
        self.console.text()
    }

    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.leash.exit()
    }

    async fn stop(&mut self) -> VmmResult<ExitReason> {
        let reason = match self.leash.reason() {
            Some(reason) => reason,
            None => self.leash.kill().await?,
        };
        // It ends when its machine does, a moment later.
        if let Some(pager) = &self.pager {
            pager.end().await;
        }
        Ok(reason)
    }

    async fn release(mut self: Box<Self>) {
        // The next owner goes on after it. It is a convenience for people: the directory may be gone or full.
        let said = self.console.close();
        drop(tokio::fs::write(self.run_dir.join(CONSOLE_LOG), said).await);
        if let Some(pager) = &mut self.pager {
            pager.let_go();
        }
        self.leash.let_go();
        // The lock goes with the file, whoever else has a descriptor of it.
        if let Err(error) = self.owner.unlock() {
            tracing::warn!(run_dir = %self.run_dir, %error, "a machine was let go, and is still locked");
        }
    }
}
