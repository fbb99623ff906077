//! Tables that several reports have. Pure.

use std::{fmt::Write as _, time::Duration};

use crate::{
    machine::Machine,
    statistics::{Samples, Summary},
};

/// What a reader has to know of a run: the lines before the machine, the machine, the lines after it.
pub fn write_about(
    text: &mut String,
    before: &[(&str, String)],
    machine: &Machine,
    after: &[(&str, String)],
) {
    let _ = writeln!(text, "| | |\n|---|---|");
    let rows = machine.rows();
    for (name, value) in before.iter().chain(&rows).chain(after) {
        let _ = writeln!(text, "| {name} | {value} |");
    }
}

/// The head of a table of [`write_samples`].
pub fn write_samples_head(text: &mut String) {
    let _ =
        writeln!(text, "| operation | count | failures | p50 | p99 | max |\n|---|---:|---:|---:|---:|---:|");
}

/// One row: how often, and how long in milliseconds.
pub fn write_samples(text: &mut String, name: &str, samples: &Samples) {
    let milliseconds = |duration: Duration| format!("{:.1}", duration.as_secs_f64() * 1000.0);
    let failures = samples.failures().len();
    let row = match samples.summary() {
        Some(Summary { count, p50, p99, max, .. }) => {
            [count.to_string(), failures.to_string(), milliseconds(p50), milliseconds(p99), milliseconds(max)]
        }
        None => ["0".to_owned(), failures.to_string(), "–".to_owned(), "–".to_owned(), "–".to_owned()],
    };
    let _ = writeln!(text, "| {name} | {} |", row.join(" | "));
}
