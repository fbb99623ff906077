//! `wrenn agent` and `wrenn control-plane`: the two services, each as a process.
//!
//! Each prints one line of JSON when it is ready, logs to standard error, and stops on SIGTERM or SIGINT.

use std::io::Write as _;

use anyhow::Context as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use wrenn_host_agent::Agent;

use super::failure::Failure;
use crate::supervisor::unprivileged::die_with;

/// A child that a supervisor started.
#[derive(Debug, clap::Args)]
struct SupervisedArguments {
    /// Stop when this process, which must be the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    supervisor: Option<i32>,
}

impl SupervisedArguments {
    fn watch(&self) -> std::io::Result<()> {
        self.supervisor.map_or(Ok(()), |parent| die_with(parent, Signal::TERM))
    }
}

/// Flags of `wrenn agent`.
#[derive(Debug, clap::Args)]
pub(super) struct AgentArguments {
    #[command(flatten)]
    supervised: SupervisedArguments,
    #[command(flatten)]
    config: wrenn_host_agent::Config,
}

/// Flags of `wrenn control-plane`.
#[derive(Debug, clap::Args)]
pub(super) struct ControlPlaneArguments {
    #[command(flatten)]
    supervised: SupervisedArguments,
    #[command(flatten)]
    config: wrenn_control_plane::Config,
}

/// Cancelled by SIGTERM and SIGINT, from now on.
fn stop_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        told.cancel();
    });
    Ok(stop)
}

/// The one line by which whoever started a service learns that it is ready.
fn say_ready(line: &Value) {
    // Nobody may be reading: a service that a person started serves all the same.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

impl AgentArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        self.supervised.watch()?;
        let stop = stop_signal()?;
        let agent = Box::pin(Agent::start(self.config)).await.context("the host agent did not start")?;
        say_ready(&json!({ "ready": true, "socket": agent.socket() }));
        stop.cancelled().await;
        agent.stop().await;
        Ok(0)
    }
}

impl ControlPlaneArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        self.supervised.watch()?;
        let stop = stop_signal()?;
        let ready = |address| say_ready(&json!({ "ready": true, "address": address }));
        Box::pin(wrenn_control_plane::run(self.config, stop, ready))
            .await
            .context("the control plane did not start")?;
        Ok(0)
    }
}
