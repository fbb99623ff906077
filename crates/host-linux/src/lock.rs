//! Files that are locked by whoever has them open.
//!
//! The lock belongs to the open file description: a child process that inherits a descriptor of it holds
//! the lock as well, and it is free when the last of them is closed, however its holder ended.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// A file that is locked, and lies at its path: whoever locks the same path waits or is refused.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// Locks the file at `path`, which is made when it is not there. Answers none where it is held.
    ///
    /// # Errors
    /// The file could not be opened or locked for another reason.
    pub fn try_acquire(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Between our open and our lock, the holder may have removed the file: then we have locked
            // what nobody else can find, and the next round makes or finds the one that counts.
            let ours = file.metadata()?;
            match fs::metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(Self { file, path: path.to_owned() }));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Replaces what the file says.
    ///
    /// # Errors
    /// As for every write.
    pub fn write(&mut self, content: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        rustix::io::retry_on_intr(|| rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Start(0)))?;
        self.file.write_all(content.as_bytes())
    }

    /// Another descriptor of the same lock: it is held until that one is closed too. It is closed at exec
    /// unless whoever starts the process says otherwise.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Removes the file while it is still locked, and lets go of it.
    ///
    /// # Errors
    /// The file could not be removed. The lock is free even then.
    pub fn remove(self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("wrenn-unit-lock-{name}-{}", std::process::id()))
    }

    #[test]
    fn of_many_that_lock_and_remove_there_is_never_more_than_one() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let path = path("race");
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut turns = 0;
                    while turns < 200 {
                        let Some(lock) = FileLock::try_acquire(&path).unwrap() else {
                            std::thread::yield_now();
                            continue;
                        };
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        lock.remove().unwrap();
                        turns += 1;
                    }
                });
            }
        });
    }
}
