//! The store as its users see it, and as a crash leaves it.

mod crash;
pub(crate) mod damage;
mod digests;
mod lost;
mod property;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::{AccessToken, DiskMib, LayerId, MemoryMib, NetworkPolicy, Shape, SnapshotId, Vcpus};
use wrenn_vmm::{Accelerator, DiskFormat, DiskSpec, SnapshotFiles, VmmIdentity};

use super::{About, BaseKey, Extent, Kept, Making, Roots, SealProgress, Snapshots, SnapshotsResult, Swept};
use crate::{
    rootfs::own_filesystem::{self, Kind},
    snapshot_store::{Digest, FileRecord, Manifest, SnapshotStoreError, Subject, WarmSnapshot, digest},
};

impl Snapshots {
    /// A store that asks `observer` after each of its steps whether the next one fails.
    pub(crate) fn open_watched(
        directory: &Utf8Path,
        observer: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> SnapshotsResult<Self> {
        Self::open_observed(directory, super::Steps::observed(move |_| observer()))
    }
}

const HOUR: Duration = Duration::from_secs(60 * 60);

/// A directory with a cache of warm snapshots and a store.
pub(crate) struct Place {
    _guard: tempfile::TempDir,
    pub(crate) at: Utf8PathBuf,
}

impl Place {
    fn new() -> Self {
        let guard = tempfile::tempdir().unwrap();
        let at = Utf8PathBuf::from_path_buf(guard.path().canonicalize().unwrap()).unwrap();
        Self { _guard: guard, at }
    }

    fn agent(&self) -> Utf8PathBuf {
        self.at.join("agent")
    }

    fn store(&self) -> Snapshots {
        Snapshots::open(&self.agent()).unwrap()
    }

    fn warm(&self, mark: u8) -> WarmSnapshot {
        warm(&self.at, mark)
    }
}

fn identity() -> VmmIdentity {
    VmmIdentity {
        name: "fake".to_owned(),
        version: "1".to_owned(),
        machine: "none".to_owned(),
        cpu_model: "none".to_owned(),
        accelerator: Accelerator::Tcg,
    }
}

fn shape() -> Shape {
    Shape { vcpus: Vcpus::default(), memory: MemoryMib::new(128).unwrap() }
}

fn record(path: &Utf8Path, digest: Digest) -> FileRecord {
    FileRecord { bytes: fs::metadata(path).unwrap().len(), digest }
}

/// A warm snapshot in a cache of its own below `at`; `mark` is in each of the files. All have the same key.
fn warm(at: &Utf8Path, mark: u8) -> WarmSnapshot {
    let dir = at.join("cache").join(mark.to_string());
    // Made anew it is another file: what was made before may have other names.
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir_all(&dir).unwrap();
    let files = SnapshotFiles { memory: dir.join("memory"), state: dir.join("state"), pages: None };
    let disk = DiskSpec { path: dir.join("disk"), format: DiskFormat::Qcow2 };
    fs::write(&files.memory, [mark; 200_000]).unwrap();
    fs::write(&files.state, [mark; 100]).unwrap();
    fs::write(&disk.path, [mark; 100_000]).unwrap();
    let subject = Subject {
        guest: "0011223344556677".to_owned(),
        image: "8899aabbccddeeff".to_owned(),
        vmm: identity(),
        shape: shape(),
        disk: DiskMib::default(),
        disk_format: DiskFormat::Qcow2,
    };
    let manifest = Manifest::new(
        subject,
        record(&files.memory, digest::of_large_file(&files.memory).unwrap()),
        record(&files.state, digest::of_file(&files.state).unwrap()),
        record(&disk.path, digest::of_large_file(&disk.path).unwrap()),
    );
    WarmSnapshot { dir, files, disk, manifest }
}

fn about(base: &BaseKey, layers: &[LayerId]) -> About {
    About {
        sandbox: "sb-00000001".parse().unwrap(),
        template: "minimal".parse().unwrap(),
        base: base.clone(),
        layers: layers.to_vec(),
        disk_format: DiskFormat::Qcow2,
        disk: DiskMib::default(),
        shape: shape(),
        vmm: identity(),
        guest: "0011223344556677".to_owned(),
        extent: Extent::Machine,
        prepared: true,
        access_token: AccessToken::from_stored("secret-of-the-guest".to_owned()),
        default_user: "user".to_owned(),
        default_workdir: "/home/user".to_owned(),
        environment: BTreeMap::from([("NAME".to_owned(), "a \"value\"\nof two lines".to_owned())]),
        network: NetworkPolicy::simple(true),
        created_at: "2026-01-02T03:04:05.678901234Z".parse().unwrap(),
    }
}

pub(crate) fn layer(number: u32) -> LayerId {
    format!("ly-{number:08x}").parse().unwrap()
}

pub(crate) fn snapshot(number: u32) -> SnapshotId {
    format!("sn-{number:08x}").parse().unwrap()
}

fn write_layer(store: &Snapshots, number: u32) -> LayerId {
    let layer = layer(number);
    fs::write(store.layer_path(&layer), [9; 50_000]).unwrap();
    layer
}

/// Does what a VMM does.
fn fill(making: &Making, mark: u8) {
    fs::write(making.state(), [mark; 4_000]).unwrap();
    fs::write(making.pages(), [mark; 70_000]).unwrap();
}

pub(crate) fn make(store: &Snapshots, number: u32, base: &BaseKey, layers: &[LayerId]) -> Kept {
    let making = store.begin(snapshot(number)).unwrap();
    fill(&making, 1);
    making.commit(about(base, layers)).unwrap()
}

/// Takes the digest of a layer to its end; none when it has one or is not there.
fn seal(store: &Snapshots, layer: &LayerId) -> SnapshotsResult<Option<SealProgress>> {
    let Some(mut sealing) = store.begin_seal(layer)? else { return Ok(None) };
    loop {
        match store.seal(&mut sealing, 20_000)? {
            SealProgress::More(_) => {}
            end => return Ok(Some(end)),
        }
    }
}

fn collect_all(store: &Snapshots, roots: Roots) -> Swept {
    store.collect(|| Ok(roots), Duration::ZERO).unwrap()
}

fn names(at: &Utf8Path) -> Vec<String> {
    let mut names: Vec<String> =
        at.read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned()).collect();
    names.sort();
    names
}

fn mode(path: &Utf8Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_was_made_is_found_and_goes_again() {
    let place = Place::new();
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap();
    let layers = [write_layer(&store, 2), write_layer(&store, 1)];
    assert_eq!(store.get(&snapshot(1)).unwrap(), None);

    let made = make(&store, 1, &base.key, &layers);
    assert_eq!(made.about, about(&base.key, &layers));
    assert_eq!((made.state_bytes, made.pages_bytes), (4_000, 70_000));
    assert_eq!(made.dir, place.agent().join("snapshots/sn-00000001"));
    assert_eq!(store.get(&snapshot(1)).unwrap().unwrap(), made);
    assert_eq!(place.store().get(&snapshot(1)).unwrap().unwrap(), made);
    let all = store.all().unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!((&all[0].0, all[0].1.as_ref().unwrap()), (&snapshot(1), &made));
    assert_eq!(names(&made.dir), ["manifest.json", "pages", "state", "verified.json"]);
    made.check(&identity(), "0011223344556677").unwrap();

    assert!(store.delete(&snapshot(1)).unwrap());
    assert_eq!(store.get(&snapshot(1)).unwrap(), None);
    assert!(!store.delete(&snapshot(1)).unwrap());
    assert!(store.all().unwrap().is_empty());
    assert_eq!(names(&place.agent().join("snapshots")), Vec::<String>::new());
    // Its name is free again.
    make(&store, 1, &base.key, &layers);
}

#[test]
fn only_the_owner_reads_and_a_frozen_file_is_not_written() {
    let place = Place::new();
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap();
    let top = write_layer(&store, 1);
    let made = make(&store, 1, &base.key, std::slice::from_ref(&top));
    let agent = place.agent();
    for dir in [&agent, &agent.join("bases"), &agent.join("disks"), &agent.join("snapshots"), &made.dir] {
        assert_eq!(mode(dir), 0o700, "{dir}");
    }
    for manifest in [made.dir.join("manifest.json"), base.dir.join("manifest.json")] {
        assert_eq!(mode(&manifest), 0o600);
    }
    for frozen in [&made.state, &made.pages, &store.layer_path(&top)] {
        assert_eq!(mode(frozen), 0o400, "{frozen}");
    }
    let text = format!("{made:?}");
    assert!(!text.contains("secret-of-the-guest"), "{text}");
}

#[test]
fn a_base_is_the_same_files_and_survives_the_cache() {
    let place = Place::new();
    let store = place.store();
    let warm = place.warm(7);
    let base = store.hold(&warm).unwrap();
    assert_eq!(base.key, BaseKey::of(&warm.manifest));
    assert_eq!(base.key.as_str().len(), 49);
    let inode = |path: &Utf8Path| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(&base.memory), inode(&warm.files.memory));
    assert_eq!(inode(&base.disk.path), inode(&warm.disk.path));
    assert_eq!(store.hold(&warm).unwrap(), base);

    fs::remove_dir_all(&warm.dir).unwrap();
    assert_eq!(place.store().base(&base.key).unwrap().unwrap(), base);
    assert_eq!(fs::read(&base.memory).unwrap(), [7; 200_000]);
    // Made anew, it is another file with the same content, and still the same base.
    assert_eq!(store.hold(&place.warm(7)).unwrap(), base);
    // Another content for the same subject is another base.
    let other = store.hold(&place.warm(8)).unwrap();
    assert_eq!(other.key.as_str()[..32], base.key.as_str()[..32]);
    assert_ne!(other.key, base.key);
    assert_eq!(store.base(&BaseKey::of(&place.warm(9).manifest)).unwrap(), None);
}

#[test]
fn a_base_of_zeros_is_a_hole_on_the_disk_of_another() {
    let place = Place::new();
    let store = place.store();
    let base = store.hold(&place.warm(1)).unwrap();
    let zeros = store.hold_zeros(&base.key).unwrap();
    assert_eq!(zeros.key, base.key.zeros());
    assert_eq!((&zeros.disk, zeros.shape), (&base.disk, base.shape));
    assert_eq!(fs::read(&zeros.memory).unwrap(), [0; 200_000]);
    assert_eq!((fs::metadata(&zeros.memory).unwrap().blocks(), mode(&zeros.memory)), (0, 0o400));
    for same in [&base.key, &zeros.key] {
        assert_eq!(store.hold_zeros(same).unwrap(), zeros, "there is one");
    }
    assert_eq!(place.store().base(&zeros.key).unwrap().unwrap(), zeros);

    // It is what keeps the other one there: overlays name that by its path.
    let kept = make(&store, 1, &zeros.key, &[write_layer(&store, 1)]);
    assert_eq!(collect_all(&store, Roots::default()), Swept::default());
    assert_eq!(store.get(&kept.id).unwrap().unwrap(), kept);
    assert_eq!(names(&place.agent().join("bases")), [base.key.as_str(), zeros.key.as_str()]);
    store.delete(&kept.id).unwrap();
    let roots = Roots { bases: [base.key.clone()].into(), ..Roots::default() };
    assert_eq!(collect_all(&store, roots).bases, std::slice::from_ref(&zeros.key));
    collect_all(&store, Roots::default());
    assert_eq!(names(&place.agent().join("bases")), Vec::<String>::new());
    let missing = store.hold_zeros(&base.key).unwrap_err();
    assert!(matches!(missing, SnapshotStoreError::Damaged { .. }), "{missing:?}");
}

#[test]
fn keys_of_bases_are_safe_parts_of_a_path() {
    let good = format!("{}.{}", "0a".repeat(16), "f9".repeat(8));
    assert_eq!(good.parse::<BaseKey>().unwrap().to_string(), good);
    let long = format!("{good}0");
    let upper = good.to_uppercase();
    let zeros = good.parse::<BaseKey>().unwrap().zeros();
    assert_eq!(zeros.to_string(), format!("{good}.zeros"));
    assert_eq!(zeros.to_string().parse::<BaseKey>().unwrap(), zeros);
    assert_eq!((zeros.zeros(), zeros.of_disk().to_string()), (zeros.clone(), good.clone()));
    for bad in [".zeros", &format!("{zeros}.zeros"), &format!("{good}.zero"), &format!("{good}zeros")] {
        assert!(bad.parse::<BaseKey>().is_err(), "{bad}");
    }
    for bad in ["", ".", "..", "../..", &good[1..], &good[..48], &long, &upper, &good.replace('.', "/")] {
        assert!(bad.parse::<BaseKey>().is_err(), "{bad}");
        assert!(serde_json::from_value::<BaseKey>(bad.into()).is_err(), "{bad}");
    }
}
