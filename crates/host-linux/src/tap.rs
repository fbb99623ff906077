//! TAP devices: an Ethernet interface whose other end is a file descriptor.
//!
//! A device is made in the network namespace of the thread that opens it, so these functions are called
//! inside of `NetworkNamespace::run`. A persistent device stays until it is deleted as a link, or its
//! namespace goes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
};

use rustix::ioctl::{IntegerSetter, Opcode, Updater, ioctl};

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETPERSIST: Opcode = 0x4004_54cb;
const TUNSETOWNER: Opcode = 0x4004_54cc;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;

const NAME_BYTES: usize = 16;

/// `struct ifreq`, as far as TUNSETIFF looks at it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: u16) -> io::Result<Self> {
        let mut bytes = [0_u8; NAME_BYTES];
        // The last byte stays the terminator.
        if name.is_empty() || name.len() >= NAME_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
        }
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self { name: bytes, flags, rest: [0; 22] })
    }
}

/// Makes a TAP device that stays. Only root and `owner` can attach to it.
///
/// # Errors
/// `NotFound` where the machine has no /dev/net/tun, `ResourceBusy` where the name is taken.
pub fn create_persistent(name: &str, owner: Option<u32>) -> io::Result<()> {
    let device = open_control()?;
    configure(&device, name, IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL)?;
    if let Some(owner) = owner {
        set_owner(&device, owner)?;
    }
    // SAFETY: TUNSETPERSIST takes a flag by value and touches no memory of ours.
    #[allow(unsafe_code)]
    unsafe {
        ioctl(&device, IntegerSetter::<TUNSETPERSIST>::new_usize(1))?;
    }
    Ok(())
}

/// Lets a user attach to a persistent device, and no user who could before.
///
/// # Errors
/// As [`attach`].
pub fn give(name: &str, owner: u32) -> io::Result<()> {
    let device = open_control()?;
    configure(&device, name, IFF_TAP | IFF_NO_PI)?;
    set_owner(&device, owner)
}

fn set_owner(device: &File, owner: u32) -> io::Result<()> {
    // SAFETY: TUNSETOWNER takes the user id by value and touches no memory of ours.
    #[allow(unsafe_code)]
    unsafe {
        ioctl(device, IntegerSetter::<TUNSETOWNER>::new_usize(owner as usize))?;
    }
    Ok(())
}

/// Attaches to a TAP device, which is made when it is not there and then goes with the descriptor. Each
/// read and each write is one Ethernet frame.
///
/// # Errors
/// `NotFound` where the machine has no /dev/net/tun, `ResourceBusy` where another is attached.
pub fn attach(name: &str) -> io::Result<OwnedFd> {
    let device = open_control()?;
    configure(&device, name, IFF_TAP | IFF_NO_PI)?;
    Ok(device.into())
}

/// The same with a header before each frame that says what of it is still to be computed, as VMMs understand it.
///
/// # Errors
/// As [`attach`].
pub fn attach_for_vmm(name: &str) -> io::Result<OwnedFd> {
    let device = open_control()?;
    configure(&device, name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)?;
    Ok(device.into())
}

fn open_control() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun")
}

fn configure(device: &File, name: &str, flags: u16) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name, flags)?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, of which `InterfaceRequest` has the size and
    // the layout, and keeps no pointer to it.
    #[allow(unsafe_code)]
    unsafe {
        ioctl(device, Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_size_of_an_ifreq() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
    }

    #[test]
    fn names_are_checked() {
        for bad in ["", "sixteen-letters-"] {
            assert_eq!(InterfaceRequest::new(bad, 0).err().unwrap().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(InterfaceRequest::new("fifteen-letters", 0).is_ok());
    }
}
