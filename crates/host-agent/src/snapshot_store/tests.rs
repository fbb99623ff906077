//! The store as its users see it, and as a crash leaves it.

use std::{fs, os::unix::fs::FileExt, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::{DiskMib, MemoryMib, Shape, Vcpus};
use wrenn_vmm::{Accelerator, DiskFormat, VmmIdentity};

use super::{
    Begin, Building, Damage, SnapshotStore, SnapshotStoreError, Subject, Verification, building::Step,
};
use crate::rootfs::own_filesystem::{self, Kind};

const SOON: Duration = Duration::from_secs(20);
const MEMORY_BYTES: u64 = 128 << 20;

fn subject() -> Subject {
    Subject {
        guest: "0011223344556677".to_owned(),
        image: "8899aabbccddeeff".to_owned(),
        vmm: VmmIdentity {
            name: "fake".to_owned(),
            version: "1".to_owned(),
            machine: "none".to_owned(),
            cpu_model: "none".to_owned(),
            accelerator: Accelerator::Tcg,
        },
        shape: Shape { vcpus: Vcpus::default(), memory: MemoryMib::new(128).unwrap() },
        disk: DiskMib::default(),
        disk_format: DiskFormat::Qcow2,
    }
}

struct Place {
    _guard: tempfile::TempDir,
    at: Utf8PathBuf,
}

impl Place {
    fn new() -> Self {
        let guard = tempfile::tempdir().unwrap();
        let at = Utf8PathBuf::from_path_buf(guard.path().canonicalize().unwrap()).unwrap();
        Self { _guard: guard, at }
    }

    fn store(&self) -> SnapshotStore {
        store_in(&self.at)
    }

    fn snapshots(&self) -> Utf8PathBuf {
        self.at.join("snapshots")
    }
}

fn store_in(at: &Utf8Path) -> SnapshotStore {
    SnapshotStore::new(&at.join("snapshots"), &at.join("run")).unwrap()
}

async fn begin(store: &SnapshotStore) -> Building {
    match store.begin(&subject(), SOON).await.unwrap() {
        Begin::Building(building) => building,
        Begin::Ready(snapshot) => panic!("{snapshot:?} is there already"),
    }
}

/// Does what a template machine does: `mark` is in each of the files.
fn fill(building: &Building, mark: u8) {
    let memory = fs::File::create(building.files().memory).unwrap();
    memory.set_len(MEMORY_BYTES).unwrap();
    memory.write_all_at(&[mark; 5000], 1 << 20).unwrap();
    fs::write(building.files().state, [mark; 60_000]).unwrap();
    fs::write(building.disk(), [mark; 300_000]).unwrap();
}

async fn make(store: &SnapshotStore, mark: u8) -> super::WarmSnapshot {
    let building = begin(store).await;
    fill(&building, mark);
    building.commit().unwrap()
}

/// Everything in the store but the locks, which are empty and stay.
fn names(at: &Utf8Path) -> Vec<String> {
    let mut names: Vec<String> =
        at.read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned()).collect();
    names.retain(|name| !name.starts_with(".lock-"));
    names.sort();
    names
}

fn flip(path: &Utf8Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[tokio::test]
async fn what_was_made_is_found() {
    let place = Place::new();
    let store = place.store();
    assert_eq!(store.open(&subject()).unwrap(), None);
    let made = make(&store, 1).await;
    assert_eq!(store.open(&subject()).unwrap().unwrap(), made);
    assert_eq!(place.store().open(&subject()).unwrap().unwrap(), made);
    assert_eq!(made.dir, place.snapshots().join(subject().key().as_str()));
    assert_eq!(names(&made.dir), ["disk", "manifest.json", "memory", "state"]);
    assert_eq!(names(&place.snapshots()), [subject().key().as_str()]);
    let other = Subject { guest: "ffff".to_owned(), ..subject() };
    assert_eq!(store.open(&other).unwrap(), None);
}

#[tokio::test]
async fn a_dropped_building_leaves_nothing() {
    let place = Place::new();
    let store = place.store();
    let building = begin(&store).await;
    fill(&building, 1);
    drop(building);
    assert_eq!(names(&place.snapshots()), Vec::<String>::new());
    assert_eq!(store.open(&subject()).unwrap(), None);
}

#[tokio::test]
async fn what_is_not_whole_is_not_committed() {
    let place = Place::new();
    let store = place.store();
    let spoils: [fn(&Building); 5] = [
        |it| fs::remove_file(it.files().memory).unwrap(),
        |it| fs::File::create(it.files().memory).unwrap().set_len(MEMORY_BYTES - 1).unwrap(),
        |it| fs::remove_file(it.files().state).unwrap(),
        |it| fs::write(it.files().state, "").unwrap(),
        |it| fs::remove_file(it.disk()).unwrap(),
    ];
    for spoil in spoils {
        let building = begin(&store).await;
        fill(&building, 1);
        spoil(&building);
        building.commit().unwrap_err();
        assert_eq!(names(&place.snapshots()), Vec::<String>::new());
    }
}

#[tokio::test]
async fn two_stacks_make_it_once() {
    let place = Place::new();
    let (one, two) = (place.store(), place.store());
    let building = begin(&one).await;
    // The second stack's start does not take the first one's work for a dead builder's.
    let _third = place.store();
    assert!(building.files().memory.parent().unwrap().exists());
    let waiting = tokio::spawn(async move { two.begin(&subject(), SOON).await });
    fill(&building, 1);
    let made = building.commit().unwrap();
    match waiting.await.unwrap().unwrap() {
        Begin::Ready(found) => assert_eq!(*found, made),
        Begin::Building(building) => panic!("{building:?} makes it again"),
    }
}

#[tokio::test]
async fn one_that_never_finishes_is_not_waited_for_without_bound() {
    let place = Place::new();
    let building = begin(&place.store()).await;
    let waited = place.store().begin(&subject(), Duration::from_millis(30)).await;
    assert!(matches!(waited, Err(SnapshotStoreError::Busy { .. })), "{waited:?}");
    drop(building);
    begin(&place.store()).await;
}

#[tokio::test]
async fn damage_is_named_and_the_next_one_replaces_it() {
    type Injury = fn(&Utf8Path);
    let damages: [(&str, Injury); 6] = [
        ("state", |at| flip(&at.join("state"), 31_000)),
        ("state", |at| fs::remove_file(at.join("state")).unwrap()),
        ("memory", |at| fs::File::options().write(true).open(at.join("memory")).unwrap().set_len(1).unwrap()),
        ("memory", |at| fs::remove_file(at.join("memory")).unwrap()),
        ("disk", |at| fs::remove_file(at.join("disk")).unwrap()),
        ("disk", |at| fs::write(at.join("disk"), "short").unwrap()),
    ];
    for (file, damage) in damages {
        let place = Place::new();
        let store = place.store();
        let made = make(&store, 1).await;
        damage(&made.dir);
        let error = store.open(&subject()).unwrap_err();
        assert!(
            matches!(&error, SnapshotStoreError::Damaged { path, .. } if path.ends_with(file)),
            "{error:?}"
        );
        assert!(error.is_unusable());
        let again = make(&store, 2).await;
        assert_eq!(fs::read(&again.files.state).unwrap(), [2; 60_000]);
        assert_eq!(names(&place.snapshots()), [subject().key().as_str()]);
    }
}

#[tokio::test]
async fn every_flipped_bit_of_the_manifest_is_noticed() {
    let place = Place::new();
    let store = place.store();
    let made = make(&store, 1).await;
    let path = made.dir.join("manifest.json");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        // Space turned to something else is refused by the parser, every value by a check; only the two
        // digests of large files are checked when those files are read.
        match store.open(&subject()) {
            Err(error) => assert!(error.is_unusable() || String::from_utf8(bad).is_err(), "{error:?}"),
            Ok(Some(opened)) => {
                let contents = [&opened.manifest.memory, &opened.manifest.disk];
                assert_ne!(contents, [&made.manifest.memory, &made.manifest.disk], "byte {at}");
            }
            Ok(None) => panic!("byte {at}"),
        }
    }
}

#[tokio::test]
async fn contents_are_read_once_per_boot_and_again_when_they_change() {
    let place = Place::new();
    let store = place.store();
    let made = make(&store, 1).await;
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Remembered);
    // After a boot nothing is remembered.
    fs::remove_dir_all(place.at.join("run")).unwrap();
    let store = place.store();
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Read);
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Remembered);
    // Where /run survived one, its record is of another boot.
    let record = place.at.join("run/verified-snapshots").join(subject().key().as_str());
    let text = fs::read_to_string(&record).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(&record, text.replace(boot.trim(), "another")).unwrap();
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Read);
    // Another name of a file, given or taken, changes none of its bytes.
    let name = place.at.join("another-name");
    fs::hard_link(&made.files.memory, &name).unwrap();
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Remembered);
    fs::remove_file(&name).unwrap();
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Remembered);
    // It hides no write.
    fs::hard_link(&made.files.memory, &name).unwrap();
    flip(&name, 0);
    flip(&name, 0);
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Read);
    // A file that was written to is read again, though its bytes are the same.
    flip(&made.files.memory, 0);
    flip(&made.files.memory, 0);
    assert_eq!(store.verify_contents_once(&made).unwrap(), Verification::Read);
}

#[tokio::test]
async fn a_flipped_bit_of_memory_or_disk_ends_the_snapshot() {
    for file in ["memory", "disk"] {
        let place = Place::new();
        let store = place.store();
        let made = make(&store, 1).await;
        flip(&made.dir.join(file), 100_000);
        assert!(store.open(&subject()).unwrap().is_some());
        match store.verify_contents_once(&made).unwrap_err() {
            SnapshotStoreError::Damaged { path, damage: Damage::Content } => assert!(path.ends_with(file)),
            error => panic!("{error:?}"),
        }
        assert_eq!(store.open(&subject()).unwrap(), None);
        let again = make(&store, 2).await;
        assert_eq!(store.verify_contents_once(&again).unwrap(), Verification::Remembered);
    }
}

/// What a crash at each step of a commit leaves behind: the whole directory as it was then.
async fn crashes_of_a_commit(place: &Place) -> Vec<(Step, Place)> {
    let building = begin(&place.store()).await;
    fill(&building, 2);
    let mut crashes = Vec::new();
    let made = building.commit_observed(&mut |step| {
        let crash = Place::new();
        copy_directory(&place.snapshots(), &crash.snapshots());
        crashes.push((step, crash));
    });
    made.unwrap();
    crashes
}

fn copy_directory(from: &Utf8Path, to: &Utf8Path) {
    fs::create_dir(to).unwrap();
    for entry in from.read_dir_utf8().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

#[tokio::test]
async fn a_crash_at_any_step_leaves_the_old_or_the_new() {
    let crashes = crashes_of_a_commit(&Place::new()).await;
    assert_eq!(crashes.len(), 7);
    for (step, crash) in crashes {
        let store = crash.store();
        let in_place = matches!(step, Step::IsInPlace | Step::PlaceIsDurable | Step::OldIsRemoved);
        match store.open(&subject()).unwrap() {
            Some(snapshot) if in_place => {
                assert_eq!(store.verify_contents_once(&snapshot).unwrap(), Verification::Read);
            }
            None if !in_place => {
                assert_eq!(names(&crash.snapshots()), Vec::<String>::new(), "{step:?}");
                make(&store, 3).await;
            }
            found => panic!("{step:?}: {found:?}"),
        }
        assert_eq!(names(&crash.snapshots()), [subject().key().as_str()], "{step:?}");
    }
}

#[tokio::test]
async fn a_crash_while_a_damaged_one_is_replaced_leaves_the_damage_or_the_new() {
    let place = Place::new();
    let old = make(&place.store(), 1).await;
    flip(&old.files.state, 0);
    for (step, crash) in crashes_of_a_commit(&place).await {
        let store = crash.store();
        match store.open(&subject()) {
            Ok(Some(snapshot)) => {
                assert_eq!(store.verify_contents_once(&snapshot).unwrap(), Verification::Read);
                assert_eq!(fs::read(&snapshot.files.state).unwrap(), [2; 60_000], "{step:?}");
            }
            Err(SnapshotStoreError::Damaged { .. }) => {
                make(&store, 3).await;
            }
            found => panic!("{step:?}: {found:?}"),
        }
        assert_eq!(names(&crash.snapshots()), [subject().key().as_str()], "{step:?}");
    }
}

#[test]
fn a_full_disk_is_named_before_a_guest_meets_it() {
    let tried = own_filesystem::with(Kind::Tmpfs, MEMORY_BYTES / 2, |at| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(store_in(at).begin(&subject(), SOON)).unwrap_err();
        assert!(error.is_no_space(), "{error:?}");
        assert_eq!(names(&at.join("snapshots")), Vec::<String>::new());
    });
    tried.or_say_skipped("a full disk");
}

#[test]
fn a_disk_that_fills_up_is_named_and_nothing_is_left() {
    let tried = own_filesystem::with(Kind::Tmpfs, MEMORY_BYTES + (8 << 20), |at| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = store_in(at);
            let building = begin(&store).await;
            fill(&building, 1);
            // Whatever is left is taken, so that the manifest finds no room.
            let mut filler = fs::File::create(at.join("filler")).unwrap();
            let filled = std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
            assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
            let error = building.commit().unwrap_err();
            assert!(error.is_no_space(), "{error:?}");
            assert_eq!(names(&at.join("snapshots")), Vec::<String>::new());
        });
    });
    tried.or_say_skipped("a full disk");
}

#[tokio::test]
async fn what_nobody_used_for_a_month_goes_and_a_use_is_noticed() {
    let place = Place::new();
    let snapshot = make(&place.store(), 1).await;
    let manifest = snapshot.dir.join("manifest.json");
    let used = |days: u64| {
        let time = std::time::SystemTime::now() - Duration::from_secs(days * 24 * 60 * 60);
        fs::File::open(&manifest).unwrap().set_modified(time).unwrap();
    };
    used(29);
    assert!(place.store().open(&subject()).unwrap().is_some());
    // That was a use, so a month begins anew.
    let modified = fs::metadata(&manifest).unwrap().modified().unwrap();
    assert!(modified.elapsed().unwrap() < Duration::from_secs(3600));
    used(31);
    assert!(place.store().open(&subject()).unwrap().is_none());
    assert!(!snapshot.dir.exists());
}
