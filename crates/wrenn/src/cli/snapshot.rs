//! `wrenn snapshot …`: create, list, rm.

use wrenn_api::{Template, TemplateKind};
use wrenn_types::SandboxId;

use super::{
    failure::Failure,
    output::{Output, table},
};
use crate::client::Client;

/// What to do with snapshots.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make a snapshot of a sandbox, which goes on as it was
    Create(CreateArguments),
    /// List the snapshots, or all that sandboxes can start from
    #[command(visible_alias = "ls")]
    List(ListArguments),
    /// Delete snapshots; what was made from them goes on
    Rm {
        /// Their names or ids
        #[arg(value_name = "SNAPSHOT", required = true)]
        names: Vec<String>,
    },
}

/// Flags of `snapshot create`.
#[derive(Debug, clap::Args)]
pub(super) struct CreateArguments {
    /// Which sandbox
    #[arg(value_name = "SANDBOX")]
    id: SandboxId,
    /// The name of the snapshot; its id when absent
    name: Option<String>,
    /// Replace the snapshot that has the name
    #[arg(long, requires = "name")]
    overwrite: bool,
    /// Print only the name
    #[arg(long, short)]
    quiet: bool,
}

/// Flags of `snapshot list`.
#[derive(Debug, clap::Args)]
pub(super) struct ListArguments {
    /// The templates of the platform as well
    #[arg(long, short)]
    all: bool,
    /// Print only the names
    #[arg(long, short)]
    quiet: bool,
}

impl Command {
    pub(super) async fn execute(self, output: Output) -> Result<u8, Failure> {
        let client = super::client().map_err(|error| Failure::new(1, error))?;
        match self {
            Self::Create(arguments) => {
                let CreateArguments { id, name, overwrite, quiet } = arguments;
                let snapshot = client.snapshot(&id, name, overwrite).await?;
                if output.is_json() {
                    output.json(&snapshot)?;
                } else {
                    print(output, &[snapshot], quiet)?;
                }
            }
            Self::List(ListArguments { all, quiet }) => {
                let kind = (!all).then_some(TemplateKind::Snapshot);
                let templates = client.templates(kind).await?;
                if output.is_json() {
                    output.json(&templates)?;
                } else {
                    print(output, &templates, quiet)?;
                }
            }
            Self::Rm { names } => return remove(&client, names, output).await,
        }
        Ok(0)
    }
}

async fn remove(client: &Client, names: Vec<String>, output: Output) -> Result<u8, Failure> {
    let (mut removed, mut failed) = (Vec::new(), None);
    for name in names {
        match client.delete_snapshot(&name).await {
            Ok(()) => {
                if !output.is_json() {
                    output.line(&name)?;
                }
                removed.push(name);
            }
            // The others can still go; one failure is enough to fail.
            Err(error) => {
                let failure =
                    Failure::new(1, anyhow::Error::new(error).context(format!("cannot delete {name}")));
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

fn print(output: Output, templates: &[Template], quiet: bool) -> std::io::Result<()> {
    if quiet {
        return templates.iter().try_for_each(|template| output.line(&template.name));
    }
    let optional = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let rows = templates.iter().map(|template| {
        [
            template.name.clone(),
            match template.kind {
                TemplateKind::Base => "template".to_owned(),
                TemplateKind::Snapshot => "snapshot".to_owned(),
            },
            optional(template.sandbox_id.as_ref().map(ToString::to_string)),
            optional(template.vcpus.map(|vcpus| vcpus.to_string())),
            optional(template.memory_mb.map(|mib| format!("{mib} MiB"))),
            optional(template.size_bytes.map(|bytes| format!("{} MiB", bytes.div_ceil(1 << 20)))),
            optional(template.created_at.map(|time| time.to_string())),
        ]
    });
    output.line(&table(["NAME", "KIND", "OF", "VCPUS", "MEMORY", "SIZE", "CREATED"], rows))
}
