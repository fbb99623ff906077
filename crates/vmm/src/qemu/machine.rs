//! One machine.

use std::{
    fs::{File, OpenOptions},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use camino::Utf8PathBuf;
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use super::{
    arguments::DISK,
    cannot,
    facts::Migration,
    monitor::{ConsoleTail, Leash, QUIT_BOUND},
    qmp::{COMMAND_BOUND, Qmp},
};
use crate::{ExitReason, SnapshotFiles, Vm, VmmError, VmmResult};

/// How long QEMU may take to start, on a machine that is busy with many others.
const START_BOUND: Duration = Duration::from_secs(20);
/// How long the devices' state may take to be loaded or saved.
const MIGRATION_BOUND: Duration = Duration::from_secs(60);
/// How long a process that lost its connection may take to be gone.
const DEATH_BOUND: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(10);

/// The name under which QEMU keeps a passed file.
const STATE: &str = "state";

/// A QEMU process and what it is doing.
#[derive(Debug)]
pub(super) struct Machine {
    leash: Leash,
    qmp: Arc<Qmp>,
    console: Arc<ConsoleTail>,
    exit: watch::Receiver<Option<ExitReason>>,
    has_disk: bool,
    /// The file that is this machine's memory.
    memory: Option<Utf8PathBuf>,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    /// Its memory is part of this snapshot, which must not change any more.
    Saved(SnapshotFiles),
}

impl State {
    fn word(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saved(_) => "saved",
        }
    }
}

impl Machine {
    pub(super) fn new(
        leash: Leash,
        qmp: Arc<Qmp>,
        console: Arc<ConsoleTail>,
        exit: watch::Receiver<Option<ExitReason>>,
        has_disk: bool,
    ) -> Self {
        Self { leash, qmp, console, exit, has_disk, memory: None, state: State::Running }
    }

    pub(super) fn set_memory(&mut self, file: Utf8PathBuf) {
        self.memory = Some(file);
    }

    /// Waits until the guest's CPUs run.
    pub(super) async fn booted(&mut self) -> VmmResult<()> {
        // It is answered from QEMU's main loop, which begins when the CPUs have been started.
        let answer = self.qmp.execute("qmp_capabilities", Value::Null, START_BOUND).await;
        self.explain("boot", answer).await.map(drop)
    }

    /// Gives a machine that was started for it the saved state, and waits until it has it.
    pub(super) async fn load(&mut self, state: File) -> VmmResult<()> {
        self.state = State::Paused;
        let qmp = &self.qmp;
        // All at once: QEMU takes them in order, and none of them depends on what another answers.
        let commands = async {
            tokio::try_join!(
                qmp.execute("qmp_capabilities", Value::Null, START_BOUND),
                qmp.execute("migrate-set-capabilities", migration_capabilities(), START_BOUND),
                // A guest that wakes up would otherwise be made to tell its address to a network that knows it.
                qmp.execute("migrate-set-parameters", json!({"announce-rounds": 0}), START_BOUND),
                qmp.execute_with("getfd", json!({"fdname": STATE}), OwnedFd::from(state), START_BOUND),
                qmp.execute("migrate-incoming", json!({"uri": format!("fd:{STATE}")}), START_BOUND),
            )
        };
        let told = commands.await;
        self.explain("restore", told).await?;
        self.migrated("restore").await
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
        let answer = self.explain(operation, asked).await?;
        let message = answer["error-desc"].as_str().unwrap_or("without a reason").to_owned();
        Err(VmmError::Refused { command: "migrate".to_owned(), message })
    }

    /// Turns a lost connection into what it means: that the process is gone, and why.
    async fn explain<T>(&self, operation: &'static str, result: VmmResult<T>) -> VmmResult<T> {
        match result {
            Err(error @ VmmError::Connection { .. }) => match self.gone_within(DEATH_BOUND).await {
                Some(reason) => Err(VmmError::Exited { operation, reason }),
                None => Err(error),
            },
            other => other,
        }
    }

    async fn gone_within(&self, bound: Duration) -> Option<ExitReason> {
        let mut exit = self.exit.clone();
        let gone = timeout(bound, exit.wait_for(Option::is_some)).await;
        gone.ok()?.ok()?.clone()
    }

    fn alive(&self, operation: &'static str) -> VmmResult<()> {
        match &*self.exit.borrow() {
            Some(reason) => Err(VmmError::Exited { operation, reason: reason.clone() }),
            None => Ok(()),
        }
    }

    async fn command(
        &self,
        operation: &'static str,
        command: &'static str,
        arguments: Value,
    ) -> VmmResult<Value> {
        let answer = self.qmp.execute(command, arguments, COMMAND_BOUND).await;
        self.explain(operation, answer).await
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
        Some(self.leash.process.pid())
    }

    async fn pause(&mut self) -> VmmResult<()> {
        self.alive("pause")?;
        if self.state == State::Running {
            self.command("pause", "stop", Value::Null).await?;
            self.state = State::Paused;
        }
        Ok(())
    }

    async fn resume(&mut self) -> VmmResult<()> {
        self.alive("resume")?;
        match &self.state {
            State::Running => Ok(()),
            State::Paused => {
                self.command("resume", "cont", Value::Null).await?;
                self.state = State::Running;
                Ok(())
            }
            State::Saved(_) => Err(VmmError::WrongState { operation: "resume", state: self.state.word() }),
        }
    }

    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<()> {
        const OPERATION: &str = "snapshot";
        self.alive(OPERATION)?;
        match &self.state {
            State::Paused => {}
            State::Saved(files) if files == into => return Ok(()),
            other => return Err(VmmError::WrongState { operation: OPERATION, state: other.word() }),
        }
        if self.memory.as_ref() != Some(&into.memory) {
            let problem = "it was not booted with its memory in the snapshot's file";
            return Err(VmmError::Unsupported { operation: OPERATION, problem });
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let state = options.open(&into.state).map_err(cannot("create", &into.state))?;
        self.qmp.forget_migration();
        self.command(OPERATION, "migrate-set-capabilities", migration_capabilities()).await?;
        let passed = json!({"fdname": STATE});
        let passed = self.qmp.execute_with("getfd", passed, OwnedFd::from(state), COMMAND_BOUND).await;
        self.explain(OPERATION, passed).await?;
        self.command(OPERATION, "migrate", json!({"uri": format!("fd:{STATE}")})).await?;
        self.migrated(OPERATION).await?;
        self.state = State::Saved(into.clone());
        Ok(())
    }

    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        const OPERATION: &str = "resize_disk";
        self.alive(OPERATION)?;
        let refuse = |problem: String| Err(VmmError::Spec { field: "disk", problem });
        if !self.has_disk {
            return refuse("the machine has none".to_owned());
        }
        if let State::Saved(_) = self.state {
            return Err(VmmError::WrongState { operation: OPERATION, state: self.state.word() });
        }
        let nodes = self.command(OPERATION, "query-named-block-nodes", json!({"flat": true})).await?;
        let disk = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == DISK);
        let present = disk.and_then(|node| node["image"]["virtual-size"].as_u64()).unwrap_or_default();
        if bytes < present {
            return refuse(format!("it has {present} bytes already, and {bytes} are fewer"));
        }
        if bytes > present {
            self.command(OPERATION, "block_resize", json!({"node-name": DISK, "size": bytes})).await?;
        }
        Ok(())
    }

    async fn console(&mut self) -> String {
        self.console.read().await
    }

    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.clone()
    }

    async fn stop(&mut self) -> VmmResult<ExitReason> {
        if let Some(reason) = self.exit.borrow().clone() {
            return Ok(reason);
        }
        self.leash.ending().wish();
        let quit = async {
            // The answer may be lost with the process; its end is what counts.
            drop(self.qmp.execute("quit", Value::Null, QUIT_BOUND).await);
            self.gone_within(QUIT_BOUND).await
        };
        if let Ok(Some(reason)) = timeout(QUIT_BOUND, quit).await {
            return Ok(reason);
        }
        let kill = self.leash.process.kill();
        match self.gone_within(KILL_BOUND).await {
            Some(reason) => Ok(reason),
            None => match kill {
                Ok(()) => Err(VmmError::Timeout { operation: "stop", bound: KILL_BOUND }),
                Err(source) => Err(VmmError::Connection { command: "kill".to_owned(), source }),
            },
        }
    }
}
