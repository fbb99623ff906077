//! What is not as it was is refused by its name, and what is not whole never becomes a snapshot.

use std::os::unix::fs::FileExt;

use super::*;
use crate::{
    snapshot_store::Damage,
    snapshots::{Look, Part, Progress},
};

pub(crate) struct Whole {
    pub(crate) place: Place,
    pub(crate) store: Snapshots,
    pub(crate) kept: Kept,
    pub(crate) base: crate::snapshots::Base,
}

impl Whole {
    pub(crate) fn new() -> Self {
        let place = Place::new();
        let store = place.store();
        let base = store.hold(&place.warm(1)).unwrap();
        let layers = [write_layer(&store, 2), write_layer(&store, 1)];
        let kept = make(&store, 1, &base.key, &layers);
        Self { place, store, kept, base }
    }

    pub(crate) fn get(&self) -> SnapshotsResult<Option<Kept>> {
        self.store.get(&snapshot(1))
    }
}

pub(crate) fn flip(path: &Utf8Path, at: u64, bit: u32) {
    // As the owner of all files may, whatever their mode.
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
    file.set_permissions(mode).unwrap();
}

pub(crate) fn set_length(path: &Utf8Path, length: u64) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_manifest_is_refused() {
    let it = Whole::new();
    for path in [it.kept.dir.join("manifest.json"), it.base.dir.join("manifest.json")] {
        let good = fs::read(&path).unwrap();
        let refuse = |bad: &[u8], what: &str| {
            fs::write(&path, bad).unwrap();
            let named = match it.get().unwrap_err() {
                SnapshotStoreError::Damaged { path, .. }
                | SnapshotStoreError::Manifest { path, .. }
                | SnapshotStoreError::Format { path, .. }
                | SnapshotStoreError::Mismatch { path, .. } => path,
                error => panic!("{what}: {error:?}"),
            };
            assert_eq!(named, path, "{what}");
        };
        for at in 0..good.len() {
            for bit in [at % 8, (at + 5) % 8] {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                refuse(&bad, &format!("bit {bit} of byte {at}"));
            }
            refuse(&good[..at], &format!("cut at {at}"));
        }
        // What a person would take for the same is not: nobody has to decide which changes count.
        refuse(&[&good[..], b" "].concat(), "a space more");
        fs::write(&path, &good).unwrap();
        assert_eq!(it.get().unwrap().unwrap(), it.kept);
    }
}

#[test]
fn a_manifest_of_another_snapshot_is_refused() {
    let it = Whole::new();
    let other = it.place.agent().join("snapshots").join(snapshot(2).as_str());
    fs::create_dir(&other).unwrap();
    for name in ["manifest.json", "pages", "state"] {
        fs::copy(it.kept.dir.join(name), other.join(name)).unwrap();
    }
    let error = it.store.get(&snapshot(2)).unwrap_err();
    assert!(matches!(error, SnapshotStoreError::Mismatch { field: "id", .. }), "{error:?}");
}

#[test]
fn damage_to_any_file_is_named_and_never_mended() {
    type Injury = fn(&Utf8Path);
    let cut: Injury = |path| set_length(path, 49_999.min(fs::metadata(path).unwrap().len() - 1));
    let remove: Injury = |path| fs::remove_file(path).unwrap();
    let grow: Injury = |path| set_length(path, fs::metadata(path).unwrap().len() + 1);
    let turn: Injury = |path| flip(path, 3_333, 5);
    type Which = fn(&Whole) -> Utf8PathBuf;
    let state: Which = |it| it.kept.state.clone();
    let pages: Which = |it| it.kept.pages.clone();
    let top: Which = |it| it.store.layer_path(&layer(2));
    let lowest: Which = |it| it.store.layer_path(&layer(1));
    let memory: Which = |it| it.base.memory.clone();
    let disk: Which = |it| it.base.disk.path.clone();
    let mut cases: Vec<(Which, Injury)> = Vec::new();
    for which in [state, pages, memory, disk] {
        cases.extend([cut, remove, grow, turn].map(|injury| (which, injury)));
    }
    for which in [top, lowest] {
        cases.extend([cut, remove].map(|injury| (which, injury)));
    }
    for (which, injury) in cases {
        let it = Whole::new();
        let path = which(&it);
        injury(&path);
        let after = fs::read(&path).ok();
        for _ in 0..2 {
            match it.get().unwrap_err() {
                SnapshotStoreError::Damaged { path: named, .. } => assert_eq!(named, path),
                error => panic!("{path}: {error:?}"),
            }
        }
        // It is listed, it keeps what it stands on, and it can be deleted.
        assert_eq!(it.store.all().unwrap().len(), 1);
        collect_all(&it.store, Roots::default());
        assert_eq!(fs::read(&path).ok(), after, "{path}");
        assert!(it.store.delete(&snapshot(1)).unwrap());
    }
}

#[test]
fn a_base_that_lost_its_manifest_is_damaged_and_not_made_anew() {
    let it = Whole::new();
    let manifest = it.base.dir.join("manifest.json");
    fs::remove_file(&manifest).unwrap();
    for error in [it.get().unwrap_err(), it.store.hold(&it.place.warm(1)).unwrap_err()] {
        assert!(
            matches!(&error, SnapshotStoreError::Damaged { path, damage: Damage::Missing } if *path == manifest),
            "{error:?}"
        );
    }
    fs::remove_dir_all(&it.base.dir).unwrap();
    let error = it.get().unwrap_err();
    assert!(
        matches!(&error, SnapshotStoreError::Damaged { path, damage: Damage::Missing } if *path == it.base.dir)
    );
}

#[test]
fn pages_are_read_once_per_boot() {
    let it = Whole::new();
    let record = it.kept.dir.join("verified.json");
    // Remembered: a bit that was flipped is not seen where the record is made to say that it was there.
    flip(&it.kept.pages, 60_000, 0);
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let metadata = fs::metadata(&it.kept.pages).unwrap();
    text["files"][0]["modified"] = serde_json::json!([metadata.mtime(), metadata.mtime_nsec()]);
    text["files"][0]["changed"] = serde_json::json!([metadata.ctime(), metadata.ctime_nsec()]);
    let forged = text.to_string();
    fs::write(&record, &forged).unwrap();
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
    // After a boot it is.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(&record, forged.replace(boot.trim(), "another")).unwrap();
    let error = it.get().unwrap_err();
    assert!(
        matches!(&error, SnapshotStoreError::Damaged { path, damage: Damage::Content } if *path == it.kept.pages),
        "{error:?}"
    );
    // A list is no use: it does not read them.
    assert!(it.store.all().unwrap()[0].1.is_ok());
    flip(&it.kept.pages, 60_000, 0);
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
    assert!(fs::read_to_string(&record).unwrap().contains(boot.trim()));
}

#[test]
fn another_program_is_refused_by_the_name_of_what_differs() {
    let it = Whole::new();
    type Change = fn(&mut VmmIdentity);
    let changes: [(&str, Change); 5] = [
        ("VMM", |it| it.name.push('0')),
        ("VMM version", |it| it.version.push('0')),
        ("machine", |it| it.machine.push('0')),
        ("CPU model", |it| it.cpu_model.push('0')),
        ("accelerator", |it| it.accelerator = Accelerator::Kvm),
    ];
    let refused = |vmm: &VmmIdentity, guest: &str| match it.kept.check(vmm, guest).unwrap_err() {
        SnapshotStoreError::Mismatch { field, .. } => field,
        error => panic!("{error:?}"),
    };
    for (field, change) in changes {
        let mut other = identity();
        change(&mut other);
        assert_eq!(refused(&other, &it.kept.about.guest), field);
    }
    assert_eq!(refused(&identity(), "ffff"), "guest bundle");
    it.kept.check(&identity(), &it.kept.about.guest).unwrap();
}

#[test]
fn what_is_not_whole_is_not_committed() {
    type Spoil = fn(&Snapshots, &Making, &mut About);
    let spoils: [(&str, Spoil); 8] = [
        ("state", |_, making, _| fs::remove_file(making.state()).unwrap()),
        ("state", |_, making, _| fs::write(making.state(), "").unwrap()),
        ("pages", |_, making, _| fs::remove_file(making.pages()).unwrap()),
        ("ly-00000002", |_, _, about| about.layers.push(layer(2))),
        ("ly-00000002", |store, _, _| fs::remove_file(store.layer_path(&layer(2))).unwrap()),
        ("ly-00000003", |_, _, about| about.layers.push(layer(3))),
        ("state", |_, _, about| about.extent = Extent::Disk),
        ("bases", |_, _, about| {
            about.base = format!("{}.{}", "0".repeat(32), "0".repeat(16)).parse().unwrap()
        }),
    ];
    for (named, spoil) in spoils {
        let place = Place::new();
        let store = place.store();
        let base = store.hold(&place.warm(1)).unwrap();
        let mut about = about(&base.key, &[write_layer(&store, 2), write_layer(&store, 1)]);
        let making = store.begin(snapshot(1)).unwrap();
        fill(&making, 1);
        spoil(&store, &making, &mut about);
        let (SnapshotStoreError::Incomplete { path, .. } | SnapshotStoreError::Damaged { path, .. }) =
            making.commit(about).unwrap_err()
        else {
            panic!("{named}")
        };
        assert!(path.components().any(|part| part.as_str() == named), "{path}, not {named}");
        assert_eq!(names(&place.agent().join("snapshots")), Vec::<String>::new());
    }
}

/// What is saved without memory was refused for damage to a memory that it does not use.
#[test]
fn a_disk_alone_needs_no_more_of_its_base_than_the_disk() {
    for is_known in [false, true] {
        let it = Whole::new();
        let about = About { extent: Extent::Disk, ..about(&it.base.key, &[layer(1)]) };
        let kept = it.store.begin(snapshot(2)).unwrap().commit(about.clone()).unwrap();
        let read_base = || {
            let looked = it.store.look(&Part::Base(it.base.key.clone()));
            if let Ok(Look::Contents(mut reading)) = looked {
                while let Ok(Progress::More(_)) = reading.read(u64::MAX) {}
            }
        };
        flip(&it.base.memory, 3_333, 5);
        if is_known {
            read_base();
        }
        it.get().unwrap_err();
        assert_eq!(it.store.get(&snapshot(2)).unwrap().unwrap(), kept);
        it.store.begin(snapshot(3)).unwrap().commit(about.clone()).unwrap();
        it.store.hold_zeros(&it.base.key).unwrap();

        flip(&it.base.disk.path, 3_333, 5);
        for _ in 0..2 {
            let got = it.store.get(&snapshot(2)).unwrap_err();
            let made = it.store.begin(snapshot(4)).unwrap().commit(about.clone()).unwrap_err();
            let zeros = it.place.store().hold_zeros(&it.base.key).unwrap_err();
            for error in [got, made, zeros] {
                let SnapshotStoreError::Damaged { path, .. } = &error else { panic!("{error:?}") };
                assert_eq!(*path, it.base.disk.path);
            }
            if is_known {
                read_base();
            }
        }
    }
}

/// A pause was kept that could not be resumed, and the machine that could have gone on was ended.
#[test]
fn what_stands_on_known_damage_is_not_committed() {
    type Which = fn(&Whole) -> Utf8PathBuf;
    let cases: [Which; 3] =
        [|it| it.base.memory.clone(), |it| it.base.disk.path.clone(), |it| it.store.layer_path(&layer(1))];
    for which in cases {
        let it = Whole::new();
        seal(&it.store, &layer(1)).unwrap();
        let path = which(&it);
        flip(&path, 3_333, 5);
        let making = it.store.begin(snapshot(2)).unwrap();
        fill(&making, 2);
        let about = about(&it.base.key, &[layer(2), layer(1)]);
        // Nothing is read for it.
        making.commit(about.clone()).unwrap();
        for part in it.store.parts().unwrap() {
            if let Ok(Look::Contents(mut reading)) = it.store.look(&part) {
                while let Ok(Progress::More(_)) = reading.read(u64::MAX) {}
            }
        }
        let making = it.store.begin(snapshot(3)).unwrap();
        fill(&making, 3);
        let error = making.commit(about).unwrap_err();
        assert!(
            matches!(&error, SnapshotStoreError::Damaged { path: named, .. } if *named == path),
            "{path}: {error:?}"
        );
        assert_eq!(it.store.all().unwrap().len(), 2);
    }
}

/// A copy had a digest of its own, taken of what had changed since, so that it was whole and its guest was not.
#[test]
fn a_copy_is_held_against_what_it_is_of() {
    type Which = fn(&Kept) -> &Utf8Path;
    let cases: [Option<Which>; 3] =
        [None, Some(|kept| kept.state.as_path()), Some(|kept| kept.pages.as_path())];
    for damaged in cases {
        let it = Whole::new();
        let found = it.get().unwrap().unwrap();
        // After it was read.
        if let Some(which) = damaged {
            flip(which(&it.kept), 3_333, 5);
        }
        let making = it.store.begin(snapshot(2)).unwrap();
        for (from, to) in [(&it.kept.state, making.state()), (&it.kept.pages, making.pages())] {
            fs::hard_link(from, to).unwrap();
        }
        let copied = making.commit_copy(&found, it.kept.about.clone());
        match (damaged, copied) {
            (None, Ok(copy)) => assert_eq!(it.store.get(&snapshot(2)).unwrap().unwrap(), copy),
            (Some(which), Err(SnapshotStoreError::Damaged { path, .. })) => {
                assert_eq!(path, which(&it.kept));
                assert_eq!(it.store.all().unwrap().len(), 1);
            }
            (_, copied) => panic!("{copied:?}"),
        }
    }
}

#[test]
fn one_that_is_there_or_in_the_making_is_not_begun_again() {
    let it = Whole::new();
    let exists = |id| matches!(it.store.begin(id), Err(SnapshotStoreError::Exists { .. }));
    assert!(exists(snapshot(1)));
    let making = it.store.begin(snapshot(2)).unwrap();
    fill(&making, 1);
    assert!(exists(snapshot(2)));
    drop(making);
    assert_eq!(names(&it.place.agent().join("snapshots")), [snapshot(1).as_str()]);
    // What a process that was killed left does not stand in the way of the next one.
    std::mem::forget(it.store.begin(snapshot(2)).unwrap());
    assert!(exists(snapshot(2)));
    drop(it.place.store().begin(snapshot(2)).unwrap());
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
}

#[test]
fn a_snapshot_of_the_disk_alone_has_no_memory() {
    let it = Whole::new();
    let making = it.store.begin(snapshot(2)).unwrap();
    let about = About { extent: Extent::Disk, ..about(&it.base.key, &[layer(1)]) };
    let kept = making.commit(about).unwrap();
    assert_eq!((kept.state_bytes, kept.pages_bytes), (0, 0));
    assert_eq!(names(&kept.dir), ["manifest.json"]);
    assert_eq!(it.store.get(&snapshot(2)).unwrap().unwrap(), kept);
    assert_eq!(it.store.own_bytes(&kept).unwrap(), blocks(&it.store.layer_path(&layer(1))));
    assert_eq!((kept.memory(), it.kept.memory().is_some()), (None, true));
    // Any program can boot it.
    let other = VmmIdentity { version: "2".to_owned(), ..identity() };
    kept.check(&other, "ffff").unwrap();
    it.kept.check(&other, "ffff").unwrap_err();
}

#[test]
fn a_memory_of_zeros_that_is_none_is_refused() {
    let it = Whole::new();
    let zeros = it.store.hold_zeros(&it.base.key).unwrap();
    flip(&zeros.memory, 100, 1);
    let error = it.place.store().base(&zeros.key).unwrap_err();
    assert!(
        matches!(&error, SnapshotStoreError::Damaged { path, damage: Damage::Content } if *path == zeros.memory),
        "{error:?}"
    );
}

fn blocks(path: &Utf8Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn sizes_are_blocks_in_use_and_nothing_of_the_base() {
    let it = Whole::new();
    let sparse = it.store.layer_path(&layer(3));
    let file = fs::File::create(&sparse).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&[1; 10_000], 1 << 30).unwrap();
    let kept = make(&it.store, 3, &it.base.key, &[layer(3), layer(1)]);
    let used = it.store.own_bytes(&kept).unwrap();
    let parts = [&kept.state, &kept.pages, &sparse, &it.store.layer_path(&layer(1))];
    assert_eq!(used, parts.iter().map(|path| blocks(path)).sum::<u64>());
    assert!((4_000 + 70_000 + 10_000 + 50_000..1 << 20).contains(&used), "{used} bytes");
    // With a chain that is the base's disk alone there is only memory.
    let bare = make(&it.store, 4, &it.base.key, &[]);
    assert_eq!(it.store.own_bytes(&bare).unwrap(), blocks(&bare.state) + blocks(&bare.pages));
    // Together a layer that two of them stand on counts once: that of the snapshot that was there, and of the third.
    let each: u64 = [&it.kept, &kept, &bare].map(|kept| it.store.own_bytes(kept).unwrap()).iter().sum();
    assert_eq!(it.store.bytes_of_all(), each - blocks(&it.store.layer_path(&layer(1))));
}

#[test]
fn a_full_disk_is_named_and_leaves_the_old() {
    let tried = own_filesystem::with(Kind::Tmpfs, 4 << 20, |at| {
        let store = Snapshots::open(&at.join("agent")).unwrap();
        let base = store.hold(&warm(at, 1)).unwrap();
        let layers = [write_layer(&store, 1)];
        let kept = make(&store, 1, &base.key, &layers);
        let making = store.begin(snapshot(2)).unwrap();
        fill(&making, 2);
        // Whatever is left is taken, so that the manifest finds no room.
        let mut filler = fs::File::create(at.join("filler")).unwrap();
        let filled = std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
        assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
        let error = making.commit(about(&base.key, &layers)).unwrap_err();
        assert!(error.is_no_space(), "{error:?}");
        assert_eq!(names(&at.join("agent/snapshots")), [snapshot(1).as_str()]);

        // On a disk that is still full, what there is can be used, also for the first time since a boot.
        std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
        fs::remove_file(kept.dir.join("verified.json")).unwrap();
        std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
        let store = Snapshots::open(&at.join("agent")).unwrap();
        assert_eq!(store.get(&snapshot(1)).unwrap().unwrap(), kept);
        assert!(store.delete(&snapshot(1)).unwrap());
        let swept = collect_all(&store, Roots::default());
        assert_eq!((swept.layers.len(), swept.bases.len()), (1, 1));
        assert!(swept.freed_bytes >= 50_000, "{swept:?}");
    });
    tried.or_say_skipped("a full disk");
}

#[test]
fn a_base_from_another_filesystem_is_a_copy_that_was_read() {
    let place = Place::new();
    let good = place.warm(1);
    let bad = place.warm(2);
    flip(&bad.files.memory, 100, 1);
    let tried = own_filesystem::with(Kind::Tmpfs, 4 << 20, |at| {
        let agent = at.join("agent");
        let store = Snapshots::open(&agent).unwrap();
        let base = store.hold(&good).unwrap();
        assert_eq!(fs::read(&base.memory).unwrap(), [1; 200_000]);
        assert_eq!(fs::read(&base.disk.path).unwrap(), [1; 100_000]);
        assert_eq!((mode(&base.memory), mode(&base.disk.path)), (0o400, 0o400));
        assert_eq!(store.hold(&good).unwrap(), base);
        let error = store.hold(&bad).unwrap_err();
        assert!(matches!(error, SnapshotStoreError::Damaged { damage: Damage::Content, .. }), "{error:?}");
        assert_eq!(names(&agent.join("bases")), [base.key.as_str()]);
    });
    tried.or_say_skipped("a base from another filesystem");
}
