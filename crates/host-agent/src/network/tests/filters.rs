//! The processes that filter names: how they come and go.

use std::time::Duration;

use wrenn_host_linux::process::{Found, Spawn, find_by_argument};
use wrenn_types::InstanceId;

use super::{
    internet_of_names::{Filtered, Names, named, say, tls},
    life::{COLLECTING, crash, far_number},
    world::{Guest, INTERNET, Outcome, World, address, answered, can_run, is_gone},
};
use crate::network::{Slot, SlotPool, addresses::SlotNumber, collect};

/// The filters of a slot.
fn filters(number: SlotNumber) -> Vec<Found> {
    find_by_argument(&format!("wrenn-filter-of-{:05}", number.get())).unwrap()
}

fn has_mark(number: SlotNumber) -> bool {
    number.lease().with_extension("filter").exists()
}

/// Whether no thread of a process runs: it takes a moment until all of them have stopped.
fn stands_still(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut states =
        threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    states.all(|status| status.contains("State:\tT"))
}

async fn until(condition: impl AsyncFn() -> bool) {
    let waited = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waited).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_one_when_it_is_needed_and_it_ends_with_its_slot() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let config = world.config(1);
    let instance = config.instance.clone();
    let pool = SlotPool::start(config).await.unwrap();
    let mut slot = pool.take().await.unwrap();
    let number = slot.number();
    assert!(filters(number).is_empty() && !has_mark(number));
    slot.apply(&named(&["offline", "allow a.example"])).await.unwrap();
    assert!(filters(number).is_empty(), "there is nothing to filter");
    slot.apply(&named(&["allow a.example"])).await.unwrap();
    let [filter] = &filters(number)[..] else { panic!() };
    let status = std::fs::read_to_string(format!("/proc/{}/status", filter.process.pid())).unwrap();
    for line in
        ["Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000"]
    {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    slot.apply(&named(&[])).await.unwrap();
    assert_eq!(filters(number).len(), 1, "it stays for its streams");
    pool.release(slot).await;
    assert!(filters(number).is_empty() && !has_mark(number));
    assert!(is_gone(&world, &instance, number).await);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_filter_a_guest_reaches_nothing_until_there_is_another() {
    let filtered = Filtered::new(&[("a.example", &[INTERNET])], &["allow a.example"]).await;
    let Some(Filtered { pool, mut slot, guest, .. }) = filtered else { return };
    guest.look_up("a.example").await.unwrap();
    let stream = guest.connect(INTERNET, 443).await.unwrap();
    assert!(say(&stream, tls("a.example")).await.is_answer());

    let [former] = &filters(slot.number())[..] else { panic!() };
    former.process.kill_and_wait().await.unwrap();
    assert_eq!(say(&stream, b"ping".to_vec()).await, Outcome::Refused);
    assert_eq!(guest.talk(INTERNET, 443, tls("a.example")).await, Outcome::Refused);
    until(async || !filters(slot.number()).is_empty()).await;
    assert_eq!(guest.look_up("a.example").await, Ok(vec![address(INTERNET)]));
    assert!(guest.talk(INTERNET, 443, tls("a.example")).await.is_answer());

    // One that stands still is replaced as soon as it has to listen.
    let [second] = &filters(slot.number())[..] else { panic!() };
    second.process.signal(wrenn_host_linux::process::Signal::STOP).unwrap();
    until(async || stands_still(second.process.pid())).await;
    slot.apply(&named(&["allow *.example"])).await.unwrap();
    assert!(!second.process.is_alive().unwrap());
    assert_eq!(guest.look_up("a.example").await, Ok(vec![address(INTERNET)]));
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_the_agent() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let names = Names::of(&world).await;
    names.put("a.example", &[INTERNET]);
    let config = world.config(0);
    let instance = config.instance.clone();
    let former = SlotPool::start(config.clone()).await.unwrap();
    let mut slot: Slot = former.take().await.unwrap();
    let policy = named(&["allow a.example"]);
    slot.apply(&policy).await.unwrap();
    let mut vmm =
        Spawn::new("sleep").arg("600").keep_open(slot.lock().unwrap()).die_with_parent().start().unwrap();
    let guest = Guest::on(&slot, "guest").await;
    guest.look_up("a.example").await.unwrap();
    let stream = guest.connect(INTERNET, 443).await.unwrap();
    assert!(say(&stream, tls("a.example")).await.is_answer());
    let goes_on = async || assert_eq!(say(&stream, b"ping".to_vec()).await, answered("ping"));

    let number = slot.leave();
    former.shutdown().await;
    drop(former);
    goes_on().await;
    let collected = collect(&instance, &world.uplink()).await.unwrap();
    assert_eq!(collected.held, [number]);
    let pool = SlotPool::start(config).await.unwrap();
    let before = filters(number)[0].process.pid();
    let mut slot = pool.adopt(number, &policy).await.unwrap();
    goes_on().await;
    assert_eq!(filters(number).iter().map(|found| found.process.pid()).collect::<Vec<_>>(), [before]);
    assert!(guest.talk(INTERNET, 443, tls("a.example")).await.is_answer(), "what was pinned is");
    slot.apply(&named(&["allow *.example"])).await.unwrap();
    goes_on().await;

    // It is not a child of this agent's any more, and is watched all the same.
    filters(number)[0].process.kill().unwrap();
    until(async || filters(number).first().is_some_and(|found| found.process.pid() != before)).await;
    vmm.kill().unwrap();
    vmm.wait().await.unwrap();
    pool.release(slot).await;
    assert!(filters(number).is_empty() && is_gone(&world, &instance, number).await);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_agent_leaves_is_collected() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let (world, instance) = (World::new().await, InstanceId::random());
    let number = far_number(3);
    let lease = crash(&world, &instance, number).await;
    let pool = SlotPool::start(crate::network::PoolConfig { instance: instance.clone(), ..world.config(0) });
    let pool = pool.await.unwrap();
    let mut vmm =
        Spawn::new("sleep").arg("600").keep_open(lease.share().unwrap()).die_with_parent().start().unwrap();
    drop(lease);
    let mut slot = pool.adopt(number, &named(&["allow a.example"])).await.unwrap();
    slot.apply(&named(&["allow b.example"])).await.unwrap();
    assert_eq!(filters(number).len(), 1);
    slot.leave();
    vmm.kill().unwrap();
    vmm.wait().await.unwrap();
    // A child that somebody has just forked may have the lock for a moment longer, and whoever collects on this
    // machine may have been quicker.
    until(async || {
        collect(&instance, &world.uplink()).await.unwrap();
        is_gone(&world, &instance, number).await && filters(number).is_empty()
    })
    .await;
    assert!(!has_mark(number));

    // Whatever else is gone, the mark alone leads to a filter that is left.
    let name = format!("wrenn-filter-of-{:05}", number.get());
    let mut lost = Spawn::new("sh").args(["-c", "kill -STOP $$", &name]).die_with_parent().start().unwrap();
    std::fs::write(number.lease().with_extension("filter"), "").unwrap();
    until(async || {
        collect(&instance, &world.uplink()).await.unwrap();
        !has_mark(number)
    })
    .await;
    assert!(lost.process().ended().await.is_ok() && filters(number).is_empty());
    let _ = lost.try_wait();
    drop(pool);
}
