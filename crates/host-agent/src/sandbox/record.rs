//! The record of a sandbox on disk: written before anything is made for it, removed after everything is
//! gone. It holds what is needed to collect the sandbox when the agent did not live to do so.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use wrenn_types::{InstanceId, SandboxId};

/// The name of the file in the sandbox's directory.
const FILE: &str = "record.json";

/// What is on disk of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this format.
    pub format: u32,
    /// The sandbox.
    pub id: SandboxId,
    /// The control plane's generation of it.
    pub generation: u64,
    /// The stack that it belongs to.
    pub instance: InstanceId,
}

/// A record could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("could not {operation} {path}")]
pub struct RecordError {
    operation: &'static str,
    path: Utf8PathBuf,
    #[source]
    source: io::Error,
}

impl RecordError {
    /// Whether the disk was full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

fn failed(operation: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError { operation, path, source }
}

/// The directory of one sandbox, named by its id and readable by its owner only. Its record is in it.
#[derive(Debug)]
pub struct SandboxDir {
    path: Utf8PathBuf,
}

impl SandboxDir {
    /// Makes the directory below `parent` and writes the record, durably.
    ///
    /// # Errors
    /// The step that failed; nothing is left then.
    pub fn create(parent: &Utf8Path, record: &Record) -> Result<Self, RecordError> {
        let path = parent.join(record.id.as_str());
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed("make", &path))?;
        let dir = Self { path };
        if let Err(error) = dir.write(record) {
            // The first error is the one to tell; what is left is collected at the next start.
            let _ = fs::remove_dir_all(&dir.path);
            return Err(error);
        }
        Ok(dir)
    }

    fn write(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path.join(FILE);
        let text = serde_json::to_vec(record).map_err(io::Error::other).map_err(failed("write", &path))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("make", &path))?;
        file.write_all(&text).map_err(failed("write", &path))?;
        // Without this a power cut could leave a machine's files with no record of them. Processes do not
        // survive one, so the directory's own entry may follow later.
        file.sync_data().map_err(failed("sync", &path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Removes it and all that is in it.
    ///
    /// # Errors
    /// Why something is still there.
    pub fn remove(self) -> Result<(), RecordError> {
        fs::remove_dir_all(&self.path).map_err(failed("remove", &self.path))
    }
}

/// What was found of a sandbox at the start of an agent.
#[derive(Debug)]
pub struct Left {
    /// Its directory.
    pub dir: SandboxDir,
    /// Its record, unless it was not yet whole.
    pub record: Option<Record>,
}

/// The directories of sandboxes below `parent`. A name that is no id is none of ours and is left alone.
///
/// # Errors
/// When the directory cannot be read.
pub fn left_behind(parent: &Utf8Path) -> Result<Vec<Left>, RecordError> {
    let mut found = Vec::new();
    for entry in parent.read_dir_utf8().map_err(failed("read", parent))? {
        let entry = entry.map_err(failed("read", parent))?;
        if entry.file_name().parse::<SandboxId>().is_err() {
            continue;
        }
        let record =
            File::open(entry.path().join(FILE)).ok().and_then(|file| serde_json::from_reader(file).ok());
        found.push(Left { dir: SandboxDir { path: entry.path().to_owned() }, record });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record { format: 1, id: SandboxId::random(), generation: 3, instance: InstanceId::random() }
    }

    #[test]
    fn what_is_written_is_found_and_goes() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let record = record();
        let dir = SandboxDir::create(parent, &record).unwrap();
        fs::create_dir(parent.join("something else")).unwrap();
        let left = left_behind(parent).unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].record.as_ref(), Some(&record));
        dir.remove().unwrap();
        assert!(left_behind(parent).unwrap().is_empty());
    }

    #[test]
    fn a_second_sandbox_of_the_same_id_is_refused_and_harms_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let record = record();
        let _dir = SandboxDir::create(parent, &record).unwrap();
        assert!(SandboxDir::create(parent, &record).is_err());
        assert_eq!(left_behind(parent).unwrap()[0].record.as_ref(), Some(&record));
    }

    #[test]
    fn a_half_written_record_is_still_found() {
        let parent = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(parent.path()).unwrap();
        let dir = SandboxDir::create(parent, &record()).unwrap();
        fs::write(dir.path().join(FILE), b"{\"format\":").unwrap();
        let left = left_behind(parent).unwrap();
        assert_eq!((left.len(), left[0].record.is_none()), (1, true));
    }
}
