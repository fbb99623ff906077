//! Rules of this repository that no other tool knows.
//!
//! Each rule is a pure function from a file's path and text to complaints. They look at what git tracks or
//! would track, so a rule is broken before it is committed.

use std::{
    fs,
    path::{Component, Path},
};

use anyhow::{Result, bail};

use crate::{debian, repository::Repository};

/// A file that a person can hold in mind. What is longer holds more than one idea.
const MAX_LINES: usize = 700;
/// Directories below which people keep clones: naming one of them says nothing about a machine.
const USUAL_PLACES: [&str; 7] = ["/home", "/opt", "/root", "/srv", "/tmp", "/usr", "/var"];

pub(crate) fn run(repository: &Repository) -> Result<()> {
    let files = repository.files()?;
    let rules = Rules { forbidden: forbidden(repository.root()) };
    let mut complaints = Vec::new();
    for path in files.split_terminator('\0') {
        let place = repository.path(path);
        // Removed but not yet committed, or a link, or not text: nothing to read.
        if place.is_symlink() {
            continue;
        }
        let Ok(content) = fs::read(&place) else { continue };
        let Ok(text) = String::from_utf8(content) else { continue };
        complaints.extend(rules.check(path, &text));
    }
    for complaint in &complaints {
        eprintln!("    {complaint}");
    }
    if complaints.is_empty() { Ok(()) } else { bail!("{} rules are broken", complaints.len()) }
}

/// Texts that only mean something on this machine: where the clone is, and whom it downloads from.
fn forbidden(root: &Path) -> Vec<String> {
    let mut forbidden = Vec::new();
    let usual = USUAL_PLACES.iter().any(|place| root.starts_with(place));
    let first = root.components().find(|component| matches!(component, Component::Normal(_)));
    if let Some(Component::Normal(first)) = first
        && !usual
    {
        forbidden.push(format!("/{}/", first.to_string_lossy()));
    }
    forbidden.extend(debian::source_hosts());
    forbidden
}

struct Rules {
    forbidden: Vec<String>,
}

impl Rules {
    fn check(&self, path: &str, text: &str) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut complain = |line: usize, what: String| complaints.push(format!("{path}:{line}: {what}"));

        let generated = path.ends_with(".lock") || path.starts_with("openapi/");
        let rust = path.ends_with(".rs");
        if rust && text.lines().count() > MAX_LINES {
            complain(MAX_LINES, format!("more than {MAX_LINES} lines"));
        }
        let tests = path.ends_with("tests.rs") || path.contains("/tests/");
        if rust && path.contains("/src/") && !tests && !text.starts_with("//!") {
            complain(1, "no module documentation at the top".to_owned());
        }
        if !text.is_empty() && !text.ends_with('\n') {
            complain(text.lines().count(), "no newline at the end".to_owned());
        }
        for (number, line) in text.split('\n').enumerate() {
            if line.ends_with([' ', '\t']) && !generated {
                complain(number + 1, "space at the end of the line".to_owned());
            }
            if line.contains('\r') {
                complain(number + 1, "carriage return".to_owned());
            }
            for text in self.forbidden.iter().filter(|text| line.contains(text.as_str())) {
                complain(number + 1, format!("{text} is of one machine"));
            }
            if rust && line.trim_start().starts_with("#[ignore") {
                complain(
                    number + 1,
                    "an ignored test: let it say `skipped: why` where it cannot run".to_owned(),
                );
            }
        }
        if path.ends_with("Cargo.toml") && path != "Cargo.toml" {
            for (number, complaint) in manifest(path, text) {
                complain(number, complaint.to_owned());
            }
        }
        complaints
    }
}

/// Versions and lints are the workspace's.
fn manifest(path: &str, text: &str) -> Vec<(usize, &'static str)> {
    let mut complaints = Vec::new();
    let mut section = "";
    let mut lints = false;
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            section = line;
            lints |= line.starts_with("[lints");
        } else if section.ends_with("dependencies]")
            && line.contains('=')
            && !line.contains("workspace = true")
        {
            complaints.push((number + 1, "a dependency's version belongs into the workspace's Cargo.toml"));
        }
    }
    if !lints && !path.starts_with("fuzz/") {
        complaints.push((1, "no [lints] section"));
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str) -> Vec<String> {
        Rules { forbidden: vec!["/builder/".to_owned(), "mirror.test".to_owned()] }.check(path, text)
    }

    #[test]
    fn good_files_pass() {
        assert_eq!(check("crates/a/src/lib.rs", "//! A.\n\npub fn a() {}\n"), Vec::<String>::new());
        assert_eq!(check("README.md", "# Wrenn\n"), Vec::<String>::new());
        let manifest =
            "[package]\nname = \"a\"\n[lints]\nworkspace = true\n[dependencies]\na.workspace = true\n";
        assert_eq!(check("crates/a/Cargo.toml", manifest), Vec::<String>::new());
    }

    #[test]
    fn bad_files_do_not() {
        for (path, text) in [
            ("crates/a/src/lib.rs", "pub fn a() {}\n"),
            ("crates/a/src/lib.rs", "//! A.\n#[ignore = \"slow\"]\nfn a() {}\n"),
            ("README.md", "no newline"),
            ("README.md", "space \n"),
            ("README.md", "carriage return\r\n"),
            ("docs/a.md", "see /builder/clone/a.rs\n"),
            ("docs/a.md", "from http://mirror.test/debian\n"),
            ("crates/a/Cargo.toml", "[lints]\nworkspace = true\n[dependencies]\na = \"1\"\n"),
            ("crates/a/Cargo.toml", "[package]\nname = \"a\"\n"),
        ] {
            assert_eq!(check(path, text).len(), 1, "{path}: {text}");
        }
        let long = format!("//! A.\n{}", "\n".repeat(MAX_LINES));
        assert_eq!(check("crates/a/src/lib.rs", &long).len(), 1);
    }
}
