//! Files of a sandbox. Each operation is in the audit log with its paths, never with contents.

use std::sync::Arc;

use serde_json::json;
use wrenn_api::FileEntry;
use wrenn_types::SandboxId;

use super::{Caller, Core, CoreError, spec};
use crate::guest::{self, Download, Guest};

/// How many levels of a tree can be listed at once.
const DEPTH: std::ops::RangeInclusive<i64> = 0..=64;

/// A place in a sandbox, and as whom.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) user: Option<String>,
}

impl Place {
    pub(crate) fn new(path: String, user: Option<String>) -> Result<Self, CoreError> {
        spec::check_path("path", &path)?;
        spec::check_user(user.as_deref())?;
        Ok(Self { path, user })
    }

    fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }
}

impl Core {
    async fn file_operation<T, F>(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        action: &'static str,
        paths: serde_json::Value,
        operation: impl Fn(Guest) -> F,
    ) -> Result<T, CoreError>
    where
        F: Future<Output = Result<T, guest::GuestError>>,
    {
        let work = async {
            let (_, done) = self.ask_guest(caller, id, operation).await?;
            Ok(done)
        };
        let done = self.audited(caller, id, action, paths, work).await?;
        self.recorder.sandbox_used(id, jiff::Timestamp::now());
        Ok(done)
    }

    pub(crate) async fn read_file(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
    ) -> Result<Download, CoreError> {
        let paths = json!({ "path": place.path });
        self.file_operation(caller, id, "file_read", paths, |guest| async move {
            guest.download(&place.path, place.user()).await
        })
        .await
    }

    pub(crate) async fn write_file(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
        body: connectrpc::client::ClientBody,
    ) -> Result<(), CoreError> {
        let paths = json!({ "path": place.path });
        let work = async {
            let guest = self.guest(caller, id).await?;
            match guest.upload(&place.path, place.user(), body).await {
                Ok(()) => Ok(()),
                Err(error) => Err(self.explain(caller, id, error).await),
            }
        };
        self.audited(caller, id, "file_write", paths, work).await?;
        self.recorder.sandbox_used(id, jiff::Timestamp::now());
        Ok(())
    }

    pub(crate) async fn stat(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
    ) -> Result<FileEntry, CoreError> {
        let paths = json!({ "path": place.path });
        self.file_operation(caller, id, "file_stat", paths, |guest| async move {
            guest.stat(&place.path, place.user()).await
        })
        .await
    }

    pub(crate) async fn list_files(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
        depth: i64,
    ) -> Result<Vec<FileEntry>, CoreError> {
        let levels = u32::try_from(depth).ok().filter(|_| DEPTH.contains(&depth)).ok_or_else(|| {
            CoreError::Invalid(format!(
                "depth must be between {} and {}, not {depth}",
                DEPTH.start(),
                DEPTH.end()
            ))
        })?;
        let paths = json!({ "path": place.path, "depth": depth });
        self.file_operation(caller, id, "file_list", paths, |guest| async move {
            guest.list_dir(&place.path, levels.max(1), place.user()).await
        })
        .await
    }

    pub(crate) async fn make_dir(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
    ) -> Result<FileEntry, CoreError> {
        let paths = json!({ "path": place.path });
        self.file_operation(caller, id, "file_mkdir", paths, |guest| async move {
            guest.make_dir(&place.path, place.user()).await
        })
        .await
    }

    pub(crate) async fn move_file(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        source: &Place,
        destination: &str,
    ) -> Result<FileEntry, CoreError> {
        spec::check_path("destination", destination)?;
        let paths = json!({ "source": source.path, "destination": destination });
        self.file_operation(caller, id, "file_move", paths, |guest| async move {
            guest.move_entry(&source.path, destination, source.user()).await
        })
        .await
    }

    pub(crate) async fn remove_file(
        self: &Arc<Self>,
        caller: &Caller,
        id: &SandboxId,
        place: &Place,
    ) -> Result<(), CoreError> {
        let paths = json!({ "path": place.path });
        self.file_operation(caller, id, "file_remove", paths, |guest| async move {
            // To the guest's agent, what is not there is as good as removed; a caller is told.
            guest.stat(&place.path, place.user()).await?;
            guest.remove(&place.path, place.user()).await
        })
        .await
    }
}
