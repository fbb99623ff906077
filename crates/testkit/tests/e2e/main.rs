//! End to end: whole stacks, real microVMs, real PostgreSQL, the public API.
//!
//! Most cases share one stack, which is started before the first and stopped after the last; what harms a
//! stack has one of its own. A case that cannot run here says why and counts as ignored. The virtual machine monitor is
//! QEMU; in the lab it is Firecracker, and the cases are the same.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "these are tests")]

mod bad_input;
mod command_line;
mod context;
mod disk_only;
mod exec;
mod faults;
mod files;
mod guest;
mod host;
mod identity;
mod isolation;
mod kills;
mod lifecycle;
mod metrics;
mod persistence;
mod policies;
mod ports;
mod soak;
mod streams;

use std::{process::ExitCode, sync::Arc};

use libtest_mimic::{Arguments, Trial};
use wrenn_testkit::{Stack, StackOptions, stack};

use context::{Case, Context};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let shared: Vec<Case> = [
        lifecycle::cases(),
        persistence::cases(),
        disk_only::cases(),
        ports::cases(),
        metrics::cases(),
        exec::cases(),
        files::cases(),
        streams::cases(),
        guest::cases(),
        identity::cases(),
        isolation::cases(),
        bad_input::cases(),
        command_line::cases(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let own: Vec<_> =
        [faults::cases(), disk_only::own_cases(), policies::cases(), soak::cases(), kills::cases()]
            .into_iter()
            .flatten()
            .collect();

    let cannot_run = if stack::is_lab() { stack::cannot_run_firecracker() } else { stack::cannot_run() };
    if let Some(reason) = cannot_run {
        println!("{reason}");
        let all = shared.iter().map(|case| case.name).chain(own.iter().map(|case| case.name));
        let trials = all.map(|name| Trial::test(name, || Ok(())).with_ignored_flag(true)).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }

    let runtime = Arc::new(
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime"),
    );
    // A person who asks for one case, or for the list, does not wait for a stack that it does not use.
    let wanted = |name: &str| {
        !arguments.list && arguments.filter.as_deref().is_none_or(|filter| name.contains(filter))
    };
    let mut context = None;
    if shared.iter().any(|case| wanted(case.name)) {
        match runtime.block_on(Stack::start(StackOptions::default())) {
            Ok(stack) => context = Some(Arc::new(Context::new(stack))),
            Err(error) => {
                eprintln!("the stack did not start: {error:?}");
                return ExitCode::FAILURE;
            }
        }
    }
    let mut trials = Vec::new();
    for case in shared {
        let (runtime, context) = (Arc::clone(&runtime), context.clone());
        trials.push(Trial::test(case.name, move || {
            let context = context.ok_or("no stack")?;
            runtime.block_on((case.run)(Arc::clone(&context))).map_err(|error| format!("{error:?}").into())
        }));
    }
    for case in own {
        let runtime = Arc::clone(&runtime);
        trials.push(Trial::test(case.name, move || {
            runtime.block_on((case.run)()).map_err(|error| format!("{error:?}").into())
        }));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut failed = conclusion.has_failed();
    if let Some(context) = context {
        if failed {
            eprintln!("{}", context.stack().log());
        }
        // Whatever a failed case left is ended with the stack.
        if let Err(error) = runtime.block_on(context.stop()) {
            eprintln!("the stack did not stop well: {error:?}");
            failed = true;
        }
    }
    if failed { ExitCode::from(101) } else { ExitCode::SUCCESS }
}
