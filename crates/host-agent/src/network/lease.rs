//! The right to use a number.
//!
//! ```text
//!                  ┌ the lock on /run/wrenn/slots/N ┐   ┌ the pool's list ┐
//!  taken           │ ours; the VMM inherits it      │   │ N               │
//!  adopted         │ the VMM's alone, until it ends │   │ N               │
//!  nobody's        │ free                           │   │                 │
//!                  └────────────────────────────────┘   └─────────────────┘
//! ```
//!
//! The lock says to all stacks of the machine that a number is in use, and it lives as long as the VMM. An
//! agent that takes over a slot from one that died has no part of that lock. So the numbers that a pool uses
//! are in a list as well: the moment in which a VMM has ended and its slot is not dismantled is no moment
//! in which the pool could give the number to another sandbox.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use wrenn_host_linux::lock::FileLock;
use wrenn_types::InstanceId;

use super::{addresses::SlotNumber, error::SlotError};

/// The numbers that one pool uses.
#[derive(Debug, Default)]
pub(super) struct Leases {
    used: Mutex<BTreeSet<SlotNumber>>,
}

impl Leases {
    fn used(&self) -> MutexGuard<'_, BTreeSet<SlotNumber>> {
        // Every change of it is one insertion or one removal.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first number that is free, beginning with `from`.
    pub(super) fn take(self: &Arc<Self>, from: SlotNumber) -> Result<Lease, SlotError> {
        let mut number = from;
        loop {
            let mut used = self.used();
            if !used.contains(&number) {
                let acquired = FileLock::try_acquire(number.lease().as_std_path());
                if let Some(lock) = acquired.map_err(|source| SlotError::Lease { number, source })? {
                    used.insert(number);
                    return Ok(Lease { number, lock: lock.into(), pool: Some(Arc::clone(self)) });
                }
            }
            number = number.next();
            if number == from {
                return Err(SlotError::Exhausted);
            }
        }
    }

    /// Takes over a number of `instance` whose VMM holds the lock.
    ///
    /// Where the VMM has ended in the meantime the lock is taken, and the slot is there to be released.
    pub(super) fn adopt(
        self: &Arc<Self>,
        number: SlotNumber,
        instance: &InstanceId,
    ) -> Result<Lease, SlotError> {
        let path = number.lease();
        let failed = |source| SlotError::Lease { number, source };
        let mut used = self.used();
        if used.contains(&number) {
            return Err(SlotError::InUse(number));
        }
        match fs::read_to_string(&path) {
            Ok(owner) if owner == instance.as_str() => {}
            Ok(_) => return Err(SlotError::NotOurs(number)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(SlotError::NotOurs(number)),
            Err(error) => return Err(failed(error)),
        }
        let lock = OnceLock::new();
        if let Some(free) = FileLock::try_acquire(path.as_std_path()).map_err(failed)? {
            let _ = lock.set(free);
        }
        used.insert(number);
        Ok(Lease { number, lock, pool: Some(Arc::clone(self)) })
    }
}

/// The right to use one number. When it is dropped, whoever locks the number next has it.
#[derive(Debug)]
pub(super) struct Lease {
    number: SlotNumber,
    /// Empty as long as the VMM alone holds the lock.
    lock: OnceLock<FileLock>,
    /// Whose list it is in; none for what a collection has found.
    pool: Option<Arc<Leases>>,
}

impl Lease {
    /// What a collection has found, and locked.
    pub(super) fn found(number: SlotNumber, lock: FileLock) -> Self {
        Self { number, lock: lock.into(), pool: None }
    }

    /// The number.
    pub(super) fn number(&self) -> SlotNumber {
        self.number
    }

    /// The lock. An adopted one is taken now if the VMM has ended.
    ///
    /// # Errors
    /// [`SlotError::Held`] if a process has it that is not this one.
    pub(super) fn secure(&self) -> Result<&FileLock, SlotError> {
        if let Some(lock) = self.lock.get() {
            return Ok(lock);
        }
        let acquired = FileLock::try_acquire(self.number.lease().as_std_path()).map_err(self.failed())?;
        let lock = acquired.ok_or(SlotError::Held(self.number))?;
        Ok(self.lock.get_or_init(|| lock))
    }

    /// Another descriptor of the lock, for a VMM to inherit.
    pub(super) fn share(&self) -> Result<OwnedFd, SlotError> {
        self.secure()?.share().map_err(self.failed())
    }

    /// Says whose the number is.
    pub(super) fn write(&mut self, owner: &InstanceId) -> Result<(), SlotError> {
        let failed = self.failed();
        self.secure()?;
        self.lock.get_mut().map_or(Ok(()), |lock| lock.write(owner.as_str())).map_err(failed)
    }

    /// Gives the number back: nothing of the slot is left.
    pub(super) fn remove(mut self) -> Result<(), SlotError> {
        self.secure()?;
        let failed = self.failed();
        self.lock.take().map_or(Ok(()), FileLock::remove).map_err(failed)
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> SlotError + use<> {
        let number = self.number;
        move |source| SlotError::Lease { number, source }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.used().remove(&self.number);
        }
    }
}
