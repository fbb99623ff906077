//! Set-up, builds and checks of this repository: what `make` calls.
//!
//! ```text
//!  setup ──► packages.txt: the Debian packages that are missing
//!      --firecracker ─► firecracker.txt: a release of Firecracker, into the user's cache
//!  images ─► kernel ──┐
//!            envd ────┴► guest bundle (kernel + initramfs)  ─┐
//!            recipe ───► template (ext4 image)              ─┴► target/images, links into the user's cache
//!  build ──► target/release/wrenn
//!  check     format, lints, docs, dependencies, repository rules
//!  lab       programs in an emulated machine with a kernel of its own, see [`lab`]
//!  test, demo, dev, up, bench, soak      do what they need of the above, then run
//! ```
//!
//! What costs time is kept in the user's cache directory under a name made of everything it was made from,
//! so a step either finds its result or makes it, and two clones share results (see [`cache`]).

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

mod cache;
mod check;
mod cpio;
mod debian;
mod demo;
mod dependencies;
mod elf;
mod firecracker;
mod guest_bundle;
mod host;
mod images;
mod kernel;
mod lab;
mod packages;
mod programs;
mod recipe;
mod repository;
mod root_tree;
mod soak_report;
mod stack;
mod step;
mod template;
mod test;
mod tidy;
mod vmlinux;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::repository::Repository;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Set-up, builds and checks of this repository")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install the Debian packages of setup/packages.txt that are missing.
    Setup {
        /// Also download the release of Firecracker that setup/firecracker.txt names, into the user's cache.
        #[arg(long)]
        firecracker: bool,
    },
    /// Make what guests are started from: kernel, initramfs and templates, in target/images.
    Images {
        /// Look for a newer kernel and newer packages instead of using what was made before.
        #[arg(long)]
        refresh: bool,
    },
    /// Build the release `wrenn` program and the images.
    Build,
    /// Check format, lints, documentation, dependencies and the rules of this repository.
    Check,
    /// Run all tests.
    Test {
        /// Passed on to `cargo test`: `-p CRATE`, a part of a test's name, `-- --nocapture`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run programs in an emulated machine with a kernel of its own; without any, the tests that are marked for it.
    Lab(lab::Arguments),
    /// Run a Python program in a microVM through the public API, and show what took how long.
    Demo,
    /// Run the stack in the foreground, on 127.0.0.1:8000.
    Dev(stack::Arguments),
    /// Run the stack in the background.
    Up(stack::Arguments),
    /// Stop the stack that `up` started.
    Down(stack::Arguments),
    /// Measure, into bench/RESULTS.md, PERSISTENCE.md and GUEST.md; `creates`, `persistence` or `guest` first: only that;
    /// `firecracker`: in the lab, into bench/FIRECRACKER.md.
    Bench(stack::Arguments),
    /// Run the tests with their full counts, into bench/SOAK.md.
    Soak {
        /// Passed on to `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let repository = Repository::find();
    match execute(&repository, arguments.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gives the exit code: only that of a program in the lab, or of one that measures, is not 0.
fn execute(repository: &Repository, command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Lab(arguments) => return lab::run(repository, &arguments),
        Command::Bench(arguments) => return stack::bench(repository, &arguments),
        Command::Setup { firecracker } => packages::install_missing(repository)
            .and_then(|()| if firecracker { firecracker::download(repository) } else { Ok(()) }),
        Command::Images { refresh } => images::make(repository, refresh).map(drop),
        Command::Build => stack::build(repository).map(drop),
        Command::Check => check::run(repository),
        Command::Test { arguments } => test::run(repository, &arguments),
        Command::Demo => demo::run(repository),
        Command::Dev(arguments) => stack::run(repository, "dev", &arguments),
        Command::Up(arguments) => stack::run(repository, "up", &arguments),
        Command::Down(arguments) => stack::down(repository, &arguments),
        Command::Soak { arguments } => test::soak(repository, &arguments),
    }
    .map(|()| 0)
}
