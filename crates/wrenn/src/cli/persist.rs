//! `wrenn sandbox pause|resume|fork|rollback|network|timeout`.

use std::collections::BTreeMap;

use wrenn_api::{ForkRequest, Network, PauseRequest, ResumeRequest, Sandbox, TimeoutRequest};
use wrenn_types::{SandboxId, TimeoutAction};

use super::{
    failure::Failure,
    output::{Output, table},
    sandbox::{pair, rows, show},
};
use crate::client::{Client, ClientError};

/// What is done when a time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Action {
    /// Keep it, to be resumed
    Pause,
    /// Destroy it
    Kill,
}

impl From<Action> for TimeoutAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Pause => Self::Pause,
            Action::Kill => Self::Kill,
        }
    }
}

/// Flags of `sandbox pause`.
#[derive(Debug, clap::Args)]
pub(super) struct PauseArguments {
    /// Which ones
    #[arg(value_name = "SANDBOX", required = true)]
    ids: Vec<SandboxId>,
    /// Keep the disk and not the memory: less to store, and it boots when it is resumed, without its processes
    #[arg(long)]
    disk_only: bool,
}

/// Flags of `sandbox resume`.
#[derive(Debug, clap::Args)]
pub(super) struct ResumeArguments {
    /// Which ones
    #[arg(value_name = "SANDBOX", required = true)]
    ids: Vec<SandboxId>,
    /// Seconds without activity until its time is over; as before when absent
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
}

/// Flags of `sandbox fork`.
#[derive(Debug, clap::Args)]
pub(super) struct ForkArguments {
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// How many copies
    #[arg(long, short = 'n', default_value_t = 1)]
    count: i64,
    /// Name and value to find the copies by; those of the original when absent
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Variable of every command's environment
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Seconds without activity until the time of a copy is over; as for the original when absent
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    /// Print only the ids
    #[arg(long, short)]
    quiet: bool,
}

/// Flags of `sandbox rollback`.
#[derive(Debug, clap::Args)]
pub(super) struct RollbackArguments {
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// The name or the id of the snapshot
    snapshot: String,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct NetworkArguments {
    /// IPv4 network that it may reach, and then nothing else; may be repeated
    #[arg(long, value_name = "CIDR")]
    allow_cidr: Vec<String>,
    /// IPv4 network that it may not reach; may be repeated
    #[arg(long, value_name = "CIDR")]
    deny_cidr: Vec<String>,
    /// Domain (or `*.` and a domain, for all below) that it may reach, on TCP ports 80 and 443, and then nothing
    /// else; may be repeated
    #[arg(long, value_name = "DOMAIN")]
    allow_domain: Vec<String>,
    /// Domain (or `*.` and a domain) that is not resolved and that no connection to ports 80 and 443 may name; may be
    /// repeated
    #[arg(long, value_name = "DOMAIN")]
    deny_domain: Vec<String>,
    /// Server that is asked for names; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Millions of bits per second that it may send
    #[arg(long, value_name = "MBPS")]
    egress_mbps: Option<i64>,
    /// Millions of bits per second that it may receive
    #[arg(long, value_name = "MBPS")]
    ingress_mbps: Option<i64>,
}

impl NetworkArguments {
    /// The request, or none where nothing was said.
    pub(super) fn request(&self) -> Option<Network> {
        let list = |entries: &Vec<String>| (!entries.is_empty()).then(|| entries.clone());
        let network = Network {
            allow_internet_access: None,
            allow_cidrs: list(&self.allow_cidr),
            deny_cidrs: list(&self.deny_cidr),
            allow_domains: list(&self.allow_domain),
            deny_domains: list(&self.deny_domain),
            dns_servers: list(&self.dns),
            egress_mbps: self.egress_mbps,
            ingress_mbps: self.ingress_mbps,
        };
        (network != Network::default()).then_some(network)
    }
}

/// Flags of `sandbox network`.
#[derive(Debug, clap::Args)]
pub(super) struct NetworkCommand {
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    #[command(flatten)]
    rules: NetworkArguments,
    /// Let it reach nothing
    #[arg(long, conflicts_with = "internet")]
    no_internet: bool,
    /// Let it reach the internet, within the other flags
    #[arg(long)]
    internet: bool,
}

/// Flags of `sandbox timeout`.
#[derive(Debug, clap::Args)]
pub(super) struct TimeoutCommand {
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// Seconds without activity until its time is over; 0 means never
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    #[command(flatten)]
    actions: TimeoutArguments,
}

/// What is done when the time of a sandbox is over.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct TimeoutArguments {
    /// What to do after the timeout
    #[arg(long, value_enum)]
    pub(super) on_timeout: Option<Action>,
    /// A time at which its time is over whatever happens, such as 2030-01-01T00:00:00Z, or never
    #[arg(long, value_name = "TIME")]
    pub(super) deadline: Option<String>,
    /// What to do at the deadline
    #[arg(long, value_enum)]
    pub(super) deadline_action: Option<Action>,
    /// Whether a command, a file or a terminal resumes it when it is paused
    #[arg(long, value_name = "YES", num_args = 0..=1, default_missing_value = "true")]
    pub(super) auto_resume: Option<bool>,
}

/// Does the same to several; one failure is enough to fail, and the others still go on.
async fn each(
    ids: Vec<SandboxId>,
    output: Output,
    verb: &str,
    mut change: impl AsyncFnMut(&SandboxId) -> Result<Sandbox, ClientError>,
) -> Result<u8, Failure> {
    let (mut changed, mut failed) = (Vec::new(), None);
    for id in ids {
        match change(&id).await {
            Ok(sandbox) => changed.push(sandbox),
            Err(error) => {
                let failure =
                    Failure::new(1, anyhow::Error::new(error).context(format!("cannot {verb} {id}")));
                if let Some(earlier) = failed.replace(failure) {
                    earlier.report(output);
                }
            }
        }
    }
    if output.is_json() {
        output.json(&changed)?;
    } else if !changed.is_empty() {
        output.line(&rows(&changed))?;
    }
    failed.map_or(Ok(0), Err)
}

impl PauseArguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let request = PauseRequest { memory: self.disk_only.then_some(false) };
        each(self.ids, output, "pause", async |id| client.pause(id, &request).await).await
    }
}

impl ResumeArguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let request = ResumeRequest { timeout_sec: self.timeout };
        each(self.ids, output, "resume", async |id| client.resume(id, &request).await).await
    }
}

impl ForkArguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let map =
            |pairs: Vec<(String, String)>| Some(BTreeMap::from_iter(pairs)).filter(|map| !map.is_empty());
        let request = ForkRequest {
            count: Some(self.count),
            metadata: map(self.metadata),
            envs: map(self.env),
            timeout_sec: self.timeout,
            ..ForkRequest::default()
        };
        let children = client.fork(&self.id, &request).await?;
        if output.is_json() {
            output.json(&children)?;
        } else if self.quiet {
            for child in &children {
                output.line(child.id.as_str())?;
            }
        } else {
            output.line(&rows(&children))?;
        }
        Ok(0)
    }
}

impl RollbackArguments {
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let sandbox = client.rollback(&self.id, &self.snapshot).await?;
        if output.is_json() {
            output.json(&sandbox)?;
        } else {
            output.line(&rows(&[sandbox]))?;
        }
        Ok(0)
    }
}

impl NetworkCommand {
    /// Without a flag it shows; with one it sets all, and what is not said gets its default.
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let internet = if self.no_internet { Some(false) } else { self.internet.then_some(true) };
        let network = match (self.rules.request(), internet) {
            (None, None) => client.network(&self.id).await?,
            (rules, internet) => {
                let network = Network { allow_internet_access: internet, ..rules.unwrap_or_default() };
                client.set_network(&self.id, &network).await?
            }
        };
        if output.is_json() {
            output.json(&network)?;
            return Ok(0);
        }
        let list = |entries: Option<Vec<String>>| {
            let entries = entries.unwrap_or_default();
            if entries.is_empty() { "-".to_owned() } else { entries.join(" ") }
        };
        let rate = |mbps: Option<i64>| match mbps.unwrap_or(0) {
            0 => "no limit".to_owned(),
            mbps => format!("{mbps} Mbit/s"),
        };
        let internet = if network.allow_internet_access.unwrap_or(true) { "allowed" } else { "no" };
        let lines = [
            ["internet".to_owned(), internet.to_owned()],
            ["allowed networks".to_owned(), list(network.allow_cidrs)],
            ["denied networks".to_owned(), list(network.deny_cidrs)],
            ["allowed domains".to_owned(), list(network.allow_domains)],
            ["denied domains".to_owned(), list(network.deny_domains)],
            ["name servers".to_owned(), list(network.dns_servers)],
            ["sends".to_owned(), rate(network.egress_mbps)],
            ["receives".to_owned(), rate(network.ingress_mbps)],
        ];
        output.line(&table(["FIELD", "VALUE"], lines))?;
        Ok(0)
    }
}

impl TimeoutCommand {
    /// Without a flag it shows; with one it changes that.
    pub(super) async fn execute(self, client: &Client, output: Output) -> Result<u8, Failure> {
        let request = TimeoutRequest {
            timeout_sec: self.timeout,
            on_timeout: self.actions.on_timeout.map(Into::into),
            deadline: self.actions.deadline,
            deadline_action: self.actions.deadline_action.map(Into::into),
            auto_resume: self.actions.auto_resume,
        };
        let sandbox = if request == TimeoutRequest::default() {
            client.get(&self.id).await?
        } else {
            client.set_timeout(&self.id, &request).await?
        };
        show(&sandbox, output)
    }
}
