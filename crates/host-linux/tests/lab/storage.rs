//! Disks that are written copy-on-write, and files that share blocks.

use std::{fs::File, os::unix::fs::FileExt as _};

use crate::{in_lab, shell, unique};

const PART: usize = 4096;

#[test]
fn what_is_written_to_a_snapshot_is_not_on_its_origin() {
    if !in_lab() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for (name, content) in [("origin", 1), ("changes", 0)] {
        let file = File::create(path(name)).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[content; PART], 0).unwrap();
        file.sync_all().unwrap();
    }
    let name = unique("snapshot");
    let attach = |file: &str, options: &str| {
        let script = format!("losetup --find --show {options} {}", path(file).display());
        shell(&script).trim().to_owned()
    };
    let (origin, changes) = (attach("origin", "--read-only"), attach("changes", ""));
    shell(&format!("dmsetup create {name} --table '0 16384 snapshot {origin} {changes} P 8'"));
    let device = File::options().read(true).write(true).open(format!("/dev/mapper/{name}")).unwrap();
    let read = |file: &File| {
        let mut part = [0; PART];
        file.read_exact_at(&mut part, 0).unwrap();
        part[0]
    };
    assert_eq!(read(&device), 1, "it shows its origin");
    device.write_all_at(&[2; PART], 0).unwrap();
    device.sync_all().unwrap();
    assert_eq!((read(&device), read(&File::open(path("origin")).unwrap())), (2, 1));
    drop(device);
    // It is persistent: the same two files give the same disk again.
    shell(&format!(
        "dmsetup remove {name}; dmsetup create {name} --table '0 16384 snapshot {origin} {changes} P 8'"
    ));
    assert_eq!(read(&File::open(format!("/dev/mapper/{name}")).unwrap()), 2);
    shell(&format!("dmsetup remove {name}; losetup --detach {origin} {changes}"));
}

#[test]
fn files_on_xfs_share_blocks() {
    if !in_lab() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().display();
    shell(&format!(
        "truncate --size 512M {place}/image; mkfs.xfs -q -m reflink=1 {place}/image
         mkdir {place}/mounted; mount -o loop {place}/image {place}/mounted
         head -c 16M /dev/urandom > {place}/mounted/one; sync"
    ));
    let used = || -> u64 {
        let said = shell(&format!("stat --file-system --format '%f %S' {place}/mounted"));
        let (free, size) = said.trim().split_once(' ').unwrap();
        (512 << 20) - free.parse::<u64>().unwrap() * size.parse::<u64>().unwrap()
    };
    let before = used();
    let (one, two) = (directory.path().join("mounted/one"), directory.path().join("mounted/two"));
    let target = File::create(&two).unwrap();
    rustix::fs::ioctl_ficlone(&target, File::open(&one).unwrap()).unwrap();
    target.sync_all().unwrap();
    assert!(used() < before + (8 << 20), "{} and {before}", used());
    target.write_all_at(b"another", 5).unwrap();
    drop(target);
    let script = format!("cmp --quiet {} {} && echo same || echo different", one.display(), two.display());
    assert_eq!(shell(&script).trim(), "different");
    shell(&format!("umount {place}/mounted"));
}
