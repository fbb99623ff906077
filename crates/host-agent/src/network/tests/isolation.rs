//! What a guest reaches, and above all what it does not.

use super::world::{
    FORBIDDEN, Guest, HOST_PUBLIC, HOST_UPLINK, INTERNET, INTERNET_V6, OTHER_RESOLVER, Outcome, PORT,
    RESOLVER, Space, World, address, answered, can_run, internet, policy, rules, shell,
};
use crate::network::nft;
use wrenn_host_linux::netns::NetworkNamespace;

/// Everything that a guest must not reach is there and answers whoever may ask.
async fn controls(world: &World) {
    for target in FORBIDDEN.into_iter().chain([INTERNET, RESOLVER, OTHER_RESOLVER, INTERNET_V6]) {
        assert_eq!(world.uplink.ask(target, PORT).await, answered("outside"), "{target}");
        assert_eq!(world.uplink.ask_udp(target, 53).await, answered("outside"), "{target}");
    }
    for target in [HOST_PUBLIC, HOST_UPLINK, "2001:db8::2"] {
        assert_eq!(world.outside.ask(target, PORT).await, answered("host"), "{target}");
        assert_eq!(world.outside.ask_udp(target, 53).await, answered("host"), "{target}");
    }
    world.callers.take();
    world.host_callers.take();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_reaches_the_internet_and_nothing_else() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    controls(&world).await;
    let pool = world.pool(1).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;

    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    assert_eq!(guest.space.ask_udp(INTERNET, PORT).await, answered("outside"));
    let seen = world.callers.take();
    assert!(seen.iter().all(|caller| *caller == address(HOST_UPLINK)), "the outside sees the host: {seen:?}");

    for target in FORBIDDEN {
        assert_eq!(guest.space.ask(target, PORT).await, Outcome::Refused, "{target}");
        assert_eq!(guest.space.ask_udp(target, PORT).await, Outcome::Refused, "{target}");
        assert_eq!(guest.space.ask_udp(target, 53).await, Outcome::Refused, "{target}");
    }
    let own_outer = slot.number().outer_address().to_string();
    let own_inner = slot.number().inner_address().to_string();
    for target in
        [HOST_PUBLIC, HOST_UPLINK, &own_outer, &own_inner, "169.254.0.22", "127.0.0.1", "255.255.255.255"]
    {
        if target != "127.0.0.1" {
            assert!(!guest.space.probe(target, PORT).await.is_answer(), "{target}");
        }
        assert!(!guest.space.probe_udp(target, 53).await.is_answer(), "{target}");
    }
    assert!(world.host_callers.take().is_empty(), "nothing has arrived at the host");
    pool.release(slot).await;
    assert_eq!(pool.shutdown().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_asked_of_the_policys_servers_only() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    controls(&world).await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let ask = async |server, outcome: fn() -> Outcome| {
        for port in [53, 853] {
            assert_eq!(guest.space.ask(server, port).await, outcome(), "{server}:{port} TCP");
            assert_eq!(guest.space.ask_udp(server, port).await, outcome(), "{server}:{port} UDP");
        }
    };
    ask(RESOLVER, || answered("outside")).await;
    ask(OTHER_RESOLVER, || Outcome::Refused).await;
    ask(INTERNET, || Outcome::Refused).await;

    slot.apply(&policy(&[&format!("dns {OTHER_RESOLVER}")])).await.unwrap();
    ask(RESOLVER, || Outcome::Refused).await;
    ask(OTHER_RESOLVER, || answered("outside")).await;

    slot.apply(&policy(&[])).await.unwrap();
    ask(RESOLVER, || Outcome::Refused).await;
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_internet_there_is_nothing() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    controls(&world).await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    slot.apply(&policy(&["offline", "dns 203.0.113.53"])).await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    for target in [INTERNET, RESOLVER, HOST_PUBLIC].into_iter().chain(FORBIDDEN) {
        for port in [PORT, 53] {
            assert_eq!(guest.space.ask(target, port).await, Outcome::Refused, "{target}:{port}");
            assert_eq!(guest.space.ask_udp(target, port).await, Outcome::Refused, "{target}:{port}");
        }
    }
    assert!(world.callers.take().is_empty());
    let connection = slot.connector().connect(PORT).await;
    assert!(connection.is_ok(), "the agent reaches the guest all the same: {connection:?}");

    slot.apply(&internet()).await.unwrap();
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taking_the_internet_away_ends_what_is_open() {
    use std::io::{Read as _, Write as _};
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let listener = world
        .outside
        .namespace
        .run(|| std::net::TcpListener::bind(("0.0.0.0", 7000)).unwrap())
        .await
        .unwrap();
    let mut inside =
        guest.space.namespace.run(|| std::net::TcpStream::connect((INTERNET, 7000)).unwrap()).await.unwrap();
    let (mut outside, _) = listener.accept().unwrap();
    let short = Some(std::time::Duration::from_millis(300));
    outside.set_read_timeout(short).unwrap();
    inside.set_read_timeout(short).unwrap();
    let mut byte = [0];
    inside.write_all(b"1").unwrap();
    outside.read_exact(&mut byte).unwrap();
    outside.write_all(b"2").unwrap();
    inside.read_exact(&mut byte).unwrap();

    slot.apply(&policy(&["offline"])).await.unwrap();
    inside.write_all(b"3").unwrap();
    assert!(outside.read_exact(&mut byte).is_err(), "nothing leaves any more");
    outside.write_all(b"4").unwrap();
    assert!(inside.read_exact(&mut byte).is_err(), "and nothing comes back");
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_speaks_as_itself_or_not_at_all() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let neighbour = slot.number().next().inner_address();
    let own = slot.number().inner_address();
    for spoofed in
        ["10.99.0.7", "198.51.100.7", "169.254.0.22", "169.254.1.1", &own.to_string(), &neighbour.to_string()]
    {
        guest.space.shell(&format!("ip address add {spoofed}/32 dev eth0")).await;
        world.callers.take();
        assert_eq!(guest.space.probe_udp_from(spoofed, INTERNET, PORT).await, Outcome::Silent, "{spoofed}");
        assert!(world.callers.take().is_empty(), "{spoofed}");
        guest.space.shell(&format!("ip address del {spoofed}/32 dev eth0")).await;
    }

    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    guest.space.shell("ip link set eth0 address 02:fc:00:00:00:07").await;
    assert!(!guest.space.probe(INTERNET, PORT).await.is_answer(), "another Ethernet address");
    guest.space.shell("ip link set eth0 address 02:fc:00:00:00:05").await;
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));

    let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    let believed = "169.254.0.21 lladdr 02:fc:00:00:00:05 PERMANENT";
    shell(&namespace, &format!("test \"$(ip neigh show dev tap0 | xargs)\" = '{believed}'")).await;
    slot.connector().connect(PORT).await.unwrap();
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandboxes_do_not_reach_each_other_of_whichever_stack() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let (pool, other_pool) = (world.pool(2).await, world.pool(1).await);
    let slots = [pool.take().await.unwrap(), pool.take().await.unwrap(), other_pool.take().await.unwrap()];
    let attacker = Guest::on(&slots[0], "attacker").await;
    let sibling = Guest::on(&slots[1], "sibling").await;
    let stranger = Guest::on(&slots[2], "stranger").await;
    for guest in [&attacker, &sibling, &stranger] {
        assert_eq!(
            guest.space.ask(INTERNET, PORT).await,
            answered("outside"),
            "both stacks have their internet"
        );
    }
    // Even where its namespace would let everything in and out.
    let own = NetworkNamespace::open(slots[0].netns_path().as_std_path()).unwrap();
    for open in [false, true] {
        if open {
            shell(
                &own,
                "nft flush ruleset
                 nft 'add table ip open { chain c { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }'",
            )
            .await;
            assert_eq!(
                attacker.space.ask(INTERNET, PORT).await,
                answered("outside"),
                "the rules were its own"
            );
        }
        for slot in &slots[1..] {
            let (outer, inner) = (slot.number().outer_address(), slot.number().inner_address());
            attacker.space.shell(&format!("ip route replace {outer}/31 dev eth0")).await;
            for target in [outer, inner].map(|a| a.to_string()) {
                assert!(
                    !attacker.space.probe(&target, PORT).await.is_answer(),
                    "{target} on the link, open: {open}"
                );
                // Nobody has said where it is.
                attacker.space.shell(&format!("! ip neigh show {target} | grep lladdr")).await;
            }
            attacker.space.shell(&format!("ip route replace {outer}/31 via 169.254.0.22")).await;
            for target in [outer, inner].map(|a| a.to_string()) {
                assert!(
                    !attacker.space.probe(&target, PORT).await.is_answer(),
                    "{target} routed, open: {open}"
                );
                assert!(
                    !attacker.space.probe_udp(&target, PORT).await.is_answer(),
                    "{target} routed, open: {open}"
                );
            }
        }
        for target in FORBIDDEN.into_iter().chain([HOST_PUBLIC, HOST_UPLINK]) {
            assert!(!attacker.space.probe(target, PORT).await.is_answer(), "{target}, open: {open}");
        }
        // The other guest has the same address as it has itself: what it sends there goes to itself.
        assert_eq!(attacker.space.ask("169.254.0.21", PORT).await, answered("attacker"));
    }
    assert!(world.host_callers.take().is_empty());
    // So it is the rules: without either set of them there is nothing that stops it.
    world
        .uplink
        .shell(
            "nft flush ruleset
             nft 'add table ip open { chain c { type nat hook postrouting priority srcnat; oifname up0 masquerade; }; }'",
        )
        .await;
    for target in FORBIDDEN {
        assert_eq!(attacker.space.ask(target, PORT).await, answered("outside"), "{target}");
    }
    assert_eq!(attacker.space.ask(HOST_PUBLIC, PORT).await, answered("host"));
    // And the first set alone is enough for what it knows.
    for target in FORBIDDEN {
        assert_eq!(sibling.space.ask(target, PORT).await, Outcome::Refused, "{target}");
    }
    // From the host, too, there is no way in but through the namespace.
    for slot in &slots {
        assert!(!world.uplink.probe(&slot.number().inner_address().to_string(), PORT).await.is_answer());
    }
    drop(slots);
    pool.shutdown().await;
    other_pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_ipv6() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    controls(&world).await;
    let pool = world.pool(1).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    guest
        .space
        .shell(
            "ip address add 2001:db8:1::2/64 dev eth0 nodad
             ip -6 neigh replace fe80::1 lladdr 02:fc:00:00:00:06 dev eth0
             ip -6 route add default via fe80::1 dev eth0",
        )
        .await;
    for target in [INTERNET_V6, "2001:db8::2"] {
        assert_eq!(guest.space.probe(target, PORT).await, Outcome::Silent, "{target}");
        assert_eq!(guest.space.probe_udp(target, PORT).await, Outcome::Silent, "{target}");
    }
    let outer = slot.number().outer();
    world.uplink.shell(&format!("test -z \"$(ip -6 address show dev {outer})\"")).await;
    let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    shell(&namespace, "test -z \"$(ip -6 address)\"").await;
    assert!(world.callers.take().is_empty());
    assert!(world.host_callers.take().is_empty());
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_host_translates_does_not_lead_to_it() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    // As container engines publish ports: a public address is translated to a private one, or to the host.
    world
        .uplink
        .shell(&format!(
            "nft -f - <<'END'
table ip published {{
	chain prerouting {{
		type nat hook prerouting priority dstnat
		ip daddr {OTHER_RESOLVER} tcp dport 80 dnat to 10.99.0.1
		ip daddr {RESOLVER} tcp dport 80 redirect
	}}
}}
END"
        ))
        .await;
    let pool = world.pool(1).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    assert!(!guest.space.probe(OTHER_RESOLVER, PORT).await.is_answer());
    assert!(!guest.space.probe(RESOLVER, PORT).await.is_answer());
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    assert!(world.host_callers.take().is_empty());
    drop(slot);
    pool.shutdown().await;
    assert!(rules(&world.uplink.namespace).await.contains("table ip published"), "another's rules stay");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_cannot_fill_the_table_of_connections() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let count = async |space: &Space| {
        let counted = space.namespace.run(|| {
            std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")
                .unwrap()
                .trim()
                .parse::<u32>()
        });
        counted.await.unwrap().unwrap()
    };
    // All of them once; and some of the datagrams are lost where so many come at once, so it is tried again
    // until the table is full.
    let mut fullest = 0;
    let ports = (10_000..60_000_u16).step_by(500);
    for (batch, first) in ports.clone().cycle().take(10 * ports.len()).enumerate() {
        if batch >= ports.len() && fullest >= 4000 {
            break;
        }
        let send = guest.space.namespace.run(move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            for port in first..first + 500 {
                let _ = socket.send_to(b"x", (INTERNET, port));
            }
        });
        send.await.unwrap();
        fullest = fullest.max(count(&world.uplink).await);
    }
    // A few are not the guest's.
    assert!((4000..=4200).contains(&fullest), "{fullest}");
    pool.release(slot).await;
    assert!(count(&world.uplink).await < 100, "they go with the slot");
    pool.shutdown().await;
}

#[tokio::test]
async fn a_refused_transaction_changes_nothing() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let namespace = &world.uplink.namespace;
    nft::load(namespace, "table inet kept {}\n".to_owned()).await.unwrap();
    let error = nft::load(namespace, "table inet lost {}\nthis is no rule\n".to_owned()).await.unwrap_err();
    assert!(
        matches!(&error, nft::NftError::Refused { message, .. } if message.contains("this is no rule")),
        "{error}"
    );
    let rules = rules(namespace).await;
    assert!(rules.contains("kept") && !rules.contains("lost"), "{rules}");
}
