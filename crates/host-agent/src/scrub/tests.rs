//! The scrubber over a real store: what it finds, what it makes, and when.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::{
    rootfs::Qcow2Store,
    scrub::writers::tests::Writer,
    snapshots::tests::{
        damage::{Whole, flip},
        layer, make, snapshot,
    },
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A snapshot on a base and two layers, and who looks after them.
struct World {
    it: Whole,
    scrub: Arc<Scrub>,
}

impl World {
    fn new() -> Self {
        Self { it: Whole::new(), scrub: Arc::default() }
    }

    fn mark(&self) -> String {
        format!("guest={}-", self.it.place.at)
    }

    fn scrubber(&self) -> Scrubber {
        let at = &self.it.place.at;
        let sandboxes_dir = at.join("sandboxes");
        fs::create_dir_all(&sandboxes_dir).unwrap();
        Scrubber::new(Parts {
            snapshots: self.it.store.clone(),
            disks: Arc::new(Qcow2Store),
            store: SnapshotStore::new(&at.join("warm"), &at.join("run")).unwrap(),
            sandboxes_dir,
            mark: self.mark(),
            looks: at.join("agent/scrub.json"),
            every: Some(DAY),
            scrub: Arc::clone(&self.scrub),
        })
    }

    fn path(&self, number: u32) -> Utf8PathBuf {
        self.it.store.layer_path(&layer(number))
    }

    fn all(&self) -> Vec<Part> {
        vec![
            Part::Snapshot(snapshot(1)),
            Part::Base(self.it.base.key.clone()),
            Part::Layer(layer(1)),
            Part::Layer(layer(2)),
        ]
    }

    fn digests(&self) -> Vec<LayerId> {
        let parts = self.it.store.parts().unwrap().into_iter();
        let mut layers: Vec<_> =
            parts.filter_map(|part| if let Part::Layer(layer) = part { Some(layer) } else { None }).collect();
        layers.sort();
        layers
    }
}

fn sorted(mut parts: Vec<Part>) -> Vec<Part> {
    parts.sort();
    parts
}

fn later(days: i64) -> Timestamp {
    Timestamp::now() + jiff::SignedDuration::from_hours(24 * days)
}

#[tokio::test(start_paused = true)]
async fn a_pass_makes_what_is_missing_and_reads_all_that_is_due() {
    let world = World::new();
    let mut scrubber = world.scrubber();
    // What was just made is not due, and the layers that were left without a digest get one.
    let first = scrubber.pass(Which::Due, Timestamp::now()).await;
    assert_eq!((first.whole, first.damaged.len()), (vec![], 0));
    assert_eq!(first.sealed, [layer(1), layer(2)]);
    assert_eq!(scrubber.pass(Which::Due, later(0)).await.whole, []);
    let second = scrubber.pass(Which::Due, later(1)).await;
    assert_eq!(sorted(second.whole), world.all());
    assert!(second.damaged.is_empty() && second.sealed.is_empty());
    // The next agent knows what this one has looked at.
    assert_eq!(world.scrubber().pass(Which::Due, later(1)).await.whole, []);
    assert_eq!(sorted(world.scrubber().pass(Which::Due, later(2)).await.whole), world.all());
    assert_eq!(sorted(world.scrubber().pass(Which::All, later(2)).await.whole), world.all());
    let counted = world.scrub.counted();
    assert_eq!((counted.looked, counted.damaged, counted.digests), (12, 0, 2));
    let least = 3 * (70_000 + 200_000 + 100_000 + 2 * 50_000) + 2 * 50_000;
    assert!(counted.read_bytes >= least, "{counted:?}");
}

#[tokio::test(start_paused = true)]
async fn damage_is_said_counted_and_refused_without_reading() {
    type Injured = fn(&World) -> (Part, Utf8PathBuf);
    let cases: [Injured; 4] = [
        |world| (Part::Snapshot(snapshot(1)), world.it.kept.memory().unwrap().pages.to_owned()),
        |world| (Part::Base(world.it.base.key.clone()), world.it.base.memory.clone()),
        |world| (Part::Layer(layer(1)), world.path(1)),
        |world| (Part::Layer(layer(2)), world.path(2)),
    ];
    for injured in cases {
        let world = World::new();
        let mut scrubber = world.scrubber();
        scrubber.pass(Which::All, later(0)).await;
        assert!(world.it.get().unwrap().is_some());
        let (part, path) = injured(&world);
        // As a disk does it: the file is the same, with the same times, and has another bit.
        let before = fs::metadata(&path).unwrap();
        flip(&path, 44_444, 2);
        fs::File::open(&path).unwrap().set_modified(before.modified().unwrap()).unwrap();

        let pass = scrubber.pass(Which::All, later(0)).await;
        let [(damaged, SnapshotStoreError::Damaged { path: named, .. })] = &pass.damaged[..] else {
            panic!("{:?}", pass.damaged)
        };
        assert_eq!((damaged, named), (&part, &path));
        assert_eq!(pass.whole.len(), 3, "the others are read all the same");
        assert_eq!(world.scrub.counted().damaged, 1);
        let refused = world.it.get().unwrap_err();
        assert!(
            matches!(&refused, SnapshotStoreError::Damaged { path: named, .. } if *named == path),
            "{refused:?}"
        );
        // It is told again in the next pass, and not read again for that.
        let read = world.scrub.counted().read_bytes;
        let unread = fs::metadata(&path).unwrap().len();
        let pass = scrubber.pass(Which::All, later(0)).await;
        assert_eq!((pass.damaged.len(), world.scrub.counted().damaged), (1, 2));
        assert!(world.scrub.counted().read_bytes - read <= 470_000 - unread);
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_base_is_doubted_as_a_warm_snapshot() {
    let world = World::new();
    let mut scrubber = world.scrubber();
    let key = world.it.base.key.warm().unwrap();
    let remembered = world.it.place.at.join("run/verified-snapshots").join(key.as_str());
    fs::write(&remembered, "that it was verified").unwrap();
    scrubber.pass(Which::All, later(0)).await;
    assert!(remembered.exists());
    flip(&world.it.base.disk.path, 77, 0);
    assert_eq!(scrubber.pass(Which::All, later(0)).await.damaged.len(), 1);
    assert!(!remembered.exists());
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_a_machine_may_write_to_gets_its_digest_later() {
    let world = World::new();
    let mut scrubber = world.scrubber();
    let machine = Writer::start(&format!("{}sb-00000001", world.mark()), &world.path(2));
    assert_eq!(scrubber.pass(Which::All, later(0)).await.sealed, [layer(1)]);
    assert_eq!(scrubber.pass(Which::All, later(0)).await.sealed, []);
    machine.end();
    assert_eq!(scrubber.pass(Which::All, later(0)).await.sealed, [layer(2)]);
}

#[tokio::test(start_paused = true)]
async fn only_what_nothing_changes_any_more_gets_a_digest() {
    let world = World::new();
    // A layer that was made and is in no manifest: the top of a disk, perhaps.
    fs::write(world.path(3), [1; 10_000]).unwrap();
    assert_eq!(world.scrubber().pass(Which::All, later(0)).await.sealed, [layer(1), layer(2)]);
    make(&world.it.store, 2, &world.it.base.key, &[layer(3), layer(1)]);
    assert_eq!(world.scrubber().pass(Which::All, later(0)).await.sealed, [layer(3)]);
}

#[tokio::test(start_paused = true)]
async fn what_was_frozen_gets_its_digest_in_a_moment_and_nothing_else_is_read() {
    let world = World::new();
    let running = tokio::spawn(world.scrubber().run());
    world.scrub.seal_soon(&[layer(2), layer(9)]);
    let began = Instant::now();
    while world.digests().is_empty() {
        assert!(began.elapsed() < LOOK, "in a moment");
        tokio::time::sleep(SETTLE).await;
    }
    assert_eq!(world.digests(), [layer(2)]);
    world.scrub.seal_soon(&[layer(1)]);
    while world.digests().len() < 2 {
        assert!(began.elapsed() < LOOK, "in a moment");
        tokio::time::sleep(SETTLE).await;
    }
    let counted = world.scrub.counted();
    assert_eq!((counted.looked, counted.read_bytes, counted.digests), (0, 100_000, 2));
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn reading_is_as_slow_as_it_is_to_be() {
    let world = World::new();
    fs::set_permissions(world.path(1), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(world.path(1), vec![7; 48 << 20]).unwrap();
    let mut scrubber = world.scrubber();
    let begun = Instant::now();
    assert_eq!(scrubber.pass(Which::Due, later(0)).await.sealed.len(), 2);
    let took = begun.elapsed();
    let bytes = fs::metadata(world.path(1)).unwrap().size();
    let least = Duration::from_secs(1) * u32::try_from(bytes >> 20).unwrap() / 32;
    assert!(took >= least && took < 2 * least, "{took:?} and not {least:?}");
}
