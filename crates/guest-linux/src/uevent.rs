//! Waiting for the kernel to announce a device, or a change of one, instead of looking again and again.
//!
//! Open the socket *before* looking at the state that is waited for: what happens after the look is then in
//! the socket's queue, so nothing is missed.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};

/// The kernel's group; the other one is udev's.
const KERNEL_GROUP: u32 = 1;

/// The stream of the kernel's device announcements.
#[derive(Debug)]
pub struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Starts to listen.
    pub fn open() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// Asks `ready` now and again after every announcement until it says yes. False means that `limit` passed.
    ///
    /// What the announcements say is not read: the question itself is the truth, they only say when to ask.
    pub fn wait_until(&self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<bool, Errno> {
        let deadline = Instant::now() + limit;
        loop {
            if ready() {
                return Ok(true);
            }
            if !self.wait(deadline)? {
                return Ok(ready());
            }
            self.drain()?;
        }
    }

    /// Waits for an announcement; false means that the deadline passed.
    fn wait(&self, deadline: Instant) -> Result<bool, Errno> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Empties the queue. A full queue (ENOBUFS) lost announcements, not state: the caller asks again anyway.
    fn drain(&self) -> Result<(), Errno> {
        let mut buffer = [0; 4096];
        loop {
            match recv(self.socket.as_fd(), &mut buffer, RecvFlags::TRUNC) {
                Ok(_) | Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_bounded_and_asks_at_least_once() {
        let events = Uevents::open().unwrap();
        assert!(events.wait_until(Duration::ZERO, || true).unwrap());
        let mut asked = 0;
        let start = Instant::now();
        let answer = events.wait_until(Duration::from_millis(30), || {
            asked += 1;
            false
        });
        assert!(!answer.unwrap());
        assert!(asked >= 2, "{asked}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
