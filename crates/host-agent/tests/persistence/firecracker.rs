//! The same on Firecracker, in the lab: a sandbox that is made, used, paused, resumed, saved, and taken over; on disks
//! that are files, and on those of the device mapper.

use std::sync::Arc;

use libtest_mimic::Trial;
use wrenn_host_agent::config::{DiskDriver, MemoryBackendFlag};
use wrenn_testkit::stack;

use super::{Kind, Place, Running, adoption, broken_off, pause_and_resume, snapshots, with_place};

pub(super) fn trials() -> Vec<Trial> {
    let skip = stack::cannot_run_firecracker();
    if let Some(why) = &skip {
        println!("{why}");
    }
    let trial_on = |kind: Kind, name: &str, run: fn(Arc<Place>) -> Running| {
        let run = move || with_place(kind, run);
        Trial::test(name, move || run().map_err(|error| format!("{error:?}").into()))
            .with_ignored_flag(skip.is_some())
    };
    let devices = Kind { disks: Some(DiskDriver::DmSnapshot), ..Kind::FIRECRACKER };
    let pager = Kind { memory: MemoryBackendFlag::Uffd, ..Kind::FIRECRACKER };
    let trial = |name: &str, run| trial_on(Kind::FIRECRACKER, name, run);
    let on_devices = |name: &str, run| trial_on(devices, name, run);
    let served = |name: &str, run| trial_on(pager, name, run);
    vec![
        trial("firecracker::what_is_paused_comes_back", |place| Box::pin(pause_and_resume(place))),
        trial("firecracker::a_snapshot_outlives_everything_else", |place| Box::pin(snapshots(place))),
        trial("firecracker::another_agent_goes_on_where_one_left", |place| Box::pin(adoption(place))),
        on_devices("firecracker::dm_snapshot::what_is_paused_comes_back", |place| {
            Box::pin(pause_and_resume(place))
        }),
        on_devices("firecracker::dm_snapshot::a_snapshot_outlives_everything_else", |place| {
            Box::pin(snapshots(place))
        }),
        on_devices("firecracker::dm_snapshot::another_agent_goes_on_where_one_left", |place| {
            Box::pin(adoption(place))
        }),
        served("firecracker::pager::what_is_paused_comes_back", |place| Box::pin(pause_and_resume(place))),
        served("firecracker::pager::another_agent_goes_on_where_one_left", |place| Box::pin(adoption(place))),
        served("firecracker::pager::a_create_that_is_broken_off_leaves_nothing", |place| {
            Box::pin(broken_off::leaves_nothing(place))
        }),
    ]
}
