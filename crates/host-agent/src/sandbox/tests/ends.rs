//! A machine that ends by itself is noticed at once, and its end has its reason.

use tokio::time::Instant;
use wrenn_types::EndReason;
use wrenn_vmm::ExitReason;

use super::{
    Extent, Ground, RequestError, Stage, Verb, Vm, World,
    lives::{RESUME, ask, created, end, live, live_alone},
    quiet,
};
use crate::sandbox::{driver, queue::Denied};

fn table() -> [(ExitReason, EndReason, &'static str); 5] {
    let failed = ExitReason::VmmFailed { code: 3, stderr: "no memory".to_owned() };
    [
        (ExitReason::GuestShutdown, EndReason::GuestShutdown, ""),
        (ExitReason::GuestPanic, EndReason::GuestPanic, ""),
        (failed, EndReason::VmmCrash, "ended with code 3: no memory"),
        (ExitReason::VmmKilled { signal: 11 }, EndReason::VmmCrash, "killed by signal 11"),
        (ExitReason::Stopped, EndReason::VmmCrash, "was stopped"),
    ]
}

#[test]
fn each_end_of_a_machine_has_its_reason() {
    live_alone(async |world, registry| {
        for (exit, reason, words) in table() {
            let handle = created(&registry).await;
            let [machine] = &world.machines(&handle.spec().id)[..] else { panic!("not one machine") };
            let begun = Instant::now();
            assert!(world.fake.end(machine, exit.clone()));
            let told = handle.stopped().await.end.unwrap();
            assert_eq!(begun.elapsed().as_secs(), 0, "{exit:?} was not noticed at once");
            assert_eq!(told.reason, reason, "{exit:?}");
            assert!(told.message.contains(words) && !told.message.is_empty(), "{exit:?}: {}", told.message);
            assert!(told.error.is_none());
            let late = ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap_err();
            assert!(matches!(late, RequestError::Denied(Denied::Ended)), "{late:?}");
        }
        end(world, &registry).await;
    });
}

/// What a process that does not end may still use was said to be left to it, and its network was taken away.
#[test]
fn a_machine_that_does_not_stop_keeps_its_slot() {
    let ground = Ground::new();
    let world = World::new(&ground);
    live(&world, async |registry| {
        let handle = created(&registry).await;
        let slot = handle.footing().unwrap().slot;
        world.fake.fail_next(Vm::Stop);
        registry.destroy(&handle.spec().id, None).await.unwrap();
        quiet().await;
        assert!(world.numbers.given().contains(&slot), "{:?}", world.numbers.given());
    });
    // The next start collects it.
    world.calm();
    world.collect();
    assert!(world.remains().is_empty(), "{:?}", world.remains());
}

/// It is the sandbox until all of it is saved, and nothing of it any more after that.
#[test]
fn a_machine_that_ends_while_it_is_saved_has_crashed_unless_all_is_saved() {
    live_alone(async |world, registry| {
        let handle = created(&registry).await;
        world.fake.crash_after(Vm::Pause);
        let told = ask(&handle, Verb::Pause(Extent::Machine)).await;
        assert_eq!(handle.stopped().await.end.unwrap().reason, EndReason::VmmCrash);
        assert!(told.is_err(), "{told:?}");

        let handle = created(&registry).await;
        world.fake.crash_after(Vm::Snapshot);
        ask(&handle, Verb::Pause(Extent::Machine)).await.unwrap();
        ask(&handle, RESUME).await.unwrap();
        assert_eq!(handle.stage(), Stage::Running);
        end(world, &registry).await;
    });
}

/// A machine that the kernel kills for its memory is killed as by anybody else; its control group tells.
#[test]
fn the_kernel_says_whether_it_was_the_memory() {
    for (exit, reason, _) in table() {
        assert_eq!(driver::exited(&exit, false).reason, reason);
        let told = driver::exited(&exit, true);
        assert_eq!((told.reason, told.message), (EndReason::Oom, EndReason::Oom.to_string()));
    }
}
