//! The command line: words and flags, output for people and for programs, exit codes.
//!
//! | exit code | meaning |
//! |---|---|
//! | of the command | `run`, `sandbox exec` and `sandbox shell` pass it through; 128 + n if signal n ended it |
//! | 0 | done |
//! | 1 | a command of this program failed; the reason is on standard error |
//! | 2 | the command line is wrong |
//! | 3 | `doctor`: production must not start on this host |
//! | 124 | the command in the sandbox did not end within `--timeout` |
//! | 125 | `run`, `exec` or `shell` itself failed, so that there is no exit code to pass through |
//! | 128 + n | signal n (Ctrl-C is 2) ended this program in order |
//!
//! What programs read goes to standard output, everything else to standard error.
//! With `--output json` an error is one line of JSON on standard error, in the form of the API's errors.

mod copy;
mod doctor;
mod exec;
mod failure;
mod interrupts;
mod metrics;
mod output;
mod persist;
mod run;
mod sandbox;
mod services;
mod shell;
mod snapshot;
mod stack;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use wrenn_host_agent::{network::filter, pager};

use self::{
    failure::Failure,
    output::{Format, Output},
};
use crate::{
    client::{Client, Endpoint},
    supervisor::unprivileged,
};

/// Names the directory of a stack.
const DIRECTORY_VARIABLE: &str = "WRENN_DIR";
/// The directory of a stack when nothing names one.
const DEFAULT_DIRECTORY: &str = ".wrenn";

const AFTER_HELP: &str = "\
The API is the one that WRENN_BASE_URL and WRENN_API_KEY name. If neither is set, it is the stack of this \
directory: its lines are read from .wrenn/env (or from the file env in WRENN_DIR), which `wrenn dev` and \
`wrenn up` write and which a shell can source.

Exit codes: `run`, `sandbox exec` and `sandbox shell` pass on the code of the command (128+n if signal n ended \
it), 124 if it did not end within --timeout, and 125 if they failed themselves. All others: 0, 1 for a failure, \
2 for a wrong command line, and of `doctor` 3 where production must not start.

WRENN_LOG (or RUST_LOG) sets what is logged to standard error, for example WRENN_LOG=debug.";

/// Runs untrusted code in microVMs.
#[derive(Debug, Parser)]
#[command(name = "wrenn", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Arguments {
    /// How results are printed
    #[arg(long, short = 'o', global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one command in a sandbox made for it
    Run(run::Arguments),
    /// Create, use and destroy sandboxes
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::Command),
    /// Make, list and delete snapshots of sandboxes
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Run a whole stack in the foreground, until Ctrl-C
    Dev(stack::DevArguments),
    /// Start a stack in the background, unless it runs already
    Up(stack::DevArguments),
    /// Stop the stack of a directory, if one runs
    Down(stack::DownArguments),
    /// Check whether this host has what production needs
    Doctor(doctor::Arguments),
    /// Run the host agent
    Agent(services::AgentArguments),
    /// Run the control plane
    ControlPlane(services::ControlPlaneArguments),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// How this program starts itself to become another one; for nobody else, and so in no help and no completion.
#[derive(Debug, Parser)]
struct BecomeArguments {
    #[command(flatten)]
    arguments: unprivileged::Arguments,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    // Before there is any thread: it changes what belongs to the whole process.
    if std::env::args_os().nth(1).is_some_and(|word| word == unprivileged::WORD) {
        let BecomeArguments { arguments } = BecomeArguments::parse_from(std::env::args_os().skip(1));
        return ExitCode::from(Failure::new(1, arguments.become_it()).report(Output::new(Format::Table)));
    }
    // A domain filter is one from its first moment on: it has nothing to do with a command line.
    if std::env::args_os().nth(1).is_some_and(|word| word == filter::WORD) {
        let Err(error) = filter::main();
        return ExitCode::from(Failure::new(1, error).report(Output::new(Format::Table)));
    }
    // So is a pager.
    if std::env::args_os().nth(1).is_some_and(|word| word == pager::WORD) {
        let served = pager::main().map_err(|error| Failure::new(1, error).report(Output::new(Format::Table)));
        return served.err().map_or(ExitCode::SUCCESS, ExitCode::from);
    }
    let Arguments { output, command } = Arguments::parse();
    let output = Output::new(output);
    let result = match command {
        Command::Completions { shell } => completions(shell, output),
        command => run_command(command, output),
    };
    let code = result.unwrap_or_else(|failure| failure.report(output));
    ExitCode::from(code)
}

fn run_command(command: Command, output: Output) -> Result<u8, Failure> {
    let serves = matches!(command, Command::Agent(_) | Command::ControlPlane(_));
    start_log(if serves || matches!(command, Command::Dev(_)) { "info,sqlx=warn" } else { "warn" });
    let mut builder = if serves {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        // The supervisor depends on it (see `unprivileged::die_with`), and nothing else here needs more.
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = builder.enable_all().build().map_err(|error| Failure::new(1, error))?;
    let result = runtime.block_on(async {
        match command {
            Command::Run(arguments) => {
                arguments.execute(client().map_err(Failure::of_command)?, output).await
            }
            Command::Sandbox(command) => command.execute(output).await,
            Command::Snapshot(command) => command.execute(output).await,
            Command::Dev(arguments) => arguments.dev().await,
            Command::Up(arguments) => arguments.up(output).await,
            Command::Down(arguments) => arguments.execute(output).await,
            Command::Doctor(arguments) => arguments.execute(output).await,
            Command::Agent(arguments) => arguments.execute().await,
            Command::ControlPlane(arguments) => arguments.execute().await,
            Command::Completions { .. } => Ok(0),
        }
    });
    // A read of the terminal or of a pipe may be under way in a thread of its own, and would be waited for. And what
    // the agent has not come to an end with is left as a kill would leave it: its next start goes on with machines,
    // which would be ended together with the tasks that hold them.
    std::mem::forget(runtime);
    result
}

fn completions(shell: clap_complete::Shell, output: Output) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "wrenn", &mut script);
    output.raw(&script)?;
    Ok(0)
}

/// The client of the API that the environment names, or of the stack of this directory.
fn client() -> anyhow::Result<Client> {
    let directory = std::env::var(DIRECTORY_VARIABLE).unwrap_or_else(|_| DEFAULT_DIRECTORY.to_owned());
    let file = camino::Utf8PathBuf::from(directory).join("env");
    Ok(Client::new(Endpoint::find(|name| std::env::var(name).ok(), &file)?))
}

fn start_log(default: &str) {
    let filter = ["WRENN_LOG", "RUST_LOG"].iter().find_map(|name| EnvFilter::try_from_env(name).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new(default));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_two_dashes_is_the_command() {
        let parsed =
            Arguments::try_parse_from(["wrenn", "run", "--env", "A=b", "--", "ls", "--output", "x"]).unwrap();
        let Command::Run(run) = parsed.command else { panic!("{parsed:?}") };
        assert_eq!(run.command(), ["ls", "--output", "x"]);
        assert!(Arguments::try_parse_from(["wrenn", "run"]).is_err());
        assert!(Arguments::try_parse_from(["wrenn", "sandbox", "get", "../.."]).is_err());
        let json = Arguments::try_parse_from(["wrenn", "sandbox", "list", "-o", "json"]).unwrap();
        assert_eq!(json.output, Format::Json);
    }
}
