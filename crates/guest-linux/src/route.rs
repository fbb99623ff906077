//! Addresses, routes and neighbours of the guest's one interface, through rtnetlink.
//!
//! The messages are built by pure functions into one buffer and sent one by one; each is acknowledged by the
//! kernel, so an error is the error of one named step. This is all that the guest needs of netlink, which is
//! why there is no library for it.
//!
//! ```text
//! ┌ nlmsghdr (16) ┬ ifinfomsg | ifaddrmsg | rtmsg | ndmsg ┬ rtattr, padded to 4 ┬ … ┐
//! ```

use std::{
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice::name_to_index,
        netlink::SocketAddrNetlink, recv, sendto, socket_with,
    },
};

/// How long the kernel may take to acknowledge a message; it answers within the call.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(5);

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const NUD_PERMANENT: u16 = 0x80;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// Why the network could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No socket to the kernel.
    #[error("cannot open a route socket")]
    Socket(#[source] Errno),
    /// There is no such interface.
    #[error("no interface {name}")]
    Interface {
        /// The name that was asked for.
        name: String,
        #[source]
        source: Errno,
    },
    /// The kernel refused one step.
    #[error("cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        #[source]
        source: Errno,
    },
}

/// The number of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface(u32);

/// A socket to the kernel's routing tables.
#[derive(Debug)]
pub struct Route {
    socket: OwnedFd,
    sequence: u32,
}

impl Route {
    /// Opens the socket.
    pub fn open() -> Result<Self, RouteError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None).map_err(RouteError::Socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Finds an interface by name.
    pub fn interface(&self, name: &str) -> Result<Interface, RouteError> {
        name_to_index(&self.socket, name)
            .map(Interface)
            .map_err(|source| RouteError::Interface { name: name.to_owned(), source })
    }

    /// Sets an interface up.
    pub fn set_up(&mut self, interface: Interface) -> Result<(), RouteError> {
        self.request("set an interface up", link_up(interface))
    }

    /// Gives an interface an address, and by it the route to its neighbours.
    pub fn add_address(
        &mut self,
        interface: Interface,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), RouteError> {
        self.request("add an address", new_address(interface, address, prefix))
    }

    /// Adds the default route.
    pub fn add_default_route(&mut self, interface: Interface, gateway: Ipv4Addr) -> Result<(), RouteError> {
        self.request("add the default route", default_route(interface, gateway))
    }

    /// Adds a neighbour that never expires, so that no ARP exchange is needed.
    pub fn add_neighbour(
        &mut self,
        interface: Interface,
        address: Ipv4Addr,
        hardware: [u8; 6],
    ) -> Result<(), RouteError> {
        self.request("add a neighbour", new_neighbour(interface, address, hardware))
    }

    fn request(&mut self, step: &'static str, mut message: Message) -> Result<(), RouteError> {
        self.sequence += 1;
        message.finish(self.sequence);
        self.exchange(&message.bytes).map_err(|source| RouteError::Step { step, source })
    }

    fn exchange(&self, message: &[u8]) -> Result<(), Errno> {
        sendto(self.socket.as_fd(), message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut buffer = [0; 1024];
        loop {
            let limit = Timespec::try_from(ACKNOWLEDGE_LIMIT).map_err(|_| Errno::INVAL)?;
            if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit))? == 0 {
                return Err(Errno::TIMEDOUT);
            }
            let (length, _) = recv(self.socket.as_fd(), &mut buffer, RecvFlags::empty())?;
            if let Some(answer) = acknowledgement(&buffer[..length], self.sequence) {
                return answer;
            }
        }
    }
}

/// One netlink message while it is built. The header's length and sequence are written at the end.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut message = Self { bytes: Vec::with_capacity(64) };
        message.put(&0_u32.to_ne_bytes());
        message.put(&kind.to_ne_bytes());
        message.put(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        message.put(&0_u32.to_ne_bytes());
        message.put(&0_u32.to_ne_bytes());
        message
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Adds an attribute. Every one of ours is a few bytes, far from the limit of its length field.
    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.put(&length.to_ne_bytes()).put(&kind.to_ne_bytes()).put(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(&mut self, sequence: u32) {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

fn link_up(interface: Interface) -> Message {
    let mut message = Message::new(RTM_NEWLINK, 0);
    // struct ifinfomsg: family, padding, type, index, flags, change mask.
    message.put(&[0, 0]).put(&0_u16.to_ne_bytes()).put(&interface.0.to_ne_bytes());
    message.put(&IFF_UP.to_ne_bytes()).put(&IFF_UP.to_ne_bytes());
    message
}

fn new_address(interface: Interface, address: Ipv4Addr, prefix: u8) -> Message {
    let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE);
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    message.put(&[AF_INET, prefix, 0, RT_SCOPE_UNIVERSE]).put(&interface.0.to_ne_bytes());
    message.attribute(IFA_LOCAL, &address.octets()).attribute(IFA_ADDRESS, &address.octets());
    message
}

fn default_route(interface: Interface, gateway: Ipv4Addr) -> Message {
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE);
    // struct rtmsg: family, destination and source length, tos, table, protocol, scope, type, flags.
    message.put(&[AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST]);
    message.put(&0_u32.to_ne_bytes());
    message.attribute(RTA_GATEWAY, &gateway.octets()).attribute(RTA_OIF, &interface.0.to_ne_bytes());
    message
}

fn new_neighbour(interface: Interface, address: Ipv4Addr, hardware: [u8; 6]) -> Message {
    let mut message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE);
    // struct ndmsg: family, padding, index, state, flags, type.
    message.put(&[AF_INET, 0, 0, 0]).put(&interface.0.to_ne_bytes());
    message.put(&NUD_PERMANENT.to_ne_bytes()).put(&[0, 0]);
    message.attribute(NDA_DST, &address.octets()).attribute(NDA_LLADDR, &hardware);
    message
}

/// Finds the acknowledgement of message `sequence` in what the kernel sent.
fn acknowledgement(mut received: &[u8], sequence: u32) -> Option<Result<(), Errno>> {
    let word = |bytes: &[u8], at: usize| -> Option<[u8; 4]> { bytes.get(at..at + 4)?.try_into().ok() };
    while let Some(length) = word(received, 0) {
        let length = usize::try_from(u32::from_ne_bytes(length)).ok()?;
        if length < 16 || length > received.len() {
            return Some(Err(Errno::BADMSG));
        }
        let kind = u16::from_ne_bytes(received.get(4..6)?.try_into().ok()?);
        if kind == NLMSG_ERROR && u32::from_ne_bytes(word(received, 8)?) == sequence {
            return Some(match i32::from_ne_bytes(word(received, 16)?) {
                0 => Ok(()),
                error => Err(Errno::from_raw_os_error(error.saturating_neg())),
            });
        }
        received = received.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_kernel_reads_them() {
        let mut message = new_address(Interface(2), Ipv4Addr::new(169, 254, 0, 21), 30);
        message.finish(7);
        assert_eq!(message.bytes.len(), 16 + 8 + 8 + 8);
        assert_eq!(message.bytes[0..4], 40_u32.to_ne_bytes());
        assert_eq!(message.bytes[8..12], 7_u32.to_ne_bytes());
        assert_eq!(message.bytes[24..32], [8, 0, 2, 0, 169, 254, 0, 21]);
        let neighbour = new_neighbour(Interface(2), Ipv4Addr::new(169, 254, 0, 22), [2, 0xfc, 0, 0, 0, 6]);
        assert_eq!(neighbour.bytes.len(), 16 + 12 + 8 + 12, "the hardware address is padded");
    }

    #[test]
    fn an_acknowledgement_is_found_behind_another_message() {
        let error = |sequence: u32, error: i32| {
            let mut bytes = Vec::new();
            bytes.extend(36_u32.to_ne_bytes());
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0, 0]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(error.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        assert_eq!(acknowledgement(&error(3, 0), 4), None);
        let both = [error(3, 0), error(4, -17)].concat();
        assert_eq!(acknowledgement(&both, 4), Some(Err(Errno::EXIST)));
        assert_eq!(acknowledgement(&both, 3), Some(Ok(())));
        assert_eq!(acknowledgement(&[255; 16], 3), Some(Err(Errno::BADMSG)));
        assert_eq!(acknowledgement(&[], 3), None);
    }

    #[test]
    fn loopback_is_there_and_nonsense_is_not() {
        let route = Route::open().unwrap();
        route.interface("lo").unwrap();
        assert!(matches!(route.interface("nonsense0"), Err(RouteError::Interface { .. })));
    }

    /// In a network namespace of its own, which ends with the thread.
    #[test]
    fn the_kernel_takes_every_message() {
        let work = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let mut route = Route::open().unwrap();
            let loopback = route.interface("lo").unwrap();
            let gateway = Ipv4Addr::new(169, 254, 0, 22);
            assert!(matches!(route.add_default_route(loopback, gateway), Err(RouteError::Step { .. })));
            route.set_up(loopback).unwrap();
            route.add_address(loopback, Ipv4Addr::new(169, 254, 0, 21), 30).unwrap();
            route.add_neighbour(loopback, gateway, [2, 0xfc, 0, 0, 0, 6]).unwrap();
            route.add_default_route(loopback, gateway).unwrap();
            let table = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
            assert!(table.contains("1600FEA9"), "{table}");
        };
        std::thread::spawn(work).join().unwrap();
    }
}
