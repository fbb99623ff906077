//! `wrenn run -- CMD…`: a sandbox for one command.
//!
//! ```text
//!   create ──► follow the command ──► destroy ──► its exit code
//!      │ signal        │ signal          ▲
//!      └─ wait for it ─┴─ stop it ───────┘      a second signal gives up waiting
//! ```
//!
//! The sandbox is destroyed on every way out of here.
//! For the one way that leaves no way out, a kill of this process, it has an inactivity timeout.

use std::time::{Duration, Instant};

use wrenn_api::CreateSandbox;
use wrenn_types::{SandboxId, TimeoutAction};

use super::{
    exec::{self, CommandArguments, Sink},
    failure::{Failure, OF_COMMAND},
    interrupts::Interrupts,
    output::Output,
    sandbox::print_phases,
};
use crate::client::{Client, ClientError, Created};

/// Seconds until a sandbox that nobody uses any more is destroyed. While its command runs it is told every half
/// minute that somebody waits for it.
const INACTIVITY_SECONDS: i64 = 120;
/// How often destroying is tried.
const DELETE_TRIES: u32 = 3;

/// Flags of `wrenn run`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    resources: ResourceArguments,
    #[command(flatten)]
    options: CommandArguments,
    /// Print how long each phase of the create took
    #[arg(long)]
    timings: bool,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// What a sandbox is given.
#[derive(Debug, clap::Args)]
pub(super) struct ResourceArguments {
    /// Template to start from
    #[arg(long, short)]
    template: Option<String>,
    /// Snapshot to start from; it fixes CPUs and memory
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "template")]
    from: Option<String>,
    /// Virtual CPUs
    #[arg(long)]
    vcpus: Option<i64>,
    /// Memory in MiB
    #[arg(long, value_name = "MIB")]
    memory: Option<i64>,
    /// Size of the root disk in MiB
    #[arg(long, value_name = "MIB")]
    disk: Option<i64>,
    /// Give it no way to the internet
    #[arg(long)]
    no_internet: bool,
}

impl ResourceArguments {
    /// The request for a sandbox with these.
    pub(super) fn request(&self) -> CreateSandbox {
        CreateSandbox {
            template: self.from.clone().or_else(|| self.template.clone()),
            vcpus: self.vcpus,
            memory_mb: self.memory,
            disk_size_mb: self.disk,
            allow_internet_access: self.no_internet.then_some(false),
            ..CreateSandbox::default()
        }
    }
}

impl Arguments {
    #[cfg(test)]
    pub(super) fn command(&self) -> &[String] {
        &self.command
    }

    pub(super) async fn execute(self, client: Client, output: Output) -> Result<u8, Failure> {
        let mut interrupts = Interrupts::new().map_err(|error| Failure::new(OF_COMMAND, error))?;
        let request = CreateSandbox {
            timeout_sec: Some(INACTIVITY_SECONDS),
            on_timeout: Some(TimeoutAction::Kill),
            ..self.resources.request()
        };
        let created = match create(&client, &request, &mut interrupts, output).await? {
            Ok(created) => created,
            Err(code) => return Ok(code),
        };
        if self.timings {
            print_phases(output, &created.phases);
        }
        let id = created.sandbox.id;

        let started = Instant::now();
        let mut sink = Sink::new(output);
        let start = self.options.stream(&self.command, exec::passes_stdin());
        let ended = exec::follow(&client, &id, start, &mut sink, &mut interrupts).await;
        destroy(&client, &id, &mut interrupts, output).await;
        let cmd = self.command.first().map_or("", String::as_str);
        exec::conclude(output, &id, cmd, started, sink, &ended?)
    }
}

/// Creates the sandbox. A signal that comes in between waits for it: only what has an id can be destroyed.
async fn create(
    client: &Client,
    request: &CreateSandbox,
    interrupts: &mut Interrupts,
    output: Output,
) -> Result<Result<Created, u8>, Failure> {
    let creating = client.create(request);
    tokio::pin!(creating);
    let mut interrupted = None;
    loop {
        tokio::select! {
            created = &mut creating => {
                let created = match (created, interrupted) {
                    (Ok(created), None) => return Ok(Ok(created)),
                    (Err(error), None) => return Err(Failure::new(OF_COMMAND, error)),
                    (created, Some(why)) => (created, why),
                };
                let (created, why): (Result<Created, ClientError>, super::interrupts::Interrupted) = created;
                if let Ok(created) = created {
                    destroy(client, &created.sandbox.id, interrupts, output).await;
                }
                return Ok(Err(why.exit_code()));
            }
            why = interrupts.next() => match interrupted {
                None => {
                    output.note("waiting for the sandbox to come up, to destroy it");
                    interrupted = Some(why);
                }
                Some(why) => {
                    output.note("left while a sandbox was coming up; it is destroyed when nothing uses it");
                    return Ok(Err(why.exit_code()));
                }
            },
        }
    }
}

/// Destroys the sandbox, or says how to. Failing here does not hide the end of the command.
async fn destroy(client: &Client, id: &SandboxId, interrupts: &mut Interrupts, output: Output) {
    let destroying = async {
        let mut tried = 1;
        loop {
            match client.delete(id).await {
                Err(error) if exec::is_not_found(&error) => return Ok(()),
                Err(_) if tried < DELETE_TRIES => {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    tried += 1;
                }
                result => return result,
            }
        }
    };
    let why = tokio::select! {
        result = destroying => match result {
            Ok(()) => return,
            Err(error) => error.to_string(),
        },
        _ = interrupts.next() => "interrupted".to_owned(),
    };
    output.note(&format!(
        "warning: the sandbox {id} was not destroyed: {why}; `wrenn sandbox rm {id}` does it"
    ));
}
