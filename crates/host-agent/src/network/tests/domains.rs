//! Policies about names, as packets see them.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::UdpSocket,
    time::Duration,
};

use super::{
    internet_of_names::{Filtered, NAME_SERVER, OTHER_PORT, http, named, say, tls},
    world::{
        FORBIDDEN, INTERNET, METADATA, OTHER_RESOLVER, Outcome, PORT, PRIVATE, RESOLVER, address, answered,
        internet,
    },
};
use crate::network::filter::dns;

/// A name server says this of what it refuses.
const REFUSED: u8 = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allowed_name_is_reached_and_nothing_else() {
    let zone: &[(_, &[_])] =
        &[("a.example", &[INTERNET]), ("x.b.example", &[RESOLVER]), ("other.example", &[OTHER_RESOLVER])];
    let filtered = Filtered::new(zone, &["allow a.example", "allow *.b.example"]).await;
    let Some(Filtered { world, names, pool, slot, guest }) = filtered else { return };
    assert_eq!(slot.name_servers(), [address(NAME_SERVER)]);

    assert_eq!(
        guest.talk(INTERNET, 443, tls("a.example")).await,
        Outcome::Refused,
        "who says that it lives there?"
    );
    assert_eq!(guest.look_up("A.Example").await, Ok(vec![address(INTERNET)]));
    let hello = String::from_utf8_lossy(&tls("a.example")).into_owned();
    assert_eq!(guest.talk(INTERNET, 443, tls("a.example")).await, Outcome::Answered(hello));
    assert_eq!(guest.talk(INTERNET, PORT, http("a.example")).await, answered("outside"));
    assert_eq!(
        guest.talk(INTERNET, OTHER_PORT, b"hello".to_vec()).await,
        Outcome::Refused,
        "a name opens the ports on which it can be looked for"
    );

    for bytes in
        [tls("other.example"), tls("203.0.113.10"), http("other.example"), http(INTERNET), b"?\n".to_vec()]
    {
        for port in [PORT, 443] {
            let outcome = guest.talk(INTERNET, port, bytes.clone()).await;
            assert_eq!(outcome, Outcome::Refused, "{port} {}", String::from_utf8_lossy(&bytes));
        }
    }
    assert_eq!(guest.look_up("other.example").await, Err(REFUSED));
    assert_eq!(guest.look_up("b.example").await, Err(REFUSED));
    assert!(!names.was_asked("other.example") && !names.was_asked("b.example"));
    world.callers.take();
    for (port, bytes) in [
        (443, tls("a.example")),
        (PORT, http("a.example")),
        (OTHER_PORT, b"hello".to_vec()),
        (853, tls("a.example")),
    ] {
        assert_eq!(
            guest.talk(OTHER_RESOLVER, port, bytes).await,
            Outcome::Refused,
            "{port} of an address of no name"
        );
    }
    assert_eq!(guest.talk(INTERNET, 853, tls("a.example")).await, Outcome::Refused);
    assert_eq!(guest.space.probe_udp(INTERNET, PORT).await, Outcome::Refused, "a name opens TCP");
    assert_eq!(guest.space.probe_udp(INTERNET, 853).await, Outcome::Refused);
    assert!(world.callers.take().is_empty(), "and nobody has heard of it");

    assert_eq!(guest.look_up("x.b.example").await, Ok(vec![address(RESOLVER)]));
    assert!(guest.talk(RESOLVER, 443, tls("x.b.example")).await.is_answer());
    assert_eq!(guest.look_up("no.b.example").await, Err(3), "there is no such name");
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_opens_nothing_that_no_sandbox_reaches() {
    let all = [&FORBIDDEN[..], &["169.254.0.22", "203.0.113.200", RESOLVER, INTERNET]].concat();
    let denied = format!("deny {RESOLVER}");
    let filtered = Filtered::new(&[("a.example", &all)], &["allow a.example", &denied]).await;
    let Some(Filtered { world, pool, slot, guest, .. }) = filtered else { return };
    // The host's public address looks like any other, and is guarded where the namespace ends.
    assert_eq!(guest.look_up("a.example").await, Ok(vec![address("203.0.113.200"), address(INTERNET)]));
    world.callers.take();
    for target in [PRIVATE, METADATA, "169.254.0.22", "203.0.113.200", RESOLVER] {
        for port in [PORT, OTHER_PORT, 15_053, 15_080] {
            let outcome = guest.space.probe(target, port).await;
            assert!(!outcome.is_answer(), "{target}:{port} {outcome:?}");
        }
    }
    for (port, bytes) in [(443, tls("a.example")), (OTHER_PORT, b"?".to_vec())] {
        assert_eq!(guest.talk(RESOLVER, port, bytes).await, Outcome::Refused, "to deny is stronger");
    }
    assert!(world.callers.take().is_empty());
    assert!(world.host_callers.take().is_empty());
    assert_eq!(guest.talk(INTERNET, PORT, http("a.example")).await, answered("outside"));
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_are_answered_over_tcp_too_and_only_for_addresses() {
    let filtered = Filtered::new(&[("a.example", &[INTERNET])], &["allow a.example"]).await;
    let Some(Filtered { pool, slot, guest, .. }) = filtered else { return };
    let stream = guest.connect(OTHER_RESOLVER, 53).await.unwrap();
    for (name, code) in [("a.example", 0), ("b.example", REFUSED)] {
        let question = dns::ask(9, name).unwrap();
        let length = u16::try_from(question.len()).unwrap().to_be_bytes();
        let answer = tokio::task::spawn_blocking({
            let mut stream = stream.try_clone().unwrap();
            move || {
                stream.write_all(&[&length[..], &question].concat()).unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut answer = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut answer).unwrap();
                answer
            }
        });
        let answer = answer.await.unwrap();
        assert_eq!(answer[3] & 0xf, code);
        assert_eq!(dns::read_answer(&answer, 9, name).unwrap().addresses.is_empty(), code != 0);
    }
    // For IPv6 addresses, services and whatever else there is.
    for kind in [28, 65, 16, 255] {
        let mut question = dns::ask(9, "a.example").unwrap();
        let at = question.len() - 3;
        question[at] = kind;
        let answer = guest.ask_datagram("9.9.9.9", question).await.unwrap();
        assert_eq!((answer[3] & 0xf, &answer[6..8]), (0, &[0, 0][..]), "{kind}");
    }
    for strange in [b"?".to_vec(), vec![0xff; 600], vec![0; 12]] {
        if let Some(answer) = guest.ask_datagram("9.9.9.9", strange).await {
            assert_ne!(answer[3] & 0xf, 0);
        }
    }
    assert_eq!(guest.look_up("a.example").await, Ok(vec![address(INTERNET)]), "and goes on");
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_equal_questions_at_once_are_one_to_the_name_server() {
    const MANY: u16 = 40;
    let filtered = Filtered::new(&[("a.example", &[INTERNET])], &["allow a.example"]).await;
    let Some(Filtered { names, pool, slot, guest, .. }) = filtered else { return };
    let held = names.hold();
    let socket = guest.space.namespace.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).await.unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for id in 0..MANY {
        socket.send_to(&dns::ask(id, "a.example").unwrap(), (NAME_SERVER, 53)).unwrap();
    }
    // It is refused at once; then all that came before it is under way.
    let mut answer = [0; 512];
    socket.send_to(&dns::ask(MANY, "other.example").unwrap(), (NAME_SERVER, 53)).unwrap();
    let length = socket.recv(&mut answer).unwrap();
    assert_eq!((&answer[..2], answer[3] & 0xf), (&MANY.to_be_bytes()[..], REFUSED));
    drop(held);
    let mut answered = BTreeSet::new();
    for _ in 0..MANY {
        let length = socket.recv(&mut answer).unwrap();
        let id = u16::from_be_bytes([answer[0], answer[1]]);
        let read = dns::read_answer(&answer[..length], id, "a.example").unwrap();
        assert_eq!(read.addresses, [address(INTERNET)]);
        answered.insert(id);
    }
    assert_eq!((answered.len(), length > 0), (usize::from(MANY), true), "each has its own answer");
    assert_eq!(names.times_asked("a.example"), 1);
    assert!(guest.look_up("a.example").await.is_ok() && names.times_asked("a.example") == 2, "none is kept");
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_carries_one_request() {
    let filtered = Filtered::new(&[("a.example", &[INTERNET])], &["allow a.example"]).await;
    let Some(Filtered { pool, slot, guest, .. }) = filtered else { return };
    guest.look_up("a.example").await.unwrap();
    let request = "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\n\r\nbody";
    let second = "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n";
    let mut stream = guest.connect(INTERNET, 443).await.unwrap();
    let echoed = tokio::task::spawn_blocking(move || {
        stream.write_all(format!("{request}{second}").as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut echoed = String::new();
        stream.read_to_string(&mut echoed).unwrap();
        echoed
    });
    let forwarded =
        "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody";
    assert_eq!(echoed.await.unwrap(), forwarded);
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deny_list_of_names_closes_those_alone() {
    let zone: &[(_, &[_])] = &[("bad.example", &[INTERNET]), ("good.example", &[INTERNET])];
    let filtered = Filtered::new(zone, &["deny bad.example"]).await;
    let Some(Filtered { pool, mut slot, guest, .. }) = filtered else { return };
    assert_eq!(guest.look_up("bad.example").await, Err(REFUSED));
    assert_eq!(guest.look_up("good.example").await, Ok(vec![address(INTERNET)]));
    for bytes in [tls("bad.example"), http("bad.example"), http(INTERNET), b"?\n".to_vec()] {
        assert_eq!(guest.talk(INTERNET, 443, bytes).await, Outcome::Refused);
    }
    assert_eq!(guest.talk(INTERNET, PORT, http("good.example")).await, answered("outside"));
    assert!(guest.talk(INTERNET, 443, tls("good.example")).await.is_answer());
    assert_eq!(guest.talk(INTERNET, OTHER_PORT, b"hello".to_vec()).await, answered("hello"));
    assert_eq!(
        guest.space.probe_udp(INTERNET, PORT).await,
        Outcome::Refused,
        "a web port has to be looked into"
    );

    // A network on the allow list needs no name, but may not say a denied one.
    slot.apply(&named(&["deny bad.example", &format!("allow {INTERNET}")])).await.unwrap();
    assert_eq!(guest.talk(INTERNET, 443, tls("bad.example")).await, Outcome::Refused);
    assert_eq!(guest.talk(INTERNET, 443, b"?\n".to_vec()).await, Outcome::Refused, "it may mean any name");
    assert_eq!(guest.talk(INTERNET, OTHER_PORT, b"hello".to_vec()).await, answered("hello"));
    assert_eq!(guest.talk(RESOLVER, 443, tls("good.example")).await, Outcome::Refused);
    drop(slot);
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_ends_what_it_forbids_and_nothing_else() {
    let filtered = Filtered::new(&[("a.example", &[INTERNET])], &[]).await;
    let Some(Filtered { pool, mut slot, guest, .. }) = filtered else { return };
    let ping = || b"ping".to_vec();
    let open = async |first: Vec<u8>| {
        let stream = guest.connect(INTERNET, 443).await.unwrap();
        assert!(say(&stream, first).await.is_answer());
        stream
    };
    let (direct, listed) = (open(ping()).await, guest.connect(RESOLVER, OTHER_PORT).await.unwrap());
    assert_eq!(say(&listed, ping()).await, answered("ping"));

    // From no names to names: nobody knows for which name the open connection is.
    let allow_listed = format!("allow {RESOLVER}");
    slot.apply(&named(&["allow a.example", &allow_listed])).await.unwrap();
    assert_eq!(say(&direct, ping()).await, Outcome::Refused);
    assert_eq!(say(&listed, ping()).await, answered("ping"), "its network is allowed");
    guest.look_up("a.example").await.unwrap();
    let stream = open(tls("a.example")).await;
    assert_eq!(say(&stream, ping()).await, answered("ping"));

    // As long as the name is allowed it goes on, with whatever else, and when names do not matter any more.
    for words in [&["allow *.example", "allow b.example"][..], &["deny b.example"], &[], &["allow a.example"]]
    {
        slot.apply(&named(words)).await.unwrap();
        assert_eq!(say(&stream, ping()).await, answered("ping"), "{words:?}");
    }
    slot.apply(&internet()).await.unwrap();
    let direct = open(ping()).await;
    assert_eq!(say(&stream, ping()).await, answered("ping"));
    slot.apply(&named(&["allow b.example"])).await.unwrap();
    assert_eq!(say(&stream, ping()).await, Outcome::Refused, "its name is not allowed any more");
    assert_eq!(say(&direct, ping()).await, Outcome::Refused);
    assert_eq!(guest.look_up("a.example").await, Err(REFUSED));

    // And what was pinned for a name goes with it.
    slot.apply(&named(&["allow a.example"])).await.unwrap();
    assert_eq!(guest.talk(INTERNET, 443, tls("a.example")).await, Outcome::Refused);
    guest.look_up("a.example").await.unwrap();
    let stream = open(tls("a.example")).await;
    slot.apply(&named(&["offline", "allow a.example"])).await.unwrap();
    assert_eq!(say(&stream, ping()).await, Outcome::Refused);
    assert_eq!(guest.talk(INTERNET, 443, tls("a.example")).await, Outcome::Refused);
    drop(slot);
    pool.shutdown().await;
}
