//! What stands for everything outside of a host: a network namespace with addresses that answer.
//!
//! A stack of a test reaches the outside through it, so nothing that a guest sends can leave the machine,
//! and "unreachable" has a control: every address can be asked from the namespace itself.

mod far_end;

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};
use wrenn_host_linux::netns::{self, NetworkNamespace};

pub use self::far_end::{PROBE, Packets};

/// An address that a sandbox with internet access may reach.
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(93, 184, 215, 14);
/// Another one.
pub const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(151, 101, 65, 69);
/// An address of a private network.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// Another.
pub const PRIVATE_TEN: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// The metadata service of a cloud.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// A public address of the host itself.
pub const HOST_PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
/// The port on which all of them answer.
pub const PORT: u16 = 80;
/// What they answer with, after the address.
pub const GREETING: &str = "here";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A namespace that stands for the outside. Dropping it gives the name back.
#[derive(Debug)]
pub struct Uplink {
    name: String,
    path: PathBuf,
    namespace: NetworkNamespace,
    /// Where what is forwarded ends.
    internet: Option<NetworkNamespace>,
    servers: Vec<tokio::task::JoinHandle<()>>,
    asked: Arc<AtomicUsize>,
    /// The hosts that requests were for.
    hosts: Arc<Mutex<BTreeSet<String>>>,
}

impl Uplink {
    /// Makes it. The host's own addresses answer on `lo`; the internet is behind a second namespace.
    ///
    /// # Errors
    /// Without root.
    pub async fn create() -> Result<Self> {
        netns::prepare_names()?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("wrenn-out-{}-{number}", std::process::id());
        let path = Path::new(netns::NAMES).join(&name);
        let (namespace, ()) =
            NetworkNamespace::create(&path, || io::Result::Ok(())).await.context("make a namespace")?;
        let mut uplink = Self {
            name,
            path,
            namespace,
            internet: None,
            servers: Vec::new(),
            asked: Arc::default(),
            hosts: Arc::default(),
        };
        uplink.address("lo", "127.0.0.1/8").await?;
        uplink.ip("link set lo up").await?;
        for address in [PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC] {
            uplink.address("lo", &format!("{address}/32")).await?;
        }
        for address in [PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC] {
            uplink.serve(SocketAddr::from((address, PORT))).await?;
        }
        uplink.internet().await?;
        Ok(uplink)
    }

    /// The internet is a namespace of its own behind a veth pair, so that packets to it are forwarded and
    /// not delivered on the host.
    async fn internet(&mut self) -> Result<()> {
        let inside = format!("{}-net", self.name);
        let path = Path::new(netns::NAMES).join(&inside);
        let (namespace, ()) = NetworkNamespace::create(&path, || io::Result::Ok(())).await?;
        self.ip(&format!("link add world0 type veth peer name world1 netns {inside}")).await?;
        self.ip("addr add 100.127.255.1/30 dev world0").await?;
        self.ip("link set world0 up").await?;
        run_ip(&namespace, "link set lo up").await?;
        run_ip(&namespace, "addr add 100.127.255.2/30 dev world1").await?;
        for address in [INTERNET, ELSEWHERE] {
            run_ip(&namespace, &format!("addr add {address}/32 dev world1")).await?;
        }
        run_ip(&namespace, "link set world1 up").await?;
        run_ip(&namespace, "route add default via 100.127.255.1").await?;
        self.ip("route replace default via 100.127.255.2").await?;
        for address in [INTERNET, ELSEWHERE] {
            self.serve_in(&namespace, SocketAddr::from((address, PORT))).await?;
        }
        self.serve_names(&namespace).await?;
        self.internet = Some(namespace);
        Ok(())
    }

    /// A name server on [`INTERNET`], for which every name is that address.
    async fn serve_names(&mut self, namespace: &NetworkNamespace) -> Result<()> {
        let socket = namespace
            .run(|| {
                let socket = std::net::UdpSocket::bind((INTERNET, 53))?;
                socket.set_nonblocking(true)?;
                io::Result::Ok(socket)
            })
            .await??;
        let socket = UdpSocket::from_std(socket)?;
        self.servers.push(tokio::spawn(async move {
            let mut message = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut message).await {
                if let Some(answer) = answer_with_internet(&message[..length]) {
                    let _ = socket.send_to(&answer, from).await;
                }
            }
        }));
        Ok(())
    }

    async fn ip(&self, words: &str) -> Result<()> {
        run_ip(&self.namespace, words).await
    }

    async fn address(&self, device: &str, address: &str) -> Result<()> {
        self.ip(&format!("addr add {address} dev {device}")).await
    }

    /// The name of the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace itself.
    #[must_use]
    pub fn namespace(&self) -> &NetworkNamespace {
        &self.namespace
    }

    /// How often any of the addresses was asked, by anyone.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// The hosts for which any of the addresses was asked over HTTP, by anyone.
    #[must_use]
    pub fn hosts(&self) -> BTreeSet<String> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets for which hosts it was asked.
    pub fn forget_hosts(&self) {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Answers on an address of this namespace.
    ///
    /// # Errors
    /// The address is not there or taken.
    pub async fn serve(&mut self, address: SocketAddr) -> Result<()> {
        let namespace = self.namespace.clone();
        self.serve_in(&namespace, address).await
    }

    async fn serve_in(&mut self, namespace: &NetworkNamespace, address: SocketAddr) -> Result<()> {
        let listener = namespace
            .run(move || {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                io::Result::Ok(listener)
            })
            .await??;
        let listener = TcpListener::from_std(listener)?;
        let (asked, hosts) = (Arc::clone(&self.asked), Arc::clone(&self.hosts));
        self.servers.push(tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                asked.fetch_add(1, Ordering::SeqCst);
                let hosts = Arc::clone(&hosts);
                tokio::spawn(async move {
                    let mut request = [0; 1024];
                    // The request is read first, so that closing does not reset what was answered.
                    let read = timeout(Duration::from_secs(2), stream.read(&mut request)).await;
                    let head =
                        String::from_utf8_lossy(&request[..read.ok().and_then(Result::ok).unwrap_or(0)]);
                    hosts.lock().unwrap_or_else(PoisonError::into_inner).extend(host_in(&head));
                    let text = format!("{} {GREETING}\n", address.ip());
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
                        text.len()
                    );
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        }));
        Ok(())
    }

    /// Whether an address answers when it is asked from this namespace: the control of every test that
    /// says that a guest cannot reach it.
    ///
    /// # Errors
    /// The namespace is gone.
    pub async fn answers(&self, address: SocketAddr) -> Result<bool> {
        let stream = self
            .namespace
            .run(move || {
                let stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
                stream.set_nonblocking(true)?;
                io::Result::Ok(stream)
            })
            .await?;
        let Ok(stream) = stream else { return Ok(false) };
        let mut stream = TcpStream::from_std(stream)?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
        let mut answer = Vec::new();
        timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await??;
        Ok(String::from_utf8_lossy(&answer).contains(GREETING))
    }

    /// Names of the devices in the namespace that a stack made.
    ///
    /// # Errors
    /// `ip` is not there.
    pub async fn veths(&self) -> Result<Vec<String>> {
        let output = tokio::process::Command::new("ip")
            .args(["-n", &self.name, "-o", "link", "show", "type", "veth"])
            .output()
            .await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        Ok(names.filter(|name| name.starts_with("wrenn-v-")).map(str::to_owned).collect())
    }

    /// Gives the name back.
    ///
    /// # Errors
    /// What the kernel said.
    pub async fn remove(self) -> Result<()> {
        // The drop does it; the method is there so that a test reads as what it does.
        drop(self);
        Ok(())
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
        let _ = netns::remove_name(&self.path);
        let _ = netns::remove_name(Path::new(&format!("{}-net", self.path.display())));
    }
}

/// The host that a request is for, in whichever letters its header is written.
fn host_in(head: &str) -> Option<String> {
    let mut headers = head.lines().filter_map(|line| line.split_once(':'));
    let (_, host) = headers.find(|(name, _)| name.eq_ignore_ascii_case("host"))?;
    Some(host.trim().to_owned())
}

/// The answer to one question for an address.
fn answer_with_internet(question: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let end = HEADER + question.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 5;
    let mut answer = question.get(..end)?.to_vec();
    // An answer without error, with one record, and nothing else.
    answer[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    // The name of the question; an IPv4 address of the internet; a minute; four bytes.
    answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    answer.extend(INTERNET.octets());
    Some(answer)
}

async fn run_ip(namespace: &NetworkNamespace, words: &str) -> Result<()> {
    let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    let shown = words.join(" ");
    let output = namespace
        .run(move || std::process::Command::new("ip").args(words).output())
        .await?
        .context("run ip")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "ip {shown}: {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that wrote it in small letters was taken for nobody.
    #[test]
    fn a_host_is_found_however_it_is_written() {
        for head in ["Host: a.example", "host: a.example", "HOST:a.example"] {
            let request = format!("GET http://b.example/ HTTP/1.1\r\nAccept: */*\r\n{head}\r\n\r\n");
            assert_eq!(host_in(&request).as_deref(), Some("a.example"));
        }
        assert_eq!(host_in("GET / HTTP/1.0\r\n\r\n"), None);
    }
}
