//! bench/SOAK.md: what each long test last said of its full count. Pure.

use std::collections::BTreeMap;

const HEADER: &str = "# Soak runs\n\nThe last full count of each long test, by `make soak`. A run of some of the tests \
                      replaces only their lines.\n";

/// A run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    /// What was built.
    pub(crate) commit: &'a str,
    /// Which tests, as arguments of cargo; empty for all.
    pub(crate) arguments: &'a [String],
    /// How many passed, failed and were skipped.
    pub(crate) counts: String,
    /// What the long ones said.
    pub(crate) said: &'a [String],
}

/// What a line is about: its words before the first comma.
fn subject(line: &str) -> &str {
    line.split(',').next().unwrap_or(line)
}

/// The page after a run, from the one before it.
pub(crate) fn after(before: &str, run: &Run<'_>) -> String {
    let known = before.lines().filter_map(|line| line.strip_prefix("- "));
    let mut lines: BTreeMap<&str, String> = known.map(|line| (subject(line), line.to_owned())).collect();
    for line in run.said {
        lines.insert(subject(line), format!("{line} (commit {})", run.commit));
    }
    let tests = match run.arguments {
        [] => "all tests".to_owned(),
        some => format!("`{}`", some.join(" ")),
    };
    let mut page = format!("{HEADER}\nLast run: commit {}, {tests}: {}.\n\n", run.commit, run.counts);
    page.extend(lines.values().map(|line| format!("- {line}\n")));
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_some_tests_replaces_only_their_lines() {
        let said = ["kills, 200, nothing lost".to_owned(), "cycles, 500, all the same".to_owned()];
        let run = Run { commit: "aaa", arguments: &[], counts: "9 passed".to_owned(), said: &said };
        let first = after("", &run);
        let said = ["cycles, 600, all the same".to_owned()];
        let run = Run {
            commit: "bbb",
            arguments: &["-p".to_owned(), "x".to_owned()],
            counts: "1 passed".to_owned(),
            said: &said,
        };
        let second = after(&first, &run);
        assert!(second.starts_with(HEADER));
        let lines: Vec<_> = second.lines().skip(4).collect();
        let expected = [
            "Last run: commit bbb, `-p x`: 1 passed.",
            "",
            "- cycles, 600, all the same (commit bbb)",
            "- kills, 200, nothing lost (commit aaa)",
        ];
        assert_eq!(lines, expected);
    }
}
