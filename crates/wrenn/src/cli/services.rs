//! `wrenn agent` and `wrenn control-plane`: the two services, each as a process.
//!
//! Each prints one line of JSON when it is ready, logs to standard error, and stops on SIGTERM or SIGINT.

use camino::Utf8PathBuf;
use rustix::process::Signal;

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
    /// Directory of the stack
    #[arg(long, env = "WRENN_DIR", default_value = "/var/lib/wrenn")]
    dir: Utf8PathBuf,
    /// Guest bundle and templates
    #[arg(long, env = "WRENN_IMAGES", default_value = "/var/lib/wrenn/images")]
    images: Utf8PathBuf,
    /// Warm snapshots
    #[arg(long, env = "WRENN_SNAPSHOTS", default_value = "/var/cache/wrenn/snapshots")]
    snapshots: Utf8PathBuf,
    /// Unix socket to serve
    #[arg(long)]
    socket: Option<Utf8PathBuf>,
    /// Network slots to keep ready
    #[arg(long)]
    ready_slots: Option<u32>,
    /// Network namespace that is the way out, instead of the root namespace
    #[arg(long)]
    uplink_netns: Option<String>,
}

/// Flags of `wrenn control-plane`.
#[derive(Debug, clap::Args)]
pub(super) struct ControlPlaneArguments {
    #[command(flatten)]
    supervised: SupervisedArguments,
    /// Address of the public API; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: std::net::SocketAddr,
    /// The database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Socket of the host agent
    #[arg(long)]
    agent_socket: Utf8PathBuf,
    /// Where the first API key is written, if the first start has to make one
    #[arg(long)]
    first_key_file: Option<Utf8PathBuf>,
}

impl AgentArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        self.supervised.watch()?;
        Err(anyhow::anyhow!("the host agent is not part of this build").into())
    }
}

impl ControlPlaneArguments {
    pub(super) async fn execute(self) -> Result<u8, Failure> {
        self.supervised.watch()?;
        Err(anyhow::anyhow!("the control plane is not part of this build").into())
    }
}
