//! The SDK of PyPI: pytest of one file is one test.

use std::{fs, path::PathBuf, process::Command};

use libtest_mimic::{Failed, Trial};

use crate::{
    SOURCES,
    environment::{self, environment, succeed},
};

pub(crate) fn trials(root: bool) -> Vec<Trial> {
    let mut files: Vec<String> = fs::read_dir(SOURCES)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("test_") && name.ends_with(".py"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "there are no tests in {SOURCES}");
    let trials = files.into_iter().map(|file| {
        let name = format!("sdk::{}", file.trim_start_matches("test_").trim_end_matches(".py"));
        Trial::test(name, move || run(&file)).with_ignored_flag(!root)
    });
    trials.collect()
}

fn run(file: &str) -> Result<(), Failed> {
    let python = python()?;
    let temporary = environment::temporary(file);
    let mut command = Command::new(python);
    command
        .args(["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--basetemp"])
        .arg(&temporary)
        .arg(format!("{SOURCES}/{file}"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("ENVD", env!("CARGO_BIN_EXE_envd"));
    let outcome = succeed(command);
    // What is left is in the build directory.
    let _ = fs::remove_dir_all(temporary);
    let said = outcome?;
    println!("{file}: {}", said.lines().last().unwrap_or_default());
    Ok(())
}

/// The Python of an environment with the SDK in it.
fn python() -> Result<PathBuf, Failed> {
    let requirements = format!("{SOURCES}/requirements.txt");
    let version = format!("{}\n", environment::version("python3")?);
    let ingredients: [&[u8]; 3] = [b"1\n", version.as_bytes(), &fs::read(&requirements)?];
    let place = environment("python", &ingredients, |made| {
        let mut command = Command::new("python3");
        command.args(["-m", "venv"]).arg(made);
        succeed(command)?;
        let mut command = Command::new(made.join("bin/python"));
        command.args(["-m", "pip", "install", "--quiet", "--requirement", &requirements]);
        succeed(command).map(drop)
    });
    Ok(place?.join("bin/python"))
}
