//! Pause, resume, snapshots and settings of the tests' agent. A paused sandbox keeps its `envd`, which nobody
//! reaches; what is made from a snapshot is a new one.

use std::sync::Arc;

use connectrpc::ConnectError;
use jiff::Timestamp;
use wrenn_proto::hostagent::v1 as wire;

use super::{Faults, Guest, Inner};

type State = wire::SandboxState;

/// One command of a control plane, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Commanded {
    pub(crate) verb: &'static str,
    pub(crate) id: String,
    pub(crate) generation: u64,
}

/// What a host does with a sandbox, from one state through another to a third.
struct Change {
    verb: &'static str,
    id: String,
    generation: u64,
    from: &'static [State],
    through: State,
    /// The state at the end; the one of before when absent.
    to: Option<State>,
    held: fn(&Faults) -> bool,
    fault: fn(&Faults) -> Option<ConnectError>,
}

impl Inner {
    /// Changes a sandbox and tells those who watch.
    pub(super) fn set(&self, id: &str, change: impl FnOnce(&mut wire::Sandbox)) -> Option<wire::Sandbox> {
        let mut guests = self.guests.lock().unwrap();
        let guest = guests.get_mut(id)?;
        change(&mut guest.sandbox);
        let is_paused = guest.sandbox.state == State::SANDBOX_STATE_PAUSED;
        if guest.sandbox.state == State::SANDBOX_STATE_RUNNING {
            guest.sandbox.paused_at_ms = None;
            guest.sandbox.paused_bytes = None;
        } else if is_paused && guest.sandbox.paused_at_ms.is_none() {
            guest.sandbox.paused_at_ms = Some(Timestamp::now().as_millisecond());
            guest.sandbox.paused_bytes = Some(7 << 20);
        }
        // Its fall cuts the tunnels.
        let is_reachable = [State::SANDBOX_STATE_RUNNING, State::SANDBOX_STATE_SNAPSHOTTING]
            .iter()
            .any(|state| guest.sandbox.state == *state);
        guest.alive.send_replace(is_reachable);
        let sandbox = guest.sandbox.clone();
        let _ = self.events.send(sandbox.clone());
        Some(sandbox)
    }

    fn state_of(&self, id: &str) -> Result<(State, u64), ConnectError> {
        let guests = self.guests.lock().unwrap();
        let guest = guests.get(id).ok_or_else(|| ConnectError::not_found("there is no such sandbox here"))?;
        Ok((guest.sandbox.state.as_known().unwrap(), guest.sandbox.generation))
    }

    /// Waits until it is not held any more; nothing if the sandbox is destroyed first, as the real agent waits for
    /// nothing then.
    async fn held_unless_destroyed(&self, id: &str, held: fn(&Faults) -> bool) -> Option<()> {
        let mut alive = self.guests.lock().unwrap().get(id)?.alive.subscribe();
        tokio::select! {
            () = self.held(held) => Some(()),
            () = async { while alive.changed().await.is_ok() {} } => None,
        }
    }

    /// Admits a change, does it however long it is held, and says what the sandbox is then.
    async fn change(self: &Arc<Self>, change: Change) -> Result<wire::Sandbox, ConnectError> {
        let Change { verb, id, generation, from, through, to, held, fault } = change;
        self.commands.lock().unwrap().push(Commanded { verb, id: id.clone(), generation });
        let (before, known) = self.state_of(&id)?;
        if generation < known {
            return Err(ConnectError::failed_precondition(format!("generation {known} is known")));
        }
        let gone = || ConnectError::failed_precondition("the sandbox was destroyed meanwhile");
        if to == Some(before) && verb != "rollback" {
            return self.set(&id, |sandbox| sandbox.generation = generation).ok_or_else(gone);
        }
        if !from.contains(&before) {
            return Err(ConnectError::failed_precondition(format!("the sandbox is {before:?}")));
        }
        self.set(&id, |sandbox| {
            sandbox.generation = generation;
            sandbox.state = through.into();
        })
        .ok_or_else(gone)?;
        // As in the real agent, what has begun goes on when the caller has gone.
        let inner = Arc::clone(self);
        let work = tokio::spawn(async move {
            inner.held_unless_destroyed(&id, held).await.ok_or_else(gone)?;
            let fault = fault(&inner.faults.lock().unwrap());
            let end = if fault.is_some() { before } else { to.unwrap_or(before) };
            let sandbox = inner.set(&id, |sandbox| sandbox.state = end.into()).ok_or_else(gone)?;
            fault.map_or(Ok(sandbox), Err)
        });
        work.await.unwrap()
    }

    pub(super) async fn pause(
        self: &Arc<Self>,
        request: wire::PauseSandboxRequest,
    ) -> Result<wire::Sandbox, ConnectError> {
        self.change(Change {
            verb: if request.disk_only { "pause disk" } else { "pause" },
            id: request.sandbox_id,
            generation: request.generation,
            from: &[State::SANDBOX_STATE_RUNNING],
            through: State::SANDBOX_STATE_PAUSING,
            to: Some(State::SANDBOX_STATE_PAUSED),
            held: |faults| faults.hold_pauses,
            fault: |faults| faults.pause.clone(),
        })
        .await
    }

    pub(super) async fn resume(
        self: &Arc<Self>,
        request: wire::ResumeSandboxRequest,
    ) -> Result<wire::Sandbox, ConnectError> {
        let id = request.sandbox_id.clone();
        let sandbox = self
            .change(Change {
                verb: "resume",
                id: request.sandbox_id,
                generation: request.generation,
                from: &[State::SANDBOX_STATE_PAUSED],
                through: State::SANDBOX_STATE_RESUMING,
                to: Some(State::SANDBOX_STATE_RUNNING),
                held: |faults| faults.hold_resumes,
                fault: |faults| faults.resume.clone(),
            })
            .await?;
        let Some(seconds) = request.timeout_seconds else { return Ok(sandbox) };
        let gone = || ConnectError::aborted("the sandbox was destroyed");
        self.set(&id, |sandbox| sandbox.timeout_seconds = seconds).ok_or_else(gone)
    }

    pub(super) async fn snapshot(
        self: &Arc<Self>,
        request: wire::SnapshotSandboxRequest,
    ) -> Result<wire::Snapshot, ConnectError> {
        let sandbox = self
            .change(Change {
                verb: "snapshot",
                id: request.sandbox_id,
                generation: request.generation,
                from: &[State::SANDBOX_STATE_RUNNING, State::SANDBOX_STATE_PAUSED],
                through: State::SANDBOX_STATE_SNAPSHOTTING,
                to: None,
                held: |faults| faults.hold_snapshots,
                fault: |faults| faults.snapshot.clone(),
            })
            .await?;
        let snapshot = wire::Snapshot {
            snapshot_id: request.snapshot_id.clone(),
            sandbox_id: sandbox.sandbox_id,
            template: sandbox.template,
            vcpus: sandbox.vcpus,
            memory_mib: sandbox.memory_mib,
            disk_mib: sandbox.disk_mib,
            size_bytes: 3 << 20,
            created_at_ms: Timestamp::now().as_millisecond(),
            has_memory: true,
            ..Default::default()
        };
        self.snapshots.lock().unwrap().insert(request.snapshot_id, snapshot.clone());
        Ok(snapshot)
    }

    pub(super) async fn rollback(
        self: &Arc<Self>,
        request: wire::RollbackSandboxRequest,
    ) -> Result<wire::Sandbox, ConnectError> {
        if !self.snapshots.lock().unwrap().contains_key(&request.snapshot_id) {
            return Err(ConnectError::not_found("there is no such snapshot here"));
        }
        let id = request.sandbox_id.clone();
        self.change(Change {
            verb: "rollback",
            id: request.sandbox_id,
            generation: request.generation,
            from: &[State::SANDBOX_STATE_RUNNING, State::SANDBOX_STATE_PAUSED],
            through: State::SANDBOX_STATE_RESUMING,
            to: Some(State::SANDBOX_STATE_RUNNING),
            held: |faults| faults.hold_resumes,
            fault: |faults| faults.rollback.clone(),
        })
        .await?;
        // Whatever ran in it is gone.
        let created = self.guests.lock().unwrap().get(&id).map(|guest| guest.created.clone());
        let created = created.ok_or_else(|| ConnectError::aborted("the sandbox was destroyed"))?;
        let created = wire::CreateSandboxRequest { generation: request.generation, ..created };
        Ok(self.bring_up(created).await)
    }

    pub(super) fn update(&self, request: wire::UpdateSandboxRequest) -> Result<wire::Sandbox, ConnectError> {
        let (id, generation) = (request.sandbox_id.clone(), request.generation);
        self.commands.lock().unwrap().push(Commanded { verb: "update", id: id.clone(), generation });
        self.updates.lock().unwrap().push(request.clone());
        if let Some(fault) = self.faults.lock().unwrap().update.clone() {
            return Err(fault);
        }
        let (_, known) = self.state_of(&id)?;
        if generation < known {
            return Err(ConnectError::failed_precondition(format!("generation {known} is known")));
        }
        let gone = || ConnectError::aborted("the sandbox was destroyed");
        self.set(&id, |sandbox| {
            sandbox.generation = generation;
            sandbox.timeout_seconds = request.timeout_seconds.unwrap_or(sandbox.timeout_seconds);
        })
        .ok_or_else(gone)
    }

    pub(super) fn delete_snapshot(&self, id: &str) -> Result<(), ConnectError> {
        if let Some(fault) = self.faults.lock().unwrap().delete_snapshot.clone() {
            return Err(fault);
        }
        self.snapshots.lock().unwrap().remove(id);
        Ok(())
    }

    /// The template, shape and disk of what is made from a snapshot are the snapshot's.
    pub(super) fn fill_in(&self, request: &mut wire::CreateSandboxRequest) -> Result<(), ConnectError> {
        let Some(id) = &request.snapshot_id else { return Ok(()) };
        let snapshots = self.snapshots.lock().unwrap();
        let missing = || ConnectError::not_found(format!("there is no snapshot {id}"));
        let snapshot = snapshots.get(id).ok_or_else(missing)?;
        request.template = snapshot.template.clone();
        request.vcpus = snapshot.vcpus;
        request.memory_mib = snapshot.memory_mib;
        Ok(())
    }
}

impl super::FakeAgent {
    pub(crate) fn snapshots(&self) -> Vec<String> {
        self.inner.snapshots.lock().unwrap().keys().cloned().collect()
    }

    pub(crate) fn updates(&self) -> Vec<wire::UpdateSandboxRequest> {
        self.inner.updates.lock().unwrap().clone()
    }

    /// How often a control plane has commanded something.
    pub(crate) fn commanded(&self, verb: &str) -> Vec<Commanded> {
        let commands = self.inner.commands.lock().unwrap();
        commands.iter().filter(|commanded| commanded.verb == verb).cloned().collect()
    }

    pub(crate) fn state(&self, id: &str) -> Option<State> {
        self.inner.guests.lock().unwrap().get(id).and_then(|guest: &Guest| guest.sandbox.state.as_known())
    }

    /// The time of a sandbox is over: it is paused, and nobody has asked for it.
    pub(crate) fn pause_by_itself(&self, id: &str) {
        self.inner.set(id, |sandbox| sandbox.state = State::SANDBOX_STATE_PAUSED.into()).unwrap();
    }

    /// The same, and no word about it has reached anybody yet.
    pub(crate) fn pause_unheard(&self, id: &str) {
        let mut guests = self.inner.guests.lock().unwrap();
        let guest = guests.get_mut(id).unwrap();
        guest.sandbox.state = State::SANDBOX_STATE_PAUSED.into();
        guest.sandbox.paused_at_ms = Some(Timestamp::now().as_millisecond());
        guest.alive.send_replace(false);
    }

    /// Its deadline has passed, and it is paused for it or was so before.
    pub(crate) fn meet_deadline(&self, id: &str, at_ms: i64) {
        let meet = |sandbox: &mut wire::Sandbox| {
            sandbox.state = State::SANDBOX_STATE_PAUSED.into();
            sandbox.deadline_met_ms = Some(at_ms);
        };
        self.inner.set(id, meet).unwrap();
    }

    /// Its pause begins, and later it ends, well or with a reason why not.
    pub(crate) fn begin_pause_by_itself(&self, id: &str) {
        self.inner.set(id, |sandbox| sandbox.state = State::SANDBOX_STATE_PAUSING.into()).unwrap();
    }

    pub(crate) fn fail_pause_by_itself(&self, id: &str, why: &str) {
        let fail = |sandbox: &mut wire::Sandbox| {
            sandbox.state = State::SANDBOX_STATE_RUNNING.into();
            sandbox.last_failure = why.to_owned();
        };
        self.inner.set(id, fail).unwrap();
    }

    /// The same, unless something else is going on with it.
    pub(crate) fn pause_if_running(&self, id: &str) {
        let running = State::SANDBOX_STATE_RUNNING;
        self.inner.set(id, |sandbox| {
            if sandbox.state == running {
                sandbox.state = State::SANDBOX_STATE_PAUSED.into();
            }
        });
    }
}
