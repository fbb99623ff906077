//! The text that Prometheus reads, format 0.0.4. Pure: from a view of everything to a text.
//!
//! The only label with many values is `sandbox`, of which there are as many as sandboxes here; no text of a user's
//! is in a label.

use std::fmt::Write as _;

use wrenn_types::SandboxId;

use super::{
    meter::Counters,
    operations::{BUCKETS_MS, Counted},
};
use crate::scrub::Counted as Scrubbed;

/// What the format is called in a `Content-Type`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All that is told, as it is at one moment.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// What the agent is: names and values of labels.
    pub agent: Vec<(&'static str, String)>,
    /// What of a machine the host limits, and what it does not.
    pub limits: Vec<(&'static str, bool)>,
    /// How many sandboxes are in each state.
    pub sandboxes: Vec<(&'static str, u64)>,
    /// How many network slots are in a sandbox's hands.
    pub slots_used: u64,
    /// How many are made ahead.
    pub slots_ready: u64,
    /// Memory that was promised to the machines that there are.
    pub memory_promised_bytes: u64,
    /// What the snapshots take of the disk, those of paused sandboxes included.
    pub snapshot_bytes: u64,
    /// How many operations there were.
    pub operations: Vec<Counted>,
    /// What was looked after on disk.
    pub scrubbed: Scrubbed,
    /// What each sandbox uses.
    pub each: Vec<(SandboxId, Counters)>,
}

/// A value of a sample.
#[derive(Debug, Clone, Copy)]
enum Number {
    Whole(u64),
    Micros(u64),
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // A write to a text does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: Number) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"");
            for character in value.chars() {
                match character {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = match value {
            Number::Whole(value) => writeln!(self.0, " {value}"),
            Number::Micros(value) => writeln!(self.0, " {}.{:06}", value / 1_000_000, value % 1_000_000),
        };
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], Number::Whole(value));
    }
}

/// Everything, as text.
#[must_use]
pub fn text(view: &View) -> String {
    let mut text = Text(String::with_capacity(4096 + view.each.len() * 512));
    text.family("wrenn_agent_info", "gauge", "What the agent is; the value is always 1.");
    let labels: Vec<_> = view.agent.iter().map(|(name, value)| (*name, value.as_str())).collect();
    text.sample("wrenn_agent_info", &labels, Number::Whole(1));
    let help = "Whether machines are limited by a control group of the host, by controller: 1 or 0.";
    text.family("wrenn_machines_limited", "gauge", help);
    for (controller, is_limited) in &view.limits {
        let value = Number::Whole((*is_limited).into());
        text.sample("wrenn_machines_limited", &[("controller", controller)], value);
    }
    text.family("wrenn_sandboxes", "gauge", "Sandboxes by state.");
    for (state, count) in &view.sandboxes {
        text.sample("wrenn_sandboxes", &[("state", state)], Number::Whole(*count));
    }
    text.family("wrenn_network_slots", "gauge", "Network slots that are in use, and that are made ahead.");
    for (state, count) in [("used", view.slots_used), ("ready", view.slots_ready)] {
        text.sample("wrenn_network_slots", &[("state", state)], Number::Whole(count));
    }
    let help = "Guest memory that was promised to the machines that there are.";
    text.gauge("wrenn_memory_promised_bytes", help, view.memory_promised_bytes);
    let help = "What snapshots take of the disk, paused sandboxes included; at most a minute old.";
    text.gauge("wrenn_snapshot_bytes", help, view.snapshot_bytes);
    operations(&mut text, &view.operations);
    scrubbed(&mut text, view.scrubbed);
    each(&mut text, &view.each);
    text.0
}

fn operations(text: &mut Text, all: &[Counted]) {
    let name = "wrenn_operation_duration_seconds";
    text.family(name, "histogram", "How long operations took that were done.");
    for counted in all {
        let operation = ("operation", counted.operation.word());
        let bucket = format!("{name}_bucket");
        for (bound, count) in BUCKETS_MS.iter().zip(counted.at_most) {
            // As few digits as there are: the label is the same in every version.
            let bound = format!("{}.{:03}", bound / 1000, bound % 1000);
            let bound = bound.trim_end_matches('0').trim_end_matches('.');
            text.sample(&bucket, &[operation, ("le", bound)], Number::Whole(count));
        }
        text.sample(&bucket, &[operation, ("le", "+Inf")], Number::Whole(counted.done));
        let micros = u64::try_from(counted.duration.as_micros()).unwrap_or(u64::MAX);
        text.sample(&format!("{name}_sum"), &[operation], Number::Micros(micros));
        text.sample(&format!("{name}_count"), &[operation], Number::Whole(counted.done));
    }
    text.family("wrenn_operations_failed_total", "counter", "Operations that failed.");
    for counted in all {
        let operation = ("operation", counted.operation.word());
        text.sample("wrenn_operations_failed_total", &[operation], Number::Whole(counted.failed));
    }
}

fn scrubbed(text: &mut Text, counted: Scrubbed) {
    let Scrubbed { looked, read_bytes, damaged, digests } = counted;
    for (name, help, count) in [
        ("wrenn_scrub_looked_total", "Snapshots, bases and layers that were read and found whole.", looked),
        ("wrenn_scrub_read_bytes_total", "Bytes that were read for that, and for digests.", read_bytes),
        ("wrenn_scrub_damaged_total", "How often one of them was found damaged.", damaged),
        ("wrenn_layer_digests_total", "Layers of disks of which the digest was taken.", digests),
    ] {
        text.family(name, "counter", help);
        text.sample(name, &[], Number::Whole(count));
    }
}

/// What one family says of a sandbox.
type Of = fn(&Counters) -> Number;

fn each(text: &mut Text, all: &[(SandboxId, Counters)]) {
    let families: [(&str, &str, &str, Of); 5] = [
        ("wrenn_sandbox_cpu_seconds_total", "counter", "Time for which its VMM had a CPU.", |counters| {
            Number::Micros(counters.cpu_micros)
        }),
        ("wrenn_sandbox_memory_bytes", "gauge", "Memory of the host that is only its own.", |counters| {
            Number::Whole(counters.memory_bytes)
        }),
        ("wrenn_sandbox_disk_bytes", "gauge", "What its disk takes of the host's.", |counters| {
            Number::Whole(counters.disk_bytes)
        }),
        ("wrenn_sandbox_network_sent_bytes_total", "counter", "Bytes that it sent.", |counters| {
            Number::Whole(counters.sent_bytes)
        }),
        ("wrenn_sandbox_network_received_bytes_total", "counter", "Bytes that it received.", |counters| {
            Number::Whole(counters.received_bytes)
        }),
    ];
    for (name, kind, help, of) in families {
        text.family(name, kind, help);
        for (id, counters) in all {
            text.sample(name, &[("sandbox", id.as_str())], of(counters));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::operations::{Operation, Operations};

    fn view() -> View {
        let operations = Operations::default();
        operations.done(Operation::Create, Duration::from_millis(120));
        operations.failed(Operation::Pause);
        let counted = Counters {
            cpu_micros: 1_250_000,
            sent_bytes: 10,
            received_bytes: 20,
            memory_bytes: 30,
            disk_bytes: 40,
        };
        View {
            agent: vec![("version", "1".to_owned()), ("vmm", "a \"b\" \\ \n".to_owned())],
            limits: vec![("cpu", true), ("io", false)],
            sandboxes: vec![("running", 1), ("paused", 2)],
            slots_used: 1,
            slots_ready: 8,
            memory_promised_bytes: 1 << 29,
            snapshot_bytes: 7,
            operations: operations.counted(),
            scrubbed: Scrubbed { looked: 3, read_bytes: 4, damaged: 2, digests: 1 },
            each: vec![("sb-00000001".parse().unwrap(), counted)],
        }
    }

    #[test]
    fn the_text_is_this() {
        let text = text(&view());
        for line in [
            r#"wrenn_agent_info{version="1",vmm="a \"b\" \\ \n"} 1"#,
            r#"wrenn_machines_limited{controller="cpu"} 1"#,
            r#"wrenn_machines_limited{controller="io"} 0"#,
            r#"wrenn_sandboxes{state="paused"} 2"#,
            r#"wrenn_network_slots{state="ready"} 8"#,
            "wrenn_memory_promised_bytes 536870912",
            "# TYPE wrenn_operation_duration_seconds histogram",
            r#"wrenn_operation_duration_seconds_bucket{operation="create",le="0.1"} 0"#,
            r#"wrenn_operation_duration_seconds_bucket{operation="create",le="0.25"} 1"#,
            r#"wrenn_operation_duration_seconds_bucket{operation="create",le="10"} 1"#,
            r#"wrenn_operation_duration_seconds_bucket{operation="create",le="+Inf"} 1"#,
            r#"wrenn_operation_duration_seconds_sum{operation="create"} 0.120000"#,
            r#"wrenn_operations_failed_total{operation="pause"} 1"#,
            "# TYPE wrenn_scrub_damaged_total counter",
            "wrenn_scrub_damaged_total 2",
            "wrenn_layer_digests_total 1",
            r#"wrenn_sandbox_cpu_seconds_total{sandbox="sb-00000001"} 1.250000"#,
            r#"wrenn_sandbox_network_received_bytes_total{sandbox="sb-00000001"} 20"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn every_sample_is_of_the_family_above_it() {
        let text = text(&view());
        let (mut family, mut families) = (String::new(), std::collections::BTreeSet::new());
        for line in text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                family = kind.split(' ').next().unwrap().to_owned();
                assert!(families.insert(family.clone()), "{family} is there twice");
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let suffix = name.strip_prefix(&family).unwrap_or("none");
                assert!(["", "_bucket", "_sum", "_count"].contains(&suffix), "{line}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
            }
        }
        assert!(text.ends_with('\n'));
    }
}
