//! What the kernel is asked for directly, and its network.

use std::{
    fs, io,
    net::TcpStream,
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
};

use rustix::ioctl::{Updater, ioctl, opcode};
use wrenn_host_linux::{netns, netns::NetworkNamespace, tap};

use crate::{in_lab, shell, unique};

#[test]
fn every_controller_is_delegated() {
    if !in_lab() {
        return;
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap();
    let controllers: Vec<&str> = controllers.split_whitespace().collect();
    for wanted in ["cpu", "cpuset", "io", "memory", "pids"] {
        assert!(controllers.contains(&wanted), "{wanted} is not in {controllers:?}");
    }
}

/// `struct uffdio_api`: the version, which features are wanted, and what there is then.
#[repr(C)]
struct FaultApi {
    version: u64,
    features: u64,
    calls: u64,
}

const FAULT_API: u64 = 0xaa;
/// Without it the removal of pages, as a balloon does it, is not told.
const EVENT_REMOVE: u64 = 1 << 3;

#[test]
fn faults_of_memory_are_told_to_who_asks() {
    if !in_lab() {
        return;
    }
    // SAFETY: the call takes flags alone and gives a new descriptor or -1.
    #[allow(unsafe_code)]
    let faults = unsafe {
        let number = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        assert!(number >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(i32::try_from(number).unwrap())
    };
    let mut api = FaultApi { version: FAULT_API, features: EVENT_REMOVE, calls: 0 };
    const CALL: rustix::ioctl::Opcode = opcode::read_write::<FaultApi>(0xaa, 0x3f);
    // SAFETY: the structure is the one of this call, which reads and fills it.
    #[allow(unsafe_code)]
    unsafe {
        ioctl(&faults, Updater::<CALL, _>::new(&mut api)).unwrap();
    }
    assert!(api.features & EVENT_REMOVE != 0 && api.calls != 0, "{:x} {:x}", api.features, api.calls);
}

#[tokio::test]
async fn namespaces_are_joined_by_a_pair_of_links_and_separated_by_a_filter() {
    if !in_lab() {
        return;
    }
    let (one, two) = (unique("a"), unique("b"));
    shell(&format!(
        "ip netns add {one}; ip netns add {two}
         ip -n {one} link add eth0 type veth peer name eth0 netns {two}
         ip -n {one} addr add 10.9.0.1/24 dev eth0; ip -n {two} addr add 10.9.0.2/24 dev eth0
         ip -n {one} link set eth0 up; ip -n {two} link set eth0 up
         ip netns exec {one} nft 'add table ip n; add chain ip n c {{ type nat hook postrouting priority srcnat; }};
            add rule ip n c masquerade'"
    ));
    let namespace = NetworkNamespace::open(&Path::new("/run/netns").join(&one)).unwrap();
    let connect = async || {
        let connect = || TcpStream::connect(("10.9.0.2", 8000)).map(drop).unwrap_err().kind();
        namespace.run(connect).await.unwrap()
    };
    // Nobody listens, so what gets through is refused at once.
    assert_eq!(connect().await, io::ErrorKind::ConnectionRefused);
    shell(&format!(
        "ip netns exec {two} nft 'add table inet t; add chain inet t c {{ type filter hook input priority 0; }};
            add rule inet t c ct state new tcp dport 8000 counter reject with icmpx admin-prohibited'"
    ));
    assert_eq!(connect().await, io::ErrorKind::HostUnreachable);
    let counted = shell(&format!("ip netns exec {two} nft list table inet t"));
    assert!(counted.contains("counter packets") && !counted.contains("packets 0 "), "{counted}");
    shell(&format!("ip netns del {one}; ip netns del {two}"));
}

#[tokio::test]
async fn a_tap_device_can_be_made() {
    if !in_lab() {
        return;
    }
    let path = Path::new("/run/netns").join(unique("tap"));
    netns::prepare_names().unwrap();
    let (namespace, ()) =
        NetworkNamespace::create(&path, || tap::create_persistent("tap0", None)).await.unwrap();
    netns::remove_name(&path).unwrap();
    let there = namespace.run(|| tap::attach("tap0").is_ok()).await.unwrap();
    assert!(there);
}
