//! Slots that outlive the agent that made them. A child process that holds the lock plays the VMM.

use std::{
    net::{IpAddr, UdpSocket},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use wrenn_host_linux::{
    netns::NetworkNamespace,
    process::{Child, Spawn},
};
use wrenn_types::InstanceId;

use super::{
    life::{COLLECTING, crash, far_number},
    world::{
        Guest, INTERNET, OTHER_RESOLVER, Outcome, PORT, PRIVATE, RESOLVER, Space, World, answered, can_run,
        internet, is_gone, policy, rules, shell,
    },
};
use crate::network::{
    PoolConfig, SlotError, SlotPool, addresses::SlotNumber, collect, lease::Leases, ruleset,
    uplink::OpenUplink,
};

/// How often rules are replaced under load. Where there was such a moment, every second one let some pass.
const ADOPTIONS: usize = 40;

/// A process that has the lock of a slot, and ends when it is told.
struct Holder(Child);

impl Holder {
    fn new(lock: OwnedFd) -> Self {
        Self(Spawn::new("sleep").arg("600").keep_open(lock).die_with_parent().start().unwrap())
    }

    async fn end(mut self) {
        self.0.kill().unwrap();
        self.0.wait().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_agent_takes_a_slot_over() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let config = PoolConfig { ready: 0, ..world.config(0) };
    let instance = config.instance.clone();
    let former = SlotPool::start(config.clone()).await.unwrap();
    let slot = former.take().await.unwrap();
    let vmm = Holder::new(slot.lock().unwrap());
    let guest = Guest::on(&slot, "guest").await;
    let number = slot.leave();
    assert_eq!(former.shutdown().await, 1, "it is not forgotten");
    drop(former);
    let survives = async || {
        assert!(!is_gone(&world, &instance, number).await);
        assert!(rules(&world.uplink.namespace).await.contains(&ruleset::uplink_table(&instance)));
        assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"), "with no agent at all");
    };
    survives().await;

    let collected = collect(&instance, &world.uplink()).await.unwrap();
    assert_eq!(collected.held, [number]);
    survives().await;
    let pool = SlotPool::start(config).await.unwrap();
    survives().await;

    let mut slot = pool.adopt(number, &internet()).await.unwrap();
    survives().await;
    assert_eq!((slot.number(), slot.name_servers().len()), (number, 1));
    let again = pool.adopt(number, &internet()).await.unwrap_err();
    assert!(matches!(again, SlotError::InUse(used) if used == number), "{again:?}");
    let other = pool.take().await.unwrap();
    assert_ne!(other.number(), number);
    let early = slot.lock().unwrap_err();
    assert!(matches!(early, SlotError::Held(_)), "{early:?}");

    slot.apply(&policy(&[&format!("deny {INTERNET}")])).await.unwrap();
    assert_eq!(guest.space.ask(INTERNET, PORT).await, Outcome::Refused);
    assert_eq!(guest.space.ask(OTHER_RESOLVER, PORT).await, answered("outside"));
    let mut answer = String::new();
    let mut stream = slot.connector().connect(PORT).await.unwrap();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer).await.unwrap();
    assert_eq!(answer, "guest");

    vmm.end().await;
    let next_vmm = Holder::new(slot.lock().unwrap());
    next_vmm.end().await;
    pool.release(slot).await;
    assert!(is_gone(&world, &instance, number).await);
    drop(other);
    assert_eq!(pool.shutdown().await, 0);
    assert!(!rules(&world.uplink.namespace).await.contains(&ruleset::uplink_table(&instance)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_slot_whose_vmm_has_ended_is_released() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let config = world.config(0);
    let instance = config.instance.clone();
    let lost = [0, 1].map(|index| far_number(4 + index));
    let pool = SlotPool::start(config).await.unwrap();
    for (number, ends_first) in lost.into_iter().zip([true, false]) {
        let lease = crash(&world, &instance, number).await;
        let vmm = Holder::new(lease.share().unwrap());
        drop(lease);
        let adopt = async || pool.adopt(number, &policy(&["offline", "egress 1000000"])).await.unwrap();
        if ends_first {
            vmm.end().await;
            pool.release(adopt().await).await;
        } else {
            let slot = adopt().await;
            vmm.end().await;
            pool.release(slot).await;
        }
        assert!(is_gone(&world, &instance, number).await);
    }
    assert_eq!(pool.shutdown().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_ours_is_adopted() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let world = World::new().await;
    let (ours, theirs) = (world.pool(0).await, world.pool(0).await);
    let slot = theirs.take().await.unwrap();
    for number in [slot.number(), far_number(7)] {
        let error = ours.adopt(number, &internet()).await.unwrap_err();
        assert!(matches!(error, SlotError::NotOurs(refused) if refused == number), "{error:?}");
    }
    drop(slot);
    theirs.shutdown().await;
    ours.shutdown().await;
}

/// The pool's own list keeps a number whose VMM has ended, which no lock does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_number_is_given_to_nobody() {
    if !can_run() {
        return;
    }
    let _alone = COLLECTING.lock().await;
    let (world, instance) = (World::new().await, InstanceId::random());
    let number = far_number(6);
    let lease = crash(&world, &instance, number).await;
    let vmm = Holder::new(lease.share().unwrap());
    drop(lease);
    let leases = Arc::new(Leases::default());
    let adopted = leases.adopt(number, &instance).unwrap();
    vmm.end().await;
    let another = leases.take(number).unwrap();
    assert!(another.number() > number, "{another:?}");
    another.remove().unwrap();
    drop(adopted);
    let free = leases.take(number).unwrap();
    assert_eq!(free.number(), number);
    drop(free);
    collect(&instance, &world.uplink()).await.unwrap();
    assert!(is_gone(&world, &instance, number).await);
}

/// Sends datagrams without a pause for as long as `work` takes. Answers how many there were.
async fn flooded(from: &Space, target: &'static str, work: impl Future<Output = ()>) -> u32 {
    let socket = from.namespace.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sending = std::thread::spawn(move || {
        let mut sent = 0;
        while !stopped.load(Ordering::Relaxed) {
            let _ = socket.send_to(b"?", (target, PORT));
            sent += 1;
            std::thread::yield_now();
        }
        sent
    });
    work.await;
    stop.store(true, Ordering::Relaxed);
    sending.join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_moment_without_rules() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(0).await;
    let slot = pool.take().await.unwrap();
    let vmm = Holder::new(slot.lock().unwrap());
    let guest = Guest::on(&slot, "guest").await;
    let mut number: SlotNumber = slot.leave();
    let open = internet();
    // One forbids by what is not in a set, the other by what is.
    for policy in [format!("deny {INTERNET}"), "offline".to_owned()].map(|said| policy(&[&said])) {
        number = pool.adopt(number, &open).await.unwrap().leave();
        assert_eq!(guest.space.ask_udp(INTERNET, PORT).await, answered("outside"));
        number = pool.adopt(number, &policy).await.unwrap().leave();
        world.callers.take();
        let sent = flooded(&guest.space, INTERNET, async {
            for _ in 0..ADOPTIONS {
                number = pool.adopt(number, &policy).await.unwrap().leave();
            }
        })
        .await;
        assert_eq!(world.callers.take(), [] as [IpAddr; 0], "{sent} were sent under {policy:?}");
    }
    let slot = pool.adopt(number, &open).await.unwrap();
    vmm.end().await;
    pool.release(slot).await;
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_moment_with_half_of_a_policy() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(0).await;
    let mut slot = pool.take().await.unwrap();
    // Each of them forbids it in another way.
    let policies = [
        &["deny 203.0.113.10"][..],
        &["offline"],
        &["allow 203.0.113.53"],
        &["deny 203.0.113.0/27", "dns 203.0.113.53"],
        &["offline", "allow 203.0.113.10"],
        &["allow 203.0.113.0/24", "deny 203.0.113.8/29"],
    ]
    .map(policy);
    slot.apply(&policies[0]).await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    assert_eq!(guest.space.ask_udp(RESOLVER, PORT).await, answered("outside"));
    world.callers.take();
    let sent = flooded(&guest.space, INTERNET, async {
        for distance in 1..policies.len() {
            for step in 0..policies.len() {
                slot.apply(&policies[step * distance % policies.len()]).await.unwrap();
            }
        }
    })
    .await;
    assert_eq!(world.callers.take(), [] as [IpAddr; 0], "{sent} were sent");
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_start_of_an_agent_is_no_moment_without_rules_either() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let config = world.config(0);
    let pool = SlotPool::start(config.clone()).await.unwrap();
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    // So that only the uplink's rules are left.
    let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    shell(
        &namespace,
        "nft flush ruleset
         nft 'add table ip open { chain c { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }'",
    )
    .await;
    assert_eq!(guest.space.ask_udp(INTERNET, PORT).await, answered("outside"));
    world.callers.take();
    let sent = flooded(&guest.space, PRIVATE, async {
        for _ in 0..ADOPTIONS {
            let uplink = OpenUplink::open(&config.instance, &config.uplink).await.unwrap();
            uplink.prepare().await.unwrap();
        }
    })
    .await;
    assert_eq!(world.callers.take(), [] as [IpAddr; 0], "{sent} were sent");
    drop(slot);
    pool.shutdown().await;
}
