//! Disks that are plain files: the bytes themselves.

use std::fs::File;

use camino::Utf8Path;
use wrenn_types::DiskMib;
use wrenn_vmm::{DiskFormat, DiskSpec};

use super::{RootfsError, RootfsResult, RootfsStore, check_size, copy, freeze_file, resolve_base};

/// A disk shares the blocks of its base where the filesystem can (btrfs, xfs), and is a sparse copy of
/// it elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileStore;

impl RootfsStore for FileStore {
    fn format(&self) -> DiskFormat {
        DiskFormat::Raw
    }

    fn clone_disk(&self, base: &DiskSpec, disk: &Utf8Path, size: DiskMib) -> RootfsResult<DiskSpec> {
        if base.format != DiskFormat::Raw {
            return Err(RootfsError::Base {
                path: base.path.clone(),
                problem: "a plain file can only be made of a plain file",
            });
        }
        let path = resolve_base(&base.path)?;
        let source = File::open(&path).map_err(|error| RootfsError::file("open", &path, error))?;
        let length = source.metadata().map_err(|error| RootfsError::file("examine", &path, error))?.len();
        check_size(&path, length, size)?;
        let target = copy::Unfinished::create(disk)?;
        copy::copy_content(&source, target.file())
            .and_then(|_| target.file().set_len(size.bytes()))
            .map_err(|error| RootfsError::file("fill", disk, error))?;
        target.keep();
        Ok(DiskSpec { path: disk.to_owned(), format: DiskFormat::Raw })
    }

    fn freeze(&self, disk: &DiskSpec, layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        if disk.format != DiskFormat::Raw {
            return Err(RootfsError::Base { path: disk.path.clone(), problem: "it is not a plain file" });
        }
        freeze_file(&disk.path, layer)?;
        Ok(DiskSpec { path: layer.to_owned(), format: DiskFormat::Raw })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::conformance;

    #[test]
    fn conforms() {
        conformance::run(&FileStore);
    }
}
