//! The same on Firecracker, in the lab: a sandbox that is made, used, paused, resumed, saved, and taken over.

use std::sync::Arc;

use libtest_mimic::Trial;
use wrenn_host_agent::config::VmmDriver;
use wrenn_testkit::stack;

use super::{Place, Running, adoption, pause_and_resume, snapshots, with_place};

pub(super) fn trials() -> Vec<Trial> {
    let skip = stack::cannot_run_firecracker();
    if let Some(why) = &skip {
        println!("{why}");
    }
    let trial = |name: &str, run: fn(Arc<Place>) -> Running| {
        let run = move || with_place(VmmDriver::Firecracker, run);
        Trial::test(name, move || run().map_err(|error| format!("{error:?}").into()))
            .with_ignored_flag(skip.is_some())
    };
    vec![
        trial("firecracker::what_is_paused_comes_back", |place| Box::pin(pause_and_resume(place))),
        trial("firecracker::a_snapshot_outlives_everything_else", |place| Box::pin(snapshots(place))),
        trial("firecracker::another_agent_goes_on_where_one_left", |place| Box::pin(adoption(place))),
    ]
}
