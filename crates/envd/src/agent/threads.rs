//! Threads for what may not answer, and where what nobody wants any more is dropped.
//!
//! A path can lead to a file system that does not answer: one behind a network, one that a program serves which was
//! stopped, one that is frozen. Who opens, reads or removes a file there waits and cannot be stopped, and so does who only
//! closes one. The thread that serves everything must never wait like that, so all of it happens elsewhere. Each kind of
//! work has a number of threads ([`Threads`]) that others cannot use up; the sum of them is what the runtime may have.
//!
//! ```text
//!   run ──► is a thread free? ── yes ───────────► begun ──► done ──┬─► taken by who waits for the job
//!                  │ no                             ▲              └─► nobody waits: dropped on its thread
//!                  └──► waiting ── one is, in time ─┘
//!                          ├────── none is: busy ──┬─► the work is dropped aside, not done
//!                          └────── nobody waits ───┘
//! ```
//!
//! What is dropped *aside* ([`drop_aside`], [`Aside`]) is dropped on threads that are there for nothing else and are none
//! of the runtime's. There are only so many of them: where all of them wait, what comes next stays as it is until one is
//! free.

use std::{
    collections::VecDeque,
    future::Future,
    io, mem,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::spawn_blocking,
    time::timeout,
};

/// How long work waits for other work to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many threads may wait to drop something.
const DROPPING_THREADS: usize = 16;

/// Why something was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RunError {
    #[error("no thread was free in time")]
    Busy,
    #[error("the work was interrupted")]
    Interrupted,
}

impl From<RunError> for io::Error {
    fn from(error: RunError) -> Self {
        Self::other(error)
    }
}

/// So many of the runtime's threads, for one kind of work.
#[derive(Debug, Clone)]
pub(crate) struct Threads {
    free: Arc<Semaphore>,
    patience: Duration,
}

impl Threads {
    /// The runtime must have this many for each kind.
    pub(crate) fn new(count: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(count)), patience: PATIENCE }
    }

    /// Does something on one of the threads. It begins at once if one is free, and keeps its thread to its end, also when
    /// nobody waits for it any more. To be called on the runtime.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Job<T> {
        let (mut done, outcome) = oneshot::channel();
        match Arc::clone(&self.free).try_acquire_owned() {
            Ok(permit) => begin(permit, work, done),
            Err(_) => {
                let (work, free, patience) = (Aside::new(work), Arc::clone(&self.free), self.patience);
                tokio::spawn(async move {
                    let permit = tokio::select! {
                        permit = timeout(patience, free.acquire_owned()) => permit,
                        () = done.closed() => return,
                    };
                    match (permit, work.into_inner()) {
                        (Ok(Ok(permit)), Ok(work)) => begin(permit, work, done),
                        (_, work) => {
                            drop_aside(work);
                            let _ = done.send(Err(RunError::Busy));
                        }
                    }
                });
            }
        }
        Job(outcome)
    }
}

fn begin<T: Send + 'static>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> T + Send + 'static,
    done: oneshot::Sender<Result<T, RunError>>,
) {
    spawn_blocking(move || {
        // What nobody waits for is dropped here, before others may use the thread.
        drop(done.send(Ok(work())));
        drop(permit);
    });
}

/// Work that was handed to a thread: a future of what it makes.
#[derive(Debug)]
pub(crate) struct Job<T: Send + 'static>(oneshot::Receiver<Result<T, RunError>>);

impl<T: Send + 'static> Future for Job<T> {
    type Output = Result<T, RunError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|done| done.unwrap_or(Err(RunError::Interrupted)))
    }
}

impl<T: Send + 'static> Drop for Job<T> {
    fn drop(&mut self) {
        self.0.close();
        // It was done, and nobody had taken it.
        if let Ok(done) = self.0.try_recv() {
            drop_aside(done);
        }
    }
}

/// What is dropped aside, wherever that happens: an open file, or what removes half of one.
#[derive(Debug)]
pub(crate) struct Aside<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Aside<T> {
    pub(crate) fn new(it: T) -> Self {
        Self(Some(it))
    }

    /// It is there for as long as this is.
    pub(crate) fn get(&self) -> Result<&T, RunError> {
        self.0.as_ref().ok_or(RunError::Interrupted)
    }

    pub(crate) fn get_mut(&mut self) -> Result<&mut T, RunError> {
        self.0.as_mut().ok_or(RunError::Interrupted)
    }

    pub(crate) fn into_inner(mut self) -> Result<T, RunError> {
        self.0.take().ok_or(RunError::Interrupted)
    }
}

impl<T: Send + 'static> Drop for Aside<T> {
    fn drop(&mut self) {
        if let Some(it) = self.0.take() {
            drop_aside(it);
        }
    }
}

/// Drops something where it keeps nobody waiting.
pub(crate) fn drop_aside<T: Send + 'static>(it: T) {
    static DROPPER: Dropper = Dropper::new(DROPPING_THREADS);
    if mem::needs_drop::<T>() {
        DROPPER.take(Box::new(it));
    }
}

/// Threads that drop what is put before them. One of them stays when there is nothing left.
#[derive(Debug)]
struct Dropper {
    maximum: usize,
    state: Mutex<Dropping>,
    /// There is something for the one that stayed.
    more: Condvar,
}

struct Dropping {
    queue: VecDeque<Box<dyn Send>>,
    threads: usize,
    /// Whether one of them has nothing to do. It goes on when there is something in the queue.
    idle: bool,
}

impl std::fmt::Debug for Dropping {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { queue, threads, idle } = self;
        write!(formatter, "{} to drop, {threads} threads, idle: {idle}", queue.len())
    }
}

impl Dropper {
    const fn new(maximum: usize) -> Self {
        let state = Dropping { queue: VecDeque::new(), threads: 0, idle: false };
        Self { maximum, state: Mutex::new(state), more: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, Dropping> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&'static self, it: Box<dyn Send>) {
        let mut state = self.state();
        state.queue.push_back(it);
        if state.idle && state.queue.len() == 1 {
            self.more.notify_one();
        } else if state.threads < self.maximum {
            let thread = std::thread::Builder::new().name("envd-aside".to_owned());
            // Where there can be no thread now, it waits for the next one.
            if thread.spawn(|| self.work()).is_ok() {
                state.threads += 1;
            }
        }
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(it) = state.queue.pop_front() {
                drop(state);
                drop(it);
                state = self.state();
            } else if state.idle {
                state.threads -= 1;
                return;
            } else {
                state.idle = true;
                state = self
                    .more
                    .wait_while(state, |state| state.queue.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::{self, Receiver, Sender},
        thread::{self, ThreadId},
    };

    use super::*;

    /// No wait of these tests is longer.
    const LIMIT: Duration = Duration::from_secs(60);

    /// Tells which thread drops it, and then keeps that one until it is let go.
    struct Stuck {
        dropped: Sender<ThreadId>,
        go: Receiver<()>,
    }

    impl Drop for Stuck {
        fn drop(&mut self) {
            let _ = self.dropped.send(thread::current().id());
            let _ = self.go.recv_timeout(LIMIT);
        }
    }

    /// What happens to one [`Stuck`].
    struct Seen {
        dropped: Receiver<ThreadId>,
        go: Sender<()>,
    }

    impl Seen {
        /// Waits until it is being dropped, elsewhere; this thread goes on meanwhile.
        fn check_dropped_elsewhere(self) {
            assert_ne!(self.dropped.recv_timeout(LIMIT).unwrap(), thread::current().id());
            let _ = self.go.send(());
        }
    }

    fn stuck() -> (Stuck, Seen) {
        let ((dropped, seen), (go, wait)) = (mpsc::channel(), mpsc::channel());
        (Stuck { dropped, go: wait }, Seen { dropped: seen, go })
    }

    fn threads(count: usize, patience: Duration) -> Threads {
        Threads { patience, ..Threads::new(count) }
    }

    /// Work that does not end before it is told so. It runs when this returns.
    async fn busy(threads: &Threads) -> (Sender<()>, Job<()>) {
        let ((end, wait), (begun, begins)) = (mpsc::channel(), oneshot::channel());
        let job = threads.run(move || {
            let _ = begun.send(());
            let _ = wait.recv_timeout(LIMIT);
        });
        begins.await.unwrap();
        (end, job)
    }

    #[tokio::test]
    async fn what_finds_no_thread_in_time_is_not_done_and_dropped_elsewhere() {
        let threads = threads(1, Duration::ZERO);
        let (end, job) = busy(&threads).await;
        let (stuck, seen) = stuck();
        assert_eq!(threads.run(move || drop(stuck)).await, Err(RunError::Busy));
        seen.check_dropped_elsewhere();
        end.send(()).unwrap();
        assert_eq!(job.await, Ok(()));
    }

    #[tokio::test]
    async fn what_waits_begins_when_others_end_unless_nobody_waits_for_it() {
        let threads = threads(1, LIMIT);
        let (end, job) = busy(&threads).await;
        let (given_up, waits) = (stuck(), threads.run(|| 7));
        let work = threads.run(move || drop(given_up.0));
        // As far as it comes: it waits behind the other.
        assert!(futures::poll!(std::pin::pin!(work)).is_pending());
        tokio::task::yield_now().await;
        given_up.1.check_dropped_elsewhere();
        end.send(()).unwrap();
        assert_eq!((job.await, waits.await), (Ok(()), Ok(7)));
    }

    #[tokio::test]
    async fn what_nobody_takes_is_dropped_elsewhere() {
        let threads = threads(1, LIMIT);
        // It is given up before it is done.
        let ((stuck_before, before), (end, wait)) = (stuck(), mpsc::channel::<()>());
        let job = threads.run(move || {
            let _ = wait.recv_timeout(LIMIT);
            stuck_before
        });
        drop(job);
        end.send(()).unwrap();
        before.check_dropped_elsewhere();
        // And when it is done: the next one has had its turn before.
        let (stuck_after, after) = stuck();
        let job = threads.run(move || stuck_after);
        assert_eq!(threads.run(|| 7).await, Ok(7));
        drop(job);
        after.check_dropped_elsewhere();
    }

    #[tokio::test]
    async fn work_that_panics_is_interrupted() {
        let threads = threads(1, LIMIT);
        let broken = threads.run(|| assert_eq!(1, 2, "this panic is part of a test"));
        assert_eq!(broken.await, Err(RunError::Interrupted));
        assert_eq!(threads.run(|| 7).await, Ok(7), "its thread is free again");
    }

    #[test]
    fn so_many_are_dropped_at_once_and_the_rest_after_them() {
        let dropper: &'static Dropper = Box::leak(Box::new(Dropper::new(3)));
        for _ in 0..3 {
            let (all, seen): (Vec<_>, Vec<_>) = (0..7).map(|_| stuck()).unzip();
            for it in all {
                dropper.take(Box::new(it));
            }
            let mut seen = seen.into_iter();
            let first: Vec<_> = seen.by_ref().take(3).collect();
            let mut by: Vec<_> = first.iter().map(|it| it.dropped.recv_timeout(LIMIT).unwrap()).collect();
            by.dedup();
            assert_eq!(by.len(), 3, "each on its own thread");
            assert_eq!(dropper.state().queue.len(), 4);
            drop(first);
            for it in seen {
                it.check_dropped_elsewhere();
            }
        }
        assert!((1..=3).contains(&dropper.state().threads));
    }

    #[test]
    fn what_is_kept_aside_is_there_until_it_is_taken() {
        let mut aside = Aside::new(vec![1]);
        aside.get_mut().unwrap().push(2);
        assert_eq!(aside.get(), Ok(&vec![1, 2]));
        assert_eq!(aside.into_inner(), Ok(vec![1, 2]));
        let (stuck, seen) = stuck();
        drop(Aside::new(stuck));
        seen.check_dropped_elsewhere();
    }
}
