//! Layers have digests once somebody has read them: what is damaged is refused by its name, and nothing waits.

use std::{
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
};

use super::{
    crash::{assert_goes_on, assert_tidy, crashes, failing_after, prepare},
    damage::{Whole, flip, set_length},
    *,
};
use crate::snapshots::{Look, Part, Progress, steps::Step};

const SEAL: &[Step] = &[Step::DigestIsWritten, Step::DigestHasItsName, Step::DigestIsDurable];

/// A snapshot of which both layers have a digest.
fn sealed() -> Whole {
    let it = Whole::new();
    for number in [1, 2] {
        let sealed = seal(&it.store, &layer(number)).unwrap();
        assert!(matches!(sealed, Some(SealProgress::Sealed(_))), "{sealed:?}");
    }
    it
}

fn digest_of(it: &Whole, number: u32) -> Utf8PathBuf {
    it.place.agent().join("digests").join(layer(number).as_str())
}

fn remembered_of(it: &Whole, number: u32) -> Utf8PathBuf {
    it.place.agent().join(format!("digests/{}.verified", layer(number)))
}

/// Reads a part to its end.
fn look(store: &Snapshots, part: &Part) -> SnapshotsResult<Option<Progress>> {
    let Look::Contents(mut reading) = store.look(part)? else { return Ok(None) };
    loop {
        match reading.read(20_000)? {
            Progress::More(_) => {}
            end => return Ok(Some(end)),
        }
    }
}

fn assert_damaged(error: &SnapshotStoreError, path: &Utf8Path) {
    assert!(
        matches!(error, SnapshotStoreError::Damaged { path: named, .. } if named == path),
        "{path}: {error:?}"
    );
}

#[test]
fn damage_to_a_layer_with_a_digest_is_named_wherever_it_is() {
    type Injury = fn(&Utf8Path);
    let injuries: [Injury; 5] = [
        |path| flip(path, 0, 0),
        |path| flip(path, 33_333, 7),
        |path| flip(path, 49_999, 3),
        |path| set_length(path, 49_999),
        |path| set_length(path, 50_001),
    ];
    for number in [1, 2] {
        for injury in injuries {
            let it = sealed();
            assert_eq!(it.get().unwrap().unwrap(), it.kept);
            let path = it.store.layer_path(&layer(number));
            injury(&path);
            let after = fs::read(&path).unwrap();
            for _ in 0..2 {
                assert_damaged(&it.get().unwrap_err(), &path);
            }
            // Another agent finds the same, and nothing is mended or lost.
            assert_damaged(&it.place.store().get(&snapshot(1)).unwrap_err(), &path);
            assert_eq!(fs::read(&path).unwrap(), after);
            assert!(it.store.delete(&snapshot(1)).unwrap());
        }
    }
}

#[test]
fn a_layer_without_a_digest_is_used_as_it_is() {
    let it = Whole::new();
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
    assert_eq!(names(&it.place.agent().join("digests")), Vec::<String>::new());
    let without = it.store.layers_without_digest([layer(7)].into()).unwrap();
    assert_eq!(without, [layer(1), layer(2)].into(), "and not one that is not there");
    seal(&it.store, &layer(1)).unwrap();
    assert_eq!(seal(&it.store, &layer(1)).unwrap(), None, "it has one");
    assert_eq!(it.store.layers_without_digest([].into()).unwrap(), [layer(2)].into());
}

#[test]
fn a_layer_is_read_once_per_boot() {
    let it = sealed();
    let record = remembered_of(&it, 1);
    let before = fs::read(&record).unwrap();
    // A use does not touch it, and neither does another snapshot that names it.
    it.get().unwrap().unwrap();
    make(&it.store, 2, &it.base.key, &[layer(1)]);
    it.get().unwrap().unwrap();
    assert_eq!(fs::read(&record).unwrap(), before);
    let text: serde_json::Value = serde_json::from_slice(&before).unwrap();
    let path = it.store.layer_path(&layer(1));
    let metadata = fs::metadata(&path).unwrap();
    let changed = |metadata: &fs::Metadata| serde_json::json!([metadata.ctime(), metadata.ctime_nsec()]);
    assert_eq!(text["files"][0]["changed"], changed(&metadata), "what was read just now is not read again");

    // It is not read where the record is made to say that it was, and is read after a boot.
    flip(&path, 20_000, 2);
    let metadata = fs::metadata(&path).unwrap();
    let mut forged = text;
    forged["files"][0]["modified"] = serde_json::json!([metadata.mtime(), metadata.mtime_nsec()]);
    forged["files"][0]["changed"] = changed(&metadata);
    fs::write(&record, forged.to_string()).unwrap();
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
    forged["boot"] = "another".into();
    fs::write(&record, forged.to_string()).unwrap();
    assert_damaged(&it.get().unwrap_err(), &path);
}

#[test]
fn what_a_look_finds_damaged_is_refused_without_reading() {
    let it = sealed();
    let path = it.store.layer_path(&layer(1));
    let layer_part = Part::Layer(layer(1));
    assert!(matches!(look(&it.store, &layer_part).unwrap(), Some(Progress::Whole(_))));
    let metadata = fs::metadata(&path).unwrap();
    flip(&path, 40_000, 1);
    assert_damaged(&look(&it.store, &layer_part).unwrap_err(), &path);
    // Whole again, but known as damaged: who reads it would not refuse it.
    flip(&path, 40_000, 1);
    let now = fs::metadata(&path).unwrap();
    let record = remembered_of(&it, 1);
    let mut forged: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert_eq!(forged["damaged"], 0);
    forged["files"][0]["modified"] = serde_json::json!([now.mtime(), now.mtime_nsec()]);
    forged["files"][0]["changed"] = serde_json::json!([now.ctime(), now.ctime_nsec()]);
    fs::write(&record, forged.to_string()).unwrap();
    assert_damaged(&it.get().unwrap_err(), &path);
    assert_damaged(&look(&it.store, &layer_part).unwrap_err(), &path);
    // What was written to since is another matter.
    fs::File::open(&path).unwrap().set_modified(metadata.modified().unwrap()).unwrap();
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
}

#[test]
fn every_part_is_looked_at_and_damage_to_it_is_refused_later() {
    type Which = fn(&Whole) -> (Part, Utf8PathBuf);
    let cases: [Which; 6] = [
        |it| (Part::Snapshot(snapshot(1)), it.kept.pages.clone()),
        |it| (Part::Snapshot(snapshot(1)), it.kept.state.clone()),
        |it| (Part::Base(it.base.key.clone()), it.base.memory.clone()),
        |it| (Part::Base(it.base.key.clone()), it.base.disk.path.clone()),
        |it| (Part::Layer(layer(1)), it.store.layer_path(&layer(1))),
        |it| (Part::Layer(layer(2)), it.store.layer_path(&layer(2))),
    ];
    for which in cases {
        let it = sealed();
        let (part, path) = which(&it);
        let parts = it.store.parts().unwrap();
        assert_eq!(parts.len(), 4, "{parts:?}");
        for part in &parts {
            let looked = look(&it.store, part).unwrap();
            assert!(matches!(looked, Some(Progress::Whole(_))), "{part}: {looked:?}");
        }
        flip(&path, 99, 4);
        assert_damaged(&look(&it.store, &part).unwrap_err(), &path);
        for other in parts.iter().filter(|other| **other != part) {
            // A look at a snapshot is one at its own files.
            assert!(look(&it.store, other).is_ok(), "{other}");
        }
        for _ in 0..2 {
            assert_damaged(&it.get().unwrap_err(), &path);
        }
    }
    let it = sealed();
    assert!(it.store.delete(&snapshot(1)).unwrap());
    collect_all(&it.store, Roots::default());
    for gone in [Part::Snapshot(snapshot(1)), Part::Base(it.base.key.clone()), Part::Layer(layer(1))] {
        assert_eq!(look(&it.store, &gone).unwrap(), None, "{gone}");
    }
}

#[test]
fn a_crash_at_any_step_of_a_digest_leaves_none_or_a_whole_one() {
    let place = Place::new();
    let base = prepare(&place);
    let crashes = crashes(&place, |store| assert!(seal(store, &layer(1)).unwrap().is_some()));
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), SEAL);
    for (step, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        let there = step != Step::DigestIsWritten;
        assert_eq!(store.has_digest(&layer(1)).unwrap(), there, "{step:?}");
        assert!(store.get(&snapshot(1)).unwrap().is_some());
        assert_eq!(seal(&store, &layer(1)).unwrap().is_none(), there, "{step:?}");
        let path = store.layer_path(&layer(1));
        // The files of a crash are those of the place: a copy of its own can be damaged.
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        assert_goes_on(&crash, &store, &base);
        flip(&path, 5, 5);
        assert_damaged(&store.get(&snapshot(1)).unwrap_err(), &path);
    }
}

#[test]
fn an_error_at_any_step_of_a_digest_is_made_good_by_the_next() {
    for number in 0..SEAL.len() {
        let place = Place::new();
        let base = prepare(&place);
        let store = failing_after(&place, number);
        seal(&store, &layer(1)).unwrap_err();
        assert_tidy(&place);
        assert!(store.get(&snapshot(1)).unwrap().is_some());
        assert_eq!(seal(&store, &layer(1)).unwrap().is_none(), number > 0);
        assert_goes_on(&place, &store, &base);
    }
}

#[test]
fn a_layer_that_changes_or_goes_while_it_is_read_gets_no_digest() {
    type Event = fn(&Whole);
    let events: [(&str, Event); 4] = [
        ("written", |it| {
            let path = it.store.layer_path(&layer(2));
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            fs::File::options().write(true).open(&path).unwrap().write_all_at(b"x", 40_000).unwrap();
        }),
        ("removed", |it| fs::remove_file(it.store.layer_path(&layer(2))).unwrap()),
        ("replaced", |it| {
            fs::remove_file(it.store.layer_path(&layer(2))).unwrap();
            write_layer(&it.store, 2);
        }),
        ("collected", |it| {
            assert!(it.store.delete(&snapshot(1)).unwrap());
            assert_eq!(collect_all(&it.store, Roots::default()).layers, [layer(1), layer(2)]);
        }),
    ];
    for (what, event) in events {
        // Between two pieces, and after the last one.
        for at_most in [20_000, u64::MAX] {
            let it = Whole::new();
            let mut sealing = it.store.begin_seal(&layer(2)).unwrap().unwrap();
            event(&it);
            let sealed = it.store.seal(&mut sealing, at_most).unwrap();
            assert_eq!(sealed, SealProgress::Changed, "{what}");
            assert_eq!(names(&it.place.agent().join("digests")), Vec::<String>::new(), "{what}");
        }
    }
    let it = Whole::new();
    assert!(it.store.begin_seal(&layer(9)).unwrap().is_none(), "one that is not there");
}

#[test]
fn a_digest_of_a_layer_that_is_gone_is_swept() {
    let it = sealed();
    it.get().unwrap().unwrap();
    let digests = it.place.agent().join("digests");
    assert_eq!(names(&digests).len(), 4, "{:?}", names(&digests));
    fs::write(digests.join(layer(8).as_str()), "of nothing").unwrap();
    fs::write(digests.join("strange"), "").unwrap();
    fs::write(digests.join(".making-ly-00000009"), "half").unwrap();
    collect_all(&it.store, Roots::default());
    let with_maker = [".making-ly-00000009", "ly-00000001", "ly-00000001.verified", "ly-00000002"];
    assert_eq!(names(&digests)[..4], with_maker);
    assert_eq!(names(&digests).len(), 5);
    // One that is young keeps its digest, and one that goes does not.
    assert!(it.store.delete(&snapshot(1)).unwrap());
    it.store.collect(|| Ok(Roots::default()), HOUR).unwrap();
    assert!(digest_of(&it, 1).exists() && digest_of(&it, 2).exists());
    collect_all(&it.store, Roots { layers: [layer(2)].into(), ..Roots::default() });
    assert_eq!(names(&digests), [".making-ly-00000009", "ly-00000002", "ly-00000002.verified"]);
    // What a process that was killed was making is nobody's.
    it.place.store();
    assert_eq!(names(&digests), ["ly-00000002", "ly-00000002.verified"]);
}

#[test]
fn a_digest_that_is_not_what_it_was_is_refused_by_its_own_name() {
    let it = sealed();
    let path = digest_of(&it, 2);
    let good = fs::read(&path).unwrap();
    for at in [0, good.len() / 3, good.len() / 2, good.len() - 2] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, bad).unwrap();
        let error = it.get().unwrap_err();
        assert!(error.to_string().contains(path.as_str()), "{error}");
    }
    fs::write(&path, fs::read(digest_of(&it, 1)).unwrap()).unwrap();
    let error = it.get().unwrap_err();
    assert!(matches!(error, SnapshotStoreError::Mismatch { field: "layer", .. }), "{error:?}");
    // Who removes it says that the layer is to be taken as it is.
    fs::remove_file(&path).unwrap();
    assert_eq!(it.get().unwrap().unwrap(), it.kept);
}

#[test]
fn a_full_disk_leaves_a_layer_without_a_digest() {
    let place = Place::new();
    prepare(&place);
    let full = Arc::new(Mutex::new(true));
    let watched = Arc::clone(&full);
    let observer = move || {
        if *watched.lock().unwrap() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    };
    let store = Snapshots::open_watched(&place.agent(), observer).unwrap();
    let error = seal(&store, &layer(1)).unwrap_err();
    assert!(error.is_no_space(), "{error:?}");
    assert!(store.get(&snapshot(1)).unwrap().is_some());
    *full.lock().unwrap() = false;
    assert!(matches!(seal(&store, &layer(1)).unwrap(), Some(SealProgress::Sealed(_))));
}
