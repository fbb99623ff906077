//! `wrenn doctor`: whether this host has what production needs, and what to do where it does not.
//!
//! The checks are the host agent's ([`wrenn_host_agent::doctor`]), and so is the form of the JSON.

use std::net::SocketAddr;

use camino::Utf8PathBuf;
use wrenn_host_agent::{
    config::{DiskDriver, VmmDriver},
    doctor::{self, IdRange, Outcome, Report, Target, Tree},
};

use super::{failure::Failure, output::Output};

/// Production must not start here.
pub(super) const NOT_FIT: u8 = 3;

/// Flags of `wrenn doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the report as one line of JSON, as --output json does
    #[arg(long)]
    json: bool,
    /// Change what is safe to change, until the next boot: settings of the running kernel, and modules that are there
    #[arg(long)]
    fix: bool,
    /// Directory of the data of the stack; it need not be there yet
    #[arg(long, env = super::DIRECTORY_VARIABLE, default_value = "/var/lib/wrenn")]
    data_dir: Utf8PathBuf,
    /// The virtual machine monitor
    #[arg(long, env = "WRENN_VMM", value_enum, default_value_t = VmmDriver::Firecracker)]
    vmm: VmmDriver,
    /// How root disks are to be kept; when not given, as is usual for the virtual machine monitor
    #[arg(long, env = "WRENN_DISKS", value_enum)]
    disks: Option<DiskDriver>,
    /// The Firecracker to run instead of the one on the PATH
    #[arg(long, env = "WRENN_FIRECRACKER")]
    firecracker: Option<Utf8PathBuf>,
    /// Its jailer, instead of the one beside it or on the PATH
    #[arg(long, env = "WRENN_JAILER")]
    jailer: Option<Utf8PathBuf>,
    /// User ids for machines, FIRST-LAST
    #[arg(long, env = "WRENN_UIDS", value_name = "RANGE", default_value_t = doctor::UIDS)]
    uids: IdRange,
    /// Address that the public API is to have
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
}

impl Arguments {
    pub(super) async fn execute(self, output: Output) -> Result<u8, Failure> {
        let (is_json, fix) = (self.json || output.is_json(), self.fix);
        let (tree, target) = (Tree::host(), self.target());
        let report = match fix {
            true => doctor::examine_and_fix(&tree, &target).await,
            false => doctor::examine(&tree, &target).await,
        };
        let report = report.map_err(|error| Failure::new(1, error))?;
        match is_json {
            true => output.json(&report)?,
            false => output.line(&text(&report, fix))?,
        }
        Ok(if report.production { 0 } else { NOT_FIT })
    }

    fn target(self) -> Target {
        let port = self.listen.port();
        Target {
            disks: self.disks,
            firecracker: self.firecracker,
            jailer: self.jailer,
            uids: self.uids,
            ports: (port != 0).then_some(port).into_iter().collect(),
            ..Target::new(self.vmm, self.data_dir)
        }
    }
}

/// The report for people: a line for each check, what to do below it, and what it comes to at the end.
fn text(report: &Report, was_fixed: bool) -> String {
    let width = report.findings.iter().map(|finding| finding.name.len()).max().unwrap_or_default();
    let mut lines = Vec::new();
    for finding in &report.findings {
        lines.push(format!("{:<8}{:<width$}  {}", finding.outcome.word(), finding.name, finding.seen));
        let can_fix = if finding.fixes.is_empty() || was_fixed { "" } else { " (--fix does it)" };
        lines.extend(
            finding
                .remedy
                .iter()
                .map(|remedy| format!("{:>width$}  → {remedy}{can_fix}", "", width = width + 8)),
        );
    }
    lines.push(String::new());
    for fix in &report.fixes {
        lines.push(match (&fix.undo, &fix.error) {
            (_, Some(error)) => format!("not done, for {}: {}: {error}", fix.name, fix.change),
            (undo, None) => {
                let undo = undo.as_deref().unwrap_or_default();
                format!("done, for {}, until the next boot: {} (to undo: {undo})", fix.name, fix.change)
            }
        });
    }
    let advice = report.findings.iter().filter(|finding| finding.outcome == Outcome::Advice).count();
    lines.push(match report.blocking().count() {
        0 => format!("Production may start here; pieces of advice: {advice}."),
        blocking => {
            format!("Production must not start here; reasons: {blocking}, pieces of advice: {advice}.")
        }
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use wrenn_host_agent::doctor::{Finding, Fix, Fixed};

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn flags_say_what_is_to_run() {
        let parse = |words: &[&str]| Line::try_parse_from([&["doctor"], words].concat());
        let target = parse(&["--data-dir", "/data", "--uids", "7-9", "--listen", "127.0.0.1:80"]).unwrap();
        let target = target.arguments.target();
        assert_eq!((target.data_dir.as_str(), target.uids.to_string().as_str()), ("/data", "7-9"));
        assert_eq!(target.ports, [80]);
        assert!(parse(&["--listen", "127.0.0.1:0"]).unwrap().arguments.target().ports.is_empty());
        assert!(parse(&["--uids", "9-7"]).is_err());
    }

    fn finding(name: &'static str, outcome: Outcome, remedy: Option<&str>, fixes: Vec<Fix>) -> Finding {
        let blocks = outcome == Outcome::Failure;
        Finding { name, outcome, blocks, seen: "seen".to_owned(), remedy: remedy.map(str::to_owned), fixes }
    }

    #[test]
    fn people_read_what_to_do() {
        let fix = Fix::Set { path: "/a", value: "2" };
        let findings = vec![
            finding("kernel", Outcome::Ok, None, vec![]),
            finding("ksm", Outcome::Failure, Some("turn it off"), vec![fix.clone()]),
        ];
        let mut report = Report { schema: 1, production: false, findings, fixes: vec![] };
        let wanted = "ok      kernel  seen\nfailure ksm     seen\n                → turn it off (--fix does it)\n\n\
                      Production must not start here; reasons: 1, pieces of advice: 0.";
        assert_eq!(text(&report, false), wanted);
        report.findings.pop();
        let fixed = |undo: Option<&str>, error: Option<&str>| Fixed {
            name: "ksm",
            change: fix.command(),
            undo: undo.map(str::to_owned),
            error: error.map(str::to_owned),
        };
        report.fixes = vec![fixed(Some("echo 1 > /a"), None), fixed(None, Some("denied"))];
        let wanted = "ok      kernel  seen\n\n\
                      done, for ksm, until the next boot: echo 2 > /a (to undo: echo 1 > /a)\n\
                      not done, for ksm: echo 2 > /a: denied\n\
                      Production may start here; pieces of advice: 0.";
        assert_eq!(text(&report, true), wanted);
    }
}
