//! Policies with lists and limits, as packets see them: put in force before, and changed in between.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use wrenn_host_linux::netns::NetworkNamespace;

use super::world::{
    Guest, INTERNET, OTHER_RESOLVER, Outcome, PORT, RESOLVER, Space, World, answered, can_run, internet,
    policy, shell,
};

/// How long to wait for what shall not come.
const SILENCE: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_network_is_refused_and_the_rest_is_not() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let ask =
        async |address| (guest.space.ask(address, PORT).await, guest.space.ask_udp(address, PORT).await);
    let reached = || (answered("outside"), answered("outside"));
    let refused = || (Outcome::Refused, Outcome::Refused);
    assert_eq!(ask(INTERNET).await, reached(), "it is there");

    for denied in [INTERNET, "203.0.113.0/28", "203.0.113.8/29"] {
        slot.apply(&policy(&[&format!("deny {denied}")])).await.unwrap();
        assert_eq!(ask(INTERNET).await, refused(), "{denied}");
        assert_eq!(ask(RESOLVER).await, reached(), "{denied}");
    }
    slot.apply(&policy(&["allow 203.0.113.0/24", "deny 203.0.113.10"])).await.unwrap();
    assert_eq!(ask(INTERNET).await, refused(), "to deny is stronger");
    assert_eq!(ask(RESOLVER).await, reached());
    slot.apply(&policy(&["offline", "allow 203.0.113.0/24"])).await.unwrap();
    assert_eq!(ask(RESOLVER).await, refused(), "and nothing is stronger than no internet");
    slot.apply(&internet()).await.unwrap();
    assert_eq!(ask(INTERNET).await, reached());
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_an_allow_list_nothing_else_is_reached() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let only = format!("allow {INTERNET}");
    let (named, other) = (format!("dns {RESOLVER}"), format!("allow {RESOLVER}"));
    // Before the guest's first packet.
    slot.apply(&policy(&[&only, &named])).await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    assert_eq!(guest.space.ask_udp(INTERNET, PORT).await, answered("outside"));
    world.callers.take();
    for refused in [RESOLVER, OTHER_RESOLVER] {
        for port in [PORT, 53, 853] {
            assert_eq!(guest.space.ask(refused, port).await, Outcome::Refused, "{refused}:{port}");
            assert_eq!(guest.space.ask_udp(refused, port).await, Outcome::Refused, "{refused}:{port}");
        }
    }
    assert!(world.callers.take().is_empty());

    slot.apply(&policy(&[&only, &named, &other])).await.unwrap();
    for (port, address, outcome) in [
        (53, RESOLVER, answered("outside")),
        (PORT, RESOLVER, answered("outside")),
        (53, INTERNET, Outcome::Refused),
        (53, OTHER_RESOLVER, Outcome::Refused),
    ] {
        assert_eq!(guest.space.ask_udp(address, port).await, outcome, "{address}:{port}");
    }
    assert_eq!(slot.name_servers(), [RESOLVER.parse::<std::net::Ipv4Addr>().unwrap()]);
    // The widest list there is does not hold what no sandbox may reach.
    slot.apply(&policy(&["allow 0.0.0.0/0"])).await.unwrap();
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    for forbidden in super::world::FORBIDDEN {
        assert_eq!(guest.space.ask(forbidden, PORT).await, Outcome::Refused, "{forbidden}");
    }
    drop(slot);
    pool.shutdown().await;
}

/// Two ends of a connection.
struct Open {
    inside: TcpStream,
    outside: TcpStream,
}

impl Open {
    async fn new(world: &World, guest: &Space, target: &'static str, port: u16) -> Self {
        let listen = move || TcpListener::bind((target, port)).unwrap();
        let listener = world.outside.namespace.run(listen).await.unwrap();
        let connect = move || TcpStream::connect((target, port)).unwrap();
        let inside = guest.namespace.run(connect).await.unwrap();
        let (outside, _) = listener.accept().unwrap();
        for end in [&inside, &outside] {
            end.set_read_timeout(Some(SILENCE)).unwrap();
        }
        let mut open = Self { inside, outside };
        open.assert_alive();
        open
    }

    fn assert_alive(&mut self) {
        let mut byte = [0];
        // A packet that a busy machine lost is sent again.
        let long = Some(Duration::from_secs(10));
        for end in [&self.inside, &self.outside] {
            end.set_read_timeout(long).unwrap();
        }
        self.inside.write_all(b"1").unwrap();
        self.outside.read_exact(&mut byte).unwrap();
        self.outside.write_all(b"2").unwrap();
        self.inside.read_exact(&mut byte).unwrap();
        for end in [&self.inside, &self.outside] {
            end.set_read_timeout(Some(SILENCE)).unwrap();
        }
    }

    fn assert_cut(mut self, case: &str) {
        let mut byte = [0];
        self.outside.write_all(b"3").unwrap();
        let silence = self.inside.read_exact(&mut byte).unwrap_err();
        assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock, "{case}: nothing comes in");
        self.inside.write_all(b"4").unwrap();
        assert!(self.outside.read_exact(&mut byte).is_err(), "{case}: nothing goes out");
        self.inside.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let told = self.inside.read_exact(&mut byte).unwrap_err();
        assert_eq!(told.kind(), std::io::ErrorKind::ConnectionReset, "{case}: the guest is told");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_change_forbids_ends_and_what_it_allows_goes_on() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    let name_server = format!("dns {RESOLVER}");
    for (port, change) in (7000..).zip([
        "offline".to_owned(),
        format!("deny {INTERNET}"),
        format!("allow {RESOLVER}"),
        "allow 203.0.113.0/24, deny 203.0.113.0/27".to_owned(),
    ]) {
        slot.apply(&policy(&[&name_server])).await.unwrap();
        let mut kept = Open::new(&world, &guest.space, RESOLVER, port).await;
        let open = Open::new(&world, &guest.space, INTERNET, port).await;
        let words = change.split(", ").chain([name_server.as_str()]).collect::<Vec<_>>();
        slot.apply(&policy(&words)).await.unwrap();
        open.assert_cut(&change);
        if change == "offline" {
            kept.assert_cut(&change);
        } else {
            kept.assert_alive();
        }
    }

    // A name server that is not one any more cannot go on talking, either.
    slot.apply(&policy(&[&name_server])).await.unwrap();
    let inside = guest.space.namespace.run(|| UdpSocket::bind("0.0.0.0:5353").unwrap()).await.unwrap();
    inside.set_read_timeout(Some(SILENCE)).unwrap();
    let answers = |socket: &UdpSocket| {
        (0..20).any(|_| {
            let _ = socket.send_to(b"?", (RESOLVER, 53));
            socket.recv(&mut [0; 64]).is_ok()
        })
    };
    assert!(answers(&inside));
    slot.apply(&policy(&[&format!("dns {OTHER_RESOLVER}")])).await.unwrap();
    let _ = inside.send_to(b"?", (RESOLVER, 53));
    assert!(inside.recv(&mut [0; 64]).is_err());
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_goes_with_its_slot() {
    if !can_run() {
        return;
    }
    let world = World::new().await;
    let pool = world.pool(0).await;
    let mut slot = pool.take().await.unwrap();
    slot.apply(&policy(&["deny 203.0.113.0/24", "egress 8000", "ingress 8000"])).await.unwrap();
    let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    let (number, path) = (slot.number(), slot.netns_path().to_owned());
    let guest = Guest::on(&slot, "guest").await;
    assert_eq!(guest.space.ask(INTERNET, PORT).await, Outcome::Refused);
    pool.release(slot).await;
    assert!(!path.exists());
    shell(&namespace, "! ip link show tap0 2>/dev/null && ! ip link show eth0 2>/dev/null").await;
    world.uplink.shell(&format!("! ip link show {} 2>/dev/null", number.outer())).await;
    drop((namespace, guest));

    let next = pool.take().await.unwrap();
    let guest = Guest::on(&next, "guest").await;
    assert_eq!(guest.space.ask(INTERNET, PORT).await, answered("outside"));
    assert_eq!(queues(&world, &next).await, [String::new(), String::new()]);
    drop(next);
    pool.shutdown().await;
}

/// The token buckets at both ends of a slot's veth pair: what it sends, and what it receives.
async fn queues(world: &World, slot: &crate::network::Slot) -> [String; 2] {
    let inside = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    let list = async |namespace: &NetworkNamespace, link: String| {
        let listed = namespace.run(move || {
            std::process::Command::new("tc").args(["qdisc", "show", "dev", &link]).output().unwrap()
        });
        let listed = String::from_utf8(listed.await.unwrap().stdout).unwrap();
        listed.lines().filter(|line| line.contains(" tbf ")).map(str::to_owned).collect::<String>()
    };
    [list(&inside, "eth0".to_owned()).await, list(&world.uplink.namespace, slot.number().outer()).await]
}

/// How long it takes to carry so many bytes from one namespace to another, over one TCP connection that the
/// guest makes. What its first byte waits for does not count.
async fn carry(world: &World, guest: &Space, port: u16, bytes: usize, out: bool) -> Duration {
    let listen = move || TcpListener::bind((INTERNET, port)).unwrap();
    let listener = world.outside.namespace.run(listen).await.unwrap();
    let inside = guest.namespace.run(move || TcpStream::connect((INTERNET, port)).unwrap()).await.unwrap();
    let (outside, _) = listener.accept().unwrap();
    let (mut from, mut to) = if out { (inside, outside) } else { (outside, inside) };
    to.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let sending = std::thread::spawn(move || {
        from.write_all(&vec![7; bytes]).unwrap();
        from
    });
    let received = tokio::task::spawn_blocking(move || {
        let mut chunk = vec![0; 65536];
        let mut count = to.read(&mut chunk).unwrap();
        let begin = Instant::now();
        while count < bytes {
            count += to.read(&mut chunk).unwrap();
        }
        begin.elapsed()
    });
    let elapsed = received.await.unwrap();
    sending.join().unwrap();
    elapsed
}

/// How fast it is at most is a property; how near to that it comes is a measurement, and printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_faster_than_its_limit() {
    if !can_run() {
        return;
    }
    const BYTES: usize = 2_000_000;
    const RATE: f64 = 2_500_000.0;
    /// What may come at once: a fiftieth of a second, and the first read.
    const AT_ONCE: f64 = RATE / 50.0 + 65536.0;
    let world = World::new().await;
    let pool = world.pool(1).await;
    let mut slot = pool.take().await.unwrap();
    let guest = Guest::on(&slot, "guest").await;
    for (port, (words, out)) in (7000..).zip([
        (vec!["egress 20000000"], true),
        (vec!["ingress 20000000"], false),
        (vec!["egress 20000000", "ingress 20000000"], true),
        (vec![], true),
        (vec![], false),
    ]) {
        // Both directions are changed while the guest runs, every one in both ways.
        slot.apply(&policy(&words)).await.unwrap();
        let [sends, receives] = queues(&world, &slot).await;
        let limited = |way: &str| words.iter().any(|word| word.starts_with(way));
        assert_eq!(sends.contains("rate 20Mbit burst 50000b"), limited("egress"), "{sends}");
        assert_eq!(receives.contains("rate 20Mbit burst 50000b"), limited("ingress"), "{receives}");
        let elapsed = carry(&world, &guest.space, port, BYTES, out).await.as_secs_f64();
        let way = if out { "egress" } else { "ingress" };
        if limited(way) {
            #[expect(clippy::cast_precision_loss, reason = "a few million")]
            let least = (BYTES as f64 - AT_ONCE) / RATE;
            assert!(elapsed >= least, "{elapsed} s, {least} s at least");
        }
        println!("{way} {words:?}: {:.1} Mbit/s", 8.0 * 2.0 / elapsed);
    }
    // A limit that is changed keeps its queue.
    slot.apply(&policy(&["egress 8000000000000"])).await.unwrap();
    let [sends, receives] = queues(&world, &slot).await;
    assert!(sends.contains("rate 8Tbit") && receives.is_empty(), "{sends} {receives}");
    slot.apply(&policy(&["egress 1000"])).await.unwrap();
    let [sends, _] = queues(&world, &slot).await;
    assert!(sends.contains("rate 1Kbit burst 6056b"), "{sends}");
    let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
    shell(&namespace, "! tc qdisc show dev tap0 | grep -q tbf").await;
    drop(slot);
    pool.shutdown().await;
}
