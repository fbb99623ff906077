//! The SDK of npm: each `test("…")` of a file of `js/` is a test here.
//!
//! A file runs once, as one program, when the first of its tests is wanted; it reports in the Test Anything Protocol, and
//! each test takes its own part of the report.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

use libtest_mimic::{Completion, Failed, Trial};

use crate::{
    SOURCES,
    environment::{self, Said, bounded, environment, succeed},
};

/// The oldest Node.js that the SDK takes.
const OLDEST: [u32; 3] = [20, 18, 1];
const ENDING: &str = ".test.mjs";

/// What is known of a file's tests, by their names, once it has run.
type Report = HashMap<String, Outcome>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Passed,
    Skipped(String),
    /// With what was said about it.
    Failed(String),
}

pub(crate) fn trials(root: bool) -> Vec<Trial> {
    let why = cannot_run();
    if let Some(why) = &why {
        println!("skipped: {why}");
    }
    let mut files: Vec<PathBuf> = fs::read_dir(format!("{SOURCES}/js"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(ENDING))
        .collect();
    files.sort();
    let of_file = |file: PathBuf| {
        let report = Arc::new(OnceLock::new());
        let module = file.file_name().unwrap().to_string_lossy().replace(ENDING, "");
        let names = names(&fs::read_to_string(&file).unwrap());
        assert!(!names.is_empty(), "there are no tests in {}", file.display());
        let trials = names.clone().into_iter().map(move |name| {
            let (report, file, names) = (Arc::clone(&report), file.clone(), names.clone());
            let shown = format!("sdk::npm::{module}::{}", name.replace(' ', "_"));
            Trial::ignorable_test(shown, move || {
                let report: &Result<Report, String> = report.get_or_init(|| run(&file, &names));
                match report.as_ref()?.get(&name) {
                    Some(Outcome::Passed) => Ok(Completion::Completed),
                    Some(Outcome::Skipped(why)) => Ok(Completion::ignored_with(why)),
                    Some(Outcome::Failed(said)) => Err(said.into()),
                    None => Err("the file's report does not have this test".into()),
                }
            })
        });
        trials.collect::<Vec<_>>()
    };
    let ignored = why.is_some() || !root;
    files.into_iter().flat_map(of_file).map(|trial| trial.with_ignored_flag(ignored)).collect()
}

/// Why the SDK of npm cannot be used here.
fn cannot_run() -> Option<String> {
    let oldest = OLDEST.map(|number| number.to_string()).join(".");
    let Ok(version) = environment::version("node") else {
        return Some("the SDK of npm needs Node.js".to_owned());
    };
    let numbers: Vec<u32> = version.trim_start_matches('v').split('.').flat_map(str::parse).collect();
    if numbers.as_slice() < OLDEST.as_slice() {
        return Some(format!("the SDK of npm needs Node.js {oldest}, and this is {version}"));
    }
    environment::version("npm")
        .is_err()
        .then(|| "the SDK of npm is installed with npm, which is missing".to_owned())
}

/// The names of a file's tests: each stands after `test("` at the beginning of a line.
fn names(source: &str) -> Vec<String> {
    let tests = source.lines().filter_map(|line| line.strip_prefix("test(\"")?.split_once('"'));
    tests.map(|(name, _)| name.to_owned()).collect()
}

/// Runs a file. Its tests have to be the ones that were found in it.
fn run(file: &Path, names: &[String]) -> Result<Report, String> {
    let modules = modules().map_err(|error| format!("no SDK: {}", error.message().unwrap_or_default()))?;
    let state = environment::temporary(&file.file_name().unwrap_or_default().to_string_lossy());
    // The agent's users have to walk to their home.
    let made = fs::create_dir_all(&state)
        .and_then(|()| fs::set_permissions(&state, fs::Permissions::from_mode(0o755)));
    made.map_err(|error| error.to_string())?;
    let mut command = Command::new("node");
    command
        .arg("--test-reporter=tap")
        .arg(file)
        .env("ENVD", env!("CARGO_BIN_EXE_envd"))
        .env("MODULES", modules)
        .env("STATE", &state);
    let said = bounded(command);
    // What is left is in the build directory.
    let _ = fs::remove_dir_all(state);
    let Said { success, text } = said.map_err(|error| error.message().unwrap_or_default().to_owned())?;
    let report = read(&text);
    let unknown = report.keys().find(|name| !names.contains(name));
    let failed = report.values().any(|outcome| matches!(outcome, Outcome::Failed(_)));
    match unknown {
        Some(name) => Err(format!("{name:?} is not among the tests that were found")),
        // Whatever failed outside of a test.
        None if !success && !failed => Err(text),
        None => Ok(report),
    }
}

/// Reads what `node` reports: a line for each test, and below it, indented, what is said about it.
fn read(text: &str) -> Report {
    let mut report = Report::new();
    let mut failing: Option<String> = None;
    for line in text.lines() {
        let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => {
                if let Some(Outcome::Failed(said)) = failing.as_ref().and_then(|name| report.get_mut(name)) {
                    said.push_str(line);
                    said.push('\n');
                }
                continue;
            }
        };
        let Some((_, name)) = rest.split_once(" - ") else { continue };
        let (name, skipped) = match name.split_once(" # SKIP") {
            Some((name, why)) => (name, Some(why.trim().to_owned())),
            None => (name, None),
        };
        let outcome = match (passed, skipped) {
            (_, Some(why)) => Outcome::Skipped(why),
            (true, None) => Outcome::Passed,
            (false, None) => Outcome::Failed(String::new()),
        };
        failing = (!passed).then(|| name.to_owned());
        report.insert(name.to_owned(), outcome);
    }
    report
}

/// The directory with the SDK's `node_modules`. Everything in it is pinned by its digest; nothing of it runs when it is
/// installed.
fn modules() -> Result<PathBuf, Failed> {
    let pinned = ["package.json", "package-lock.json"];
    let contents = pinned.map(|file| fs::read(format!("{SOURCES}/js/{file}")));
    let [package, lock] = contents;
    environment("node", &[b"1\n", &package?, &lock?], |made| {
        fs::create_dir_all(made)?;
        for file in pinned {
            fs::copy(format!("{SOURCES}/js/{file}"), made.join(file))?;
        }
        let mut command = Command::new("npm");
        command
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--silent"])
            .current_dir(made);
        succeed(command).map(drop)
    })
}
