//! What `--fix` changes: settings of the running kernel that can be set back, and modules that are there. Never how
//! the host boots, and never what would take something from programs that run: those are only said.
//!
//! Nothing of it outlives a boot.

use std::time::Duration;

use serde::Serialize;
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    programs::{self, Program},
    tree::{Seen, Tree},
};

/// How long the kernel may take. To take merged pages apart, it reads all of them.
const BOUND: Duration = Duration::from_secs(120);

/// A change that is safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fix {
    /// A module that is there is loaded.
    Load(&'static str),
    /// A setting of the kernel gets another value.
    Set {
        /// Its file.
        path: &'static str,
        /// The value.
        value: &'static str,
    },
}

/// A change that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fixed {
    /// The check whose finding it was.
    pub name: &'static str,
    /// What was to be done, as a command.
    pub change: String,
    /// What makes it undone, as a command, if it was done.
    pub undo: Option<String>,
    /// Why it was not done.
    pub error: Option<String>,
}

impl Fix {
    /// The change, as a command.
    #[must_use]
    pub fn command(&self) -> String {
        match self {
            Self::Load(module) => format!("modprobe {module}"),
            Self::Set { path, value } => format!("echo {value} > {path}"),
        }
    }

    pub(super) async fn apply(&self, tree: &Tree, name: &'static str) -> Fixed {
        let done = match self {
            Self::Load(module) => load(module).await,
            Self::Set { path, value } => set(tree.clone(), path, value).await,
        };
        let (undo, error) = match done {
            Ok(undo) => (Some(undo), None),
            Err(error) => (None, Some(error)),
        };
        Fixed { name, change: self.command(), undo, error }
    }
}

async fn load(module: &str) -> Result<String, String> {
    // Where Debian has it. A login without root's PATH does not find it by its name.
    match programs::ask("/usr/sbin/modprobe".into(), &[module]).await {
        Program::Answers { .. } => Ok(format!("modprobe -r {module}")),
        Program::Missing => Err("there is no modprobe; install the package kmod".to_owned()),
        Program::Fails { problem, .. } => Err(problem),
    }
}

async fn set(tree: Tree, path: &'static str, value: &'static str) -> Result<String, String> {
    let change = move || {
        let before = match tree.text(path) {
            Seen::Is(before) => before,
            Seen::Absent => return Err("there is no such setting".to_owned()),
            Seen::Unreadable(why) => return Err(why),
        };
        tree.write(path, value).map_err(|error| error.to_string())?;
        Ok(format!("echo {before} > {path}"))
    };
    let changed = timeout(BOUND, spawn_blocking(change)).await;
    let changed = changed.map_err(|_| format!("the kernel did not take it within {BOUND:?}"))?;
    changed.map_err(|error| error.to_string())?
}

#[cfg(test)]
mod tests {
    use camino::Utf8Path;

    use super::*;

    #[tokio::test]
    async fn a_setting_is_changed_and_how_to_undo_it_is_said() {
        let place = tempfile::tempdir().unwrap();
        let tree = Tree::below(Utf8Path::from_path(place.path()).unwrap());
        let fix = Fix::Set { path: "/run", value: "2" };
        let fixed = fix.apply(&tree, "ksm").await;
        assert_eq!(fixed.error.as_deref(), Some("there is no such setting"));
        std::fs::write(place.path().join("run"), "1\n").unwrap();
        let fixed = fix.apply(&tree, "ksm").await;
        assert_eq!((fixed.change.as_str(), fixed.undo.as_deref()), ("echo 2 > /run", Some("echo 1 > /run")));
        assert_eq!(fixed.error, None);
        assert_eq!(tree.number("/run"), Seen::Is(2));
    }

    #[tokio::test]
    async fn a_module_that_is_not_there_is_an_error_and_not_more() {
        let fixed = Fix::Load("no_such_module_of_wrenn").apply(&Tree::host(), "kvm").await;
        assert!(fixed.error.is_some() && fixed.undo.is_none(), "{fixed:?}");
    }
}
