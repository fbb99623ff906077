//! What a process says into a FIFO in its directory: the guest's console, and Firecracker's own log.
//!
//! ```text
//!  Firecracker ─► FIFO (the kernel keeps 64 KiB) ─► the last bytes, here, for as long as there is an owner
//!                   └─ full, because nobody reads: what comes then is lost, and nobody waits
//! ```
//!
//! Firecracker opens it for reading too and never waits for it, so that no reader has to be there: it goes on when its owner
//! is gone, fills no disk, and the next owner finds what was said in the meantime.

use std::{
    fs::{FileType, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    sync::{Mutex, PoisonError},
};

use camino::{Utf8Path, Utf8PathBuf};
use nix::{fcntl::OFlag, sys::stat::Mode};
use tokio::net::unix::pipe;

use crate::{
    VmmResult,
    files::{cannot, remove_stale_of_kind},
    tail::Tail,
};

/// How much is read at once.
const CHUNK: usize = 4096;
/// How much is read before something else has its turn: somebody may write all the time.
const TURN: usize = 64;

/// A reader of a FIFO, and the end of what it has read.
#[derive(Debug)]
pub(super) struct Spool {
    path: Utf8PathBuf,
    pipe: pipe::Receiver,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    tail: Tail,
    /// The next owner reads what comes now.
    is_closed: bool,
}

/// How much of what was said is taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    All,
    /// There may be more.
    Some,
    /// The next owner has it.
    Nothing,
}

impl Spool {
    /// Makes the FIFO, in the place of one of an earlier life.
    pub(super) fn create(path: &Utf8Path, limit: usize) -> VmmResult<Self> {
        remove_stale_of_kind(path, FileType::is_fifo)?;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        nix::unistd::mkfifo(path.as_std_path(), mode)
            .map_err(|error| cannot("create", path)(error.into()))?;
        Self::open(path, Tail::new(limit))
    }

    /// Goes on with one that is there, after what is known of it.
    pub(super) fn continued(path: &Utf8Path, limit: usize, known: &[u8]) -> VmmResult<Self> {
        let mut tail = Tail::new(limit);
        tail.push(known);
        Self::open(path, tail)
    }

    fn open(path: &Utf8Path, tail: Tail) -> VmmResult<Self> {
        // For writing too, so that it has no end while Firecracker has not opened it yet.
        let pipe = pipe::OpenOptions::new().read_write(true).open_receiver(path);
        let pipe = pipe.map_err(cannot("open", path))?;
        Ok(Self { path: path.to_owned(), pipe, said: Mutex::new(Said { tail, is_closed: false }) })
    }

    /// A descriptor through which a child can say something.
    pub(super) fn writer(&self) -> VmmResult<OwnedFd> {
        let mut options = OpenOptions::new();
        // As Firecracker opens it itself.
        options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits());
        options.open(&self.path).map(OwnedFd::from).map_err(cannot("open", &self.path))
    }

    /// Waits until something was said, and takes it in. For ever, if nothing is taken in any more.
    pub(super) async fn follow(&self) {
        if self.pipe.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        match self.take_in(|chunk| self.pipe.try_read(chunk)) {
            Taken::All => {}
            // Whoever says something all the time must not keep others from their turn.
            Taken::Some => tokio::task::yield_now().await,
            Taken::Nothing => std::future::pending::<()>().await,
        }
    }

    /// Everything that is kept, up to now.
    pub(super) fn text(&self) -> String {
        // The runtime knows only later what has been said in this moment: the kernel is asked.
        self.take_in(|chunk| Ok(rustix::io::read(&self.pipe, chunk)?));
        self.locked(|said| said.tail.text())
    }

    /// The last bytes of what was taken in.
    pub(super) fn end(&self, limit: usize) -> String {
        self.locked(|said| said.tail.end(limit))
    }

    /// Takes nothing in any more; what was taken in.
    pub(super) fn close(&self) -> String {
        self.locked(|said| {
            said.is_closed = true;
            said.tail.text()
        })
    }

    fn take_in(&self, read: impl Fn(&mut [u8]) -> io::Result<usize>) -> Taken {
        self.locked(|said| {
            if said.is_closed {
                return Taken::Nothing;
            }
            let mut chunk = [0; CHUNK];
            for _ in 0..TURN {
                match read(&mut chunk) {
                    Ok(count @ 1..) => said.tail.push(&chunk[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    _ => return Taken::All,
                }
            }
            Taken::Some
        })
    }

    fn locked<T>(&self, work: impl FnOnce(&mut Said) -> T) -> T {
        work(&mut self.said.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, time::Duration};

    use super::*;

    fn spool(limit: usize) -> (Spool, Utf8PathBuf, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().join("console");
        (Spool::create(&path, limit).unwrap(), path, directory)
    }

    #[tokio::test]
    async fn the_last_bytes_are_kept_and_the_next_owner_goes_on() {
        let (spool, path, _directory) = spool(8);
        let mut writer = std::fs::File::from(spool.writer().unwrap());
        writer.write_all(b"0123456789").unwrap();
        spool.follow().await;
        assert_eq!((spool.end(3).as_str(), spool.text().as_str()), ("789", "23456789"));
        writer.write_all(b"ab").unwrap();
        assert_eq!(spool.text(), "456789ab", "nobody has to wait for it");
        let known = spool.close();
        writer.write_all(b"c").unwrap();
        assert_eq!(spool.text(), "456789ab");
        let follows = tokio::time::timeout(Duration::from_millis(20), spool.follow()).await;
        assert!(follows.is_err(), "what comes now is the next owner's");
        drop(spool);
        writer.write_all(b"d").unwrap();
        let next = Spool::continued(&path, 8, known.as_bytes()).unwrap();
        assert_eq!(next.text(), "6789abcd", "what was said in the meantime is there");
        drop(Spool::create(&path, 8).unwrap());
        let somebodys = path.with_file_name("file");
        std::fs::write(&somebodys, "content").unwrap();
        assert!(Spool::create(&somebodys, 8).is_err());
        assert_eq!(std::fs::read_to_string(&somebodys).unwrap(), "content");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_reader() {
        let (spool, _path, _directory) = spool(100);
        let mut writer = std::fs::File::from(spool.writer().unwrap());
        let mut wrote = 0;
        let error = loop {
            match writer.write(&[b'x'; 1000]) {
                Ok(count) => wrote += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!((1..2 << 20).contains(&wrote), "{wrote}");
        assert_eq!(spool.text().len(), 100);
    }
}
