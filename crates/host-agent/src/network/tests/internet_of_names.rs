//! What the tests of names share: a name server with a zone that can be changed, echoing services, and a guest
//! that asks and talks.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::world::{Guest, Outcome, World, can_run, policy};
use crate::network::{
    Policy, Slot, SlotPool,
    filter::{
        dns::{self, Code},
        hello::tests::hello,
    },
};

/// The name server.
pub(super) const NAME_SERVER: &str = "203.0.113.99";
/// A port that is no web port.
pub(super) const OTHER_PORT: u16 = 2222;
/// How long to wait for an answer. It is there in milliseconds, unless the machine is in trouble.
const PATIENCE: Duration = Duration::from_secs(20);

/// A name server's zone, and what it was asked.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    zone: Arc<Mutex<BTreeMap<String, Vec<Ipv4Addr>>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

/// A guest whose policy is about names, and all that is around it.
pub(super) struct Filtered {
    pub(super) world: World,
    pub(super) names: Names,
    pub(super) pool: SlotPool,
    pub(super) slot: Slot,
    pub(super) guest: Guest,
}

impl Filtered {
    /// One with a zone, and a policy that is there before its first packet: that of a new slot when there are no
    /// words. None where it cannot run.
    pub(super) async fn new(zone: &[(&str, &[&str])], words: &[&str]) -> Option<Self> {
        if !can_run() {
            return None;
        }
        let world = World::new().await;
        let names = Names::of(&world).await;
        for (name, addresses) in zone {
            names.put(name, addresses);
        }
        let pool = world.pool(1).await;
        let mut slot = pool.take().await.unwrap();
        if !words.is_empty() {
            slot.apply(&named(words)).await.unwrap();
        }
        let guest = Guest::on(&slot, "guest").await;
        Some(Self { world, names, pool, slot, guest })
    }
}

impl Names {
    /// A name server and echoing services, in the outside of a world.
    pub(super) async fn of(world: &World) -> Self {
        let names = Self::default();
        world.outside.shell(&format!("ip address add {NAME_SERVER}/32 dev lo")).await;
        let address: SocketAddr = (NAME_SERVER.parse::<Ipv4Addr>().unwrap(), 53).into();
        let socket = world.outside.namespace.run(move || UdpSocket::bind(address).unwrap()).await.unwrap();
        let served = names.clone();
        std::thread::spawn(move || {
            let mut message = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut message) {
                let question = dns::question(&message[..length]).unwrap();
                let name = question.name.clone().unwrap();
                let addresses = served.zone.lock().unwrap().get(&name).cloned();
                served.asked.lock().unwrap().push(name);
                let code = if addresses.is_some() { Code::Fine } else { Code::NoName };
                let answer = dns::answer(&question, code, &addresses.unwrap_or_default(), 300);
                let _ = socket.send_to(&answer, from);
            }
        });
        for port in [443, OTHER_PORT] {
            let listener =
                world.outside.namespace.run(move || TcpListener::bind(("::", port)).unwrap()).await.unwrap();
            std::thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    std::thread::spawn(move || io::copy(&mut &stream, &mut &stream));
                }
            });
        }
        names
    }

    /// From now on a name has these addresses.
    pub(super) fn put(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        self.zone.lock().unwrap().insert(name.to_owned(), addresses);
    }

    /// Whether the name server was asked for a name.
    pub(super) fn was_asked(&self, name: &str) -> bool {
        self.times_asked(name) > 0
    }

    /// How often it was.
    pub(super) fn times_asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
    }

    /// It answers nothing for as long as this is held.
    pub(super) fn hold(&self) -> impl Drop + use<'_> {
        self.zone.lock().unwrap()
    }
}

/// A policy, in words, that asks the name server.
pub(super) fn named(words: &[&str]) -> Policy {
    policy(&[words, &[&format!("dns {NAME_SERVER}")]].concat())
}

/// The first bytes of a TLS connection to a name.
pub(super) fn tls(name: &str) -> Vec<u8> {
    hello(&[name], 16_000)
}

/// A request for a host.
pub(super) fn http(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

impl Guest {
    /// What a resolver in the guest is answered for a name, by whichever server it asks: addresses, or a code. Where
    /// nobody answers it asks again, as a filter may be on its way.
    pub(super) async fn look_up(&self, name: &str) -> Result<Vec<Ipv4Addr>, u8> {
        let question = dns::ask(77, name).unwrap();
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(message) = self.ask_datagram("9.9.9.9", question.clone()).await {
                let code = message[3] & 0xf;
                let answer = dns::read_answer(&message, 77, name).unwrap();
                return if code == 0 { Ok(answer.addresses) } else { Err(code) };
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody answers for {name}");
    }

    /// What comes back for a datagram to port 53; none if nothing does in time, or an error.
    pub(super) async fn ask_datagram(&self, server: &'static str, message: Vec<u8>) -> Option<Vec<u8>> {
        let asked = self.space.namespace.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.connect((server, 53))?;
            socket.send(&message)?;
            let mut answer = vec![0; 4096];
            let length = socket.recv(&mut answer)?;
            answer.truncate(length);
            io::Result::Ok(answer)
        });
        asked.await.unwrap().ok()
    }

    /// A connection of the guest.
    pub(super) async fn connect(&self, address: &str, port: u16) -> io::Result<TcpStream> {
        let target = SocketAddr::new(address.parse().unwrap(), port);
        self.space.namespace.run(move || TcpStream::connect_timeout(&target, PATIENCE)).await.unwrap()
    }

    /// What the guest gets for some bytes, up to as many as it sent.
    pub(super) async fn talk(&self, address: &str, port: u16, bytes: Vec<u8>) -> Outcome {
        match self.connect(address, port).await {
            Ok(stream) => say(&stream, bytes).await,
            Err(error) => Outcome::of(Err(error)),
        }
    }
}

/// Sends bytes and waits for something to come back.
pub(super) async fn say(stream: &TcpStream, bytes: Vec<u8>) -> Outcome {
    let mut stream = stream.try_clone().unwrap();
    let exchange = move || {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&bytes)?;
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    };
    Outcome::of(tokio::task::spawn_blocking(exchange).await.unwrap())
}
