//! All sandboxes of this host, and the stream of what happens to them.
//!
//! The registry owns the map from id to [`Handle`] and nothing else: what happens to a sandbox is its
//! driver's. Ended sandboxes stay known, the most recent [`ENDED_KEPT`] of them, so that a control plane
//! that was away learns how they ended.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::broadcast;
use tokio_util::task::TaskTracker;
use wrenn_types::{EndReason, SandboxId};

use crate::{
    config::OnStop,
    sandbox::{
        Handle, SandboxSpec, Stage,
        driver::{self, Beginning},
        host::Host,
        queue::{self, Admission, Denied},
    },
};

/// How many ended sandboxes stay known.
pub const ENDED_KEPT: usize = 1024;
/// How far a watcher may fall behind before it has to begin anew.
const EVENTS_KEPT: usize = 4096;

/// All sandboxes of this host.
#[derive(Debug)]
pub struct Registry {
    host: Arc<Host>,
    drivers: TaskTracker,
    sandboxes: Arc<Mutex<Sandboxes>>,
    events: broadcast::Sender<SandboxId>,
}

#[derive(Debug, Default)]
struct Sandboxes {
    known: BTreeMap<SandboxId, Handle>,
    /// Ended ones, the oldest first.
    ended: VecDeque<SandboxId>,
    /// Those of which nobody can say what they are, and why. They have no driver.
    unreadable: BTreeMap<SandboxId, String>,
    /// Set at the stop of the agent: nothing new is begun.
    closed: bool,
}

/// Why a create was not begun.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The policy denies it.
    #[error(transparent)]
    Denied(Denied),
    /// The agent is stopping.
    #[error("the host agent is stopping")]
    Closed,
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new(host: Arc<Host>) -> Self {
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        Self { host, drivers: TaskTracker::new(), sandboxes: Arc::default(), events }
    }

    /// What every sandbox here is made with.
    #[must_use]
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    fn lock(&self) -> MutexGuard<'_, Sandboxes> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a sandbox, or finds the one that an earlier create of the same generation has begun.
    ///
    /// # Errors
    /// When the id is taken by one of another generation, or the agent is stopping.
    pub fn create(&self, spec: SandboxSpec) -> Result<Handle, CreateError> {
        let mut sandboxes = self.lock();
        if sandboxes.closed {
            return Err(CreateError::Closed);
        }
        let id = spec.id.clone();
        let existing = sandboxes.known.get(&id);
        let known = existing.map(|handle| (handle.generation(), handle.stage()));
        match queue::admit(known, spec.generation).map_err(CreateError::Denied)? {
            Admission::Join => {
                if let Some(handle) = existing {
                    return Ok(handle.clone());
                }
            }
            Admission::Replace => sandboxes.ended.retain(|ended| *ended != id),
            Admission::Start => {}
        }
        Ok(self.begin(&mut sandboxes, spec, Beginning::Create))
    }

    /// Takes a sandbox over that an earlier agent began.
    pub fn take_over(&self, spec: SandboxSpec, beginning: Beginning) -> Handle {
        self.begin(&mut self.lock(), spec, beginning)
    }

    /// Keeps in mind what is left as it is, because its record cannot be read: it is not gone.
    pub fn leave_unreadable(&self, unreadable: BTreeMap<SandboxId, String>) {
        self.lock().unreadable = unreadable;
    }

    /// The sandboxes that are left as they are, and why the record of each cannot be read.
    #[must_use]
    pub fn unreadable(&self) -> BTreeMap<SandboxId, String> {
        self.lock().unreadable.clone()
    }

    fn begin(&self, sandboxes: &mut Sandboxes, spec: SandboxSpec, beginning: Beginning) -> Handle {
        let id = spec.id.clone();
        let events = self.events.clone();
        let published = {
            let sandboxes = Arc::clone(&self.sandboxes);
            move |handle: &Handle| {
                let id = handle.spec().id.clone();
                if handle.stage() == Stage::Stopped {
                    let mut sandboxes = sandboxes.lock().unwrap_or_else(PoisonError::into_inner);
                    sandboxes.ended.push_back(id.clone());
                    if sandboxes.ended.len() > ENDED_KEPT
                        && let Some(oldest) = sandboxes.ended.pop_front()
                    {
                        sandboxes.known.remove(&oldest);
                    }
                }
                // Nobody watching is fine: who comes later begins with all that is known.
                let _ = events.send(id);
            }
        };
        let handle = driver::start(Arc::clone(&self.host), spec, beginning, &self.drivers, published);
        sandboxes.known.insert(id, handle.clone());
        handle
    }

    /// The sandbox of this id, ended ones included.
    #[must_use]
    pub fn get(&self, id: &SandboxId) -> Option<Handle> {
        self.lock().known.get(id).cloned()
    }

    /// Every sandbox that is known, ended ones included, by id.
    #[must_use]
    pub fn all(&self) -> Vec<Handle> {
        self.lock().known.values().cloned().collect()
    }

    /// The ids of sandboxes of which something new is published, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<SandboxId> {
        self.events.subscribe()
    }

    /// Asks for the end of a sandbox and waits until nothing of it is left. One that is not known is gone.
    ///
    /// # Errors
    /// When the asker's generation is older.
    pub async fn destroy(&self, id: &SandboxId, generation: Option<u64>) -> Result<(), Denied> {
        let Some(handle) = self.get(id) else { return Ok(()) };
        handle.destroy(EndReason::Requested, generation)?;
        handle.stopped().await;
        Ok(())
    }

    /// Ends every sandbox that has a machine, or lets go of all as they are, and waits until that is done. What is
    /// paused stays. Nothing is begun afterwards.
    pub async fn close(&self, on_stop: OnStop) {
        self.lock().closed = true;
        for handle in self.all() {
            match on_stop {
                // The agent's own request has no generation, so that it cannot be denied.
                OnStop::Destroy => drop(handle.destroy(EndReason::AgentStopped, None)),
                OnStop::Leave => handle.leave(),
            }
        }
        self.drivers.close();
        self.drivers.wait().await;
    }
}
