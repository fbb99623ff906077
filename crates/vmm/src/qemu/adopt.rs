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
use tokio::task::spawn_blocking;
use wrenn_host_linux::process::Process;

use super::{
    facts::Shutdown,
    machine::{Backing, Machine},
    monitor::{ConsoleTail, Monitor},
    qmp::{COMMAND_BOUND, Qmp},
};
use crate::{
    AdoptedMachine, VmmError, VmmResult,
    files::SocketFile,
    launch::CONTROL_SOCKET,
    process::{ADOPT, Leash, Watched, find_adopted, lost, unless_ended},
    state::State,
};

/// How long QEMU may take to answer somebody new, who waits for as long as somebody else is connected.
const ANSWER_BOUND: Duration = Duration::from_secs(10);

pub(super) async fn adopt(machine: AdoptedMachine) -> VmmResult<Machine> {
    let process = find_adopted(&machine).await?;
    unless_ended(take(process.clone(), &machine).await, &process, &machine)
}

async fn take(process: Process, machine: &AdoptedMachine) -> VmmResult<Machine> {
    let socket = machine.run_dir.join(CONTROL_SOCKET);
    let path = socket.clone();
    let stream = spawn_blocking(move || UnixStream::connect(path)).await;
    let stream = stream.map_err(io::Error::other).and_then(|stream| stream).map_err(lost)?;
    let qmp = Arc::new(Qmp::over(stream).map_err(lost)?);
    let state = ask(&qmp, &machine.name).await?;
    let console = Arc::new(ConsoleTail::continued(Arc::clone(&qmp), machine.run_dir.clone()).await);
    let monitor = Monitor {
        qmp: Arc::clone(&qmp),
        console: Arc::clone(&console),
        errors: None,
        socket: SocketFile::at(socket),
    };
    let (leash, held) = Leash::new(process.clone());
    tokio::spawn(monitor.run(Watched::Adopted(process), held));
    let mut adopted = Machine::new(leash, qmp, console, machine.has_disk);
    let backing = machine.memory.clone().map_or(Backing::Anonymous, Backing::Private);
    adopted.found(backing, state);
    Ok(adopted)
}

/// Makes sure that it is who it should be, and learns what it does.
async fn ask(qmp: &Qmp, name: &str) -> VmmResult<State> {
    let timed = |error| match error {
        VmmError::Timeout { bound, .. } => VmmError::Timeout { operation: ADOPT, bound },
        other => other,
    };
    qmp.execute("qmp_capabilities", Value::Null, ANSWER_BOUND).await.map_err(timed)?;
    let known = qmp.execute("query-name", Value::Null, COMMAND_BOUND).await.map_err(timed)?;
    if known["name"] != name {
        let message = format!("it is {}", known["name"]);
        return Err(VmmError::Refused { command: ADOPT.to_owned(), message });
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
            Err(VmmError::WrongState { operation: ADOPT, state: "saved" })
        }
        _ => Err(VmmError::WrongState { operation: ADOPT, state: "not restored" }),
    }
}
