//! What must not be made of a snapshot is refused by its name, where it is asked for.

use wrenn_types::{SandboxId, SnapshotId};
use wrenn_vmm::Vmm as _;

use super::{
    CONTENT, Call, Extent, Ground, Manner, RequestError, Stage, Verb, World,
    lives::{RESUME, ask, created, end, live, live_alone},
    world::spec,
};
use crate::sandbox::{Handle, bring_up::BringUpError, driver::OperationError, source::SourceError};

/// Why a bring-up that was asked for found nothing that it could use.
async fn refused(handle: &Handle, verb: Verb) -> (SourceError, String) {
    let RequestError::Failed(error) = ask(handle, verb).await.unwrap_err() else { panic!("it was denied") };
    let text = crate::sandbox::driver::chain(error.as_ref());
    match std::sync::Arc::into_inner(error) {
        Some(OperationError::BringUp(BringUpError::Source(error))) => (error, text),
        other => panic!("{other:?}: {text}"),
    }
}

#[test]
fn what_did_not_stand_still_is_resumed_and_nothing_else() {
    live_alone(async |world, registry| {
        let store = registry.host().snapshots.clone();
        let handle = created(&registry).await;
        world.guests.fail_next(Call::Prepare, Manner::Refuse);
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        let saved = handle.status().paused.unwrap().snapshot;
        assert!(!store.get(&saved).unwrap().unwrap().about.prepared);

        // A create from it, which is what a child of a fork is too.
        let child = registry.create(spec(SandboxId::random(), Some(saved.clone()))).unwrap();
        let told = child.settled().await.end.unwrap();
        let Some(BringUpError::Source(SourceError::Unprepared(named))) = told.error.as_deref() else {
            panic!("{told:?}")
        };
        assert_eq!(*named, saved);
        assert!(told.message.contains(saved.as_str()), "{}", told.message);
        assert!(world.machines(&child.spec().id).is_empty());

        // A snapshot with a name, which is what a fork begins with too.
        let into = SnapshotId::random();
        let (error, text) = refused(&handle, Verb::Snapshot { into: into.clone() }).await;
        assert!(matches!(error, SourceError::Unprepared(named) if named == saved), "{text}");
        assert!(text.contains("only its own sandbox can be resumed from it"), "{text}");
        assert!(store.get(&into).unwrap().is_none());
        assert_eq!(handle.stage(), Stage::Paused);

        // It is itself again, and then all is as ever.
        ask(&handle, RESUME).await.unwrap();
        ask(&handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
        let child = registry.create(spec(SandboxId::random(), Some(into.clone()))).unwrap();
        assert_eq!(child.settled().await.stage, Stage::Running);
        store.delete(&into).unwrap();
        end(world, &registry).await;
    });
}

/// Whatever program an agent is started with, what was saved with another one waits for that.
#[test]
fn what_another_program_has_saved_stays_as_it_is_and_is_named() {
    let ground = Ground::new();
    let mut world = World::new(&ground);
    let saved = live(&world, async |registry| {
        let handle = created(&registry).await;
        let [machine] = &world.machines(&handle.spec().id)[..] else { panic!("not one machine") };
        assert!(world.fake.write_page(machine, CONTENT, 4711));
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        handle.spec().id.clone()
    });

    let before = world.fake.clone();
    let mut newer = before.identity().clone();
    newer.version = "99.1".to_owned();
    let mut other_cpu = before.identity().clone();
    other_cpu.cpu_model = "another".to_owned();
    let bundle = ground.guest_bundle();
    let others = [
        (before.driven_by(newer), bundle.clone(), ["VMM version", "99.1"]),
        (before.driven_by(other_cpu), bundle.clone(), ["CPU model", "another"]),
        (before.clone(), "ffeeddccbbaa9988".to_owned(), ["guest bundle", "ffeeddccbbaa9988"]),
    ];
    for (fake, guest, words) in others {
        world.fake = fake;
        ground.set_guest_bundle(&guest);
        live(&world, async |registry| {
            let handle = registry.get(&saved).unwrap();
            assert_eq!(handle.stage(), Stage::Paused);
            let (error, text) = refused(&handle, RESUME).await;
            assert!(matches!(error, SourceError::Snapshot(_)), "{text}");
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
            assert_eq!(handle.stage(), Stage::Paused);
            assert!(world.machines(&saved).is_empty());
        });
    }

    world.fake = before;
    ground.set_guest_bundle(&bundle);
    live(&world, async |registry| {
        let handle = registry.get(&saved).unwrap();
        ask(&handle, RESUME).await.unwrap();
        let [machine] = &world.machines(&saved)[..] else { panic!("not one machine") };
        assert_eq!(world.fake.read_page(machine, CONTENT), Some(4711));
        end(&world, &registry).await;
    });
}

/// A machine that was made before an upgrade is saved by an agent that was started after it: what is saved names the
/// program that ran it, and not the one that the agent would start now.
#[test]
fn what_an_older_program_runs_is_saved_as_its_own() {
    let ground = Ground::new();
    let mut world = World::new(&ground);
    let id = live(&world, async |registry| created(&registry).await.spec().id.clone());
    let before = world.fake.clone();
    let mut newer = before.identity().clone();
    newer.version = "99.1".to_owned();
    world.fake = before.driven_by(newer);
    live(&world, async |registry| {
        let handle = registry.get(&id).unwrap();
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        let (_, text) = refused(&handle, RESUME).await;
        assert!(text.contains("VMM version"), "{text}");
        assert_eq!(handle.stage(), Stage::Paused);
    });
    world.fake = before;
    live(&world, async |registry| {
        ask(&registry.get(&id).unwrap(), RESUME).await.unwrap();
        end(&world, &registry).await;
    });
}
