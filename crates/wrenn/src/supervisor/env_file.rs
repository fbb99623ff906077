//! `DIR/env`: plain `export` lines that a shell sources and the command line reads.

use std::fmt::Write as _;

/// The name of the base address.
pub const BASE_URL: &str = "WRENN_BASE_URL";
/// The name of the key.
pub const API_KEY: &str = "WRENN_API_KEY";

/// The name of the domain below which ports of sandboxes have their host names, with the port to connect to.
pub const PROXY_DOMAIN: &str = "WRENN_PROXY_DOMAIN";

/// The text of an env file.
#[must_use]
pub fn render(variables: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "export {name}={}", quote(value));
    }
    text
}

/// The value of a variable in the text of an env file; the last one counts, as in a shell.
///
/// Only what [`render`] writes is understood: `export NAME=value`, the value plain or in single quotes.
#[must_use]
pub fn lookup(text: &str, name: &str) -> Option<String> {
    text.lines()
        .rev()
        .find_map(|line| {
            let assignment = line.trim();
            let assignment = assignment.strip_prefix("export ").unwrap_or(assignment);
            let (found, value) = assignment.split_once('=')?;
            (found.trim() == name).then(|| unquote(value.trim()))
        })
        .filter(|value| !value.is_empty())
}

/// The value as a shell reads it back unchanged.
fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.:/@%+,=".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        value.to_owned()
    } else {
        format!("'{}'", value.replace('\'', r"'\''"))
    }
}

fn unquote(value: &str) -> String {
    match value.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
        Some(inner) => inner.replace(r"'\''", "'"),
        None => value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_file() {
        let text = render(&[(BASE_URL, "http://127.0.0.1:8000"), (API_KEY, "wrn_00")]);
        assert_eq!(text, "export WRENN_BASE_URL=http://127.0.0.1:8000\nexport WRENN_API_KEY=wrn_00\n");
        assert_eq!(lookup(&text, API_KEY).as_deref(), Some("wrn_00"));
        assert_eq!(lookup(&text, "WRENN"), None);
    }

    #[test]
    fn what_a_person_may_have_written() {
        let text = "# my stack\nWRENN_API_KEY=\"a\"\n  export WRENN_API_KEY='b c'\nWRENN_BASE_URL=\n";
        assert_eq!(lookup(text, API_KEY).as_deref(), Some("b c"));
        assert_eq!(lookup(text, BASE_URL), None);
    }

    proptest! {
        #[test]
        fn a_rendered_value_is_found_again(value in "[^\n\r]{1,40}") {
            prop_assume!(value.trim() == value);
            prop_assert_eq!(lookup(&render(&[("A", "x"), ("B", &value)]), "B"), Some(value));
        }

        #[test]
        fn a_shell_reads_the_same(value in "[ -~]{0,30}") {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("{}printf %s \"$A\"", render(&[("A", &value)]))])
                .output()
                .unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
        }
    }
}
