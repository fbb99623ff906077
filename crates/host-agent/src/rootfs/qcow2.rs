//! Disks that are empty qcow2 overlays: made by writing three blocks, without a process.

use std::{fs::File, os::unix::fs::FileExt};

use camino::Utf8Path;
use wrenn_types::DiskMib;
use wrenn_vmm::{DiskFormat, DiskSpec, qcow2};

use super::{
    RootfsError, RootfsResult, RootfsStore, check_size,
    copy::Unfinished,
    flatten, freeze_file,
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

    fn flatten(&self, disk: &DiskSpec, bases: &[DiskSpec], layer: &Utf8Path) -> RootfsResult<DiskSpec> {
        if disk.format != DiskFormat::Qcow2 {
            return Err(RootfsError::Base { path: disk.path.clone(), problem: "it is not a qcow2 file" });
        }
        let target = Unfinished::create(layer)?;
        flatten::flatten(&disk.path, bases, target.file(), layer)?;
        freeze_file(layer, layer)?;
        target.keep();
        self.remove(&disk.path)?;
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
        DiskFormat::DmSnapshot => {
            let problem = "a qcow2 file cannot stand on a dm-snapshot";
            Err(RootfsError::Base { path: path.to_owned(), problem })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt, slice};

    use camino::Utf8PathBuf;
    use proptest::{collection::vec, prelude::*, sample::select};
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

    /// What QEMU does to a disk: kind of command, where, how much, in sectors, and with which byte.
    type Act = (u8, u64, u64, u8);

    fn act(disk: &DiskSpec, acts: &[Act]) {
        if acts.is_empty() {
            return;
        }
        let commands = acts.iter().map(|(kind, sector, sectors, byte)| {
            let (offset, length) = (sector * 512, sectors * 512);
            match kind {
                0..3 => format!("write -P {byte} {offset} {length}"),
                3 => format!("write -z {offset} {length}"),
                _ => format!("discard {offset} {length}"),
            }
        });
        let format = if disk.format == DiskFormat::Raw { "raw" } else { "qcow2" };
        let mut arguments = vec!["-d".to_owned(), "unmap".to_owned(), "-f".to_owned(), format.to_owned()];
        arguments.extend(commands.flat_map(|command| ["-c".to_owned(), command]));
        arguments.push(disk.path.to_string());
        conformance::tool("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn what_is_flattened_is_the_same_disk_as_qemu_has_it(
            // Around the places where a cluster, a second-level table and the base end.
            acts in vec(
                (0..4_usize, (0..6_u8, select(vec![0_u64, 1_048_576, 1_228_000, 2_000_000]), 0..600_u64, 1..700_u64, 0..3_u8)),
                1..16,
            ),
        ) {
            let (_guard, at) = conformance::directory();
            let on = |layer: usize| {
                let of_layer = acts.iter().filter(|(number, _)| *number == layer);
                of_layer.map(|(_, (kind, near, plus, length, byte))| (*kind, near + plus, *length, *byte)).collect::<Vec<Act>>()
            };
            let image = raw(at.join("image"));
            File::create_new(&image.path).unwrap().set_len(600 << 20).unwrap();
            let small: Vec<Act> = on(0).into_iter().filter(|(_, at, length, _)| (at + length) * 512 <= 600 << 20).collect();
            act(&image, &small);
            let (mut top, mut bases) = (image, Vec::new());
            for layer in 1..4 {
                let size = DiskMib::new(1024 * i64::try_from(layer).unwrap()).unwrap();
                bases.push(top.clone());
                top = Qcow2Store.clone_disk(&top, &at.join(layer.to_string()), size).unwrap();
                act(&top, &on(layer));
            }
            fs::copy(&top.path, at.join("before")).unwrap();
            let flat = Qcow2Store.flatten(&top, &bases, &at.join("flat")).unwrap();
            prop_assert!(!top.path.exists());
            let checked: Value =
                serde_json::from_str(&qemu_img(&["check", "--output=json", flat.path.as_str()])).unwrap();
            prop_assert_eq!(&checked["check-errors"], 0);
            for fault in ["corruptions", "leaks"] {
                prop_assert!(checked[fault].is_null(), "{}", checked);
            }
            let (before, after) = (at.join("before"), flat.path.as_str());
            let size = |path| virtual_bytes(path, DiskFormat::Qcow2).unwrap();
            prop_assert_eq!(size(&before), size(&flat.path));
            qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", before.as_str(), after]);
        }
    }

    #[test]
    fn a_chain_that_cannot_be_read_is_named_and_left() {
        let (_guard, at) = conformance::directory();
        fs::write(at.join("base"), vec![1; 1 << 20]).unwrap();
        let base = raw(at.join("base"));
        let layer = Qcow2Store.clone_disk(&base, &at.join("layer"), DiskMib::default()).unwrap();
        let disk = Qcow2Store.clone_disk(&layer, &at.join("disk"), DiskMib::default()).unwrap();
        // The guest's machine writes the header, and could name any file of the host in it.
        let error = Qcow2Store.flatten(&disk, slice::from_ref(&layer), &at.join("flat")).unwrap_err();
        assert!(matches!(&error, RootfsError::Base { path, .. } if *path == layer.path), "{error:?}");
        assert!(disk.path.exists() && !at.join("flat").exists());
        let bases = [layer.clone(), base];
        let header = fs::read(&layer.path).unwrap();
        // Each is another reason: unclean, encrypted, other clusters, a snapshot inside, a table behind the end.
        for (offset, byte) in [(79, 1), (35, 1), (23, 12), (63, 1), (43, 1)] {
            File::options().write(true).open(&layer.path).unwrap().write_all_at(&[byte], offset).unwrap();
            let error = Qcow2Store.flatten(&disk, &bases, &at.join("flat")).unwrap_err();
            assert!(error.to_string().contains(layer.path.as_str()), "{error}");
            assert!(disk.path.exists() && !at.join("flat").exists());
            fs::write(&layer.path, &header).unwrap();
        }
        fs::remove_file(at.join("base")).unwrap();
        let error = Qcow2Store.flatten(&disk, &bases, &at.join("flat")).unwrap_err();
        assert!(error.to_string().contains(at.join("base").as_str()), "{error}");
        assert!(disk.path.exists() && !at.join("flat").exists());
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
        conformance::assert_pattern(&Qcow2Store, &disk, 0, 4096, 1);
    }
}
