//! How slots come and go: alone, many at once, after a crash, beside another stack.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt as _, task::JoinSet};
use wrenn_host_linux::netns::NetworkNamespace;
use wrenn_types::InstanceId;

use super::world::{
    Guest, INTERNET, OTHER_RESOLVER, Outcome, PORT, RESOLVER, World, answered, can_run, internet, is_gone,
    policy, rules,
};
use crate::network::{
    Policy, Slot, SlotError, SlotPool, Uplink, UplinkError, addresses::SlotNumber, collect, lease::Lease,
    making, nft, ruleset, uplink::OpenUplink,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_reaches_the_guest_and_nobody_else_through_it() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(2).await;
    let (one, two) = (pool.take().await.unwrap(), pool.take().await.unwrap());
    let (_first, _second) = (Guest::on(&one, "first").await, Guest::on(&two, "second").await);
    for (slot, name) in [(&one, "first"), (&two, "second")] {
        let mut answer = String::new();
        let mut stream = slot.connector().connect(PORT).await.unwrap();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, name);
        let refused = slot.connector().connect(1).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    let connector = one.connector();
    pool.release(one).await;
    let before = Instant::now();
    connector.connect(PORT).await.unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(1), "a connector outlives its slot and reaches nobody");
    drop(two);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_end_nothing_is_left() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let before = rules(&world.uplink.namespace).await;
    let config = world.config(2);
    let instance = config.instance.clone();
    let pool = SlotPool::start(config).await.unwrap();
    let taken = [pool.take().await.unwrap(), pool.take().await.unwrap(), pool.take().await.unwrap()];
    let numbers = taken.each_ref().map(|slot| slot.number());
    for number in numbers {
        assert!(!is_gone(&world, &instance, number).await);
    }
    let [released, dropped, kept] = taken;
    pool.release(released).await;
    assert!(is_gone(&world, &instance, numbers[0]).await, "when release answers, it is gone");
    drop(dropped);
    assert_eq!(pool.shutdown().await, 1, "one is still in somebody's hands");
    assert!(is_gone(&world, &instance, numbers[1]).await, "the end waits for what was dropped");
    assert!(!is_gone(&world, &instance, numbers[2]).await);
    assert_ne!(rules(&world.uplink.namespace).await, before, "the rules stay with it");
    assert!(matches!(pool.take().await, Err(SlotError::Stopped)));
    pool.release(kept).await;
    assert!(is_gone(&world, &instance, numbers[2]).await);
    assert_eq!(pool.shutdown().await, 0);
    assert_eq!(rules(&world.uplink.namespace).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_at_once_get_fifty_different_ones() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let config = world.config(4);
    let instance = config.instance.clone();
    let pool = SlotPool::start(config).await.unwrap();
    let begin = Instant::now();
    let mut takes = JoinSet::new();
    // Three of them are allowed an address that there is, and each of those another one.
    for index in 10..60 {
        let pool = pool.clone();
        takes.spawn(async move {
            let mut slot = pool.take().await.unwrap();
            slot.apply(&policy(&[&format!("allow 203.0.113.{index}")])).await.unwrap();
            (index, slot)
        });
    }
    let slots = takes.join_all().await;
    let taken = begin.elapsed();
    for (index, slot) in &slots {
        let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
        let rules = rules(&namespace).await;
        assert!(rules.contains(&format!("elements = {{ 203.0.113.{index} }}")), "{rules}");
    }
    let mut met = 0;
    for (index, slot) in &slots {
        let own = format!("203.0.113.{index}");
        if ![INTERNET, RESOLVER, OTHER_RESOLVER].contains(&&*own) {
            continue;
        }
        let guest = Guest::on(slot, "guest").await;
        for address in [INTERNET, RESOLVER, OTHER_RESOLVER] {
            let expected = if address == own { answered("outside") } else { Outcome::Refused };
            assert_eq!(guest.space.ask(address, PORT).await, expected, "{own} {address}");
        }
        met += 1;
    }
    assert_eq!(met, 3);
    let slots = slots.into_iter().map(|(_, slot)| slot).collect::<Vec<_>>();
    let mut numbers = slots.iter().map(Slot::number).collect::<Vec<_>>();
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 50);
    let begin = Instant::now();
    let mut releases = JoinSet::new();
    for slot in slots {
        let pool = pool.clone();
        releases.spawn(async move { pool.release(slot).await });
    }
    releases.join_all().await;
    println!("50 slots at once: taken and changed in {taken:?}, released in {:?}", begin.elapsed());
    for number in numbers {
        assert!(is_gone(&world, &instance, number).await, "{number}");
    }
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_take_that_is_given_up_loses_no_slot() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let config = world.config(0);
    let instance = config.instance.clone();
    let pool = SlotPool::start(config).await.unwrap();
    for micros in [0, 100, 1000, 5000, 20_000] {
        let _ = tokio::time::timeout(Duration::from_micros(micros), pool.take()).await;
    }
    assert_eq!(pool.shutdown().await, 0);
    assert_eq!(collect(&instance, &world.uplink()).await.unwrap().held, []);
    assert_eq!(rules(&world.uplink.namespace).await, "");
}

/// A collection takes whatever is nobody's, other tests' crashed slots too, so these go one after another.
pub(super) static COLLECTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Loses a slot as `kill -9` does: its leases are free, and everything else is as it was.
pub(super) async fn crash(world: &World, instance: &InstanceId, number: SlotNumber) -> Lease {
    let uplink = OpenUplink::open(instance, &world.uplink()).await.unwrap();
    uplink.prepare().await.unwrap();
    let made = making::make(Arc::new(uplink), Arc::default(), number, internet()).await.unwrap();
    assert_eq!(made.lease.number(), number);
    made.lease
}

/// Numbers that no pool of these tests comes to by itself, so that no other test collects them first.
pub(super) fn far_number(index: u16) -> SlotNumber {
    let base = u16::try_from(std::process::id() % 1000).unwrap() * 8 + 20_000;
    SlotNumber::new(base + index).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_leaves_is_collected_and_what_lives_is_not() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let (ours, theirs) = (InstanceId::random(), InstanceId::random());
    // Another stack, alive.
    let neighbour =
        SlotPool::start(crate::network::PoolConfig { instance: theirs.clone(), ..world.config(1) })
            .await
            .unwrap();
    let neighbours = neighbour.take().await.unwrap();
    let guest = Guest::on(&neighbours, "guest").await;
    // Ours, dead: of one slot the VMM still lives and holds the lease.
    let dead = crash(&world, &ours, far_number(0)).await;
    let alive = crash(&world, &ours, far_number(1)).await;
    let vmm = alive.share().unwrap();
    drop((dead, alive));

    let collected = collect(&ours, &world.uplink()).await.unwrap();
    assert!(collected.removed.contains(&far_number(0)), "{collected:?}");
    assert_eq!(collected.held, [far_number(1)]);
    assert!(is_gone(&world, &ours, far_number(0)).await);
    assert!(!is_gone(&world, &ours, far_number(1)).await, "its lock is held");
    assert!(rules(&world.uplink.namespace).await.contains(&ruleset::uplink_table(&ours)), "its rules stay");

    drop(vmm);
    let collected = collect(&ours, &world.uplink()).await.unwrap();
    assert!(collected.removed.contains(&far_number(1)), "{collected:?}");
    assert!(is_gone(&world, &ours, far_number(1)).await);
    let left = rules(&world.uplink.namespace).await;
    assert!(!left.contains(&ruleset::uplink_table(&ours)) && left.contains(&ruleset::uplink_table(&theirs)));
    assert_eq!(
        guest.space.ask(INTERNET, PORT).await,
        answered("outside"),
        "the other stack has noticed nothing"
    );
    neighbour.release(neighbours).await;
    neighbour.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_whose_owner_died_is_cleared_before_its_use() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let instance = InstanceId::random();
    drop(crash(&world, &instance, far_number(2)).await);
    // The former owner's uplink was another one.
    let elsewhere = World::new().await;
    let lease = crash(&elsewhere, &instance, far_number(2)).await;
    assert!(!is_gone(&elsewhere, &instance, far_number(2)).await);
    let old = far_number(2).outer();
    world.uplink.shell(&format!("! ip link show {old} 2>/dev/null")).await;
    drop(lease);
    collect(&instance, &elsewhere.uplink()).await.unwrap();
    assert!(is_gone(&elsewhere, &instance, far_number(2)).await);
}

/// A slot with this number and no other, in nobody's pool.
async fn make(
    world: &World,
    instance: &InstanceId,
    number: SlotNumber,
    pool: &SlotPool,
    words: &[&str],
) -> Slot {
    let uplink = OpenUplink::open(instance, &world.uplink()).await.unwrap();
    uplink.prepare().await.unwrap();
    let made = making::make(Arc::new(uplink), Arc::default(), number, policy(words)).await.unwrap();
    assert_eq!(made.lease.number(), number);
    Slot::new(made, pool.requests.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_that_is_used_again_knows_nothing_of_its_former_policy() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let (world, instance, number) = (World::new().await, InstanceId::random(), far_number(2));
    let pool = world.pool(0).await;
    for is_crash in [false, true, false] {
        for (words, address, is_reached) in [
            (&["deny 203.0.113.10", "egress 8000", "ingress 8000"][..], INTERNET, false),
            (&["dns 203.0.113.53"], INTERNET, true),
            (&["allow 203.0.113.53"], INTERNET, false),
            (&["allow a.example"], RESOLVER, false),
            (&["offline"], RESOLVER, false),
            (&["dns 203.0.113.53"], RESOLVER, true),
        ] {
            let slot = make(&world, &instance, number, &pool, words).await;
            let guest = Guest::on(&slot, "guest").await;
            if is_reached {
                assert_eq!(guest.space.ask(address, PORT).await, answered("outside"), "{words:?}");
            } else {
                assert!(!guest.space.probe(address, PORT).await.is_answer(), "{words:?}");
            }
            drop(guest);
            let prepared = slot.into_prepared().unwrap();
            // A crash leaves everything as it is, but for the lock.
            if !is_crash {
                prepared.dismantle().await.unwrap();
                assert!(is_gone(&world, &instance, number).await);
            }
        }
    }
    collect(&instance, &world.uplink()).await.unwrap();
    assert!(is_gone(&world, &instance, number).await);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_made_leaves_nothing() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let instance = InstanceId::random();
    let number = far_number(3);
    world.uplink.shell(&format!("ip link add {} type veth peer name in-the-way", number.outer())).await;
    let uplink = OpenUplink::open(&instance, &world.uplink()).await.unwrap();
    let error = making::make(Arc::new(uplink), Arc::default(), number, internet()).await.unwrap_err();
    assert!(matches!(error, SlotError::Link { .. }), "{error:?}");
    assert!(is_gone(&world, &instance, number).await);
}

#[tokio::test]
async fn an_uplink_that_is_not_there_is_said_so() {
    if !can_run() {
        return;
    }
    let nowhere = Uplink::Named("wrenn-test-nowhere".parse().unwrap());
    let error = collect(&InstanceId::random(), &nowhere).await.unwrap_err();
    assert!(matches!(error, SlotError::Uplink(UplinkError::Namespace(_))), "{error:?}");
    let nobody: InstanceId = "00000000".parse().unwrap();
    let error = collect(&nobody, &Uplink::Host).await.unwrap_err();
    assert!(matches!(error, SlotError::Uplink(UplinkError::InstanceId(_))), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_text_is_one_that_nft_takes() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    world.uplink.shell("ip tuntap add tap0 mode tap").await;
    for id in ["00000001", "7fffffff", "80000000", "ffffffff"] {
        let instance: InstanceId = id.parse().unwrap();
        let group = ruleset::link_group(&instance).unwrap();
        for policy in policies() {
            for text in [ruleset::slot, ruleset::slot_again] {
                let text = text(&instance, SlotNumber::LAST, &policy);
                nft::check(&world.uplink.namespace, text).await.unwrap();
            }
        }
        nft::check(&world.uplink.namespace, ruleset::uplink(&instance, group)).await.unwrap();
        nft::check(&world.uplink.namespace, ruleset::without_uplink(&instance)).await.unwrap();
    }
    assert_eq!(rules(&world.uplink.namespace).await, "", "a check loads nothing");

    let instance = InstanceId::random();
    let (namespace, all) = (&world.uplink.namespace, policies());
    let mut former = all[0].clone();
    nft::load(namespace, ruleset::slot(&instance, SlotNumber::LAST, &former)).await.unwrap();
    for from in &all {
        for policy in [from, &former.clone(), from].into_iter().chain(&all) {
            for text in ruleset::change(Some(&former), policy) {
                nft::load(namespace, text).await.unwrap();
            }
            former = policy.clone();
        }
        for text in ruleset::change(None, from) {
            nft::load(namespace, text).await.unwrap();
        }
        let changed = rules(namespace).await;
        nft::load(namespace, ruleset::slot_again(&instance, SlotNumber::LAST, from)).await.unwrap();
        assert_eq!(rules(namespace).await, changed, "many changes lead to what one text says");
        former = from.clone();
    }
}

/// Policies whose lists repeat, touch and overlap each other, from one end of the addresses to the other.
fn policies() -> Vec<Policy> {
    [
        &[][..],
        &["offline"],
        &["dns 1.1.1.1"],
        &["dns 1.1.1.1", "dns 8.8.8.8", "allow 0.0.0.0/0", "deny 255.255.255.255", "deny 0.0.0.0"],
        &["offline", "deny 0.0.0.0/0"],
        &["allow 1.1.1.0/24", "allow 1.1.2.0/24", "allow 1.1.1.7", "deny 1.1.1.128/25"],
        &["allow 1.1.0.0/16", "deny 1.1.1.0/24", "deny 1.1.3.0/24", "deny 1.1.2.0/24"],
        &["allow 128.0.0.0/1", "allow 1.1.1.1", "allow 1.1.1.3", "deny 128.0.0.0/1", "dns 8.8.4.4"],
    ]
    .map(policy)
    .to_vec()
}

/// Not a limit, a measurement: the numbers are printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_long_the_steps_take() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(0).await;
    let mut steps = [const { Vec::new() }; 4];
    let _ = pool.take().await.unwrap();
    for _ in 0..10 {
        let begin = Instant::now();
        let mut slot = pool.take().await.unwrap();
        steps[0].push(begin.elapsed());
        let begin = Instant::now();
        slot.apply(&policy(&["offline", "dns 203.0.113.53"])).await.unwrap();
        steps[1].push(begin.elapsed());
        let guest = Guest::on(&slot, "guest").await;
        let connector = slot.connector();
        for _ in 0..10 {
            let begin = Instant::now();
            connector.connect(PORT).await.unwrap();
            steps[2].push(begin.elapsed());
        }
        drop(guest);
        let begin = Instant::now();
        pool.release(slot).await;
        steps[3].push(begin.elapsed());
    }
    for (name, mut times) in
        ["make a slot", "apply another policy", "connect to the guest", "release"].iter().zip(steps)
    {
        times.sort();
        println!("{name}: median {:?}, slowest {:?}", times[times.len() / 2], times.last().unwrap());
    }
    pool.shutdown().await;
}
