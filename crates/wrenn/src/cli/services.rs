//! `wrenn agent` and `wrenn control-plane`: the two services, each as a process.
//!
//! Each prints one line of JSON when it is ready, logs to standard error, and stops on SIGTERM or SIGINT.
//! Stopping the agent destroys its sandboxes first; a second signal does not wait for that.

use camino::Utf8PathBuf;
use rustix::process::Signal;
use serde_json::json;
use wrenn_control_plane::ProxyDomain;
use wrenn_host_agent::Agent;

use super::{
    failure::Failure,
    interrupts::Interrupts,
    output::{Format, Output},
};
use crate::supervisor::unprivileged::die_with;

/// A child that a supervisor started.
#[derive(Debug, clap::Args)]
struct SupervisedArguments {
    /// Stop when this process, which must be the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    supervisor: Option<i32>,
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
    /// Address of the public API; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: std::net::SocketAddr,
    /// The database, for example postgres:///wrenn?host=/run/postgresql
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Unix socket of the host agent
    #[arg(long)]
    agent_socket: Utf8PathBuf,
    /// Where to write the API key that is made when the database has no team yet
    #[arg(long)]
    first_key_file: Option<Utf8PathBuf>,
    /// Domain of the host names by which ports of sandboxes are reached, PORT-SANDBOX.DOMAIN; without one they are not
    #[arg(long, env = "WRENN_PROXY_DOMAIN", value_name = "DOMAIN")]
    proxy_domain: Option<ProxyDomain>,
}

impl SupervisedArguments {
    /// To be called by the main thread, which lives as long as the process: the request belongs to the thread.
    fn watch(&self) -> std::io::Result<()> {
        self.supervisor.map_or(Ok(()), |parent| die_with(parent, Signal::TERM))
    }
}

impl AgentArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        let mut interrupts = Interrupts::new()?;
        self.supervised.watch()?;
        let agent = Agent::start(self.config).await.map_err(|error| Failure::new(1, error))?;
        say_ready(&json!({ "ready": true, "socket": agent.socket() }));
        interrupts.next().await;
        tokio::select! {
            () = agent.stop() => Ok(0),
            why = interrupts.next() => Ok(why.exit_code()),
        }
    }
}

impl ControlPlaneArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        let mut interrupts = Interrupts::new()?;
        self.supervised.watch()?;
        let config = wrenn_control_plane::Config {
            listen: self.listen,
            database_url: self.database_url,
            agent_socket: self.agent_socket.into(),
            first_key_file: self.first_key_file.map(Into::into),
            proxy_domain: self.proxy_domain,
            bounds: wrenn_control_plane::Bounds::default(),
        };
        let running = tokio::select! {
            started = wrenn_control_plane::start(config) => started.map_err(|error| Failure::new(1, error))?,
            why = interrupts.next() => return Ok(why.exit_code()),
        };
        say_ready(&json!({ "ready": true, "address": running.address() }));
        interrupts.next().await;
        tokio::select! {
            () = running.stop() => Ok(0),
            why = interrupts.next() => Ok(why.exit_code()),
        }
    }
}

/// Tells whoever started this process. If nobody listens, nobody waits.
fn say_ready(line: &serde_json::Value) {
    let _ = Output::new(Format::Json).json(line);
}
