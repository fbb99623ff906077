//! What is done in a case, and what goes wrong meanwhile.

use proptest::{collection::vec, prelude::*};
use wrenn_vmm::fake::Step as Vm;

use super::guest::{Call, Manner};

/// Something that is asked at the same time as other things. Numbers choose one of what there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    Create,
    CreateFrom(u8),
    Pause(u8),
    PauseDisk(u8),
    Resume(u8),
    Snapshot(u8),
    /// So many snapshots that the layers of its disk become too many.
    Deepen(u8),
    Rollback(u8, u8),
    /// A timeout, and whether it kills.
    Timeout(u8, bool),
    /// A deadline, and whether it kills.
    Deadline(u8, bool),
    /// Another network policy, of a few.
    Network(u8, u8),
    Destroy(u8),
    Delete(u8),
}

/// Something that goes wrong meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Fails(Vm),
    /// It is done, and nobody is told so.
    Unanswered(Vm),
    Hangs(Vm),
    /// It takes as long as it may.
    Slow(Vm),
    Crashes(Vm),
    Guest(Call, Manner),
    DiskFull(u8),
    NoSlot,
    /// The record of a sandbox cannot be written, from the so manyth thing on that happens.
    Record(u8, u8),
    Dies(u8),
}

/// How a step ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    GoOn,
    /// The agent is killed at the so manyth thing that happens.
    Kill(u8),
    /// It is stopped, and leaves the sandboxes as they are.
    Stop,
    /// Nobody asks for anything for a long time.
    Idle,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) plans: Vec<Plan>,
    pub(super) fault: Option<Fault>,
    pub(super) end: End,
}

fn plan() -> impl Strategy<Value = Plan> {
    let which = any::<u8>;
    prop_oneof![
        2 => Just(Plan::Create),
        2 => which().prop_map(Plan::CreateFrom),
        4 => which().prop_map(Plan::Pause),
        3 => which().prop_map(Plan::PauseDisk),
        4 => which().prop_map(Plan::Resume),
        4 => which().prop_map(Plan::Snapshot),
        1 => which().prop_map(Plan::Deepen),
        4 => (which(), which()).prop_map(|(one, to)| Plan::Rollback(one, to)),
        1 => (which(), any::<bool>()).prop_map(|(one, kill)| Plan::Timeout(one, kill)),
        1 => (which(), any::<bool>()).prop_map(|(one, kill)| Plan::Deadline(one, kill)),
        2 => (which(), 0_u8..3).prop_map(|(one, number)| Plan::Network(one, number)),
        2 => which().prop_map(Plan::Destroy),
        1 => which().prop_map(Plan::Delete),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    let fails = vec![
        Vm::Boot,
        Vm::Restore,
        Vm::Pause,
        Vm::Resume,
        Vm::Snapshot,
        Vm::PivotDisk,
        Vm::StreamDisk,
        Vm::Stop,
    ];
    let lost = vec![Vm::Pause, Vm::Resume, Vm::Snapshot, Vm::PivotDisk];
    // What a machine itself bounds does not hang.
    let hangs = vec![Vm::Boot, Vm::Restore, Vm::Snapshot, Vm::PivotDisk, Vm::StreamDisk];
    let slow = vec![Vm::Pause, Vm::Resume, Vm::DiskChain, Vm::ResizeDisk, Vm::Stop];
    let call = prop_oneof![Just(Call::Health), Just(Call::Init), Just(Call::Prepare)];
    let manner = prop_oneof![Just(Manner::Refuse), Just(Manner::Break), Just(Manner::Hang)];
    prop_oneof![
        3 => prop::sample::select(fails.clone()).prop_map(Fault::Fails),
        2 => prop::sample::select(lost).prop_map(Fault::Unanswered),
        3 => prop::sample::select(hangs).prop_map(Fault::Hangs),
        2 => prop::sample::select(slow).prop_map(Fault::Slow),
        2 => prop::sample::select(fails[..6].to_vec()).prop_map(Fault::Crashes),
        3 => (call, manner).prop_map(|(call, manner)| Fault::Guest(call, manner)),
        3 => (0_u8..16).prop_map(Fault::DiskFull),
        1 => Just(Fault::NoSlot),
        3 => (any::<u8>(), 0_u8..12).prop_map(|(one, after)| Fault::Record(one, after)),
        1 => any::<u8>().prop_map(Fault::Dies),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let end = prop_oneof![
        10 => Just(End::GoOn),
        4 => (0_u8..40).prop_map(End::Kill),
        1 => Just(End::Stop),
        2 => Just(End::Idle),
    ];
    (vec(plan(), 0..4), proptest::option::weighted(0.3, fault()), end).prop_map(|(plans, fault, end)| Step {
        plans,
        fault,
        end,
    })
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(step(), 1..10).prop_map(|mut steps| {
        // Without a sandbox nothing can be asked.
        steps.insert(0, Step { plans: vec![Plan::Create], fault: None, end: End::GoOn });
        steps
    })
}
