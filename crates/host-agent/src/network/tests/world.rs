//! A small internet of network namespaces. Nothing of it touches the machine's own network.
//!
//! ```text
//!  guest ═ tap0 ─ slot ─ eth0 ═ wrenn-v-N ─ uplink ─ up0 ═ out0 ─ outside
//!  (a VMM's part is played by a task that copies frames)    │              │ INTERNET, RESOLVER, OTHER_RESOLVER,
//!                                                           │ HOST         │ PRIVATE, METADATA, …
//! ```
//!
//! In the outside and in the uplink a service answers with its place on every address, so that a test can
//! show that what a guest does not reach is there to be reached.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::unix::AsyncFd,
    task::{AbortHandle, JoinSet},
};
use wrenn_host_linux::{
    netns::{self, NetworkNamespace},
    tap,
};
use wrenn_types::{InstanceId, NetworkPolicy};

use crate::network::{Policy, PoolConfig, Slot, SlotPool, Uplink, addresses::SlotNumber};

pub(super) const INTERNET: &str = "203.0.113.10";
pub(super) const RESOLVER: &str = "203.0.113.53";
pub(super) const OTHER_RESOLVER: &str = "203.0.113.54";
pub(super) const PRIVATE: &str = "10.99.0.1";
pub(super) const METADATA: &str = "169.254.169.254";
/// Addresses in the outside that exist and that no guest may reach.
pub(super) const FORBIDDEN: [&str; 6] =
    [PRIVATE, METADATA, "172.16.9.9", "192.168.7.7", "100.100.100.200", "168.63.129.16"];
/// An address of the host that looks like any other on the internet.
pub(super) const HOST_PUBLIC: &str = "203.0.113.200";
/// The host's address towards the outside.
pub(super) const HOST_UPLINK: &str = "192.0.2.2";
/// An address in the outside that IPv6 leads to.
pub(super) const INTERNET_V6: &str = "2001:db8::1";
/// The port of the services.
pub(super) const PORT: u16 = 80;

/// How long a packet may take before it counts as lost. An answer is there in far less than a millisecond.
const SILENCE: Duration = Duration::from_millis(400);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Whether tests that need the kernel can run. Says so where they cannot.
pub(super) fn can_run() -> bool {
    let can = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists();
    if !can {
        println!("skipped: network slots need root and /dev/net/tun");
    }
    can
}

/// A namespace with a name, for as long as the test runs.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) name: String,
    pub(super) namespace: NetworkNamespace,
}

impl Space {
    async fn new(role: &str) -> Self {
        Self::with(role, || Ok(())).await.0
    }

    async fn with<T: Send + 'static>(
        role: &str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> (Self, T) {
        netns::prepare_names().unwrap();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("wrenn-test-{}-{number}-{role}", std::process::id());
        let path = PathBuf::from(netns::NAMES).join(&name);
        let (namespace, made) = NetworkNamespace::create(&path, work).await.unwrap();
        (Self { name, namespace }, made)
    }

    /// Runs shell commands in it.
    pub(super) async fn shell(&self, script: &str) {
        shell(&self.namespace, script).await;
    }

    /// What a program there gets from a TCP service. Where nothing comes back it tries again, so that a
    /// machine that is busy is not taken for rules.
    pub(super) async fn ask(&self, address: &str, port: u16) -> Outcome {
        patiently(async || ask(&self.namespace, address, port).await).await
    }

    /// The same, once: for what shall not be reached.
    pub(super) async fn probe(&self, address: &str, port: u16) -> Outcome {
        ask(&self.namespace, address, port).await
    }

    /// What a program there gets for a datagram, as [`Self::ask`].
    pub(super) async fn ask_udp(&self, address: &str, port: u16) -> Outcome {
        patiently(async || self.probe_udp(address, port).await).await
    }

    /// The same, once.
    pub(super) async fn probe_udp(&self, address: &str, port: u16) -> Outcome {
        let any = if address.contains(':') { "::" } else { "0.0.0.0" };
        self.probe_udp_from(any, address, port).await
    }

    /// The same, from one of the addresses there.
    pub(super) async fn probe_udp_from(&self, source: &str, address: &str, port: u16) -> Outcome {
        let source = SocketAddr::new(source.parse().unwrap(), 0);
        let target = SocketAddr::new(address.parse().unwrap(), port);
        let asked = self.namespace.run(move || {
            let socket = UdpSocket::bind(source)?;
            socket.set_read_timeout(Some(SILENCE))?;
            socket.connect(target)?;
            socket.send(b"?")?;
            let mut answer = [0; 64];
            let length = socket.recv(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        });
        Outcome::of(asked.await.unwrap())
    }
}

async fn patiently(attempt: impl AsyncFn() -> Outcome) -> Outcome {
    for _ in 0..20 {
        match attempt().await {
            Outcome::Silent => {}
            outcome => return outcome,
        }
    }
    Outcome::Silent
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = netns::remove_name(&PathBuf::from(netns::NAMES).join(&self.name));
    }
}

/// How an attempt to reach something ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This answered.
    Answered(String),
    /// An error came back: something on the way, or the target, said no.
    Refused,
    /// Nothing came back.
    Silent,
}

impl Outcome {
    pub(super) fn of(asked: io::Result<String>) -> Self {
        match asked {
            Ok(answer) => Self::Answered(answer),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Self::Silent
            }
            Err(_) => Self::Refused,
        }
    }

    pub(super) fn is_answer(&self) -> bool {
        matches!(self, Self::Answered(_))
    }
}

pub(super) fn answered(place: &str) -> Outcome {
    Outcome::Answered(place.to_owned())
}

pub(super) async fn shell(namespace: &NetworkNamespace, script: &str) {
    let script = script.to_owned();
    let output =
        namespace.run(move || Command::new("sh").args(["-euc", &script]).output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn ask(namespace: &NetworkNamespace, address: &str, port: u16) -> Outcome {
    let target = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
    let asked = namespace.run(move || {
        let mut stream = TcpStream::connect_timeout(&target, SILENCE)?;
        stream.set_read_timeout(Some(SILENCE))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    Outcome::of(asked.await.unwrap())
}

/// Who has asked a service.
#[derive(Debug, Clone, Default)]
pub(super) struct Callers(Arc<Mutex<Vec<IpAddr>>>);

impl Callers {
    fn add(&self, caller: SocketAddr) {
        self.0.lock().unwrap().push(caller.ip().to_canonical());
    }

    /// All of them since the last time that somebody asked this.
    pub(super) fn take(&self) -> Vec<IpAddr> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Services in one namespace: TCP on all of its addresses, and UDP on these, so that an answer comes from
/// where the question went. They end with the test's process.
async fn serve(namespace: &NetworkNamespace, place: &'static str, addresses: &[&str]) -> Callers {
    let callers = Callers::default();
    for port in [PORT, 53, 853] {
        // As an IPv6 socket it takes IPv4 too.
        let tcp = namespace.run(move || TcpListener::bind(("::", port)).unwrap()).await.unwrap();
        let seen = callers.clone();
        std::thread::spawn(move || {
            while let Ok((mut stream, caller)) = tcp.accept() {
                seen.add(caller);
                let _ = stream.write_all(place.as_bytes());
                // What the caller says is read to its end: to close before that would reset the answer.
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.set_read_timeout(Some(SILENCE));
                std::thread::spawn(move || io::copy(&mut stream, &mut io::sink()));
            }
        });
        for address in addresses {
            let address = SocketAddr::new(address.parse().unwrap(), port);
            let udp = namespace.run(move || UdpSocket::bind(address).unwrap()).await.unwrap();
            let seen = callers.clone();
            std::thread::spawn(move || {
                let mut question = [0; 64];
                while let Ok((_, caller)) = udp.recv_from(&mut question) {
                    seen.add(caller);
                    let _ = udp.send_to(place.as_bytes(), caller);
                }
            });
        }
    }
    callers
}

/// The outside and the uplink.
#[derive(Debug)]
pub(super) struct World {
    pub(super) outside: Space,
    pub(super) uplink: Space,
    /// Who has asked something of the outside.
    pub(super) callers: Callers,
    /// Who has asked something of the host.
    pub(super) host_callers: Callers,
}

impl World {
    pub(super) async fn new() -> Self {
        let outside = Space::new("out").await;
        let uplink = Space::new("up").await;
        uplink
            .shell(&format!(
                "ip link set lo up
                 ip link add up0 type veth peer name out0 netns {out}
                 ip address add {HOST_PUBLIC}/32 dev lo
                 ip address add {HOST_UPLINK}/30 dev up0
                 ip address add 2001:db8::2/64 dev up0 nodad
                 echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
                 ip link set up0 up
                 ip route add default via 192.0.2.1",
                out = outside.name
            ))
            .await;
        let inside = [FORBIDDEN.as_slice(), &[INTERNET, RESOLVER, OTHER_RESOLVER]].concat();
        let addresses = inside.iter().map(|a| format!("ip address add {a}/32 dev lo\n")).collect::<String>();
        outside
            .shell(&format!(
                "ip link set lo up
                 {addresses}
                 ip address add 192.0.2.1/30 dev out0
                 ip address add {INTERNET_V6}/64 dev out0 nodad
                 ip link set out0 up
                 # What would leave without being translated would find its way back.
                 ip route add default via {HOST_UPLINK}
                 ip -6 route add default via 2001:db8::2"
            ))
            .await;
        let callers =
            serve(&outside.namespace, "outside", &[inside.as_slice(), &[INTERNET_V6]].concat()).await;
        let host_callers = serve(&uplink.namespace, "host", &[HOST_PUBLIC, HOST_UPLINK, "2001:db8::2"]).await;
        // A link that has just come up loses its first packets, as one does that has just been plugged in,
        // and a neighbour who was not found in time is an error.
        for target in [INTERNET, INTERNET_V6] {
            let until_up = async { while !uplink.ask(target, PORT).await.is_answer() {} };
            tokio::time::timeout(Duration::from_secs(60), until_up).await.unwrap();
        }
        callers.take();
        host_callers.take();
        Self { outside, uplink, callers, host_callers }
    }

    pub(super) fn uplink(&self) -> Uplink {
        Uplink::Named(self.uplink.name.parse().unwrap())
    }

    pub(super) fn config(&self, ready: usize) -> PoolConfig {
        PoolConfig { instance: InstanceId::random(), uplink: self.uplink(), ready, policy: internet() }
    }

    /// A pool of an instance of its own.
    pub(super) async fn pool(&self, ready: usize) -> SlotPool {
        SlotPool::start(self.config(ready)).await.unwrap()
    }
}

/// The policy of most tests.
pub(super) fn internet() -> Policy {
    policy(&["dns 203.0.113.53"])
}

/// A policy, in words: the internet, but without `offline`; `allow` and `deny` a network or a name; `dns` a server;
/// `egress` and `ingress` so many bits per second.
pub(super) fn policy(words: &[&str]) -> Policy {
    let mut policy = NetworkPolicy::simple(true);
    let is_digit = |last: char| last.is_ascii_digit();
    for word in words {
        match word.split_once(' ').unwrap_or((word, "")) {
            ("offline", "") => policy.internet = false,
            ("allow", name) if !name.ends_with(is_digit) => policy.allow_domains.push(name.parse().unwrap()),
            ("deny", name) if !name.ends_with(is_digit) => policy.deny_domains.push(name.parse().unwrap()),
            ("allow", network) => policy.allow_cidrs.push(network.parse().unwrap()),
            ("deny", network) => policy.deny_cidrs.push(network.parse().unwrap()),
            ("dns", server) => policy.dns_servers.push(server.parse().unwrap()),
            ("egress", bits) => policy.egress_bits_per_second = Some(bits.parse().unwrap()),
            ("ingress", bits) => policy.ingress_bits_per_second = Some(bits.parse().unwrap()),
            other => panic!("{other:?}"),
        }
    }
    Policy::resolve(&policy, &[]).unwrap()
}

/// A guest: a namespace behind a TAP device, whose frames are copied to and from a slot's.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) space: Space,
    copying: AbortHandle,
}

impl Guest {
    /// Plays the VMM's part on a slot's TAP device and the guest's behind it.
    pub(super) async fn on(slot: &Slot, name: &'static str) -> Self {
        let namespace = NetworkNamespace::open(slot.netns_path().as_std_path()).unwrap();
        let device = slot.tap().to_owned();
        let theirs = namespace.run(move || tap::attach(&device)).await.unwrap().unwrap();
        let (space, ours) = Space::with("guest", || tap::attach("eth0")).await;
        space
            .shell(
                "ip link set lo up
                 ip link set eth0 address 02:fc:00:00:00:05
                 ip link set eth0 up
                 ip address add 169.254.0.21/30 dev eth0
                 ip route add default via 169.254.0.22",
            )
            .await;
        serve(&space.namespace, name, &["169.254.0.21"]).await;
        let (theirs, ours) = (Arc::new(nonblocking(theirs)), Arc::new(nonblocking(ours)));
        let mut both = JoinSet::new();
        both.spawn(copy(Arc::clone(&theirs), Arc::clone(&ours)));
        both.spawn(copy(ours, theirs));
        let copying = tokio::spawn(async move { while both.join_next().await.is_some() {} }).abort_handle();
        let until_up = async { while slot.connector().connect(PORT).await.is_err() {} };
        tokio::time::timeout(Duration::from_secs(10), until_up).await.unwrap();
        Self { space, copying }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.copying.abort();
    }
}

#[expect(
    deprecated,
    reason = "an OwnedFd keeps its number, and the constructor that replaces this one is unsafe"
)]
fn nonblocking(device: OwnedFd) -> AsyncFd<OwnedFd> {
    rustix::io::ioctl_fionbio(&device, true).unwrap();
    AsyncFd::try_new(device).unwrap()
}

async fn copy(from: Arc<AsyncFd<OwnedFd>>, to: Arc<AsyncFd<OwnedFd>>) {
    let mut frame = vec![0; 65536];
    loop {
        let Ok(mut ready) = from.readable().await else { return };
        match ready.try_io(|device| Ok(rustix::io::read(device, &mut frame)?)) {
            // A device that is full or down loses frames, as a cable would.
            Ok(Ok(length)) => drop(rustix::io::write(&to, &frame[..length])),
            Ok(Err(_)) => return,
            Err(_would_block) => {}
        }
    }
}

/// Whether nothing of an instance's slot is left. Its number may be another's by now.
pub(super) async fn is_gone(world: &World, instance: &InstanceId, number: SlotNumber) -> bool {
    let listed = world.uplink.namespace.run(move || {
        let outer = number.outer();
        Command::new("ip").args(["link", "show", &outer]).output().unwrap().status.success()
    });
    let leased = std::fs::read_to_string(number.lease()).unwrap_or_default();
    // Without a lease there is nothing at all; somebody else's lease makes what is there theirs.
    let named = leased.is_empty() && number.namespace().exists() && !number.lease().exists();
    !listed.await.unwrap() && leased != instance.as_str() && !named
}

/// The rules of a namespace as `nft` lists them.
pub(super) async fn rules(namespace: &NetworkNamespace) -> String {
    let listed = namespace.run(|| Command::new("/usr/sbin/nft").args(["list", "ruleset"]).output()).await;
    String::from_utf8(listed.unwrap().unwrap().stdout).unwrap()
}

pub(super) fn address(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}
