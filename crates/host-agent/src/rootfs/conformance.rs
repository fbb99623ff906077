//! What every store of root disks must do. Disks are opened, read and written by QEMU's own tools, as a virtual
//! machine would, and closed, so that no driver can agree only with itself.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Command,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use wrenn_types::DiskMib;
use wrenn_vmm::{DiskFormat, DiskSpec};

use super::{
    FileStore, RootfsError, RootfsStore, dm_snapshot,
    own_filesystem::{self, Kind},
};

const MIB: u64 = 1 << 20;

/// A case: a store, and an empty directory for it.
type Case = fn(&dyn RootfsStore, &Utf8Path);

/// Runs the whole suite against one store, on whatever file system holds temporary files.
pub(super) fn run(store: &dyn RootfsStore) {
    let (_guard, at) = directory();
    run_in(store, &at);
}

/// Runs the whole suite against one store, on the file system of a directory.
pub(super) fn run_in(store: &dyn RootfsStore, parent: &Utf8Path) {
    let cases: &[Case] = &[
        a_clone_is_its_base_and_then_zeros,
        clones_do_not_see_each_other,
        a_frozen_disk_is_the_base_of_others,
        a_disk_can_be_frozen_where_it_is,
        a_flattened_disk_stands_alone,
        a_disk_is_never_smaller_than_its_base,
        nothing_that_exists_is_touched,
        a_base_that_is_no_file_is_named,
        removing_is_idempotent,
        only_blocks_in_use_are_counted,
        a_disk_shrinks_by_what_is_given_back_and_grows_again,
        a_full_disk_is_named_and_nothing_is_left,
    ];
    for case in cases {
        let guard = tempfile::tempdir_in(parent).unwrap();
        let at = Utf8PathBuf::from_path_buf(guard.path().canonicalize().unwrap()).unwrap();
        case(store, &at);
    }
}

pub(super) fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(directory.path().canonicalize().unwrap()).unwrap();
    (directory, path)
}

pub(super) fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} of the package qemu-utils cannot be run: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Runs `qemu-img`, which must succeed.
pub(super) fn qemu_img(arguments: &[&str]) -> String {
    tool("qemu-img", arguments)
}

fn format_name(disk: &DiskSpec) -> &'static str {
    match disk.format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
        DiskFormat::DmSnapshot => panic!("{} is not open", disk.path),
    }
}

fn qemu_io(disk: &DiskSpec, read_only: bool, command: &str) -> String {
    let mut arguments = vec!["-f", format_name(disk), "-c", command, disk.path.as_str()];
    if read_only {
        arguments.insert(0, "-r");
    }
    tool("qemu-io", &arguments)
}

/// Does something with a disk as its machine does. Of what is frozen only a clone is opened.
pub(super) fn opened<T>(store: &dyn RootfsStore, disk: &DiskSpec, act: impl FnOnce(&DiskSpec) -> T) -> T {
    if disk.format != DiskFormat::DmSnapshot {
        return act(disk);
    }
    let is_frozen = fs::metadata(&disk.path).unwrap().mode() & 0o222 == 0;
    let clone = || {
        let mib = dm_snapshot::disk_bytes(&disk.path).unwrap() / MIB;
        let path = Utf8PathBuf::from(format!("{}.clone", disk.path));
        store.clone_disk(disk, &path, size(i64::try_from(mib).unwrap())).unwrap()
    };
    let to_open = if is_frozen { clone() } else { disk.clone() };
    let done = act(&store.open(&to_open).unwrap());
    store.close(&to_open.path).unwrap();
    if is_frozen {
        store.remove(&to_open.path).unwrap();
    }
    done
}

/// Every byte in the range is `byte`, as a guest reads it.
pub(super) fn assert_pattern(store: &dyn RootfsStore, disk: &DiskSpec, offset: u64, length: u64, byte: u8) {
    let command = format!("read -P {byte} {offset} {length}");
    let said = opened(store, disk, |disk| qemu_io(disk, true, &command));
    assert!(!said.contains("verification failed"), "{} at {offset}: {said}", disk.path);
}

/// Writes as a guest does.
pub(super) fn write(store: &dyn RootfsStore, disk: &DiskSpec, offset: u64, length: u64, byte: u8) {
    let command = format!("write -P {byte} {offset} {length}");
    opened(store, disk, |disk| qemu_io(disk, false, &command));
}

/// Gives blocks back as a guest does that trims its file system: drivers of machines open disks with `discard=unmap`.
fn give_back(store: &dyn RootfsStore, disk: &DiskSpec, offset: u64, length: u64) {
    let command = format!("discard {offset} {length}");
    opened(store, disk, |disk| {
        tool("qemu-io", &["-d", "unmap", "-f", format_name(disk), "-c", &command, disk.path.as_str()])
    });
}

fn virtual_size(store: &dyn RootfsStore, disk: &DiskSpec) -> u64 {
    let info = opened(store, disk, |disk| {
        qemu_img(&["info", "--output=json", "-f", format_name(disk), disk.path.as_str()])
    });
    serde_json::from_str::<Value>(&info).unwrap()["virtual-size"].as_u64().unwrap()
}

pub(super) fn size(mib: i64) -> DiskMib {
    DiskMib::new(mib).unwrap()
}

/// An image of 600 MiB, mostly holes: 1 at its start and 2 at its very end.
pub(super) fn image(at: &Utf8Path) -> DiskSpec {
    let disk = DiskSpec { path: at.join("image"), format: DiskFormat::Raw };
    fs::File::create_new(&disk.path).unwrap().set_len(600 * MIB).unwrap();
    write(&FileStore, &disk, 0, 8192, 1);
    write(&FileStore, &disk, 600 * MIB - 4096, 4096, 2);
    disk
}

fn files_of(at: &Utf8Path) -> Vec<String> {
    let mut names: Vec<String> =
        at.read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned()).collect();
    names.sort();
    names
}

fn a_clone_is_its_base_and_then_zeros(store: &dyn RootfsStore, at: &Utf8Path) {
    let base = image(at);
    for mib in [600, 601, 2048] {
        let disk = store.clone_disk(&base, &at.join(format!("disk-{mib}")), size(mib)).unwrap();
        assert_eq!(disk.format, store.format());
        assert_eq!(virtual_size(store, &disk), size(mib).bytes());
        assert_pattern(store, &disk, 0, 8192, 1);
        assert_pattern(store, &disk, 8192, MIB, 0);
        assert_pattern(store, &disk, 600 * MIB - 4096, 4096, 2);
        if mib > 600 {
            assert_pattern(store, &disk, 600 * MIB, MIB, 0);
            write(store, &disk, size(mib).bytes() - 4096, 4096, 9);
            assert_pattern(store, &disk, size(mib).bytes() - 4096, 4096, 9);
        }
        assert_eq!(fs::metadata(&disk.path).unwrap().mode() & 0o777, 0o600);
    }
}

fn clones_do_not_see_each_other(store: &dyn RootfsStore, at: &Utf8Path) {
    let base = image(at);
    let one = store.clone_disk(&base, &at.join("one"), size(1024)).unwrap();
    let two = store.clone_disk(&base, &at.join("two"), size(1024)).unwrap();
    write(store, &one, 0, 4096, 3);
    assert_pattern(store, &one, 0, 4096, 3);
    assert_pattern(store, &one, 4096, 4096, 1);
    assert_pattern(store, &two, 0, 8192, 1);
    assert_pattern(store, &base, 0, 8192, 1);
}

fn a_frozen_disk_is_the_base_of_others(store: &dyn RootfsStore, at: &Utf8Path) {
    let template = store.clone_disk(&image(at), &at.join("template"), size(1024)).unwrap();
    write(store, &template, 4096, 4096, 4);
    fs::create_dir(at.join("snapshot")).unwrap();
    let layer = store.freeze(&template, &at.join("snapshot/disk")).unwrap();
    assert!(!template.path.exists());
    assert_eq!(layer.path, at.join("snapshot/disk"));
    assert_eq!(fs::metadata(&layer.path).unwrap().permissions().mode() & 0o777, 0o444);

    // The directory of a snapshot is renamed when it is whole; clones are made of what it is then.
    fs::rename(at.join("snapshot"), at.join("kept")).unwrap();
    let layer = DiskSpec { path: at.join("kept/disk"), ..layer };
    let one = store.clone_disk(&layer, &at.join("one"), size(1024)).unwrap();
    let two = store.clone_disk(&layer, &at.join("two"), size(4096)).unwrap();
    for disk in [&one, &two] {
        assert_pattern(store, disk, 0, 4096, 1);
        assert_pattern(store, disk, 4096, 4096, 4);
        assert_pattern(store, disk, 600 * MIB - 4096, 4096, 2);
        assert_pattern(store, disk, 1023 * MIB, MIB, 0);
    }
    assert_pattern(store, &two, 4095 * MIB, MIB, 0);
    write(store, &one, 4096, 4096, 5);
    assert_pattern(store, &two, 4096, 4096, 4);
    assert_pattern(store, &layer, 4096, 4096, 4);
    let error = store.clone_disk(&layer, &at.join("small"), size(1023)).unwrap_err();
    assert!(matches!(error, RootfsError::TooSmall { .. }), "{error:?}");
}

fn a_disk_can_be_frozen_where_it_is(store: &dyn RootfsStore, at: &Utf8Path) {
    let template = store.clone_disk(&image(at), &at.join("disk"), size(1024)).unwrap();
    let layer = store.freeze(&template, &template.path).unwrap();
    assert_eq!(layer, template);
    assert_pattern(store, &layer, 0, 8192, 1);
    let other = store.clone_disk(&image_again(at), &at.join("other"), size(1024)).unwrap();
    let error = store.freeze(&other, &layer.path).unwrap_err();
    assert!(matches!(error, RootfsError::Exists { .. }), "{error:?}");
    assert!(other.path.exists());
}

fn a_flattened_disk_stands_alone(store: &dyn RootfsStore, at: &Utf8Path) {
    let image = image(at);
    let template = store.clone_disk(&image, &at.join("template"), size(1024)).unwrap();
    write(store, &template, 4096, 4096, 4);
    write(store, &template, 700 * MIB, 3 * MIB, 5);
    let layer = store.freeze(&template, &at.join("layer")).unwrap();
    let disk = store.clone_disk(&layer, &at.join("disk"), size(4096)).unwrap();
    write(store, &disk, 8192, 4096, 6);
    write(store, &disk, 701 * MIB, MIB, 0);
    write(store, &disk, 4096 * MIB - 65536, 65536, 7);
    let error = store.flatten(&disk, &[image.clone(), layer.clone()], &layer.path).unwrap_err();
    assert!(matches!(error, RootfsError::Exists { .. }), "{error:?}");

    let flat = store.flatten(&disk, &[image, layer], &at.join("flat")).unwrap();
    for gone in ["image", "layer"] {
        store.remove(&at.join(gone)).unwrap();
    }
    assert_eq!(files_of(at), ["flat"]);
    assert_eq!((flat.format, virtual_size(store, &flat)), (store.flat_format(), 4096 * MIB));
    assert_eq!(fs::metadata(&flat.path).unwrap().permissions().mode() & 0o777, 0o444);
    let other = store.clone_disk(&flat, &at.join("other"), size(8192)).unwrap();
    write(store, &other, 0, 4096, 9);
    for (offset, length, byte) in [
        (0, 4096, 1),
        (4096, 4096, 4),
        (8192, 4096, 6),
        (12_288, 16 * MIB, 0),
        (600 * MIB - 4096, 4096, 2),
        (700 * MIB, MIB, 5),
        (701 * MIB, MIB, 0),
        (702 * MIB, MIB, 5),
        (703 * MIB, MIB, 0),
        (4096 * MIB - 65536, 65536, 7),
    ] {
        assert_pattern(store, &flat, offset, length, byte);
        if offset > 0 {
            assert_pattern(store, &other, offset, length, byte);
        }
    }
    assert_pattern(store, &other, 4096 * MIB, MIB, 0);
    let used = store.used_bytes(&flat.path).unwrap();
    assert!(used < 5 * MIB, "{used} bytes for 2 MiB and a little more, and a MiB of zeros");
}

fn image_again(at: &Utf8Path) -> DiskSpec {
    DiskSpec { path: at.join("image"), format: DiskFormat::Raw }
}

fn a_disk_is_never_smaller_than_its_base(store: &dyn RootfsStore, at: &Utf8Path) {
    let error = store.clone_disk(&image(at), &at.join("disk"), size(599)).unwrap_err();
    match error {
        RootfsError::TooSmall { base_bytes, wanted_bytes, .. } => {
            assert_eq!((base_bytes, wanted_bytes), (600 * MIB, 599 * MIB));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(files_of(at), ["image"]);
}

fn nothing_that_exists_is_touched(store: &dyn RootfsStore, at: &Utf8Path) {
    fs::write(at.join("disk"), "another's").unwrap();
    let error = store.clone_disk(&image(at), &at.join("disk"), size(1024)).unwrap_err();
    assert!(matches!(&error, RootfsError::Exists { path } if *path == at.join("disk")), "{error:?}");
    assert_eq!(fs::read_to_string(at.join("disk")).unwrap(), "another's");
}

fn a_base_that_is_no_file_is_named(store: &dyn RootfsStore, at: &Utf8Path) {
    let missing = DiskSpec { path: at.join("missing"), format: DiskFormat::Raw };
    let error = store.clone_disk(&missing, &at.join("disk"), size(1024)).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    let folder = DiskSpec { path: at.to_owned(), format: DiskFormat::Raw };
    let error = store.clone_disk(&folder, &at.join("disk"), size(1024)).unwrap_err();
    assert!(matches!(error, RootfsError::Base { .. }), "{error:?}");
    assert_eq!(files_of(at), Vec::<String>::new());
}

fn removing_is_idempotent(store: &dyn RootfsStore, at: &Utf8Path) {
    let disk = store.clone_disk(&image(at), &at.join("disk"), size(1024)).unwrap();
    store.remove(&disk.path).unwrap();
    store.remove(&disk.path).unwrap();
    assert_eq!(files_of(at), ["image"]);
    assert!(matches!(store.used_bytes(&disk.path), Err(RootfsError::File { .. })));
}

fn only_blocks_in_use_are_counted(store: &dyn RootfsStore, at: &Utf8Path) {
    let disk = store.clone_disk(&image(at), &at.join("disk"), size(20 * 1024)).unwrap();
    let before = store.used_bytes(&disk.path).unwrap();
    assert!(before <= MIB, "{before} bytes in use by an unused disk");
    write(store, &disk, 10 * MIB, 8 * MIB, 6);
    let after = store.used_bytes(&disk.path).unwrap();
    assert!((8 * MIB..10 * MIB).contains(&(after - before)), "{before}, then {after}");
}

fn a_disk_shrinks_by_what_is_given_back_and_grows_again(store: &dyn RootfsStore, at: &Utf8Path) {
    let base = image(at);
    let disk = store.clone_disk(&base, &at.join("disk"), size(1024)).unwrap();
    let before = store.used_bytes(&disk.path).unwrap();
    write(store, &disk, 10 * MIB, 8 * MIB, 6);
    write(store, &disk, 900 * MIB, MIB, 7);
    give_back(store, &disk, 10 * MIB, 8 * MIB);
    // Something of the base too, of which nothing may shine through. The kernel's snapshots drop what is given back of
    // the base alone, as a disk may: no guest relies on what it reads there.
    if store.format() == DiskFormat::DmSnapshot {
        write(store, &disk, 0, 65536, 3);
    }
    give_back(store, &disk, 0, 65536);
    let taken = store.used_bytes(&disk.path).unwrap().saturating_sub(before);
    assert!(taken < 2 * MIB, "{taken} bytes for 1 MiB, and 8 that were given back");
    let content = |disk: &DiskSpec| {
        assert_pattern(store, disk, 0, 18 * MIB, 0);
        assert_pattern(store, disk, 600 * MIB - 4096, 4096, 2);
        assert_pattern(store, disk, 900 * MIB, MIB, 7);
    };
    content(&disk);
    assert_pattern(store, &base, 0, 8192, 1);

    // What is stored has no room for it either, and what is cloned from that has all that its size promises.
    let flat = store.flatten(&disk, &[base], &at.join("flat")).unwrap();
    let stored = store.used_bytes(&flat.path).unwrap();
    assert!(stored < 3 * MIB, "{stored} bytes for 1 MiB and a few KiB");
    let grown = store.clone_disk(&flat, &at.join("grown"), size(4096)).unwrap();
    assert_eq!(virtual_size(store, &grown), 4096 * MIB);
    content(&grown);
    assert_pattern(store, &grown, 1024 * MIB, MIB, 0);
    write(store, &grown, 10 * MIB, 8 * MIB, 8);
    write(store, &grown, 4095 * MIB, MIB, 9);
    assert_pattern(store, &grown, 10 * MIB, 8 * MIB, 8);
    assert_pattern(store, &grown, 4095 * MIB, MIB, 9);
    content(&flat);
}

fn a_full_disk_is_named_and_nothing_is_left(store: &dyn RootfsStore, at: &Utf8Path) {
    let base = image(at);
    // One page: less than either format needs for its first bytes.
    let tried = own_filesystem::with(Kind::Tmpfs, 4096, |full| {
        let error = store.clone_disk(&base, &full.join("disk"), size(1024)).unwrap_err();
        assert!(matches!(error, RootfsError::NoSpace { .. }), "{error:?}");
        assert_eq!(files_of(full), Vec::<String>::new());
    });
    tried.or_say_skipped("a full disk");
}
