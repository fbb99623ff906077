//! What the two clocks of a sandbox ask for, and when it is done.

use std::time::Duration;

use futures::future::{join, join_all};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex, split},
    time::{Instant, sleep},
};
use wrenn_types::{EndReason, InactivityTimeout, SandboxId, TimeoutAction};

use super::{
    Extent, Stage, Verb, Vm,
    lives::{RESUME, ask, end, live_alone},
    world::{spec, wall},
};
use crate::{
    registry::Registry,
    sandbox::{Deadline, Handle, Settings, Status},
    tunnel::copy,
};

const PAUSE: TimeoutAction = TimeoutAction::Pause;
const KILL: TimeoutAction = TimeoutAction::Kill;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn deadline(after: Duration, action: TimeoutAction) -> Option<Deadline> {
    Some(Deadline { at: wall() + after, action })
}

fn idle(count: i64) -> InactivityTimeout {
    InactivityTimeout::new(count).unwrap()
}

async fn created(registry: &Registry, change: impl FnOnce(&mut Settings)) -> Handle {
    let mut spec = spec(SandboxId::random(), None);
    change(&mut spec.settings);
    let handle = registry.create(spec).unwrap();
    assert_eq!(handle.settled().await.stage, Stage::Running);
    handle
}

/// Waits until something is published, and says when.
async fn when(handle: &Handle, is: impl FnMut(&Status) -> bool) -> Instant {
    handle.watch().wait_for(is).await.unwrap();
    Instant::now()
}

/// The clock of these tests all but stands still while anything is done: what is on time is so but for a few ticks.
#[track_caller]
fn exact(found: Instant, expected: Instant) {
    let off = found.max(expected) - found.min(expected);
    assert!(off <= Duration::from_millis(200), "{off:?} off");
}

/// What is carried moves the clock, in either direction and however little. A connection that is only open does not, and
/// neither does its end, nor whoever asks how the sandbox is.
#[test]
fn every_byte_is_activity_and_an_open_connection_is_not() {
    live_alone(async |world, registry| {
        let handle = created(&registry, |settings| settings.timeout = idle(60)).await;
        let ((mut caller, ours), (theirs, mut guest)) = (duplex(64), duplex(64));
        let ((from_caller, to_caller), (from_guest, to_guest)) = (split(ours), split(theirs));
        let up = copy(from_caller, to_guest, &handle, true);
        let down = copy(from_guest, to_caller, &handle, false);
        let script = async {
            for _ in 0..5 {
                sleep(seconds(55)).await;
                caller.write_all(b"?").await.unwrap();
                guest.read_u8().await.unwrap();
                sleep(seconds(55)).await;
                guest.write_all(b"!").await.unwrap();
                caller.read_u8().await.unwrap();
            }
            let last = Instant::now();
            assert_eq!(handle.stage(), Stage::Running);
            // The connection is left open for a while, and then closed.
            sleep(seconds(40)).await;
            assert_eq!(handle.status().stage, Stage::Running);
            drop((caller, guest));
            last
        };
        let ((carried_up, carried_down), last) = join(join(up, down), script).await;
        carried_up.and(carried_down).unwrap();
        exact(when(&handle, |status| status.stage != Stage::Running).await, last + seconds(60));
        assert_eq!(handle.settled().await.stage, Stage::Paused);
        end(world, &registry).await;
    });
}

#[test]
fn a_pause_for_inactivity_that_fails_is_told_and_done_later() {
    live_alone(async |world, registry| {
        let handle = created(&registry, |settings| settings.timeout = idle(60)).await;
        let begun = Instant::now();
        world.fake.fail_next(Vm::Snapshot);
        let failed = when(&handle, |status| status.last_failure.is_some()).await;
        exact(failed, begun + seconds(60));
        let status = handle.status();
        assert_eq!((status.stage, status.deadline_again), (Stage::Running, None));
        let failure = status.last_failure.unwrap();
        assert!(failure.starts_with("the sandbox could not be saved: "), "{failure}");
        let [machine] = &world.machines(&handle.spec().id)[..] else { panic!("not one machine") };
        assert_eq!(world.fake.is_running(machine), Some(true));
        assert!(!world.guests.look(machine).unwrap().closed);

        // It has to be idle for as long once more.
        let paused = when(&handle, |status| status.stage == Stage::Paused).await;
        exact(paused, failed + seconds(60));
        assert_eq!(handle.status().last_failure, None);
        end(world, &registry).await;
    });
}

#[test]
fn a_pause_at_a_deadline_that_fails_is_told_and_tried_again() {
    live_alone(async |world, registry| {
        let (begun, asked) = (Instant::now(), deadline(seconds(100), PAUSE));
        let handle = created(&registry, |settings| settings.deadline = asked).await;
        world.fake.fail_next(Vm::Snapshot);
        world.fake.fail_next(Vm::Snapshot);
        for attempt in 0..2 {
            let failed = when(&handle, |status| status.deadline_again.is_some()).await;
            exact(failed, begun + seconds(100 + 30 * attempt));
            let status = handle.status();
            assert_eq!((status.stage, status.settings.deadline), (Stage::Running, asked));
            assert!(status.last_failure.is_some());
            let again = status.deadline_again.unwrap().duration_since(wall());
            assert!((29_800..=30_200).contains(&again.as_millis()), "{again:?}");
            // The next attempt is another publication.
            let again = status.deadline_again;
            if attempt == 0 {
                when(&handle, |status| status.deadline_again != again).await;
            }
        }
        let paused = when(&handle, |status| status.stage == Stage::Paused).await;
        exact(paused, begun + seconds(160));
        let status = handle.status();
        assert_eq!((status.last_failure, status.deadline_again), (None, None));
        assert_eq!((status.settings.deadline, status.deadline_met), (None, asked.map(|asked| asked.at)));
        // It is over.
        ask(&handle, RESUME).await.unwrap();
        tokio::time::sleep(seconds(10_000)).await;
        assert_eq!(handle.stage(), Stage::Running);
        end(world, &registry).await;
    });
}

#[test]
fn a_deadline_that_kills_ends_what_is_paused() {
    live_alone(async |world, registry| {
        let (begun, asked) = (Instant::now(), deadline(seconds(1000), KILL));
        let handle = created(&registry, |settings| settings.deadline = asked).await;
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        let stopped = when(&handle, |status| status.stage == Stage::Stopped).await;
        exact(stopped, begun + seconds(1000));
        assert_eq!(handle.status().end.unwrap().reason, EndReason::Deadline);
        end(world, &registry).await;
    });
}

/// Each of 2,000 sandboxes, several of them at the same moment, is paused or ended when its own time has come.
#[test]
fn with_thousands_each_clock_is_exact() {
    const COUNT: u64 = 2000;
    live_alone(async |_, registry| {
        // It makes the template's snapshot, for which the others would wait.
        created(&registry, |_| {}).await;
        let lives = (0..COUNT).map(|number| {
            let registry = &registry;
            async move {
                let after = 600 + number * 7919 % 900;
                let action = if number % 2 == 0 { PAUSE } else { KILL };
                let by_deadline = number % 4 < 2;
                let due = Instant::now() + seconds(after);
                let handle = created(registry, |settings| {
                    if by_deadline {
                        settings.deadline = deadline(seconds(after), action);
                    } else {
                        settings.timeout = idle(after.try_into().unwrap());
                        settings.on_timeout = action;
                    }
                });
                let handle = handle.await;
                // Inactivity is counted from when it runs.
                let due = if by_deadline { due } else { Instant::now() + seconds(after) };
                exact(when(&handle, |status| status.stage != Stage::Running).await, due);
                let status = handle.settled().await;
                let reason = status.end.map(|end| end.reason);
                match (action, by_deadline) {
                    (PAUSE, _) => assert_eq!((status.stage, reason), (Stage::Paused, None)),
                    (KILL, true) => assert_eq!(reason, Some(EndReason::Deadline)),
                    (KILL, false) => assert_eq!(reason, Some(EndReason::Inactivity)),
                }
            }
        });
        join_all(lives).await;
    });
}
