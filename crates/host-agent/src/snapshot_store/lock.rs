//! A lock on a file that is waited for with a bound, and without polling.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt,
    thread,
    time::Duration,
};

use camino::Utf8Path;
use tokio::sync::oneshot;

/// Held for as long as it lives: by this process only, since nothing that it starts inherits the file.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

fn open(path: &Utf8Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// The lock, if nobody has it.
pub(super) fn try_exclusive(path: &Utf8Path) -> io::Result<Option<Lock>> {
    let file = open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Lock { _file: file })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The lock, as soon as nobody else has it; none when the bound runs out before.
pub(super) async fn exclusive(path: &Utf8Path, bound: Duration) -> io::Result<Option<Lock>> {
    if let Some(lock) = try_exclusive(path)? {
        return Ok(Some(lock));
    }
    let file = open(path)?;
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: it may wait for longer than we do, and then must hold up neither the runtime's
    // threads nor the end of the process. Nobody receives its lock then, so it is released at once.
    thread::Builder::new().name("lock".to_owned()).spawn(move || {
        let locked = loop {
            match file.lock() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => break outcome,
            }
        };
        // A receiver that is gone drops the file, and with it the lock.
        drop(sender.send(locked.map(|()| Lock { _file: file })));
    })?;
    match tokio::time::timeout(bound, receiver).await {
        Ok(Ok(locked)) => locked.map(Some),
        Ok(Err(_)) => Err(io::Error::other("the thread that waited for the lock is gone")),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use camino::Utf8PathBuf;

    use super::*;

    #[tokio::test]
    async fn the_second_waits_for_the_first_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("lock")).unwrap();
        let first = exclusive(&path, Duration::from_secs(5)).await.unwrap().unwrap();
        assert!(try_exclusive(&path).unwrap().is_none());
        assert!(exclusive(&path, Duration::from_millis(20)).await.unwrap().is_none());
        let second = tokio::spawn({
            let path = path.clone();
            async move { exclusive(&path, Duration::from_secs(30)).await }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        assert!(second.await.unwrap().unwrap().is_some());
        // What gave up waiting holds nothing.
        assert!(exclusive(&path, Duration::from_secs(30)).await.unwrap().is_some());
    }
}
