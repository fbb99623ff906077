//! The same on Firecracker, in the lab: a sandbox that is made, used, paused, resumed, saved, and taken over.

use std::sync::Arc;

use libtest_mimic::Trial;
use wrenn_host_agent::config::VmmDriver;

use super::{Place, Running, adoption, pause_and_resume, snapshots, with_place};

/// What it takes: a Firecracker, and a kernel under which KVM is known to run a guest.
fn cannot_run() -> Option<&'static str> {
    if std::env::var_os("WRENN_LAB").is_none() {
        return Some("skipped: it is the lab in which Firecracker is known to run guests");
    }
    std::env::var_os("WRENN_FIRECRACKER")
        .is_none()
        .then_some("skipped: WRENN_FIRECRACKER names no Firecracker")
}

pub(super) fn trials() -> Vec<Trial> {
    let skip = cannot_run();
    if let Some(why) = skip {
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
