//! `make test`: all tests, with what they need, and a closing line that counts the skipped ones too.
//!
//! A test that cannot run on this machine prints a line `skipped: why` and returns. To cargo such a test has
//! passed, so its output is read here: each test that printed such a line counts as skipped, and is named.
//!
//! Tests that are marked for the lab run in it first, where there can be one ([`crate::lab::marked`]). One that passed
//! there is not counted again here, where it passes or is skipped.
//!
//! `make soak` runs the same tests with `WRENN_SOAK=1`, by which a test does its full count instead of a sample.
//! Such a test prints lines `soak: what, how often, seed, outcome`; they go to bench/SOAK.md. A test program whose output
//! nothing holds back prints them while it runs.

use std::{
    collections::BTreeSet,
    fmt, fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cache::Cache,
    dependencies, firecracker, lab,
    repository::Repository,
    soak_report::{self, Run},
    stack::{self, Product},
    step,
};

/// How many cases a property test tries in a soak run, unless the environment says otherwise.
const SOAK_CASES: &str = "5000";

/// Runs all tests, or those that the arguments name.
pub(crate) fn run(repository: &Repository, arguments: &[String]) -> Result<()> {
    let mut command = prepare(repository, arguments)?;
    let (for_cargo, for_tests) = split(arguments);
    let in_lab = lab::marked::run(repository, &for_cargo, for_tests)?;
    step::announce("running the tests");
    let mut report = Report::beside(in_lab);
    follow(&mut command, &mut report)?;
    conclude(repository, &report)
}

/// Runs all tests with their full counts and writes what they say about it to bench/SOAK.md.
pub(crate) fn soak(repository: &Repository, arguments: &[String]) -> Result<()> {
    // What is tested, not what is there hours later.
    let commit = step::output(
        Command::new("git").current_dir(repository.root()).args(["describe", "--always", "--dirty"]),
    )
    .unwrap_or_else(|_| "unknown".to_owned());
    let mut command = prepare(repository, arguments)?;
    command.env("WRENN_SOAK", "1");
    if std::env::var_os("PROPTEST_CASES").is_none() {
        command.env("PROPTEST_CASES", SOAK_CASES);
    }
    step::announce("running the tests");
    let mut report = Report::default();
    follow(&mut command, &mut report)?;
    let path = repository.path("bench/SOAK.md");
    let before = fs::read_to_string(&path).unwrap_or_default();
    let run = Run { commit: commit.trim(), arguments, counts: report.to_string(), said: &report.soak };
    fs::write(&path, soak_report::after(&before, &run))
        .with_context(|| format!("writing {}", path.display()))?;
    conclude(repository, &report)
}

/// Says how it went. That compiled dependencies cannot be shared hides no failure.
fn conclude(repository: &Repository, report: &Report) -> Result<()> {
    println!("\n{report}");
    let shared = Cache::open().and_then(|cache| dependencies::give(repository, &cache));
    ensure!(report.is_good(), "tests failed");
    shared
}

fn prepare(repository: &Repository, arguments: &[String]) -> Result<Command> {
    let Product { program, images } = stack::build(repository)?;
    let (for_cargo, for_tests) = split(arguments);
    let mut command = repository.cargo();
    command
        .args(["test", "--no-fail-fast"])
        .args(for_cargo)
        // Shows what passed tests printed, too; `Report` lets through what is of interest.
        .args(["--", "--show-output"])
        .args(for_tests)
        .env("WRENN_BIN", program)
        .env("WRENN_IMAGES", images);
    // Where there is none, tests say so.
    let variables = firecracker::variables(repository)?;
    command.envs(firecracker::VARIABLES.into_iter().filter_map(|name| Some((name, variables(name)?))));
    Ok(command)
}

/// What of the arguments is for cargo, and what for the test programs. Where they name no package it is all of them.
fn split(arguments: &[String]) -> (Vec<String>, &[String]) {
    let (for_cargo, for_tests) = match arguments.iter().position(|argument| argument == "--") {
        Some(at) => (&arguments[..at], &arguments[at + 1..]),
        None => (arguments, &[][..]),
    };
    // With a value behind them or in them; and cargo does not want to be told twice that it is all of them.
    let names = |argument: &String| {
        let word = argument.split('=').next().unwrap_or_default();
        word.starts_with("-p") || matches!(word, "--package" | "--workspace" | "--all")
    };
    let names_package = for_cargo.iter().any(names);
    let workspace = (!names_package).then(|| "--workspace".to_owned());
    (workspace.into_iter().chain(for_cargo.iter().cloned()).collect(), for_tests)
}

fn follow(command: &mut Command, report: &mut Report) -> Result<()> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("reading the output of cargo test")?;
        if let Some(line) = report.line(&String::from_utf8_lossy(&line)) {
            println!("{line}");
        }
    }
    let status = child.wait().context("waiting for cargo test")?;
    if !status.success() {
        report.note_failure();
    }
    Ok(())
}

/// Reads the output of `cargo test -- --show-output`.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// As cargo counts them: those that skipped themselves included.
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Tests that said that they were skipped.
    skipped: u64,
    /// Tests that passed or were skipped here and passed in the lab, where they are counted.
    elsewhere: u64,
    /// Tests that said that they passed. Those of the lab, which this run comes after, included.
    names: BTreeSet<String>,
    /// The names of those that passed in the lab.
    in_lab: BTreeSet<String>,
    /// What long tests said about themselves.
    soak: Vec<String>,
    /// Within the section that repeats the output of tests that passed.
    in_successes: bool,
    /// Within the section that repeats the output of those that failed.
    in_failures: bool,
    /// The test whose output is being read, until it is known to be skipped.
    test: Option<String>,
    /// The test that a line named which is not known to have ended.
    begun: Option<String>,
}

impl Report {
    /// A report that goes on counting after that of the lab. What was skipped there is counted by what becomes of it here.
    fn beside(lab: Option<Self>) -> Self {
        let Some(Self { passed, failed, skipped, names, soak, .. }) = lab else {
            return Self::default();
        };
        Self { passed: passed.saturating_sub(skipped), failed, in_lab: names, soak, ..Self::default() }
    }

    /// Notes that the run failed. If no test did, something did not compile, or a program ended before it could count.
    pub(crate) fn note_failure(&mut self) {
        self.failed = self.failed.max(1);
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0
    }

    /// Takes one line and says what a person should see of it.
    pub(crate) fn line(&mut self, line: &str) -> Option<String> {
        if let Some((passed, failed, ignored)) = counts(line) {
            (self.in_successes, self.in_failures, self.test) = (false, false, None);
            self.passed += passed;
            self.failed += failed;
            self.ignored += ignored;
            return Some(line.to_owned());
        }
        if line == "failures:" {
            (self.in_successes, self.in_failures, self.test) = (false, true, None);
        } else if line == "successes:" {
            self.in_successes = true;
            return None;
        }
        if !self.in_successes {
            if let Some((name, said)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
                self.begun = Some(name.trim_end().to_owned());
                self.has_ended(said);
            } else {
                self.has_ended(line);
            }
            // With one test at a time the name of the test stands before what it prints.
            let said = line.split_once(" ... soak: ").filter(|(before, _)| before.starts_with("test "));
            let said = line.strip_prefix("soak: ").or_else(|| said.map(|(_, said)| said));
            if let Some(said) = said.filter(|_| !self.in_failures) {
                self.soak.push(said.to_owned());
            }
            return Some(line.to_owned());
        }
        if let Some(test) = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----")) {
            self.test = Some(test.to_owned());
            return None;
        }
        if let Some(said) = line.strip_prefix("soak: ") {
            self.soak.push(said.to_owned());
            return Some(line.to_owned());
        }
        let why = line.strip_prefix("skipped: ")?;
        let test = self.test.take()?;
        self.names.remove(&test);
        if self.in_lab.contains(&test) {
            return Some(format!("ran in the lab: {test}"));
        }
        self.skipped += 1;
        Some(format!("skipped {test}: {why}"))
    }

    /// Takes what follows the name of a test: how it ended, or what it prints.
    fn has_ended(&mut self, said: &str) {
        if said == "ok"
            && let Some(name) = self.begun.take()
        {
            self.elsewhere += u64::from(self.in_lab.contains(&name));
            self.names.insert(name);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, ignored, skipped, elsewhere, .. } = self;
        write!(
            f,
            "{} passed, {failed} failed, {} skipped",
            passed.saturating_sub(skipped + elsewhere),
            ignored + skipped
        )
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn counts(line: &str) -> Option<(u64, u64, u64)> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |what: &str| {
        counts
            .split("; ")
            .find_map(|part| part.strip_suffix(what))
            .and_then(|number| number.trim().parse().ok())
    };
    Some((count(" passed")?, count(" failed")?, count(" ignored")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 4 tests
test a::one ... ok
test a::two ... ok
test a::three ... ignored
test a::four ... FAILED

successes:

---- a::one stdout ----
skipped: needs root
skipped: and more

---- a::two stdout ----
hello
soak: forks, 500, seed 7, all good
successes:
    a::one
    a::two

failures:

---- a::four stdout ----
skipped: is what this prints before it fails
soak: cycles, 2, seed 1, the third was not the same

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s

running 1 test
skipped: by a child of a test, which is not captured
soak: kills, 2, seed 1, nothing lost
test c::five ... soak: cycles, 3, seed 1, all the same
ok
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn what_passed_in_the_lab_is_counted_once() {
        let mut lab = Report::default();
        for line in [
            "test a::one ... ok",
            "test a::two ... ok",
            "test a::six ... ok",
            "test c::five   ... says something",
            "ok",
            "successes:",
            "---- a::two stdout ----",
            "skipped: not there, and it passes here",
            "---- a::six stdout ----",
            "skipped: not even there",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured",
        ] {
            lab.line(line);
        }
        assert_eq!(lab.to_string(), "2 passed, 0 failed, 2 skipped");
        let mut report = Report::beside(Some(lab));
        let mut shown: Vec<String> = OUTPUT.lines().filter_map(|line| report.line(line)).collect();
        assert_eq!(report.to_string(), "3 passed, 1 failed, 1 skipped", "{report:?}");
        for line in [
            "test a::six ... ok",
            "successes:",
            "---- a::six stdout ----",
            "skipped: nor here",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured",
        ] {
            shown.extend(report.line(line));
        }
        for line in ["ran in the lab: a::one", "skipped a::six: nor here"] {
            assert!(shown.contains(&line.to_owned()), "{shown:#?}");
        }
        assert_eq!(report.to_string(), "3 passed, 1 failed, 2 skipped", "{report:?}");
        assert!(Report::beside(None).is_good() && !report.is_good());
    }

    #[test]
    fn without_a_package_it_is_all_of_them() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let arguments = words("-p envd --test files -- --nocapture name");
        assert_eq!(split(&arguments), (words("-p envd --test files"), &words("--nocapture name")[..]));
        assert_eq!(split(&words("name")), (words("--workspace name"), &[][..]));
        for named in ["-penvd", "--package=envd", "--workspace --lib", "--all"] {
            assert_eq!(split(&words(named)), (words(named), &[][..]));
        }
        assert_eq!(split(&words("--lib --profile=x")).0, words("--workspace --lib --profile=x"));
    }

    #[test]
    fn counts_what_was_skipped() {
        let mut report = Report::default();
        let shown: Vec<String> = OUTPUT.lines().filter_map(|line| report.line(line)).collect();
        assert_eq!(report.to_string(), "2 passed, 1 failed, 2 skipped");
        let soaks = [
            "forks, 500, seed 7, all good",
            "kills, 2, seed 1, nothing lost",
            "cycles, 3, seed 1, all the same",
        ];
        assert_eq!(report.soak, soaks);
        assert!(shown.contains(&"skipped a::one: needs root".to_owned()), "{shown:#?}");
        assert!(!shown.contains(&"hello".to_owned()));
        assert!(shown.contains(&"---- a::four stdout ----".to_owned()));
    }
}
