//! What arrives at the far end, counted by the kernel: so that "nothing came through" does not depend on whether
//! anybody listened at the right moment.
//!
//! ```text
//!  sandbox ══ wrenn-v-N ─► [left] ─ rules of the stack ─► [delivered] this host's own addresses
//!                                          └─ world0 ═══► [delivered] the internet
//! ```

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::net::UdpSocket;
use wrenn_host_linux::netns::NetworkNamespace;

use super::{ELSEWHERE, GREETING, HOST_PUBLIC, INTERNET, METADATA, PRIVATE, PRIVATE_TEN, Uplink};

/// The port on which every address answers over TCP and UDP once it is [watched](Uplink::watch).
pub const PROBE: u16 = 7007;
/// How long an answer to a datagram may take within one machine.
const DATAGRAM_BOUND: Duration = Duration::from_secs(5);

/// Counts of packets by where they were going.
pub type Packets = BTreeMap<SocketAddrV4, u64>;

/// Before any rule of a stack: all that leaves the namespace of a sandbox. After all of them: what is delivered, but for
/// resets, which the host itself sends for connections of a sandbox that is gone.
const TABLE: &str = r#"
table inet seen {
    set left { type ipv4_addr . inet_service; flags dynamic; size 65535; counter; }
    set delivered { type ipv4_addr . inet_service; flags dynamic; size 65535; counter; }
    chain leaving {
        type filter hook prerouting priority -450;
        iifname "wrenn-v-*" meta l4proto { tcp, udp } update @left { ip daddr . th dport }
    }
    chain arriving {
        type filter hook input priority 2000;
        tcp flags & rst == rst return
        meta l4proto { tcp, udp } update @delivered { ip daddr . th dport }
    }
}
"#;

impl Uplink {
    /// From now on packets are counted, and every address answers on [`PROBE`] too.
    ///
    /// # Errors
    /// Without `nft`.
    pub async fn watch(&mut self) -> Result<()> {
        let internet = self.internet.clone().context("there is an internet")?;
        let here = self.namespace.clone();
        for namespace in [&here, &internet] {
            nft(namespace, &["-f", "-"], TABLE).await?;
        }
        for address in [PRIVATE, PRIVATE_TEN, METADATA, HOST_PUBLIC] {
            self.serve_probe(&here, address).await?;
        }
        for address in [INTERNET, ELSEWHERE] {
            self.serve_probe(&internet, address).await?;
        }
        Ok(())
    }

    /// What sandboxes have sent out of their namespaces, whatever became of it.
    ///
    /// # Errors
    /// It is not watched.
    pub async fn left_sandboxes(&self) -> Result<Packets> {
        counted(&self.namespace, "left").await
    }

    /// What reached one of the addresses, whoever sent it.
    ///
    /// # Errors
    /// It is not watched.
    pub async fn delivered(&self) -> Result<Packets> {
        let mut all = counted(&self.namespace, "delivered").await?;
        all.extend(counted(self.internet.as_ref().context("there is an internet")?, "delivered").await?);
        Ok(all)
    }

    /// Counts from nothing again.
    ///
    /// # Errors
    /// It is not watched.
    pub async fn forget_packets(&self) -> Result<()> {
        for namespace in [&self.namespace, self.internet.as_ref().context("there is an internet")?] {
            for set in ["left", "delivered"] {
                nft(namespace, &["flush", "set", "inet", "seen", set], "").await?;
            }
        }
        Ok(())
    }

    /// Whether an address answers a datagram from this namespace: a control, as [`Uplink::answers`].
    ///
    /// # Errors
    /// The namespace is gone.
    pub async fn answers_datagram(&self, address: SocketAddr) -> Result<bool> {
        let asked = self.namespace.run(move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(DATAGRAM_BOUND))?;
            socket.connect(address)?;
            socket.send(b"?")?;
            let mut answer = [0; 64];
            let length = socket.recv(&mut answer)?;
            io::Result::Ok(answer[..length] == *GREETING.as_bytes())
        });
        Ok(asked.await?.unwrap_or(false))
    }

    async fn serve_probe(&mut self, namespace: &NetworkNamespace, address: Ipv4Addr) -> Result<()> {
        let target = SocketAddr::from((address, PROBE));
        self.serve_in(namespace, target).await?;
        let bind = move || {
            let socket = std::net::UdpSocket::bind(target)?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        };
        let socket = UdpSocket::from_std(namespace.run(bind).await??)?;
        self.servers.push(tokio::spawn(async move {
            let mut message = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut message).await {
                let _ = socket.send_to(GREETING.as_bytes(), from).await;
            }
        }));
        Ok(())
    }
}

/// The contents of one of the sets, as `nft` writes them.
async fn counted(namespace: &NetworkNamespace, set: &'static str) -> Result<Packets> {
    let said = nft(namespace, &["-j", "list", "set", "inet", "seen", set], "").await?;
    let said: Value = serde_json::from_str(&said)?;
    let objects = said["nftables"].as_array().context("a list of objects")?;
    let elements = objects.iter().find_map(|object| object["set"]["elem"].as_array());
    let mut packets = Packets::new();
    for element in elements.into_iter().flatten() {
        let element = &element["elem"];
        let [address, port] = &element["val"]["concat"].as_array().context("two parts")?[..] else {
            anyhow::bail!("{element}")
        };
        let address = address.as_str().context("an address")?.parse::<Ipv4Addr>()?;
        let port = u16::try_from(port.as_u64().context("a port")?)?;
        let count = element["counter"]["packets"].as_u64().context("a count")?;
        packets.insert(SocketAddrV4::new(address, port), count);
    }
    Ok(packets)
}

async fn nft(namespace: &NetworkNamespace, words: &[&'static str], script: &'static str) -> Result<String> {
    let words = words.to_vec();
    let run = move || {
        let mut child = Command::new("/usr/sbin/nft")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            io::Write::write_all(&mut input, script.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = namespace.run(run).await?.context("run nft")?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
