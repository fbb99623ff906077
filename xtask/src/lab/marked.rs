//! Tests that are marked for the lab, and what becomes of them there.
//!
//! A package marks tests of its own in its manifest: under the name of a test program (`lib` and `bin` for the unit tests
//! of a library and of a program, else the name of a file in `tests/`) the beginnings of the names of tests. An empty
//! beginning is all of them. Beside that it names what its tests need of the repository's directory, where that is there.
//!
//! ```toml
//! [package.metadata.wrenn.lab]
//! lib = ["cgroup::tests::"]
//! lab = [""]
//! [package.metadata.wrenn]
//! lab-files = ["target/images/guest"]
//! ```
//!
//! ```text
//!  manifests ─► cargo test --no-run ─► programs ─► --list ─► names that are marked ─► one lab for all of them
//! ```
//!
//! Such a test is part of the ordinary run too, where it runs if the machine has what it needs and else is skipped; a test
//! that only means something in the lab is skipped wherever `WRENN_LAB` is not set. `make test` counts each test once.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write as _},
    iter,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use wrenn_lab::plan::Program;

use super::{Capacity, Event, Job, cannot_run, perform};
use crate::{repository::Repository, stack, step, test::Report};

/// The marks of a package: the beginnings of names, by test program.
type Marks = BTreeMap<String, Vec<String>>;

/// A test program of which some tests are marked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Marked {
    program: PathBuf,
    /// Of the package, in which cargo starts tests too.
    directory: PathBuf,
    beginnings: Vec<String>,
}

/// Runs the marked tests among those that the arguments select, and says how they ended; none without any.
pub(crate) fn run(
    repository: &Repository,
    for_cargo: &[String],
    for_tests: &[String],
) -> Result<Option<Report>> {
    let metadata = step::output(repository.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let marks = marks_of(&metadata)?;
    if marks.is_empty() {
        return Ok(None);
    }
    let (marked, mut with) = build(repository, for_cargo, &marks)?;
    let mut programs = Vec::new();
    let files = files_of(&metadata, marked.iter().map(|marked| marked.directory.as_path()))?;
    with.extend(files.iter().map(|file| repository.path(file)).filter(|file| file.exists()));
    for Marked { program, directory, beginnings } in marked {
        let listed = list(&program, for_tests)?;
        let names = select(&listed, &beginnings);
        let calls = if names == listed && !names.is_empty() {
            // All that there is: one call, whatever its `main` takes.
            vec![for_tests.to_vec()]
        } else {
            let exactly = |names: Vec<String>| iter::once("--exact".to_owned()).chain(names).collect();
            calls(names, |names| takes_all(&program, names)).into_iter().map(exactly).collect()
        };
        for call in calls {
            let mut arguments = vec!["--show-output".to_owned()];
            arguments.extend(call);
            programs.push(Program { path: program.clone(), arguments, directory: directory.clone() });
        }
    }
    if programs.is_empty() {
        return Ok(None);
    }
    let capacity = Capacity::usual(repository)?;
    if let Some(why) = cannot_run(capacity.memory_mib) {
        println!("skipped the lab: {why}");
        return Ok(None);
    }
    step::announce("running the tests that are marked for the lab, in it");
    let job = Job { programs, with, capacity, output: repository.target().join("lab") };
    follow(repository, &job).map(Some)
}

fn follow(repository: &Repository, job: &Job) -> Result<Report> {
    let mut report = Report::default();
    let mut line = Vec::new();
    let exits = perform(repository, job, &mut |event| {
        match event {
            Event::Ready { after, .. } => {
                step::announce(&format!("the lab is up after {:.1} s", after.as_secs_f64()));
            }
            Event::ErrorOutput(bytes) => io::stderr().write_all(bytes)?,
            Event::Output(bytes) => {
                for byte in *bytes {
                    if *byte != b'\n' {
                        line.push(*byte);
                        continue;
                    }
                    if let Some(shown) = report.line(&String::from_utf8_lossy(&line)) {
                        println!("{shown}");
                    }
                    line.clear();
                }
            }
        }
        Ok(())
    });
    let is_good = match exits {
        Ok(exits) => exits.iter().all(|exit| exit.code() == 0),
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            false
        }
    };
    if !is_good {
        report.note_failure();
    }
    Ok(report)
}

/// The marks by manifest, from what `cargo metadata` says.
fn marks_of(metadata: &str) -> Result<BTreeMap<PathBuf, Marks>> {
    let metadata: Value = serde_json::from_str(metadata).context("reading what cargo metadata says")?;
    let mut all = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let marks = &package["metadata"]["wrenn"]["lab"];
        let Some(manifest) = package["manifest_path"].as_str().filter(|_| !marks.is_null()) else { continue };
        let marks: Marks = serde_json::from_value(marks.clone()).with_context(|| {
            format!("reading {manifest}: `metadata.wrenn.lab` is a table of lists of texts")
        })?;
        all.insert(PathBuf::from(manifest), marks);
    }
    Ok(all)
}

/// What the packages in these directories need, from what `cargo metadata` says.
fn files_of<'a>(metadata: &str, directories: impl Iterator<Item = &'a Path>) -> Result<BTreeSet<String>> {
    let metadata: Value = serde_json::from_str(metadata).context("reading what cargo metadata says")?;
    let directories: BTreeSet<&Path> = directories.collect();
    let mut all = BTreeSet::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let files = &package["metadata"]["wrenn"]["lab-files"];
        if files.is_null() || !manifest.parent().is_some_and(|directory| directories.contains(directory)) {
            continue;
        }
        let files: Vec<String> = serde_json::from_value(files.clone()).with_context(|| {
            format!("reading {}: `metadata.wrenn.lab-files` is a list of paths", manifest.display())
        })?;
        all.extend(files);
    }
    Ok(all)
}

/// Builds what the arguments select, as the ordinary run does next, and gives the marked test programs, and the
/// programs of their packages, which tests call.
fn build(
    repository: &Repository,
    for_cargo: &[String],
    marks: &BTreeMap<PathBuf, Marks>,
) -> Result<(Vec<Marked>, Vec<PathBuf>)> {
    let mut command = repository.cargo();
    command.args(["test", "--no-run", "--message-format", "json-render-diagnostics"]).args(for_cargo);
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("starting cargo test")?;
    ensure!(output.status.success(), "the tests do not compile");
    let text = String::from_utf8(output.stdout).context("cargo wrote what is not text")?;
    artifacts(&text, marks)
}

fn artifacts(text: &str, marks: &BTreeMap<PathBuf, Marks>) -> Result<(Vec<Marked>, Vec<PathBuf>)> {
    let (mut marked, mut programs) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("reading what cargo says")?;
        let (Some(program), Some(manifest)) =
            (message["executable"].as_str(), message["manifest_path"].as_str())
        else {
            continue;
        };
        let manifest = Path::new(manifest);
        let (Some(marks), Some(directory)) = (marks.get(manifest), manifest.parent()) else { continue };
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        if message["profile"]["test"] != Value::Bool(true) {
            programs.push(PathBuf::from(program));
            continue;
        }
        let name = if kind == "test" { message["target"]["name"].as_str().unwrap_or_default() } else { kind };
        if let Some(beginnings) = marks.get(name) {
            marked.push(Marked {
                program: program.into(),
                directory: directory.to_owned(),
                beginnings: beginnings.clone(),
            });
        }
    }
    Ok((marked, programs))
}

/// The names of a program's tests, of those that the arguments select.
fn list(program: &Path, for_tests: &[String]) -> Result<Vec<String>> {
    let text = step::output(Command::new(program).args(for_tests).args(["--list", "--format", "terse"]))?;
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// Whether a program takes several names of tests: one whose `main` is its own may take only one.
fn takes_all(program: &Path, names: &[String]) -> bool {
    let mut command = Command::new(program);
    let listed = command.args(["--list", "--format", "terse", "--exact"]).args(names).output();
    listed.is_ok_and(|listed| listed.status.success())
}

/// The names, by calls of their program: all at once if it takes them, else one by one.
fn calls(names: Vec<String>, takes_all: impl Fn(&[String]) -> bool) -> Vec<Vec<String>> {
    match names.len() {
        0 => Vec::new(),
        1 => vec![names],
        _ if takes_all(&names) => vec![names],
        _ => names.into_iter().map(|name| vec![name]).collect(),
    }
}

fn select(names: &[String], beginnings: &[String]) -> Vec<String> {
    let is_marked = |name: &&String| beginnings.iter().any(|beginning| name.starts_with(beginning.as_str()));
    names.iter().filter(is_marked).cloned().collect()
}

/// All marked tests, or those of some packages, as a command of its own: 1 unless they passed.
pub(super) fn run_all(repository: &Repository, packages: &[String]) -> Result<u8> {
    let for_cargo = match packages {
        [] => vec!["--workspace".to_owned()],
        packages => packages.iter().flat_map(|name| ["--package".to_owned(), name.clone()]).collect(),
    };
    if let Some(why) = cannot_run(Capacity::usual(repository)?.memory_mib) {
        bail!("there can be no lab here: {why}");
    }
    // What the tests need, as before `make test`: images, and the program.
    stack::build(repository)?;
    let report = run(repository, &for_cargo, &[])?.context("no test of these is marked for the lab")?;
    println!("\n{report}");
    Ok(u8::from(!report.is_good()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> BTreeMap<PathBuf, Marks> {
        let metadata = r#"{"packages": [
            {"manifest_path": "/w/a/Cargo.toml", "metadata": {"wrenn": {"lab": {"lib": ["x::"], "lab": [""]}}}},
            {"manifest_path": "/w/b/Cargo.toml", "metadata": null},
            {"manifest_path": "/w/c/Cargo.toml", "metadata": {"other": 1}}
        ]}"#;
        marks_of(metadata).unwrap()
    }

    #[test]
    fn marks_are_read_from_manifests() {
        let marks = marks();
        assert_eq!(marks.len(), 1);
        let marks = &marks[Path::new("/w/a/Cargo.toml")];
        assert_eq!(marks["lib"], ["x::"]);
        assert_eq!(marks["lab"], [""]);
        let wrong =
            r#"{"packages": [{"manifest_path": "/m", "metadata": {"wrenn": {"lab": {"lib": "x"}}}}]}"#;
        assert!(marks_of(wrong).is_err());
    }

    #[test]
    fn files_are_those_of_packages_whose_tests_run() {
        let metadata = r#"{"packages": [
            {"manifest_path": "/w/a/Cargo.toml", "metadata": {"wrenn": {"lab-files": ["target/images/guest"]}}},
            {"manifest_path": "/w/b/Cargo.toml", "metadata": {"wrenn": {"lab-files": ["other"]}}},
            {"manifest_path": "/w/c/Cargo.toml", "metadata": null}
        ]}"#;
        let found = files_of(metadata, [Path::new("/w/a"), Path::new("/w/c")].into_iter()).unwrap();
        assert_eq!(found, BTreeSet::from(["target/images/guest".to_owned()]));
        let wrong = r#"{"packages": [{"manifest_path": "/w/a/Cargo.toml", "metadata": {"wrenn": {"lab-files": 1}}}]}"#;
        assert!(files_of(wrong, [Path::new("/w/a")].into_iter()).is_err());
    }

    #[test]
    fn programs_are_found_by_the_names_of_their_targets() {
        let message = |manifest: &str, kind: &str, name: &str, test: bool| {
            format!(
                r#"{{"manifest_path":"{manifest}","target":{{"kind":["{kind}"],"name":"{name}"}},"profile":{{"test":{test}}},"executable":"/t/{name}"}}"#
            )
        };
        let text = [
            message("/w/a/Cargo.toml", "lib", "crate_a", true),
            message("/w/a/Cargo.toml", "test", "lab", true),
            message("/w/a/Cargo.toml", "test", "other", true),
            message("/w/a/Cargo.toml", "bin", "tool", false),
            message("/w/b/Cargo.toml", "lib", "crate_b", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ]
        .join("\n");
        let (marked, programs) = artifacts(&text, &marks()).unwrap();
        let found: Vec<&Path> = marked.iter().map(|marked| marked.program.as_path()).collect();
        assert_eq!(found, [Path::new("/t/crate_a"), Path::new("/t/lab")]);
        assert!(marked.iter().all(|marked| marked.directory == Path::new("/w/a")));
        assert_eq!(programs, [Path::new("/t/tool")]);
    }

    #[test]
    fn a_program_that_takes_one_name_is_called_for_each() {
        let names = ["one", "two"].map(str::to_owned).to_vec();
        assert_eq!(calls(names.clone(), |_| true), std::slice::from_ref(&names));
        assert_eq!(calls(names, |_| false), [["one".to_owned()], ["two".to_owned()]]);
        assert_eq!(calls(vec!["one".to_owned()], |_| false).len(), 1);
        assert!(calls(Vec::new(), |_| true).is_empty());
    }

    #[test]
    fn names_are_selected_by_their_beginnings() {
        let names = ["x::one", "y::x::two", "three"].map(str::to_owned);
        assert_eq!(select(&names, &["x::".to_owned()]), ["x::one"]);
        assert_eq!(select(&names, &[String::new()]).len(), 3);
        assert_eq!(select(&names, &[]), [] as [&str; 0]);
    }
}
