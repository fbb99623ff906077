//! A destroy waits for nothing that may take long, wherever it finds it.

use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode};
use tokio::time::Instant;
use wrenn_types::SnapshotId;

use super::{
    Call, DESTROY_BOUND, Extent, Ground, Manner, RequestError, Stage, Verb, Vm, World,
    lives::{RESUME, ask, created, end, live, live_alone},
    quiet, record,
};
use crate::{
    config::OnStop,
    registry::Registry,
    sandbox::{Handle, bounds, driver::OperationError, regain::REGAIN_AGAIN},
};

/// Longer than everything may take.
const FOR_EVER: Duration = Duration::from_secs(1_000_000);

/// Destroys what a verb is under way for, and sees that this is all, at once.
async fn destroy(registry: &Registry, handle: &Handle) {
    let begun = Instant::now();
    registry.destroy(&handle.spec().id, None).await.unwrap();
    assert!(begun.elapsed() < DESTROY_BOUND, "it took {:?}", begun.elapsed());
    assert_eq!(handle.stage(), Stage::Stopped);
}

/// Asks for something that comes to no end, and destroys the sandbox meanwhile.
async fn overtake(world: &World<'_>, registry: &Registry, handle: &Handle, verb: Verb) {
    let what = format!("{verb:?}");
    let (told, ()) = tokio::join!(ask(handle, verb), async {
        quiet().await;
        assert!(!handle.stage().is_settled(), "{what} is not under way: {:?}", handle.stage());
        destroy(registry, handle).await;
    });
    assert!(told.is_err(), "{what}: {told:?}");
    world.calm();
    assert!(world.remains().is_empty(), "{what}: {:?}", world.remains());
}

fn saved() -> Verb {
    Verb::Snapshot { into: SnapshotId::random() }
}

#[test]
fn a_destroy_overtakes_a_machine_that_does_not_answer() {
    let ground = Ground::new();
    for step in [Vm::Pause, Vm::Snapshot] {
        let world = World::new(&ground);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            world.fake.delay(step, FOR_EVER);
            overtake(&world, &registry, &handle, Verb::Pause(Extent::Machine)).await;
        });
    }
    for step in [Vm::Pause, Vm::Snapshot, Vm::PivotDisk, Vm::Resume] {
        let world = World::new(&ground);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            world.fake.delay(step, FOR_EVER);
            overtake(&world, &registry, &handle, saved()).await;
        });
    }
    for step in [Vm::Pause, Vm::Restore] {
        let world = World::new(&ground);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            let into = SnapshotId::random();
            ask(&handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
            world.fake.delay(step, FOR_EVER);
            let (told, ()) = tokio::join!(ask(&handle, Verb::Rollback { to: into.clone() }), async {
                quiet().await;
                destroy(&registry, &handle).await;
            });
            told.unwrap_err();
            world.calm();
            registry.host().snapshots.delete(&into).unwrap();
            assert!(world.remains().is_empty(), "{:?}", world.remains());
        });
    }
}

#[test]
fn a_destroy_overtakes_a_guest_that_does_not_answer() {
    let ground = Ground::new();
    for (call, verb) in
        [(Call::Prepare, Verb::Pause(Extent::Machine)), (Call::Prepare, saved()), (Call::Init, saved())]
    {
        let world = World::new(&ground);
        live(&world, async |registry| {
            let handle = created(&registry).await;
            world.guests.fail_next(call, Manner::Hang);
            overtake(&world, &registry, &handle, verb).await;
        });
    }
}

/// A destroy waited for the end of what was being tried.
#[test]
fn a_destroy_overtakes_a_machine_that_does_not_let_itself_be_taken_over() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = live(&world, async |registry| created(&registry).await.spec().id.clone());
    world.fake.fail_next(Vm::Adopt);
    live(&world, async |registry| {
        let handle = registry.get(&id).unwrap();
        assert!(handle.footing().is_none());
        world.fake.delay(Vm::Adopt, FOR_EVER);
        // By then it is tried again.
        tokio::time::sleep(2 * REGAIN_AGAIN).await;
        destroy(&registry, &handle).await;
    });
}

/// Ten minutes was what a destroy waited at most for a disk of many layers, before the capture began.
#[test]
fn a_destroy_overtakes_the_streaming_of_layers() {
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        world.fake.delay(Vm::StreamDisk, FOR_EVER);
        let store = registry.host().snapshots.clone();
        for _ in 0..32 {
            let into = SnapshotId::random();
            ask(&handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
            store.delete(&into).unwrap();
        }
        overtake(world, &registry, &handle, saved()).await;
    });
}

/// The last step of a capture had no bound, and is done by a thread that cannot be called back: it takes away what it
/// made for nobody.
#[test]
fn a_destroy_overtakes_a_disk_that_hangs() {
    let ground = Ground::new();
    for is_paused in [false, true] {
        for verb in [Verb::Pause(Extent::Machine), saved()] {
            if is_paused && verb == Verb::Pause(Extent::Machine) {
                continue;
            }
            // The first step is the beginning; at the last ones the snapshot is there already.
            for step in 1..6 {
                let world = World::new(&ground);
                live(&world, async |registry| {
                    let handle = created(&registry).await;
                    if is_paused {
                        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
                    }
                    world.control.hold_store_after(step);
                    let (told, ()) = tokio::join!(ask(&handle, verb.clone()), async {
                        while !world.control.holds_store() {
                            tokio::task::yield_now().await;
                        }
                        destroy(&registry, &handle).await;
                        assert!(world.control.holds_store(), "{verb:?}, {step}: it was waited for");
                        world.control.let_store_go();
                    });
                    assert!(told.is_err(), "{told:?}");
                });
                // The thread has ended with the agent.
                assert!(world.remains().is_empty(), "{verb:?}, {step}: {:?}", world.remains());
            }
        }
    }
}

/// The look for what a sandbox is put back to had no bound. The disk hangs here at the manifest: it is a pipe to which
/// nobody writes.
#[test]
fn a_snapshot_that_the_disk_keeps_is_not_waited_for_for_ever() {
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        let into = SnapshotId::random();
        ask(&handle, Verb::Snapshot { into: into.clone() }).await.unwrap();
        let manifest = world.at("agent/snapshots").join(into.as_str()).join("manifest.json");
        let text = std::fs::read(&manifest).unwrap();
        std::fs::remove_file(&manifest).unwrap();
        rustix::fs::mknodat(CWD, manifest.as_str(), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();

        let bound = bounds::find(handle.spec().shape.memory);
        let rollback = Verb::Rollback { to: into.clone() };
        let (told, ()) = tokio::join!(ask(&handle, rollback.clone()), async {
            // The clock stands still while a thread is waited for.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            tokio::time::advance(bound + Duration::from_secs(1)).await;
        });
        let Err(RequestError::Failed(error)) = told else { panic!("{told:?}") };
        let OperationError::Timeout { step: "finding the snapshot", bound: told } = *error else {
            panic!("{error:?}")
        };
        assert_eq!((told, handle.stage()), (bound, Stage::Running));

        // Who reads the pipe gets to its end, and then there is a file again.
        std::fs::write(&manifest, &text).unwrap();
        std::fs::remove_file(&manifest).unwrap();
        std::fs::write(&manifest, &text).unwrap();
        ask(&handle, rollback).await.unwrap();
        registry.host().snapshots.delete(&into).unwrap();
        end(world, &registry).await;
    });
}

/// What is saved outlives its agent, so one that stops waits for what it has begun to save.
#[test]
fn the_stop_of_an_agent_does_not_overtake_a_pause() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = live(&world, async |registry| {
        let handle = created(&registry).await;
        world.fake.delay(Vm::Snapshot, Duration::from_secs(20));
        let (told, ()) = tokio::join!(ask(&handle, Verb::Pause(Extent::Machine)), async {
            quiet().await;
            registry.close(OnStop::Destroy).await;
        });
        told.unwrap();
        handle.spec().id.clone()
    });
    assert!(record::read(&world.at("sandboxes"), &id).unwrap().paused.is_some());
    live(&world, async |registry| {
        let handle = registry.get(&id).unwrap();
        ask(&handle, RESUME).await.unwrap();
        destroy(&registry, &handle).await;
    });
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

/// A pause that a disk keeps from its end fails after its bound, the sandbox goes on, and nothing of it stays.
#[tokio::test]
async fn what_cannot_be_made_durable_in_time_is_given_up() {
    use crate::{
        sandbox::{capture::CaptureError, keeping::Keeping},
        snapshots::Snapshots,
    };
    let guard = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(camino::Utf8Path::from_path(guard.path()).unwrap()).unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (given_up, taken_away) = std::sync::mpsc::channel();
    let keeping = Keeping::default();
    let store = snapshots.clone();
    let made = keeping.keep(&snapshots, Duration::from_millis(20), move || {
        let making = store.begin(SnapshotId::random())?;
        released.recv().unwrap();
        given_up.send(making.state()).unwrap();
        Err(crate::snapshot_store::SnapshotStoreError::Exists { path: making.state() })
    });
    assert!(matches!(made.await, Err(CaptureError::Timeout { .. })));
    assert!(keeping.give_up(), "it stays given up");
    release.send(()).unwrap();
    assert!(taken_away.recv().unwrap().as_str().contains("making"));
}
