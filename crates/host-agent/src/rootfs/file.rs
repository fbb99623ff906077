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

    /// Such a disk stands on nothing in any case.
    fn flatten(&self, disk: &DiskSpec, _: &[DiskSpec], layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        if disk.path == layer {
            return Err(RootfsError::Exists { path: layer.to_owned() });
        }
        self.freeze(disk, layer)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{StatVfs, statvfs};
    use wrenn_vmm::DiskSpec;

    use super::*;
    use crate::rootfs::{
        conformance::{self, assert_pattern, image, size, tool, write},
        own_filesystem::{self, Kind},
    };

    const MIB: u64 = 1 << 20;

    #[test]
    fn conforms() {
        conformance::run(&FileStore);
    }

    /// Bytes in use on the filesystem of a directory, after all is on disk.
    fn used(at: &Utf8Path) -> u64 {
        let directory = File::open(at).unwrap();
        rustix::fs::syncfs(&directory).unwrap();
        let StatVfs { f_blocks, f_bfree, f_frsize, .. } = statvfs(at.as_str()).unwrap();
        (f_blocks - f_bfree) * f_frsize
    }

    /// How many extents of a file there are, and how many of them share their blocks with another file.
    fn extents(path: &Utf8Path) -> (usize, usize) {
        File::open(path).unwrap().sync_all().unwrap();
        let said = tool("filefrag", &["-v", path.as_str()]);
        // A line is `0: 0..  1023: 208..  1231: 1024: last,shared,eof`.
        let is_extent = |line: &&str| {
            line.split_once(':').is_some_and(|(number, _)| number.trim().parse::<u32>().is_ok())
        };
        let lines: Vec<_> = said.lines().filter(is_extent).collect();
        (lines.len(), lines.iter().filter(|line| line.contains("shared")).count())
    }

    /// An image with 32 MiB in the middle of its holes.
    fn large_image(at: &Utf8Path) -> DiskSpec {
        let base = image(at);
        write(&FileStore, &base, 100 * MIB, 32 * MIB, 7);
        base
    }

    #[test]
    fn a_clone_shares_the_blocks_of_its_base_where_the_filesystem_can() {
        let made = own_filesystem::with(Kind::Xfs { reflink: true }, 512 * MIB, |at| {
            conformance::run_in(&FileStore, at);
            let base = large_image(at);
            let (all, shared) = extents(&base.path);
            assert!(all > 0 && shared == 0, "{shared} of {all}");
            let before = used(at);
            let disk = FileStore.clone_disk(&base, &at.join("disk"), size(20 * 1024)).unwrap();
            let taken = used(at) - before;
            assert!(taken < MIB, "{taken} bytes for a clone of 32 MiB");
            for path in [&base.path, &disk.path] {
                let (all, shared) = extents(path);
                assert!(all > 0 && shared == all, "{shared} of {all} extents of {path} are shared");
            }
            // What is written is its own then, and nothing else.
            write(&FileStore, &disk, 110 * MIB, 4 * MIB, 8);
            let taken = used(at) - before;
            assert!((4 * MIB..6 * MIB).contains(&taken), "{taken} bytes for 4 MiB");
            let (all, shared) = extents(&disk.path);
            assert!(shared > 0 && shared < all, "{shared} of {all}");
            assert_pattern(&FileStore, &base, 100 * MIB, 32 * MIB, 7);
            assert_pattern(&FileStore, &disk, 110 * MIB, 4 * MIB, 8);
            // Frozen, it shares with its own clones, and with what its base still has of it.
            let layer = FileStore.freeze(&disk, &at.join("layer")).unwrap();
            let before = used(at);
            let second = FileStore.clone_disk(&layer, &at.join("second"), size(20 * 1024)).unwrap();
            assert!(used(at) - before < MIB);
            FileStore.remove(&layer.path).unwrap();
            FileStore.remove(&base.path).unwrap();
            assert_pattern(&FileStore, &second, 100 * MIB, 10 * MIB, 7);
            assert_pattern(&FileStore, &second, 110 * MIB, 4 * MIB, 8);
        });
        made.or_say_skipped("sharing blocks with a base on XFS");
    }

    #[test]
    fn a_clone_is_a_copy_without_holes_where_the_filesystem_cannot_share() {
        let made = own_filesystem::with(Kind::Xfs { reflink: false }, 512 * MIB, |at| {
            conformance::run_in(&FileStore, at);
            let base = large_image(at);
            let before = used(at);
            let disk = FileStore.clone_disk(&base, &at.join("disk"), size(20 * 1024)).unwrap();
            let taken = used(at) - before;
            assert!((32 * MIB..36 * MIB).contains(&taken), "{taken} bytes for a copy of 32 MiB in 600");
            for path in [&base.path, &disk.path] {
                let (all, shared) = extents(path);
                assert!(all > 0 && shared == 0, "{shared} of {all} extents of {path} are shared");
            }
            FileStore.remove(&base.path).unwrap();
            assert_pattern(&FileStore, &disk, 100 * MIB, 32 * MIB, 7);
        });
        made.or_say_skipped("copies without holes on XFS");
    }
}
