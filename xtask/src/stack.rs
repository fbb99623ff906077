//! Building the product and starting it: thin wrappers around the `wrenn` program.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::{cache::Cache, dependencies, host, images, programs, repository::Repository, step};

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

/// Builds, then measures.
pub(crate) fn bench(repository: &Repository, Arguments { arguments }: &Arguments) -> Result<()> {
    host::require_sandboxes()?;
    let Product { program, images } = build(repository)?;
    let mut command = repository.cargo();
    command.args(["run", "--release", "--package", "wrenn-bench", "--"]).args(arguments);
    become_it(command.env("WRENN_BIN", program).env("WRENN_IMAGES", images))
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
