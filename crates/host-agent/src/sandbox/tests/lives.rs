//! Single lives, told step by step: what an order of verbs does not show.

use std::time::Duration;

use tokio::time::Instant;
use wrenn_types::SandboxId;

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
    let ground = Ground::new();
    let world = World::new(&ground);
    live(&world, async |registry| {
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
        end(&world, &registry).await;
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
