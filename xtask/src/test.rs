//! `make test`: all tests, with what they need, and a closing line that counts the skipped ones too.
//!
//! A test that cannot run on this machine prints a line `skipped: why` and returns. To cargo such a test has
//! passed, so its output is read here: each test that printed such a line counts as skipped, and is named.
//!
//! `make soak` runs the same tests with `WRENN_SOAK=1`, by which a test does its full count instead of a sample.
//! Such a test prints lines `soak: what, how often, seed, outcome`; they go to bench/SOAK.md. A test program whose output
//! nothing holds back prints them while it runs.

use std::{
    fmt, fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cache::Cache,
    dependencies,
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
    let (report, succeeded) = follow(&mut command)?;
    dependencies::give(repository, &Cache::open()?)?;
    println!("\n{report}");
    ensure!(succeeded, "tests failed");
    Ok(())
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
    let (report, succeeded) = follow(&mut command)?;
    dependencies::give(repository, &Cache::open()?)?;
    let path = repository.path("bench/SOAK.md");
    let before = fs::read_to_string(&path).unwrap_or_default();
    let run = Run { commit: commit.trim(), arguments, counts: report.to_string(), said: &report.soak };
    fs::write(&path, soak_report::after(&before, &run))
        .with_context(|| format!("writing {}", path.display()))?;
    println!("\n{report}");
    ensure!(succeeded, "tests failed");
    Ok(())
}

fn prepare(repository: &Repository, arguments: &[String]) -> Result<Command> {
    let Product { program, images } = stack::build(repository)?;
    step::announce("running the tests");
    let (for_cargo, for_tests) = match arguments.iter().position(|argument| argument == "--") {
        Some(at) => (&arguments[..at], &arguments[at + 1..]),
        None => (arguments, &[][..]),
    };
    let mut command = repository.cargo();
    command.args(["test", "--no-fail-fast"]);
    if !for_cargo.iter().any(|argument| matches!(argument.as_str(), "-p" | "--package")) {
        command.arg("--workspace");
    }
    command
        .args(for_cargo)
        // Shows what passed tests printed, too; `Report` lets through what is of interest.
        .args(["--", "--show-output"])
        .args(for_tests)
        .env("WRENN_BIN", program)
        .env("WRENN_IMAGES", images);
    Ok(command)
}

fn follow(command: &mut Command) -> Result<(Report, bool)> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut report = Report::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("reading the output of cargo test")?;
        if let Some(line) = report.line(&String::from_utf8_lossy(&line)) {
            println!("{line}");
        }
    }
    let status = child.wait().context("waiting for cargo test")?;
    if !status.success() && report.failed == 0 {
        // Something did not compile, or a test program ended before it could count.
        report.failed = 1;
    }
    Ok((report, status.success()))
}

/// Reads the output of `cargo test -- --show-output`.
#[derive(Debug, Default)]
struct Report {
    /// As cargo counts them: those that skipped themselves included.
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Tests that said that they were skipped.
    skipped: u64,
    /// What long tests said about themselves.
    soak: Vec<String>,
    /// Within the section that repeats the output of tests that passed.
    in_successes: bool,
    /// Within the section that repeats the output of those that failed.
    in_failures: bool,
    /// The test whose output is being read, until it is known to be skipped.
    test: Option<String>,
}

impl Report {
    /// Takes one line and says what a person should see of it.
    fn line(&mut self, line: &str) -> Option<String> {
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
        self.skipped += 1;
        Some(format!("skipped {test}: {why}"))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, ignored, skipped, .. } = self;
        write!(
            f,
            "{} passed, {failed} failed, {} skipped",
            passed.saturating_sub(*skipped),
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
