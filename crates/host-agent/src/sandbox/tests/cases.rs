//! Orders that once ended badly, each at every moment at which it may be broken off.

use std::{
    fs,
    pin::Pin,
    sync::{Arc, Mutex},
};

use wrenn_types::{SandboxId, SnapshotId};
use wrenn_vmm::ExitReason;

use super::{
    Call, Disks, End, Fault, Ground, Manner, Plan, Stage, Step, Verb, Vm, World, record, run, world::spec,
};
use crate::{
    config::OnStop,
    registry::Registry,
    sandbox::{
        RequestError,
        bring_up::BringUpError,
        driver::{OperationError, chain},
        record::Record,
        source::SourceError,
    },
    snapshots::{Extent, Look, Progress, tests::damage::flip},
};

type Life = Pin<Box<dyn Future<Output = ()>>>;

/// More things than happen in one step of these.
const THINGS: u8 = 24;

fn step(plans: &[Plan], fault: Option<Fault>, end: End) -> Step {
    Step { plans: plans.to_vec(), fault, end }
}

/// Does one thing after the other, and the last one with a fault and an end of each kind.
fn check(before: &[&[Plan]], last: &[Plan], troubles: impl IntoIterator<Item = (Option<Fault>, End)>) {
    let ground = Ground::new();
    for (fault, end) in troubles {
        let mut steps = before.iter().map(|plans| step(plans, None, End::GoOn)).collect::<Vec<_>>();
        steps.push(step(last, fault, end));
        // Whatever came of it, what there is can be used.
        steps.push(step(&[Plan::Snapshot(0)], None, End::GoOn));
        steps.push(step(&[Plan::Pause(0), Plan::Resume(0)], None, End::GoOn));
        for disks in [Disks::Layered, Disks::Plain] {
            if let Err(error) = run(&ground, disks, &steps) {
                panic!("{fault:?}, {end:?}, {disks:?}: {error}");
            }
        }
    }
}

fn kills() -> impl Iterator<Item = (Option<Fault>, End)> {
    (0..THINGS).map(|after| (None, End::Kill(after)))
}

fn records() -> impl Iterator<Item = (Option<Fault>, End)> {
    (0..THINGS).map(|after| (Some(Fault::Record(0, after)), End::GoOn))
}

/// The record named only the machine that was being made: the next agent ended the one that ran, and the sandbox
/// with it.
#[test]
fn an_agent_killed_in_a_rollback_loses_no_sandbox_that_ran() {
    check(&[&[Plan::Create], &[Plan::Snapshot(0)]], &[Plan::Rollback(0, 0)], kills());
}

#[test]
fn an_agent_killed_in_a_resume_loses_nothing() {
    check(&[&[Plan::Create], &[Plan::Pause(0)]], &[Plan::Resume(0)], kills());
}

/// Lives an agent's life on what is in the world, and then kills it.
fn in_an_agent(world: &World<'_>, life: impl FnOnce(Registry) -> Life) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async { life(world.agent().await).await });
    world.fake.lose_owners();
}

/// Makes a sandbox that runs.
fn create(world: &World<'_>) -> SandboxId {
    let id = SandboxId::random();
    let wanted = spec(id.clone(), None);
    in_an_agent(world, |registry| {
        Box::pin(async move {
            let status = registry.create(wanted).unwrap().settled().await;
            assert_eq!(status.stage, Stage::Running);
        })
    });
    id
}

/// Its directory was left, because its record had named it.
#[test]
fn of_a_machine_that_ended_while_nobody_looked_nothing_is_left() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    for machine in world.machines(&id) {
        assert!(world.fake.end(&machine, ExitReason::VmmKilled { signal: 9 }));
    }
    in_an_agent(&world, |registry| Box::pin(async move { assert!(registry.get(&id).is_none()) }));
    let remains = world.remains();
    assert!(remains.is_empty(), "{remains:?}");
}

/// Nobody knew any more that the snapshot from which it was resumed was to be deleted.
#[test]
fn what_a_sandbox_was_resumed_from_is_deleted_by_the_next_agent_at_the_latest() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = SandboxId::random();
    let obsolete = || record::read(&world.at("sandboxes"), &id).unwrap().obsolete;
    let (fake, at, moved) = (world.fake.clone(), world.at("agent/snapshots"), Arc::new(Mutex::new(None)));
    let told = Arc::clone(&moved);
    let wanted = spec(id.clone(), None);
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            let handle = registry.create(wanted).unwrap();
            handle.settled().await;
            handle.request(Verb::Pause(Extent::Machine), None).await.unwrap();
            let saved = handle.status().paused.unwrap().snapshot;
            let (manifest, aside) = (at.join(saved.as_str()).join("manifest.json"), at.join("aside"));
            *told.lock().unwrap() = Some((manifest.clone(), aside.clone()));
            // When it has been read, something that cannot be removed is in its place.
            fake.observe(move |step| {
                if step == Vm::Resume {
                    fs::rename(&manifest, &aside).unwrap();
                    fs::create_dir_all(manifest.join("in the way")).unwrap();
                }
                true
            });
            handle.request(Verb::Resume { timeout: None }, None).await.unwrap();
        })
    });
    assert!(obsolete().is_some());
    world.fake.observe(|_| true);
    let (manifest, aside) = moved.lock().unwrap().take().unwrap();
    fs::remove_dir_all(&manifest).unwrap();
    fs::rename(aside, manifest).unwrap();
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move { assert_eq!(registry.get(&same).unwrap().stage(), Stage::Running) })
    });
    assert_eq!(obsolete(), None);
}

/// What it was saved as was gone and its record was not: it was paused for ever as nothing.
#[test]
fn an_agent_killed_in_a_delete_leaves_the_sandbox_or_nothing() {
    let ground = Ground::new();
    for (fault, end) in kills().chain(records()) {
        let steps = [
            step(&[Plan::Create], None, End::GoOn),
            step(&[Plan::Pause(0)], None, End::GoOn),
            step(&[Plan::Destroy(0)], fault, end),
        ];
        for disks in [Disks::Layered, Disks::Plain] {
            if let Err(error) = run(&ground, disks, &steps) {
                panic!("{fault:?}, {end:?}, {disks:?}: {error}");
            }
        }
    }
}

/// A guest that was closed before the record said so stayed closed.
#[test]
fn an_agent_killed_in_a_capture_leaves_no_guest_closed() {
    check(&[&[Plan::Create]], &[Plan::Snapshot(0)], kills());
    check(&[&[Plan::Create]], &[Plan::Pause(0)], kills());
}

/// The machine was on its next layer, and the record in memory did not name it: the next snapshot was of another
/// disk.
#[test]
fn a_record_that_cannot_be_written_is_not_another_disk() {
    check(&[&[Plan::Create]], &[Plan::Snapshot(0)], records());
    check(&[&[Plan::Create]], &[Plan::Pause(0)], records());
    check(&[&[Plan::Create], &[Plan::Snapshot(0)]], &[Plan::Rollback(0, 0)], records());
    check(&[&[Plan::Create], &[Plan::Pause(0)]], &[Plan::Resume(0)], records());
    // What it may reach was changed then, and what it was said to be able to was not.
    check(&[&[Plan::Create]], &[Plan::Snapshot(0), Plan::Network(0, 1)], records());
    let lost = (Some(Fault::Unanswered(Vm::PivotDisk)), End::GoOn);
    check(&[&[Plan::Create]], &[Plan::Snapshot(0)], [lost]);
}

/// It was published as running, and stood still for ever.
#[test]
fn what_does_not_go_on_at_once_is_told_so_again() {
    let guest = [Manner::Refuse, Manner::Break, Manner::Hang].map(|manner| Fault::Guest(Call::Init, manner));
    let machine = [Fault::Fails(Vm::Resume), Fault::Unanswered(Vm::Resume), Fault::Unanswered(Vm::Pause)];
    let troubles = guest.into_iter().chain(machine).map(|fault| (Some(fault), End::GoOn)).collect::<Vec<_>>();
    check(&[&[Plan::Create]], &[Plan::Snapshot(0)], troubles.clone());
    check(&[&[Plan::Create], &[Plan::Snapshot(0)]], &[Plan::Rollback(0, 0)], troubles);
}

/// Whatever did not answer when an agent started was taken for dead, and ended.
#[test]
fn a_machine_that_does_not_answer_is_tried_again() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    world.fake.fail_next(Vm::Adopt);
    world.fake.fail_next(Vm::Adopt);
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            let handle = registry.get(&same).unwrap();
            let status = handle.status();
            assert_eq!((status.stage, handle.footing().is_some()), (Stage::Running, false));
            assert!(status.last_failure.unwrap().contains("cannot be controlled"));
            let refused = handle.request(Verb::Pause(Extent::Machine), None).await.unwrap_err();
            assert!(
                matches!(refused, RequestError::Failed(error) if matches!(*error, OperationError::Astray(_)))
            );
            handle.watch().wait_for(|status| status.last_failure.is_none()).await.unwrap();
            handle.request(Verb::Pause(Extent::Machine), None).await.unwrap();
            handle.request(Verb::Resume { timeout: None }, None).await.unwrap();
        })
    });
    assert_eq!(world.machines(&id).len(), 1);
}

#[test]
fn a_machine_that_never_answers_can_be_destroyed_or_left() {
    for ends in [true, false] {
        let ground = Ground::new();
        let world = World::new(&ground);
        let id = create(&world);
        for _ in 0..100 {
            world.fake.fail_next(Vm::Adopt);
        }
        let (same, at) = (id.clone(), world.at("sandboxes"));
        in_an_agent(&world, |registry| {
            Box::pin(async move {
                if ends {
                    registry.destroy(&same, None).await.unwrap();
                } else {
                    registry.close(OnStop::Leave).await;
                }
                assert_eq!(record::read(&at, &same).is_none(), ends);
            })
        });
        world.calm();
        in_an_agent(&world, |registry| {
            Box::pin(async move {
                let stage = registry.get(&id).map(|handle| handle.stage());
                assert_eq!(stage, (!ends).then_some(Stage::Running));
                registry.close(OnStop::Destroy).await;
            })
        });
        assert!(world.remains().is_empty(), "{:?}", world.remains());
    }
}

/// What could not be read was taken for half-made, and removed.
#[test]
fn a_record_that_cannot_be_read_is_no_reason_to_end_a_sandbox() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    let path = world.at("sandboxes").join(id.as_str()).join("record.json");
    let text = fs::read_to_string(&path).unwrap();
    for damaged in [text.replacen("\"format\":2", "\"format\":3", 1), text[1..].to_owned()] {
        fs::write(&path, damaged).unwrap();
        let same = id.clone();
        in_an_agent(&world, |registry| {
            Box::pin(async move {
                assert!(registry.get(&same).is_none());
                // Nobody is to take it for gone.
                assert_eq!(registry.unreadable().keys().collect::<Vec<_>>(), [&same]);
            })
        });
        assert_eq!(world.machines(&id).len(), 1);
    }
    fs::write(&path, text).unwrap();
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            assert!(registry.unreadable().is_empty());
            registry.get(&same).unwrap().request(Verb::Pause(Extent::Machine), None).await.unwrap();
        })
    });
}

/// The record went on to say that it is paused, so that a later start that found the snapshot again ended the machine.
#[test]
fn a_machine_that_is_adopted_is_the_sandbox_at_every_later_start() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = SandboxId::random();
    let wanted = spec(id.clone(), None);
    let (path, agent) =
        (world.at("sandboxes").join(id.as_str()).join("record.json"), world.at("agent/snapshots"));
    let (paused_at, kept_aside) = (path.clone(), world.at("aside"));
    let aside = kept_aside.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            let handle = registry.create(wanted).unwrap();
            handle.settled().await;
            handle.request(Verb::Pause(Extent::Machine), None).await.unwrap();
            let saved = handle.status().paused.unwrap().snapshot;
            fs::create_dir(&aside).unwrap();
            for entry in agent.join(saved.as_str()).read_dir_utf8().unwrap() {
                let entry = entry.unwrap();
                fs::hard_link(entry.path(), aside.join(entry.file_name())).unwrap();
            }
            handle.request(Verb::Resume { timeout: None }, None).await.unwrap();
            // As an agent leaves it that is killed when the machine is up, and before that is the sandbox.
            let mut record: Record = serde_json::from_slice(&fs::read(&paused_at).unwrap()).unwrap();
            record.paused = Some(record::PausedRecord { snapshot: saved, at: jiff::Timestamp::UNIX_EPOCH });
            fs::write(&paused_at, serde_json::to_vec(&record).unwrap()).unwrap();
        })
    });
    let saved = record::read(&world.at("sandboxes"), &id).unwrap().paused.unwrap().snapshot;
    let runs = |registry: Registry| {
        let id = id.clone();
        Box::pin(async move { assert_eq!(registry.get(&id).unwrap().stage(), Stage::Running) }) as Life
    };
    in_an_agent(&world, runs);
    // Whatever was wrong with it is right again.
    fs::rename(&kept_aside, world.at("agent/snapshots").join(saved.as_str())).unwrap();
    in_an_agent(&world, runs);
    assert_eq!(world.machines(&id).len(), 1);
}

/// One bit of a base that a scrub had found made every machine on it unreachable, and what was paused stayed so.
#[test]
fn a_machine_on_a_damaged_base_is_reached_and_goes_on() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    let base = world.at("agent/bases").read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    flip(&base.join("memory"), 100, 1);
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            let store = &registry.host().snapshots;
            for part in store.parts().unwrap() {
                if let Look::Contents(mut reading) = store.look(&part).unwrap() {
                    while let Ok(Progress::More(_)) = reading.read(u64::MAX) {}
                }
            }
            assert_eq!(registry.get(&same).unwrap().stage(), Stage::Running);
        })
    });
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            let handle = registry.get(&id).unwrap();
            assert_eq!((handle.status().last_failure, handle.footing().is_some()), (None, true));
            let refused = handle.request(Verb::Pause(Extent::Machine), None).await.unwrap_err();
            let RequestError::Failed(error) = refused else { panic!("{refused:?}") };
            assert!(chain(error.as_ref()).contains("memory is damaged"), "{error:?}");
            assert_eq!(handle.stage(), Stage::Running);
            registry.destroy(&id, None).await.unwrap();
        })
    });
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

/// The cache's own file was whole, so that nothing was made anew, and no sandbox came of the template any more.
#[test]
fn a_template_whose_base_is_a_damaged_copy_is_made_anew() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    let bases = || world.at("agent/bases").read_dir_utf8().unwrap().map(|it| it.unwrap().into_path());
    let memory = bases().next().unwrap().join("memory");
    // As where the cache is on another file system.
    let copy = world.at("copy");
    fs::copy(&memory, &copy).unwrap();
    flip(&copy, 100, 1);
    fs::rename(&copy, &memory).unwrap();
    let other = create(&world);
    assert_eq!((world.machines(&id).len(), world.machines(&other).len()), (1, 1));
    assert_eq!(bases().count(), 2);
}

/// A power cut can empty a record that was not synced. It stayed for ever as one that nobody can read, and no layer of
/// any sandbox was collected any more.
#[test]
fn a_record_that_a_power_cut_has_emptied_is_none() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    let path = world.at("sandboxes").join(id.as_str()).join("record.json");
    for machine in world.machines(&id) {
        world.fake.end(&machine, ExitReason::VmmKilled { signal: 9 });
    }
    fs::write(&path, "").unwrap();
    in_an_agent(&world, |registry| Box::pin(async move { assert!(registry.get(&id).is_none()) }));
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

async fn cannot_resume(registry: &Registry, id: &SandboxId) {
    let handle = registry.get(id).unwrap();
    assert_eq!(handle.stage(), Stage::Paused);
    assert!(handle.status().last_failure.is_some());
    handle.request(Verb::Resume { timeout: None }, None).await.unwrap_err();
    assert_eq!(handle.stage(), Stage::Paused);
}

/// One whose snapshot could not be read was not known any more: it could be neither resumed later nor destroyed.
#[test]
fn what_is_paused_and_cannot_be_read_stays_paused() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = create(&world);
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            registry.get(&same).unwrap().request(Verb::Pause(Extent::Machine), None).await.unwrap();
        })
    });
    let snapshots = world.at("agent/snapshots");
    let snapshot = snapshots.read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    let manifest = snapshot.join("manifest.json");
    let text = fs::read(&manifest).unwrap();
    let mut damaged = text.clone();
    damaged[20] ^= 1;
    fs::write(&manifest, damaged).unwrap();
    let same = id.clone();
    in_an_agent(&world, |registry| Box::pin(async move { cannot_resume(&registry, &same).await }));
    fs::write(&manifest, text).unwrap();
    let same = id.clone();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            registry.get(&same).unwrap().request(Verb::Resume { timeout: None }, None).await.unwrap();
            registry.get(&same).unwrap().request(Verb::Pause(Extent::Machine), None).await.unwrap();
        })
    });
    let snapshot = snapshots.read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    // A snapshot without a manifest is none, and goes; what was saved as it is still known, until it is destroyed.
    fs::remove_file(snapshot.join("manifest.json")).unwrap();
    in_an_agent(&world, |registry| {
        Box::pin(async move {
            cannot_resume(&registry, &id).await;
            registry.destroy(&id, None).await.unwrap();
        })
    });
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

/// A disk that was written is what a machine boots from, whoever breaks it off; and the boot ends, or leaves what was
/// paused.
#[test]
fn a_pause_of_the_disk_and_the_boot_after_it_lose_nothing() {
    let create: &[Plan] = &[Plan::Create];
    let pause: &[Plan] = &[Plan::PauseDisk(0)];
    let in_pause =
        [Manner::Refuse, Manner::Break, Manner::Hang].map(|manner| Fault::Guest(Call::Prepare, manner));
    let troubles = in_pause.into_iter().map(|fault| (Some(fault), End::GoOn));
    check(&[create], pause, kills().chain(records()).chain(troubles));
    let in_boot = [Fault::Fails(Vm::Boot), Fault::Hangs(Vm::Boot), Fault::Crashes(Vm::Boot)];
    let in_guest = [Manner::Refuse, Manner::Break, Manner::Hang];
    let in_guest = in_guest.map(|manner| [Call::Health, Call::Init].map(|call| Fault::Guest(call, manner)));
    let troubles = in_boot.into_iter().chain(in_guest.into_iter().flatten());
    let troubles = troubles.map(|fault| (Some(fault), End::GoOn));
    check(&[create, pause], &[Plan::Resume(0)], kills().chain(records()).chain(troubles));
}

/// A machine that was booted is saved, put back and started from like one that was restored, also by another agent.
#[test]
fn what_was_booted_is_like_any_other() {
    let booted: &[&[Plan]] = &[&[Plan::Create], &[Plan::PauseDisk(0)], &[Plan::Resume(0)]];
    let stopped = || kills().chain([(None, End::Stop), (None, End::GoOn)]);
    check(booted, &[Plan::Snapshot(0)], stopped());
    check(booted, &[Plan::PauseDisk(0)], stopped());
    let saved = [booted, &[&[Plan::Snapshot(0)]]].concat();
    check(&saved, &[Plan::Rollback(0, 0)], stopped());
    check(&saved, &[Plan::CreateFrom(0)], stopped());
    check(&[&saved[..], &[&[Plan::Pause(0)]]].concat(), &[Plan::Resume(0)], stopped());
}

/// There is nothing to go on from in a disk: who wants a snapshot resumes first.
#[test]
fn what_is_paused_without_memory_is_not_copied() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let registry = world.agent().await;
        let handle = registry.create(spec(SandboxId::random(), None)).unwrap();
        handle.settled().await;
        let whole = Verb::Pause(Extent::Machine);
        handle.request(whole.clone(), None).await.unwrap();
        let with_memory = handle.status().paused.unwrap().bytes;
        handle.request(Verb::Resume { timeout: None }, None).await.unwrap();
        handle.request(Verb::Pause(Extent::Disk), None).await.unwrap();
        let paused = handle.status().paused.unwrap();
        assert!(paused.bytes < with_memory, "{} and {with_memory} bytes", paused.bytes);
        // It is paused already.
        handle.request(whole, None).await.unwrap();
        assert_eq!(handle.status().paused.unwrap(), paused);

        let refused = handle.request(Verb::Snapshot { into: SnapshotId::random() }, None).await;
        let Err(RequestError::Failed(error)) = refused else { panic!("{refused:?}") };
        assert!(matches!(*error, OperationError::DiskOnly), "{error:?}");
        let other = registry.create(spec(SandboxId::random(), Some(paused.snapshot))).unwrap();
        let end = other.settled().await.end.unwrap();
        let why = end.error.as_deref();
        assert!(matches!(why, Some(BringUpError::Source(SourceError::DiskOnly(_)))), "{why:?}");
        registry.destroy(&handle.spec().id, None).await.unwrap();
    });
    drop(runtime);
    assert_eq!(world.remains().len(), 0, "{:?}", world.remains());
}

/// The layers below the top one were made one again and again for as long as that could not be recorded, and nothing
/// else on the machine got its turn.
#[test]
fn a_record_that_cannot_be_written_is_not_tried_without_a_pause() {
    let deep: &[&[Plan]] = &[&[Plan::Create], &[Plan::Deepen(0)]];
    for to in 0..10 {
        let troubles = (4..16).step_by(3).map(|after| (Some(Fault::Record(0, after)), End::GoOn));
        check(deep, &[Plan::Rollback(0, to)], troubles);
    }
}
