//! Orders that once ended badly, each at every moment at which it may be broken off.

use std::pin::Pin;

use wrenn_types::SandboxId;

use super::{Call, End, Fault, Ground, Manner, Plan, Stage, Step, Verb, Vm, World, record, run, world::spec};
use crate::registry::Registry;

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
        if let Err(error) = run(&ground, &steps) {
            panic!("{fault:?}, {end:?}: {error}");
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

/// Nobody knew any more that the snapshot from which it was resumed was to be deleted.
#[test]
fn what_a_sandbox_was_resumed_from_is_deleted_by_the_next_agent_at_the_latest() {
    let ground = Ground::new();
    let world = World::new(&ground);
    let id = SandboxId::random();
    let in_an_agent = |life: &mut dyn FnMut(Registry) -> Life| {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async { life(world.agent().await).await });
        world.fake.lose_owners();
    };
    let obsolete = || record::read(&world.at("sandboxes"), &id).unwrap().obsolete;
    let control = world.control.clone();
    in_an_agent(&mut |registry| {
        let (id, control) = (id.clone(), control.clone());
        Box::pin(async move {
            let handle = registry.create(spec(id, None)).unwrap();
            handle.settled().await;
            handle.request(Verb::Pause, None).await.unwrap();
            control.fill_disk_after(Some(0));
            handle.request(Verb::Resume { timeout: None }, None).await.unwrap();
        })
    });
    assert!(obsolete().is_some());
    in_an_agent(&mut |registry| {
        let id = id.clone();
        Box::pin(async move { assert_eq!(registry.get(&id).unwrap().stage(), Stage::Running) })
    });
    assert_eq!(obsolete(), None);
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
