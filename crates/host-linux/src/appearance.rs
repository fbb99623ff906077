//! Telling when a file appears in a directory, by inotify: nobody has to look again and again.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::fs::inotify;
use tokio::io::{Interest, unix::AsyncFd};

/// How much of the kernel's events is read at once. What they say does not matter.
const EVENTS: usize = 4096;

/// A watch over a directory, from the moment on at which it was made.
#[derive(Debug)]
pub struct Appearance(AsyncFd<OwnedFd>);

impl Appearance {
    /// Begins to watch. What appears from now on is told.
    ///
    /// # Errors
    /// There is no such directory, or there are too many watches.
    pub fn watch(directory: &Path) -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let events = inotify::init(flags)?;
        inotify::add_watch(&events, directory, inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO)?;
        // SAFETY: `OwnedFd` answers the same open descriptor for as long as it lives, and the `AsyncFd`
        // owns it from here on.
        #[allow(unsafe_code)]
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
        Ok(Self(events.map_err(io::Error::from)?))
    }

    /// Waits until there is a file at `path`, which is in the directory. It does not wait for one that is there already.
    ///
    /// # Errors
    /// The path cannot be examined.
    pub async fn until(&self, path: &Path) -> io::Result<()> {
        let mut events = [0; EVENTS];
        while !path.try_exists()? {
            let read = self.0.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut events)?));
            read.await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_appears_is_told_and_what_is_there_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wanted");
        let appearance = Appearance::watch(directory.path()).unwrap();
        let appears = async {
            std::fs::write(directory.path().join("other"), "").unwrap();
            tokio::task::yield_now().await;
            std::fs::write(&path, "").unwrap();
        };
        let both = async { tokio::join!(appearance.until(&path), appears).0 };
        tokio::time::timeout(Duration::from_secs(10), both).await.unwrap().unwrap();
        appearance.until(&path).await.unwrap();
        assert!(Appearance::watch(&path.join("missing")).is_err());
    }
}
