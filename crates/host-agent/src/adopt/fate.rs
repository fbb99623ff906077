//! What a sandbox goes on as, by its record and by what was found of what it may be saved as. Pure.
//!
//! ```text
//!  found        │ its machine was up                       │ it was not
//!  ─────────────┼──────────────────────────────────────────┼────────────────────────────────────────────
//!  a snapshot   │ paused as that                           │ paused as that
//!  none, or one │ the machine: what it may have been saved │ paused, if that is recorded: it may be read
//!  not readable │   as is not taken for it at a later start│   at a later start; else nothing
//! ```
//!
//! A rollback that was not answered is undone first: the machine is then the former one.

use crate::{
    sandbox::record::{PausedRecord, Record},
    snapshots::Kept,
};
use wrenn_types::SnapshotId;

/// What a sandbox goes on as.
#[derive(Debug)]
pub(super) enum Fate {
    /// What it is saved as, and what was read of that, or why it cannot be.
    Paused(PausedRecord, Result<Box<Kept>, String>),
    /// The machine that its record names.
    Machine,
}

/// The snapshot that a sandbox is to be taken for, if it is to be taken for one.
pub(super) fn saved_as(record: &Record) -> Option<&SnapshotId> {
    let capture = record.capture.as_ref().filter(|capture| capture.pause).map(|capture| &capture.snapshot);
    record.paused.as_ref().map(|paused| &paused.snapshot).or(capture)
}

/// Whether the machine that a record names is whole: its guest was itself once.
fn has_machine(record: &Record) -> bool {
    record.machine.as_ref().is_some_and(|machine| machine.up)
}

/// Decides with what was `found` of [`saved_as`], which is nothing where that is nothing. The record is the one to go
/// on with.
pub(super) fn decide(mut record: Record, found: Result<Option<Kept>, String>) -> (Record, Option<Fate>) {
    let why = match (found, &record.paused) {
        // A pause whose machine was not ended yet, or a resume that was not answered: what is saved is it.
        (Ok(Some(kept)), recorded) => {
            let at = recorded.as_ref().map_or(kept.about.created_at, |paused| paused.at);
            let saved = PausedRecord { snapshot: kept.id.clone(), at };
            record.layers.clone_from(&kept.about.layers);
            record.base.clone_from(&kept.about.base);
            return paused(record, saved, Ok(Box::new(kept)));
        }
        // A resume whose machine is the sandbox says so in one step with this; until then it is what was saved.
        (found, Some(saved)) if !has_machine(&record) => {
            let missing = || format!("there is no snapshot {} on this host", saved.snapshot);
            let why = found.err().unwrap_or_else(missing);
            let saved = saved.clone();
            return paused(record, saved, Err(why));
        }
        (found, _) => found.err(),
    };
    // A rollback that was not answered: the machine that stands still goes on.
    record.go_back();
    if !has_machine(&record) {
        return (record, None);
    }
    // From here on the machine is the sandbox, and does more than what may have been saved: at no later start is it
    // to be taken for that, also if that can be read then.
    if record.paused.is_some() {
        record.give_up();
    }
    if let Some(capture) = record.capture.as_mut().filter(|capture| capture.pause) {
        capture.pause = false;
        if why.is_some() && record.obsolete.is_none() {
            record.obsolete = Some(capture.snapshot.clone());
        }
    }
    (record, Some(Fate::Machine))
}

fn paused(
    mut record: Record,
    saved: PausedRecord,
    kept: Result<Box<Kept>, String>,
) -> (Record, Option<Fate>) {
    record.paused = Some(saved.clone());
    (record.capture, record.machine, record.former) = (None, None, None);
    (record, Some(Fate::Paused(saved, kept)))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use jiff::Timestamp;
    use proptest::{option, prelude::*};
    use wrenn_types::LayerId;

    use super::*;
    use crate::{
        sandbox::record::{self, CaptureRecord, FormerRecord, MachineRecord},
        snapshots::tests::{damage::Whole, snapshot},
    };

    static KEPT: LazyLock<Kept> = LazyLock::new(|| Whole::new().kept);

    fn machine(up: bool) -> MachineRecord {
        MachineRecord { name: LayerId::random(), slot: 7, up, maker: None }
    }

    fn records() -> impl Strategy<Value = Record> {
        let half = (option::of(any::<bool>()), any::<bool>(), option::of(any::<bool>()));
        (half, any::<bool>(), any::<bool>()).prop_map(
            |((up, is_paused, pauses), has_former, has_obsolete)| {
                let record = record::tests::record();
                let former = || FormerRecord {
                    machine: machine(true),
                    layers: vec![LayerId::random()],
                    base: record.base.clone(),
                };
                let at = Timestamp::UNIX_EPOCH;
                Record {
                    machine: up.map(machine),
                    // What is paused has no machine that could be gone back to.
                    former: (has_former && !is_paused).then(former),
                    paused: is_paused.then(|| PausedRecord { snapshot: KEPT.id.clone(), at }),
                    capture: pauses.map(|pause| CaptureRecord {
                        snapshot: KEPT.id.clone(),
                        pause,
                        next_layer: Some(LayerId::random()),
                    }),
                    obsolete: has_obsolete.then(|| snapshot(9)),
                    ..record
                }
            },
        )
    }

    fn findings() -> impl Strategy<Value = Result<Option<Kept>, String>> {
        prop_oneof![Just(Ok(Some(KEPT.clone()))), Just(Ok(None)), Just(Err("it cannot be read".to_owned()))]
    }

    /// What is there of what a record says.
    fn look(record: &Record, found: &Result<Option<Kept>, String>) -> Result<Option<Kept>, String> {
        if saved_as(record).is_some() { found.clone() } else { Ok(None) }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_a_later_start_decides_the_same(
            before in records(),
            found in findings(),
            later in findings(),
        ) {
            let (after, fate) = decide(before.clone(), look(&before, &found));
            let (last, again) = decide(after.clone(), look(&after, &later));
            match &fate {
                Some(Fate::Machine) => {
                    prop_assert!(matches!(again, Some(Fate::Machine)), "it runs, and at a later start it is {again:?}");
                    prop_assert!(has_machine(&after) && after.former.is_none());
                    let layers = before.former.as_ref().map_or(&before.layers, |former| &former.layers);
                    prop_assert_eq!(layers, &after.layers);
                    prop_assert!(!matches!(look(&before, &found), Ok(Some(_))));
                    let next = |record: &Record| record.capture.as_ref().map(|it| it.next_layer.clone());
                    prop_assert_eq!(next(&before), next(&after), "it has to be told to go on");
                    prop_assert_eq!(&last, &after);
                }
                Some(Fate::Paused(saved, kept)) => {
                    prop_assert!(matches!(again, Some(Fate::Paused(..))), "it is paused, and later {again:?}");
                    prop_assert_eq!(after.paused.as_ref(), Some(saved));
                    prop_assert_eq!(Some(&saved.snapshot), saved_as(&before));
                    prop_assert!(after.machine.is_none() && after.capture.is_none() && after.former.is_none());
                    if let Ok(kept) = kept {
                        prop_assert_eq!((&kept.about.layers, &kept.about.base), (&after.layers, &after.base));
                    }
                    prop_assert_eq!(&after.obsolete, &before.obsolete, "what it is saved as is not deleted");
                }
                None => {
                    prop_assert!(before.paused.is_none() && !has_machine(&before) && before.former.is_none());
                }
            }
        }
    }
}
