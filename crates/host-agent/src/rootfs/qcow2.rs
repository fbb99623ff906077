//! Disks that are empty qcow2 overlays: made by writing three blocks, without a process.

use std::{fs::File, os::unix::fs::FileExt};

use camino::Utf8Path;
use wrenn_types::DiskMib;
use wrenn_vmm::{DiskFormat, DiskSpec, qcow2};

use super::{
    RootfsError, RootfsResult, RootfsStore, check_size,
    copy::Unfinished,
    freeze_file,
    qcow2_header::{self, Overlay},
    resolve_base,
};

/// A disk is an overlay whose base is named, with its format, in the overlay's header.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qcow2Store;

impl RootfsStore for Qcow2Store {
    fn format(&self) -> DiskFormat {
        DiskFormat::Qcow2
    }

    fn clone_disk(&self, base: &DiskSpec, disk: &Utf8Path, size: DiskMib) -> RootfsResult<DiskSpec> {
        let path = resolve_base(&base.path)?;
        check_size(&path, virtual_bytes(&path, base.format)?, size)?;
        let overlay =
            Overlay { virtual_bytes: size.bytes(), backing_file: path.as_str(), backing_format: base.format };
        let image = qcow2_header::empty_overlay(&overlay)
            .map_err(|source| RootfsError::Header { path: disk.to_owned(), source })?;
        let target = Unfinished::create(disk)?;
        let written = target.file().set_len(image.length).and_then(|()| {
            image.pieces.iter().try_for_each(|piece| target.file().write_all_at(&piece.bytes, piece.offset))
        });
        written.map_err(|error| RootfsError::file("write", disk, error))?;
        target.keep();
        Ok(DiskSpec { path: disk.to_owned(), format: DiskFormat::Qcow2 })
    }

    fn freeze(&self, disk: &DiskSpec, layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        // A disk that its VMM did not close cleanly must not become the base of anything.
        virtual_bytes(&disk.path, disk.format)?;
        if disk.format != DiskFormat::Qcow2 {
            return Err(RootfsError::Base { path: disk.path.clone(), problem: "it is not a qcow2 file" });
        }
        freeze_file(&disk.path, layer)?;
        Ok(DiskSpec { path: layer.to_owned(), format: DiskFormat::Qcow2 })
    }
}

/// The size of a base as a guest sees it. The format is what we recorded, never a guess.
fn virtual_bytes(path: &Utf8Path, format: DiskFormat) -> RootfsResult<u64> {
    let file = File::open(path).map_err(|error| RootfsError::file("open", path, error))?;
    match format {
        DiskFormat::Raw => {
            file.metadata().map(|it| it.len()).map_err(|error| RootfsError::file("examine", path, error))
        }
        DiskFormat::Qcow2 => {
            let header = qcow2::start_of(&file).map_err(|error| RootfsError::file("read", path, error))?;
            qcow2_header::virtual_bytes(&header)
                .map_err(|source| RootfsError::Header { path: path.to_owned(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use camino::Utf8PathBuf;
    use serde_json::Value;

    use super::*;
    use crate::rootfs::conformance::{self, qemu_img};

    fn raw(path: Utf8PathBuf) -> DiskSpec {
        DiskSpec { path, format: DiskFormat::Raw }
    }

    #[test]
    fn conforms() {
        conformance::run(&Qcow2Store);
    }

    #[test]
    fn a_disk_of_any_size_is_made_of_three_blocks_and_qemu_agrees() {
        let (_guard, at) = conformance::directory();
        fs::write(at.join("base image"), vec![7_u8; 1 << 20]).unwrap();
        for size in [DiskMib::MINIMUM, 513, 20 * 1024, 999_999, DiskMib::MAXIMUM] {
            let path = at.join(format!("{size}.qcow2"));
            let size = DiskMib::new(i64::from(size)).unwrap();
            let disk = Qcow2Store.clone_disk(&raw(at.join("base image")), &path, size).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 4 << 16);
            assert!(metadata.blocks() * 512 <= 3 * 4096, "{} blocks", metadata.blocks());

            let checked: Value =
                serde_json::from_str(&qemu_img(&["check", "--output=json", disk.path.as_str()])).unwrap();
            assert_eq!(checked["check-errors"], 0, "{checked}");
            for fault in ["corruptions", "leaks"] {
                assert!(checked[fault].is_null(), "{checked}");
            }
            let info: Value =
                serde_json::from_str(&qemu_img(&["info", "--output=json", disk.path.as_str()])).unwrap();
            assert_eq!(info["format"], "qcow2");
            assert_eq!(info["virtual-size"], size.bytes());
            assert_eq!(info["cluster-size"], 65536);
            assert_eq!(info["backing-filename"], at.join("base image").as_str());
            assert_eq!(info["backing-filename-format"], "raw");
            assert_eq!(info["format-specific"]["data"]["corrupt"], false);
        }
    }

    #[test]
    fn qemu_itself_makes_the_same_overlay() {
        let (_guard, at) = conformance::directory();
        fs::write(at.join("base"), vec![7_u8; 1 << 20]).unwrap();
        Qcow2Store.clone_disk(&raw(at.join("base")), &at.join("ours"), DiskMib::default()).unwrap();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            at.join("base").as_str(),
            at.join("theirs").as_str(),
            "20G",
        ]);
        let info = |name: &str| {
            let mut info: Value =
                serde_json::from_str(&qemu_img(&["info", "--output=json", at.join(name).as_str()])).unwrap();
            for differs in ["filename", "actual-size"] {
                info.as_object_mut().unwrap().remove(differs);
            }
            info
        };
        assert_eq!(info("ours"), info("theirs"));
    }

    #[test]
    fn a_disk_that_was_not_closed_cleanly_is_not_frozen() {
        let (_guard, at) = conformance::directory();
        fs::write(at.join("base"), vec![7_u8; 1 << 20]).unwrap();
        let disk =
            Qcow2Store.clone_disk(&raw(at.join("base")), &at.join("disk"), DiskMib::default()).unwrap();
        // The lowest of the incompatible features: the reference counts may be stale.
        File::options().write(true).open(&disk.path).unwrap().write_all_at(&[1], 79).unwrap();
        let error = Qcow2Store.freeze(&disk, &at.join("layer")).unwrap_err();
        assert!(matches!(error, RootfsError::Header { .. }), "{error:?}");
        assert!(disk.path.exists() && !at.join("layer").exists());
    }

    #[test]
    fn a_layer_survives_that_its_image_is_replaced_through_the_link() {
        let (_guard, at) = conformance::directory();
        for (name, byte) in [("old", 1_u8), ("new", 2)] {
            fs::create_dir(at.join(name)).unwrap();
            fs::write(at.join(name).join("image"), vec![byte; 1 << 20]).unwrap();
        }
        std::os::unix::fs::symlink(at.join("old"), at.join("current")).unwrap();
        let disk = Qcow2Store
            .clone_disk(&raw(at.join("current/image")), &at.join("disk"), DiskMib::default())
            .unwrap();
        fs::remove_file(at.join("current")).unwrap();
        std::os::unix::fs::symlink(at.join("new"), at.join("current")).unwrap();
        conformance::assert_pattern(&disk, 0, 4096, 1);
    }
}
