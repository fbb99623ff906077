//! Which sandboxes this process is changing now. The watch leaves them alone: who changes one writes what became
//! of it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use wrenn_types::SandboxId;

use super::Core;

/// The sandboxes, each with how many are at it. Owned by the guards; the watch only looks.
#[derive(Debug, Default)]
pub(super) struct BusySandboxes(Mutex<HashMap<SandboxId, usize>>);

impl BusySandboxes {
    pub(super) fn contains(&self, id: &SandboxId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(id)
    }

    pub(super) fn now(&self) -> HashSet<SandboxId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

/// Keeps the watch away from a sandbox for as long as it lives.
#[derive(Debug)]
pub(super) struct Busy {
    core: Arc<Core>,
    id: SandboxId,
}

impl Busy {
    pub(super) fn begin(core: &Arc<Core>, id: SandboxId) -> Self {
        let mut busy = core.busy.0.lock().unwrap_or_else(PoisonError::into_inner);
        *busy.entry(id.clone()).or_default() += 1;
        drop(busy);
        Self { core: Arc::clone(core), id }
    }

    pub(super) fn id(&self) -> &SandboxId {
        &self.id
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut busy = self.core.busy.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = busy.get_mut(&self.id) {
            *number -= 1;
            if *number == 0 {
                busy.remove(&self.id);
            }
        }
    }
}
