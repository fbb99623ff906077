//! What the programs that measure do around their measuring: a stack of their own before it, a page after it.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wrenn_testkit::{Stack, StackOptions, stack};

/// That there can be real machines here.
///
/// # Errors
/// Why not.
pub fn can_measure() -> Result<()> {
    refuse(stack::cannot_run())
}

/// That there can be real machines under Firecracker here.
///
/// # Errors
/// Why not.
pub fn can_measure_firecracker() -> Result<()> {
    refuse(stack::cannot_run_firecracker())
}

fn refuse(reason: Option<String>) -> Result<()> {
    let Some(reason) = reason else { return Ok(()) };
    bail!("nothing can be measured here: {}", reason.trim_start_matches("skipped: "))
}

/// Starts a stack, measures it, and stops it, however that went.
///
/// # Errors
/// There can be no stack, it does not end well, and those of `measure`.
pub async fn with_stack<T>(measure: impl AsyncFnOnce(&Stack) -> Result<T>) -> Result<T> {
    can_measure()?;
    eprintln!("starting a stack");
    let stack = Stack::start(StackOptions::default()).await?;
    let measured = measure(&stack).await;
    let stopped = stack.stop().await;
    let measured = measured?;
    stopped.map(|()| measured)
}

/// Waits for something unless whoever started the program wants no more of it. What was made for it before is still to be
/// given back then.
///
/// # Errors
/// Those of `work`, or that it was interrupted.
pub async fn unless_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = work => done,
        signal = tokio::signal::ctrl_c() => signal.map_err(Into::into).and_then(|()| bail!("interrupted")),
    }
}

/// Writes the page of a run, and shows it with its ratios.
///
/// # Errors
/// It cannot be written, or something that is in it failed.
pub fn publish(output: &Path, text: &str, ratio_lines: &str, failures: &[String]) -> Result<()> {
    std::fs::write(output, text).with_context(|| format!("write {}", output.display()))?;
    println!("{text}");
    eprintln!("written to {}", output.display());
    print!("{ratio_lines}");
    ensure!(failures.is_empty(), "{} operations failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_with_failures_is_written_and_the_program_fails() {
        let directory = tempfile::tempdir().unwrap();
        let page = directory.path().join("PAGE.md");
        publish(&page, "one\n", "", &[]).unwrap();
        let failed = publish(&page, "two\n", "", &["create: refused".to_owned()]).unwrap_err();
        assert_eq!(failed.to_string(), "1 operations failed:\ncreate: refused");
        assert_eq!(std::fs::read_to_string(&page).unwrap(), "two\n");
    }
}
