//! Single lives, told step by step: what an order of verbs does not show.

use std::{io::Read as _, sync::mpsc, time::Duration};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::time::Instant;
use wrenn_types::{SandboxId, SnapshotId};

use super::{Disks, Extent, Ground, RequestError, Stage, Verb, Vm, World, record, world::spec};
use crate::{
    agent,
    registry::Registry,
    sandbox::{Handle, Outcome, bounds, bring_up::BringUpError, driver::OperationError},
};

/// Runs one agent, whose clock goes on by itself, and kills it when it is over.
pub(super) fn live<T>(world: &World<'_>, life: impl AsyncFnOnce(Registry) -> T) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    let outcome = runtime.block_on(async {
        let outcome = life(world.agent().await).await;
        world.keep_time();
        outcome
    });
    world.fake.lose_owners();
    outcome
}

/// The same in a world of its own.
pub(super) fn live_alone(life: impl AsyncFnOnce(&World<'_>, Registry)) {
    let ground = Ground::new();
    let world = World::new(&ground);
    live(&world, async |registry| life(&world, registry).await);
}

pub(super) async fn created(registry: &Registry) -> Handle {
    let handle = registry.create(spec(SandboxId::random(), None)).unwrap();
    assert_eq!(handle.settled().await.stage, Stage::Running);
    handle
}

pub(super) async fn ask(handle: &Handle, verb: Verb) -> Result<Outcome, RequestError> {
    handle.request(verb, None).await
}

pub(super) const RESUME: Verb = Verb::Resume { timeout: None };

/// Ends what there is, and sees that nothing is left.
pub(super) async fn end(world: &World<'_>, registry: &Registry) {
    for handle in registry.all() {
        registry.destroy(&handle.spec().id, None).await.unwrap();
    }
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

/// Half a minute was all that a restore had, whatever there was to be written into the machine.
#[test]
fn a_restore_has_time_for_its_pages_and_no_more() {
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        let [machine] = &world.machines(&handle.spec().id)[..] else { panic!("not one machine") };
        for page in 100..100 + (60 << 20) / 4096 {
            assert!(world.fake.write_page(machine, page, page));
        }
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        let bound = bounds::restore(60 << 20);
        assert!(bound > bounds::restore(0) + Duration::from_secs(2));

        world.fake.delay(Vm::Restore, 2 * bound);
        let begun = Instant::now();
        let error = ask(&handle, RESUME).await.unwrap_err();
        let RequestError::Failed(error) = error else { panic!("{error:?}") };
        let OperationError::BringUp(BringUpError::Timeout { step: "restore", .. }) = *error else {
            panic!("{error:?}")
        };
        assert!(begun.elapsed() <= bound + Duration::from_secs(2), "{:?}", begun.elapsed());
        assert_eq!(handle.stage(), Stage::Paused);

        world.fake.delay(Vm::Restore, bound - Duration::from_secs(1));
        ask(&handle, RESUME).await.unwrap();
        end(world, &registry).await;
    });
}

/// What is paused is recorded durably, and a disk may take its time for that. The thread that waited for it was one of
/// those that serve everybody else.
#[test]
fn a_disk_that_takes_its_time_for_the_record_of_a_resume_holds_nobody_else_up() {
    let ground = Ground::new();
    for is_last in [false, true] {
        let world = World::new(&ground);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
            let dir = world.at("sandboxes").join(handle.spec().id.as_str());
            // Who opens a pipe waits for its other end.
            let pipe = dir.join("record.json.new");
            let make = {
                let pipe = pipe.clone();
                move || {
                    mknodat(CWD, pipe.as_str(), FileType::Fifo, Mode::RWXU, 0).unwrap();
                }
            };
            if is_last {
                world.fake.observe(move |step| {
                    if step == Vm::Resume {
                        make();
                    }
                    true
                });
            } else {
                make();
            }
            let (others_go_on, told) = mpsc::channel();
            let release = std::thread::spawn(move || {
                let went_on = told.recv_timeout(Duration::from_secs(20)).is_ok();
                let mut written = std::fs::File::open(&pipe).unwrap();
                std::fs::remove_file(&pipe).unwrap();
                written.read_to_end(&mut Vec::new()).unwrap();
                went_on
            });
            let (resumed, ()) = tokio::join!(ask(&handle, RESUME), async {
                while !dir.join("record.json.new").exists() {
                    tokio::task::yield_now().await;
                }
                // In this time a whole resume would be over.
                for _ in 0..100_000 {
                    tokio::task::yield_now().await;
                }
                others_go_on.send(()).unwrap();
            });
            assert!(release.join().unwrap(), "the record was waited for by all");
            // A generation that is not kept is no reason to refuse.
            assert_eq!(resumed.is_ok(), !is_last, "{resumed:?}");
            world.fake.observe(|_| true);
            end(&world, &registry).await;
        });
    }
}

/// It was tried again only after something else had happened to the sandbox.
#[test]
fn layers_that_could_not_be_made_one_are_when_nothing_else_happens() {
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        world.fake.fail_next(Vm::StreamDisk);
        let store = &registry.host().snapshots;
        for _ in 0..10 {
            let into = SnapshotId::random();
            ask(&handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
            store.delete(&into).unwrap();
        }
        let layers = || record::read(&world.at("sandboxes"), &handle.spec().id).unwrap().layers.len();
        assert!(layers() > 8, "{} layers", layers());
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(layers(), 1);
        end(world, &registry).await;
    });
}

/// A copy of a disk was kept as a layer of the next copy, for as long as the sandbox lived: one more for each resume.
#[test]
fn a_sandbox_has_one_disk_however_often_it_is_paused() {
    let ground = Ground::new();
    for (disks, layers) in [(Disks::Plain, 1), (Disks::Layered, 6)] {
        let world = World::with(&ground, disks);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            let id = &handle.spec().id;
            for round in 1..=5 {
                let [machine] = &world.machines(id)[..] else { panic!("not one machine") };
                assert!(world.fake.write_disk(machine, round));
                ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
                ask(&handle, RESUME).await.unwrap();
                let [machine] = &world.machines(id)[..] else { panic!("not one machine") };
                assert_eq!(world.fake.read_disk(machine), Some(round));
            }
            let named = record::read(&world.at("sandboxes"), id).unwrap().layers.len();
            let (store, sandboxes) = (&registry.host().snapshots, world.at("sandboxes"));
            store.collect(|| agent::roots(&sandboxes), Duration::ZERO).unwrap();
            let there = world.at("agent/disks").read_dir_utf8().unwrap().count();
            assert_eq!((named, there), (layers, layers), "{disks:?}");
            ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
            let saved = handle.status().paused.unwrap().snapshot;
            assert_eq!(store.get(&saved).unwrap().unwrap().about.layers.len(), layers);
            end(&world, &registry).await;
        });
    }
}
