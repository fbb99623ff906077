//! Fork: a snapshot without a name, children from it, and the snapshot goes. All children come up, or none is left.
//!
//! ```text
//! capture ─► up to 4 creates at once, until one fails ─► all there: told
//!                     │ one failed                            │
//!                     ▼                                       ▼
//!               those made are destroyed ───────────► the snapshot is discarded
//! ```

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::{StreamExt as _, future::BoxFuture, stream};
use serde_json::json;
use tokio::time::timeout;
use wrenn_api::{ForkRequest, Sandbox};
use wrenn_types::{DiskMib, InactivityTimeout, MemoryMib, SandboxId, TeamId, TimeoutAction, Vcpus};

use super::{
    Caller, Core, CoreError,
    lifecycle::{Audience, Created, Origin, malformed, public},
    snapshots::Capture,
    spec::{self, Spec},
};
use crate::{host::Source, store::SandboxRow};

/// How many children are made at once.
const AT_ONCE: usize = 4;
const COUNT: std::ops::RangeInclusive<i64> = 1..=20;

/// The children that are asked for. What is absent is as it is for the parent.
#[derive(Debug, Clone)]
pub(crate) struct Litter {
    count: usize,
    metadata: Option<BTreeMap<String, String>>,
    environment: BTreeMap<String, String>,
    timeout: Option<InactivityTimeout>,
    on_timeout: Option<TimeoutAction>,
    auto_resume: Option<bool>,
}

impl TryFrom<ForkRequest> for Litter {
    type Error = CoreError;

    fn try_from(asked: ForkRequest) -> Result<Self, CoreError> {
        let count = asked.count.unwrap_or(1);
        let bounded = usize::try_from(count).ok().filter(|_| COUNT.contains(&count)).ok_or_else(|| {
            CoreError::Invalid(format!(
                "count must be between {} and {}, not {count}",
                COUNT.start(),
                COUNT.end()
            ))
        })?;
        if let Some(metadata) = &asked.metadata {
            spec::check_metadata(metadata)?;
        }
        Ok(Self {
            count: bounded,
            metadata: asked.metadata,
            environment: spec::check_environment(asked.envs)?,
            timeout: asked.timeout_sec.map(InactivityTimeout::new).transpose()?,
            on_timeout: asked.on_timeout,
            auto_resume: asked.auto_resume,
        })
    }
}

/// What became of a fork.
#[derive(Debug)]
pub(crate) enum Forking {
    Done(Vec<Sandbox>),
    /// It goes on. These are the children that there are so far.
    UnderWay(Vec<Sandbox>),
}

/// What is shared between the making of a child and who waits for it.
#[derive(Debug, Default)]
struct Child {
    audience: Audience,
    written: OnceLock<SandboxRow>,
}

impl Core {
    /// Makes copies of a sandbox, or says that it goes on.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        litter: Litter,
    ) -> Result<Forking, CoreError> {
        let mut act = self.act(caller, id.as_str(), "fork", json!({ "count": litter.count }))?;
        let children: Arc<[Child]> = (0..litter.count).map(|_| Child::default()).collect();
        let mut task = {
            let (core, caller, id) = (Arc::clone(self), caller.clone(), id.clone());
            let children = Arc::clone(&children);
            self.tasks.spawn(async move {
                let outcome = Box::pin(core.make_children(caller.team, &id, litter, &children)).await;
                let made: Vec<&str> = children
                    .iter()
                    .filter_map(|child| child.written.get())
                    .map(|row| row.id.as_str())
                    .collect();
                act.note("children", json!(made));
                act.done(&outcome);
                outcome
            })
        };
        if let Ok(done) = timeout(self.bounds.lifecycle_answer, &mut task).await {
            return done.map_err(CoreError::Task)?.map(Forking::Done);
        }
        let mut so_far = Vec::new();
        for row in children.iter().filter_map(|child| child.written.get().filter(|_| child.audience.leave()))
        {
            let id = row.id.parse().map_err(malformed)?;
            so_far.push(public(&self.row(caller.team, &id).await?)?);
        }
        Ok(Forking::UnderWay(so_far))
    }

    async fn make_children(
        self: &Arc<Self>,
        team: TeamId,
        id: &SandboxId,
        litter: Litter,
        children: &[Child],
    ) -> Result<Vec<Sandbox>, CoreError> {
        let Capture { id: snapshot, parent, captured } = self.capture(team, id).await?;
        let made = match describe(&parent, litter, &snapshot, captured.disk_mib) {
            Ok((spec, origin)) => self.make_all(team, &spec, &origin, children).await,
            Err(error) => Err(error),
        };
        let core = Arc::clone(self);
        self.tasks.spawn(async move { core.discard(team, &snapshot).await });
        made
    }

    async fn make_all(
        self: &Arc<Self>,
        team: TeamId,
        spec: &Spec,
        origin: &Origin,
        children: &[Child],
    ) -> Result<Vec<Sandbox>, CoreError> {
        let failed = AtomicBool::new(false);
        let mut creates: Vec<BoxFuture<'_, Option<Result<Created, CoreError>>>> = Vec::new();
        for child in children {
            let failed = &failed;
            creates.push(Box::pin(async move {
                if failed.load(Ordering::Relaxed) {
                    return None;
                }
                let (spec, origin) = (spec.clone(), origin.clone());
                let made = self.bring_up(team, spec, origin, &child.audience, &child.written).await;
                failed.fetch_or(made.is_err(), Ordering::Relaxed);
                Some(made)
            }));
        }
        let outcomes: Vec<_> = stream::iter(creates).buffered(AT_ONCE).collect().await;

        let (mut made, mut error) = (Vec::new(), None);
        for outcome in outcomes.into_iter().flatten() {
            match outcome {
                Ok(created) => made.push(created.row),
                Err(failure) => error = error.or(Some(failure)),
            }
        }
        let Some(error) = error else { return made.iter().map(public).collect() };
        for row in &made {
            let child: SandboxId = row.id.parse().map_err(malformed)?;
            if let Err(error) = self.take_down(team, &child).await {
                // The row says `stopping`, or is found by the comparison: it goes later.
                tracing::warn!(%child, error = &error as &dyn std::error::Error, "child not destroyed yet");
            }
        }
        Err(CoreError::Fork(Box::new(error)))
    }
}

/// What the children of a sandbox are like, and what they are made from.
fn describe(
    parent: &SandboxRow,
    litter: Litter,
    snapshot: &wrenn_types::SnapshotId,
    disk_mib: u32,
) -> Result<(Spec, Origin), CoreError> {
    let (vcpus, memory) = (Vcpus::new(parent.vcpus.into())?, MemoryMib::new(parent.memory_mb.into())?);
    let disk = DiskMib::new(disk_mib.into()).ok();
    let mut settings = parent.settings();
    settings.timeout = litter.timeout.unwrap_or(settings.timeout);
    settings.on_timeout = litter.on_timeout.unwrap_or(settings.on_timeout);
    let spec = Spec {
        template: parent.template.parse().map_err(malformed)?,
        vcpus: Some(vcpus),
        memory: Some(memory),
        disk,
        metadata: litter.metadata.unwrap_or_else(|| parent.metadata.0.clone()),
        environment: litter.environment,
        settings,
        auto_resume: litter.auto_resume.unwrap_or(parent.auto_resume),
    };
    let origin = Origin {
        host: parent.host_id.parse().map_err(malformed)?,
        source: Source::Snapshot(snapshot.clone()),
        template: parent.template.clone(),
        vcpus,
        memory,
        disk,
    };
    Ok((spec, origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn litters_are_bounded() {
        assert_eq!(Litter::try_from(ForkRequest::default()).unwrap().count, 1);
        for count in [0, -1, 21, i64::MAX, i64::MIN] {
            let refused = Litter::try_from(ForkRequest { count: Some(count), ..ForkRequest::default() });
            assert!(refused.unwrap_err().to_string().starts_with("count must be between 1 and 20"));
        }
        let metadata = BTreeMap::from([("a b".to_owned(), String::new())]);
        assert!(
            Litter::try_from(ForkRequest { metadata: Some(metadata), ..ForkRequest::default() }).is_err()
        );
    }
}
