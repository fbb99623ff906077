//! Giving the kernel fresh randomness and making it use it.
//!
//! A restored snapshot wakes up with the random number generator of every other clone. Two steps make it its
//! own: [`Random::add`] mixes bytes into the pool and credits them, [`Random::reseed`] makes the generator take
//! a new key from the pool at once instead of at its next interval. Without the second step two clones may
//! hand out the same numbers for minutes, so its failure must not be ignored.

use std::{fs::File, os::fd::AsFd, path::Path};

use rustix::{
    io::Errno,
    ioctl::{self, NoArg, Setter, opcode},
};

/// The most bytes that one call mixes in; the kernel's pool holds 256 bits, so more would buy nothing.
pub const MAXIMUM: usize = 256;

const ADD_ENTROPY: ioctl::Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
const RESEED: ioctl::Opcode = opcode::none(b'R', 0x07);

/// Why the kernel's random number generator could not be made fresh.
#[derive(Debug, thiserror::Error)]
pub enum EntropyError {
    /// The device could not be opened.
    #[error("cannot open the random device")]
    Open(#[source] std::io::Error),
    /// The caller gave no bytes, or more than [`MAXIMUM`].
    #[error("{0} bytes of entropy are not between 1 and {MAXIMUM}")]
    Length(usize),
    /// The kernel refused the bytes.
    #[error("cannot add entropy")]
    Add(#[source] Errno),
    /// The kernel did not take a new key.
    #[error("cannot reseed the random number generator")]
    Reseed(#[source] Errno),
}

/// The kernel's random device.
#[derive(Debug)]
pub struct Random {
    device: File,
}

/// `struct rand_pool_info` with room for [`MAXIMUM`] bytes.
#[repr(C)]
struct PoolInfo {
    bits: i32,
    length: i32,
    bytes: [u8; MAXIMUM],
}

impl Random {
    /// Opens the device (`/dev/urandom`).
    pub fn open(path: &Path) -> Result<Self, EntropyError> {
        File::open(path).map(|device| Self { device }).map_err(EntropyError::Open)
    }

    /// Mixes `bytes` into the pool and credits eight bits for each.
    pub fn add(&self, bytes: &[u8]) -> Result<(), EntropyError> {
        let wrong = || EntropyError::Length(bytes.len());
        if bytes.is_empty() || bytes.len() > MAXIMUM {
            return Err(wrong());
        }
        let length = i32::try_from(bytes.len()).map_err(|_| wrong())?;
        let mut info = PoolInfo { bits: length * 8, length, bytes: [0; MAXIMUM] };
        info.bytes[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: RNDADDENTROPY reads a rand_pool_info: two ints, then as many bytes as the second one says,
        // which is at most the length of the array that follows them in this `repr(C)` struct.
        #[allow(unsafe_code)]
        unsafe { ioctl::ioctl(self.device.as_fd(), Setter::<ADD_ENTROPY, PoolInfo>::new(info)) }
            .map_err(EntropyError::Add)
    }

    /// Makes the generator take a new key from the pool now.
    pub fn reseed(&self) -> Result<(), EntropyError> {
        // SAFETY: RNDRESEEDCRNG takes no argument and touches no memory of ours.
        #[allow(unsafe_code)]
        unsafe { ioctl::ioctl(self.device.as_fd(), NoArg::<RESEED>::new()) }.map_err(EntropyError::Reseed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_bytes_are_taken_and_used() {
        let random = Random::open(Path::new("/dev/urandom")).unwrap();
        random.add(&[7; 32]).unwrap();
        random.reseed().unwrap();
    }

    #[test]
    fn a_file_that_is_no_random_device_is_refused() {
        let random = Random::open(Path::new("/dev/null")).unwrap();
        assert!(matches!(random.add(&[7; 32]), Err(EntropyError::Add(_))));
        assert!(matches!(random.reseed(), Err(EntropyError::Reseed(_))));
        assert!(matches!(random.add(&[]), Err(EntropyError::Length(0))));
        assert!(matches!(random.add(&[0; MAXIMUM + 1]), Err(EntropyError::Length(_))));
    }
}
