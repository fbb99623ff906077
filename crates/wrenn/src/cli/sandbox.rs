//! `wrenn sandbox …`: create, list, get, exec, shell, cp, url, rm. What keeps a sandbox is in [`super::persist`], what
//! it has used in [`super::metrics`].

use std::{collections::BTreeMap, num::NonZeroU16, time::Instant};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use wrenn_api::{CreateSandbox, Sandbox};
use wrenn_types::{SandboxId, TimeoutAction};

use super::{
    copy,
    exec::{self, CommandArguments, Sink},
    failure::{Failure, OF_COMMAND},
    interrupts::Interrupts,
    metrics,
    output::{Output, table},
    persist,
    run::ResourceArguments,
    shell,
};
use crate::client::{Client, ListFilter, Phase};

/// What to do with sandboxes.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create a sandbox and wait until it runs
    Create(CreateArguments),
    /// List the sandboxes that are there
    #[command(visible_alias = "ls")]
    List(ListArguments),
    /// Show one sandbox
    Get {
        /// Which one
        #[arg(value_name = "SANDBOX")]
        id: SandboxId,
    },
    /// Run a command in a sandbox
    Exec(ExecArguments),
    /// Open a terminal in a sandbox
    Shell(shell::Arguments),
    /// Copy a file from or to a sandbox
    Cp(copy::Arguments),
    /// Print the address of a port of a sandbox; requests to it need the API key
    Url {
        /// Which sandbox
        #[arg(value_name = "SANDBOX")]
        id: SandboxId,
        /// The port on which a program in it listens
        #[arg(value_name = "PORT")]
        port: NonZeroU16,
    },
    /// Save sandboxes and stop them, to be resumed later
    Pause(persist::PauseArguments),
    /// Bring paused sandboxes back, every process where it was
    Resume(persist::ResumeArguments),
    /// Make copies of a sandbox, which goes on as it was
    Fork(persist::ForkArguments),
    /// Put a sandbox back to a snapshot
    Rollback(persist::RollbackArguments),
    /// Show what a sandbox may reach, or set it
    Network(persist::NetworkCommand),
    /// Show when the time of a sandbox is over and what happens then, or change it
    Timeout(persist::TimeoutCommand),
    /// Show what a sandbox has used
    Metrics(metrics::Arguments),
    /// Destroy sandboxes
    Rm(RemoveArguments),
}

/// Flags of `sandbox create`.
#[derive(Debug, clap::Args)]
pub(super) struct CreateArguments {
    #[command(flatten)]
    resources: ResourceArguments,
    #[command(flatten)]
    network: persist::NetworkArguments,
    /// Seconds without activity until its time is over; 0 means never
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    #[command(flatten)]
    times: persist::TimeoutArguments,
    /// Variable of every command's environment
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Name and value to find it by
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Print how long each phase took
    #[arg(long)]
    timings: bool,
    /// Print only the id
    #[arg(long, short)]
    quiet: bool,
}

/// Flags of `sandbox list`.
#[derive(Debug, clap::Args)]
pub(super) struct ListArguments {
    /// Only those in this state
    #[arg(long)]
    status: Option<String>,
    /// Only those with this name and value
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Print only the ids
    #[arg(long, short)]
    quiet: bool,
}

/// Flags of `sandbox exec`.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArguments {
    #[command(flatten)]
    options: CommandArguments,
    /// Let it run on, and print its process id and its tag
    #[arg(long, short, conflicts_with = "timeout")]
    background: bool,
    /// Name of a command that runs on
    #[arg(long, requires = "background")]
    tag: Option<String>,
    /// Which sandbox
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Flags of `sandbox rm`.
#[derive(Debug, clap::Args)]
pub(super) struct RemoveArguments {
    /// Which ones
    #[arg(value_name = "SANDBOX", required_unless_present = "all")]
    ids: Vec<SandboxId>,
    /// All that are there
    #[arg(long, conflicts_with = "ids")]
    all: bool,
}

/// A new sandbox for programs.
#[derive(Serialize)]
struct CreatedView<'a> {
    #[serde(flatten)]
    sandbox: &'a Sandbox,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<&'a [Phase]>,
}

impl Command {
    pub(super) async fn execute(self, output: Output) -> Result<u8, Failure> {
        let client = super::client().map_err(|error| match self {
            Self::Exec(_) | Self::Shell(_) => Failure::of_command(error),
            _ => Failure::new(1, error),
        })?;
        match self {
            Self::Create(arguments) => create(&client, arguments, output).await,
            Self::List(arguments) => list(&client, arguments, output).await,
            Self::Get { id } => show(&client.get(&id).await?, output),
            Self::Pause(arguments) => arguments.execute(&client, output).await,
            Self::Resume(arguments) => arguments.execute(&client, output).await,
            Self::Fork(arguments) => arguments.execute(&client, output).await,
            Self::Rollback(arguments) => arguments.execute(&client, output).await,
            Self::Network(arguments) => arguments.execute(&client, output).await,
            Self::Timeout(arguments) => arguments.execute(&client, output).await,
            Self::Metrics(arguments) => arguments.execute(&client, output).await,
            Self::Exec(arguments) => run(&client, arguments, output).await,
            Self::Shell(arguments) => arguments.execute(&client, output).await,
            Self::Cp(arguments) => arguments.execute(&client, output).await,
            Self::Url { id, port } => url(&client, &id, port, output),
            Self::Rm(arguments) => remove(&client, arguments, output).await,
        }
    }
}

async fn create(client: &Client, arguments: CreateArguments, output: Output) -> Result<u8, Failure> {
    let map = |pairs: Vec<(String, String)>| Some(BTreeMap::from_iter(pairs)).filter(|map| !map.is_empty());
    let request = CreateSandbox {
        timeout_sec: arguments.timeout,
        on_timeout: arguments.times.on_timeout.map(Into::into),
        deadline: arguments.times.deadline,
        deadline_action: arguments.times.deadline_action.map(Into::into),
        auto_resume: arguments.times.auto_resume,
        network: arguments.network.request(),
        envs: map(arguments.env),
        metadata: map(arguments.metadata),
        ..arguments.resources.request()
    };
    let created = client.create(&request).await?;
    let timings = arguments.timings.then_some(created.phases.as_slice());
    if output.is_json() {
        output.json(&CreatedView { sandbox: &created.sandbox, timings })?;
        return Ok(0);
    }
    if let Some(phases) = timings {
        print_phases(output, phases);
    }
    if arguments.quiet {
        output.line(created.sandbox.id.as_str())?;
    } else {
        output.line(&rows(&[created.sandbox]))?;
    }
    Ok(0)
}

async fn list(client: &Client, arguments: ListArguments, output: Output) -> Result<u8, Failure> {
    let filter = ListFilter { status: arguments.status, metadata: arguments.metadata };
    let sandboxes = client.list(&filter).await?;
    if output.is_json() {
        output.json(&sandboxes)?;
    } else if arguments.quiet {
        for sandbox in &sandboxes {
            output.line(sandbox.id.as_str())?;
        }
    } else {
        output.line(&rows(&sandboxes))?;
    }
    Ok(0)
}

pub(super) fn show(sandbox: &Sandbox, output: Output) -> Result<u8, Failure> {
    if output.is_json() {
        output.json(sandbox)?;
        return Ok(0);
    }
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let mib = |value: u64| format!("{value} MiB");
    let mut lines = vec![
        ["id", sandbox.id.as_str()].map(str::to_owned),
        ["status", sandbox.status.as_str()].map(str::to_owned),
        ["template", &sandbox.template].map(str::to_owned),
        ["vcpus".to_owned(), sandbox.vcpus.to_string()],
        ["memory".to_owned(), mib(sandbox.memory_mb.into())],
        ["disk".to_owned(), optional(sandbox.disk_size_mb.map(|size| mib(size.into())))],
        ["disk used".to_owned(), optional(sandbox.disk_used_mb.map(mib))],
        ["timeout".to_owned(), timeout(sandbox.timeout_sec)],
        ["on timeout".to_owned(), action(sandbox.on_timeout).to_owned()],
        ["auto-resume".to_owned(), if sandbox.auto_resume { "yes" } else { "no" }.to_owned()],
        ["internet".to_owned(), if sandbox.allow_internet_access { "allowed" } else { "no" }.to_owned()],
        ["created".to_owned(), sandbox.created_at.to_string()],
        ["started".to_owned(), optional(sandbox.started_at.map(|time| time.to_string()))],
        ["last active".to_owned(), optional(sandbox.last_active_at.map(|time| time.to_string()))],
    ];
    if let Some(snapshot) = &sandbox.source_snapshot {
        lines.insert(3, ["snapshot".to_owned(), snapshot.to_string()]);
    }
    if let Some(at) = sandbox.deadline {
        let what = action(sandbox.deadline_action.unwrap_or_default());
        lines.push(["deadline".to_owned(), format!("{at}: {what}")]);
    }
    lines.extend(sandbox.paused_at.map(|at| ["paused".to_owned(), at.to_string()]));
    lines.extend(sandbox.last_failure.clone().map(|why| ["failed".to_owned(), why]));
    lines.extend(
        sandbox.metadata.iter().map(|(name, value)| ["metadata".to_owned(), format!("{name}={value}")]),
    );
    lines.extend(sandbox.end_message.clone().map(|message| ["ended".to_owned(), message]));
    output.line(&table(["FIELD", "VALUE"], lines))?;
    Ok(0)
}

async fn run(client: &Client, arguments: ExecArguments, output: Output) -> Result<u8, Failure> {
    let ExecArguments { options, background, tag, id, command } = arguments;
    if background {
        let request = options.background(&command, tag);
        let process = client.exec_background(&id, &request).await.map_err(Failure::of_command)?;
        if output.is_json() {
            output.json(&process)?;
        } else {
            output.line(&table(["PID", "TAG"], [[process.pid.to_string(), process.tag]]))?;
        }
        return Ok(0);
    }
    let mut interrupts = Interrupts::new().map_err(|error| Failure::new(OF_COMMAND, error))?;
    let started = Instant::now();
    let mut sink = Sink::new(output);
    let start = options.stream(&command, exec::passes_stdin());
    let cmd = start.cmd.clone();
    let ended = exec::follow(client, &id, start, &mut sink, &mut interrupts).await?;
    exec::conclude(output, &id, &cmd, started, sink, &ended)
}

fn url(client: &Client, id: &SandboxId, port: NonZeroU16, output: Output) -> Result<u8, Failure> {
    let url = client.port_url(id, port);
    if output.is_json() {
        output.json(&serde_json::json!({ "url": url }))?;
    } else {
        output.line(&url)?;
    }
    Ok(0)
}

async fn remove(client: &Client, arguments: RemoveArguments, output: Output) -> Result<u8, Failure> {
    let ids = if arguments.all {
        client.list(&ListFilter::default()).await?.into_iter().map(|sandbox| sandbox.id).collect()
    } else {
        arguments.ids
    };
    let (mut removed, mut failed) = (Vec::new(), None);
    for id in ids {
        match client.delete(&id).await {
            Ok(()) => {
                if !output.is_json() {
                    output.line(id.as_str())?;
                }
                removed.push(id);
            }
            // The others can still go; one failure is enough to fail.
            Err(error) => {
                let failure =
                    Failure::new(1, anyhow::Error::new(error).context(format!("cannot destroy {id}")));
                if let Some(earlier) = failed.replace(failure) {
                    earlier.report(output);
                }
            }
        }
    }
    if output.is_json() {
        output.json(&serde_json::json!({ "removed": removed }))?;
    }
    failed.map_or(Ok(0), Err)
}

/// Prints the phases of a create where a person looks.
pub(super) fn print_phases(output: Output, phases: &[Phase]) {
    if phases.is_empty() {
        output.note("the server told no timings");
        return;
    }
    let rows = phases.iter().map(|phase| {
        let milliseconds =
            phase.milliseconds.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} ms"));
        [phase.name.clone(), milliseconds, phase.description.clone().unwrap_or_default()]
    });
    output.note(&table(["PHASE", "TIME", ""], rows));
}

pub(super) fn rows(sandboxes: &[Sandbox]) -> String {
    let now = Timestamp::now();
    let rows = sandboxes.iter().map(|sandbox| {
        [
            sandbox.id.to_string(),
            sandbox.status.as_str().to_owned(),
            sandbox.template.clone(),
            sandbox.vcpus.to_string(),
            format!("{} MiB", sandbox.memory_mb),
            timeout(sandbox.timeout_sec),
            age(now.duration_since(sandbox.created_at)),
        ]
    });
    table(["ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "TIMEOUT", "AGE"], rows)
}

fn action(action: TimeoutAction) -> &'static str {
    match action {
        TimeoutAction::Pause => "pause",
        TimeoutAction::Kill => "kill",
    }
}

fn timeout(seconds: u32) -> String {
    if seconds == 0 { "never".to_owned() } else { format!("{seconds} s") }
}

/// One number and one unit: a person compares ages, nobody counts seconds.
fn age(duration: SignedDuration) -> String {
    match duration.as_secs().max(0) {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} min", seconds / 60),
        seconds @ 7_200..=172_799 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("it is written NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (seconds, text) in [(-3, "0 s"), (119, "119 s"), (120, "2 min"), (7_200, "2 h"), (172_800, "2 d")]
        {
            assert_eq!(age(SignedDuration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn pairs() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
