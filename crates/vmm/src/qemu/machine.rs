//! One machine.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use super::{
    block,
    disk_files::name_of_set,
    facts::{Facts, Migration},
    monitor::{ConsoleTail, QUIT_BOUND},
    qmp::{COMMAND_BOUND, Qmp},
};
use crate::{
    DiskRate, DiskSpec, ExitReason, SnapshotFiles, SnapshotStatistics, Vm, VmmError, VmmResult,
    files::{cannot, create_private, keep_state, remove_stale},
    guest_memory::GuestMemory,
    pages::SavedPages,
    process::Leash,
    state::{State, other_memory},
    validate,
};

/// How long QEMU may take to start, on a machine that is busy with many others.
pub(super) const START_BOUND: Duration = Duration::from_secs(20);
/// How long the devices' state may take to be loaded or saved.
const MIGRATION_BOUND: Duration = Duration::from_secs(60);

const SNAPSHOT: &str = "snapshot";
/// The name under which QEMU keeps a passed file.
const STATE: &str = "state";

/// A QEMU process and what it is doing.
#[derive(Debug)]
pub(super) struct Machine {
    leash: Leash,
    qmp: Arc<Qmp>,
    console: Arc<ConsoleTail>,
    pub(super) has_disk: bool,
    /// Something was handed over, or its guest stood still, since it was last asked to close what it does not need.
    may_have_superfluous: bool,
    backing: Backing,
    state: State,
}

/// What the guest's memory is to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backing {
    Anonymous,
    /// The file is the memory.
    Shared(Utf8PathBuf),
    /// The file is what the memory began as.
    Private(Utf8PathBuf),
}

impl Machine {
    pub(super) fn new(leash: Leash, qmp: Arc<Qmp>, console: Arc<ConsoleTail>, has_disk: bool) -> Self {
        let (backing, state) = (Backing::Anonymous, State::Running);
        Self { leash, qmp, console, has_disk, may_have_superfluous: false, backing, state }
    }

    pub(super) fn set_backing(&mut self, backing: Backing) {
        self.backing = backing;
    }

    /// What a machine is that was adopted.
    pub(super) fn found(&mut self, backing: Backing, state: State) {
        (self.backing, self.state) = (backing, state);
        self.may_have_superfluous = true;
    }

    pub(super) fn facts(&self) -> watch::Receiver<Facts> {
        self.qmp.facts()
    }

    /// Waits until the guest's CPUs run. From then on its disk has this rate.
    pub(super) async fn booted(&mut self, disk_rate: DiskRate) -> VmmResult<()> {
        // It is answered from QEMU's main loop, which begins when the CPUs have been started.
        let begun = async {
            tokio::try_join!(
                self.qmp.execute("qmp_capabilities", Value::Null, START_BOUND),
                block::set_rate(&self.qmp, disk_rate),
            )
        };
        let answer = begun.await;
        self.leash.explain("boot", answer).await.map(drop)
    }

    /// Gives a machine that was started for it the saved state, and its disk this rate, and waits until it has both.
    pub(super) async fn load(
        &mut self,
        state: File,
        pages: Option<SavedPages>,
        disk_rate: DiskRate,
    ) -> VmmResult<()> {
        self.state = State::Paused;
        let qmp = &self.qmp;
        let agree = async {
            tokio::try_join!(
                qmp.execute("qmp_capabilities", Value::Null, START_BOUND),
                qmp.execute("migrate-set-capabilities", migration_capabilities(), START_BOUND),
                // A guest that wakes up would otherwise be made to tell its address to a network that knows it.
                qmp.execute("migrate-set-parameters", json!({"announce-rounds": 0}), START_BOUND),
                block::set_rate(qmp, disk_rate),
            )
        };
        let load = async {
            tokio::try_join!(
                qmp.execute_with("getfd", json!({"fdname": STATE}), OwnedFd::from(state), START_BOUND),
                qmp.execute("migrate-incoming", json!({"uri": format!("fd:{STATE}")}), START_BOUND),
            )
        };
        let told = match pages {
            // All at once: QEMU takes them in order, and none of them depends on what another answers.
            None => async { tokio::try_join!(agree, load).map(drop) }.await,
            Some(pages) => match agree.await {
                Ok(_) => {
                    // It answers, so its memory is mapped. The devices look into it while they are loaded.
                    self.write_pages(pages).await?;
                    load.await.map(drop)
                }
                Err(error) => Err(error),
            },
        };
        self.leash.explain("restore", told).await?;
        self.migrated("restore").await
    }

    async fn write_pages(&self, pages: SavedPages) -> VmmResult<()> {
        let Backing::Private(base) = self.backing.clone() else { return Ok(()) };
        let process = self.leash.process().clone();
        let write =
            move |given_up: &AtomicBool| GuestMemory::of(&process, &base, "restore")?.load(&pages, given_up);
        self.leash.with_memory("restore", write).await
    }

    /// Saves a machine whose memory is private, over `base`, however it began. It goes on as if nothing had happened.
    async fn save_private(&self, base: &Utf8Path, into: &SnapshotFiles) -> VmmResult<SnapshotStatistics> {
        let pages = validate::snapshot_over(base, into, SNAPSHOT)?;
        let (process, base) = (self.leash.process().clone(), base.to_owned());
        let open = move |_: &AtomicBool| GuestMemory::of(&process, &base, SNAPSHOT);
        let memory = self.leash.with_memory(SNAPSHOT, open).await?;
        // It may see none of the host's files, and would make this one readable for others.
        let (handed, written) = unnamed_beside(&into.state)?;
        let set = self.hand_over(SNAPSHOT, vec![(STATE.to_owned(), handed.into())]).await?;
        let devices = json!({"filename": name_of_set(set), "live": false});
        let saved = self.qmp.execute("xen-save-devices-state", devices, MIGRATION_BOUND).await;
        // Where it is gone, so is what it was handed.
        drop(self.take_back(SNAPSHOT, set).await);
        if let Err(error) = self.leash.explain(SNAPSHOT, saved).await {
            return Err(no_room_for(&into.state).unwrap_or(error));
        }
        let state = into.state.clone();
        let save = move |given_up: &AtomicBool| {
            keep_state(&written, &state)?;
            memory.save(&pages, given_up)
        };
        self.leash.with_memory(SNAPSHOT, save).await
    }

    /// Saves the devices of a machine whose memory is in its file already.
    async fn save_shared(&self, into: &SnapshotFiles) -> VmmResult<()> {
        validate::snapshot_files(into, false)?;
        let state = create_private(&into.state)?;
        self.qmp.forget_migration();
        self.command(SNAPSHOT, "migrate-set-capabilities", migration_capabilities()).await?;
        self.command_with(SNAPSHOT, "getfd", json!({"fdname": STATE}), OwnedFd::from(state)).await?;
        self.command(SNAPSHOT, "migrate", json!({"uri": format!("fd:{STATE}")})).await?;
        self.migrated(SNAPSHOT).await
    }

    /// Fails unless something may be done with its disk now.
    fn may_change_disk(&self, operation: &'static str) -> VmmResult<()> {
        self.leash.alive(operation)?;
        self.state.may_change_disk(operation, self.has_disk.then_some(()))
    }

    /// Waits until the migration that is under way has come to its end.
    async fn migrated(&self, operation: &'static str) -> VmmResult<()> {
        let mut facts = self.qmp.facts();
        let ended = facts.wait_for(|facts| {
            facts.disconnected || matches!(facts.migration, Some(Migration::Completed | Migration::Failed))
        });
        let migration = match timeout(MIGRATION_BOUND, ended).await {
            Ok(facts) => facts.ok().and_then(|facts| facts.migration),
            Err(_) => return Err(VmmError::Timeout { operation, bound: MIGRATION_BOUND }),
        };
        if migration == Some(Migration::Completed) {
            return Ok(());
        }
        // A machine that cannot load its state ends, and says why. One that could not save it lives on.
        let asked = self.qmp.execute("query-migrate", Value::Null, COMMAND_BOUND).await;
        let answer = self.leash.explain(operation, asked).await?;
        let message = answer["error-desc"].as_str().unwrap_or("without a reason").to_owned();
        Err(VmmError::Refused { command: "migrate".to_owned(), message })
    }

    pub(super) async fn command(
        &self,
        operation: &'static str,
        command: &'static str,
        arguments: Value,
    ) -> VmmResult<Value> {
        let answer = self.qmp.execute(command, arguments, COMMAND_BOUND).await;
        self.leash.explain(operation, answer).await
    }

    /// The same with an open file that goes with it.
    pub(super) async fn command_with(
        &self,
        operation: &'static str,
        command: &'static str,
        arguments: Value,
        file: OwnedFd,
    ) -> VmmResult<Value> {
        let answer = self.qmp.execute_with(command, arguments, file, COMMAND_BOUND).await;
        self.leash.explain(operation, answer).await
    }
}

/// What has to be agreed before a state is saved or loaded: memory that is a shared file stays out of it, and
/// its end is told by an event.
fn migration_capabilities() -> Value {
    let on = |capability| json!({"capability": capability, "state": true});
    json!({"capabilities": [on("x-ignore-shared"), on("events")]})
}

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
            self.command("pause", "stop", Value::Null).await?;
            self.state = State::Paused;
        }
        Ok(())
    }

    async fn resume(&mut self) -> VmmResult<()> {
        self.leash.alive("resume")?;
        match &self.state {
            State::Running => Ok(()),
            State::Paused | State::Stopping => {
                self.command("resume", "cont", Value::Null).await?;
                self.state = State::Running;
                if std::mem::take(&mut self.may_have_superfluous) {
                    self.close_superfluous("resume").await?;
                }
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
        self.may_have_superfluous = true;
        match &self.backing {
            Backing::Private(base) => self.save_private(base, into).await,
            Backing::Shared(file) if *file == into.memory => {
                self.save_shared(into).await?;
                self.state = State::Saved(into.clone());
                Ok(SnapshotStatistics::default())
            }
            Backing::Shared(_) | Backing::Anonymous => Err(other_memory(SNAPSHOT)),
        }
    }

    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        self.may_change_disk("resize_disk")?;
        self.resize(bytes).await
    }

    async fn pivot_disk(&mut self, overlay: &DiskSpec) -> VmmResult<()> {
        self.may_change_disk("pivot_disk")?;
        self.may_have_superfluous |= self.state != State::Running;
        self.pivot(overlay).await
    }

    async fn disk_chain(&mut self) -> VmmResult<Vec<Utf8PathBuf>> {
        self.leash.alive("disk_chain")?;
        if self.has_disk { self.chain().await } else { Ok(Vec::new()) }
    }

    async fn stream_disk(&mut self, base: &Utf8Path) -> VmmResult<()> {
        self.may_change_disk("stream_disk")?;
        self.may_have_superfluous |= self.state != State::Running;
        self.stream(base).await
    }

    async fn console(&mut self) -> String {
        self.console.read().await
    }

    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.leash.exit()
    }

    async fn stop(&mut self) -> VmmResult<ExitReason> {
        if let Some(reason) = self.leash.reason() {
            return Ok(reason);
        }
        self.leash.wish_end();
        let quit = async {
            // The answer may be lost with the process; its end is what counts.
            drop(self.qmp.execute("quit", Value::Null, QUIT_BOUND).await);
            self.leash.gone_within(QUIT_BOUND).await
        };
        match timeout(QUIT_BOUND, quit).await {
            Ok(Some(reason)) => Ok(reason),
            _ => self.leash.kill().await,
        }
    }

    async fn release(mut self: Box<Self>) {
        self.leash.let_go();
        self.qmp.close();
    }
}

/// A file in the same directory, without a name: to be written, and to be read.
fn unnamed_beside(path: &Utf8Path) -> VmmResult<(File, File)> {
    let name = Utf8PathBuf::from(format!("{path}.written"));
    let written = create_private(&name)?;
    let read = File::open(&name).map_err(cannot("open", &name))?;
    remove_stale(&name)?;
    Ok((written, read))
}

/// Why a file could not be written, if there is no room for it: QEMU says no more than that it could not.
fn no_room_for(path: &Utf8Path) -> Option<VmmError> {
    const STATE_BYTES: usize = 64 << 10;
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(&[0; STATE_BYTES])?;
        file.sync_data()
    };
    let source = write().err()?;
    let is_full = matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    is_full.then(|| VmmError::File { operation: "write", path: path.to_owned(), source })
}
