//! Taking over a Firecracker that an earlier process started and let go, or did not live to end.
//!
//! ```text
//!  find the process by its name ─► lock its directory ─► marks ─► connect ─► who are you, and what do you do?
//! ```
//!
//! The process is none of our children: its end is told by a pidfd, and its exit code by nobody. Firecracker serves several
//! connections, so the lock says who owns it: the kernel frees it with its holder.

use std::{fs::File, sync::Arc, time::Duration};

use camino::Utf8Path;
use tokio::time::{Instant, sleep};
use wrenn_host_linux::process::Process;

use super::{
    api::{Api, COMMAND_BOUND},
    jail,
    launch::{CONSOLE, CONSOLE_LIMIT, CONSOLE_LOG, DISK_LINK, LOG_LIMIT, Mark, owner},
    machine::{Backing, Machine, Written},
    monitor::Monitor,
    requests::InstanceState,
    spool::Spool,
};
use crate::{
    AdoptedMachine, VmmError, VmmResult,
    files::{SocketFile, cannot},
    guest_memory::GuestMemory,
    launch::CONTROL_SOCKET,
    pager::{self, Pager},
    pages::Zeros,
    process::{self, ADOPT, Leash, Watched, find_adopted, lost, on_thread, unless_ended},
    state::State,
};

/// How long somebody else may still hold it, who is about to end.
const OWNER_BOUND: Duration = Duration::from_secs(10);
/// How often that is looked at: nobody tells.
const OWNER_PAUSE: Duration = Duration::from_millis(20);

pub(super) async fn adopt(machine: AdoptedMachine) -> VmmResult<Machine> {
    let process = find_adopted(&machine).await?;
    unless_ended(take(process.clone(), &machine).await, &process, &machine)
}

async fn take(process: Process, machine: &AdoptedMachine) -> VmmResult<Machine> {
    let run_dir = &machine.run_dir;
    let owner = lock(run_dir).await?;
    for mark in Mark::ALL {
        if mark.is_set(run_dir)? {
            return Err(VmmError::WrongState { operation: ADOPT, state: mark.state() });
        }
    }
    let user = jail::user_in(run_dir)?;
    let socket = run_dir.join(CONTROL_SOCKET);
    let api = Api::at(socket.clone());
    let state = ask(&api, &machine.name).await?;
    let disk = match machine.has_disk {
        true => Some(link(&run_dir.join(DISK_LINK))?),
        false => None,
    };
    let known = tokio::fs::read(run_dir.join(CONSOLE_LOG)).await.unwrap_or_default();
    let console = Arc::new(Spool::continued(&run_dir.join(CONSOLE), CONSOLE_LIMIT, &known)?);
    let log = Arc::new(Spool::continued(&run_dir.join(process::mark(&machine.name)), LOG_LIMIT, b"")?);
    let pager = find_pager(&process, machine).await?;
    let backing = match (machine.memory.clone(), &pager) {
        (None, _) => Backing::Anonymous,
        (Some(file), Some(_)) => Backing::Served(file),
        (Some(file), None) => {
            let process = process.clone();
            on_thread(ADOPT, move |_| backing(&process, &file)).await?
        }
    };
    let watch = pager.as_ref().map(Pager::watch);
    let monitor =
        Monitor { console: Arc::clone(&console), log, socket: SocketFile::at(socket), pager: watch };
    let (leash, held) = Leash::new(process.clone());
    tokio::spawn(monitor.run(Watched::Adopted(process), held));
    let mut adopted = Machine::new(leash, api, console, run_dir.clone(), owner, disk, user);
    adopted.found(backing, state);
    adopted.set_pager(pager);
    Ok(adopted)
}

/// What serves its memory, if something has to. A machine that has lost it is ended: it would hang at the next page.
async fn find_pager(process: &Process, machine: &AdoptedMachine) -> VmmResult<Option<Pager>> {
    if !pager::is_wanted(&machine.run_dir)? {
        return Ok(None);
    }
    let (name, run_dir) = (machine.name.clone(), machine.run_dir.clone());
    let found = on_thread(ADOPT, move |_| Pager::find(&name, &run_dir).map_err(lost)).await?;
    match found {
        Some(found) => Ok(Some(found)),
        None => {
            process.kill_and_wait().await.map_err(lost)?;
            Err(VmmError::Exited { operation: ADOPT, reason: pager::reason(&machine.run_dir) })
        }
    }
}

/// Locks a machine's directory, once its owner has let it go.
async fn lock(run_dir: &Utf8Path) -> VmmResult<File> {
    let file = owner(run_dir)?;
    let begin = Instant::now();
    while file.try_lock().is_err() {
        if begin.elapsed() > OWNER_BOUND {
            return Err(VmmError::Timeout { operation: ADOPT, bound: OWNER_BOUND });
        }
        sleep(OWNER_PAUSE).await;
    }
    Ok(file)
}

/// Makes sure that it is who it should be, and learns what it does.
async fn ask(api: &Api, name: &str) -> VmmResult<State> {
    let info = api.info(COMMAND_BOUND).await?;
    if info.id != name {
        let message = format!("it is {}", info.id);
        return Err(VmmError::Refused { command: ADOPT.to_owned(), message });
    }
    match info.state {
        InstanceState::Running => Ok(State::Running),
        InstanceState::Paused => Ok(State::Paused),
        InstanceState::NotStarted => Err(VmmError::WrongState { operation: ADOPT, state: "not started" }),
    }
}

/// What the file is to it: one that it maps, or one that is nothing but zeros, of which it knows nothing.
fn backing(process: &Process, file: &Utf8Path) -> VmmResult<Backing> {
    let path = file.to_owned();
    if GuestMemory::open(process, file)?.is_some() {
        return Ok(Backing::Private(path));
    }
    match Zeros::over(file)? {
        Zeros::Understood => Ok(Backing::Zeros { file: path, written: Written::Forgotten }),
        // A snapshot of it is refused.
        Zeros::Told => Ok(Backing::Anonymous),
    }
}

fn link(path: &Utf8Path) -> VmmResult<camino::Utf8PathBuf> {
    path.read_link_utf8().map_err(cannot("follow", path))
}
