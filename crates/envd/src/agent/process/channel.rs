//! A pipe or terminal that is read and written without blocking.

use std::{io, os::fd::OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::{Errno, ioctl_fionread},
    pipe::{PipeFlags, pipe_with},
};
use tokio::io::{Interest, unix::AsyncFd};
use wrenn_guest_linux::readiness::register;

/// One end of a pipe, or the agent's side of a terminal.
#[derive(Debug)]
pub(crate) struct Channel {
    descriptor: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Takes over a descriptor, which must not block.
    pub(crate) fn new(descriptor: OwnedFd, interest: Interest) -> io::Result<Self> {
        register(descriptor, interest).map(|descriptor| Self { descriptor })
    }

    /// Reads what is there into the free part of `buffer`, or waits. Nothing read is the end; so is EIO, which is
    /// how a terminal says that nobody has it open any more.
    pub(crate) async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let mut ready = self.descriptor.readable().await?;
            let attempt = ready.try_io(|inner| {
                match rustix::io::read(inner.get_ref(), rustix::buffer::spare_capacity(buffer)) {
                    Err(Errno::IO) => Ok(0),
                    other => other.map_err(io::Error::from),
                }
            });
            match attempt {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(answer) => return answer,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes all of `bytes`, waiting for room as often as it takes.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.descriptor.writable().await?;
            match ready.try_io(|inner| rustix::io::write(inner.get_ref(), bytes).map_err(io::Error::from)) {
                Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Ok(written)) => bytes = &bytes[written..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// How many bytes could be read without waiting.
    ///
    /// A terminal hands on what was written to it a moment later; being asked makes it do so at once.
    pub(crate) fn available(&self) -> usize {
        let _ = poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], Some(&Timespec::default()));
        ioctl_fionread(self.descriptor.get_ref())
            .ok()
            .and_then(|count| usize::try_from(count).ok())
            .unwrap_or(0)
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        self.descriptor.get_ref()
    }
}

/// A pipe from a process to the agent: our end, which does not block, and the process's, which does.
pub(crate) fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    do_not_block(&ours)?;
    Ok((ours, theirs))
}

/// A pipe from the agent to a process: our end, and the process's.
pub(crate) fn input_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    do_not_block(&ours)?;
    Ok((ours, theirs))
}

fn do_not_block(descriptor: &OwnedFd) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(descriptor)?;
    rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)
}
