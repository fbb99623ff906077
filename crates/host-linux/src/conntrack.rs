//! The kernel's memory of connections, as far as it has to be made to forget.
//!
//! A connection that was translated for one address keeps its entry for minutes to days after both ends
//! are gone. Where the address is given to somebody else, the entries of its former user go first.
//!
//! This speaks ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`) directly: one dump that the kernel
//! filters by source address, then one deletion per entry.

use std::{io, net::Ipv4Addr, os::fd::OwnedFd, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// How long the kernel may take for one answer.
const ANSWER_BOUND: Duration = Duration::from_secs(2);
/// A dump arrives in pieces of at most 32 KiB.
const BUFFER_BYTES: usize = 64 * 1024;

const CT_GET: u16 = 0x0101;
const CT_DELETE: u16 = 0x0102;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const F_REQUEST: u16 = 0x1;
const F_ACK: u16 = 0x4;
const F_DUMP: u16 = 0x300;

const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const FILTER_BY_SOURCE: u32 = 1;

const MESSAGE_HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// Makes the kernel forget every connection that `source` opened, in the network namespace of the calling
/// thread. Answers how many there were.
///
/// # Errors
/// The kernel has no connection tracking by netlink, refused, or did not answer in time.
pub fn forget(source: Ipv4Addr) -> io::Result<usize> {
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_BOUND))?;
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_BOUND))?;
    let entries = dump(&socket, source)?;
    let mut forgotten = 0;
    for key in entries {
        forgotten += usize::from(delete(&socket, &key)?);
    }
    Ok(forgotten)
}

/// The attributes that name one entry, as the kernel sent them: original tuple, zone and id.
type Key = Vec<u8>;

fn dump(socket: &OwnedFd, source: Ipv4Addr) -> io::Result<Vec<Key>> {
    let address = attribute(CTA_IP_V4_SRC, &source.octets());
    let tuple = attribute(CTA_TUPLE_ORIG | NESTED, &attribute(CTA_TUPLE_IP | NESTED, &address));
    let mut flags = attribute(CTA_FILTER_ORIG_FLAGS, &FILTER_BY_SOURCE.to_ne_bytes());
    flags.extend(attribute(CTA_FILTER_REPLY_FLAGS, &0_u32.to_ne_bytes()));
    // A kernel before 5.8 does not know the filter and sends everything; each entry is looked at anyway.
    let filter = attribute(CTA_FILTER | NESTED, &flags);
    send(socket, &message(CT_GET, F_REQUEST | F_DUMP, &[tuple, filter].concat())?, SendFlags::empty())?;

    let mut keys = Vec::new();
    loop {
        let received = receive(socket)?;
        for (kind, body) in messages(&received) {
            match kind {
                NLMSG_DONE => return Ok(keys),
                NLMSG_ERROR => return Err(error_of(body).unwrap_or_else(|| malformed("an empty error"))),
                _ => {
                    let attributes = body.get(FAMILY_HEADER..).unwrap_or_default();
                    if source_of(attributes) == Some(source) {
                        keys.push(key_of(attributes));
                    }
                }
            }
        }
    }
}

/// Whether the entry was still there.
fn delete(socket: &OwnedFd, key: &Key) -> io::Result<bool> {
    send(socket, &message(CT_DELETE, F_REQUEST | F_ACK, key)?, SendFlags::empty())?;
    let received = receive(socket)?;
    let Some((NLMSG_ERROR, body)) = messages(&received).next() else {
        return Err(malformed("no acknowledgement"));
    };
    match error_of(body) {
        None => Ok(true),
        Some(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Some(error) => Err(error),
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (length, _) = recv(socket, buffer.as_mut_slice(), RecvFlags::empty())?;
    buffer.truncate(length);
    Ok(buffer)
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel answered with {what}"))
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> io::Result<Vec<u8>> {
    let length =
        u32::try_from(MESSAGE_HEADER + FAMILY_HEADER + attributes.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Neither sequence number nor port: one question at a time, on a socket of its own.
    bytes.extend([0; 8]);
    // Address family (2 is AF_INET), version 0, resource 0.
    bytes.extend([2, 0, 0, 0]);
    bytes.extend(attributes);
    Ok(bytes)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // All that is made here is shorter than a hundred bytes.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The messages of one datagram: kind and what follows the header. It ends where the bytes make no sense.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(MESSAGE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// The attributes in some bytes: kind, value, and the whole attribute with its header.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & !NESTED;
        let value = bytes.get(4..length)?;
        let whole = bytes.get(..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value, whole))
    })
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value, _)| (kind == wanted).then_some(value))
}

fn source_of(entry: &[u8]) -> Option<Ipv4Addr> {
    let address = find(find(find(entry, CTA_TUPLE_ORIG)?, CTA_TUPLE_IP)?, CTA_IP_V4_SRC)?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(address).ok()?))
}

fn key_of(entry: &[u8]) -> Key {
    let mut key = Vec::new();
    for (kind, _, whole) in attributes(entry) {
        if matches!(kind, CTA_TUPLE_ORIG | CTA_ID | CTA_ZONE) {
            key.extend(whole);
            key.resize(key.len().next_multiple_of(4), 0);
        }
    }
    key
}

fn error_of(body: &[u8]) -> Option<io::Error> {
    let code = i32::from_ne_bytes(body.get(..4)?.try_into().ok()?);
    (code != 0).then(|| io::Error::from_raw_os_error(code.saturating_neg()))
}

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a skipped test says so")]
mod tests {
    use super::*;

    #[test]
    fn an_entry_gives_its_source_and_its_key() {
        let address = attribute(CTA_IP_V4_SRC, &[10, 12, 0, 3]);
        let tuple = attribute(CTA_TUPLE_ORIG | NESTED, &attribute(CTA_TUPLE_IP | NESTED, &address));
        let id = attribute(CTA_ID, &[1, 2, 3, 4]);
        let entry = [tuple.clone(), attribute(3, &[9, 9, 9, 9, 9]), id.clone()].concat();
        assert_eq!(source_of(&entry), Some(Ipv4Addr::new(10, 12, 0, 3)));
        assert_eq!(key_of(&entry), [tuple, id].concat());
    }

    #[test]
    fn bytes_that_make_no_sense_end_the_walk() {
        for bytes in [&[][..], &[0; 3], &[0; 64], &[0xff; 64]] {
            assert!(messages(bytes).count() <= 1, "{bytes:?}");
            assert_eq!(source_of(bytes), None);
            key_of(bytes);
        }
    }

    #[tokio::test]
    async fn a_connection_is_forgotten_by_its_source_only() {
        use std::{net::UdpSocket, process::Command};

        use crate::netns::{NetworkNamespace, prepare_names, remove_name};

        if !rustix::process::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        prepare_names().unwrap();
        let path = std::path::PathBuf::from(format!("/run/netns/wrenn-unit-ct-{}", std::process::id()));
        let (namespace, ()) = NetworkNamespace::create(&path, || io::Result::Ok(())).await.unwrap();
        remove_name(&path).unwrap();
        namespace
            .run(|| {
                assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
                // Any rule that looks at the state of connections turns the tracking on.
                let rules = "table inet t {\nchain c {\ntype filter hook output priority 0\nct state new accept\n}\n}\n";
                let file = std::env::temp_dir().join(format!("wrenn-unit-ct-{}", std::process::id()));
                std::fs::write(&file, rules).unwrap();
                assert!(Command::new("nft").arg("-f").arg(&file).status().unwrap().success());
                std::fs::remove_file(&file).unwrap();
                for source in ["127.0.0.2", "127.0.0.2", "127.0.0.3"] {
                    let socket = UdpSocket::bind((source, 0)).unwrap();
                    socket.send_to(b"x", "127.0.0.9:9").unwrap();
                }
                assert_eq!(forget(Ipv4Addr::new(127, 0, 0, 2)).unwrap(), 2);
                assert_eq!(forget(Ipv4Addr::new(127, 0, 0, 2)).unwrap(), 0);
                assert_eq!(forget(Ipv4Addr::new(127, 0, 0, 3)).unwrap(), 1);
            })
            .await
            .unwrap();
    }
}
