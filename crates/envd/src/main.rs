//! `envd`: everything of ours that runs inside a guest, in one static program with two roles.
//!
//! ```text
//! kernel ──► envd as process 1 (init role)            envd agent (agent role)
//!            mounts, modules, network, root disk ───►  HTTP on port 49983
//!            reaps, restarts the agent, powers off
//! ```
//!
//! The roles are apart because a panic in process 1 is a panic of the kernel, while the agent speaks to the network.
//! Outside a guest only the agent role makes sense: `envd agent --listen 127.0.0.1:0`.

// The generated traits return `impl Encodable`; ours name what they return, as the generator's guide advises.
#![allow(refining_impl_trait)]

mod agent;
mod console;
mod disk;
mod init;
mod layout;
mod names;
mod network;
mod tree;

use std::process::ExitCode;

use self::{
    agent::Options,
    console::{chain, say},
};

const USAGE: &str = "usage: envd agent [--listen ADDRESS:PORT | --port PORT] [--user NAME] [--cgroup DIRECTORY] [--handover] \
     [--guest]\n       envd supervise PROGRAM [ARGUMENT...]\n       envd --version";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        // The kernel gives process 1 the words of its own command line that it does not know.
        _ if std::process::id() == 1 => init::run(),
        Some("agent") => match Options::parse(words) {
            Ok(options) => run_agent(options),
            Err(error) => usage(&error.to_string()),
        },
        Some("supervise") => init::supervise::run_other(&words.collect::<Vec<_>>()),
        Some("--version" | "version") => {
            use std::io::Write;
            let written = writeln!(std::io::stdout(), "{}", env!("CARGO_PKG_VERSION"));
            if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Some(other) => usage(&format!("unknown command {other}")),
        None => usage("no command"),
    }
}

fn run_agent(options: Options) -> ExitCode {
    match agent::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("cannot serve: {}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn usage(problem: &str) -> ExitCode {
    say(format_args!("{problem}\n{USAGE}"));
    ExitCode::from(2)
}
