//! Snapshots: templates that a team makes of its sandboxes.
//!
//! ```text
//! sandbox `snapshotting` ─► snapshot `creating` ─► host saves ─► sandbox as it was ─► name, `ready`
//!                                                    │ fails                            │ in the same transaction
//!                                                    ▼                                  ▼
//!                                                `deleting` ◄──────── the one that had the name before
//! ```
//!
//! `deleting` is an order: whoever gives it tries to carry it out, and the sweep does so until its host has.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::time::timeout;
use wrenn_api::{Sandbox, SnapshotRequest, Template, TemplateKind};
use wrenn_types::{
    DiskMib, HostId, MemoryMib, SandboxId, SandboxState, SnapshotId, TeamId, TemplateName, Vcpus,
};

use super::{
    Caller, Core, CoreError,
    busy::Busy,
    lifecycle::{Origin, malformed, public},
    persist::wrong_state,
    spec::Spec,
};
use crate::{
    host::{Captured, Source},
    store::{Made, NewSnapshot, SandboxRow, SnapshotRow},
};

/// How often something is tried again when somebody was faster.
const ATTEMPTS: usize = 16;

/// A snapshot that is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    sandbox: SandboxId,
    name: Option<TemplateName>,
    overwrite: bool,
}

impl Order {
    /// The order of a request.
    pub(crate) fn new(asked: SnapshotRequest, overwrite: bool) -> Result<Self, CoreError> {
        let id = &asked.sandbox_id;
        let unknown = |_| CoreError::NoSuchSandbox(format!("{:?}", id.chars().take(40).collect::<String>()));
        let sandbox = id.parse().map_err(unknown)?;
        let name: Option<TemplateName> = asked
            .name
            .map(|name| name.parse().map_err(|error| CoreError::Invalid(format!("name: {error}"))))
            .transpose()?;
        // A name of this form would hide the snapshot that has it as its id.
        if name.as_ref().is_some_and(|name| name.as_str().parse::<SnapshotId>().is_ok()) {
            return Err(CoreError::Invalid("name: this is the form of an id".to_owned()));
        }
        Ok(Self { sandbox, name, overwrite })
    }
}

/// What became of a snapshot.
#[derive(Debug)]
pub(crate) enum Snapshotting {
    Done {
        template: Template,
        /// How long the sandbox stood still.
        stopped: Duration,
    },
    /// It goes on.
    UnderWay(Sandbox),
}

/// A snapshot that its host has made, and what it was made of.
#[derive(Debug)]
pub(super) struct Capture {
    pub(super) id: SnapshotId,
    pub(super) parent: SandboxRow,
    pub(super) captured: Captured,
}

impl Core {
    /// What a create is made from: a snapshot of the team, if one has that name, or a template of the host.
    pub(super) async fn origin(&self, team: TeamId, spec: &Spec) -> Result<Origin, CoreError> {
        let host = self.host_id().await?;
        // No snapshot has the name of a template, so most creates need no look.
        if !self.is_platform(spec.template.as_str())
            && let Some(row) = self.store.snapshot(team, spec.template.as_str()).await?
        {
            return origin_of(&row, spec, host);
        }
        Ok(Origin {
            host,
            source: Source::Template(spec.template.clone()),
            template: spec.template.to_string(),
            vcpus: spec.vcpus.unwrap_or_default(),
            memory: spec.memory.unwrap_or_default(),
            disk: spec.disk,
        })
    }

    /// Makes a snapshot, or says that it goes on.
    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        order: Order,
    ) -> Result<Snapshotting, CoreError> {
        let sandbox = order.sandbox.clone();
        let task = {
            let (core, caller) = (Arc::clone(self), caller.clone());
            self.tasks.spawn(async move {
                let details = json!({ "name": order.name, "overwrite": order.overwrite });
                let work = Box::pin(core.take_snapshot(caller.team, &order));
                core.audited(&caller, &order.sandbox, "snapshot", details, work).await
            })
        };
        match timeout(self.bounds.lifecycle_answer, task).await {
            Ok(done) => {
                let (template, stopped) = done.map_err(CoreError::Task)??;
                Ok(Snapshotting::Done { template, stopped })
            }
            Err(_) => Ok(Snapshotting::UnderWay(public(&self.row(caller.team, &sandbox).await?)?)),
        }
    }

    async fn take_snapshot(
        self: &Arc<Self>,
        team: TeamId,
        order: &Order,
    ) -> Result<(Template, Duration), CoreError> {
        if let Some(name) = &order.name {
            if self.is_platform(name.as_str()) {
                return Err(CoreError::NameReserved(name.clone()));
            }
            // What decides is the transaction at the end; this saves the work.
            if !order.overwrite && self.store.snapshot(team, name.as_str()).await?.is_some() {
                return Err(CoreError::NameTaken(name.clone()));
            }
        }
        let Capture { id, captured, .. } = self.capture(team, &order.sandbox).await?;
        let stopped = captured.stopped;
        let name = match &order.name {
            Some(name) => name.clone(),
            None => id.as_str().parse().map_err(malformed)?,
        };
        let store = self.store.with_bound(self.bounds.database_patient);
        for _ in 0..ATTEMPTS {
            match store.name_snapshot(team, &id, &name, captured, order.overwrite).await? {
                Made::Named { row, replaced } => {
                    if let Some(replaced) =
                        replaced.as_deref().map(str::parse).transpose().map_err(malformed)?
                    {
                        let core = Arc::clone(self);
                        self.tasks.spawn(async move { core.carry_out_deletion(&replaced).await });
                    }
                    return Ok((template(&row)?, stopped));
                }
                // Somebody else has just taken it, and it may be taken from them.
                Made::Taken if order.overwrite => {}
                Made::Taken => break,
                Made::Gone => return Err(CoreError::NoSuchSnapshot(id.to_string())),
            }
        }
        self.discard(team, &id).await;
        Err(CoreError::NameTaken(name))
    }

    /// Has a host make a snapshot of a sandbox, which goes on as it was. The snapshot has no name yet.
    pub(super) async fn capture(
        self: &Arc<Self>,
        team: TeamId,
        sandbox: &SandboxId,
    ) -> Result<Capture, CoreError> {
        for _ in 0..ATTEMPTS {
            let before = self.row(team, sandbox).await?;
            match before.state() {
                SandboxState::Running | SandboxState::Paused => {}
                // One after the other.
                SandboxState::Snapshotting => {
                    self.outlast(team, sandbox, SandboxState::Snapshotting).await?;
                    continue;
                }
                _ => return Err(wrong_state(sandbox, &before)),
            }
            let busy = Busy::begin(self, sandbox.clone());
            let intent = self.store.intend(&before, SandboxState::Snapshotting).await?;
            let Some(intent) = intent else { continue };
            let outcome = self.capture_intended(team, sandbox, before, &intent).await;
            drop(busy);
            self.moved.notify_waiters();
            return outcome;
        }
        Err(CoreError::TooMany("too many change this sandbox at once"))
    }

    async fn capture_intended(
        self: &Arc<Self>,
        team: TeamId,
        sandbox: &SandboxId,
        before: SandboxRow,
        intent: &SandboxRow,
    ) -> Result<Capture, CoreError> {
        let store = self.store.with_bound(self.bounds.database_patient);
        let (state, generation) = (before.state(), intent.generation);
        let id = match self.write_snapshot(&before).await {
            Ok(id) => id,
            Err(error) => {
                store.return_to(sandbox, generation, state).await?;
                return Err(error);
            }
        };
        match self.host.snapshot(sandbox, generation, &id, self.bounds.capture(before.size())).await {
            Ok(captured) => {
                tracing::debug!(%sandbox, snapshot = %id, stopped = ?captured.stopped, "took a snapshot");
                // Where the sandbox has been destroyed meanwhile, the snapshot is as good.
                store.return_to(sandbox, generation, state).await?;
                Ok(Capture { id, parent: before, captured })
            }
            Err(error) => {
                // It may have been made all the same.
                self.discard(team, &id).await;
                Err(self.explain_failure(sandbox, generation, error).await)
            }
        }
    }

    async fn write_snapshot(&self, sandbox: &SandboxRow) -> Result<SnapshotId, CoreError> {
        for _ in 0..ATTEMPTS {
            let id = SnapshotId::random();
            if self.store.insert_snapshot(&NewSnapshot { id: &id, sandbox }).await? {
                return Ok(id);
            }
        }
        Err(CoreError::TooMany("no free snapshot id was found"))
    }

    /// Deletes a snapshot that nobody is to see. What cannot be done now, the sweep does.
    pub(super) async fn discard(&self, team: TeamId, id: &SnapshotId) {
        let store = self.store.with_bound(self.bounds.database_patient);
        match store.doom_snapshot(team, id).await {
            Ok(_) => self.carry_out_deletion(id).await,
            Err(error) => tracing::warn!(
                snapshot = %id,
                error = &error as &dyn std::error::Error,
                "an unfinished snapshot is deleted later"
            ),
        }
    }

    /// Has a host delete what it was ordered to.
    async fn carry_out_deletion(&self, id: &SnapshotId) {
        let done = match self.host.delete_snapshot(id, self.bounds.destroy).await {
            Ok(()) => self.store.forget_snapshot(id).await.map_err(CoreError::from),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = done {
            tracing::info!(
                snapshot = %id,
                error = &error as &dyn std::error::Error,
                "a snapshot is deleted later"
            );
        }
    }

    /// The snapshot that a sandbox is to be put back to, if it fits.
    pub(crate) async fn snapshot_for(
        &self,
        caller: &Caller,
        id: &SandboxId,
        name: &str,
    ) -> Result<SnapshotId, CoreError> {
        let sandbox = self.row(caller.team, id).await?;
        let name: TemplateName =
            name.parse().map_err(|error| CoreError::Invalid(format!("snapshot: {error}")))?;
        let found = self.store.snapshot(caller.team, name.as_str()).await?;
        let snapshot = found.ok_or_else(|| CoreError::NoSuchSnapshot(name.to_string()))?;
        if (snapshot.vcpus, snapshot.memory_mb) != (sandbox.vcpus, sandbox.memory_mb) {
            return Err(CoreError::Invalid(format!(
                "snapshot: {name} has {} vcpus and {} MiB of memory, and the sandbox has {} and {}",
                snapshot.vcpus, snapshot.memory_mb, sandbox.vcpus, sandbox.memory_mb
            )));
        }
        if snapshot.host_id != sandbox.host_id {
            return Err(CoreError::NoHost);
        }
        snapshot.id.parse().map_err(malformed)
    }

    /// What sandboxes can start from: the templates of the host, each by all of its names, and the team's snapshots.
    pub(crate) async fn templates(
        &self,
        caller: &Caller,
        kind: Option<TemplateKind>,
    ) -> Result<Vec<Template>, CoreError> {
        let mut listed = Vec::new();
        if kind != Some(TemplateKind::Snapshot) {
            listed.extend(self.platform_templates().await?);
        }
        if kind != Some(TemplateKind::Base) {
            for row in self.store.snapshots(caller.team).await? {
                listed.push(template(&row)?);
            }
        }
        Ok(listed)
    }

    /// One of them, by its name.
    pub(crate) async fn template(&self, caller: &Caller, name: &TemplateName) -> Result<Template, CoreError> {
        if let Some(row) = self.store.snapshot(caller.team, name.as_str()).await? {
            return template(&row);
        }
        let found = self.platform_templates().await?.into_iter().find(|found| found.name == name.as_str());
        found.ok_or_else(|| CoreError::NoSuchSnapshot(name.to_string()))
    }

    /// Deletes a snapshot of a team. Its name is gone when this answers; its host may take longer.
    pub(crate) async fn delete_snapshot(
        self: &Arc<Self>,
        caller: &Caller,
        name: &TemplateName,
    ) -> Result<(), CoreError> {
        let Some(row) = self.store.snapshot(caller.team, name.as_str()).await? else {
            return Err(if self.is_platform(name.as_str()) {
                CoreError::Platform(name.to_string())
            } else {
                CoreError::NoSuchSnapshot(name.to_string())
            });
        };
        let id: SnapshotId = row.id.parse().map_err(malformed)?;
        let act = self.act(caller, id.as_str(), "snapshot_delete", json!({ "name": name }))?;
        let doomed = self.store.doom_snapshot(caller.team, &id).await.map_err(CoreError::from);
        act.done(&doomed);
        doomed?;
        let core = Arc::clone(self);
        let task = self.tasks.spawn(async move { core.carry_out_deletion(&id).await });
        // The order stands already: how long the host takes is nobody's business.
        let _ = timeout(self.bounds.host, task).await;
        Ok(())
    }

    /// The templates of the host. Their names are remembered: no snapshot may have one of them.
    pub(super) async fn platform_templates(&self) -> Result<Vec<Template>, CoreError> {
        let mut listed = Vec::new();
        for template in self.host.templates().await? {
            let main = Template {
                name: template.name,
                kind: TemplateKind::Base,
                id: None,
                sandbox_id: None,
                template: None,
                vcpus: None,
                memory_mb: None,
                has_memory: None,
                alias_of: None,
                default_user: Some(template.default_user),
                default_workdir: Some(template.default_workdir),
                size_bytes: Some(template.size_bytes),
                minimum_disk_mb: Some(template.minimum_disk_mib),
                created_at: None,
                platform: true,
            };
            for alias in template.aliases {
                // An alias may have a default user of its own, which the host does not tell.
                listed.push(Template {
                    name: alias,
                    alias_of: Some(main.name.clone()),
                    default_user: None,
                    default_workdir: None,
                    ..main.clone()
                });
            }
            listed.push(main);
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let names = listed.iter().map(|template| template.name.clone()).collect();
        *self.platform.write().unwrap_or_else(std::sync::PoisonError::into_inner) = names;
        Ok(listed)
    }

    /// Carries out the orders that nobody has carried out: deletions, snapshots whose maker has gone, and settings
    /// that a host has not been told.
    pub(super) async fn sweep(self: Arc<Self>, host: HostId) {
        if let Err(error) = self.try_sweep(&host).await {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "orders to the host are carried out later"
            );
        }
    }

    async fn try_sweep(&self, host: &HostId) -> Result<(), CoreError> {
        let store = self.store.with_bound(self.bounds.database_patient);
        // That long a fork can be at it, whichever control plane does it.
        let making = SignedDuration::try_from(self.bounds.making()).unwrap_or(SignedDuration::MAX);
        let before = Timestamp::now().checked_sub(making).unwrap_or(Timestamp::MIN);
        store.doom_unfinished(host, before).await?;
        for id in store.doomed_snapshots(host).await? {
            if let Ok(id) = id.parse() {
                self.carry_out_deletion(&id).await;
            }
        }
        for row in store.settings_pending(host).await? {
            let is_busy = row.id.parse().is_ok_and(|id| self.busy.contains(&id));
            if !is_busy {
                self.apply_settings(&row).await?;
            }
        }
        Ok(())
    }
}

fn number(column: i32) -> Result<u32, CoreError> {
    u32::try_from(column).map_err(malformed)
}

/// What is made from a snapshot has its shape, and a disk that is no smaller.
fn origin_of(row: &SnapshotRow, spec: &Spec, host: HostId) -> Result<Origin, CoreError> {
    if row.host_id != host.as_str() {
        return Err(CoreError::NoHost);
    }
    let vcpus = Vcpus::new(row.vcpus.into())?;
    let memory = MemoryMib::new(row.memory_mb.into())?;
    let shown = &spec.template;
    if spec.vcpus.is_some_and(|asked| asked != vcpus) {
        let message =
            format!("vcpus: the snapshot {shown} has {}, and so has what is made from it", vcpus.get());
        return Err(CoreError::Invalid(message));
    }
    if spec.memory.is_some_and(|asked| asked != memory) {
        let message =
            format!("memory_mb: the snapshot {shown} has {}, and so has what is made from it", memory.get());
        return Err(CoreError::Invalid(message));
    }
    let smallest = number(row.disk_size_mb)?;
    if spec.disk.is_some_and(|asked| asked.get() < smallest) {
        return Err(CoreError::Invalid(format!(
            "disk_size_mb: the disk of the snapshot {shown} has {smallest}"
        )));
    }
    Ok(Origin {
        host,
        source: Source::Snapshot(row.id.parse().map_err(malformed)?),
        template: spec.template.to_string(),
        vcpus,
        memory,
        disk: match spec.disk {
            Some(disk) => Some(disk),
            None => DiskMib::new(smallest.into()).ok(),
        },
    })
}

/// A snapshot as its owner sees it.
fn template(row: &SnapshotRow) -> Result<Template, CoreError> {
    Ok(Template {
        name: row.name.clone().unwrap_or_else(|| row.id.clone()),
        kind: TemplateKind::Snapshot,
        id: Some(row.id.parse().map_err(malformed)?),
        sandbox_id: Some(row.sandbox_id.parse().map_err(malformed)?),
        template: Some(row.template.clone()),
        vcpus: Some(number(row.vcpus)?),
        memory_mb: Some(number(row.memory_mb)?),
        has_memory: Some(row.has_memory),
        alias_of: None,
        default_user: None,
        default_workdir: None,
        size_bytes: Some(u64::try_from(row.size_bytes).map_err(malformed)?),
        minimum_disk_mb: Some(number(row.disk_size_mb)?),
        created_at: Some(row.created_at.to_jiff()),
        platform: false,
    })
}
