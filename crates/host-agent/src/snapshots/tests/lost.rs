//! Each operation, stopped after each of its steps by a crash of the host, which loses what was not synced.
//!
//! The crashes of [`super::crash`] are those of the process: all that was written is there. Here a disk is played that
//! keeps no more than it promised:
//!
//! - of a file, what was in it when it was last synced. One that was written to since, or that was never synced, is
//!   found empty, or as long as it was and full of zeros;
//! - of a directory, the names that it had when it was last synced, or those that it has by now: each of them on its
//!   own, in every combination.
//!
//! What is synced is heard of where it is done ([`DURABLE`]). What was there before an operation is all on disk.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    os::fd::AsRawFd,
    sync::{Arc, Mutex},
};

use super::{
    crash::{assert_goes_on, assert_tidy, commit_second, litter, prepare, whole},
    *,
};
use crate::{
    snapshot_store::files::DURABLE,
    snapshots::steps::{Step, Steps},
};

type Names = BTreeMap<String, Entry>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    inode: u64,
    is_directory: bool,
}

/// What is on the disk for certain, by inode. All of it is held open: what is removed stays to be read, and no other
/// file gets its number.
#[derive(Debug, Default)]
struct Disk {
    files: HashMap<u64, (File, Vec<u8>)>,
    directories: HashMap<u64, (File, Names)>,
}

/// What is found of a file that was not synced.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Nothing,
    Zeros,
}

/// A file that is open, whatever has become of its name.
fn held(file: &File) -> Utf8PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn names_in(directory: &Utf8Path) -> Names {
    let entries = directory.read_dir_utf8().unwrap().map(|entry| {
        let entry = entry.unwrap();
        let about = fs::symlink_metadata(entry.path()).unwrap();
        (entry.file_name().to_owned(), Entry { inode: about.ino(), is_directory: about.is_dir() })
    });
    entries.collect()
}

impl Disk {
    /// All below `directory` is on disk.
    fn take_all(&mut self, directory: &Utf8Path) {
        for (name, entry) in names_in(directory) {
            let path = directory.join(name);
            if entry.is_directory {
                self.take_all(&path);
            } else {
                self.synced(&File::open(&path).unwrap());
            }
        }
        self.synced(&File::open(directory).unwrap());
    }

    fn synced(&mut self, file: &File) {
        let about = file.metadata().unwrap();
        // One that is open for writing alone is not to be read.
        let file = File::open(held(file)).unwrap();
        if !about.is_dir() {
            let bytes = fs::read(held(&file)).unwrap();
            self.files.insert(about.ino(), (file, bytes));
            return;
        }
        let names = names_in(&held(&file));
        for (name, Entry { inode, .. }) in names.iter().filter(|(_, entry)| entry.is_directory) {
            // Its name is certain now, and nothing in it.
            self.directories
                .entry(*inode)
                .or_insert_with(|| (File::open(held(&file).join(name)).unwrap(), Names::new()));
        }
        self.directories.insert(about.ino(), (file, names));
    }

    /// The directories at and below `directory` whose names are not all on disk, in either state of them.
    fn unsettled(&self, directory: &Utf8Path, into: &mut BTreeSet<u64>) {
        let inode = fs::metadata(directory).unwrap().ino();
        let (now, then) = (names_in(directory), self.names_on_disk(inode));
        for (name, entry) in now.iter().chain(&then).filter(|(_, entry)| entry.is_directory) {
            self.unsettled(&self.live(entry.inode, directory, name), into);
        }
        if now != then {
            into.insert(inode);
        }
    }

    fn names_on_disk(&self, inode: u64) -> Names {
        self.directories.get(&inode).map(|(_, names)| names.clone()).unwrap_or_default()
    }

    /// Where a directory can be looked at now.
    fn live(&self, inode: u64, parent: &Utf8Path, name: &str) -> Utf8PathBuf {
        self.directories.get(&inode).map_or_else(|| parent.join(name), |(file, _)| held(file))
    }

    /// Makes `to` what is found of `directory`; those of `stale` have the names that are on disk, all others those that
    /// they have by now.
    fn find(&self, directory: &Utf8Path, to: &Utf8Path, stale: &BTreeSet<u64>, loss: Loss) {
        fs::create_dir(to).unwrap();
        let inode = fs::metadata(directory).unwrap().ino();
        let names = if stale.contains(&inode) { self.names_on_disk(inode) } else { names_in(directory) };
        for (name, entry) in names {
            let target = to.join(&name);
            if entry.is_directory {
                self.find(&self.live(entry.inode, directory, &name), &target, stale, loss);
            } else {
                fs::write(&target, self.content(entry.inode, &directory.join(&name), loss)).unwrap();
            }
        }
    }

    fn content(&self, inode: u64, path: &Utf8Path, loss: Loss) -> Vec<u8> {
        let bytes = match self.files.get(&inode) {
            Some((file, on_disk)) => match fs::read(held(file)).unwrap() {
                now if now == *on_disk => return now,
                now => now.len(),
            },
            None => fs::metadata(path).map_or(0, |about| usize::try_from(about.len()).unwrap()),
        };
        match loss {
            Loss::Nothing => Vec::new(),
            Loss::Zeros => vec![0; bytes],
        }
    }

    /// All that a crash now may leave of the store at `directory`, and of each whether it is as much as there may be, or
    /// as little.
    fn crashes(&self, directory: &Utf8Path) -> Vec<(bool, Place)> {
        let mut unsettled = BTreeSet::new();
        self.unsettled(directory, &mut unsettled);
        let unsettled: Vec<u64> = unsettled.into_iter().collect();
        let mut crashes = Vec::new();
        for choice in 0..1_usize << unsettled.len() {
            let is_stale = |(number, _): &(usize, &u64)| choice >> number & 1 == 1;
            let stale: BTreeSet<u64> =
                unsettled.iter().enumerate().filter(is_stale).map(|(_, inode)| *inode).collect();
            let is_extreme = stale.is_empty() || stale.len() == unsettled.len();
            for loss in [Loss::Nothing, Loss::Zeros] {
                let crash = Place::new();
                self.find(directory, &crash.agent(), &stale, loss);
                crashes.push((is_extreme, crash));
            }
        }
        crashes
    }
}

/// What an operation did, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// This inode was synced.
    Synced(u64),
    Did(Step),
}

/// A crash of the host.
struct Crash {
    after: Step,
    /// As much is left as there may be, or as little.
    is_extreme: bool,
    place: Place,
}

/// What crashes of the host after each step of `operation` leave, and what it did.
fn lost(place: &Place, operation: impl FnOnce(&Snapshots)) -> (Vec<Crash>, Vec<Event>) {
    struct Told {
        disk: Disk,
        crashes: Vec<Crash>,
        events: Vec<Event>,
    }
    let mut disk = Disk::default();
    disk.take_all(&place.at);
    let told = Arc::new(Mutex::new(Told { disk, crashes: Vec::new(), events: Vec::new() }));
    let observer = {
        let (told, agent) = (Arc::clone(&told), place.agent());
        move |after| {
            let mut told = told.lock().unwrap();
            told.events.push(Event::Did(after));
            let crashes = told.disk.crashes(&agent);
            let crashes = crashes.into_iter().map(|(is_extreme, place)| Crash { after, is_extreme, place });
            told.crashes.extend(crashes);
            Ok(())
        }
    };
    let store = Snapshots::open_observed(&place.agent(), Steps::observed(observer)).unwrap();
    let hears = Arc::clone(&told);
    DURABLE.set(Some(Box::new(move |file| {
        let mut told = hears.lock().unwrap();
        told.events.push(Event::Synced(file.metadata().unwrap().ino()));
        told.disk.synced(file);
    })));
    operation(&store);
    DURABLE.set(None);
    drop(store);
    let Told { crashes, events, .. } = Arc::into_inner(told).unwrap().into_inner().unwrap();
    assert!(!crashes.is_empty());
    (crashes, events)
}

/// The snapshots that are there, each of which is whole. A layer without a digest is read here, since nothing else would.
fn whole_to_the_last_byte(store: &Snapshots) -> Vec<SnapshotId> {
    let found = whole(store);
    for id in &found {
        for layer in store.get(id).unwrap().unwrap().about.layers {
            assert!(fs::read(store.layer_path(&layer)).unwrap() == [9; 50_000], "{id} {layer}");
        }
    }
    found
}

#[test]
fn a_manifest_gets_its_name_when_all_that_it_names_is_on_disk() {
    let place = Place::new();
    let base = prepare(&place);
    let (_, events) = lost(&place, |store| drop(commit_second(store, &base).unwrap()));
    let at = |wanted: Event| events.iter().position(|event| *event == wanted);
    let did = |step| at(Event::Did(step)).unwrap();
    let inode = |path: &str| fs::metadata(place.agent().join(path)).unwrap().ino();
    let synced = |path: &str| at(Event::Synced(inode(path))).unwrap_or_else(|| panic!("{path}: {events:?}"));

    let (layers, made) = ([layer(3), layer(1)], snapshot(2));
    let mut named: Vec<String> = layers.iter().map(|layer| format!("disks/{layer}")).collect();
    named.extend(["state", "pages", "manifest.json"].map(|name| format!("snapshots/{made}/{name}")));
    // The names of the layers are names too.
    named.push("disks".to_owned());
    for name in named {
        assert!(synced(&name) < did(Step::ManifestHasItsName), "{name}: {events:?}");
    }
    let whole = synced(&format!("snapshots/{made}"));
    assert!(did(Step::ManifestHasItsName) < whole && whole < did(Step::IsInPlace), "{events:?}");
    assert!(did(Step::IsInPlace) < synced("snapshots"), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Did(Step::PlaceIsDurable)), "and only then it is there");
}

#[test]
fn a_commit_that_loses_what_was_not_synced_leaves_the_old_or_the_new() {
    let place = Place::new();
    let base = prepare(&place);
    let (crashes, _) = lost(&place, |store| drop(commit_second(store, &base).unwrap()));
    let (old, new) = (vec![snapshot(1)], vec![snapshot(1), snapshot(2)]);
    let mut was_new_early = false;
    for Crash { after, is_extreme, place } in crashes {
        let store = place.store();
        assert_tidy(&place);
        let found = whole_to_the_last_byte(&store);
        match after {
            Step::IsInPlace => {
                was_new_early |= found == new;
                assert!(found == old || found == new, "{found:?}");
            }
            Step::PlaceIsDurable => assert_eq!(found, new),
            _ => assert_eq!(found, old, "{after:?}"),
        }
        if is_extreme {
            assert_goes_on(&place, &store, &base);
            if found == old {
                commit_second(&store, &base).unwrap();
            }
        }
    }
    assert!(was_new_early, "a name may be on disk before it has to be");
}

#[test]
fn a_delete_that_loses_what_was_not_synced_leaves_the_old_or_none() {
    let place = Place::new();
    let base = prepare(&place);
    commit_second(&place.store(), &base).unwrap();
    let (crashes, _) = lost(&place, |store| assert!(store.delete(&snapshot(2)).unwrap()));
    let mut came_back = false;
    for Crash { after, is_extreme, place } in crashes {
        let store = place.store();
        assert_tidy(&place);
        let found = whole_to_the_last_byte(&store);
        if after == Step::ManifestIsGone && found.len() == 2 {
            came_back = true;
        } else {
            assert_eq!(found, [snapshot(1)], "{after:?}");
        }
        if is_extreme {
            assert_goes_on(&place, &store, &base);
        }
    }
    assert!(came_back, "what is not gone for certain is whole");
}

#[test]
fn a_hold_that_loses_what_was_not_synced_leaves_none_or_a_whole_base() {
    let place = Place::new();
    let base = prepare(&place);
    let warm = place.warm(2);
    let key = BaseKey::of(&warm.manifest);
    let (of_warm, _) = lost(&place, |store| drop(store.hold(&warm).unwrap()));
    let (of_zeros, _) = lost(&place, |store| drop(store.hold_zeros(&base).unwrap()));
    let all = of_warm.into_iter().map(|crash| (&key, crash));
    for (key, Crash { after, is_extreme, place }) in
        all.chain(of_zeros.into_iter().map(|crash| (&base, crash)))
    {
        let store = place.store();
        assert_tidy(&place);
        let made = if *key == base { base.zeros() } else { key.clone() };
        let found = store.base(&made).unwrap();
        match after {
            Step::BaseIsInPlace => {}
            Step::BasePlaceIsDurable => assert!(found.is_some(), "{after:?}"),
            _ => assert_eq!(found, None, "{after:?}"),
        }
        if *key == base {
            assert_eq!(store.hold_zeros(key).unwrap().key, made);
        } else {
            assert_eq!(store.hold(&warm).unwrap().key, made);
        }
        assert_eq!(whole_to_the_last_byte(&store), [snapshot(1)]);
        if is_extreme {
            assert_goes_on(&place, &store, &base);
        }
    }
}

#[test]
fn a_collect_and_a_digest_that_lose_what_was_not_synced_harm_no_snapshot() {
    let place = Place::new();
    let base = prepare(&place);
    litter(&place);
    let (collected, _) = lost(&place, |store| drop(collect_all(store, Roots::default())));
    let (sealed, _) = lost(&place, |store| {
        let sealed = seal(store, &layer(1)).unwrap();
        assert!(matches!(sealed, Some(SealProgress::Sealed(_))), "{sealed:?}");
    });
    for Crash { is_extreme, place, .. } in collected.into_iter().chain(sealed) {
        let store = place.store();
        assert_tidy(&place);
        assert_eq!(whole_to_the_last_byte(&store), [snapshot(1)]);
        if is_extreme {
            assert_goes_on(&place, &store, &base);
        }
    }
}
