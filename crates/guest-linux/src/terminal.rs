//! Pseudo terminals: the pair, its size and its owner.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, fcntl_getfl, fcntl_setfl},
    io::Errno,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// A pseudo terminal: the side that the agent keeps and the side that the program gets.
#[derive(Debug)]
pub struct Pair {
    /// The agent's side, not blocking.
    pub controller: OwnedFd,
    /// The program's side.
    pub terminal: OwnedFd,
}

/// Opens a pseudo terminal of this size that belongs to user `owner` and to group `group` (by custom `tty`).
pub fn open(size: Size, owner: u32, group: u32) -> Result<Pair, Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags)?;
    unlockpt(&controller)?;
    let terminal = ioctl_tiocgptpeer(&controller, flags)?;
    resize(&controller, size)?;
    fchown(&terminal, Some(Uid::from_raw(owner)), Some(Gid::from_raw(group)))?;
    fchmod(&terminal, Mode::from_raw_mode(0o620))?;
    let status = fcntl_getfl(&controller)?;
    fcntl_setfl(&controller, status | OFlags::NONBLOCK)?;
    Ok(Pair { controller, terminal })
}

/// Changes the size; the kernel tells the foreground group with SIGWINCH.
pub fn resize(controller: impl AsFd, size: Size) -> Result<(), Errno> {
    let size = Winsize { ws_col: size.columns, ws_row: size.rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(controller, size)
}

#[cfg(test)]
mod tests {
    use rustix::termios::tcgetwinsize;

    use super::*;

    #[test]
    fn both_sides_see_the_size() {
        let pair = open(Size { columns: 80, rows: 24 }, 0, 5).unwrap();
        let seen = tcgetwinsize(&pair.terminal).unwrap();
        assert_eq!((seen.ws_col, seen.ws_row), (80, 24));
        resize(&pair.controller, Size { columns: 132, rows: 50 }).unwrap();
        let seen = tcgetwinsize(&pair.terminal).unwrap();
        assert_eq!((seen.ws_col, seen.ws_row), (132, 50));
    }
}
