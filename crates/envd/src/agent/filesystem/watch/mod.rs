//! Watching directories.
//!
//! ```text
//!  kernel ──notes──► follower ──changes──► queue ──┬──► stream      WatchDir
//!                    │ tree: what a note means     └──► take_all    GetWatcherEvents
//!                    └ watches new directories
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`tree`] | what the kernel's notes mean; pure |
//! | [`inotify`] | the kernel's side |
//! | [`follower`] | a watched tree: takes notes, watches what comes to be in it |
//! | [`queue`] | events that wait for their client, within limits |
//! | [`stream`] | what the client of a `WatchDir` sees |
//!
//! **Each watch has an inotify descriptor of its own.** A flood in one directory then costs only those who watch it, ending
//! a watch is closing a descriptor, and a directory that two clients watch needs no account of whose it is. The
//! kernel's default of 128 descriptors per user is raised in a guest ([`raise_kernel_limits`]).
//!
//! **What happens is told once, in order, or its loss is.** The kernel's queue and ours are both limited. A stream
//! that lost events ends with `resource_exhausted`. A polled watcher answers first the events up to the loss, then, once,
//! `resource_exhausted`, and then goes on with what happens from there on.
//!
//! | on disk | told |
//! |---|---|
//! | made, or moved in | `CREATE` |
//! | written, truncated | `WRITE` |
//! | mode, owner, times, links, attributes changed | `CHMOD` |
//! | removed | `REMOVE` |
//! | moved away, wherever to | `RENAME` of the old name |
//! | a directory came into a watched tree, from wherever | `CREATE`, and what it held already as if it were made now: `CREATE`, and `WRITE` of a file with content |
//! | the watched directory itself was removed or moved | `REMOVE` or `RENAME` of `.`; a stream ends |
//!
//! **A request sees what was done before it.** `GetWatcherEvents` reads the kernel's notes itself before it answers, and
//! the kernel writes them before the call that they are about returns.

mod follower;
mod inotify;
mod queue;
mod stream;
mod tree;

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::io::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::Instant,
};
use wrenn_guest_linux::readiness::register;
use wrenn_proto::filesystem::{EventType, FilesystemEvent};

pub(super) use self::{
    follower::{FollowError, Loss},
    stream::events,
};
use self::{
    follower::{Follower, News, Order},
    queue::{Budget, Event, Queue},
    tree::{Change, Kind},
};
use super::entry;
use crate::{
    agent::{
        state::Place,
        threads::{RunError, Threads},
        users::Accounts,
    },
    console::say,
};

/// How many directories may be watched at once, by streams and polled watchers together.
const MAXIMUM_WATCHES: usize = 512;
/// A polled watcher that nobody asked for this long makes room for another when there is none.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);
/// How many threads may be busy with watches; a file system that does not answer holds one of them for each watch on it.
pub(crate) const THREADS: usize = 12;
/// What the kernel allows, as it is set in a guest: descriptors per user, and notes that wait in each.
const KERNEL_LIMITS: [(&str, u32); 2] =
    [("/proc/sys/fs/inotify/max_user_instances", 1024), ("/proc/sys/fs/inotify/max_queued_events", 131_072)];

/// Why there is no watch. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("path {0} not found")]
    NotFound(String),
    #[error("path {0} not a directory")]
    NotADirectory(String),
    #[error("cannot watch path on network filesystem: {0}")]
    Network(String),
    #[error("watcher with id {0} not found")]
    NoWatcher(String),
    #[error("too many watchers")]
    TooMany,
    #[error("too many watchers wait for their file systems")]
    Busy,
    #[error("cannot watch {path}")]
    Limit {
        path: String,
        #[source]
        source: FollowError,
    },
    #[error("cannot watch {path}")]
    System {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Lost(Loss),
    #[error("the work was interrupted")]
    Interrupted,
}

/// What a client wants to watch.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) path: String,
    pub(super) recursive: bool,
    pub(super) include_entry: bool,
    pub(super) allow_network_mounts: bool,
}

/// A watch. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    task: AbortHandle,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    include_entry: bool,
    /// Whoever holds it reads the kernel's notes.
    follower: Arc<tokio::sync::Mutex<Follower>>,
    queue: Queue,
    /// The follower has another descriptor to wait on.
    renewed: Notify,
    threads: Threads,
}

/// All watches of the agent, and the polled ones by their ids.
#[derive(Debug)]
pub(super) struct Watchers {
    polled: Mutex<HashMap<String, Polled>>,
    room: Arc<Semaphore>,
    threads: Threads,
    budget: Arc<Budget>,
}

#[derive(Debug)]
struct Polled {
    watch: Arc<Watch>,
    asked: Instant,
}

impl Default for Watchers {
    fn default() -> Self {
        Self {
            polled: Mutex::default(),
            room: Arc::new(Semaphore::new(MAXIMUM_WATCHES)),
            threads: Threads::new(THREADS),
            budget: Arc::default(),
        }
    }
}

impl Watchers {
    fn polled(&self) -> MutexGuard<'_, HashMap<String, Polled>> {
        self.polled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to watch.
    pub(super) async fn watch(&self, wanted: Wanted) -> Result<Watch, WatchError> {
        let room = self.room()?;
        let order = Order {
            root: PathBuf::from(&wanted.path),
            recursive: wanted.recursive,
            network: wanted.allow_network_mounts,
        };
        let follower = self.threads.run(move || Follower::open(order)).await?;
        let follower = follower.map_err(|error| refusal(wanted.path.clone(), error))?;
        let shared = Arc::new(Shared {
            root: PathBuf::from(&wanted.path),
            include_entry: wanted.include_entry,
            follower: Arc::new(tokio::sync::Mutex::new(follower)),
            queue: Queue::new(Arc::clone(&self.budget), queue::MAXIMUM_EVENTS),
            renewed: Notify::new(),
            threads: self.threads.clone(),
        });
        let task = tokio::spawn(Arc::clone(&shared).keep_pumping()).abort_handle();
        Ok(Watch { shared, task, _room: room })
    }

    fn room(&self) -> Result<OwnedSemaphorePermit, WatchError> {
        if let Ok(room) = Arc::clone(&self.room).try_acquire_owned() {
            return Ok(room);
        }
        let mut polled = self.polled();
        let oldest = polled.iter().min_by_key(|(_, polled)| polled.asked);
        let abandoned = oldest.filter(|(_, polled)| polled.asked.elapsed() >= ABANDONED_AFTER);
        if let Some(id) = abandoned.map(|(id, _)| id.clone()) {
            polled.remove(&id);
        }
        Arc::clone(&self.room).try_acquire_owned().map_err(|_| WatchError::TooMany)
    }

    /// Begins to watch for a client that will ask for the events. Answers the id to ask with.
    pub(super) async fn create(&self, wanted: Wanted) -> Result<String, WatchError> {
        let watch = Arc::new(self.watch(wanted).await?);
        let mut bytes = [0_u8; 12];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty()).map_err(|error| {
            WatchError::System { path: "for randomness".to_owned(), source: error.into() }
        })?;
        let id = bytes.iter().fold("w".to_owned(), |id, byte| format!("{id}{byte:02x}"));
        self.polled().insert(id.clone(), Polled { watch, asked: Instant::now() });
        Ok(id)
    }

    /// What happened since the last time, all that was done before now included.
    pub(super) async fn events(&self, id: &str) -> Result<Vec<FilesystemEvent>, WatchError> {
        let watch = {
            let mut polled = self.polled();
            let polled = polled.get_mut(id).ok_or_else(|| WatchError::NoWatcher(id.to_owned()))?;
            polled.asked = Instant::now();
            Arc::clone(&polled.watch)
        };
        watch.shared.pump().await?;
        let events = watch.shared.queue.take_all().map_err(WatchError::Lost)?;
        Ok(events.into_iter().map(FilesystemEvent::from).collect())
    }

    /// Ends a polled watcher.
    pub(super) fn remove(&self, id: &str) -> Result<(), WatchError> {
        let removed = self.polled().remove(id);
        removed.map(drop).ok_or_else(|| WatchError::NoWatcher(id.to_owned()))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    /// Takes notes whenever there are some: the kernel keeps only so many, and new directories are to be watched soon.
    async fn keep_pumping(self: Arc<Self>) {
        loop {
            let (descriptor, generation) = {
                let follower = self.follower.lock().await;
                (follower.descriptor(), follower.generation())
            };
            let descriptor = match descriptor.and_then(|it| register(it, Interest::READABLE)) {
                Ok(descriptor) => descriptor,
                Err(error) => {
                    say(format_args!("cannot wait for file system events: {error}"));
                    return self.queue.lose(Loss::Kernel);
                }
            };
            if !self.pump_while(&descriptor, generation).await {
                return;
            }
        }
    }

    /// False at the end of the watch.
    async fn pump_while(
        self: &Arc<Self>,
        descriptor: &AsyncFd<std::os::fd::OwnedFd>,
        generation: u64,
    ) -> bool {
        loop {
            tokio::select! {
                ready = descriptor.readable() => match ready {
                    // Cleared before reading, so that what comes while we read wakes us again.
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => return false,
                },
                () = self.renewed.notified() => {}
            }
            // What finds no thread is still there to be taken.
            while self.pump().await != Ok(false) {}
            let follower = self.follower.lock().await;
            if follower.has_ended() {
                return false;
            }
            if follower.generation() != generation {
                return true;
            }
        }
    }

    /// Puts everything that happened until now into the queue. Whether more happened meanwhile.
    async fn pump(self: &Arc<Self>) -> Result<bool, RunError> {
        let mut follower = Arc::clone(&self.follower).lock_owned().await;
        if !follower.has_notes() {
            return Ok(false);
        }
        let shared = Arc::clone(self);
        let work = move || {
            let generation = follower.generation();
            let mut accounts = None;
            follower.pump(&mut |news| match news {
                News::Change(change) => shared.queue.push(shared.event(&change, &mut accounts)),
                News::Lost(loss) => shared.queue.lose(loss),
                News::Ended => shared.queue.end(),
            });
            if follower.generation() != generation || follower.has_ended() {
                shared.renewed.notify_one();
            }
            follower.has_notes()
        };
        match self.threads.run(work).await {
            Err(RunError::Interrupted) => {
                // It does not panic; were it to, events would be missing.
                self.queue.lose(Loss::Kernel);
                Ok(false)
            }
            done => done,
        }
    }

    fn event(&self, change: &Change, accounts: &mut Option<Accounts>) -> Event {
        let kind = match change.kind {
            Kind::Create => EventType::EVENT_TYPE_CREATE,
            Kind::Write => EventType::EVENT_TYPE_WRITE,
            Kind::Remove => EventType::EVENT_TYPE_REMOVE,
            Kind::Rename => EventType::EVENT_TYPE_RENAME,
            Kind::Chmod => EventType::EVENT_TYPE_CHMOD,
        };
        // What went away may have been replaced: its entry would be another's.
        let entry = match change.kind {
            Kind::Create | Kind::Write | Kind::Chmod if self.include_entry => {
                let accounts = accounts.get_or_insert_with(|| Accounts::load().unwrap_or_default());
                let path = match change.path.to_str() {
                    Some(".") => self.root.clone(),
                    _ => self.root.join(&change.path),
                };
                entry::describe(&path, accounts).ok().map(Box::new)
            }
            _ => None,
        };
        Event { name: change.path.to_string_lossy().into(), kind, entry }
    }
}

impl From<RunError> for WatchError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Busy => Self::Busy,
            RunError::Interrupted => Self::Interrupted,
        }
    }
}

fn refusal(path: String, error: FollowError) -> WatchError {
    match error {
        FollowError::Network => WatchError::Network(path),
        FollowError::System(Errno::NOENT) => WatchError::NotFound(path),
        FollowError::System(Errno::NOTDIR) => WatchError::NotADirectory(path),
        FollowError::System(error) => WatchError::System { path, source: error.into() },
        FollowError::Instances | FollowError::Directories | FollowError::TooFast => {
            WatchError::Limit { path, source: error }
        }
    }
}

/// Makes room in the kernel for as many watches as there may be. A guest is ours to set up; another machine is not.
pub(super) fn raise_kernel_limits(place: Place) {
    if place != Place::Guest {
        return;
    }
    for (path, wanted) in KERNEL_LIMITS {
        let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u32>().ok());
        if now.is_none_or(|now| now < wanted)
            && let Err(error) = std::fs::write(path, wanted.to_string())
        {
            say(format_args!("cannot set {path}: {error}"));
        }
    }
}
