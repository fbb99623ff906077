//! Building the product and starting it: thin wrappers around the `wrenn` program.

use std::{fs, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use wrenn_lab::plan::Program;

use crate::{
    cache::{self, Cache},
    dependencies, firecracker, guest_bundle, host, images,
    lab::{self, Capacity, Job},
    programs,
    repository::Repository,
    step,
};

/// What comes back from it.
const FIRECRACKER_PAGE: &str = "FIRECRACKER.md";

/// What is passed on to the program.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Passed on, for example `--listen 127.0.0.1:9000`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// A built product.
#[derive(Debug)]
pub(crate) struct Product {
    pub(crate) program: PathBuf,
    pub(crate) images: PathBuf,
}

/// Builds images and program.
pub(crate) fn build(repository: &Repository) -> Result<Product> {
    let images = images::make(repository, false)?;
    let cache = Cache::open()?;
    let program = repository.program();
    programs::find_or_build(repository, &cache, &program, || {
        let mut command = repository.cargo();
        command.args(["build", "--release", "--package", "wrenn"]);
        step::loud("building the release program", &mut command)?;
        dependencies::give(repository, &cache)
    })?;
    Ok(Product { program, images })
}

/// Builds, then becomes the program with a command that runs a stack of this clone.
pub(crate) fn run(repository: &Repository, command: &str, Arguments { arguments }: &Arguments) -> Result<()> {
    host::require_sandboxes()?;
    let Product { program, images } = build(repository)?;
    become_it(
        Command::new(program)
            .arg(command)
            .arg("--images")
            .arg(images)
            .args(arguments)
            .current_dir(repository.root()),
    )
}

/// Which of the programs measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bench {
    /// Creates, into bench/RESULTS.md.
    Creates,
    /// Pause, resume, snapshots, forks, into bench/PERSISTENCE.md.
    Persistence,
    /// The guest agent, into bench/GUEST.md.
    Guest,
    /// Restores under Firecracker, in the lab, into bench/FIRECRACKER.md. Only when it is asked for.
    Firecracker,
}

impl Bench {
    /// A first word says which, and the rest is for that one; without a word it is all that needs no lab, or with
    /// arguments creates.
    fn which(arguments: &[String]) -> (&'static [Self], &[String]) {
        match arguments.split_first() {
            None => (&[Self::Creates, Self::Persistence, Self::Guest], arguments),
            Some((word, rest)) if word == "creates" => (&[Self::Creates], rest),
            Some((word, rest)) if word == "persistence" => (&[Self::Persistence], rest),
            Some((word, rest)) if word == "guest" => (&[Self::Guest], rest),
            Some((word, rest)) if word == "firecracker" => (&[Self::Firecracker], rest),
            Some(_) => (&[Self::Creates], arguments),
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Creates => "wrenn-bench",
            Self::Persistence => "wrenn-bench-persistence",
            Self::Guest => "wrenn-bench-guest",
            Self::Firecracker => "wrenn-bench-firecracker",
        }
    }
}

/// Builds, then measures. The exit code is that of the program.
pub(crate) fn bench(repository: &Repository, Arguments { arguments }: &Arguments) -> Result<u8> {
    let (benches, arguments) = Bench::which(arguments);
    if benches == [Bench::Firecracker] {
        return bench_firecracker(repository, arguments);
    }
    host::require_sandboxes()?;
    let Product { program, images } = build(repository)?;
    let envd = guest_bundle::build_envd(repository, &Cache::open()?)?;
    let mut commands = benches.iter().map(|bench| {
        let mut command = repository.cargo();
        command
            .args(["run", "--release", "--package", "wrenn-bench", "--bin", bench.program(), "--"])
            .args(arguments)
            .env("WRENN_BIN", &program)
            .env("WRENN_IMAGES", &images)
            .env("WRENN_ENVD", &envd);
        command
    });
    let last = commands.next_back();
    for mut command in commands {
        step::loud("measuring", &mut command)?;
    }
    last.map_or(Ok(0), |mut command| become_it(&mut command).map(|()| 0))
}

/// Builds, then measures in the lab, and puts the page where the others are.
fn bench_firecracker(repository: &Repository, arguments: &[String]) -> Result<u8> {
    if !firecracker::is_there(repository)? {
        println!("skipped: {}", firecracker::REMEDY);
        return Ok(0);
    }
    let images = images::make(repository, false)?;
    let name = Bench::Firecracker.program();
    let mut command = repository.cargo();
    command.args(["build", "--release", "--package", "wrenn-bench", "--bin", name]);
    step::loud("building the program that measures", &mut command)?;
    let program = Program {
        path: repository.target().join("release").join(name),
        arguments: arguments.to_vec(),
        directory: repository.root().to_owned(),
    };
    let job = Job {
        programs: vec![program],
        with: vec![images],
        capacity: Capacity::usual(repository)?,
        output: repository.target().join("lab"),
    };
    let page = job.output.join(FIRECRACKER_PAGE);
    cache::remove(&page)?;
    let code = lab::run_job(repository, &job);
    if page.is_file() {
        let place = repository.path("bench").join(FIRECRACKER_PAGE);
        fs::copy(&page, &place)
            .with_context(|| format!("copying {} to {}", page.display(), place.display()))?;
        println!("copied to {}", place.display());
    }
    Ok(code)
}

/// Stops the stack of this clone. What was never built was never started.
pub(crate) fn down(repository: &Repository, Arguments { arguments }: &Arguments) -> Result<()> {
    let program = repository.program();
    if !program.is_file() {
        println!("nothing to stop: {} was never built", program.display());
        return Ok(());
    }
    become_it(Command::new(program).arg("down").args(arguments).current_dir(repository.root()))
}

/// Signals and exit codes are then the program's own, with nothing in between.
fn become_it(command: &mut Command) -> Result<()> {
    let error = command.exec();
    bail!(anyhow::Error::new(error).context(format!("starting {}", command.get_program().to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_word_says_what_is_measured() {
        let which = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let (benches, rest) = Bench::which(&words);
            (benches, rest.to_vec())
        };
        assert_eq!(which(&[]), ([Bench::Creates, Bench::Persistence, Bench::Guest].as_slice(), vec![]));
        assert_eq!(which(&["persistence"]).0, [Bench::Persistence]);
        assert_eq!(which(&["guest", "--rounds", "1"]).0, [Bench::Guest]);
        assert_eq!(which(&["guest", "--rounds", "1"]).1, ["--rounds", "1"]);
        assert_eq!(which(&["firecracker"]).0, [Bench::Firecracker]);
        assert_eq!(
            which(&["--count", "5"]),
            ([Bench::Creates].as_slice(), vec!["--count".to_owned(), "5".to_owned()])
        );
        assert_eq!(which(&["creates"]), ([Bench::Creates].as_slice(), vec![]));
    }
}
