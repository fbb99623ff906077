//! The processes that filter names: how they come and go.

use std::time::Duration;

use wrenn_host_linux::{
    cgroup::Hierarchy,
    process::{Found, Spawn, find_by_argument},
};
use wrenn_types::InstanceId;

use super::{
    internet_of_names::{Filtered, Names, named, say, tls},
    life::{COLLECTING, crash, far_number},
    world::{Guest, INTERNET, Outcome, World, address, answered, can_run, is_gone},
};
use crate::network::{Slot, SlotPool, addresses::SlotNumber, collect, filter::confinement};

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
    assert_eq!(filters(number).len(), 1);
    slot.apply(&named(&[])).await.unwrap();
    assert_eq!(filters(number).len(), 1, "it stays for its streams");
    pool.release(slot).await;
    assert!(filters(number).is_empty() && !has_mark(number));
    assert!(is_gone(&world, &instance, number).await);
    pool.shutdown().await;
}

/// What the kernel says of each thread of a process. In a test there are more of them than one.
fn threads(pid: u32) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_a_user_of_its_own_and_can_do_nothing_but_serve() {
    let zone: &[(_, &[_])] = &[("a.example", &[INTERNET])];
    let Some(Filtered { pool, slot, guest, .. }) = Filtered::new(zone, &["allow a.example"]).await else {
        return;
    };
    let mut other = pool.take().await.unwrap();
    other.apply(&named(&["allow a.example"])).await.unwrap();
    let mut users = Vec::new();
    for number in [slot.number(), other.number()] {
        let [filter] = &filters(number)[..] else { panic!() };
        let (pid, user) = (filter.process.pid(), confinement::user(number));
        let threads = threads(pid);
        for status in &threads {
            let none = "0000000000000000";
            for line in [
                format!("Uid:\t{user}\t{user}\t{user}\t{user}\n"),
                format!("Gid:\t{user}\t{user}\t{user}\t{user}\n"),
                "Groups:\t \n".to_owned(),
                format!("CapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\n"),
            ] {
                assert!(status.contains(&line), "{line} is not in {status}");
            }
        }
        // The thread that reads what a guest sends: in a test it is not the only one.
        let confined = |status: &&String| status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2");
        assert_eq!(threads.iter().filter(confined).count(), 1, "{threads:?}");
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().take(2).map(|word| word.parse().unwrap()).collect::<Vec<u64>>()
        };
        for (name, value) in [
            ("Max open files", 1024),
            ("Max data size", 128 << 20),
            ("Max processes", 0),
            ("Max file size", 0),
            ("Max core file size", 0),
            ("Max locked memory", 0),
        ] {
            assert_eq!(limit(name), [value, value], "{name}");
        }
        users.push(user);
    }
    assert!(users[0] != users[1] || users[0] == 65_534, "{users:?}");

    // And it works, with all of that.
    assert_eq!(guest.look_up("a.example").await, Ok(vec![address(INTERNET)]));
    let answers = (0..32).map(|_| guest.talk(INTERNET, 443, tls("a.example")));
    assert!(futures::future::join_all(answers).await.iter().all(Outcome::is_answer));
    drop((slot, other));
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_are_control_groups_each_has_one_that_goes_with_it() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let config = world.config(0);
    let instance = config.instance.clone();
    let hierarchy = match Hierarchy::open(instance.as_str()) {
        Ok(hierarchy) => hierarchy,
        Err(absent) => {
            println!("skipped: {absent}");
            return;
        }
    };
    let pool = SlotPool::start(config).await.unwrap();
    let mut slot = pool.take().await.unwrap();
    let name = format!("filter-{}", slot.number());
    // What somebody left does not stand in the way.
    hierarchy.create(&name, &[]).unwrap();
    slot.apply(&named(&["allow a.example"])).await.unwrap();
    assert_eq!(hierarchy.names().unwrap(), std::slice::from_ref(&name));
    let members = || hierarchy.group(&name).processes().unwrap();
    let [first] = members()[..] else { panic!("{:?}", members()) };
    assert_eq!(filters(slot.number())[0].process.pid(), first);
    // The next one of the slot is in one of that name too.
    filters(slot.number())[0].process.kill().unwrap();
    until(async || matches!(hierarchy.group(&name).processes().as_deref(), Ok([next]) if *next != first))
        .await;
    pool.release(slot).await;
    assert!(hierarchy.names().unwrap().is_empty());

    // Whoever clears a slot that nobody holds removes the group of its owner.
    let _alone = COLLECTING.lock().await;
    let number = far_number(2);
    let lease = crash(&world, &instance, number).await;
    let mut vmm =
        Spawn::new("sleep").arg("600").keep_open(lease.share().unwrap()).die_with_parent().start().unwrap();
    drop(lease);
    pool.adopt(number, &named(&["allow a.example"])).await.unwrap().leave();
    assert_eq!(hierarchy.names().unwrap(), [format!("filter-{number}")]);
    vmm.kill().unwrap();
    vmm.wait().await.unwrap();
    let another = InstanceId::random();
    until(async || {
        collect(&another, &world.uplink()).await.unwrap();
        hierarchy.names().unwrap().is_empty()
    })
    .await;
    assert!(!has_mark(number));
    pool.shutdown().await;
    hierarchy.close();
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
