//! What a machine is made from: found and verified before anything is made.
//!
//! ```text
//!  template ─► warm snapshot, made if it is not there ─► held as a base ─┐
//!  snapshot ─► manifest, VMM and guest checked ─► its base ──────────────┼─► Source: start, bottom of the disk, token
//!  snapshot of a disk alone ─► manifest ─► the base of zeros beside its ─┘
//! ```

use std::{collections::BTreeMap, time::Duration};

use wrenn_types::{AccessToken, DiskMib, LayerId, ResourceError, SnapshotId, TemplateName};
use wrenn_vmm::{DiskSpec, SnapshotFiles};

use super::{
    bounds,
    bring_up::{BringUpError, Course, Outline},
    host::Host,
};
use crate::{
    images::ImagesError,
    snapshot_store::{SnapshotStoreError, WarmSnapshot},
    snapshots::{Base, Extent, Kept, KeptMemory, SnapshotsResult},
    warm::{WarmError, WarmRequest, blocking},
};

/// What to look for.
#[derive(Debug, Clone)]
pub enum From {
    /// A template, with the user and directory that the caller asked for instead of its own.
    Template {
        /// Its name or another name of it.
        name: TemplateName,
        /// Instead of its default user.
        user: Option<String>,
        /// Instead of its default directory.
        workdir: Option<String>,
    },
    /// A snapshot, which becomes another sandbox: its environment is added to.
    Snapshot {
        /// Its id.
        id: SnapshotId,
        /// Instead of its default user.
        user: Option<String>,
        /// Instead of its default directory.
        workdir: Option<String>,
    },
    /// The snapshot that this very sandbox was saved as, or is put back to.
    Itself(SnapshotId),
}

/// Why nothing can be made from it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The template is not there.
    #[error("the template cannot be used")]
    Template(#[source] ImagesError),
    /// The disk asked for is too small for it.
    #[error("the disk is too small for the template")]
    DiskTooSmall(#[source] ResourceError),
    /// The template's snapshot could not be made or used.
    #[error("the template's snapshot cannot be used")]
    Warm(#[source] WarmError),
    /// The snapshot cannot be used.
    #[error("the snapshot cannot be used")]
    Snapshot(#[source] SnapshotStoreError),
    /// There is no such snapshot here.
    #[error("there is no snapshot {0} on this host")]
    NoSuchSnapshot(SnapshotId),
    /// The snapshot stands on something that is gone.
    #[error("snapshot {0} stands on a template's memory that is not here")]
    NoBase(SnapshotId),
    /// It is what a sandbox was paused as without its memory.
    #[error("snapshot {0} is of a disk alone: only its own sandbox can be resumed from it")]
    DiskOnly(SnapshotId),
    /// It was taken of a guest that did not stand still.
    #[error(
        "snapshot {0} was taken of a guest that could not be made to stand still: only its own sandbox can be resumed from it"
    )]
    Unprepared(SnapshotId),
}

impl SourceError {
    /// Whether the host's disk is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Warm(error) => error.is_no_space(),
            Self::Snapshot(error) => error.is_no_space(),
            _ => false,
        }
    }
}

/// How a machine begins.
#[derive(Debug)]
pub(super) enum Start {
    /// Where it was saved: memory and devices.
    Restore(SnapshotFiles),
    /// From the kernel, with the memory of its base, which is one of zeros.
    Boot,
}

/// What a machine is made from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) base: Base,
    pub(super) start: Start,
    /// The size of the pages that it is restored with.
    pub(super) pages_bytes: u64,
    /// What the one that is to be made stands on, top first, where it stands on anything.
    pub(super) below: Vec<LayerId>,
    /// What that one stands on.
    pub(super) bottom: DiskSpec,
    /// The size of the disk as the saved guest knows it.
    pub(super) disk: DiskMib,
    /// The size that it is to have, where that is another.
    pub(super) grows: Option<DiskMib>,
    /// What the saved guest asks of the host; nothing of one that boots.
    pub(super) guest_token: Option<AccessToken>,
    pub(super) default_user: String,
    pub(super) default_workdir: String,
    pub(super) environment: BTreeMap<String, String>,
}

/// Keeps a template's snapshot as a base.
async fn hold(host: &Host, warm: &WarmSnapshot) -> SnapshotsResult<Base> {
    let (snapshots, held) = (host.snapshots.clone(), warm.clone());
    blocking(move || snapshots.hold(&held)).await
}

impl Source {
    /// What the disk that is to be made may stand on.
    pub(super) fn disk_bases(&self, host: &Host) -> Vec<DiskSpec> {
        let layers = self.below.iter().map(|layer| host.layer(layer));
        layers.chain([self.base.disk.clone()]).collect()
    }

    /// Finds it, and makes a template's snapshot if there is none yet.
    pub(super) async fn find(
        course: &mut Course,
        from: From,
        outline: &Outline,
    ) -> Result<Self, BringUpError> {
        match from {
            From::Template { name, user, workdir } => {
                let mut source = Self::of_template(course, &name, outline).await?;
                source.default_user = user.unwrap_or(source.default_user);
                source.default_workdir = workdir.unwrap_or(source.default_workdir);
                Ok(source)
            }
            From::Snapshot { id, user, workdir } => {
                let kept = Self::kept(course, &id, outline).await?;
                if kept.about.extent == Extent::Disk {
                    return Err(SourceError::DiskOnly(id).into());
                }
                if !kept.about.prepared {
                    return Err(SourceError::Unprepared(id).into());
                }
                let mut source = Self::of_snapshot(course, kept, outline.disk).await?;
                source.default_user = user.unwrap_or(source.default_user);
                source.default_workdir = workdir.unwrap_or(source.default_workdir);
                source.environment.extend(outline.environment.clone());
                Ok(source)
            }
            From::Itself(id) => {
                let kept = Self::kept(course, &id, outline).await?;
                Self::of_snapshot(course, kept, outline.disk).await
            }
        }
    }

    async fn of_template(
        course: &mut Course,
        name: &TemplateName,
        outline: &Outline,
    ) -> Result<Self, BringUpError> {
        let host = std::sync::Arc::clone(&course.host);
        let template = host.images.resolve(name).map_err(SourceError::Template)?;
        let request = WarmRequest::for_disk(&template, outline.shape, outline.disk, host.default_disk)
            .map_err(SourceError::DiskTooSmall)?;
        let (warm, base) = course
            .step("snapshot", bounds::build(outline.shape.memory), async {
                let mut warm = host.warm.get(&request).await.map_err(SourceError::Warm)?;
                let mut base = hold(&host, &warm).await;
                // Where the base is a copy, the snapshot may be whole and what is kept of it damaged. One that is made
                // anew is another base, beside the one that machines run on.
                if let Err(error) = &base
                    && error.is_unusable()
                {
                    tracing::warn!(
                        error = error as &dyn std::error::Error,
                        "a template's base cannot be used; its snapshot is made anew"
                    );
                    let anew = host.warm.replace(&request, warm).await;
                    warm = anew.map_err(SourceError::Warm)?;
                    base = hold(&host, &warm).await;
                }
                Ok((warm, base.map_err(SourceError::Snapshot)?))
            })
            .await?;
        Ok(Self {
            start: Start::Restore(SnapshotFiles {
                memory: base.memory.clone(),
                state: warm.files.state,
                pages: None,
            }),
            pages_bytes: 0,
            below: Vec::new(),
            bottom: base.disk.clone(),
            disk: request.disk,
            grows: (outline.disk > request.disk).then_some(outline.disk),
            guest_token: None,
            default_user: template.default_user.as_str().to_owned(),
            default_workdir: template.default_workdir.as_str().to_owned(),
            environment: outline.environment.clone(),
            base,
        })
    }

    async fn kept(course: &mut Course, id: &SnapshotId, outline: &Outline) -> Result<Kept, BringUpError> {
        let (snapshots, wanted) = (course.host.snapshots.clone(), id.clone());
        let kept = course
            .step("snapshot", bounds::find(outline.shape.memory), async move {
                blocking(move || snapshots.get(&wanted))
                    .await
                    .map_err(|error| SourceError::Snapshot(error).into())
            })
            .await?;
        let kept = kept.ok_or_else(|| SourceError::NoSuchSnapshot(id.clone()))?;
        let host = &course.host;
        kept.check(host.vmm.identity(), &host.images.guest().bundle.id).map_err(SourceError::Snapshot)?;
        Ok(kept)
    }

    async fn of_snapshot(course: &mut Course, kept: Kept, disk: DiskMib) -> Result<Self, BringUpError> {
        let host = std::sync::Arc::clone(&course.host);
        let (snapshots, key) = (host.snapshots.clone(), kept.about.base.clone());
        let bound = bounds::find(kept.about.shape.memory);
        let (base, start) = match kept.memory() {
            Some(KeptMemory { state, pages }) => {
                let base = found_base(course, bound, move || snapshots.base(&key)).await?;
                let base = base.ok_or_else(|| SourceError::NoBase(kept.id.clone()))?;
                let (memory, state) = (base.memory.clone(), state.to_owned());
                (base, Start::Restore(SnapshotFiles { memory, state, pages: Some(pages.to_owned()) }))
            }
            None => (found_base(course, bound, move || snapshots.hold_zeros(&key)).await?, Start::Boot),
        };
        let about = kept.about;
        let bottom = match about.layers.first() {
            Some(top) => DiskSpec { path: host.snapshots.layer_path(top), format: about.disk_format },
            None => base.disk.clone(),
        };
        Ok(Self {
            pages_bytes: kept.pages_bytes,
            below: about.layers,
            bottom,
            disk: about.disk,
            grows: (disk > about.disk).then_some(disk),
            // A guest that boots knows nobody yet.
            guest_token: matches!(start, Start::Restore(_)).then_some(about.access_token),
            start,
            default_user: about.default_user,
            default_workdir: about.default_workdir,
            environment: about.environment,
            base,
        })
    }
}

/// What a snapshot stands on, looked for on a thread that may wait for the disk.
async fn found_base<T: Send + 'static>(
    course: &mut Course,
    bound: Duration,
    look: impl FnOnce() -> SnapshotsResult<T> + Send + 'static,
) -> Result<T, BringUpError> {
    let look = async { blocking(look).await.map_err(|error| SourceError::Snapshot(error).into()) };
    course.step("base", bound, look).await
}
