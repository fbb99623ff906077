//! Series on disk: one file for each sandbox, replaced as a whole. Used by the sampler alone, one file at a time.
//!
//! They are not made to outlive a power cut: a file that cannot be read is a sandbox without a past, and nothing worse.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use wrenn_types::SandboxId;

use super::series::Saved;

/// The format that this program writes and reads.
const FORMAT: u32 = 1;
/// More than any file of ours has; what is larger is none.
const LARGEST: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    #[serde(flatten)]
    saved: Saved,
}

/// The directory of the files.
#[derive(Debug)]
pub(super) struct Files {
    directory: Utf8PathBuf,
}

impl Files {
    pub(super) fn open(directory: &Utf8Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    fn path(&self, id: &SandboxId) -> Utf8PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// What was saved of a sandbox; nothing if there is no file that can be read.
    pub(super) fn read(&self, id: &SandboxId) -> Option<Saved> {
        let path = self.path(id);
        if fs::metadata(&path).ok()?.len() > LARGEST {
            return None;
        }
        let kept: Kept = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        (kept.format == FORMAT).then_some(kept.saved)
    }

    pub(super) fn write(&self, id: &SandboxId, saved: Saved) -> io::Result<()> {
        let path = self.path(id);
        let fresh = path.with_extension("new");
        let text = serde_json::to_vec(&Kept { format: FORMAT, saved }).map_err(io::Error::other)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&text)?;
        fs::rename(&fresh, &path)
    }

    pub(super) fn remove(&self, id: &SandboxId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes every file but those of some sandboxes.
    pub(super) fn keep_only(&self, is_known: impl Fn(&SandboxId) -> bool) -> io::Result<()> {
        for entry in self.directory.read_dir_utf8()? {
            let entry = entry?;
            let id = entry.file_name().strip_suffix(".json").and_then(|name| name.parse().ok());
            if !id.is_some_and(|id| is_known(&id)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::series::{Point, Values};

    fn saved() -> Saved {
        let values = Values { cpu_percent: 12.5, memory_kib: 7, disk_kib: 8, ..Values::default() };
        Saved { middle: vec![Point { at: 1_800_000_000_000, values }], coarse: Vec::new() }
    }

    #[test]
    fn what_is_written_is_read_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::open(&Utf8Path::from_path(directory.path()).unwrap().join("series")).unwrap();
        let (one, other) = (SandboxId::random(), SandboxId::random());
        assert_eq!(files.read(&one), None);
        files.write(&one, Saved::default()).unwrap();
        files.write(&one, saved()).unwrap();
        files.write(&other, saved()).unwrap();
        assert_eq!(files.read(&one), Some(saved()));
        files.keep_only(|id| *id == one).unwrap();
        assert_eq!((files.read(&one), files.read(&other)), (Some(saved()), None));
        files.remove(&one).unwrap();
        files.remove(&one).unwrap();
        assert_eq!(files.read(&one), None);
    }

    #[test]
    fn what_is_no_series_is_read_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::open(Utf8Path::from_path(directory.path()).unwrap()).unwrap();
        let id = SandboxId::random();
        let large = vec![b' '; usize::try_from(LARGEST).unwrap() + 1];
        for wrong in [&b""[..], b"{", br#"{"format":2,"middle":[],"coarse":[]}"#, br#"{"format":1}"#, &large]
        {
            fs::write(files.path(&id), wrong).unwrap();
            assert_eq!(files.read(&id), None);
        }
    }
}
