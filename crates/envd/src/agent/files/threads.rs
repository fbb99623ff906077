//! The threads on which files are opened, read and written.
//!
//! They are some of those that may block, and not more: a path can lead to a file system that does not answer, and
//! whoever asks for enough of such files would keep every program from being started. Work that finds none free waits
//! for [`PATIENCE`], and is then refused.

use std::{io, time::Duration};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    task::{JoinHandle, spawn_blocking},
};

/// How many there are.
const THREADS: usize = 16;
/// How long work waits for others to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// As the threads themselves, they are the process's, and this is their owner.
static FREE: Semaphore = Semaphore::const_new(THREADS);

/// There was no thread in time.
#[derive(Debug, thiserror::Error)]
#[error("too many files are being read and written")]
pub(super) struct Busy;

impl From<Busy> for io::Error {
    fn from(busy: Busy) -> Self {
        Self::new(io::ErrorKind::TimedOut, busy)
    }
}

/// Does something on one of the threads, which it keeps to its end, also when nobody waits for it any more.
pub(super) fn on_thread<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> JoinHandle<Result<T, E>>
where
    T: Send + 'static,
    E: From<Busy> + Send + 'static,
{
    match FREE.try_acquire() {
        Ok(permit) => begin(permit, work),
        Err(_) => tokio::spawn(async move {
            // It is never closed, and so what fails is the wait.
            let permit = tokio::time::timeout(PATIENCE, FREE.acquire()).await.ok().and_then(Result::ok);
            begin(permit.ok_or(Busy)?, work).await.unwrap_or_else(|_| Err(Busy.into()))
        }),
    }
}

fn begin<T, E>(
    permit: SemaphorePermit<'static>,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> JoinHandle<Result<T, E>>
where
    T: Send + 'static,
    E: Send + 'static,
{
    spawn_blocking(move || {
        let _permit = permit;
        work()
    })
}
