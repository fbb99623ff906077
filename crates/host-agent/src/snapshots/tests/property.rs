//! Sequences of operations against a model of references, and what callers at once see.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::SystemTime,
};

use proptest::prelude::*;

use super::*;
use crate::snapshots::steps::{Step, Steps};

#[derive(Debug, Clone)]
enum Operation {
    /// A sandbox of a template: its base is held, its record names a new layer.
    Create {
        template: u8,
    },
    /// A sandbox of a snapshot: its record names the snapshot's layers, and a new one on top.
    CreateFrom {
        snapshot: usize,
    },
    /// A snapshot of a sandbox, which goes on with a new layer on top, or ends.
    Save {
        sandbox: usize,
        ends: bool,
    },
    /// A sandbox that is saved without memory and boots: its record names a new layer and a base of zeros.
    Boot {
        sandbox: usize,
    },
    /// One that is begun, and dropped.
    Abandon {
        sandbox: usize,
    },
    /// A base that is held for nobody.
    Hold {
        template: u8,
    },
    Delete {
        snapshot: usize,
    },
    End {
        sandbox: usize,
    },
    Collect,
    /// All layers that snapshots name get a digest.
    Seal,
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    let index = 0..8_usize;
    prop_oneof![
        2 => (0..3_u8).prop_map(|template| Operation::Create { template }),
        2 => index.clone().prop_map(|snapshot| Operation::CreateFrom { snapshot }),
        4 => (index.clone(), any::<bool>()).prop_map(|(sandbox, ends)| Operation::Save { sandbox, ends }),
        2 => index.clone().prop_map(|sandbox| Operation::Boot { sandbox }),
        1 => index.clone().prop_map(|sandbox| Operation::Abandon { sandbox }),
        1 => (0..3_u8).prop_map(|template| Operation::Hold { template }),
        2 => index.clone().prop_map(|snapshot| Operation::Delete { snapshot }),
        2 => index.prop_map(|sandbox| Operation::End { sandbox }),
        3 => Just(Operation::Collect),
        1 => Just(Operation::Seal),
        1 => Just(Operation::Reopen),
    ]
}

/// What a record or a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    base: BaseKey,
    layers: Vec<LayerId>,
}

/// What there must be.
#[derive(Debug, Default)]
struct Model {
    sandboxes: Vec<Chain>,
    snapshots: BTreeMap<SnapshotId, Chain>,
    made: u32,
}

impl Model {
    fn number(&mut self) -> u32 {
        self.made += 1;
        self.made
    }

    fn roots(&self) -> Roots {
        reached(self.sandboxes.iter())
    }

    fn reached(&self) -> Roots {
        reached(self.sandboxes.iter().chain(self.snapshots.values()))
    }

    fn sandbox(&self, number: usize) -> Option<usize> {
        (!self.sandboxes.is_empty()).then(|| number % self.sandboxes.len())
    }

    fn snapshot(&self, number: usize) -> Option<SnapshotId> {
        let count = self.snapshots.len();
        (count > 0).then(|| self.snapshots.keys().nth(number % count).unwrap().clone())
    }
}

fn reached<'a>(chains: impl Iterator<Item = &'a Chain>) -> Roots {
    let mut roots = Roots::default();
    for chain in chains {
        roots.layers.extend(chain.layers.iter().cloned());
        roots.bases.extend([chain.base.clone(), chain.base.of_disk()]);
    }
    roots
}

fn perform(place: &Place, store: &mut Snapshots, model: &mut Model, operation: &Operation) {
    match *operation {
        Operation::Create { template } => {
            let base = store.hold(&place.warm(template)).unwrap().key;
            let layers = vec![write_layer(store, model.number())];
            model.sandboxes.push(Chain { base, layers });
        }
        Operation::CreateFrom { snapshot } => {
            let Some(id) = model.snapshot(snapshot) else { return };
            let kept = store.get(&id).unwrap().unwrap();
            let mut layers = vec![write_layer(store, model.number())];
            layers.extend(kept.about.layers);
            model.sandboxes.push(Chain { base: kept.about.base, layers });
        }
        Operation::Save { sandbox, ends } => {
            let Some(sandbox) = model.sandbox(sandbox) else { return };
            let number = model.number();
            let chain = model.sandboxes[sandbox].clone();
            make(store, number, &chain.base, &chain.layers);
            model.snapshots.insert(snapshot(number), chain);
            if ends {
                model.sandboxes.remove(sandbox);
            } else {
                let next = write_layer(store, model.number());
                model.sandboxes[sandbox].layers.insert(0, next);
            }
        }
        Operation::Boot { sandbox } => {
            let Some(sandbox) = model.sandbox(sandbox) else { return };
            let base = store.hold_zeros(&model.sandboxes[sandbox].base).unwrap();
            let next = write_layer(store, model.number());
            model.sandboxes[sandbox].layers.insert(0, next);
            model.sandboxes[sandbox].base = base.key;
        }
        Operation::Abandon { sandbox } => {
            let Some(sandbox) = model.sandbox(sandbox) else { return };
            let making = store.begin(snapshot(model.number())).unwrap();
            fill(&making, 3);
            drop(making);
            assert!(sandbox < model.sandboxes.len());
        }
        Operation::Hold { template } => drop(store.hold(&place.warm(template)).unwrap()),
        Operation::Delete { snapshot } => {
            let Some(id) = model.snapshot(snapshot) else { return };
            assert!(store.delete(&id).unwrap());
            model.snapshots.remove(&id);
        }
        Operation::End { sandbox } => {
            let Some(sandbox) = model.sandbox(sandbox) else { return };
            model.sandboxes.remove(sandbox);
        }
        Operation::Collect => {
            let swept = collect_all(store, model.roots());
            assert_eq!((swept.young, &swept.unreadable), (0, &Vec::new()));
            // All that is not reached is gone.
            assert_eq!(on_disk(place), model.reached());
            let sealed = store.layers_with_digest().unwrap();
            assert!(sealed.iter().all(|layer| model.reached().layers.contains(layer)), "{sealed:?}");
        }
        Operation::Seal => {
            for layer in store.layers_without_digest(BTreeSet::new()).unwrap() {
                let sealed = seal(store, &layer).unwrap().unwrap();
                assert!(matches!(sealed, SealProgress::Sealed(_)), "{sealed:?}");
            }
        }
        Operation::Reopen => *store = place.store(),
    }
}

fn on_disk(place: &Place) -> Roots {
    let names = |folder: &str| names(&place.agent().join(folder));
    Roots {
        layers: names("disks").iter().map(|name| name.parse().unwrap()).collect(),
        bases: names("bases").iter().map(|name| name.parse().unwrap()).collect(),
    }
}

fn check(place: &Place, store: &Snapshots, model: &Model) {
    let (reached, there) = (model.reached(), on_disk(place));
    assert!(reached.layers.is_subset(&there.layers), "{reached:?} but {there:?}");
    assert!(reached.bases.is_subset(&there.bases), "{reached:?} but {there:?}");
    let found: BTreeMap<SnapshotId, Chain> = store
        .all()
        .unwrap()
        .into_iter()
        .map(|(id, kept)| {
            let about = kept.unwrap().about;
            (id, Chain { base: about.base, layers: about.layers })
        })
        .collect();
    assert_eq!(found, model.snapshots);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_reached_stays_and_a_collect_removes_all_else(
        operations in proptest::collection::vec(operation(), 1..30),
    ) {
        let place = Place::new();
        let (mut store, mut model) = (place.store(), Model::default());
        for operation in operations.iter().chain([&Operation::Collect]) {
            perform(&place, &mut store, &mut model, operation);
            check(&place, &store, &model);
        }
        for id in model.snapshots.keys() {
            prop_assert!(store.get(id).unwrap().is_some());
        }
    }
}

fn make_old(path: &Utf8Path) {
    fs::File::open(path).unwrap().set_modified(SystemTime::now() - 2 * HOUR).unwrap();
}

#[test]
fn what_was_just_made_or_used_is_within_the_grace() {
    let place = Place::new();
    let store = place.store();
    let warm = place.warm(1);
    let base = store.hold(&warm).unwrap();
    let used = write_layer(&store, 1);
    make(&store, 1, &base.key, std::slice::from_ref(&used));
    let old = write_layer(&store, 2);
    for path in [&store.layer_path(&used), &store.layer_path(&old), &base.dir] {
        make_old(path);
    }
    let new = write_layer(&store, 3);
    // Who has a snapshot may name its layers in a record, though it is deleted meanwhile.
    store.get(&snapshot(1)).unwrap().unwrap();
    store.delete(&snapshot(1)).unwrap();
    let swept = store.collect(|| Ok(Roots::default()), HOUR).unwrap();
    assert_eq!((&swept.layers[..], swept.young), (&[old][..], 3), "{swept:?}");
    assert_eq!(names(&place.agent().join("disks")), [used.as_str(), new.as_str()]);

    // A use begins it anew for a base that was held long ago.
    for begin in
        [(|store, warm| drop(store.hold(warm).unwrap())) as fn(&Snapshots, &WarmSnapshot), |store, warm| {
            drop(store.base(&BaseKey::of(&warm.manifest)).unwrap().unwrap())
        }]
    {
        make_old(&base.dir);
        begin(&store, &warm);
        assert_eq!(store.collect(|| Ok(Roots::default()), HOUR).unwrap().bases, []);
    }
    make_old(&base.dir);
    assert_eq!(store.collect(|| Ok(Roots::default()), HOUR).unwrap().bases, [base.key]);
}

#[test]
fn nothing_is_removed_while_a_manifest_cannot_be_read() {
    let place = Place::new();
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap().key;
    let kept = make(&store, 1, &base, &[write_layer(&store, 1)]);
    write_layer(&store, 2);
    let manifest = kept.dir.join("manifest.json");
    let text = fs::read(&manifest).unwrap();
    fs::write(&manifest, &text[..100]).unwrap();
    let swept = collect_all(&store, Roots::default());
    assert_eq!(swept, Swept { unreadable: vec![snapshot(1)], ..Swept::default() });
    assert_eq!(names(&place.agent().join("disks")).len(), 2);
    fs::write(&manifest, &text).unwrap();
    assert_eq!(collect_all(&store, Roots::default()).layers, [layer(2)]);
}

#[test]
fn nothing_is_removed_where_the_records_cannot_be_read() {
    let place = Place::new();
    let store = place.store();
    write_layer(&store, 1);
    let failed = store.collect(
        || {
            let path = Utf8PathBuf::from("records");
            Err(SnapshotStoreError::File {
                operation: "read",
                path,
                source: std::io::ErrorKind::Other.into(),
            })
        },
        Duration::ZERO,
    );
    failed.unwrap_err();
    assert_eq!(names(&place.agent().join("disks")), [layer(1).as_str()]);
}

#[test]
fn files_that_nothing_can_name_go_too_and_shared_ones_free_nothing() {
    let place = Place::new();
    let store = place.store();
    store.hold(&place.warm(1)).unwrap();
    fs::write(place.agent().join("disks/ly-0000000g"), [1; 100]).unwrap();
    fs::create_dir_all(place.agent().join("bases/strange/deep")).unwrap();
    let swept = collect_all(&store, Roots::default());
    assert_eq!(swept.bases.len(), 1);
    assert_eq!(swept.others.iter().collect::<BTreeSet<_>>().len(), 2, "{swept:?}");
    assert!(on_disk(&place) == Roots::default());
    // The base's files are the cache's.
    assert!(swept.freed_bytes < 100_000, "{swept:?}");
}

#[test]
fn no_snapshot_comes_or_goes_until_the_records_were_read() {
    for awaited in [Step::ManifestIsGone, Step::IsInPlace] {
        let place = Place::new();
        let base = place.store().hold(&place.warm(1)).unwrap().key;
        let chain = [write_layer(&place.store(), 1)];
        make(&place.store(), 1, &base, &chain);
        let (done, is_done) = mpsc::channel();
        let done = Mutex::new(done);
        let observer = move |step| {
            if step == awaited {
                done.lock().unwrap().send(step).unwrap();
            }
            Ok(())
        };
        let store = Snapshots::open_observed(&place.agent(), Steps::observed(observer)).unwrap();
        thread::scope(|scope| {
            let roots = || {
                scope.spawn(|| match awaited {
                    Step::ManifestIsGone => assert!(store.delete(&snapshot(1)).unwrap()),
                    _ => drop(make(&store, 2, &base, &chain)),
                });
                assert!(is_done.recv_timeout(Duration::from_millis(500)).is_err(), "{awaited:?}");
                Ok(Roots::default())
            };
            let swept = store.collect(roots, Duration::ZERO).unwrap();
            assert_eq!(swept, Swept::default());
            is_done.recv_timeout(Duration::from_secs(60)).unwrap();
        });
    }
}

#[test]
fn what_passes_between_records_and_manifests_is_never_collected() {
    let place = Place::new();
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap().key;
    let layers = vec![write_layer(&store, 1)];
    let chain = Chain { base, layers };
    let records = Arc::new(Mutex::new(vec![chain.clone()]));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Acquire) {
                let roots = || Ok(reached(records.lock().unwrap().iter()));
                let swept = store.collect(roots, Duration::ZERO).unwrap();
                assert_eq!(swept, Swept::default());
                count += 1;
            }
            count
        });
        for number in 2..40 {
            // Pause: the manifest, then the record goes. Resume: the record, then the snapshot goes.
            make(&store, number, &chain.base, &chain.layers);
            records.lock().unwrap().clear();
            let kept = store.get(&snapshot(number)).unwrap().unwrap();
            records.lock().unwrap().push(Chain { base: kept.about.base, layers: kept.about.layers });
            assert!(store.delete(&snapshot(number)).unwrap());
        }
        done.store(true, Ordering::Release);
        assert!(collector.join().unwrap() > 0);
    });
    assert!(store.layer_path(&layer(1)).exists());
}

#[test]
fn many_at_once_hold_and_get_the_same() {
    let place = Place::new();
    let store = place.store();
    let warm = place.warm(1);
    let base = BaseKey::of(&warm.manifest);
    thread::scope(|scope| {
        let held: Vec<_> = (0..8).map(|_| scope.spawn(|| store.hold(&warm).unwrap())).collect();
        for held in held {
            assert_eq!(held.join().unwrap().key, base);
        }
    });
    assert_eq!(names(&place.agent().join("bases")), [base.as_str()]);
    let kept = make(&store, 1, &base, &[write_layer(&store, 1)]);
    for forgotten in [kept.dir.join("verified.json"), store.base_dir(&base).join("verified.json")] {
        fs::remove_file(forgotten).unwrap();
    }
    thread::scope(|scope| {
        let got: Vec<_> = (0..8).map(|_| scope.spawn(|| store.get(&snapshot(1)).unwrap())).collect();
        for got in got {
            assert_eq!(got.join().unwrap().unwrap(), kept);
        }
    });
}
