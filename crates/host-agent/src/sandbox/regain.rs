//! Control over a machine that an earlier agent started, and that lives.
//!
//! Whatever goes wrong leaves it as it is: it goes on, and can be tried again.

use std::{io, sync::Arc, time::Duration};

use tokio::time::Instant;
use wrenn_vmm::{AdoptedMachine, VmmError};

use super::{
    bounds,
    bring_up::Up,
    capture,
    host::Host,
    machine::{self, Machine, Maker, remove_run_dir},
    record::{Ledger, Record},
    within::{Overdue, within},
};
use crate::{
    network::{Policy, PolicyError, SlotError, addresses::SlotNumber},
    snapshot_store::SnapshotStoreError,
};

/// How long after it failed it is tried again.
pub const REGAIN_AGAIN: Duration = Duration::from_secs(2);

/// Why a machine is not under control.
#[derive(Debug, thiserror::Error)]
pub enum RegainError {
    /// It is not there, or does not answer.
    #[error("its machine cannot be controlled")]
    Machine(#[source] VmmError),
    /// The record names none, or a network slot that cannot be.
    #[error("its record names no machine with a network slot")]
    Nameless,
    /// What it may reach cannot be told to the network.
    #[error("its network policy cannot be")]
    Policy(#[source] PolicyError),
    /// The slot is not as it should be.
    #[error("its network slot cannot be taken over")]
    Slot(#[source] SlotError),
    /// The base cannot be read.
    #[error("what its memory stands on cannot be used")]
    Base(#[source] SnapshotStoreError),
    /// There is no such base.
    #[error("what its memory stands on is not here")]
    NoBase,
    /// The base was not read in time.
    #[error("what its memory stands on was not found within {bound:?}")]
    Timeout {
        /// How long it may take.
        bound: Duration,
    },
}

impl RegainError {
    /// Whether there is no process any more: then there is nothing to try again.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Machine(VmmError::NotThere { .. }) | Self::Nameless)
    }
}

/// Takes a machine over: control, network, exit notice. One that stood still is let run.
///
/// # Errors
/// It is as it was then.
pub async fn regain(host: &Arc<Host>, ledger: &Arc<Ledger>) -> Result<Up, RegainError> {
    let record = ledger.record();
    let machine = record.machine.as_ref().ok_or(RegainError::Nameless)?;
    let number = SlotNumber::new(machine.slot).map_err(|_| RegainError::Nameless)?;
    let policy = Policy::resolve(&record.settings.network, &host.dns_servers).map_err(RegainError::Policy)?;
    let (snapshots, key) = (host.snapshots.clone(), record.base.clone());
    let bound = bounds::find(record.shape.memory);
    // Not verified: whatever is known of it, the machine stands on it already, and is to be reached.
    let base = within(bound, move || snapshots.find_base(&key)).await;
    let base = base.map_err(|Overdue(bound)| RegainError::Timeout { bound })?.map_err(RegainError::Base)?;
    let base = base.ok_or(RegainError::NoBase)?;
    let run_dir = host.run_dir(&machine.name);
    let wanted = AdoptedMachine {
        name: Host::machine_name(&host.instance, &record.id, &machine.name),
        run_dir: run_dir.clone(),
        has_disk: true,
        memory: Some(base.memory.clone()),
        pid_hint: None,
    };
    let vm = host.vmm.adopt(wanted).await.map_err(RegainError::Machine)?;
    let slot = match host.slots.adopt(number, &policy).await {
        Ok(slot) => slot,
        Err(error) => {
            vm.release().await;
            return Err(RegainError::Slot(error));
        }
    };
    let machine = Machine {
        id: record.id.clone(),
        name: machine.name.clone(),
        vm,
        slot,
        run_dir,
        // It may be older than the agent.
        maker: machine.maker.clone().unwrap_or_else(|| {
            let vmm = base.vmm.with_processor_of(host.vmm.identity());
            Maker { vmm, guest: base.guest }
        }),
        base_memory: base.memory,
        base_disk: base.disk.path,
    };
    let mut up = Up {
        machine,
        ledger: Arc::clone(ledger),
        phases: Vec::new(),
        idle: None,
        stream_after: Instant::now(),
        go_on_at: None,
    };
    if record.capture.is_some() {
        // What does not go on at once is told so again by its driver: it is no less a sandbox.
        capture::go_on(host, &mut up, &record).await;
    } else if let Err(error) = up.machine.vm.resume().await {
        up.machine.release().await;
        return Err(RegainError::Machine(error));
    }
    Ok(up)
}

/// Ends the machine of a record, if it lives, and removes its directory. Nobody controls it.
///
/// # Errors
/// It is stuck in the kernel, or processes cannot be looked for.
pub async fn end_uncontrolled(host: &Host, record: &Record) -> io::Result<()> {
    let Some(machine) = &record.machine else { return Ok(()) };
    let name = Host::machine_name(&host.instance, &record.id, &machine.name);
    machine::end_marked(&name, |_| false).await?;
    remove_run_dir(&host.run_dir(&machine.name));
    host.close_disk(&machine.name).await;
    host.limits.end(&record.id, &machine.name).await;
    Ok(())
}
