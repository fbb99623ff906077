//! Loop devices: block devices whose content is a file.
//!
//! Every one that is made here clears itself when its last user closes it (`LO_FLAGS_AUTOCLEAR`). So it is there for
//! exactly as long as somebody has it open, be it a process or a table of the device mapper: nothing counts its users
//! but the kernel, and however a process ends, none is left behind.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::Path,
};

use rustix::{
    io::Errno,
    ioctl::{Getter, NoArg, Opcode, Setter, ioctl},
};

use crate::block_device::DeviceNumber;

const LOOP_CONFIGURE: Opcode = 0x4c0a;
const LOOP_GET_STATUS64: Opcode = 0x4c05;
const LOOP_SET_CAPACITY: Opcode = 0x4c07;
const LOOP_CTL_GET_FREE: Opcode = 0x4c82;

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

/// The major number of all loop devices.
pub const MAJOR: u32 = 7;
/// Bytes of a label, with the terminator.
const LABEL_BYTES: usize = 64;
/// How often somebody else may be faster with the device that was free.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LABEL_BYTES],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    file: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// What a loop device is to be made of.
#[derive(Debug, Clone, Copy)]
pub struct Backing<'a> {
    /// The file. What it was opened for is what the device can be used for.
    pub file: &'a File,
    /// Where in the file the device begins, in bytes: a multiple of 512.
    pub offset: u64,
    /// Whether the device can be written to.
    pub is_writable: bool,
    /// Whose it is, for those who look; at most 63 bytes.
    pub label: &'a str,
}

/// What a loop device is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingFile {
    /// The device of its file system, and its inode there.
    pub identity: (u64, u64),
    /// Where in it the device begins.
    pub offset: u64,
    /// Whether the device can only be read.
    pub is_read_only: bool,
}

/// A loop device that is open, and so stays.
#[derive(Debug)]
pub struct LoopDevice {
    device: File,
    number: DeviceNumber,
}

impl LoopDevice {
    /// Makes one of a file. `nodes` is a directory in which names of devices can be made and opened.
    ///
    /// # Errors
    /// There is none then.
    pub fn make(backing: Backing<'_>, nodes: &Path) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let config = configuration(&backing)?;
        for _ in 0..ATTEMPTS {
            let number = DeviceNumber { major: MAJOR, minor: free(&control)? };
            let device = match number.open(nodes, backing.is_writable) {
                Ok(device) => device,
                // It was removed meanwhile.
                Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => continue,
                Err(error) => return Err(error),
            };
            // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, of which `LoopConfig` has the size and the
            // layout, and keeps no pointer to it. The descriptor in it is open for the whole call.
            #[allow(unsafe_code)]
            let configured = unsafe { ioctl(&device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) };
            match configured {
                Ok(()) => return Ok(Self { device, number }),
                // Somebody else was faster.
                Err(Errno::BUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "others take every loop device that is free"))
    }

    /// Opens one that is there; none where it has no file (any more).
    ///
    /// # Errors
    /// It cannot be opened, or the kernel does not say what it is.
    pub fn find(
        number: DeviceNumber,
        nodes: &Path,
        is_writable: bool,
    ) -> io::Result<Option<(Self, BackingFile)>> {
        let device = match number.open(nodes, is_writable) {
            Ok(device) => device,
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => return Ok(None),
            Err(error) => return Err(error),
        };
        // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, of which `LoopInfo` has the size and the layout;
        // every pattern of bits is one of its values.
        #[allow(unsafe_code)]
        let info = match unsafe { ioctl(&device, Getter::<LOOP_GET_STATUS64, LoopInfo>::new()) } {
            Ok(info) => info,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let LoopInfo { device: of, inode, offset, flags, .. } = info;
        let is_read_only = flags & READ_ONLY != 0;
        Ok(Some((Self { device, number }, BackingFile { identity: (of, inode), offset, is_read_only })))
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Takes notice of how long its file is by now.
    ///
    /// # Errors
    /// It is as long as it was.
    pub fn take_size(&self) -> io::Result<()> {
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        #[allow(unsafe_code)]
        unsafe {
            ioctl(&self.device, NoArg::<LOOP_SET_CAPACITY>::new())?;
        }
        Ok(())
    }
}

fn configuration(backing: &Backing<'_>) -> io::Result<LoopConfig> {
    let invalid = |problem| io::Error::new(io::ErrorKind::InvalidInput, problem);
    let mut file_name = [0; LABEL_BYTES];
    // The last byte stays the terminator.
    if backing.label.len() >= LABEL_BYTES {
        return Err(invalid("a label of a loop device has at most 63 bytes"));
    }
    file_name[..backing.label.len()].copy_from_slice(backing.label.as_bytes());
    let info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: backing.offset,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: AUTOCLEAR | if backing.is_writable { 0 } else { READ_ONLY },
        file_name,
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let file = u32::try_from(backing.file.as_raw_fd()).map_err(|_| invalid("the file is not open"))?;
    Ok(LoopConfig { file, block_size: 0, info, reserved: [0; 8] })
}

/// The number of a loop device without a file, which is made if there is none.
fn free(control: &File) -> io::Result<u32> {
    let request = FreeDevice;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument, and answers with a number.
    #[allow(unsafe_code)]
    let number = unsafe { ioctl(control, request)? };
    u32::try_from(number)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "no number of a loop device"))
}

struct FreeDevice;

// SAFETY: the command takes no pointer, and its answer is the return value.
#[allow(unsafe_code)]
unsafe impl rustix::ioctl::Ioctl for FreeDevice {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        number: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_sizes_of_the_kernels() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }

    #[test]
    fn a_device_clears_itself_and_says_whose_it_is() {
        let file = File::open("/dev/null").unwrap();
        let backing = Backing { file: &file, offset: 4096, is_writable: false, label: "wrenn" };
        let config = configuration(&backing).unwrap();
        assert_eq!(config.info.flags, AUTOCLEAR | READ_ONLY);
        assert_eq!(configuration(&Backing { is_writable: true, ..backing }).unwrap().info.flags, AUTOCLEAR);
        assert_eq!((config.info.offset, &config.info.file_name[..6]), (4096, &b"wrenn\0"[..]));
        assert!(configuration(&Backing { label: &"x".repeat(64), ..backing }).is_err());
    }
}
