//! Each operation, stopped after each of its steps: by a crash, which leaves the disk as it is then, and by
//! an error, after which the operation cleans up.

use std::{
    io,
    sync::{Arc, Mutex},
};

use super::*;
use crate::snapshots::steps::{Step, Steps};

const HOLD: &[Step] = &[
    Step::BaseIsBegun,
    Step::MemoryHasOurName,
    Step::DiskHasOurName,
    Step::BaseManifestIsWritten,
    Step::BaseIsDurable,
    Step::BaseIsInPlace,
    Step::BasePlaceIsDurable,
];
const HOLD_ZEROS: &[Step] = &[
    Step::BaseIsBegun,
    Step::MemoryHasOurName,
    Step::BaseManifestIsWritten,
    Step::BaseIsDurable,
    Step::BaseIsInPlace,
    Step::BasePlaceIsDurable,
];
const COMMIT: &[Step] = &[
    Step::MakingIsBegun,
    Step::LayersAreDurable,
    Step::FilesAreDurable,
    Step::ManifestIsWritten,
    Step::ManifestHasItsName,
    Step::DirectoryIsDurable,
    Step::IsInPlace,
    Step::PlaceIsDurable,
];
const DELETE: &[Step] = &[Step::ManifestIsGone, Step::ThatIsDurable, Step::FilesAreGone, Step::AllIsDurable];
/// Of two layers and a base that nothing reaches.
const COLLECT: &[Step] = &[
    Step::LayerIsAside,
    Step::LayerIsAside,
    Step::BaseIsAside,
    Step::AsideIsDurable,
    Step::AsideIsRemoved,
    Step::AsideIsRemoved,
    Step::AsideIsRemoved,
];

/// Snapshot 1 stands on base 1 and on layers 2 and 1.
pub(super) fn prepare(place: &Place) -> BaseKey {
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap().key;
    let layers = [write_layer(&store, 2), write_layer(&store, 1)];
    make(&store, 1, &base, &layers);
    base
}

/// Snapshot 2 stands on the same base, and on layers 3 and 1.
pub(super) fn commit_second(store: &Snapshots, base: &BaseKey) -> SnapshotsResult<Kept> {
    let layers = [write_layer(store, 3), layer(1)];
    let making = store.begin(snapshot(2))?;
    fill(&making, 2);
    making.commit(about(base, &layers))
}

/// What a crash after each step of `operation` leaves: the whole store as it was then, elsewhere.
pub(super) fn crashes(place: &Place, operation: impl FnOnce(&Snapshots)) -> Vec<(Step, Place)> {
    let crashes = Arc::new(Mutex::new(Vec::new()));
    let observer = {
        let (crashes, agent) = (crashes.clone(), place.agent());
        move |step| {
            let crash = Place::new();
            link_directory(&agent, &crash.agent());
            crashes.lock().unwrap().push((step, crash));
            Ok(())
        }
    };
    let store = Snapshots::open_observed(&place.agent(), Steps::observed(observer)).unwrap();
    operation(&store);
    drop(store);
    Arc::into_inner(crashes).unwrap().into_inner().unwrap()
}

/// The same files under other names: none of them is written to any more, or is written anew.
fn link_directory(from: &Utf8Path, to: &Utf8Path) {
    fs::create_dir(to).unwrap();
    for entry in from.read_dir_utf8().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            link_directory(entry.path(), &target);
        } else {
            fs::hard_link(entry.path(), &target).unwrap();
        }
    }
}

/// A store of which the step `number` of those to come fails.
pub(super) fn failing_after(place: &Place, number: usize) -> Snapshots {
    let count = Mutex::new(0);
    let observer = move |_| {
        let mut count = count.lock().unwrap();
        *count += 1;
        if *count == number + 1 { Err(io::Error::other("injected")) } else { Ok(()) }
    };
    Snapshots::open_observed(&place.agent(), Steps::observed(observer)).unwrap()
}

/// The numbers of the snapshots, each of which is whole and can be used.
pub(super) fn whole(store: &Snapshots) -> Vec<SnapshotId> {
    let all = store.all().unwrap();
    all.into_iter()
        .map(|(id, kept)| {
            assert_eq!(store.get(&id).unwrap().unwrap(), kept.unwrap());
            id
        })
        .collect()
}

/// Nothing half made, nothing half removed.
pub(super) fn assert_tidy(place: &Place) {
    for folder in ["bases", "disks", "digests", "snapshots"] {
        for name in names(&place.agent().join(folder)) {
            assert!(!name.starts_with('.'), "{folder}/{name}");
        }
    }
}

/// What is left goes on working: a collect leaves what snapshots stand on, and a begin, commit and delete of
/// another snapshot do what they do.
pub(super) fn assert_goes_on(place: &Place, store: &Snapshots, base: &BaseKey) {
    let before = whole(store);
    collect_all(store, Roots::default());
    assert_eq!(whole(store), before);
    let second = before.contains(&snapshot(2));
    let expected: &[u32] = match (before.contains(&snapshot(1)), second) {
        (true, true) => &[1, 2, 3],
        (true, false) => &[1, 2],
        (false, true) => &[1, 3],
        (false, false) => &[],
    };
    let expected: Vec<String> = expected.iter().map(|number| layer(*number).to_string()).collect();
    assert_eq!(names(&place.agent().join("disks")), expected);

    assert_eq!(store.hold(&warm(&place.at, 1)).unwrap().key, *base);
    let layers = [write_layer(store, 9)];
    make(store, 9, base, &layers);
    assert!(store.delete(&snapshot(9)).unwrap());
    assert_eq!(whole(store), before);
    assert_tidy(place);
}

#[test]
fn a_crash_at_any_step_of_a_commit_leaves_the_old_or_the_new() {
    let place = Place::new();
    let base = prepare(&place);
    let crashes = crashes(&place, |store| drop(commit_second(store, &base).unwrap()));
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), COMMIT);
    for (step, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        let new = matches!(step, Step::IsInPlace | Step::PlaceIsDurable);
        let expected = if new { vec![snapshot(1), snapshot(2)] } else { vec![snapshot(1)] };
        assert_eq!(whole(&store), expected, "{step:?}");
        assert_goes_on(&crash, &store, &base);
        if !new {
            commit_second(&store, &base).unwrap();
        }
    }
}

#[test]
fn a_crash_at_any_step_of_a_delete_leaves_the_old_or_none() {
    let place = Place::new();
    let base = prepare(&place);
    commit_second(&place.store(), &base).unwrap();
    let crashes = crashes(&place, |store| assert!(store.delete(&snapshot(2)).unwrap()));
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), DELETE);
    for (step, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        assert_eq!(names(&crash.agent().join("snapshots")), [snapshot(1).as_str()], "{step:?}");
        // The first step is what deletes it.
        assert_eq!(whole(&store), [snapshot(1)], "{step:?}");
        assert!(!store.delete(&snapshot(2)).unwrap());
        assert_goes_on(&crash, &store, &base);
        commit_second(&store, &base).unwrap();
    }
}

#[test]
fn a_crash_at_any_step_of_a_hold_leaves_none_or_a_whole_base() {
    let place = Place::new();
    let old = prepare(&place);
    let warm = place.warm(2);
    let key = BaseKey::of(&warm.manifest);
    let crashes = crashes(&place, |store| drop(store.hold(&warm).unwrap()));
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), HOLD);
    for (step, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        let there = matches!(step, Step::BaseIsInPlace | Step::BasePlaceIsDurable);
        assert_eq!(store.base(&key).unwrap().is_some(), there, "{step:?}");
        assert_eq!(store.hold(&warm).unwrap().key, key);
        assert_eq!(whole(&store), [snapshot(1)]);
        assert_goes_on(&crash, &store, &old);
    }
}

#[test]
fn a_crash_at_any_step_of_a_hold_of_zeros_leaves_none_or_a_whole_base() {
    let place = Place::new();
    let base = prepare(&place);
    let crashes = crashes(&place, |store| drop(store.hold_zeros(&base).unwrap()));
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), HOLD_ZEROS);
    for (step, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        let there = matches!(step, Step::BaseIsInPlace | Step::BasePlaceIsDurable);
        assert_eq!(store.base(&base.zeros()).unwrap().is_some(), there, "{step:?}");
        assert_eq!(store.hold_zeros(&base).unwrap().key, base.zeros());
        assert_eq!(whole(&store), [snapshot(1)]);
        assert_goes_on(&crash, &store, &base);
    }
    for number in 0..HOLD_ZEROS.len() {
        let place = Place::new();
        let base = prepare(&place);
        let store = failing_after(&place, number);
        store.hold_zeros(&base).unwrap_err();
        assert_tidy(&place);
        store.hold_zeros(&base).unwrap();
        assert_goes_on(&place, &store, &base);
    }
}

/// What nothing reaches, beside what [`prepare`] made.
pub(super) fn litter(place: &Place) {
    let store = place.store();
    store.hold(&place.warm(2)).unwrap();
    write_layer(&store, 7);
    write_layer(&store, 8);
}

#[test]
fn a_crash_at_any_step_of_a_collect_loses_nothing_that_is_reached() {
    let place = Place::new();
    let base = prepare(&place);
    litter(&place);
    let crashes = crashes(&place, |store| {
        let swept = collect_all(store, Roots::default());
        assert_eq!((swept.layers.len(), swept.bases.len()), (2, 1), "{swept:?}");
    });
    assert_eq!(crashes.iter().map(|(step, _)| *step).collect::<Vec<_>>(), COLLECT);
    for (_, crash) in crashes {
        let store = crash.store();
        assert_tidy(&crash);
        assert_eq!(whole(&store), [snapshot(1)]);
        assert_goes_on(&crash, &store, &base);
        assert_eq!(names(&crash.agent().join("bases")), [base.as_str()]);
    }
}

#[test]
fn an_error_at_any_step_of_a_commit_leaves_the_old_and_nothing_else() {
    for (number, step) in COMMIT.iter().enumerate() {
        let place = Place::new();
        let base = prepare(&place);
        let store = failing_after(&place, number);
        commit_second(&store, &base).unwrap_err();
        assert_eq!(whole(&store), [snapshot(1)], "{step:?}");
        assert_tidy(&place);
        assert_goes_on(&place, &store, &base);
        commit_second(&store, &base).unwrap();
        assert_eq!(whole(&store), [snapshot(1), snapshot(2)]);
    }
}

#[test]
fn a_delete_that_failed_at_any_step_goes_on_where_it_failed() {
    for number in 0..DELETE.len() {
        let place = Place::new();
        let base = prepare(&place);
        let store = failing_after(&place, number);
        store.delete(&snapshot(1)).unwrap_err();
        assert_eq!(store.get(&snapshot(1)).unwrap(), None);
        assert_eq!(whole(&store), []);
        if number % 2 == 0 {
            assert!(!store.delete(&snapshot(1)).unwrap());
            assert_eq!(names(&place.agent().join("snapshots")), Vec::<String>::new());
        }
        // Its name is free, whatever is left of it.
        make(&store, 1, &base, &[layer(1)]);
        assert_eq!(whole(&store), [snapshot(1)]);
    }
}

#[test]
fn an_error_at_any_step_of_a_hold_or_a_collect_is_made_good_by_the_next() {
    for number in 0..HOLD.len() {
        let place = Place::new();
        let base = prepare(&place);
        let store = failing_after(&place, number);
        store.hold(&place.warm(2)).unwrap_err();
        assert_tidy(&place);
        store.hold(&place.warm(2)).unwrap();
        assert_goes_on(&place, &store, &base);
    }
    for number in 0..COLLECT.len() {
        let place = Place::new();
        let base = prepare(&place);
        litter(&place);
        let store = failing_after(&place, number);
        store.collect(|| Ok(Roots::default()), Duration::ZERO).unwrap_err();
        assert_eq!(whole(&store), [snapshot(1)]);
        // Even what was aside is made anew and collected again.
        store.hold(&place.warm(2)).unwrap();
        collect_all(&store, Roots::default());
        assert_tidy(&place);
        assert_goes_on(&place, &store, &base);
        assert_eq!(names(&place.agent().join("bases")), [base.as_str()]);
    }
}
