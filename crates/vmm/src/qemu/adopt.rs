//! Taking over a QEMU that an earlier process started and let go, or did not live to end.
//!
//! ```text
//!  find the process by its name ─► connect to its control socket ─► whose are you, and what do you do?
//! ```
//!
//! The process is none of our children: its end is told by a pidfd, and its exit code by nobody. QEMU serves
//! one connection at a time and does not mind when one is lost: what it has to say on its standard error,
//! whose reader is gone too, it says to nobody.

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{sync::watch, task::spawn_blocking};

use super::{
    facts::Shutdown,
    launch::CONTROL_SOCKET,
    machine::{Backing, Machine, State},
    monitor::{ConsoleTail, Monitor},
    qmp::{COMMAND_BOUND, Qmp},
};
use crate::{
    AdoptedMachine, VmmError, VmmResult,
    files::SocketFile,
    process::{self, Leash, Watched, find},
};

const OPERATION: &str = "adopt";
/// How long QEMU may take to answer somebody new, who waits for as long as somebody else is connected.
const ANSWER_BOUND: Duration = Duration::from_secs(10);

pub(super) async fn adopt(machine: AdoptedMachine) -> VmmResult<Machine> {
    let mark = process::mark(&machine.name);
    let socket = machine.run_dir.join(CONTROL_SOCKET);
    let lost = |source: io::Error| VmmError::Connection { command: OPERATION.to_owned(), source };
    let hint = machine.pid_hint;
    let found = spawn_blocking(move || find(&mark, hint)).await;
    let found = found.map_err(io::Error::other).and_then(|found| found).map_err(lost)?;
    let not_there = || VmmError::NotThere { name: machine.name.clone() };
    let process = found.ok_or_else(not_there)?;
    let alive = process.clone();
    let taken = async {
        let path = socket.clone();
        let stream = spawn_blocking(move || UnixStream::connect(path)).await;
        let stream = stream.map_err(io::Error::other).and_then(|stream| stream).map_err(lost)?;
        let qmp = Arc::new(Qmp::over(stream).map_err(lost)?);
        let state = ask(&qmp, &machine.name).await?;
        let console = Arc::new(ConsoleTail::continued(Arc::clone(&qmp), machine.run_dir.clone()).await);
        let (exit, exited) = watch::channel(None);
        let monitor = Monitor {
            qmp: Arc::clone(&qmp),
            console: Arc::clone(&console),
            errors: None,
            exit,
            socket: SocketFile::at(socket),
        };
        let (leash, released) = Leash::new(process.clone());
        tokio::spawn(monitor.run(Watched::Adopted(process), leash.ending(), released));
        let mut adopted = Machine::new(leash, qmp, console, exited, machine.has_disk);
        let backing = machine.memory.clone().map_or(Backing::Anonymous, Backing::Private);
        adopted.found(backing, state);
        Ok(adopted)
    };
    match taken.await {
        Err(_) if !alive.is_alive().map_err(lost)? => Err(not_there()),
        other => other,
    }
}

/// Makes sure that it is who it should be, and learns what it does.
async fn ask(qmp: &Qmp, name: &str) -> VmmResult<State> {
    let timed = |error| match error {
        VmmError::Timeout { bound, .. } => VmmError::Timeout { operation: OPERATION, bound },
        other => other,
    };
    qmp.execute("qmp_capabilities", Value::Null, ANSWER_BOUND).await.map_err(timed)?;
    let known = qmp.execute("query-name", Value::Null, COMMAND_BOUND).await.map_err(timed)?;
    if known["name"] != name {
        let message = format!("it is {}", known["name"]);
        return Err(VmmError::Refused { command: OPERATION.to_owned(), message });
    }
    let status = qmp.execute("query-status", Value::Null, COMMAND_BOUND).await.map_err(timed)?;
    match status["status"].as_str() {
        Some("running") => Ok(State::Running),
        Some("paused") => Ok(State::Paused),
        Some("shutdown") => {
            qmp.tell(|facts| facts.shutdown = Some(Shutdown::Unseen));
            Ok(State::Paused)
        }
        Some("postmigrate" | "finish-migrate") => {
            Err(VmmError::WrongState { operation: OPERATION, state: "saved" })
        }
        _ => Err(VmmError::WrongState { operation: OPERATION, state: "not restored" }),
    }
}
